"""Tests of damaged and hostile model directories: each gives the same tensors, or one line that names the bad file.

A mutation changes the safetensors header, a JSON file, the bytes of either, the shards or their index. None may raise
another exception, need more than LIMIT bytes of memory, or take longer than SECONDS.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import random
import resource
import shutil
import signal

import flax
import jax
import numpy as np
import pytest

from fastvlm_jax import convert, model_io
from fastvlm_jax.convert import mapping
from fastvlm_jax.models import kinds
from fastvlm_jax.models.sizes import VISION_SIZES
from fastvlm_jax.processor import Processor
from fastvlm_jax.text.tokenizer import load_tokenizer, train_sentencepiece

LIMIT, SECONDS = 500_000_000, 20
LLM = dict(vocab_size=320, width=8, num_layers=1, num_heads=2, num_kv_heads=1, mlp_dim=8)
TOWER = dict(layers=[1], embed_dims=[8], mixers=["repmixer"], form="folded")
TEXT = dict(features=8, width=8, num_layers=1, num_heads=2, vocab_size=16)
MODELS = {  # name -> (layout to write, model config)
    "native": ("native", {"vision": TOWER, "llm": LLM, "dtype": "float32"}),
    "hf": ("hf", {"vision": TOWER, "llm": LLM, "dtype": "float32"}),
    "lm": ("hf", {"llm": LLM, "dtype": "float32"}),
    "timm": ("timm", {"vision": TOWER, "dtype": "float32"}),
    "openclip": ("openclip", {"vision": {**VISION_SIZES["mci0"], "form": "folded"}, "dtype": "float32"}),
    "clip": ("openclip", {"vision": {**VISION_SIZES["mci0"], "form": "folded", "head_features": 8}, "text": TEXT}),
}
# A config with LLaVA-1.5's tower, which ml-fastvlm's layout does not have: always refused.
LLAVA = {
    "model_type": "llava_qwen2", "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "mm_projector_type": "mlp2x_gelu", "mm_hidden_size": 1024, "hidden_size": 8, "num_hidden_layers": 1,
}  # fmt: skip
COUNTS = {"native": 90, "hf": 90, "lm": 110, "timm": 60, "openclip": 16, "clip": 16, "llava": 40}
WEIRD = (
    None, True, False, -1, 0, 1, 2, 3, 5, 7, 999, 10**6, 10**9, 2**31 - 1, 2**31, 2**63, 10**30, 0.5, -5.5, 1e-300,
    1e308, float("nan"), float("inf"), -float("inf"), "", "x", "../x", "float16", "\ud800", [], [1], [-1], [[1]],
    [10**9], [0.5, "x"], [1] * 5, [10**9] * 5, ["repmixer"], ["attention"] * 3, [None] * 3, {}, {"a": 1},
    {"a": {"b": []}},
)  # fmt: skip
DTYPES = ("F32", "F16", "BF16", "F64", "I64", "I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F4", "C64", "X")


@dataclasses.dataclass(frozen=True)
class Model:
    """Holds a model directory in memory: its files by name, and the variables stored in them by path."""

    files: dict[str, bytes]
    tensors: dict[str, np.ndarray]


def flatten(variables):
    flat = flax.traverse_util.flatten_dict(variables, sep="/")
    return {path: np.asarray(leaf) for path, leaf in flat.items()}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        # Most cases share one config, so its model is traced only once.
        patch.setattr(mapping, "shapes_of", functools.lru_cache(mapping.shapes_of))
        yield make_models(tmp_path_factory.mktemp("fuzz"))


def make_models(root: pathlib.Path) -> dict[str, Model]:
    train_sentencepiece(["what is in the picture? a red circle"], root / "tokenizer.model", LLM["vocab_size"])
    processor = Processor(load_tokenizer(root / "tokenizer.model"), "qwen_2", image_size=8, tokens_per_image=4)
    found = {}
    for name, (layout, config) in MODELS.items():
        rng = np.random.default_rng(0)
        shapes = kinds.abstract_variables(kinds.build(**config))
        if name in ("openclip", "clip"):  # large, because its sizes are fixed: zeros take no space on disk
            draw = lambda x: np.broadcast_to(np.float32(0), x.shape)  # noqa: E731
        else:
            draw = lambda x: rng.standard_normal(x.shape, np.float32)  # noqa: E731
        convert.write(
            root / name, layout, jax.tree.map(draw, shapes), config, processor if "llm" in config else None, {}
        )
        files = {file.name: file.read_bytes() for file in (root / name).iterdir()}
        found[name] = Model(files, flatten(model_io.read(root / name).variables))
    found["llava"] = Model({**found["lm"].files, "config.json": json.dumps(LLAVA).encode()}, {})
    return found


# Mutations: each changes `files` in place.


def weights_of(files: dict) -> str:
    return next(name for name in sorted(files) if name.endswith(".safetensors"))


def split(blob: bytes) -> tuple[dict, bytes]:
    size = int.from_bytes(blob[:8], "little")
    return json.loads(blob[8 : 8 + size]), blob[8 + size :]


def join(header, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def flip(rng: random.Random, blob: bytes, low: int, high: int) -> bytes:
    changed = bytearray(blob)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        changed[rng.randrange(low, high)] = rng.choice((rng.randrange(256), ord(rng.choice('"{}[]:,0123456789'))))
    return bytes(changed)


def header_bytes(rng, files):
    name = weights_of(files)
    size = int.from_bytes(files[name][:8], "little")
    files[name] = flip(rng, files[name], 8, 8 + size)


def header_length(rng, files):
    name = weights_of(files)
    size = int.from_bytes(files[name][:8], "little")
    wrong = rng.choice((0, 1, size - 1, size + 1, size * 2, 2**31, 2**40, 2**63, 2**64 - 1, rng.randrange(2**20)))
    files[name] = wrong.to_bytes(8, "little") + files[name][8:]


def header_entry(rng, files):
    name = weights_of(files)
    header, data = split(files[name])
    tensor = rng.choice([key for key in header if key != "__metadata__"])
    entry = header[tensor]
    match rng.randrange(9):
        case 0:
            entry["dtype"] = rng.choice(DTYPES)
        case 1:
            entry["shape"] = rng.choice(
                ([], [0], [2**62, 2**62], [-1], entry["shape"][::-1], [*entry["shape"], 1], "x")
            )
        case 2:
            entry["data_offsets"] = rng.choice(([0, 0], [0, 2**63], [-1, 4], [4, 0], [0], None, [len(data), len(data)]))
        case 3:
            del header[tensor]
        case 4:
            header[rng.choice((tensor + "x", "../" + tensor, "", "\x00", "num_batches_tracked"))] = header.pop(tensor)
        case 5:
            header[rng.choice(("more", tensor + ".num_batches_tracked"))] = {
                "dtype": rng.choice(DTYPES), "shape": [4], "data_offsets": [len(data), len(data) + 16],
            }  # fmt: skip
            data += bytes(16)
        case 6:  # another width of numbers in half the shape
            entry["dtype"] = {"F32": "F64"}.get(entry["dtype"], "F32")
            entry["shape"] = [entry["shape"][0] // 2 or 1, *entry["shape"][1:]] if entry["shape"] else [1]
        case 7:
            header["__metadata__"] = rng.choice((None, [], {"format": 1}, {"format": "x"}, "x", {"a": {"b": 1}}))
        case 8:
            other = rng.choice([key for key in header if key != "__metadata__"])
            if header[other]["shape"] != entry["shape"]:
                header[tensor], header[other] = header[other], entry
    files[name] = join(header, data)


def cut(rng, files):
    name = rng.choice(sorted(files))
    blob = files[name]
    files[name] = rng.choice((blob[: rng.randrange(len(blob))], b"", blob + b"\0", blob + blob, blob[1:], blob[:9]))


def places(value, path=()):
    """Yields the path of keys to every value inside nested objects and lists."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def json_value(rng, files, name=None):
    name = name or rng.choice([name for name in sorted(files) if name.endswith("config.json")])
    content = json.loads(files[name])
    path = rng.choice(list(places(content)))
    value = rng.choice(WEIRD)
    if not path:
        content = value
    else:
        inside = content
        for key in path[:-1]:
            inside = inside[key]
        if rng.random() < 0.15 and isinstance(inside, dict):
            del inside[path[-1]]
        else:
            inside[path[-1]] = value
    files[name] = json.dumps(content).encode()


