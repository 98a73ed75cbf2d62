"""Writes the settings of a fine-tuning run as a config file that a person can read and change."""

import json
import textwrap
from typing import Any

from fastvlm_jax.finetune.plan import Choice, Plan

WIDTH = 116  # columns of a line


def text(plan: Plan, model: str, train: str) -> str:
    """Returns the config file.

    Args:
      model: the model to tune.
      train: the command that runs it.
    """
    remarks = "\n\n".join(textwrap.fill(f"{remark[:1].upper()}{remark[1:]}.", WIDTH) for remark in plan.remarks)
    settings = "\n".join(map(_line, plan.choices))
    return f'''"""Fine-tunes a model; written by `fastvlm init`. Change what you like, then run

    {_escaped(train)}

{remarks}
"""

from fastvlm_jax.parent import open_base


def get_config():
    c = open_base({_literal(f"parent={model}")})
{settings}
    return c
'''


def _line(choice: Choice) -> str:
    """Returns the assignment of a setting, with the reason behind it or, if that is long, above it."""
    line = f"    c.{choice.key} = {_literal(choice.value)}"
    if not choice.why:
        return line
    if len(line) + len(choice.why) + 4 <= WIDTH:
        return f"{line}  # {choice.why}"
    return "\n".join([textwrap.fill(choice.why, WIDTH, initial_indent="    # ", subsequent_indent="    # "), line])


def _escaped(text: str) -> str:
    """Returns text as it stands within three double quotes."""
    return text.replace("\\", r"\\").replace('"', r"\"")


def _literal(value: Any) -> str:
    """Returns a value as Python writes it, with double quotes."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)  # JSON writes what is beyond 16 bits as Python does not
    if isinstance(value, tuple):
        return f"({', '.join(map(_literal, value))}{',' * (len(value) == 1)})"
    return repr(value)
