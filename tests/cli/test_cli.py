"""The commands as a person types them: exit status, one clear line, nothing half-written."""

import json
import logging
import subprocess
import sys

import jax
import numpy as np
import PIL.Image
import pytest
from absl import logging as absl_logging
from command import fastvlm
from paths import ROOT
from small import small_config

import fastvlm_jax
from fastvlm_jax import cli
from fastvlm_jax.evaluate import suite
from fastvlm_jax.evaluate.benchmarks import known
from fastvlm_jax.train import train

CONFIG = str(ROOT / "configs" / "quickstart.py")


@pytest.fixture(scope="module")
def workdir(easy_vqa, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "small"
    config = small_config(easy_vqa, steps=2, eval_batches=1, mesh=(1, 1, 1, 1))
    train(config, folder, jax.devices()[:1])
    return folder


@pytest.fixture
def picture(tmp_path):
    PIL.Image.fromarray(np.full((20, 30, 3), 200, np.uint8)).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def test_generate_answers_each_prompt_on_its_line(monkeypatch, capsys, workdir, picture):
    status, out, _ = fastvlm(
        monkeypatch, capsys, "generate", f"--model={workdir}", f"--image={picture}",
        "--prompt=what is it?", "--prompt=why?", "--max_tokens=3",
    )  # fmt: skip
    assert status == 0 and out.count("\n") >= 2


def test_generate_writes_the_same_answers_to_a_terminal_in_pieces(monkeypatch, capsys, workdir, picture):
    ask = ["generate", f"--model={workdir}", f"--image={picture}", "--prompt=hi", "--prompt=a", "--max_tokens=9"]
    status, expected, _ = fastvlm(monkeypatch, capsys, *ask)
    pieces = []
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(sys.stdout, "write", lambda text: pieces.append(text) or len(text))
    assert (fastvlm(monkeypatch, capsys, *ask)[0], "".join(pieces)) == (status, expected) == (0, expected)
    assert expected.count("\n") == 2 and len(pieces) > 4


def test_one_checkpoint_of_a_workdir_is_a_model(monkeypatch, capsys, workdir, picture):
    checkpoint = workdir / "checkpoints" / "2"
    status, *_ = fastvlm(monkeypatch, capsys, "generate", f"--model={checkpoint}", "--prompt=hi", "--max_tokens=2")
    assert status == 0


def test_evaluate_prints_a_table_and_writes_the_files_of_a_benchmark(monkeypatch, capsys, workdir, easy_vqa, tmp_path):
    ask = [
        "evaluate",
        f"--model={workdir}",
        "--benchmark=easy-vqa",
        f"--data={easy_vqa}",
        "--limit=300",
        "--page_rows=20",
    ]
    folder = tmp_path / "deep" / "scores"
    status, out, err = fastvlm(monkeypatch, capsys, *ask, f"--output={folder}")
    summary = json.loads((folder / "easy-vqa-own.json").read_text())
    lines = [json.loads(line) for line in (folder / "easy-vqa-own.predictions.jsonl").read_text().splitlines()]
    assert status == 0 and "evaluate: easy-vqa-own: " in err
    assert out.splitlines()[2].split()[:3] == ["easy-VQA,", "test", f"{summary['score']:.1f}"]
    assert out.splitlines()[-2:] == [str(folder / name) for name in ("easy-vqa-own.json", "predictions.html")]
    assert f"| easy-VQA, test | {summary['score']:.1f} | ± " in (folder / "table.md").read_text()
    assert summary["questions"] == len(lines) == 300 and 0 <= summary["score"] <= 100
    assert 0.55 < summary["figures"]["baseline_accuracy"] < 0.75
    assert lines[0]["question"] in lines[0]["prompt"] and lines[0]["images"][0]["digest"]
    assert (folder / "predictions.html").read_text().count('"verdict":') == 20
    assert 0 < len(list((folder / "predictions_images").glob("*.jpg"))) <= 20

    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    status, _, err = fastvlm(monkeypatch, capsys, *ask, f"--output={folder}")
    after = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    speed = json.loads(after.pop("easy-vqa-own.speed.json"))
    told = "evaluate: easy-vqa-own: 300 of 300 answers are in the journal\n"
    assert (status, err, speed["questions_answered"]) == (0, told, 0)
    assert after == {name: data for name, data in before.items() if name != "easy-vqa-own.speed.json"}


@pytest.mark.parametrize(
    "flags, status, words",
    [
        (["--benchmark=easy_vqa"], 1, "there is no benchmark 'easy_vqa' (did you mean easy-vqa?)"),
        (["--benchmark=easy-vqa,qa", "--limit=1"], 1, "there is no dataset folder"),
        (["--benchmark=all"], 1, "holds no folder of a benchmark: expected is one or more of"),
        (["--protocol=llava"], 1, "--protocol llava: easy-VQA, test was not scored by it; easy-vqa has own"),
        (["--samples=nothing"], 1, "--samples: easy-vqa has no row 'nothing'; its first ids are"),
        (["--benchmark="], 2, "--benchmark is empty"),
        (["--benchmark=all,easy-vqa"], 2, "give names of benchmarks with commas between them, or all alone"),
        (["--benchmark=all", "--data=nowhere"], 1, "there is no folder nowhere"),
        (["--benchmark=all", "--protocol=papr"], 1, "there is no --protocol papr: choose paper, llava, lmms-eval"),
        (["--samples=@nowhere"], 2, "--samples=@nowhere: the file of ids cannot be read: No such file or directory"),
        (["--samples=@/dev/null"], 2, "--samples=@/dev/null names no question: leave it out to ask all"),
        (["--samples= , "], 2, "names no question"),
        (["--limit=0"], 2, "--limit"),
        (["--batch_size=0"], 2, "--batch_size"),
        (["--max_tokens=32768", "--limit=1"], 1, "max_tokens=32768 must be less than the model's context length"),
        (["--mesh=1,2,1"], 1, "mesh=(1, 2, 1): give 4 sizes"),
        (["--mesh=a,b,c,d"], 2, "--mesh=a,b,c,d must be four whole numbers"),
        (["--mesh=1,1,2,4"], 1, "the tensor axis of 4 does not divide 2 key-value heads"),
        (["--output=out.json"], 2, "--output=out.json must be a folder, which gets several files: give out"),
        (["--output="], 2, "--output is empty"),
        (
            ["--output=/dev/null/x"],
            2,
            "must be a folder for several files, and /dev/null is not a folder: give another",
        ),
        (["--list=easy-vqa"], 2, "--list=easy-vqa: write --list without '='"),
        (["--split=test"], 2, "--split is for --benchmark=qa or retrieval or zero-shot: easy-vqa has settings"),
        (["--process_id=1"], 1, "missing: --coordinator_address"),
    ],
)
def test_evaluate_refuses_what_it_cannot_do_in_a_line(monkeypatch, capsys, workdir, easy_vqa, flags, status, words):
    ask = ["evaluate", f"--model={workdir}", f"--data={easy_vqa}", *flags]
    found, out, err = fastvlm(monkeypatch, capsys, *ask)
    assert (found, out) == (status, "") and words in err and err.splitlines()[-1] in err, err
    assert len([line for line in err.splitlines() if line.startswith("fastvlm evaluate: ")]) == 1


def test_a_model_without_a_tokenizer_is_refused_before_a_folder_is_made(workdir, tmp_path):
    model, variables, _ = fastvlm_jax.load(workdir)
    with pytest.raises(ValueError, match="this model has no language model or no tokenizer, so it answers nothing"):
        entries = [suite.Entry(own, own.protocols[0], []) for own in known(["easy-vqa"])]
        suite.evaluate(entries, model, variables, None, tmp_path / "scores", source={})
    assert not (tmp_path / "scores").exists()


def test_converted_models_answer_as_the_source_does(monkeypatch, capsys, workdir, picture, tmp_path):
    """workdir -> ours, each read by the same command."""
    ask = ["--image=" + str(picture), "--prompt=what color is the shape?", "--max_tokens=4"]
    _, expected, _ = fastvlm(monkeypatch, capsys, "generate", f"--model={workdir}", *ask)
    target = tmp_path / "native"
    status, out, _ = fastvlm(monkeypatch, capsys, "convert", f"--source={workdir}", f"--target={target}")
    assert status == 0 and str(target) in out
    assert fastvlm(monkeypatch, capsys, "generate", f"--model={target}", *ask) == (0, expected, "")


def test_report_draws_the_losses_and_the_sample_sheet(monkeypatch, capsys, workdir, easy_vqa, tmp_path):
    page = tmp_path / "report.html"
    status, out, _ = fastvlm(
        monkeypatch, capsys, "report", workdir, f"--output={page}", f"--model={workdir}", f"--data={easy_vqa}"
    )
    assert status == 0 and out.split() == [
        str(page),
        str(tmp_path / "report_loss.png"),
        str(tmp_path / "report_rates.png"),
        str(tmp_path / "report_samples.png"),
    ]
    assert PIL.Image.open(tmp_path / "report_samples.png").size == (1100, 1150)
    assert "report_loss.png" in page.read_text() and "small" in page.read_text()


def test_help_lists_the_flags(monkeypatch, capsys):
    status, out, _ = fastvlm(monkeypatch, capsys, "generate", "--help")
    assert status == 0 and "--max_tokens" in out


def bad_inputs(tmp_path, workdir, easy_vqa):
    empty, text = tmp_path / "empty.png", tmp_path / "text.jpg"
    empty.write_bytes(b"")
    text.write_text("not an image")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    where = [f"--config.data.path={easy_vqa}/captions", f"--config.data.tokenizer={easy_vqa}"]
    train_it = ["train", f"--config={CONFIG}:stage1_align", "--config.data.groups=8", *where]
    ask = ["generate", f"--model={workdir}", "--prompt=hi"]
    return {
        "no command": ([], 2, "usage: fastvlm"),
        "unknown command": (["trian"], 2, "did you mean train?"),
        "unknown flag": (["generate", "--modle=x"], 2, "modle"),
        "missing flag": (["generate", "--prompt=hi"], 2, "--model is missing"),
        "unknown config key": ([*train_it, "--workdir=W", "--config.stepz=3"], 1, "stepz"),
        "replaced config key": (
            [*train_it, "--workdir=W", "--config.eval_questions=9"],
            1,
            "there is no key 'eval_questions' any more: evaluate=",
        ),
        "config value of the wrong type": ([*train_it, "--workdir=W", "--config.steps=many"], 2, "steps"),
        "missing config": (["train", "--config=nowhere.py", "--workdir=W"], 1, "nowhere.py"),
        "unknown stage": (["train", f"--config={CONFIG}:stage9", "--workdir=W"], 2, "unknown stage 'stage9'"),
        "missing dataset": ([*train_it[:3], "--workdir=W", "--config.data.path=/nowhere"], 1, "fastvlm data write"),
        "parent of another size": ([*train_it, "--workdir=W", f"--config.parent={workdir}"], 1, "llm.head_dim: 24, 8"),
        "workdir of something else": (
            [*train_it, f"--workdir={tmp_path / 'other'}", "--config.data.groups=8"],
            1,
            "not empty",
        ),
        "missing model": (["generate", "--model=/nowhere", "--prompt=hi"], 1, "there is no model at /nowhere"),
        "folder without a model": (["generate", f"--model={tmp_path / 'other'}", "--prompt=hi"], 1, "config.json"),
        "missing image": ([*ask, "--image=/nowhere.png"], 1, "/nowhere.png"),
        "empty image": ([*ask, f"--image={empty}"], 1, "empty.png"),
        "text as an image": ([*ask, f"--image={text}"], 1, "text.jpg"),
        "prompt longer than the context": ([*ask, "--max_length=20", "--max_tokens=16"], 1, "allowed: shorten it"),
        "stored sampling of a model without any": ([*ask, "--sampling=model"], 1, "has no generation_config.json"),
        "unknown data set": (["data", "imagenet"], 2, "has write, inspect, easy-vqa"),
        "occupied target": (["convert", f"--source={workdir}", f"--target={tmp_path / 'other'}"], 1, "other"),
        "report of a folder that is no run": (["report", tmp_path / "other", "--output=R.html"], 1, "no metrics.jsonl"),
    }


CASES = [
    "no command", "unknown command", "unknown flag", "missing flag", "unknown config key", "replaced config key",
    "config value of the wrong type", "missing config", "unknown stage", "missing dataset", "parent of another size",
    "workdir of something else", "missing model", "folder without a model", "missing image", "empty image",
    "text as an image", "prompt longer than the context", "stored sampling of a model without any", "unknown data set",
    "occupied target", "report of a folder that is no run",
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_use_gets_one_line_and_a_status_and_writes_nothing(monkeypatch, capsys, workdir, easy_vqa, tmp_path, case):
    argv, status, words = bad_inputs(tmp_path, workdir, easy_vqa)[case]
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    found, out, err = fastvlm(monkeypatch, capsys, *argv)
    assert found == status and words in err and not out, (found, out, err)
    if "usage" not in words:
        assert err.count("\n") == 1 and err.startswith(("fastvlm ", "fastvlm: ")), err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_device_is_one_line_and_another_fault_of_the_runtime_is_not(monkeypatch, capsys):
    def fail(message):
        def command(argv):
            raise jax.errors.JaxRuntimeError(message)

        return command

    monkeypatch.setitem(cli.COMMANDS, "train", fail("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes.\nmore"))
    status, _, error = fastvlm(monkeypatch, capsys, "train")
    assert status == 1 and error.count("\n") == 1
    assert "a device's memory is too small (RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes.)" in error
    full = "RESOURCE_EXHAUSTED: /runs/a/host.xplane.pb; No space left on device"
    monkeypatch.setitem(cli.COMMANDS, "train", fail(full))
    status, _, error = fastvlm(monkeypatch, capsys, "train")
    assert (status, error) == (
        1,
        "fastvlm train: /runs/a/host.xplane.pb: No space left on device: make space on that disk, then run the same "
        "command again\n",
    )
    monkeypatch.setitem(cli.COMMANDS, "train", fail("INTERNAL: a fault"))
    with pytest.raises(jax.errors.JaxRuntimeError, match="a fault"):
        fastvlm(monkeypatch, capsys, "train")


def test_too_little_memory_of_the_machine_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(cli.COMMANDS, "train", lambda argv: np.zeros(2**62, np.uint8))
    status, _, error = fastvlm(monkeypatch, capsys, "train")
    assert status == 1 and error.count("\n") == 1
    assert error.startswith("fastvlm train: the memory of this machine is too small: Unable to allocate 4.00 EiB")


@pytest.mark.parametrize("error, status", [("ValueError('a full disk')", 1), ("KeyboardInterrupt('stopped')", 130)])
def test_a_program_that_fails_ends_though_a_thread_never_does(error, status):
    script = (
        "import threading, time\n"
        "from fastvlm_jax import cli\n"
        "def train(argv):\n"
        "    threading.Thread(target=time.sleep, args=(300,)).start()\n"
        f"    raise {error}\n"
        "cli.GRACE, cli.COMMANDS['train'] = 0.5, train\n"
        "cli.program()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "train"], capture_output=True, text=True, timeout=100, cwd=ROOT
    )
    assert (done.returncode, done.stderr) == (status, f"fastvlm train: {error.split(chr(39))[1]}\n")


# A write that ends when the event loop of its save is closed, as Orbax does where a save fails; and a faulty finalizer.
OUTLIVING = """
import asyncio, tensorstore
from fastvlm_jax import cli
def train(argv):
    promise, written = tensorstore.Promise.new()
    async def wait():
        await written
    loop = asyncio.new_event_loop()
    task = loop.create_task(wait())
    for _ in range(2):
        loop.call_soon(loop.stop)
        loop.run_forever()
    loop.close()
    promise.set_result(1)
    task._log_destroy_pending = False
    class Bad:
        def __del__(self):
            raise ValueError("a finalizer that fails")
    Bad()
cli.COMMANDS["train"] = train
cli.program()
"""


def test_writes_that_outlive_a_failed_save_print_no_stack_and_other_errors_that_nobody_catches_do():
    done = subprocess.run([sys.executable, "-c", OUTLIVING, "train"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "Event loop is closed" not in done.stderr
    assert "a finalizer that fails" in done.stderr


def test_warnings_are_shown_and_the_stacks_that_orbax_logs_are_not(monkeypatch, capsys, caplog):
    def log(argv):
        absl_logging.warning("record 3 cannot be used")
        logger = absl_logging.get_absl_logger()
        for level, words in ((logging.WARNING, "a slow disk"), (logging.ERROR, "a stack")):
            logger.handle(logger.makeRecord("absl", level, "/lib/orbax/checkpoint/future.py", 1, words, (), None))

    monkeypatch.setitem(cli.COMMANDS, "train", log)
    assert fastvlm(monkeypatch, capsys, "train")[0] == 0
    assert [record.getMessage() for record in caplog.records] == ["record 3 cannot be used", "a slow disk"]


def test_a_bucket_without_gcsfs_is_told_with_the_extra_to_install():
    script = "import sys; sys.modules['gcsfs'] = None; from fastvlm_jax.cli import main; main()"
    command = [sys.executable, "-c", script, "data", "inspect", "--data=gs://bucket/mine"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "fastvlm data: a gs:// address needs gcsfs: pip install 'fastvlm_jax[gcs]'\n"
