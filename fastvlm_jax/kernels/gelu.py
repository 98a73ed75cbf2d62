"""GELU, x * Phi(x): exact by erf, and by tanh for TPU kernels where the hardware has no erf."""

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
# Of Phi(x) = (1 + tanh(x (a + b x^2 + c x^4))) / 2, fitted to the exact GELU, with x^2 of at most 16.
A, B, C = 0.797506241, 0.0370073571, -0.000351304443


@jax.custom_vjp
def gelu(x: Array) -> Array:
    """Returns the exact GELU, x * (1 + erf(x / sqrt 2)) / 2, computed in float32, in the dtype of x.

    Uses erf, as PyTorch does: the erfc in `jax.nn.gelu` consists of two series and a select, which on TPU take a
    separate pass over x. The backward pass stores only x. Only first derivatives are supported.
    """
    x32 = x.astype(jnp.float32)
    return (x32 * phi(x32, True)).astype(x.dtype)


def _gelu_backward(x: Array, dy: Array) -> tuple[Array]:
    slope = value_and_slope(x.astype(jnp.float32), True)[1]
    return ((dy.astype(jnp.float32) * slope).astype(x.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


def phi(x: Array, exact: bool) -> Array:
    """Returns the normal distribution function of float32 x: by erf, or by tanh.

    By tanh GELU is within 2.6e-5 of the exact one. Rounded to bfloat16 it is at most one unit in the last place from
    it where it is at least 0.01 in size.
    """
    if exact:
        return 0.5 + 0.5 * jax.lax.erf(x * np.float32(0.5**0.5))
    square = jnp.minimum(x * x, 16.0)
    return 0.5 + 0.5 * jnp.tanh(x * (A + square * (B + square * C)))


def value_and_slope(x: Array, exact: bool) -> tuple[Array, Array]:
    """Returns (GELU, its derivative) of float32 x; `exact` as in `phi`."""
    share = phi(x, exact)
    return x * share, share + x * (jnp.exp(-0.5 * x * x) * np.float32((2 * np.pi) ** -0.5))
