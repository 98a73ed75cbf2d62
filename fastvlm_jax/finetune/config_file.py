"""Writes the settings of a fine-tuning run as a config file that a person can read and change."""

import textwrap

from fastvlm_jax.finetune.plan import Plan

WIDTH = 116  # columns of a comment


def text(plan: Plan, model: str, train: str) -> str:
    """Returns the config file.

    Args:
      model: the model to tune.
      train: the command that runs it.
    """
    remarks = "\n\n".join(textwrap.fill(f"{remark[:1].upper()}{remark[1:]}.", WIDTH) for remark in plan.remarks)
    lines = []
    for key, value, why in plan.choices:
        if why:
            lines.append(textwrap.fill(why, WIDTH - 4, initial_indent="    # ", subsequent_indent="    # "))
        lines.append(f"    c.{key} = {value!r}")
    return f'''"""Fine-tunes a model; written by `fastvlm init`. Change what you like, then run

    {train}

{remarks}
"""

from fastvlm_jax.parent import open_base


def get_config():
    c = open_base({f"parent={model}"!r})
{chr(10).join(lines)}
    return c
'''
