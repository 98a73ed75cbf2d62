"""What validation needs is looked at before the first step; a signal stops it between two batches."""

import io
import logging
import os
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import PIL.Image
import pytest
from paths import ROOT
from small import ONE_STAGE, small_config

from fastvlm_jax.data.record import Record
from fastvlm_jax.data.write import write_shards
from fastvlm_jax.metrics.rows import read_metrics
from fastvlm_jax.train import Interrupted, train


def picture(number):
    file = io.BytesIO()
    PIL.Image.new("RGB", (16, 16), (40 * number, 90, 20)).save(file, "PNG")
    return file.getvalue()


def about(key, *images, question="what?", answer="red"):
    return Record(key, images, (("user", (*range(len(images)), question)), ("assistant", (answer,))))


TRAIN = [about(str(i), picture(i)) for i in range(4)]
CUT = about("cut", picture(5)[:50])


@pytest.fixture
def config(tokenizer, tmp_path):
    def make(validation, **overrides):
        write_shards(tmp_path / "data", "train", TRAIN)
        write_shards(tmp_path / "data", "validation", validation)
        small = dict(steps=1, mesh=(1, 1, 1, 1), data__tokenizer=str(tokenizer.files[0]), eval_batches=0)
        small |= dict(model__llm__num_layers=1, data__groups=2, **ONE_STAGE)
        return small_config(tmp_path / "data", **(small | overrides))

    return make


def run(config, tmp_path):
    train(config, tmp_path / "run", jax.devices()[:1])
    return read_metrics(tmp_path / "run")


def test_an_empty_split_is_no_validation_and_one_line(config, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        rows = run(config([], eval_batches=2, evaluate=(("qa", "", 3),)), tmp_path)
    assert [row["step"] for row in rows] == [1] and "validation/loss" not in rows[0]
    said = [message for message in caplog.messages if "validation" in message]
    assert len(said) == 1 and "has no validation" in said[0] and "--validation_share" in said[0]


def test_records_that_cannot_be_asked_about_are_left_out_and_counted(config, tmp_path, caplog):
    two, text = about("two", picture(1), picture(2)), about("text")
    long = about("long", picture(0), answer="one two three " * 99)
    with caplog.at_level(logging.WARNING):
        rows = run(config([CUT, two, text, long], evaluate=(("qa", "", 9),)), tmp_path)
    assert 0 <= rows[-1]["evaluate/qa"] <= 100
    said = [message for message in caplog.messages if "evaluate/qa" in message]
    assert len(said) == 2 and "evaluate/qa leaves out 1 questions: 1 x " in said[0]
    assert said[1] == "1 of 3 references of evaluate/qa are longer than 128 tokens and cannot be matched"


@pytest.mark.parametrize(
    "validation, settings, words",
    [
        ([CUT], dict(evaluate=(("qa", "", 2),)),
         "^evaluate, qa of the validation split: none of its questions can be asked .1 x "),
        ([about("two", picture(0), picture(1))], dict(eval_batches=1),
         "the validation split: none of the 1 records can be used.*takes 2 image slots.*eval_batches=0"),
    ],
    ids=["questions", "loss"],
)  # fmt: skip
def test_what_cannot_be_validated_is_an_error_before_anything_is_written(validation, settings, words, config, tmp_path):
    with pytest.raises(ValueError, match=words):
        run(config(validation, **settings), tmp_path)
    assert not (tmp_path / "run").exists()


def test_stopped_in_a_validation_the_step_is_kept_and_the_next_run_validates(config, tmp_path):
    """One batch a record: the signal comes when the first batches of the last validation are behind."""
    settings = dict(steps=2, eval_every=2, eval_batches=3000, data__groups=1)
    long = config([about(str(i), picture(i % 6), question=str(i)) for i in range(3000)], **settings)

    def stop():
        while not any(row["step"] == 2 for row in read_metrics(tmp_path / "run")):
            time.sleep(0.005)
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(Interrupted, match="stopped at step 2 of 2, which is saved"):
        run(long, tmp_path)
    assert "2" in {path.name for path in (tmp_path / "run/checkpoints").iterdir()}
    assert not any("validation/loss" in row for row in read_metrics(tmp_path / "run"))
    long.eval_batches = 2
    rows = run(long, tmp_path)
    assert [row["step"] for row in rows if "validation/loss" in row] == [2]
    assert np.isfinite(rows[-1]["validation/loss"])
    assert run(long, tmp_path) == rows  # once


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_a_process_whose_main_thread_is_busy(first):
    """It sorts in C, where no handler of Python runs, for far longer than the test waits."""
    code = (
        "import numpy as np, sys\n"
        "from fastvlm_jax.distributed import StopRequest\n"
        "x = np.random.default_rng(0).random(150_000_000, np.float32)\n"
        "with StopRequest() as stop:\n"
        "    print('ready', flush=True)\n"
        "    x.sort()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    process.send_signal(first)
    time.sleep(0.2)
    assert process.poll() is None
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 128 + signal.SIGTERM and time.monotonic() - begin < 2
