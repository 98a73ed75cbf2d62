"""The journal of answers: what it keeps through a kill, and that it answers nothing else than the same question."""

import dataclasses
import json
import os
import resource

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import small_config

from fastvlm_jax import sharding
from fastvlm_jax.evaluate import fingerprint
from fastvlm_jax.evaluate.answers import Answer
from fastvlm_jax.evaluate.benchmark import Benchmark, Mark, Picture, Protocol, Row, ask
from fastvlm_jax.evaluate.journal import Journal
from fastvlm_jax.evaluate.questions import Question
from fastvlm_jax.models import fastvlm, kinds
from fastvlm_jax.processor import Processor

OWN = Protocol("own", "1", lambda row: ask("?"), lambda answer, row: Mark(0.0, None), 5, "a rule")
BENCHMARK = Benchmark("shapes", "Shapes", lambda folder: [], (OWN,), "accuracy, %", 3, (), "")


def question(name, *pictures, text="what?", references=("red",), fields=()):
    row = Row(name, text, pictures, references, dict(fields))
    return Question(row, ask(*range(len(pictures)), text), pictures, 9, None, ((0, 0),) * len(pictures))


def known(folder, questions, *, model="model", benchmark=BENCHMARK, protocol=OWN, max_tokens=5):
    """The texts that a journal in the folder holds, by number."""
    found = Journal(folder, benchmark, protocol, model).known(questions, max_tokens)
    return {number: answer.text for number, answer in found.items()}


@pytest.fixture
def images(tmp_path):
    for name in ("cat.png", "dog.png"):
        (tmp_path / name).write_bytes(name.encode())
    return [Picture(name, (tmp_path / name).read_bytes, tmp_path / name) for name in ("cat.png", "dog.png")]


@pytest.fixture
def questions(images):
    return [question("a", images[0]), question("b", images[1]), question("c")]


def write(folder, questions, numbers=(0, 1, 2)):
    journal = Journal(folder, BENCHMARK, OWN, "model")
    assert journal.known(questions, 5) == {}
    for number in numbers:
        journal.append(questions, {number: Answer(f"answer {number}\n\u2028", ("digest",))})
    journal.close()


def test_answers_are_kept_line_by_line(tmp_path, questions):
    folder = tmp_path / "scores" / "deep"
    write(folder, questions, [2, 0])
    path = folder / "shapes-own.journal-0.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    assert [(line["id"], line["text"], line["images"]) for line in lines] == [
        ("c", "answer 2\n\u2028", ["digest"]), ("a", "answer 0\n\u2028", ["digest"])
    ]  # fmt: skip
    found = Journal(folder, BENCHMARK, OWN, "model").known(questions, 5)
    assert found == {0: Answer("answer 0\n\u2028", ("digest",)), 2: Answer("answer 2\n\u2028", ("digest",))}


def test_a_full_disk_is_told_with_the_name_of_the_file_and_costs_one_answer(tmp_path, questions):
    journal = Journal(tmp_path, BENCHMARK, OWN, "model")
    journal.known(questions, 5)
    journal.append(questions, {0: Answer("red", ())})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:  # a largest file size stands in for the full disk: both end in the middle of a line
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        with pytest.raises(OSError, match=r"File too large: '.*shapes-own\.journal-0\.jsonl'$"):
            journal.append(questions, {1: Answer("blue", ())})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    journal.close()
    assert (tmp_path / "shapes-own.journal-0.jsonl").stat().st_size == 100
    again = Journal(tmp_path, BENCHMARK, OWN, "model")
    assert set(again.known(questions, 5)) == {0}
    again.append(questions, {1: Answer("blue", ())})
    again.close()
    assert known(tmp_path, questions) == {0: "red", 1: "blue"}


def test_torn_and_foreign_lines_are_passed_over_and_the_next_begins_a_line_of_its_own(tmp_path, questions):
    write(tmp_path, questions, [0, 1])
    path = tmp_path / "shapes-own.journal-0.jsonl"
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        held = known(tmp_path, questions)
        assert len(held) == whole[: cut + 1].count(b"}\n") + (whole[cut : cut + 1] == b"\n" and cut == len(whole)), cut
    path.write_bytes(b'[]\n7\n{"key": 1, "text": "x", "images": []}\n\xff\n{"key": "k"}\n' + whole + whole[:40])
    journal = Journal(tmp_path, BENCHMARK, OWN, "model")
    assert set(journal.known(questions, 5)) == {0, 1}
    journal.append(questions, {2: Answer("third", ())})
    journal.close()
    assert set(known(tmp_path, questions)) == {0, 1, 2}


def test_files_of_other_processes_are_read_too(tmp_path, questions):
    write(tmp_path, questions, [0])
    (tmp_path / "shapes-own.journal-0.jsonl").rename(tmp_path / "shapes-own.journal-12.jsonl")
    write(tmp_path / "other", questions, [1])
    os.rename(tmp_path / "other" / "shapes-own.journal-0.jsonl", tmp_path / "shapes-own.journal-3.jsonl")
    assert set(known(tmp_path, questions)) == {0, 1}


