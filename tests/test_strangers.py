"""Small files that ask for much: each is refused in one line that names it, and asks in vain."""

import io
import json
import os
import struct
import zipfile

import gguf
import numpy as np
import pytest
import tensorstore
from etils import epath

from fastvlm_jax.checkpoint.arrays import StoredArray, make_cache
from fastvlm_jax.convert.layouts.gguf import read_gguf
from fastvlm_jax.data.index import Counter, load_index
from fastvlm_jax.data.readers import Options, tfds
from fastvlm_jax.data.record import Record
from fastvlm_jax.data.sources import read_shards
from fastvlm_jax.data.write import write_shards
from fastvlm_jax.files import MAX_SMALL, load_arrays, read_object, read_small, save_arrays
from fastvlm_jax.images.decode import decode
from fastvlm_jax.processor import load_processor
from fastvlm_jax.text.tokenizer import load_tokenizer
from tests.helpers.pictures import FORMATS


def refusal(error) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_json_of_gigabytes_or_nested_without_end_is_refused(tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(b"{}")
    os.truncate(path, 1 << 40)  # a hole, which takes no space
    with pytest.raises(ValueError, match=r"config\.json is over 64 MB") as error:
        read_object(path)
    assert str(path) in refusal(error)
    path.write_bytes(b'{"a":' * 100_000 + b"1" + b"}" * 100_000)
    with pytest.raises(ValueError, match=r"config\.json is not readable JSON") as error:
        read_object(path)
    refusal(error)
    path.write_bytes(bytes(MAX_SMALL))
    assert len(read_small(path)) == MAX_SMALL


def test_compressed_index_of_a_data_set_is_refused(tmp_path):
    path = tmp_path / "a.npz"
    save_arrays(path, {"x": np.arange(3), "y": np.ones(2)})
    found = load_arrays(path, ["x"])
    assert list(found) == ["x"] and found["x"].tolist() == [0, 1, 2]
    file = io.BytesIO()
    np.save(file, np.zeros(50_000_000, np.uint8))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", file.getvalue())
    assert path.stat().st_size < 100_000
    with pytest.raises(ValueError, match="x is compressed"):
        load_arrays(path, ["x"])
    for data in (b"", b"PK", file.getvalue()[:1000], b"\x80\x04."):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"."):
            load_arrays(path, ["x"])
    with pytest.raises(FileNotFoundError):
        load_arrays(tmp_path / "no.npz", ["x"])


@pytest.mark.parametrize(("name", "value"), [("refs", 1), ("width", 0), ("text", -5), ("unusable", 3)])
def test_index_that_names_what_is_not_there_is_refused(sentencepiece_file, tmp_path, name, value):
    turns = (("user", (0, "what color?")), ("assistant", ("red",)))
    records = [Record("a", (FORMATS["png"],), turns), Record("b", (FORMATS["png"],), turns[1:])]
    write_shards(tmp_path / "data", "train", records)
    counter = Counter(load_tokenizer(sentencepiece_file), "chatml", "separate")
    source = read_shards(tmp_path / "data", "train")
    assert load_index(source, counter).refs.tolist() == [0]
    (path,) = (tmp_path / "data/index").glob("*.sizes.npz" if name == "width" else "*.tokens-*.npz")
    with np.load(path) as stored:
        arrays = dict(stored)
    arrays[name][0] = value
    save_arrays(path, arrays)
    with pytest.raises(ValueError, match="does not match its shard: delete the folder") as error:
        load_index(source, counter)
    assert str(tmp_path / "data") in refusal(error)


def test_data_set_that_counts_more_records_than_bytes_is_refused(tmp_path):
    write_shards(tmp_path / "ours", "train", [Record("a", (), (("user", ("why?",)), ("assistant", ("so",))))])
    path = tmp_path / "ours/manifest.json"
    path.write_text(path.read_text().replace('"records": 1', '"records": 1000000000000'))
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        read_shards(tmp_path / "ours", "train")
    split = {"name": "train", "shardLengths": [str(10**12)]}
    info = {"name": "x", "fileFormat": "array_record", "splits": [split]}
    features = {"caption": {"pythonClassName": "Text"}, "image": {"pythonClassName": "Image"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    (tmp_path / "features.json").write_text(
        json.dumps({"pythonClassName": "FeaturesDict", "featuresDict": {"features": features}})
    )
    (tmp_path / "x-train.array_record-00000-of-00001").write_bytes(bytes(1000))
    with pytest.raises(ValueError, match=r"dataset_info\.json: x-train.* cannot hold 1000000000000 entries"):
        tfds.parts(epath.Path(tmp_path), Options())


def test_gguf_that_counts_to_two_to_the_sixty_is_refused(tmp_path):
    path = tmp_path / "a.gguf"
    for counts in ((2**60, 0), (0, 2**60)):
        path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, *counts))
        with pytest.raises(
            ValueError, match=r"the count 1152921504606846976 at .* is more than the file holds"
        ) as error:
            read_gguf(path)
        assert str(path) in refusal(error)


