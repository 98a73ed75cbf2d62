"""The language models against transformers' Qwen2ForCausalLM and LlamaForCausalLM, live, with random weights.

Bounds: ||ours - theirs|| / ||theirs|| <= 1e-5 for logits, with the same most likely token everywhere; for gradients
1e-4 of the larger of their own norm and the median one.
"""

import json
import math

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch_reference import Stored, jit, randomise, relative, transformers
from transformers.initialization import no_init_weights

from fastvlm_jax import optim
from fastvlm_jax.convert.layouts.text_config import read_text_config, text_config
from fastvlm_jax.convert.mapping import to_jax, to_torch
from fastvlm_jax.convert.tables.decoder import decoder_rows
from fastvlm_jax.models.decoder import Decoder
from fastvlm_jax.models.sizes import LLM_SIZES

SMALL = dict(vocab_size=96, width=64, num_layers=3, num_heads=4, num_kv_heads=2, mlp_dim=112, rope_theta=1e4)
VARIANTS = {"tied": {}, "untied": {"tie_embeddings": False}, "llama": {"qkv_bias": False, "head_dim": 24}}


def reference_of(llm: Decoder, gain: float = 1.0) -> torch.nn.Module:
    """A random model of transformers of the sizes of `llm`; queries large enough for attention to choose.

    `gain` scales what each layer adds to the residual.
    """
    config = transformers.AutoConfig.for_model(**text_config(llm, bos_token_id=0, eos_token_id=1))
    with no_init_weights():  # they are overwritten below
        reference = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    reference.tie_weights()
    assert type(reference).__name__ == ("Qwen2ForCausalLM" if llm.qkv_bias else "LlamaForCausalLM")
    randomise(reference, 0)
    with torch.no_grad():
        for layer in reference.model.layers:
            layer.self_attn.q_proj.weight *= 3
            layer.self_attn.o_proj.weight *= gain
            layer.mlp.down_proj.weight *= gain
    return reference.eval()


def shapes_of(llm: Decoder) -> dict[str, tuple[int, ...]]:
    x, ids = jax.ShapeDtypeStruct((1, 2, llm.width), np.float32), jax.ShapeDtypeStruct((1, 2), np.int32)
    params = flax.linen.unbox(jax.eval_shape(llm.init, jax.random.key(0), x, ids, ids))["params"]
    return {path: leaf.shape for path, leaf in flax.traverse_util.flatten_dict({"params": params}, sep="/").items()}


def variables_of(llm: Decoder, reference: torch.nn.Module, release=False) -> dict:
    """The variables of a lone decoder; with `release` the reference gives up its weights, one after another."""
    tensors = {name: Stored(tensor) for name, tensor in reference.state_dict().items()}
    if llm.tie_embeddings:
        tensors.pop("lm_head.weight")
    leaves = to_jax(decoder_rows(llm, "model.", "params"), tensors, shapes_of(llm), "transformers")
    leaves, structure = jax.tree.flatten(leaves)
    if release:
        reference.to("meta")
    del tensors
    return jax.tree.unflatten(structure, [jax.device_put(np.asarray(leaves.pop(0))) for _ in range(len(leaves))])


def apply(llm: Decoder, variables, tokens, positions, segments, dtype=jnp.float32):
    """Logits of all positions."""
    return llm.apply(variables, llm.apply(variables, tokens, dtype, method="embed"), positions, segments)


def extend(llm: Decoder, variables, tokens, positions, segments, cache, further=False):
    """(logits of each row's last token, the longer cache)."""
    x = llm.apply(variables, tokens, jnp.float32, method="embed")
    return llm.apply(variables, x, positions, segments, cache, further, method="extend")


def logits_of(llm: Decoder, variables, tokens, positions=None, segments=None, dtype=jnp.float32) -> jax.Array:
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape) if positions is None else positions
    segments = np.ones_like(tokens) if segments is None else segments
    # The variables are an argument: as constants they would be compiled in.
    return jit(lambda v: apply(llm, v, tokens, positions, segments, dtype))(variables)


def random_tokens(llm: Decoder, *shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, llm.vocab_size, shape)


