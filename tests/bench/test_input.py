import gc
import importlib.util
import io
import json
import threading
import time

import jax
import numpy as np
import PIL.Image
import pytest
from command import fastvlm
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from paths import ROOT
from small import small_config

from fastvlm_jax.bench import input as bench
from fastvlm_jax.data.load.buffer_pool import BufferPool
from fastvlm_jax.data.load.from_config import make_builder
from fastvlm_jax.data.record import Record
from fastvlm_jax.data.write import write_shards
from fastvlm_jax.processor import Processor
from fastvlm_jax.text.tokenizer import load_tokenizer, train_sentencepiece

CONFIG = ROOT / "configs" / "quickstart.py"
SIZES = ((160, 120), (80, 60), (50, 90))


def jpeg(number):
    rng = np.random.default_rng(number)
    width, height = SIZES[number % 3]
    pixels = PIL.Image.fromarray(rng.integers(0, 255, (9, 9, 3), np.uint8)).resize((width, height))
    buffer = io.BytesIO()
    pixels.save(buffer, "JPEG")
    return buffer.getvalue()


def record(i):
    talk = (
        ("user", (0, f"what is {i}?")),
        ("assistant", (f"it is {i}",)),
        ("user", ("yes?",)),
        ("assistant", ("yes",)),
    )
    return Record(f"train/{i}", (jpeg(i),), talk)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    write_shards(folder, "train", [record(i) for i in range(22)])
    train_sentencepiece([f"what is {i}? it is {i} yes" for i in range(22)], folder / "tokenizer.model", 320)
    text = folder / "text"
    write_shards(text, "train", [Record("a", (), (("user", ("hi",)), ("assistant", ("no",))))])
    (text / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    return folder


def run(monkeypatch, capsys, folder, *more):
    flags = ("--config", CONFIG, f"--config.data.path={folder}", f"--config.data.tokenizer={folder}")
    more = ("--config.data.groups=8", "--seconds=0.3", *more)
    return fastvlm(monkeypatch, capsys, "bench", "input", *flags, *more)


def test_without_torch_the_command_prints_a_table_and_writes_the_same_numbers(folder, tmp_path, monkeypatch, capsys):
    find_spec, before = importlib.util.find_spec, set(threading.enumerate())
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == "torch" else find_spec(name, *a))
    status, out, err = run(monkeypatch, capsys, folder, f"--output={tmp_path / 'new' / 'bench.json'}")
    assert status == 0, err
    found = json.loads((tmp_path / "new" / "bench.json").read_text())
    assert set(found["rates"]) == {"pipeline", "raw_files", "raw"} and set(found["ratios"]) == {"raw_files", "raw"}
    for spread in (*found["rates"].values(), *found["ratios"].values(), found["tokens_per_second"]):
        assert 0 < spread["min"] <= spread["median"] <= spread["max"]
    (ours, _, raw), ratio = found["rates"].values(), found["ratios"]["raw"]
    assert ours["min"] / raw["max"] <= ratio["min"] and ratio["max"] <= ours["max"] / raw["min"]
    assert (found["threads"], found["groups"], found["image_size"], found["rounds"]) == (2, 8, 128, bench.ROUNDS)
    assert found["left_out"] == dict.fromkeys(["dataloader_pillow", "dataloader_torchvision"], "torch is not installed")
    table = out.splitlines()
    assert table[0].startswith(f"{folder}, 128 px, batches of 8 groups, 2 threads")
    assert f"{found['ratios']['raw']['median']:.2f} (" in next(line for line in table if "alone, bare threads" in line)
    assert sum(line.endswith("left out: torch is not installed") for line in table) == 2
    assert {thread.name for thread in set(threading.enumerate()) - before} <= {"tqdm_monitor"}


@pytest.fixture(scope="module")
def opened(folder):
    """Returns a config, a builder and a sharding for the data set."""
    config = small_config(folder, data__image_size=64)
    build = make_builder(config.data, Processor(load_tokenizer(folder), "chatml", 64, 4), "train", 0)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    return config, build, NamedSharding(mesh, PartitionSpec("data"))


