"""What two points share is one task, tasks are whole command lines, and what is wrong is named before anything runs."""

import dataclasses

import pytest
from paths import ROOT

from fastvlm_jax.sweep.grid import Point, Stage, sweep_config
from fastvlm_jax.sweep.plan import make_plan

OWN = str(ROOT / "configs/own_data.py:tiny")
FIRST = Stage(OWN, {"data.image_size": 64, "steps": 5})


def point(name, side, *more, **changes):
    return Point(name, "tiny", "tiny", side, (FIRST, *more), **changes)


def second(side, **overrides):
    return Stage(OWN, {"data.image_size": side, **overrides})


def plan(*points, place="w", **keys):
    sweep = sweep_config("mine", "Mine", points, ["easy-vqa"], ["enc"])
    for key, value in keys.items():
        sweep[key] = value
    return make_plan(sweep, place)


def runs(made):
    return [task for task in made.tasks if task.kind == "train"]


def test_a_stage_that_points_share_is_trained_once():
    made = plan(point("a", 64), point("b", 128, second(128)), point("c", 192, second(192)))
    assert [(task.config.data.image_size, task.points) for task in runs(made)] == [
        (64, ("a", "b", "c")), (128, ("b",)), (192, ("c",)),
    ]  # fmt: skip
    assert [task.needs for task in runs(made)] == [(), (runs(made)[0].name,), (runs(made)[0].name,)]
    # Each point is trained and scored in turn; timing comes last, when nothing else runs.
    assert [(task.kind, task.points[-1]) for task in made.tasks] == [
        ("train", "c"), ("evaluate", "a"), ("train", "b"), ("evaluate", "b"), ("train", "c"), ("evaluate", "c"),
        ("ttft", "a"), ("ttft", "b"), ("ttft", "c"),
    ]  # fmt: skip


def test_another_value_or_another_parent_is_another_run():
    same = plan(point("a", 128, second(128)), point("b", 128, second(128)))
    assert len(runs(same)) == 2 and runs(same)[1].points == ("a", "b")
    other = plan(point("a", 128, second(128)), point("b", 128, second(128, seed=1)))
    assert [task.points for task in runs(other)] == [("a", "b"), ("a",), ("b",)]
    longer = Point("b", "tiny", "tiny", 128, (FIRST, second(64, steps=9), second(128)))
    assert len(runs(plan(point("a", 128, second(128)), longer))) == 4


def test_the_identity_of_a_run_is_that_of_its_values_and_not_of_this_machine():
    here, there = (runs(plan(point("a", 64), data_root=root)) for root in ("/disk/data", "gs://bucket/data"))
    assert here[0].identity == there[0].identity and "--config.data.root=gs://bucket/data" in there[0].arguments
    moved = plan(point("a", 64), place="gs://bucket/sweep")
    assert runs(moved)[0].identity == runs(plan(point("a", 64)))[0].identity
    data = Stage(OWN, {"data.image_size": 64, "steps": 5, "data.path": "data/others"})
    assert runs(plan(dataclasses.replace(point("a", 64), stages=(data,))))[0].identity != here[0].identity


def test_every_task_is_one_command_line():
    made = plan(point("a", 128, second(128)), limit=20)
    first, last, evaluate, ttft = made.tasks[0], made.tasks[1], made.tasks[2], made.tasks[3]
    assert first.arguments == (
        "train", f"--config={OWN}", f"--workdir=w/{first.output}", "--config.data.image_size=64", "--config.steps=5",
    )  # fmt: skip
    assert last.arguments[-1] == f"--config.parent=w/{first.output}"
    assert evaluate.arguments == (
        "evaluate", f"--model=w/{last.output}", "--benchmark=easy-vqa", "--limit=20", "--data=data",
        "--output=w/points/a/evaluation",
    )  # fmt: skip
    assert ttft.arguments == (
        "bench", "ttft", f"--model=w/{last.output}", "--image_size=128", "--output=w/points/a/ttft.json",
    )  # fmt: skip


def test_tiles_are_counted_and_timed():
    room = second(64, **{"data.grids": ((1, 2), (2, 2)), "data.images_per_group": 5})
    made = plan(point("a", 64, room, grids=((1, 2), (2, 2))))
    assert made.points[0].image_tokens == 5 and "--image_size=64:2x2" in made.tasks[-1].arguments