def case(size: str, *, full=False, **changes):
    marks = [pytest.mark.full] if full else []
    named = " ".join(f"{key.removeprefix('num_')}={value}" for key, value in changes.items())
    return pytest.param(Decoder(**LLM_SIZES[size] | changes), marks=marks, id=f"{size} {named or 'whole'}")


@pytest.mark.parametrize(
    ("size", "millions"),
    [("0.5b", 494.03), ("1.5b", 1543.71), ("7b", 7615.62), ("vicuna-7b", 6738.42), ("smollm2-135m", 134.52)],
)
def test_parameter_counts_are_the_published_ones(size, millions):
    shapes = shapes_of(Decoder(**LLM_SIZES[size]))
    assert round(sum(map(math.prod, shapes.values())) / 1e6, 2) == millions


QWEN2 = """{"architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
"eos_token_id": 151645, "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02, "intermediate_size": 4864,
"max_position_embeddings": 32768, "max_window_layers": 24, "model_type": "qwen2", "num_attention_heads": 14,
"num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
"sliding_window": 32768, "tie_word_embeddings": true, "torch_dtype": "bfloat16", "transformers_version": "4.40.1",
"use_cache": true, "use_sliding_window": false, "vocab_size": 151936}"""
QWEN2_7B = dict(hidden_size=3584, intermediate_size=18944, num_attention_heads=28, num_hidden_layers=28)
QWEN2_7B |= dict(num_key_value_heads=4, max_window_layers=28, tie_word_embeddings=False, vocab_size=152064)
VICUNA = """{"architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
"hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008, "max_position_embeddings": 4096,
"model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, "pad_token_id": 0, "pretraining_tp": 1,
"rms_norm_eps": 1e-05, "rope_scaling": null, "tie_word_embeddings": false, "torch_dtype": "float16",
"transformers_version": "4.31.0", "use_cache": true, "vocab_size": 32000}"""


@pytest.mark.parametrize(
    ("size", "published"),
    [
        ("0.5b", json.loads(QWEN2)),
        ("7b", json.loads(QWEN2) | QWEN2_7B),
        ("vicuna-7b", json.loads(VICUNA)),
    ],
)
def test_published_configs_and_those_of_transformers_are_read(tmp_path, size, published):
    """config.json as transformers 4 wrote it, as 5 writes it again, and ours by way of transformers."""
    llm = Decoder(**LLM_SIZES[size])
    transformers.AutoConfig.for_model(**published).save_pretrained(tmp_path / "5")
    ours = text_config(llm, bos_token_id=1, eos_token_id=2)
    transformers.AutoConfig.for_model(**ours).save_pretrained(tmp_path / "ours")
    for config in (
        published,
        json.loads((tmp_path / "5" / "config.json").read_text()),
        json.loads((tmp_path / "ours" / "config.json").read_text()),
        ours,
        {key: value for key, value in ours.items() if key != "rope_parameters"},  # what transformers 4 reads
    ):
        assert Decoder(**read_text_config("config.json", config)) == llm.clone(head_dim=llm.size_of_head)
    read = transformers.AutoConfig.from_pretrained(tmp_path / "5").to_dict()
    again = transformers.AutoConfig.from_pretrained(tmp_path / "ours").to_dict()
    for key in ("rope_parameters", "rms_norm_eps", "num_key_value_heads", "max_position_embeddings", "hidden_size"):
        assert read[key] == again[key], key


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(model_type="mistral"), "model_type is 'mistral', this package computes qwen2 or llama"),
        (dict(model_type=["qwen2"]), "model_type is ['qwen2']"),
        (dict(hidden_act="gelu"), "hidden_act is 'gelu', this package computes 'silu' only"),
        (dict(use_sliding_window=True), "use_sliding_window is True"),
        (dict(layer_types=["full_attention", "sliding_attention"]), "layer_types asks for other layers"),
        (dict(attention_bias=True), "attention_bias is True"),
        (dict(mlp_bias=True), "mlp_bias is True"),
        (dict(rope_scaling={"type": "linear", "factor": 2.0}), "rope_parameters.type is 'linear'"),
        (dict(rope_parameters={"rope_type": "yarn"}), "rope_parameters.rope_type is 'yarn'"),
        (dict(rope_parameters=3), "rope_parameters is 3, it must be an object"),
        (dict(rope_theta="1e6"), "rope_theta is '1e6', it must be a positive number"),
        (dict(rms_norm_eps=-1), "rms_norm_eps is -1, it must be a positive number"),
        (dict(hidden_size=None), "hidden_size is None, it must be a whole number"),
        (dict(vocab_size=10**12), "vocab_size is 1000000000000, it must be a whole number"),
        (dict(num_hidden_layers=10**6), "num_hidden_layers is 1000000, more than 1000"),
        (dict(num_attention_heads=True), "num_attention_heads is True"),
        (dict(num_key_value_heads=3), "num_attention_heads=14 must be a multiple of num_key_value_heads=3"),
        (dict(num_attention_heads=1000), "head_dim is None, it must be a whole number"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_configs_of_other_computations_are_refused_by_key(change, message):
    config = json.loads(QWEN2) | change
    with pytest.raises(ValueError, match=r"^DIR/config\.json: ") as error:
        read_text_config("DIR/config.json", config)
    assert message in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"^DIR/config\.json: text_config\."):
        read_text_config("DIR/config.json", config, {"text_config": config})