def config_value(rng, files):
    json_value(rng, files, "open_clip_config.json" if "open_clip_config.json" in files else "config.json")


def json_bytes(rng, files):
    name = rng.choice([name for name in sorted(files) if name.endswith((".json", ".jinja", ".model"))])
    deep = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
    files[name] = rng.choice(
        (flip(rng, files[name], 0, len(files[name])), b"[" * 100_000, deep, b"\xff\xfe", b"9" * 10_000, b"null", b"{}")
    )


def lost(rng, files):
    del files[rng.choice(sorted(files))]


def shards(rng, files):
    """Splits the weights into two shards with an index, and damages one of the three, or none."""
    name = weights_of(files)
    header, data = split(files.pop(name))
    header.pop("__metadata__", None)
    names, stem = sorted(header), name.removesuffix(".safetensors")
    parts = (names[::2], names[1::2])
    index = {"metadata": {"total_size": len(data)}, "weight_map": {}}
    for i, part in enumerate(parts):
        shard, entries, body = f"{stem}-0000{i + 1}-of-00002.safetensors", {}, b""
        for tensor in part:
            start, stop = header[tensor]["data_offsets"]
            entries[tensor] = {**header[tensor], "data_offsets": [len(body), len(body) + stop - start]}
            body += data[start:stop]
            index["weight_map"][tensor] = shard
        files[shard] = join(entries, body)
    where = index["weight_map"]
    some = rng.choice(names)
    match rng.randrange(9):
        case 1:
            where[some] = rng.choice(
                ("../" + where[some], "/etc/passwd", "a/b.safetensors", "..", "", "\0.safetensors")
            )
        case 2:
            where[some] = rng.choice(WEIRD)
        case 3:
            del files[where[some]]
        case 4:
            where["more"] = where[some]
        case 5:
            index["weight_map"] = rng.choice(WEIRD)
        case 6:  # one tensor in both shards
            other = next(shard for shard in sorted(set(where.values())) if shard != where[some])
            entries, body = split(files[other])
            start, stop = header[some]["data_offsets"]
            entries[some] = {**header[some], "data_offsets": [len(body), len(body) + stop - start]}
            files[other] = join(entries, body + data[start:stop])
        case 7:
            files[where[some]] = files[where[some]][: rng.randrange(len(files[where[some]]))]
        case 8:  # symbolic links, as in the cache of the Hugging Face hub
            files["@" + where[some]] = files.pop(where[some])
    files[f"{name}.index.json"] = json.dumps(index).encode()
    if rng.random() < 0.2:
        json_value(rng, files, f"{name}.index.json")