def test_only_the_same_question_is_answered(tmp_path, questions, images):
    write(tmp_path, questions)
    assert set(known(tmp_path, questions)) == {0, 1, 2}
    assert known(tmp_path, questions, model="another checkpoint") == {}
    assert known(tmp_path, questions, max_tokens=6) == {}
    assert known(tmp_path, questions, protocol=dataclasses.replace(OWN, version="2")) == {}
    assert known(tmp_path, questions, protocol=dataclasses.replace(OWN, name="paper")) == {}
    part = dataclasses.replace(BENCHMARK, name="shapes-red")  # of the same files
    assert set(known(tmp_path, questions[:1], benchmark=part)) == {0}
    assert set(known(tmp_path, questions[::-1])) == {0, 1, 2}  # rows may stand elsewhere
    a, b, c = questions
    changed = {
        "prompt": dataclasses.replace(a, turns=ask(0, "\nwhat?")),
        "question": question("a", images[0], text="who?"),
        "id": question("d", images[0]),
        "references": question("a", images[0], references=("blue",)),
        "fields": question("a", images[0], fields={"hint": "x"}),
        "picture": question("a", images[1]),
    }
    for what, other in changed.items():
        assert set(known(tmp_path, [other, b, c])) == {1, 2}, what


def test_a_changed_image_is_asked_about_again(tmp_path, questions, images):
    write(tmp_path, questions)
    times = (images[0].file.stat().st_atime_ns, images[0].file.stat().st_mtime_ns)
    images[0].file.write_bytes(b"CAT.png")
    os.utime(images[0].file, ns=(times[0], times[1] + 1))  # the same name and size
    assert set(known(tmp_path, questions)) == {1, 2}
    images[1].file.write_bytes(b"another size")
    assert set(known(tmp_path, questions)) == {2}
    inside = [question("r", Picture("record 1 image 0", lambda: b"red"))]  # not a file: its contents count
    write(tmp_path / "records", inside, [0])
    assert known(tmp_path / "records", inside) == {0: "answer 0\n\u2028"}
    assert known(tmp_path / "records", [question("r", Picture("record 1 image 0", lambda: b"blue"))]) == {}


@pytest.fixture(scope="module")
def live(tokenizer):
    model = fastvlm.build(**small_config("none", model__llm__num_layers=1).model.to_dict())
    rng = np.random.default_rng(0)
    abstract = flax.linen.unbox(kinds.boxed_variables(model))
    variables = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape, np.float32)), abstract)
    return model, variables, Processor(tokenizer, "chatml", 16, 4)


def test_the_fingerprint_of_a_model_does_not_depend_on_the_mesh(live, monkeypatch):
    model, variables, processor = live
    here = fingerprint.of_model(*live)
    monkeypatch.setattr(fingerprint, "_LARGE", 2**10)  # the large leaves on the device, the others on the host
    assert fingerprint.of_model(*live) == here
    mesh = sharding.make_mesh((1, 2, 2, 2))
    placed = jax.tree.map(sharding.place, variables, sharding.shardings_of(kinds.boxed_variables(model), mesh))
    assert fingerprint.of_model(model, placed, processor, mesh) == here


def test_every_change_of_a_model_changes_its_fingerprint(live):
    model, variables, processor = live
    kernel = variables["params"]["llm"]["layers"]["up"]["kernel"]

    def with_kernel(value):
        flat = flax.traverse_util.flatten_dict(variables)
        return flax.traverse_util.unflatten_dict({**flat, ("params", "llm", "layers", "up", "kernel"): value})

    bit = kernel.at[0, 3, 5].set(jnp.nextafter(kernel[0, 3, 5], jnp.inf))
    swapped = kernel.at[0, 3, 5].set(kernel[0, 3, 6]).at[0, 3, 6].set(kernel[0, 3, 5])
    low = {**variables, "params": jax.tree.map(lambda x: x.astype(jnp.bfloat16), variables["params"])}
    others = [
        (model, with_kernel(bit), processor),
        (model, with_kernel(swapped), processor),
        (model, with_kernel(-kernel), processor),
        (model, low, processor),
        (model.clone(dtype="bfloat16"), variables, processor),
        (model.clone(llm_args=model.llm_args.copy({"rope_theta": 7.0})), variables, processor),
        (model, variables, dataclasses.replace(processor, image_size=32)),
        (model, variables, dataclasses.replace(processor, template="qwen_2")),
    ]
    found = [fingerprint.of_model(*live), *(fingerprint.of_model(*other) for other in others)]
    assert len(set(found)) == len(found)
    remat = model.clone(llm_args=model.llm_args.copy({"remat": "full"}))
    assert fingerprint.of_model(remat, variables, processor) == found[0]  # what the backward pass recomputes
