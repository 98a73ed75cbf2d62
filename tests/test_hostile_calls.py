"""300 random calls of the Python interface: a ValueError of one line, or the right pixels and tokens."""

import io
import random

import jax
import numpy as np
import PIL.Image
import pytest
from flax import linen as nn
from pictures import encode
from small import small_config

from fastvlm_jax.generate import generate
from fastvlm_jax.models import fastvlm
from fastvlm_jax.processor import Processor
from fastvlm_jax.text.tokenizer import load_tokenizer

SIDE = 16
BLOCK = np.zeros((SIDE, SIDE, 3), np.uint8)
BLOCK[:8] = 255
GREY, PICTURE = BLOCK[..., 0], PIL.Image.fromarray(BLOCK)
PNG = encode(PICTURE, format="PNG")


class Raises:
    """Stands for a tensor on a device, or a file on a share that is gone."""

    def __array__(self, *_, **__):
        raise RuntimeError("can't convert\na device tensor")

    def read(self):
        raise OSError("the share\nis gone")


def good_images(folder):
    """Ways to hold the picture BLOCK; functions, as a file can be read once."""
    path = folder / "block.png"
    path.write_bytes(PNG)
    wrapped = {
        "path": path, "name": str(path), "bytes": PNG, "bytearray": bytearray(PNG), "view": memoryview(PNG),
        "pillow": PICTURE, "grey": PICTURE.convert("L"), "one bit": PICTURE.convert("1"),
        "alpha": PICTURE.convert("RGBA"),
        "palette": PICTURE.quantize(2), "array": BLOCK, "flat": GREY, "one channel": GREY[..., None],
        "four channels": np.dstack([BLOCK, np.full_like(GREY, 255)]), "bool": GREY > 0, "half": np.float16(BLOCK > 0),
        "double": BLOCK / 255, "fortran": np.asfortranarray(BLOCK), "jax": jax.numpy.asarray(BLOCK),
    }  # fmt: skip
    return [lambda value=value: value for value in wrapped.values()] + [
        lambda: io.BytesIO(PNG),
        lambda: path.open("rb"),
    ]


def bad_images(folder):
    closed, gone = io.BytesIO(PNG), PICTURE.copy()
    closed.close()
    gone.close()
    values = [
        3, 2.5, True, object(), {}, {1}, print, type, Raises(), range(3), b"", b"GIF89a", PNG[:60], PNG[8:], "no.png",
        "", "\0", "a\nb", "x" * 5000, str(folder), folder, "\ud800", "http://a/b", "data:image/png;base64,@", closed,
        io.StringIO("a"), io.BytesIO(), gone, PIL.Image.new("F", (9, 9)), PIL.Image.new("RGB", (0, 9)),
        BLOCK.astype(int), BLOCK.astype(np.uint16), BLOCK * 1.0, BLOCK * np.nan, -(BLOCK / 255), BLOCK / 254,
        BLOCK * 1j, BLOCK.astype(object), BLOCK.astype(str), BLOCK.transpose(2, 0, 1), BLOCK[..., :2], BLOCK[:0],
        BLOCK[0, 0], BLOCK[0, 0, 0], BLOCK[None], np.broadcast_to(np.uint8(9), (90_000, 90_000, 3)), np.array(None),
        np.array([]), np.float32("inf"),
    ]  # fmt: skip
    return [lambda value=value: value for value in values]


def good_prompts(count):
    """(prompt about `count` images, its turns)."""
    images = tuple(range(count))
    asked = (*images, "is it red?")
    yield "is it red?", (("user", asked),)
    yield [{"role": "user", "content": "is it red?"}], (("user", asked),)
    yield [{"from": "human", "value": "<image>" * count + "is it red?"}], (("user", asked),)
    yield [("user", asked)], (("user", asked),)
    parts = [*({"type": "image"} for _ in images), {"type": "text", "text": "is it red?"}]
    yield [{"role": "user", "content": parts}], (("user", asked),)
    talk = [("user", asked), ("assistant", ("no",)), ("user", ("what color?",))]
    yield [{"role": role, "content": list(content)} for role, content in talk], tuple(talk)
    yield [{"role": "system", "content": "no"}, ("user", asked)], (("system", ("no",)), ("user", asked))


BAD_PROMPTS = [
    None, 3, 2.5, True, b"why?", object(), {}, {"role": "user", "content": "a"}, [], [[]], [None], [3], "\ud800",
    np.nan, np.array(["a"]), "<image>" * 9, [{"role": "user"}], [{"role": 3, "content": "a"}],
    [{"role": "tool", "content": "a"}],
    [{"role": "user", "content": b"a"}], [{"role": "user", "content": [{"type": "audio"}]}], [("user", (99,))],
    [("user", (True,))], [("user", "a"), ("user", "b")], [("user", "a"), ("assistant", "b")], [("system", "a")],
    [("user", [["a"]])], [("user", ({"type": "image", "image": 3},)), 3], [[("user", "a")]], [{}], [("user",)],
]  # fmt: skip
BAD_OPTIONS = [
    {"length": 0}, {"length": -1}, {"length": 2}, {"length": "9"}, {"length": 9.5}, {"length": True},
    {"length": np.nan}, {"max_length": 0}, {"max_length": 3}, {"max_length": "9"}, {"max_length": []},
    {"length": 64, "max_length": 5},
]  # fmt: skip


