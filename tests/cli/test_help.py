"""What the commands say of themselves: --help, a command that is missing or mistyped, a flag that does not exist."""

import subprocess
import sys

import pytest
from command import fastvlm
from paths import ROOT

from fastvlm_jax.cli import COMMANDS
from fastvlm_jax.cli.help import ABOUT

REQUIRED = {
    "train": ["--config", "--workdir"],
    "generate": ["--model", "--prompt"],
    "chat": ["--model"],
    "evaluate": ["--model", "--data"],
    "convert": ["--source", "--target"],
    "data write": ["--source", "--output"],
    "data inspect": [],
    "data easy-vqa": ["--output"],
    "preflight": ["--config", "--topology"],
    "bench input": ["--config"],
    "report": ["WORKDIR", "--output"],
}


@pytest.mark.parametrize("command", ABOUT)
def test_help_opens_with_a_sentence_and_an_example_and_marks_what_is_required(monkeypatch, capsys, command):
    status, out, err = fastvlm(monkeypatch, capsys, *command.split(), "--help")
    lines = out.splitlines()
    assert (status, err) == (0, "")
    assert lines[0][0].isupper() and lines[0].endswith(".") and lines[1] == lines[3] == ""
    assert lines[2].startswith(f"  fastvlm {command} ")
    marked = [line.split()[1].partition("=")[0] for line in lines[5:] if line.startswith("* ")]
    assert marked == REQUIRED.get(command, marked)
    assert all(name in lines[2] for name in marked if name != "WORKDIR")
    # Not the flags of absl itself, nor the words that it adds to the help of a flag.
    assert not any(word in out for word in ("flagfile", "undefok", "repeat this option", "None", "  <", "|"))
    assert max(map(len, lines[4:])) <= 120


def test_every_command_is_explained():
    assert {name.split()[0] for name in ABOUT} == set(COMMANDS)
    assert REQUIRED.keys() <= ABOUT.keys()


@pytest.mark.parametrize("command", ABOUT)
def test_the_readme_lists_every_command(command):
    listed = (ROOT / "README.md").read_text().partition("## Commands")[2].split("```")[1]
    lines = [line.split() for line in listed.splitlines() if line.startswith("fastvlm ")]
    name, *kind = command.split()
    assert any(line[1] == name and {*kind} <= {*line[2].split("|")} for line in lines)


def test_flags_are_listed_required_first_then_as_they_are_defined_with_their_defaults(monkeypatch, capsys):
    _, out, _ = fastvlm(monkeypatch, capsys, "convert", "--help")
    assert out.partition("flags (* must be given):\n")[2] == (
        "* --source=...                model to convert, or its parts; the layout is recognised\n"
        "* --target=...                folder to write\n"
        "  --layout=...                layout to write; one of native, hf, llava, timm, openclip, gguf, peft (default\n"
        "                              native)\n"
        "  --dtype=...                 dtype of the stored weights; default: as in the source; one of float32,\n"
        "                              bfloat16, float16\n"
        "  --gguf_type=...             type of the matrices in a GGUF file; default: f16; one of f16, f32, bf16, q8_0\n"
        "  --fold                      fold the encoder's training form (hf and llava always do)\n"
        "  --overwrite                 replace the model at the target\n"
    )


@pytest.mark.parametrize(
    "argv, status, words",
    [
        ((), 2, "usage: fastvlm COMMAND"),
        (("help",), 0, "usage: fastvlm COMMAND"),
        (("-h",), 0, "usage: fastvlm COMMAND"),
        (("--help",), 0, "\n  fastvlm generate --model "),
        (("help", "convert"), 0, "\n* --source=... "),
        (("convert", "-h"), 0, "\n* --source=... "),
        (("data",), 2, "`fastvlm data` has write, inspect, easy-vqa"),
        (("data", "--help"), 0, "\n  fastvlm data write --source mine.json"),
        (("data", "help"), 0, "\n  fastvlm data write --source mine.json"),
        (("help", "data"), 0, "\n  fastvlm data write --source mine.json"),
        (("bench",), 2, "`fastvlm bench` has input"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, tuple) else "",
)
def test_help_is_where_one_looks_for_it(monkeypatch, capsys, argv, status, words):
    found, out, err = fastvlm(monkeypatch, capsys, *argv)
    assert found == status and words in (err if status else out) and (out if status else err) == ""


@pytest.mark.parametrize(
    "argv, message",
    [
        ("trian", "fastvlm: unknown command 'trian' (did you mean train?); `fastvlm` has train, generate, "),
        ("xyz", "fastvlm: unknown command 'xyz'; `fastvlm` has train, generate, "),
        ("data wirte", "fastvlm data: unknown command 'wirte' (did you mean write?); `fastvlm data` has write, "),
        ("bench inputs", "bench: unknown command 'inputs' (did you mean input?); `fastvlm bench` has input"),
        (
            "generate --max-tokens=3",
            "--max-tokens (did you mean --max_tokens?); `fastvlm generate --help` lists the flags",
        ),
        ("data write --outptu=x", "--outptu (did you mean --output?); `fastvlm data write --help` lists the flags"),
        ("data write --qqq=x", "unknown flag --qqq; `fastvlm data write --help` lists the flags"),
        ("convert --source=x", "convert: --target is missing; `fastvlm convert --help` explains the flags"),
        ("data easy-vqa", "--output is missing; `fastvlm data easy-vqa --help` explains the flags"),
        ("convert x", "unexpected argument 'x': flags are written --name=value"),
        ("report --output=x", "name at least one WORKDIR"),
    ],
)
def test_wrong_usage_is_one_line_that_says_what_was_meant_and_has_status_2(monkeypatch, capsys, argv, message):
    status, out, err = fastvlm(monkeypatch, capsys, *argv.split())
    assert status == 2 and not out and message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--config.stepz=3", "--config: there is no key 'stepz' (did you mean steps?); docs/config.md lists the keys"),
        ("--config.data.gruops=3", "there is no key 'gruops' (did you mean groups?); docs/config.md"),
        ("--config.zzz=3", "there is no key 'zzz'; docs/config.md"),
    ],
)
def test_a_mistyped_key_of_a_config_is_named_with_the_one_that_was_meant(monkeypatch, capsys, flag, message):
    config = f"--config={ROOT / 'configs/quickstart.py'}"
    status, _, err = fastvlm(monkeypatch, capsys, "train", config, "--workdir=W", flag)
    assert status == 1 and message in err and err.count("\n") == 1


@pytest.mark.parametrize("command", ABOUT)
def test_help_starts_without_jax(command):
    code = (
        "import sys; from fastvlm_jax import cli\n"
        f"sys.argv = ['fastvlm', *{command.split()}, '--help']\n"
        "try: cli.main()\n"
        "except SystemExit: print('jax' in sys.modules or 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.endswith("\nFalse\n")


def test_a_reader_that_closes_early_gets_no_error_message():
    code = "from fastvlm_jax.cli import main; import sys; sys.argv = ['fastvlm', '--help']; main()"
    process = subprocess.Popen(
        [sys.executable, "-uc", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    process.stdout.close()
    assert process.wait() == 141 and process.stderr.read() == ""