def test_an_end_mark_outside_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match=r"llm\.vocab_size=96 is too small for the tokenizer: eos_token_id is 96"):
        text_config(Decoder(**SMALL), bos_token_id=0, eos_token_id=96)


@pytest.mark.parametrize(
    "llm",
    [
        *(pytest.param(Decoder(**SMALL, **variant), id=name) for name, variant in VARIANTS.items()),
        # The full width of every size; memory and time allow few layers and a short vocabulary.
        case("smollm2-135m", num_layers=2, vocab_size=512),
        case("0.5b", num_layers=2, vocab_size=512),
        case("1.5b", num_layers=1, vocab_size=512),
        case("7b", num_layers=1, vocab_size=512),
        case("vicuna-7b", num_layers=1, vocab_size=512),
        case("smollm2-135m", full=True),
        case("0.5b", full=True),
        case("1.5b", full=True, num_layers=8),
        case("7b", full=True, num_layers=1),
        case("vicuna-7b", full=True, num_layers=4),
    ],
)
def test_logits_equal_transformers(llm):
    reference, tokens = reference_of(llm), random_tokens(llm, 2, 17)
    with torch.no_grad():
        theirs = reference(torch.from_numpy(tokens)).logits
    variables = variables_of(llm, reference, release=True)
    ours = logits_of(llm, variables, tokens)
    print(f"relative error {relative(ours, theirs):.1e}")
    assert relative(ours, theirs) <= 1e-5
    assert np.array_equal(ours.argmax(-1), theirs.argmax(-1))


def test_packed_and_padded_rows_equal_transformers():
    """Each segment sees itself alone: two in the first row, with padding behind; one in the second."""
    llm = Decoder(**SMALL)
    reference, tokens = reference_of(llm), random_tokens(llm, 2, 12)
    segments = np.array([[1] * 5 + [2] * 4 + [0] * 3, [1] * 12])
    positions = np.array([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 0, 0], list(range(12))])
    mask = (segments[:, :, None] == segments[:, None, :]) & np.tri(12, dtype=bool)
    with torch.no_grad():
        theirs = reference(
            input_ids=torch.from_numpy(tokens),
            attention_mask=torch.from_numpy(mask[:, None]),
            position_ids=torch.from_numpy(positions),
        ).logits
        alone = reference(torch.from_numpy(tokens[:1, 5:9])).logits
    ours = logits_of(llm, variables_of(llm, reference), tokens, positions, segments)
    assert relative(ours[segments > 0], theirs.numpy()[segments > 0]) <= 1e-5
    assert relative(ours[0, 5:9], alone[0]) <= 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_decoding_equals_transformers_full_forward(variant):
    """A prefill of 4 slots, then one token after the other, into a cache with free slots left."""
    llm = Decoder(**SMALL, **VARIANTS[variant])
    reference, tokens = reference_of(llm), random_tokens(llm, 2, 12)
    with torch.no_grad():
        theirs = reference(torch.from_numpy(tokens)).logits
    variables, cache, at, ours = variables_of(llm, reference), llm.empty_cache(2, 20), 0, []
    step = jit(lambda *args: extend(llm, *args))
    for size in (4, *[1] * 8):
        piece = tokens[:, at : at + size]
        positions = np.broadcast_to(np.arange(at, at + size), piece.shape)
        logits, cache = step(variables, piece, positions, np.ones_like(piece), cache)
        ours.append(logits)
        at += size
    assert int(cache.length) == 12
    assert relative(np.stack(ours, axis=1), theirs[:, 3:]) <= 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