@pytest.fixture(scope="module")
def processor(sentencepiece_file):
    return Processor(load_tokenizer(sentencepiece_file), "chatml", SIDE, 2)


def refused(call):
    """Checks that a call ends in a ValueError of one line that says something."""
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and 10 < len(message) < 500, message
    return message


def is_right(batch, talks, counts, processor):
    """Whether a batch holds the block `sum(counts)` times, and in each row a conversation about its own of them."""
    assert batch.images.shape == (1, sum(counts), SIDE, SIDE, 3) and batch.image_mask.all()
    assert (batch.images == BLOCK).all()
    for row, (turns, first) in enumerate(zip(talks, np.cumsum([0, *counts]), strict=False)):
        expected = processor.segment(turns, True)
        length = len(expected.tokens)
        assert batch.tokens[0, row, :length].tolist() == expected.tokens.tolist()
        index = np.where(expected.image_index < 0, -1, expected.image_index + 2 * first)
        assert batch.image_index[0, row, :length].tolist() == index.tolist()
        assert batch.segment_ids[0, row].sum() == length


def test_300_random_calls_are_refused_in_one_line_or_right(processor, tmp_path):
    rng, right = random.Random(300), 0
    good, bad = good_images(tmp_path), bad_images(tmp_path)
    for number in range(300):
        rows = rng.choice((1, 1, 2, 3))
        counts = [rng.choice((0, 1, 1, 2)) for _ in range(rows)]
        images = [[rng.choice(good)() for _ in range(count)] for count in counts]
        chosen = [rng.choice(list(good_prompts(count))) for count in counts]
        prompts, talks = [prompt for prompt, _ in chosen], [turns for _, turns in chosen]
        options, fault = {}, rng.choice(("none", "none", "image", "image", "prompt", "options", "counts", "image_of"))
        row = rng.randrange(rows)
        if fault == "image":
            images[row] = [*images[row], rng.choice(bad)()]
        elif fault == "prompt":
            prompts[row] = rng.choice(BAD_PROMPTS)
        elif fault == "options":
            options = rng.choice(BAD_OPTIONS)
        elif fault == "counts":
            images += [[rng.choice(good)()] for _ in range(2)]
        elif fault == "image_of":
            images = [image for some in images for image in some]
            wrong = rng.choice(
                (0, "0", [None] * rows, [99] * rows, [0.5] * rows, [-1] * rows, [[0]] * (rows + 1), object())
            )
            options = {"image_of": wrong}
        elif rows == 1 and rng.random() < 0.5:  # the short forms of one prompt
            images, prompts = images[0] or None, prompts[0]
        elif len(set(counts)) == 1 and counts[0] == 1 and rng.random() < 0.5:
            images = [image for (image,) in images]
        if fault == "none":
            is_right(processor(images, prompts), talks, counts, processor)
            right += 1
        else:
            message = refused(lambda: processor(images, prompts, **options))
            word = {"counts": "images", "options": "length"}.get(fault, fault)
            assert word in message or "long" in message, (number, fault, message)
    assert 50 < right < 150


def test_every_bad_image_is_refused_alone_and_in_a_list(processor, tmp_path):
    for make in bad_images(tmp_path):
        value = make()
        if not (isinstance(value, np.ndarray) and value.ndim == 4):  # four axes hold several images
            refused(lambda: processor(value, "no"))
        refused(lambda: processor([value], "no"))


@pytest.fixture(scope="module")
def asked(easy_vqa):
    model = fastvlm.build(**small_config(easy_vqa).model.to_dict())
    variables = jax.jit(lambda: nn.unbox(fastvlm.init_variables(model, jax.random.key(3))))()
    return model, variables, Processor(load_tokenizer(easy_vqa), "chatml", SIDE, 4)


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 0}, {"max_tokens": -1}, {"max_tokens": 2.5}, {"max_tokens": "9"}, {"max_tokens": None},
        {"max_tokens": True}, {"max_tokens": 10**9}, {"temperature": -1}, {"temperature": np.nan},
        {"temperature": np.inf}, {"temperature": "hot"}, {"temperature": None}, {"top_p": 0}, {"top_p": np.nan},
        {"top_p": 1.5}, {"top_p": "1"}, {"top_p": None}, {"seed": "1"}, {"seed": 1.5}, {"seed": None}, {"seed": 2**70},
        {"max_length": 0}, {"max_length": "9"}, {"max_length": 2.5}, {"length": "9"}, {"length": 0},
    ],
    ids=str,
)  # fmt: skip
def test_options_of_generate_are_refused_by_name(asked, options):
    (name,) = options
    assert name in refused(lambda: generate(*asked, BLOCK, "is it red?", **options))


def test_generate_answers_about_several_images_and_turns_as_about_the_same_question_alone(asked):
    """A row's answer does not depend on the rows beside it, nor on how its images and turns were handed over."""
    other = BLOCK[::-1].copy()
    talk = [
        {"role": "user", "content": "<image> or <image>?"},
        {"role": "assistant", "content": "a circle"},
        {"role": "user", "content": "why?"},
    ]
    together = generate(*asked, [[BLOCK, other], None, [PNG]], [talk, "hello", "what color?"], max_tokens=4)
    assert together[:1] == generate(*asked, [BLOCK, other], talk, max_tokens=4)
    assert together[2:] == generate(*asked, PICTURE, "<image>\nwhat color?", max_tokens=4)
    assert generate(*asked, None, [], max_tokens=4) == []