MUTATIONS = (
    header_bytes, header_length, header_entry, header_entry, cut, json_value, config_value, config_value, config_value,
    json_bytes, lost, shards, shards,
)  # fmt: skip


# One case: write, load, judge.


def write_folder(folder: pathlib.Path, files: dict[str, bytes]) -> None:
    """Writes the files; trailing zeros become a hole, a name that begins with @ a link to a file elsewhere."""
    for name, blob in files.items():
        file = folder / name
        if name.startswith("@"):
            file = folder.parent / "elsewhere"
            (folder / name[1:]).symlink_to(file)
        kept = blob.rstrip(b"\0")
        file.write_bytes(kept)
        os.truncate(file, len(blob))


@contextlib.contextmanager
def limits():
    """Makes the block raise MemoryError beyond LIMIT more bytes than now, and TimeoutError after SECONDS."""

    def late(*_):
        raise TimeoutError(f"more than {SECONDS} s")

    used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (used + LIMIT, before[1]))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def judge(folder: pathlib.Path, expected: dict[str, np.ndarray]) -> str:
    """Loads a directory: returns "same", "tower" (of a CLIP, its encoder alone), "refused", or what failed."""
    try:
        with limits():
            loaded = model_io.read(folder)
            kinds.build(**loaded.config)
            found = flatten(loaded.variables)
    except (ValueError, FileNotFoundError) as error:
        message = str(error)
        if "\n" in message or not message.strip():
            return f"not one line: {message!r}"
        return "refused" if str(folder) in message else f"names no file: {message}"
    except (Exception, RecursionError) as error:
        return f"{type(error).__name__}: {error}"
    outcome = "same"
    if any("/text/" in path for path in expected) and "text" not in loaded.config:
        outcome, expected = "tower", {path: x for path, x in expected.items() if "/vision/" in path}
    if found.keys() != expected.keys():
        return f"other tensors: {sorted(found.keys() ^ expected.keys())}"
    wrong = [path for path in found if not np.array_equal(found[path], expected[path], equal_nan=True)]
    return f"other values: {wrong}" if wrong else outcome


def run_cases(root: pathlib.Path, name: str, model: Model, seeds) -> dict[str, list]:
    """Runs one mutation per seed; returns outcome -> [(mutation, seed), ...]."""
    outcomes: dict[str, list] = {}
    for seed in seeds:
        rng, files = random.Random(f"{name} {seed}"), dict(model.files)
        mutation = rng.choice(MUTATIONS)
        with contextlib.suppress(StopIteration):  # no weights file left
            mutation(rng, files)
        folder = root / "case" / "model"
        folder.mkdir(parents=True)
        write_folder(folder, files)
        outcomes.setdefault(judge(folder, model.tensors), []).append((mutation.__name__, seed))
        shutil.rmtree(root / "case")
    return outcomes


@pytest.mark.parametrize("name", COUNTS)
def test_damaged_model_gives_its_tensors_or_one_line_that_names_the_file(models, name, tmp_path):
    outcomes = run_cases(tmp_path, name, models[name], range(COUNTS[name]))
    allowed = {"refused"} if name == "llava" else {"same", "refused"}
    assert set(outcomes) - {"tower"} == allowed, {k: v for k, v in outcomes.items() if k not in allowed}
    assert len(outcomes["refused"]) > COUNTS[name] // 3