def test_the_parts_sum_to_what_one_thread_takes(opened):
    config, build, sharding = opened
    bench.time_parts(build, config, sharding, [0])
    ratios = []
    for _ in range(5):
        parts = bench.time_parts(build, config, sharding, range(2))
        start, images = time.perf_counter(), 0
        bench.processor_lib._segment.cache_clear()
        for k in range(2):
            images += int(build(k, list(range(8)))[0]["image_mask"].sum())
        total = (time.perf_counter() - start) / images * 1000
        assert set(parts) == {*bench.PARTS, "total"} and min(parts.values()) >= 0
        assert parts["total"] == pytest.approx(sum(parts[name] for name in bench.PARTS))
        assert min(parts["decode"], parts["resize"], parts["tokenize"], parts["read"]) > 0.005
        ratios.append(parts["total"] / total)
    assert 0.3 < sorted(ratios)[2] < 3  # nothing is counted twice or left out, however busy the machine


def test_the_clocks_are_taken_off_again(opened):
    config, build, sharding = opened
    functions = bench.image_lib.decode, bench.image_lib.fit_into, bench.BatchBuilder.segments
    bench.time_parts(build, config, sharding, [0])
    assert (bench.image_lib.decode, bench.image_lib.fit_into, bench.BatchBuilder.segments) == functions


def test_raw_and_pipeline_see_the_same_images(opened):
    config, build, sharding = opened
    images, records = bench._gather(build, range(1, 3))
    seen, _, _ = bench.run_pipeline(build, config, sharding, 1, 2)
    assert len(images) == len(records) == seen
    expected = []
    for k in range(1, 3):
        arrays, _ = build(k, list(range(8)))
        expected.append(arrays["images"][arrays["image_mask"]])
    out = np.empty((1, 64, 64, 3), np.uint8)
    for image, pixels in zip(images, np.concatenate(expected), strict=True):
        bench.image_lib.views_into(image.data, out, image.grid, "pad", build.processor.background)
        np.testing.assert_array_equal(out[0], pixels)


def test_a_split_of_texts_is_refused(folder, monkeypatch, capsys):
    status, _, err = run(monkeypatch, capsys, folder / "text")
    assert status == 1 and "the first batches hold no image" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "argv, message",
    [
        ((), "has input"),
        (("photos",), "unknown command 'photos'"),
        (("input",), "--config"),
        (("input", "--rounds=3"), ""),
    ],
)
def test_wrong_usage_is_one_line(argv, message, monkeypatch, capsys):
    status, _, err = fastvlm(monkeypatch, capsys, "bench", *argv)
    assert status and message in err and "Traceback" not in err


def test_buffers_are_used_again_when_every_view_is_gone():
    buffers = BufferPool()
    first = buffers.empty((4, 100, 3))
    first[:] = 7
    address, view = first.ctypes.data, first[1:, ::2]
    assert first.shape == (4, 100, 3) and first.dtype == np.uint8 and address % 64 == 0
    del first
    other = buffers.empty((4, 100, 3))
    other[:] = 9
    assert other.ctypes.data != address and (view == 7).all()  # the view still holds it
    del view
    gc.collect()
    smaller = buffers.empty((2, 5))
    assert smaller.ctypes.data == address and smaller.shape == (2, 5) and (smaller == 7).all()  # fresh memory is 0
    del other
    larger = buffers.empty((50, 100, 3))  # no existing buffer is large enough
    assert larger.shape == (50, 100, 3) and not larger.any()


def test_empty_slots_are_black_in_memory_that_was_used(opened):
    _, build, _ = opened
    used = build.buffers.empty((8, 1, 64, 64, 3))
    used[:] = 255
    del used
    last = build.schedule.batches_per_epoch - 1
    assert any(g < 0 for g in build.schedule.batch(last).groups)
    arrays, _ = build(last, list(range(8)))
    assert arrays["image_mask"].any() and not arrays["images"][~arrays["image_mask"]].any()


def test_a_batch_on_a_device_keeps_its_pixels_while_later_ones_are_built():
    buffers, kept = BufferPool(), []
    for number in range(20):
        array = buffers.empty((2, 64, 64, 3))
        array[:] = number
        kept.append(jax.device_put(array))
        del array
        kept = kept[-3:]
        assert [int(x[1, 5, 5, 0]) for x in kept] == [*range(max(number - 2, 0), number + 1)]


@pytest.mark.full
def test_the_dataloaders_take_part(folder, tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    status, out, err = run(monkeypatch, capsys, folder, f"--output={tmp_path / 'bench.json'}")
    assert status == 0, err
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["left_out"] == {} and list(found["rates"]) == list(bench.NAMES)[:5]
    assert min(found["ratios"][name]["min"] for name in found["ratios"]) > 0
    assert sum("PyTorch DataLoader" in line for line in out.splitlines()) == 2
