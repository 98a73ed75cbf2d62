"""Softmax and sigmoid losses in blocks against open_clip's, and DataCompDR's loss written plainly in PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastvlm_jax import sharding
from fastvlm_jax.kernels import contrastive, sigmoid_loss
from fastvlm_jax.kernels.contrastive import Teachers

torch = pytest.importorskip("torch")
import torch_reference  # noqa: F401, E402  makes torchvision importable, which open_clip imports
from open_clip.loss import ClipLoss, SigLipLoss  # noqa: E402

B, D = 24, 20
WIDTHS, SCALES, SCALE = (6, 9), (70.0, 60.0), 14.0
HARD, SOFT = 0.3, 0.7
# (mesh or None, ring, columns of a block): blocks that divide the texts of a device, and blocks that do not.
FORMS = [
    *((None, False, 0), (None, True, 5), ((1, 1, 1, 1), False, 24)),
    *(((1, 2, 1, 1), False, 5), ((1, 2, 1, 1), True, 5), ((1, 2, 2, 2), False, 6), ((1, 2, 2, 2), True, 4)),
    *(((2, 2, 2, 1), False, 7), ((2, 2, 2, 1), True, 2), ((2, 2, 2, 1), True, 1)),
]


def unit(rng, *shape):
    x = rng.standard_normal(shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def features():
    """Images, texts, and those of two teachers one behind the other."""
    rng = np.random.default_rng(0)
    teachers = (np.concatenate([unit(rng, B, width) for width in WIDTHS], 1) for _ in range(2))
    return unit(rng, B, D), unit(rng, B, D), *teachers


def on_mesh(sizes, function, *arguments):
    if sizes is None:
        return jax.jit(function)(*arguments)
    with jax.set_mesh(sharding.make_mesh(sizes, jax.devices()[: np.prod(sizes)])):
        return jax.tree.map(np.asarray, jax.jit(function)(*arguments))


def with_gradients(loss, *arrays):
    """PyTorch's loss and the gradients of the arrays, as NumPy arrays in their dtype."""
    tensors = [torch.tensor(x, requires_grad=True) for x in arrays]
    value = loss(*tensors)
    return [value.detach().numpy(), *(x.numpy() for x in torch.autograd.grad(value, tensors))]


def assert_close(got, expected, dtype):
    for x, y in zip(got, expected, strict=True):
        assert x.dtype == dtype
        np.testing.assert_allclose(x, y, rtol=0, atol=(1e-6 if dtype == np.float64 else 1e-5) * np.abs(y).max())


def distillation(images, texts, scale, taught):
    """DataCompDR's term: cross-entropy with the mean of the teachers' probabilities, both directions."""
    value = 0
    for x, y, side in ((images, texts, 0), (texts, images, 1)):
        probabilities = []
        for k, start in enumerate((0, WIDTHS[0])):
            ours, theirs = (t[:, start : start + WIDTHS[k]] for t in (taught[side], taught[1 - side]))
            probabilities.append((SCALES[k] * ours @ theirs.T).softmax(1))
        target = torch.stack(probabilities).mean(0)
        value -= (target * (scale * x @ y.T).log_softmax(1)).sum(1).mean() / 2
    return value


def both(images, texts, scale, teachers, block, ring):
    losses = contrastive.blocked(images, texts, scale, teachers, WIDTHS, SCALES, block, ring)
    return HARD * losses.hard + SOFT * losses.soft


@pytest.mark.parametrize("sizes, ring, block", FORMS, ids=str)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_clip_and_distillation_and_their_gradients_are_open_clips_and_pytorchs(features, sizes, ring, block, dtype):
    images, texts, *taught = (np.asarray(x, dtype) for x in features)
    scale = np.asarray(SCALE, dtype)

    def loss(images, texts, scale):
        clip = ClipLoss()(images, texts, scale)
        return HARD * clip + SOFT * distillation(images, texts, scale, [torch.tensor(x) for x in taught])

    expected = with_gradients(loss, images, texts, scale)
    with jax.enable_x64(dtype == np.float64):
        gradients = jax.value_and_grad(both, argnums=(0, 1, 2))
        value, found = on_mesh(sizes, lambda *x: gradients(*x, block, ring), images, texts, scale, Teachers(*taught))
    assert_close([value, *found], expected, dtype)


