"""open_clip's tokenizer and the file of its vocabulary, without the rest of that package, which imports every model."""

import importlib.util
import pathlib


def open_clip_tokenizer():
    """open_clip's tokenizer module; its `default_bpe()` is the path of CLIP's vocabulary."""
    folder = pathlib.Path(importlib.util.find_spec("open_clip").submodule_search_locations[0])
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", folder / "tokenizer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