def test_further_prompts_equal_transformers_full_forward(variant):
    """Turns of 4, 3, 1 and 2 tokens, each with padding that the next one overwrites; the last two again with others."""
    llm = Decoder(**SMALL, **VARIANTS[variant])
    reference, tokens = reference_of(llm), random_tokens(llm, 1, 10)
    other = np.concatenate([tokens[:, :7], random_tokens(llm, 1, 3, seed=1)], axis=1)
    with torch.no_grad():
        theirs, changed = (reference(torch.from_numpy(row)).logits for row in (tokens, other))
    variables, cache = variables_of(llm, reference), llm.empty_cache(1, 20)
    first, later = jit(lambda *args: extend(llm, *args)), jit(lambda *args: extend(llm, *args, True))

    def turn(row, start, stop, cache):
        piece, slots = np.full((1, 5), 3), np.arange(5) < stop - start
        piece[:, : stop - start] = row[:, start:stop]
        cache = cache.replace(length=jnp.int32(start), segment_ids=cache.segment_ids * (np.arange(20) < start))
        logits, cache = (later if start else first)(
            variables, piece, start + np.arange(5)[None], slots[None] * 1, cache
        )
        return logits, cache

    for row, reference_logits, start, stop in (
        (tokens, theirs, 0, 4),
        (tokens, theirs, 4, 7),
        (tokens, theirs, 7, 8),
        (tokens, theirs, 8, 10),
        (other, changed, 7, 10),
    ):
        logits, cache = turn(row, start, stop, cache)
        assert relative(logits, reference_logits[:, stop - 1]) <= 1e-5, (start, stop)


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_decoding_gives_the_tokens_of_transformers_generate(variant):
    """32 tokens, no end mark; the second prompt is shorter: padding stands behind it here, before it there."""
    llm, new = Decoder(**SMALL, **VARIANTS[variant]), 32
    reference, tokens, lengths = reference_of(llm, gain=10), random_tokens(llm, 2, 9, seed=2), np.array([9, 5])
    theirs = reference.generate(
        torch.from_numpy(np.stack([tokens[0], np.roll(tokens[1], 4)])),
        attention_mask=torch.tensor([[1] * 9, [0] * 4 + [1] * 5]),
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )[:, 9:]

    @jit
    def greedy(variables):
        slots = jnp.arange(9)[None] < lengths[:, None]
        positions = jnp.broadcast_to(jnp.arange(9), tokens.shape)
        logits, cache = extend(llm, variables, tokens, positions, slots.astype(int), llm.empty_cache(2, 9 + new))

        def step(carry, i):
            token, cache = carry
            positions = (lengths + i)[:, None]
            logits, cache = extend(llm, variables, token[:, None], positions, jnp.ones_like(positions), cache)
            return (logits.argmax(-1), cache), token

        return jax.lax.scan(step, (logits.argmax(-1), cache), jnp.arange(new))[1].T

    ours = np.asarray(greedy(variables_of(llm, reference)))
    assert min(len(set(row)) for row in ours) > 4  # not a few tokens for ever
    assert ours.tolist() == theirs.tolist()