@pytest.mark.parametrize("sizes, ring, block", FORMS[3:7], ids=str)
def test_without_teachers_the_loss_is_open_clips(features, sizes, ring, block):
    images, texts, scale = (np.asarray(x, np.float32) for x in (*features[:2], SCALE))
    expected = with_gradients(ClipLoss(), images, texts, scale)

    def loss(*arrays):
        losses = contrastive.blocked(*arrays, block=block, ring=ring)
        return losses.hard + losses.soft  # which is 0

    value, found = on_mesh(sizes, jax.value_and_grad(loss, argnums=(0, 1, 2)), images, texts, scale)
    assert_close([value, *found], expected, np.float32)


@pytest.mark.parametrize("sizes, ring, block", FORMS[2:], ids=str)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_sigmoid_and_its_gradients_are_open_clips(features, sizes, ring, block, dtype):
    arrays = [np.asarray(x, dtype) for x in (*features[:2], SCALE, -3.0)]
    with jax.enable_x64(dtype == np.float64):
        gradients = jax.value_and_grad(sigmoid_loss.blocked, argnums=(0, 1, 2, 3))
        value, found = on_mesh(sizes, lambda *x: gradients(*x, block, ring), *arrays)
    assert_close([value, *found], with_gradients(SigLipLoss(), *arrays), dtype)


@pytest.mark.parametrize("sizes, ring, block", FORMS[3:7], ids=str)
def test_shares_found_and_the_teachers_entropy_are_those_of_whole_matrices(features, sizes, ring, block):
    images, texts, *taught = (np.asarray(x, np.float32) for x in features)
    images = (images + texts) / np.linalg.norm(images + texts, axis=1, keepdims=True)  # some find their partner

    def outputs(images, texts, scale, teachers):
        losses = contrastive.blocked(images, texts, scale, teachers, WIDTHS, SCALES, block, ring)
        return losses.found, contrastive.teacher_entropy(teachers, WIDTHS, SCALES, block, ring)

    found, entropy = on_mesh(sizes, outputs, images, texts, np.float32(SCALE), Teachers(*taught))
    best = images @ texts.T
    expected = [np.mean(np.argmax(best, axis) == np.arange(B)) for axis in (1, 0)]
    assert all(0 < x < 1 for x in expected)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    total = 0
    for x, y in (taught, taught[::-1]):
        x, y = torch.tensor(x), torch.tensor(y)
        first, second = ((c * x[:, i:j] @ y[:, i:j].T).softmax(1) for c, i, j in ((70, 0, 6), (60, 6, 15)))
        total += torch.distributions.Categorical((first + second) / 2).entropy().mean() / 2
    np.testing.assert_allclose(entropy, total, rtol=1e-5)


def test_the_plain_forms_are_the_same_losses(features):
    images, texts, *taught = (np.asarray(x, np.float32) for x in features)
    losses = contrastive.plain(images, texts, SCALE, Teachers(*taught), WIDTHS, SCALES)
    expected = distillation(*map(torch.tensor, (images, texts, SCALE)), [torch.tensor(x) for x in taught])
    np.testing.assert_allclose(losses.soft, expected, rtol=1e-5)
    expected = ClipLoss()(*map(torch.tensor, (images, texts, SCALE)))
    np.testing.assert_allclose(losses.hard, expected, rtol=1e-5)
    arguments = (images, texts, np.float32(SCALE), np.float32(-3))
    expected = SigLipLoss()(*map(torch.tensor, arguments))
    np.testing.assert_allclose(sigmoid_loss.plain(*arguments), expected, rtol=1e-5)


def test_features_in_bfloat16_give_logits_in_float32(features):
    images, texts = (jnp.asarray(x, jnp.bfloat16) for x in features[:2])
    got = contrastive.blocked(images, texts, jnp.float32(100), block=7).hard
    expected = contrastive.plain(images.astype(jnp.float32), texts.astype(jnp.float32), 100.0).hard
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_teachers_of_other_widths_and_a_scale_that_is_missing_are_refused(features):
    images, texts, *taught = features
    arguments = (images, texts, SCALE, Teachers(*taught))
    with pytest.raises(
        ValueError, match=r"^teachers of widths \(6, 8\) have features of 14, those given have 15 and 15: "
    ):
        contrastive.blocked(*arguments, (6, 8), SCALES)
    with pytest.raises(
        ValueError, match=r"^teachers of widths \(6, 9\) and scales \(70.0,\): give one width and one scale"
    ):
        contrastive.blocked(*arguments, WIDTHS, SCALES[:1])
