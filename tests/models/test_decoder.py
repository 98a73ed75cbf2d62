"""The decoder's rotary embeddings and cache, against complex numbers and loops; parity/ compares whole decoders."""

import numpy as np
import pytest

from fastvlm_jax.models.decoder import rotary, written


@pytest.mark.parametrize("whole", [False, True])
def test_a_pair_of_a_head_is_turned_as_a_complex_number(whole):
    """Element e of the first half and of the second are a complex number, turned by position x theta^(-2e / E)."""
    rng = np.random.default_rng(0)
    x, positions = rng.standard_normal((2, 5, 3, 8), np.float32), np.array([[0, 1, 2, 3, 4], [7, 0, 90, 5, 1000]])
    turns = np.exp(1j * positions[:, :, None, None] * 100.0 ** (-np.arange(0, 8, 2) / 8))
    turned = (x[..., :4] + 1j * x[..., 4:]) * turns
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    np.testing.assert_allclose(rotary(x, positions, 100.0, whole), expected, rtol=1e-3, atol=2e-4)


def test_a_cache_holds_a_prompt_from_slot_0_on_and_a_further_token_at_its_slot():
    rng = np.random.default_rng(0)
    before, prompt, token = (
        rng.standard_normal(shape, np.float32) for shape in ((2, 3, 4, 6), (2, 5, 3, 4), (2, 1, 3, 4))
    )
    whole, more = np.zeros_like(before), before.copy()
    for b, t, k, e in np.ndindex(prompt.shape):
        whole[b, k, e, t] = prompt[b, t, k, e]
    for b, _, k, e in np.ndindex(token.shape):
        more[b, k, e, 3] = token[b, 0, k, e]
    np.testing.assert_array_equal(written(np.zeros_like(before), prompt, 0), whole)
    np.testing.assert_array_equal(written(before, token, 3), more)
