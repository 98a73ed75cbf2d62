"""Who may continue a run, under which changes, and what its lineage then says."""

import json
import pathlib
import resource
import shutil

import pytest

import fastvlm_jax
from fastvlm_jax import changes, disk, lock, workdir
from fastvlm_jax.data.record import Record
from fastvlm_jax.data.sources import contents_of, fingerprint, read_shards
from fastvlm_jax.data.write import write_shards
from fastvlm_jax.processor import Processor


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


def settings(folders, **overrides):
    data = {"path": "", "root": "", "mixture": [[str(folder), 0.0] for folder in folders]}
    return {"stage": "s", "steps": 8, "log_every": 10, "groups": [["vision/.*", 0.0, 0.0], [".*", 1e-3, 0.0]],
            "data": data, **overrides}  # fmt: skip


def lineage_of(folders, config):
    sources = [read_shards(folder, "train") for folder in folders]
    return workdir.make_lineage(config, None, fingerprint(sources), contents_of(sources))


def claim(run, folders, allowed=(), lineage=None, **overrides):
    """Claims a workdir for a run on these data sets, as training does; returns what changed since."""
    config = settings(folders, **overrides)
    return workdir._claim(run, config, {**lineage_of(folders, config), **(lineage or {})}, allowed)


@pytest.fixture
def go_on(tokenizer):
    """A function that claims a workdir, goes on behind a step and returns the lineage of the run."""

    def go_on(run, folders, step, allowed=(), lineage=None, **overrides):
        config = settings(folders, **overrides)
        made = {**lineage_of(folders, config), **(lineage or {})}
        with workdir.claim(run, config, made, Processor(tokenizer, "chatml", 16, 4), allowed) as claimed:
            return claimed.record(config, step)

    return go_on


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


def test_other_settings_are_all_named_and_how_to_go_on(tmp_path, go_on):
    run, folder = tmp_path / "run", tmp_path / "a"
    write_set(folder, ["one"])
    claim(run, [folder])
    (run / "checkpoints" / "8").mkdir(parents=True)
    with pytest.raises(ValueError) as error:
        claim(run, [folder], steps=9, log_every=5, lineage={"parent_step": 3})
    assert str(error.value) == (
        f"{run} is in use by a run with other settings: steps is 8 there and 9 here, parent_step is None there and 3 "
        f"here; no run can change parent_step; free to change: log_every is 10 there and 5 here; choose another "
        f"--workdir; --config.parent={run} starts there from the weights of this run"
    )
    with pytest.raises(ValueError) as error:
        claim(run, [folder], ["steps"], steps=9, seed=1)
    assert str(error.value) == (
        f"{run} is in use by a run with other settings: seed is None there and 1 here, steps is 8 there and 9 here; "
        "--allow_changes=seed,steps goes on with that and records it in the lineage, or choose another --workdir; "
        f"--config.parent={run} starts there from the weights of this run"
    )


def test_a_run_of_before_goes_on_under_keys_that_took_the_place_of_others(tmp_path, tokenizer):
    """And config.json tells what is evaluated from then on, by which `@best` finds a checkpoint."""
    run, folder = tmp_path / "run", tmp_path / "a"
    write_set(folder, ["one"])
    claim(run, [folder])
    old = json.loads((run / "config.json").read_text())
    new = {**old["config"], "evaluate": [["qa", "", 50]], "keep_best": "evaluate/qa", "stop_after": 3}
    old["config"] |= {"eval_questions": 50, "eval_max_tokens": 16}
    (run / "config.json").write_text(json.dumps(old))
    with workdir.claim(run, new, old["lineage"], Processor(tokenizer, "chatml", 16, 4)) as claimed:
        assert claimed.record(new, 4) == old["lineage"]
    assert json.loads((run / "config.json").read_text()) == {**old, "config": new}


