"""Joins tars of reinforcement with tars of pictures: those of equal names, by the keys of their entries.

    SOURCE/00000007.tar      abc.syn.json  abc.paug.json  abc.npz      the released sets hold no pictures
    PICTURES/00000007.tar    abc.jpg       abc.txt        abc.json     as img2dataset downloads them

Memory holds the names of one tar's members, never their contents.
"""

import contextlib
from collections.abc import Iterable, Iterator

from etils import epath

from fastvlm_jax.data.readers import Options, Part, members, tar
from fastvlm_jax.data.readers.members import IMAGE, Entry
from fastvlm_jax.data.record import Rejected

MAX_MEMBERS = 400_000  # members of a tar of pictures that are remembered; published tars have some 50,000


def check(parts: Iterable[Part], options: Options) -> None:
    """Raises FileNotFoundError if the folder of pictures does not exist, or holds no tar of the name of any part."""
    if not options.pictures:
        return
    folder = epath.Path(options.pictures).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder of pictures {options.pictures}: --pictures takes a folder of tars")
    names = [members.name_of(part) for part in parts]
    if not any((folder / name).exists() for name in names):
        raise FileNotFoundError(f"{options.pictures} holds none of the tars {names[0]} ...: their names must be equal")


def path_of(part: Part, options: Options) -> epath.Path | None:
    """Returns the tar of pictures for a part; None if it is not there, or the options name no pictures."""
    if not options.pictures:
        return None
    path = epath.Path(options.pictures).expanduser() / members.name_of(part)
    return path if path.exists() else None


class Pictures:
    """Holds where the pictures and captions of a tar are that a part of the source lacks.

    Attributes:
      name: name of the tar in messages.
      missing: why there are none at all; "" if the tar can be read.
    """

    def __init__(self, part: Part, options: Options):
        self.name = f"{options.pictures.rstrip('/')}/{members.name_of(part)}"
        self.missing, self._open = "", contextlib.ExitStack()
        self._tar = members.name_of(part)
        self._entries: dict[str, Entry] = {}
        self._damage: list[Rejected] = []
        path = path_of(part, options)
        if path is None:
            self.missing = f"there is no {self.name}"
            return
        try:
            self._read(path)
        except OSError as error:
            self._entries = {}
            self.missing = f"{self.name} cannot be read ({error.strerror or error})"

    def __enter__(self) -> "Pictures":
        return self

    def __exit__(self, *_) -> None:
        self._open.close()

    def join(self, name: str, entry: Entry) -> Entry:
        """Returns an entry of the source with the picture and, unless it has its own, the caption of this tar.

        Raises:
          ValueError: there is no picture, or another one in the source.
        """
        found = self._entries.pop(name, {})
        if not any(IMAGE.fullmatch(extension) for extension in found):
            raise ValueError(f"no picture of this key in {self.name}" + f": {self.missing}" * bool(self.missing))
        if any(IMAGE.fullmatch(extension) for extension in entry):
            raise ValueError(f"a picture of this key in {self.name}, and another one in the source")
        # The .json of a reinforced set has no caption, that of the pictures may.
        return found | {name: member for name, member in entry.items() if name != "json" or name not in found}

    def rest(self) -> Iterator[Rejected]:
        """Yields a Rejected for each damaged place of the tar, and for each entry that the source lacks."""
        yield from self._damage
        for name in self._entries:
            reason = f"{self.name} has it, the source nothing of this key"
            yield Rejected(self.name, members.key(self._tar, name), reason)

    def _read(self, path: epath.Path) -> None:
        file = self._open.enter_context(path.open("rb"))
        count = 0
        for member in tar.members(file, path.stat().length):
            if not member.name:
                self._damage.append(Rejected(self.name, f"byte {member.at}", member.wrong))
                continue
            found = members.held(file, member)
            if found and (IMAGE.fullmatch(found[1]) or found[1] in ("txt", "json")):
                self._entries.setdefault(found[0], {}).setdefault(found[1], found[2])
                count += 1
            if max(count, len(self._damage)) > MAX_MEMBERS:
                raise OSError(f"it has more than {MAX_MEMBERS:,} members: write its pictures as several tars")
