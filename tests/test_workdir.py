"""Who may continue a run: the digest of the code that all its processes have to share."""

import pathlib
import shutil

import fastvlm_jax
from fastvlm_jax import workdir


def test_the_digest_of_the_code_covers_every_room(tmp_path, monkeypatch):
    package = pathlib.Path(fastvlm_jax.__file__).parent
    assert pathlib.Path(workdir.__file__).parent == package
    shutil.copytree(package, tmp_path / "fastvlm_jax", ignore=shutil.ignore_patterns("__pycache__"))
    own = workdir.source_digest()
    monkeypatch.setattr(workdir, "__file__", str(tmp_path / "fastvlm_jax" / "workdir.py"))
    assert workdir.source_digest() == own
    for room in ("batch.py", "data/load/packing.py", "distributed/peers.py", "convert/tables/decoder.py"):
        file = tmp_path / "fastvlm_jax" / room
        before = workdir.source_digest()
        file.write_text(file.read_text() + "\n")
        assert workdir.source_digest() != before, room