def test_what_is_allowed_goes_on_and_stands_in_the_lineage_with_its_step(tmp_path, go_on):
    run, folder = tmp_path / "run", tmp_path / "a"
    write_set(folder, ["one", "two"])
    began = go_on(run, [folder], 0)
    assert "changes" not in began and "changes" not in json.loads((run / "config.json").read_text())["lineage"]
    faster = [["vision/.*", 0.0, 0.0], [".*", 5e-3, 0.1]]
    lineage = go_on(run, [folder], 8, ["steps", "groups"], steps=16, groups=faster, log_every=5)
    first = [
        {"step": 8, "key": "groups", "before": settings([folder])["groups"], "now": faster},
        {"step": 8, "key": "steps", "before": 8, "now": 16},
    ]
    assert lineage == {**began, "changes": first}
    new = settings([folder], steps=16, groups=faster, log_every=5)
    assert json.loads((run / "config.json").read_text()) == {
        "format": workdir.FORMAT,
        "config": new,
        "lineage": lineage,
    }
    # The launcher's restart: the same command, the same flag, nothing new.
    assert go_on(run, [folder], 12, ["steps", "groups"], steps=16, groups=faster, log_every=5) == lineage
    # Its data change, and it has lost the steps since 6.
    shutil.rmtree(folder)
    write_set(folder, ["one", "two", "three"])
    with pytest.raises(ValueError, match=r"--allow_changes=data\.contents goes on with that"):
        claim(run, [folder], steps=16, groups=faster)
    after = go_on(run, [folder], 6, ["data"], steps=16, groups=faster)
    assert [(change["step"], change["key"]) for change in after["changes"]] == [
        (6, "groups"), (6, "steps"), (6, "data.contents")
    ]  # fmt: skip
    records = [
        change["data_sets"][0]["records"] for change in (after["changes"][2]["before"], after["changes"][2]["now"])
    ]
    assert records == [{"train": 2}, {"train": 3}]
    assert claim(run, [folder], steps=16, groups=faster) == []
    # A checkpoint knows the changes that it was trained under.
    content = workdir.read_run(run)
    assert workdir.lineage_at(content, 6) == {**began, "step": 6}
    assert workdir.lineage_at(content, 7) == {**after, "step": 7}


@pytest.mark.parametrize(
    "overrides, fixed",
    [
        ({"groups": [["vision/.*", 1e-5, 0.0], [".*", 1e-3, 0.0]]}, "groups"),  # the encoder was frozen
        ({"groups": [[".*", 1e-3, 0.0]]}, "groups"),
        ({"param_dtype": "bfloat16"}, "param_dtype"),
        ({"model": {"llm": {"width": 64}}}, "model"),
        ({"parent": "elsewhere"}, "parent"),
    ],
)
def test_what_no_run_can_change_is_refused_though_it_is_allowed(tmp_path, overrides, fixed):
    run, folder = tmp_path / "run", tmp_path / "a"
    write_set(folder, ["one"])
    claim(run, [folder])
    before = (run / "config.json").read_bytes()
    with pytest.raises(ValueError, match=f"; no run can change {fixed}; choose another --workdir") as error:
        claim(run, [folder], [fixed], **overrides)
    assert "allow_changes" not in str(error.value) and (run / "config.json").read_bytes() == before


def test_a_computation_may_change_and_a_size_may_not():
    may = ["model.dtype", "model.vision.drop_path", "data.groups", "seed", "clip_norm", "beta2", "epochs"]
    assert [key for key in may if changes.Change(key, 1, 2).fixed or changes.Change(key, 1, 2).free] == []
    assert all(changes.Change(key, 1, 2).fixed for key in ("model.llm.width", "model.vision.layers", "moment_dtype"))
    assert all(
        changes.Change(key, 1, 2).free
        for key in ("mesh", "model.llm.remat", "model.vision.kernels", "data.root", "code")
    )
    assert not changes.is_free("data.rooted") and not changes.is_free("log")


def test_new_code_goes_on_and_is_recorded(tmp_path, go_on):
    run, folder = tmp_path / "run", tmp_path / "a"
    write_set(folder, ["one"])
    old = {"code": "0.0.1", "source_digest": "0" * 16, "jax": "0.4.0"}
    go_on(run, [folder], 0, lineage=old)
    now = lineage_of([folder], settings([folder]))
    assert [change.key for change in claim(run, [folder])] == ["code", "source_digest", "jax"]
    lineage = go_on(run, [folder], 5)
    assert lineage["changes"] == [{"step": 5, "key": key, "before": old[key], "now": now[key]} for key in old]
    assert {key: lineage[key] for key in old} == old  # it began there
    assert go_on(run, [folder], 7) == lineage


