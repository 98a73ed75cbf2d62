"""Generation: KV-cache decoding equals the full forward pass, prompts that do not fit are refused, and sampling."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from small import small_config

from fastvlm_jax.generate import (
    advance,
    begin,
    generate,
    generate_tokens,
    penalise,
    prefill,
    sample,
    seen_in,
    stream,
    until,
)
from fastvlm_jax.losses import inputs
from fastvlm_jax.models import fastvlm
from fastvlm_jax.models.decoder import unstacked
from fastvlm_jax.processor import Processor
from fastvlm_jax.text.tokenizer import load_tokenizer
from fastvlm_jax.text.unfinished import certain

QUESTIONS = ["what color is the shape?", "is there a red triangle in the image or is it a blue circle?", "why?"]


@pytest.fixture(scope="module")
def model_and_rest(easy_vqa):
    model = fastvlm.build(**small_config(easy_vqa).model.to_dict())
    variables = jax.jit(lambda: nn.unbox(fastvlm.init_variables(model, jax.random.key(3))))()
    # Larger weights make attention sharp: at the initial scale a position off by one would not change any answer.
    layers = variables["params"]["llm"]["layers"]
    for name, factor in (("q", 5), ("k", 5), ("v", 3), ("o", 3)):
        layers[name]["kernel"] *= factor
    return model, variables, Processor(load_tokenizer(easy_vqa), "chatml", 16, 4)


def images(count):
    return list(np.random.default_rng(0).integers(0, 255, (count, 16, 16, 3), dtype=np.uint8))


def test_cached_decoding_equals_the_full_forward_at_every_step(model_and_rest):
    """The reference continues each row greedily by running the whole row again for every new token."""
    model, variables, processor = model_and_rest
    batch = processor(images(3), QUESTIONS)
    got = np.asarray(generate_tokens(model, variables, batch, jax.random.key(0), max_tokens=6, end=511))
    forward = jax.jit(lambda **fields: model.apply(variables, **fields))
    lengths = (np.asarray(batch.segment_ids[0]) > 0).sum(-1)
    assert len(set(lengths)) == 3
    for row, length in enumerate(lengths):
        tokens, index = (np.zeros((1, 1, 64), np.int32), np.full((1, 1, 64), -1, np.int32))
        tokens[0, 0, :length] = batch.tokens[0, row, :length]
        index[0, 0, :length] = batch.image_index[0, row, :length] % 4 - (batch.image_index[0, row, :length] < 0) * 4
        for step in range(6):
            fields = inputs(batch) | dict(
                images=batch.images[:, row : row + 1],
                image_mask=batch.image_mask[:, row : row + 1],
                tokens=tokens,
                image_index=np.maximum(index, -1),
                positions=np.arange(64, dtype=np.int32)[None, None],
                segment_ids=(np.arange(64) < length + step).astype(np.int32)[None, None],
            )
            logits = np.asarray(forward(**fields))[0, 0, length + step - 1]
            assert got[row, step] == logits.argmax(), (row, step)
            tokens[0, 0, length + step] = got[row, step]


def test_layers_that_are_not_stacked_compute_the_same(model_and_rest):
    model, variables, processor = model_and_rest
    batch = processor(images(3), QUESTIONS)
    llm = variables["params"]["llm"]
    apart = {**variables["params"], "llm": {**llm, "layers": unstacked(llm["layers"], 2)}}
    forward = jax.jit(lambda params: model.apply({**variables, "params": params}, **inputs(batch)))
    np.testing.assert_allclose(forward(apart), forward(variables["params"]), rtol=1e-5, atol=1e-5)


def arrays_of(function, *args):
    """The sizes of all arrays in a compiled program."""
    text = jax.jit(function).lower(*args).compile().as_text()
    return {tuple(map(int, sizes.split(","))) for sizes in re.findall(r"[a-z]\w*\[([\d,]+)\]", text)}


def test_the_compiled_prefill_holds_no_logits_of_all_positions(model_and_rest):
    """With 3 rows of 48 tokens and 512 words no array has 3 x 48 x 512 elements; the full forward pass has one."""
    model, variables, processor = model_and_rest
    batch = processor(images(3), QUESTIONS, length=48)
    assert batch.tokens.shape == (1, 3, 48)

    def first(variables, batch):
        features = model.apply(variables, batch.images, batch.image_mask, method="encode")
        return prefill(model, variables, features, batch, 80)

    logits = 48 * 512
    assert max(np.prod(sizes) for sizes in arrays_of(first, variables, batch)) < 3 * logits
    assert not any({48, 512} <= set(sizes) for sizes in arrays_of(first, variables, batch))
    full = arrays_of(lambda variables, batch: model.apply(variables, **inputs(batch)), variables, batch)
    assert max(np.prod(sizes) for sizes in full) == 3 * logits


def test_prompts_of_similar_length_share_a_program_and_an_image_is_encoded_once(model_and_rest):
    generate(*model_and_rest, images(1), ["why?", "what color?"], max_tokens=3)
    before = begin._cache_size(), advance._cache_size()
    generate(*model_and_rest, images(1), ["what is it?", "is it red or is it blue?"], max_tokens=9)
    assert (begin._cache_size(), advance._cache_size()) == before
    assert model_and_rest[2](images(1), QUESTIONS).images.shape[:2] == (1, 1)


def test_a_stream_brings_the_answers_one_after_the_other_in_pieces(model_and_rest):
    options = dict(max_tokens=20, temperature=1.0, seed=5)
    answers = generate(*model_and_rest, images(3), QUESTIONS, **options)
    found = list(stream(*model_and_rest, images(3), QUESTIONS, **options))
    assert [number for number, _ in found] == sorted(number for number, _ in found)
    assert ["".join(piece for number, piece in found if number == row) for row in range(3)] == answers
    assert sum(number == 0 for number, _ in found) > 5
    assert list(stream(*model_and_rest, [], [])) == []
    with pytest.raises(ValueError, match="max_tokens=0"):
        next(stream(*model_and_rest, [], ["hello"], max_tokens=0))


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece", "llama", "llama as json"])
def test_what_a_stream_shows_never_changes(kind, json_file, sentencepiece_file, llama_file, tmp_path):
    """Random ids hold parts of characters, stray bytes, special tokens and spaces at all places."""
    files = {"byte-level": json_file, "sentencepiece": sentencepiece_file}
    tokenizer = load_tokenizer(files.get(kind, llama_file))
    if kind == "llama as json":
        tokenizer.save(tmp_path)
        (tmp_path / "tokenizer.model").unlink()
        tokenizer = load_tokenizer(tmp_path)
    rng = np.random.default_rng(0)
    characters = [i for text in ("🦜", "寿", " é", "ab ", "\n") for i in tokenizer.encode(text)]
    for _ in range(250):
        ids = rng.integers(0, tokenizer.vocab_size, rng.integers(1, 20)).tolist()
        place = rng.integers(0, len(ids) + 1)
        ids[place:place] = characters[: rng.integers(0, len(characters))]
        shown = ""
        for count in range(len(ids) + 1):
            text = certain(tokenizer, ids[:count])
            assert text.startswith(shown), (ids, count)
            shown = text
        assert tokenizer.decode(ids).strip().startswith(shown)


def test_empty_rows_have_ended_and_change_no_answer(model_and_rest):
    """A group of an evaluation is filled with rows of no token, which must not be continued to the longest answer."""
    model, variables, processor = model_and_rest
    batch = processor(images(1), QUESTIONS[:1])
    more = ((0, 0), (0, 2), (0, 0))
    rows = {name: np.pad(getattr(batch, name), more) for name in ("tokens", "segment_ids", "positions")}
    filled = batch.replace(**rows, image_index=np.pad(batch.image_index, more, constant_values=-1))
    alone, got = (
        np.asarray(generate_tokens(model, variables, own, jax.random.key(0), max_tokens=6, end=511))
        for own in (batch, filled)
    )
    assert alone[0, 0] != 511 and got.tolist() == [alone[0].tolist(), [511] * 6, [511] * 6]


def test_rows_are_filled_with_the_end_mark_once_they_reached_it(model_and_rest):
    model, variables, processor = model_and_rest
    batch = processor(images(3), QUESTIONS)
    free = np.asarray(generate_tokens(model, variables, batch, jax.random.key(0), max_tokens=8, end=511))
    end = int(free[0, 2])
    got = np.asarray(generate_tokens(model, variables, batch, jax.random.key(0), max_tokens=8, end=end))
    for row, reference in zip(got, free, strict=True):
        length = list(reference).index(end) if end in reference else 8
        np.testing.assert_array_equal(row[:length], reference[:length])
        assert (row[length:] == end).all()


def test_the_first_of_several_end_ids_ends_an_answer(model_and_rest):
    model, variables, processor = model_and_rest
    batch = processor(images(3), QUESTIONS)
    free = np.asarray(generate_tokens(model, variables, batch, jax.random.key(0), max_tokens=8, end=511))
    ends = (510, int(free[0, 4]), int(free[0, 2]))
    got = np.asarray(generate_tokens(model, variables, batch, jax.random.key(0), max_tokens=8, end=ends))
    for row, reference in zip(got.tolist(), free.tolist(), strict=True):
        length = next((i for i, token in enumerate(reference) if token in ends), 7) + 1
        assert row == reference[:length] + [510] * (8 - length)
    assert until(got[0], ends) == free[0, :2].tolist()


def test_a_model_without_settings_ends_at_its_end_mark_and_at_the_end_of_a_text(sentencepiece_file, llama_file):
    assert Processor(load_tokenizer(sentencepiece_file), "chatml", 0, 0).end_ids == (3, 0)  # <|im_end|>, <|endoftext|>
    assert Processor(load_tokenizer(llama_file), "vicuna_v1", 0, 0).end_ids == (2,)  # </s>; <unk> ends nothing


def test_a_penalty_divides_positive_logits_of_seen_tokens_and_multiplies_negative_ones():
    seen = jnp.array([[True, True, False, False]])
    assert penalise(jnp.array([[3.0, -1.0, 3.0, -1.0]]), seen, 2.0).tolist() == [[1.5, -2.0, 3.0, -1.0]]


def test_padding_is_not_seen_and_placeholders_count_as_the_image_token(model_and_rest):
    _, _, processor = model_and_rest
    batch = processor(images(1), QUESTIONS[:1])
    text = set(np.asarray(batch.tokens)[(np.asarray(batch.image_index) < 0) & (np.asarray(batch.segment_ids) > 0)])
    assert 0 not in text and (np.asarray(batch.segment_ids) == 0).any()
    assert set(np.flatnonzero(seen_in(batch, 512, None)[0])) == text
    assert set(np.flatnonzero(seen_in(batch, 512, 300)[0])) == text | {300}


def test_top_k_draws_only_from_the_most_likely_tokens():
    logits = jnp.log(jnp.array([[0.4, 0.3, 0.2, 0.1]]))
    keys = jax.random.split(jax.random.key(0), 2000)
    assert set(np.asarray(jax.vmap(lambda key: sample(logits, key, 1.0, 1.0, 3)[0])(keys)).tolist()) == {0, 1, 2}


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": -1},
        {"top_k": 1.5},
        {"repetition_penalty": 0},
        {"top_p": "a"},
        {"temperature": None},
        {"max_tokens": 0},
    ],
)
def test_options_out_of_range_are_refused_by_name(options, model_and_rest):
    with pytest.raises(ValueError, match=rf"^[^\n]*{next(iter(options))}=[^\n]*$"):
        generate(*model_and_rest, [], ["hello"], **options)


def test_text_alone_is_answered_without_images(model_and_rest):
    answers = generate(*model_and_rest, [], ["hello"], max_tokens=3)
    assert len(answers) == 1


def test_prompt_longer_than_the_context_is_refused(model_and_rest):
    with pytest.raises(ValueError, match="tokens long, more than the 28 allowed: shorten it"):
        generate(*model_and_rest, images(1), ["what " * 50], max_tokens=4, max_length=32)


def test_until_cuts_at_the_first_end_mark():
    assert until(np.array([5, 6, 2, 7, 2]), 2) == [5, 6]
    assert until(np.array([5, 6]), 2) == [5, 6]


def test_temperature_zero_takes_the_most_likely_token():
    assert sample(jnp.array([[0.0, 3.0, 1.0]]), jax.random.key(0), 0.0, 1.0).tolist() == [1]


@pytest.mark.parametrize("temperature", [1e-300, 1e-45, 9e-7])
def test_a_temperature_below_a_millionth_is_greedy(temperature):
    """Divided by 1e-45, logits of both signs become infinite; equal ones would be drawn at random."""
    logits = jnp.array([[-3.0, 3.0, 3.0 - 1e-6, 0.0]])
    keys = jax.random.split(jax.random.key(0), 200)
    assert set(np.asarray(jax.vmap(lambda key: sample(logits, key, temperature, 1.0)[0])(keys)).tolist()) == {1}


def test_top_p_draws_only_from_the_smallest_set_of_that_probability():
    """Of probabilities 0.5, 0.3, 0.15, 0.05, top_p=0.7 needs the first two, 0.8 exactly these two, 0.81 a third."""
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    keys = jax.random.split(jax.random.key(0), 2000)
    assert set(np.asarray(jax.vmap(lambda key: sample(logits, key, 1.0, 0.7)[0])(keys)).tolist()) == {0, 1}
    assert set(np.asarray(jax.vmap(lambda key: sample(logits, key, 1.0, 0.81)[0])(keys)).tolist()) == {0, 1, 2}


def test_temperature_sharpens_the_distribution():
    """At temperature 0.5 the odds 0.6 : 0.4 become 0.36 : 0.16, so 69.2 % of the samples are the first token."""
    logits = jnp.log(jnp.array([[0.6, 0.4]]))
    keys = jax.random.split(jax.random.key(1), 4000)
    share = np.mean(np.asarray(jax.vmap(lambda key: sample(logits, key, 0.5, 1.0)[0])(keys)) == 0)
    assert abs(share - 0.692) < 0.025
