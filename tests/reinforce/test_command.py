"""Tests the command `fastvlm data reinforce`: what it prints, and one clear line for what it cannot do."""

import io
import json
import shlex
import shutil

import numpy as np
import pytest
from absl import flags
from command import fastvlm
from paths import ROOT
from pictures import PHOTO, encode
from random_model import random_variables
from safetensors.numpy import load_file, save_file
from small_pairs import VISION, write_pairs
from small_teacher import write_teacher

from fastvlm_jax import config_checks, convert
from fastvlm_jax.cli.arguments import define_config
from fastvlm_jax.data.record import Record
from fastvlm_jax.data.sources import read_shards
from fastvlm_jax.data.write import write_shards
from fastvlm_jax.reinforce import Progress, progress_bar
from fastvlm_jax.text.tokenizer import train_sentencepiece

COUNT = 9


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Pairs, data of other kinds, teachers, and models that are none."""
    root = tmp_path_factory.mktemp("command")
    write_pairs(root / "pairs", train=COUNT, validation=4)
    talk = (("user", (0, "What is it?")), ("assistant", ("A car.",)))
    image = encode(PHOTO, format="PNG")
    write_shards(root / "talks", "train", [Record(f"{i}", (image,), talk * 2) for i in range(4)])
    write_shards(root / "empty", "train", [])
    write_shards(root / "blank", "train", [Record("k", (image,), (talk[0], ("assistant", (" ",))))])
    write_shards(root / "both", "train", [Record("k", (image,), talk, {"synthetic_captions": ["a", "b"]})])
    write_teacher(root / "a", root / "pairs")
    write_teacher(root / "b", root / "pairs", features=5, size=24)
    convert.write(root / "encoder", "native", random_variables({"vision": VISION})[1], {"vision": VISION}, None, {})
    llm = {"llm": dict(vocab_size=320, width=8, num_layers=1, num_heads=2, num_kv_heads=1, mlp_dim=8)}
    convert.write(root / "lm", "native", random_variables(llm)[1], llm, None, {})
    for name in ("silent", "mixed", "longer", "nan"):
        shutil.copytree(root / "a", root / name)
    (root / "silent" / "preprocessor_config.json").unlink()
    train_sentencepiece([f"word{i} other{i}" for i in range(99)], root / "mixed" / "tokenizer.model", 350)
    settings = json.loads((root / "longer" / "preprocessor_config.json").read_text())
    settings["fastvlm_jax"]["context_length"] = 9
    (root / "longer" / "preprocessor_config.json").write_text(json.dumps(settings))
    for name, tensor, value in (
        ("nan", "text/projection", np.nan),
        ("a", "logit_scale", 2.0),
        ("b", "logit_scale", 5.0),
    ):
        weights = load_file(root / name / "model.safetensors")
        weights[f"params/{tensor}"].flat[0] = value
        save_file(weights, root / name / "model.safetensors")
    (root / "file").write_text("x")
    (root / "damaged").mkdir()
    (root / "damaged" / "reinforced.json").write_text("{")
    return root


def reinforce(monkeypatch, capsys, root, *argv):
    """The status and the two outputs of the command; the last of equal flags holds."""
    given = [f"--source={root / 'pairs'}", f"--teacher={root / 'a'}", f"--output={root / 'out'}"]
    return fastvlm(monkeypatch, capsys, "data", "reinforce", *given, "--image_size=16", "--augmentations=2", *argv)


def config_of(argv):
    """The config that `fastvlm train` would read from a command line."""
    fv = flags.FlagValues()
    define_config(fv, argv)
    flags.DEFINE_string("workdir", None, "", flag_values=fv)
    fv(argv)
    return fv.config


def test_the_printed_commands_write_shards_and_train_on_them(monkeypatch, capsys, root, tmp_path):
    """Two teachers on eight devices; their widths and factors, e^2 and at most 100, are in a valid config."""
    output = tmp_path / "my pairs"
    status, out, err = reinforce(
        monkeypatch, capsys, root, f"--output={output}", f"--teacher={root / 'a'},{root / 'b'}", "--tar_records=4"
    )
    lines = out.splitlines()
    assert status == 0 and all(line.startswith("reinforce: ") for line in err.splitlines())
    assert lines[0].startswith(f"{output}: 9 pairs in 3 tars, 0 rejected; 9 in ") and lines[0].endswith(" views/s")
    assert lines[1] == "next:" and len(lines) == 4
    argv = shlex.split(lines[2].replace("DATA", str(tmp_path / "data")))
    assert argv[:3] == ["fastvlm", "data", "write"] and argv[4] == str(output)
    assert fastvlm(monkeypatch, capsys, *argv[1:], "--workers=1")[0] == 0
    assert len(read_shards(tmp_path / "data", "train")) == COUNT
    argv = shlex.split(lines[3].replace("SIZE", "s0").replace("DATA", str(tmp_path / "data")))
    monkeypatch.chdir(ROOT)
    config = config_of(argv[1:])
    config_checks.validate(config)
    assert config.loss.teachers == ((12, 7.389), (5, 100))
    assert (config.data.augment, config.data.texts, config.loss.soft) == ("replay", 1, 1.0)
    assert config.data.path == str(tmp_path / "data")


class Stream(io.StringIO):
    def __init__(self, terminal):
        super().__init__()
        self.isatty = lambda: terminal


def test_progress_is_a_bar_on_a_terminal_and_a_line_now_and_then_elsewhere(monkeypatch):
    states = [Progress(500 + i, 1000, i - 3 if i > 3 else 0, min(i, 3), 10.0 * i) for i in (1, 5, 100)]
    shown = {}
    monkeypatch.setattr(progress_bar, "_EVERY", 0)
    for terminal in (False, True):
        stream = Stream(terminal)
        with progress_bar.shown(stream) as show:
            for state in states:
                show(state)
        shown[terminal] = stream.getvalue()
    with progress_bar.shown(stream := Stream(False)) as show:
        monkeypatch.setattr(progress_bar, "_EVERY", 30)
        show(states[0])
    assert stream.getvalue() == ""  # 30 s after the first pair
    assert shown[False].splitlines() == [
        "reinforce: 501 of 1,000 records, 1 rejected, 1:23:10 left",
        "reinforce: 505 of 1,000 records, 3 rejected, 1:22:30 left",
        "reinforce: 600 of 1,000 records, 3 rejected, 1:06:40 left",
    ]
    assert "600/1000" in shown[True] and "3 rejected" in shown[True] and "left" not in shown[True]


def test_pairs_that_all_have_synthetic_captions_are_trained_with_both(monkeypatch, capsys, root, tmp_path):
    status, out, _ = reinforce(monkeypatch, capsys, root, f"--source={root / 'both'}", f"--output={tmp_path / 'out'}")
    assert status == 0 and "--config.data.texts=2" in out
    status, out, _ = reinforce(monkeypatch, capsys, root, f"--source={root / 'both'}", f"--output={tmp_path / 'out'}")
    assert (status, out.splitlines()[0]) == (0, f"nothing to do: {tmp_path / 'out'} is complete")


@pytest.mark.parametrize(
    "argv, status, words",
    [
        (["--teacher="], 2, "--teacher is missing"),
        (["--teacher={a},"], 1, "--teacher {a}, has an empty name: write MODEL or MODEL,MODEL"),
        (["--teacher={a},{b},{root}/b/../a"], 1, "--teacher names {root}/b/../a twice"),
        (["--teacher=nowhere"], 1, "there is no model at nowhere; give a training workdir or a model directory"),
        (["--teacher={lm}"], 1, "--teacher {lm} holds llm alone: a teacher is a CLIP, with an image and a text tower"),
        (["--teacher={a},{encoder}"], 1, "--teacher {encoder} holds vision alone: a teacher is a CLIP"),
        (["--teacher={silent}"], 1, "--teacher {silent} has no tokenizer: put CLIP's vocabulary"),
        (["--teacher={mixed}"], 1, "{mixed}: its tokenizer has 352 ids and texts of 6 tokens, its text tower "),
        (["--teacher={longer}"], 1, "302 ids and texts of 9 tokens, its text tower 302 and 6: put the files of its"),
        (["--teacher={nan}"], 1, "a teacher gives embeddings that are not finite, from record 0 on"),
        (["--source=nowhere"], 1, "there is no dataset folder nowhere: write one with `fastvlm data write"),
        (["--source={empty}"], 1, "{empty}: its split 'train' is empty"),
        (["--split=test"], 1, "{pairs} has no split 'test': it has train, validation"),
        (["--source={talks}"], 1, "none of the first 4 records is a pair of a picture and its caption, as in {talks}"),
        (["--source={talks}"], 1, "record 0: 2 questions are no caption"),
        (["--source={blank}"], 1, "record 0: an answer is empty"),
        (["--output={pairs}"], 1, "{pairs} holds shards: choose another --output for the tars"),
        (["--output={file}"], 1, "{file} is a file: choose a folder"),
        (["--output={file}/out"], 1, "{file}/out cannot be written to: Not a directory"),
        (["--output=gs://bucket/out"], 1, "gs://bucket/out is not local: write to a local folder, then"),
        (["--output={damaged}"], 1, "reinforced.json is not readable JSON"),
        (["--crop_area=0,1"], 1, "--crop_area 0,1 must be two fractions of the area, the smaller one first"),
        (["--crop_area=0.9,0.5"], 1, "--crop_area 0.9,0.5 must be two fractions"),
        (["--crop_area=0.5"], 1, "--crop_area 0.5 must be two fractions of the area"),
        (["--crop_area=half,1"], 2, "--crop_area=half,1 must be two numbers, as 0.08,1"),
        (["--crop_area=0.5,0.6,0.7"], 1, "--crop_area 0.5,0.6,0.7 must be two fractions of the area"),
        (["--crop_area="], 1, "--crop_area must be two fractions of the area"),
        (["--crop_area=nan,1"], 1, "--crop_area nan,1 must be two fractions"),
        (["--operations=2,31"], 1, "--operations 2,31 must be a number of 0 to 100 and a magnitude of 0 to 30"),
        (["--operations=2"], 1, "--operations 2 must be a number of 0 to 100 and a magnitude of 0 to 30"),
        (["--operations=-1,9"], 1, "--operations -1,9 must be"),
        (["--operations=2,x"], 2, "--operations=2,x must be two whole numbers, as 2,9"),
        (["--augmentations=0"], 1, "--augmentations 0 must be 1 to 10000"),
        (["--image_size=0"], 1, "--image_size 0 must be 1 to 32768"),
        (["--seed=-1"], 1, "--seed -1 must be 0 to"),
        (["--batch_size=0"], 1, "--batch_size 0 must be 1 to"),
        (["--tar_records=0"], 1, "--tar_records 0 must be 1 to"),
        (["--workers=-1"], 1, "--workers -1 must be 0 to"),
        (["--dtype=float16"], 2, "--dtype=float16: value should be one of <float32|bfloat16>"),
        (["--teachers={a}"], 2, "unknown flag --teachers (did you mean --teacher?)"),
        (["out"], 2, "unexpected argument 'out'"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_told_in_one_line(monkeypatch, capsys, root, argv, status, words):
    places = {path.name: path for path in root.iterdir()} | {"root": root}
    found, out, err = reinforce(monkeypatch, capsys, root, *(word.format(**places) for word in argv))
    assert (found, out) == (status, "") and words.format(**places) in err and err.count("\n") == 1, err
    assert "Traceback" not in err
    assert not list(root.glob("out/*.tar*")) and not list(root.glob("out/index/*"))


def test_one_process_of_several_is_refused(monkeypatch, capsys, root):
    for name, value in (("COORDINATOR_ADDRESS", "10.0.0.1:8476"), ("NUM_PROCESSES", "4"), ("PROCESS_ID", "1")):
        monkeypatch.setenv(f"FASTVLM_{name}", value)
    status, _, err = reinforce(monkeypatch, capsys, root)
    assert status == 1 and "this is process 1 of 4, and data reinforce runs as one: give each host a --source" in err