def loss_of(logits, tokens):
    """Mean next-token cross-entropy."""
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_of_every_parameter_equal_transformers(variant):
    llm = Decoder(**SMALL, **VARIANTS[variant], remat="full" if variant == "untied" else "none")
    reference, tokens = reference_of(llm), random_tokens(llm, 2, 17)
    their_loss = reference(torch.from_numpy(tokens), labels=torch.from_numpy(tokens)).loss
    their_loss.backward()
    theirs = {name: p.grad for name, p in reference.named_parameters()}
    positions = np.broadcast_to(np.arange(17), tokens.shape)

    @jit
    @jax.value_and_grad
    def loss(variables):
        return loss_of(apply(llm, variables, tokens, positions, np.ones_like(tokens)), tokens)

    our_loss, gradients = loss(variables_of(llm, reference))
    np.testing.assert_allclose(our_loss, their_loss.item(), rtol=1e-5)
    ours = to_torch(decoder_rows(llm, "model.", "params"), gradients, shapes_of(llm))
    assert set(ours) == set(theirs)
    median = np.median([g.norm() for g in theirs.values()])
    errors = {n: np.linalg.norm(np.asarray(ours[n]) - g.numpy()) / max(g.norm(), median) for n, g in theirs.items()}
    worst = max(errors, key=errors.get)
    assert errors[worst] <= 1e-4, worst


def test_five_adamw_steps_equal_torch():
    """Another batch each step, warm-up and cosine, clipping, decay on matrices alone; the last loss shows them all."""
    llm, peak, decay, clip = Decoder(**SMALL, tie_embeddings=False), 1e-2, 0.1, 0.5
    reference = reference_of(llm).train()
    rates = [0.0, peak / 2, *(peak * (1 + math.cos(math.pi * i / 3)) / 2 for i in range(3))]
    batches = np.random.default_rng(1).integers(0, llm.vocab_size, (5, 2, 17))
    variables, positions = variables_of(llm, reference), np.broadcast_to(np.arange(17), (2, 17))

    matrices = [p for p in reference.parameters() if p.ndim == 2]
    vectors = [p for p in reference.parameters() if p.ndim == 1]
    adamw = torch.optim.AdamW([{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}])
    theirs = []
    for rate, tokens in zip(rates, torch.from_numpy(batches), strict=True):
        for group in adamw.param_groups:
            group["lr"] = rate
        adamw.zero_grad()
        loss = reference(tokens, labels=tokens).loss
        loss.backward()
        assert torch.nn.utils.clip_grad_norm_(reference.parameters(), clip) > clip
        adamw.step()
        theirs.append(loss.item())

    groups = ((".*", peak, decay),)
    optimizer = optim.make_optimizer(
        variables["params"], groups, optim.Course(5, 0.4), beta1=0.9, beta2=0.999, epsilon=1e-8, clip_norm=clip
    )

    @jit
    def step(params, state, tokens):
        def loss(params):
            variables = {"params": optim.merge(params, {})}
            return loss_of(apply(llm, variables, tokens, positions, jnp.ones_like(tokens)), tokens)

        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    params = optim.split(variables["params"], groups)[0]
    state, ours = optimizer.init(params), []
    for tokens in batches:
        params, state, loss = step(params, state, tokens)
        ours.append(float(loss))
    assert abs(theirs[4] - theirs[0]) > 0.1  # it moves
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    updated = to_torch(decoder_rows(llm, "model.", "params"), {"params": optim.merge(params, {})}, shapes_of(llm))
    for name, tensor in reference.state_dict().items():
        assert relative(updated[name], tensor) <= 1e-4, name


@pytest.mark.parametrize(
    "llm",
    [
        case("0.5b", num_layers=3, vocab_size=512),
        case("7b", num_layers=2, width=896, num_heads=7, num_kv_heads=1, mlp_dim=2048, vocab_size=512),
        case("smollm2-135m", full=True),
        case("0.5b", full=True, vocab_size=4096),
        case("1.5b", full=True, num_layers=4, vocab_size=4096),
    ],
)
def test_bfloat16_is_as_near_to_float32_as_torchs_bfloat16(llm):
    reference, tokens = reference_of(llm), random_tokens(llm, 2, 48)
    variables = variables_of(llm, reference)
    with torch.no_grad():
        exact = reference(torch.from_numpy(tokens)).logits
        theirs = relative(reference.to(torch.bfloat16)(torch.from_numpy(tokens)).logits.float(), exact)
    ours = relative(logits_of(llm, variables, tokens, dtype=jnp.bfloat16).astype(jnp.float32), exact)
    assert ours <= 1.25 * theirs
