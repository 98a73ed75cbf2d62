"""Who may continue a run: the digest of the code that all its processes have to share."""

import json
import pathlib
import shutil

import pytest

import fastvlm_jax
from fastvlm_jax import workdir
from fastvlm_jax.data.record import Record
from fastvlm_jax.data.sources import contents_of, fingerprint, read_shards
from fastvlm_jax.data.write import write_shards


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


def write_set(folder, words, split="train"):
    talk = [Record(word, (), (("user", (word,)), ("assistant", (word,)))) for word in words]
    write_shards(folder, split, talk)


def claim(run, folders, steps=8, **lineage):
    """Claims a workdir for a run on these data sets, as training does."""
    sources = [read_shards(folder, "train") for folder in folders]
    data = {"path": "", "root": "", "mixture": [[str(folder), 0.0] for folder in folders]}
    config = {"stage": "s", "steps": steps, "data": data}
    made = workdir.make_lineage(config, None, fingerprint(sources), contents_of(sources))
    workdir._claim(run, config, {**made, **lineage})


def test_the_data_set_that_changed_is_named_with_its_records_before_and_now(tmp_path):
    run, folders = tmp_path / "run", [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        write_set(folder, ["one", "two"])
    claim(run, folders)
    claim(run, folders)
    shutil.rmtree(folders[1])
    write_set(folders[1], ["one", "two", "three"])
    with pytest.raises(ValueError, match=rf"^{folders[1]} has changed \(train had 2 records and has 3\) since"):
        claim(run, folders)
    shutil.rmtree(folders[1])
    write_set(folders[1], ["one", "TWO"])
    words = r"b has changed \(the same number of records, other contents\) .* or choose another --workdir, or delete"
    with pytest.raises(ValueError, match=words):
        claim(run, folders)
    shutil.rmtree(folders[1])
    write_set(folders[1], ["one", "two"])
    write_set(folders[1], ["three"], "validation")
    with pytest.raises(ValueError, match=r"b has changed \(validation had 0 records and has 1\)"):
        claim(run, folders)


def test_a_run_of_before_without_counts_is_told_that_its_data_changed(tmp_path):
    run, folder = tmp_path / "run", tmp_path / "a"
    write_set(folder, ["one"])
    claim(run, [folder])
    old = json.loads((run / "config.json").read_text())
    del old["lineage"]["data_sets"]
    (run / "config.json").write_text(json.dumps(old))
    claim(run, [folder])
    shutil.rmtree(folder)
    write_set(folder, ["two"])
    with pytest.raises(
        ValueError, match=rf"^{folder} has changed since the run of {run} began: write the data as it was"
    ):
        claim(run, [folder])


def test_other_settings_are_all_named_and_how_to_go_on(tmp_path):
    run, folder = tmp_path / "run", tmp_path / "a"
    write_set(folder, ["one"])
    claim(run, [folder])
    (run / "checkpoints" / "8").mkdir(parents=True)
    with pytest.raises(ValueError) as error:
        claim(run, [folder], steps=9, parent_step=3)
    assert str(error.value) == (
        f"{run} is in use by a run with other settings: steps is 8 there and 9 here, parent_step is None there and 3 "
        f"here; choose another --workdir; --config.parent={run} starts there from the weights of this run"
    )


def test_a_run_of_before_goes_on_under_keys_that_took_the_place_of_others(tmp_path):
    """And config.json tells what is evaluated from then on, by which `@best` finds a checkpoint."""
    run, folder = tmp_path / "run", tmp_path / "a"
    write_set(folder, ["one"])
    claim(run, [folder])
    old = json.loads((run / "config.json").read_text())
    new = {**old["config"], "evaluate": [["qa", "", 50]], "keep_best": "evaluate/qa", "stop_after": 3}
    old["config"] |= {"eval_questions": 50, "eval_max_tokens": 16}
    (run / "config.json").write_text(json.dumps(old))
    workdir._claim(run, new, old["lineage"])
    assert json.loads((run / "config.json").read_text()) == {**old, "config": old["config"] | new}
