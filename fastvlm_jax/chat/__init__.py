"""Lets people talk with a model about images, on a page of this machine or on a terminal."""

import sys
import webbrowser
from typing import Any

from fastvlm_jax import model_io
from fastvlm_jax.chat.about import describe
from fastvlm_jax.chat.answering import Answering
from fastvlm_jax.chat.terminal import talk
from fastvlm_jax.chat.worker import Worker


def on_terminal(source: str, dtype: str | None, options: dict[str, Any], temperature: float, seed: int) -> None:
    """Answers what is typed until the input ends.

    Args:
      source, dtype: model to load, see `model_io.load`.
      options: arguments of `Answering`.
      temperature, seed: see `generate.generate`.

    Raises:
      ValueError, OSError: the model cannot be loaded or cannot answer, or an option is out of range.
    """
    model, variables, processor = model_io.load(source, dtype)
    talk(Answering(model, variables, processor, **options), temperature, seed, sys.stdin, sys.stdout, sys.stderr)


def on_page(
    source: str, dtype: str | None, options: dict[str, Any], temperature: float, port: int, opened: bool
) -> None:
    """Serves the page until Ctrl-C.

    Args:
      source, dtype, options: see `on_terminal`.
      temperature: the page's at first.
      port: port of 127.0.0.1; 0 takes any that is free.
      opened: whether to open the page in the user's browser.

    Raises:
      ValueError, OSError: as for `on_terminal`, or the port cannot be had.
      KeyboardInterrupt: Ctrl-C.
    """
    from fastvlm_jax.chat.server import make_app, make_server, open_port  # needs packages that a terminal does not

    with open_port(port) as listening:
        loaded = model_io.read(source)
        model, variables = model_io.put(loaded, dtype)
        answering = Answering(model, variables, loaded.processor, **options)
        about = describe(loaded, answering, temperature)
        worker = Worker(answering)
        try:
            address = f"http://127.0.0.1:{listening.getsockname()[1]}"
            print(f"{about['name']} answers at {address} until Ctrl-C", flush=True)
            if opened:
                webbrowser.open(address)
            make_server(make_app(worker, about)).run(sockets=[listening])
            raise KeyboardInterrupt  # what ends the server; asyncio keeps it for itself from Python 3.12 on
        finally:
            worker.stop()