def test_a_run_of_before_that_recorded_no_code_has_none_to_compare(tmp_path, go_on):
    run, folder = tmp_path / "run", tmp_path / "a"
    write_set(folder, ["one"])
    go_on(run, [folder], 0, lineage={"source_digest": None})
    assert claim(run, [folder]) == []


def test_keys_that_do_not_exist_are_not_allowed():
    config = {"steps": 8, "data": {"groups": 4, "path": ""}, "groups": []}
    changes.check_allowed(["steps", "data", "data.groups", "data.contents", "groups"], config)
    for wrong in ("stpes", "data.group", "contents", "da", ""):
        with pytest.raises(ValueError, match=f"^--allow_changes: there is no key '{wrong}'; docs/config.md"):
            changes.check_allowed(["steps", wrong], config)


def test_a_start_that_was_killed_or_found_a_full_disk_leaves_a_workdir_for_the_next(tmp_path, go_on):
    run, folder = tmp_path / "run", tmp_path / "a"
    write_set(folder, ["one"])
    run.mkdir()
    for name in ("lock", "config.json.x1y2z3_4.partial", "config.tmp"):
        (run / name).write_text("")
    lineage = go_on(run, [folder], 0)
    assert json.loads((run / "config.json").read_text())["lineage"] == lineage
    (run / "metrics.jsonl.x1y2z3_4.partial").write_text("")  # of a run that was killed in a write
    (run / "mine.partial").write_text("")
    go_on(run, [folder], 0)
    assert [path.name for path in run.glob("*.partial")] == ["mine.partial"]


@pytest.mark.parametrize("name", ["notes.txt", "lock.txt", "sweep.json", "config.json"])
def test_a_folder_of_something_else_is_refused_and_left_as_it_is(tmp_path, name, go_on):
    run, folder = tmp_path / "run", tmp_path / "a"
    write_set(folder, ["one"])
    run.mkdir()
    (run / name).write_text("{}")
    with pytest.raises(ValueError, match=f"{run}.* is not .*training workdir"):
        go_on(run, [folder], 0)
    assert [(path.name, path.read_text()) for path in run.iterdir()] == [(name, "{}")]


def test_two_runs_do_not_meet_in_a_workdir(tmp_path, monkeypatch, go_on, tokenizer):
    monkeypatch.setattr(lock, "WAIT_SECONDS", 0.1)
    run, folder = tmp_path / "run", tmp_path / "a"
    write_set(folder, ["one"])
    config = settings([folder])
    processor = Processor(tokenizer, "chatml", 16, 4)
    with workdir.claim(run, config, lineage_of([folder], config), processor) as claimed:
        before = (run / "config.json").read_bytes()
        with pytest.raises(ValueError, match=f"^another process is training in {run}: process "):
            go_on(run, [folder], 0, ["steps"], steps=9)
        claimed.check()
        assert (run / "config.json").read_bytes() == before
    go_on(run, [folder], 0)


def test_a_full_disk_leaves_the_processor_of_before_and_names_its_folder(tmp_path, tokenizer, go_on):
    run, folder = tmp_path / "run", tmp_path / "a"
    write_set(folder, ["one"])
    go_on(run, [folder], 0)
    before = {path.name: path.read_bytes() for path in (run / "processor").iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    largest = max(map(len, before.values()))
    for size in (1, 200, largest - 1):  # in its first, in a middle and in its largest file
        try:  # a largest file size stands in for the full disk
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
            with pytest.raises(OSError) as error:
                workdir._save(Processor(tokenizer, "qwen_2", 16, 4), run)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert disk.describe(error.value).startswith(f"{run}/processor.partial: File too large: ")
        assert {path.name: path.read_bytes() for path in (run / "processor").iterdir()} == before
    (run / "processor.partial").mkdir()
    (run / "processor.partial" / "left").touch()  # by a start that was killed
    go_on(run, [folder], 0)
    assert sorted(path.name for path in run.iterdir()) == ["config.json", "lock", "processor"]
    assert {path.name: path.read_bytes() for path in (run / "processor").iterdir()} == before
