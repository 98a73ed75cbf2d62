"""Names and reads the members of WebDataset tars: "a/12.syn.json" is the member "syn.json" of the entry "a/12"."""

import re
from typing import IO, NamedTuple

from fastvlm_jax.data.readers import Part, pictures, tar
from fastvlm_jax.data.readers.conversations import shown
from fastvlm_jax.data.readers.files import key_of

IMAGE = re.compile(rf"(?:(\d{{1,9}})\.)?(?:{pictures.SUFFIXES})")
_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)
_META = re.compile(r"__[^/]*__")  # members that WebDataset itself writes


class Held(NamedTuple):
    """Describes a member of an open tar: `size` bytes from byte `at` on; `wrong` says why it cannot be read, or ""."""

    file: IO[bytes]
    name: str
    at: int
    size: int
    wrong: str = ""

    def read(self, limit: int) -> bytes:
        """Returns the contents; raises ValueError if they are more than `limit` bytes."""
        if self.size > limit:
            raise ValueError(f"{shown(self.name)} is over {limit >> 20} MB")
        self.file.seek(self.at)
        data = self.file.read(self.size)
        if len(data) < self.size:
            raise ValueError(f"{shown(self.name)} is cut: the tar has changed")
        return data


Entry = dict[str, Held]  # extension to member


def held(file: IO[bytes], member: tar.Member) -> tuple[str, str, Held] | None:
    """Returns (key, extension in lower case, member) of a member with a name; None if WebDataset alone uses it."""
    if _META.fullmatch(member.name):
        return None
    name = member.name.removeprefix("./")
    key, extension, wrong = name, "", ""
    if name.startswith("/") or ".." in name.split("/"):
        wrong = "has a name that leads out of its folder"
    elif found := _NAME.fullmatch(name):
        key, extension = found[1], found[2].lower()
    else:
        wrong = "has no name of the form KEY.EXTENSION"
    return key, extension, Held(file, member.name, member.at, member.size, wrong or member.wrong)


def name_of(part: Part) -> str:
    """Returns the name of a part's tar below the source; `start` is the number of folders between the two."""
    return "/".join(part.path.split("/")[-1 - part.start :])


def key(tar_name: str, name: str) -> str:
    """Returns the key of an entry `name` of a tar in records and messages."""
    printable = name.isprintable() and len(name) <= 200
    return f"{tar_name}/{name if printable else key_of(name, name.encode('utf-8', 'surrogateescape'))}"