def test_gguf_whose_tensors_lie_in_the_same_place_is_refused(tmp_path):
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for name in ("token_embd.weight", "output_norm.weight"):
        writer.add_tensor(name, np.ones((4, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    data = path.read_bytes()
    at = data.index(b"output_norm.weight") + len(b"output_norm.weight") + 4 + 2 * 8 + 4
    assert struct.unpack_from("<Q", data, at) == (128,)
    path.write_bytes(data[:at] + struct.pack("<Q", 64) + data[at + 8 :])
    with pytest.raises(ValueError, match=r"token_embd\.weight and output_norm\.weight lie in the same place") as error:
        read_gguf(path)
    assert str(path) in refusal(error)


def test_checkpoint_whose_chunks_are_larger_than_its_arrays_is_refused(tmp_path):
    for name, shape, chunk in (("small", [4], [4]), ("large", [4], [2**29]), ("huge", [2**30], [2**30])):
        kvstore = {"driver": "ocdbt", "base": f"file://{tmp_path}/model/", "path": f"{name}/"}
        grid = {"name": "regular", "configuration": {"chunk_shape": chunk}}
        metadata = {"shape": shape, "data_type": "float64", "chunk_grid": grid}
        spec = {"driver": "zarr3", "kvstore": kvstore, "metadata": metadata, "create": True}
        array = tensorstore.open(spec).result()
        if name == "small":
            array.write(np.ones(4)).result()
            assert StoredArray(tmp_path, "model", name, make_cache(), None)[:].tolist() == [1, 1, 1, 1]
            continue
        with pytest.raises(ValueError, match=f"model array {name} .*chunks of {chunk[0]:,} elements") as error:
            StoredArray(tmp_path, "model", name, make_cache(), None)
        assert str(tmp_path) in refusal(error)


OWN = {"template": "chatml", "tokens_per_image": 4, "grids": [], "sizes": [], "transparency": "white"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"crop_size": 30_000}, "more than 268,435,456 pixels in all its sizes or tiles"),
        ({"crop_size": 8, "fastvlm_jax": {**OWN, "grids": [[10_000, 10_000]]}}, "more than 268,435,456 pixels"),
        ({"crop_size": 8, "fastvlm_jax": {**OWN, "sizes": [[8, 30_000, 30_000, 4]]}}, "more than 268,435,456 pixels"),
        ({"crop_size": 8, "fastvlm_jax": {**OWN, "tokens_per_image": 10**12}}, "0 to 65,536 tokens, not 1,000,000,000"),
        ({"crop_size": 8, "fastvlm_jax": {**OWN, "tokens_per_image": -1}}, "0 to 65,536 tokens, not -1"),
        ({"crop_size": 8, "fastvlm_jax": {**OWN, "sizes": [[8, 8, 8, 10**12]]}}, "0 to 65,536 tokens"),
    ],
)
def test_settings_that_ask_for_images_without_end_are_refused(sentencepiece_file, tmp_path, settings, words):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_file.read_bytes())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=words) as error:
        load_processor(tmp_path, lambda size: 4) if "fastvlm_jax" not in settings else load_processor(tmp_path)
    assert str(tmp_path / "preprocessor_config.json") in refusal(error)


def test_chat_template_is_compared_and_never_run(sentencepiece_file, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_file.read_bytes())
    endless = "{% for i in range(10**12) %}{% for j in range(10**12) %}x{% endfor %}{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(endless + "{{ ''.__class__.__mro__[1].__subclasses__() }}")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": endless}))
    assert load_processor(tmp_path).template == "qwen_2"


def test_gif_that_is_read_for_minutes_before_its_first_picture_is_refused():
    with pytest.raises(ValueError, match="it is a GIF of more than 64 MB: convert it to PNG"):
        decode(b"GIF89a" + struct.pack("<HHBBB", 8, 8, 0, 0, 0) + b"\x21\xfe" + b"\1a" * (33 << 20))
