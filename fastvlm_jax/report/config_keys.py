"""Makes docs/config.md, every config key on one page: `python -m fastvlm_jax.report.config_keys [--output FILE.md]`.

A key's meaning is the comment beside or above its assignment in config.py. Keys that come from the size tables are
arguments of a module, whose docstring explains them.
"""

import inspect
import pathlib
import re
import textwrap
from collections.abc import Iterator
from typing import Any

from absl import app, flags

from fastvlm_jax import config as config_lib
from fastvlm_jax import files
from fastvlm_jax.models.convnext import ConvNeXt
from fastvlm_jax.models.decoder import Decoder
from fastvlm_jax.models.fastvit import FastViT
from fastvlm_jax.models.sizes import CLIP_SIZES, LLM_SIZES, VISION_SIZES
from fastvlm_jax.models.text_tower import TextTower
from fastvlm_jax.models.vit import ViT

OUTPUT = flags.DEFINE_string("output", "docs/config.md", "Markdown file to write")
PREFIXES = {"c": "", "model": "model.", "data": "data."}  # variables of config.py -> where their keys stand
ASSIGNMENT = re.compile(r"    +(c|model|data)\.([\w.]+) = (.*)")
# Sections of the page: title, start of their keys, the size that shows their defaults, module of the arguments, the
# sizes of that module. A size of CLIP_SIZES shows what only stage 0 has.
SECTIONS = (
    ("The run", "", "0.5b", None, ()),
    ("Encoder: the FastViT family", "model.vision.", "0.5b", FastViT, VISION_SIZES),
    ("Encoder: vision transformers", "model.vision.", "0.5b,siglip_so400m_384", ViT, VISION_SIZES),
    ("Encoder: ConvNeXt", "model.vision.", "0.5b,convnext_l", ConvNeXt, VISION_SIZES),
    ("Language model", "model.llm.", "0.5b", Decoder, LLM_SIZES),
    ("Data", "data.", "0.5b", None, ()),
    ("Stage 0: the loss", ("loss.", "model.sigmoid"), "s3", None, ()),
    ("Stage 0: image tower", "model.vision.", "s3", FastViT, ()),
    ("Stage 0: text tower", "model.text.", "s3", TextTower, ()),
    ("Stage 0: data", "data.", "s3", None, ()),
)
FAMILY = "kind of encoder: `fastvit` (where the key is absent), `vit` or `convnext`"
HEAD = """# Every key of a training config

Made by `python -m fastvlm_jax.report.config_keys` from [config.py](../fastvlm_jax/config.py), not by hand. A key is set
on the command line (`--config.data.groups=64`) or in a stage file ([configs/](../configs)). The defaults are those of
the size `0.5b`, followed by the default of the size `tiny` if it differs. The sections of the other encoders show the
defaults of `siglip_so400m_384` and `convnext_l`, those of stage 0 what only stage 0 has, with the defaults of `s3`.
"""


def meanings() -> dict[str, str]:
    """Returns key -> the comment that explains its assignment in config.py."""
    found, above = {}, []
    for line in inspect.getsource(config_lib).splitlines():
        match = ASSIGNMENT.match(line)
        if match and match[2] != match[1]:
            _, _, beside = match[3].partition("  # ")
            if beside or above:
                found[PREFIXES[match[1]] + match[2]] = beside or " ".join(above)
        above = [*above, line.strip().removeprefix("# ")] if line.strip().startswith("# ") else []
    return found


def arguments(module: type) -> dict[str, str]:
    """Returns the arguments of a module -> their entries under "Attributes:" in its docstring."""
    entries = inspect.getdoc(module).partition("Attributes:\n")[2].partition("\n\n")[0]
    found: dict[str, str] = {}
    for entry in re.split(r"\n(?=\S)", textwrap.dedent(entries)):
        names, _, text = entry.partition(":")
        found |= {name.strip(): " ".join(text.split()) for name in names.split(",")}
    return found


def keys(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the dotted keys of a nested dict with their values."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from keys(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def page() -> str:
    """Returns the page.

    Raises:
      ValueError: a key has no meaning, in config.py or in a docstring.
    """
    known, lines = {"model.vision.family": FAMILY, **meanings()}, [HEAD]
    tiny = dict(keys(config_lib.get_base("tiny").to_dict()))
    shown = set(dict(keys(config_lib.get_base("0.5b").to_dict())))
    for title, prefix, size, module, sizes in SECTIONS:
        of_module = arguments(module) if module else {}
        values = dict(keys((config_lib.pairs_of if size in CLIP_SIZES else config_lib.get_base)(size).to_dict()))
        if size in CLIP_SIZES:
            values = {key: value for key, value in values.items() if key not in shown}
        # Keys that only other sizes give; here the module's own default holds.
        for key in {key for given in dict(sizes).values() for key in given} & of_module.keys():
            values.setdefault(prefix + key, module.__dataclass_fields__[key].default)
        lines += [f"## {title}", "", "| key | default | meaning |", "|---|---|---|"]
        for key, value in sorted(values.items()):
            own = key.startswith(prefix) if prefix else not key.startswith(("model.vision.", "model.llm.", "data."))
            if not own:
                continue
            meaning = known.get(key) or of_module.get(key.rpartition(".")[2])
            if not meaning:
                raise ValueError(f"{key} has no meaning: explain it beside its assignment in config.py")
            default = f"`{value!r}`"
            if size == "0.5b" and module is None and tiny.get(key, value) != value:
                default += f", tiny `{tiny[key]!r}`"
            lines.append(f"| `{key}` | {default} | {_sentence(meaning)} |")
        lines.append("")
    return "\n".join(lines)


def _sentence(meaning: str) -> str:
    """Returns a cell of the table: a capital letter first, unless the text opens with a file name or a literal."""
    text = meaning.rstrip(".").replace("|", "\\|")
    return text if "." in text.split()[0] else text[0].upper() + text[1:]


def main(argv: list[str]) -> None:
    if argv[1:]:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    files.write_whole(pathlib.Path(OUTPUT.value), page().encode())


if __name__ == "__main__":
    app.run(main)
