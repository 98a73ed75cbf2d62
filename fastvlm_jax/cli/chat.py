"""Runs `fastvlm chat`: a local page, or a shell, to talk with a model about images."""

import importlib.util
import os
import sys

from absl import flags

from fastvlm_jax.cli.arguments import define_answers, parse


def chat(argv: list[str]) -> None:
    """Serves the page until Ctrl-C, or with --terminal answers on the terminal until its input ends."""
    fv = flags.FlagValues()
    flags.DEFINE_string("model", None, "model to talk with", flag_values=fv)
    flags.DEFINE_bool("terminal", False, "talk on the terminal, without a page", flag_values=fv)
    flags.DEFINE_integer("port", 8000, "port of the page on 127.0.0.1; 0 takes any that is free", flag_values=fv)
    flags.DEFINE_bool("no_browser", False, "do not open the page, only tell its address", flag_values=fv)
    flags.DEFINE_integer("max_tokens", 256, "length of the longest answer, tokens", flag_values=fv)
    define_answers(
        fv,
        ", which the page can change",
        " on the terminal; the page draws one",
        "a conversation, with images and answers",
    )
    parse(fv, argv, required=("model",))
    if not 0 <= fv.temperature <= 10:
        raise flags.Error(f"--temperature={fv.temperature} must be from 0 to 10")
    if not fv.terminal and not all(map(importlib.util.find_spec, ("starlette", "uvicorn"))):
        raise ValueError("the page needs two packages: pip install 'fastvlm_jax[chat]', or add --terminal")
    from fastvlm_jax import chat as room

    options = {name: fv[name].value for name in ("max_tokens", "top_p", "top_k", "repetition_penalty", "max_length")}
    if fv.terminal:
        room.on_terminal(fv.model, fv.dtype, options, fv.temperature, fv.seed)
        return
    on_screen = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY") or sys.platform in ("darwin", "win32")
    room.on_page(fv.model, fv.dtype, options, fv.temperature, fv.port, bool(on_screen) and not fv.no_browser)