def test_weights_are_filled_in_or_told_to_be_missing():
    stage = Stage(OWN, {"data.image_size": 64, "parent": "vision={enc}"})
    one = dataclasses.replace(point("a", 64), stages=(stage,))
    assert plan(one).missing == ("enc",)
    sweep = sweep_config("mine", "Mine", [one], ["easy-vqa"], ["enc"])
    sweep.weights.enc = "/models/enc"
    made = make_plan(sweep, "w")
    assert made.missing == () and "--config.parent=vision=/models/enc" in made.tasks[0].arguments


PARENT = {"data.image_size": 64}
VIT = str(ROOT / "configs/stage2_instruct.py:0.5b,clip_vit_l_336/665k")
WRONG = [
    ([], "the sweep has no points"),
    ([point("a", 64), point("a", 64)], "two points have the name a: give each its own"),
    ([point("../a", 64)], "point '../a': a name has letters, digits and . _ - only"),
    ([point(".a", 64)], "point '.a': a name has"),
    ([Point("a", "tiny", "tiny", 64, ())], "point a: it has no stages"),
    ([Point("a", "v", "t", 512, (Stage(VIT, {"data.image_size": 512}),))],
     "point a: data.image_size=512: .*336"),
    ([point("a", 100, second(100))], "point a: data.image_size=100: .*multiple"),
    ([point("a", 128, second(192))],
     r"point a: image_size=128 and grids=\(\) are not those of its last stage, data.image_size=192"),
    ([point("a", 64, second(64, **{"data.grids": ((2, 2),), "data.images_per_group": 4}), grids=((2, 2),))],
     r"point a: an image of 64 px with data.grids=\(\(2, 2\),\) takes 5 slots, and data.images_per_group=4: raise it"),
    ([point("a", 64, second(64, **{"data.grids": ((2, 2),), "data.images_per_group": 5, "data.row_length": 5}),
            grids=((2, 2),))],
     "point a: an image of 64 px .* has 5 tokens, and data.row_length=5: raise it"),
    ([point("a", 64, second(64, **{"data.image_sizes": 3}))], "point a: .*own_data.py:tiny: .*image_sizes"),
    ([point("a", 64, second(64, epochs="many"))], "point a: .*own_data.py:tiny: .*epochs"),
    ([point("a", 64, Stage("configs/none.py"))], "point a: configs/none.py: "),
    ([point("a", 64, Stage(str(ROOT / "configs/quickstart.py:stage9")))],
     "point a: .*quickstart.py:stage9: unknown stage 'stage9': choose"),
    ([dataclasses.replace(point("a", 64), stages=(Stage(OWN, {**PARENT, "parent": "{b}"}),))],
     "point a: the sweep has no weights 'b': it has enc"),
    ([Point(name, "t", "t", 64, (Stage(OWN, {**PARENT, "parent": f"/{name}/best"}),)) for name in "ab"],
     "point b: it shares the run runs/.* with a, but parent is '/b/best' here and '/a/best' there"),
    ([point("a", 64), point("b", 64, second(64, log_every=3), second(64, seed=7)),
      point("c", 64, second(64), second(64, seed=8))],
     "point c: it shares the run runs/.* with b, but log_every is 10 here and 3 there"),
]  # fmt: skip


@pytest.mark.parametrize("points, message", WRONG, ids=lambda x: str(x)[:30])
def test_what_is_wrong_is_named_in_a_line(points, message):
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        plan(*points)
    assert "\n" not in str(caught.value)


def test_a_benchmark_is_needed_and_a_mistyped_one_is_named():
    with pytest.raises(ValueError, match="the sweep has no benchmarks to score its points on"):
        plan(point("a", 64), benchmarks=())
    with pytest.raises(ValueError, match=r"there is no benchmark 'easyvqa' \(did you mean easy-vqa\?\)"):
        plan(point("a", 64), benchmarks=("easyvqa",))
    with pytest.raises(ValueError, match=r"^--protocol llava: .*; easy-vqa has own$"):
        plan(point("a", 64), protocol="llava")
