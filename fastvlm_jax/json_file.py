"""Reads the JSON objects of other people's files."""

import json
import pathlib
from typing import Any


def read_object(path: pathlib.Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
      FileNotFoundError: no such file.
      ValueError: naming the file, where it holds something else.
    """
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not readable JSON ({error}): copy or export it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object: copy or export it again")
    return content
