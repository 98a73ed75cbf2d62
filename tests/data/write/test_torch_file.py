"""Tests the files of bfloat16 tensors that are written without torch: torch loads them, and so does our reader."""

import gzip
import io
import zipfile

import numpy as np
import pytest
import torch

from fastvlm_jax.data.readers import torch_file as reader
from fastvlm_jax.data.write.torch_file import packed

DRAW = np.random.default_rng(0)
ARRAYS = {
    "one": {"image_emb": DRAW.normal(size=(3, 4)).astype("f4")},
    "published": {"image_emb": DRAW.normal(size=(30, 1536)), "text_emb": DRAW.normal(size=(6, 1536)).astype("f4")},
    "lists": {f"syn_text_{i}é_emb": DRAW.normal(size=(i + 1, 5)).astype("f4") for i in range(16)},
    "strided": {"a": DRAW.normal(size=(6, 8)).astype("f4")[::2, ::3], "b": DRAW.normal(size=(5, 3)).astype("f4").T},
    "edges": {"a": np.array([[0.0, -0.0, 1e-40, 3.39e38, 1.00390625, -1.01171875]], "f4")},  # ties, denormals, largest
}


@pytest.mark.parametrize("name", ARRAYS)
def test_torch_loads_the_rounded_numbers_and_our_reader_the_same_bits(name):
    arrays = {key: array.astype("f4") for key, array in ARRAYS[name].items()}
    data = packed(arrays)
    loaded = torch.load(io.BytesIO(gzip.decompress(data)), weights_only=True)
    found = reader.embeddings(data)
    assert list(loaded) == list(arrays) and len(found) == len(arrays)
    for (key, tensor), stored in zip(loaded.items(), found.values(), strict=True):
        expected = torch.tensor(arrays[key].copy()).bfloat16()
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, expected) and tensor.is_contiguous()
        assert (stored["dtype"], stored["shape"]) == ("bfloat16", list(tensor.shape))
        assert stored["data"] == expected.view(torch.int16).numpy().tobytes()


def test_the_members_and_the_pickle_are_those_of_torch_save():
    arrays = {"image_emb": np.ones((2, 3), "f4"), "text_emb": np.zeros((300, 300), "f4")}
    buffer = io.BytesIO()
    torch.save({name: torch.tensor(array).bfloat16() for name, array in arrays.items()}, buffer)
    theirs, ours = zipfile.ZipFile(buffer), zipfile.ZipFile(io.BytesIO(gzip.decompress(packed(arrays))))
    assert {entry.compress_type for entry in ours.infolist()} == {zipfile.ZIP_STORED}
    for name in ours.namelist():
        if not name.endswith(".pkl"):
            assert ours.read(name) == theirs.read(name)
    assert {"archive/data.pkl", "archive/byteorder", "archive/data/0", "archive/data/1", "archive/version"} == set(
        ours.namelist()
    )


def test_equal_arrays_give_equal_bytes(monkeypatch):
    first = packed(ARRAYS["published"])
    monkeypatch.setattr("time.time", lambda: 1e9)
    assert packed(ARRAYS["published"]) == first and len(first) < 36 * 1536 * 2
