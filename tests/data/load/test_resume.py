"""Checks that batches depend on the position alone: not on processes, mesh, restarts or storage."""

import io
import json
import os
import socket
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
from bucket_server import serve
from paths import HELPERS

from fastvlm_jax.data.record import Record
from fastvlm_jax.data.write import write_shards
from fastvlm_jax.images.sizes import make_sizes
from fastvlm_jax.processor import Processor
from fastvlm_jax.text.tokenizer import load_tokenizer, train_sentencepiece

SCRIPT = HELPERS / "data_process.py"
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "it", "rains"]


def picture(rng):
    size = [(40, 20), (20, 40), (30, 30)][rng.integers(3)]
    noise = rng.integers(0, 256, (*size[::-1], 3), np.uint8)
    buffer = io.BytesIO()
    PIL.Image.fromarray(noise).resize((size[0] * 4, size[1] * 4)).save(buffer, format="JPEG")
    return buffer.getvalue()


def records(name, count, rng):
    """Yields records with no, one or two images and one to three questions; one image is truncated."""
    for i in range(count):
        images = tuple(picture(rng) for _ in range(rng.choice(3, p=[0.2, 0.6, 0.2])))
        if images and name == "a" and i == 17:
            images = (images[0][:200], *images[1:])
        turns = []
        for q in range(rng.integers(1, 4)):
            content = (*range(len(images)), " ".join(rng.choice(WORDS, rng.integers(1, 9))))
            turns += [("user", content if q == 0 else content[len(images) :])]
            turns += [("assistant", (" ".join(rng.choice(WORDS, rng.integers(1, 20))),))]
        yield Record(f"{name}/{i}", images, tuple(turns))


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Writes a mixture of two data sets, and its settings: two resolutions, three shapes, packed."""
    root, rng = tmp_path_factory.mktemp("mixture"), np.random.default_rng(5)
    for name, count in (("a", 90), ("b", 40)):
        write_shards(root / name, "train", records(name, count, rng), num_shards=3)
    train_sentencepiece(WORDS, root / "tokenizer.model", 300)
    sizes = [
        size
        for side in (64, 128)
        for size in make_sizes(side, ((1, 1), (2, 1), (1, 2)), 32, lambda h, w: h * w // 1024)
    ]
    processor = Processor(load_tokenizer(root), "chatml", 128, 16, sizes=tuple(sizes))
    processor.save(root / "processor")
    data = {
        "path": "", "root": str(root), "mixture": [["a", 1.0], ["b", 2.0]], "template": "chatml", "image_size": 128,
        "resolutions": [[64, 0.4], [128, 0.6]], "decode": "fast", "turns": "conversation", "overlong": "truncate",
        "max_substituted": 0.05, "groups": 8, "images_per_group": 2, "rows_per_group": 1, "row_length": 260,
        "cache_images": False, "num_threads": 2, "prefetch": 2,
    }  # fmt: skip
    path = root / "settings.json"
    path.write_text(json.dumps({"data": data, "processor": str(root / "processor")}))
    return path


def read(settings, processes, devices, start, count, **environment):
    """Returns batch number -> group -> hash, merged from all processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(SCRIPT), str(port)]
    rest = [str(processes), str(start), str(count), str(settings)]
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    running = [
        subprocess.Popen(
            [*command, str(i), *rest],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | flags | environment,
        )
        for i in range(processes)
    ]
    batches = {}
    for process in running:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err[-2000:]
        for line in out.splitlines():
            k, groups = json.loads(line)
            assert not batches.setdefault(k, {}).keys() & groups.keys()
            batches[k] |= groups
    return batches


@pytest.fixture(scope="module")
def straight(settings):
    return read(settings, 1, 1, 0, 24)


def test_batches_are_the_same_when_processes_and_mesh_change_between_restarts(settings, straight):
    assert all(sorted(groups, key=int) == [str(g) for g in range(8)] for groups in straight.values())
    assert len({json.dumps(groups) for groups in straight.values()}) == 24
    # 4 processes, then 2 with two devices each, 1 with eight, and 4 again
    legs = [(4, 1, 0, 6), (2, 2, 6, 6), (1, 8, 12, 6), (4, 2, 18, 6)]
    resumed = {}
    for leg in legs:
        resumed |= read(settings, *leg)
    assert resumed == straight


def test_a_bucket_gives_the_same_batches(settings, straight, tmp_path):
    pytest.importorskip("gcsfs", reason="pip install 'fastvlm_jax[gcs]'")
    root = settings.parent
    server, requests = serve(root.parent)
    there = json.loads(settings.read_text())
    there["data"]["root"] = f"gs://{root.name}"
    (tmp_path / "settings.json").write_text(json.dumps(there))
    url = f"http://127.0.0.1:{server.server_port}"
    found = read(
        tmp_path / "settings.json", 1, 2, 0, 8, STORAGE_EMULATOR_HOST=url, CLOUD_STORAGE_EMULATOR_ENDPOINT=url,
        FASTVLM_CACHE=str(tmp_path / "cache"),
    )  # fmt: skip
    server.shutdown()
    assert found == {k: groups for k, groups in straight.items() if k < 8}
    assert any("array_record?alt=media bytes=" in request for request in requests)
