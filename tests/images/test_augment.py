import math

import numpy as np
import PIL.Image
import pytest
import torch
import torch_reference  # noqa: F401 (makes torchvision importable)
import torchvision.transforms as T
from pictures import photo
from torchvision.transforms import functional as F
from torchvision.transforms.autoaugment import _apply_op

from fastvlm_jax.images.augment import (
    Crop,
    at_side,
    augment_into,
    read_params,
    sample,
    sample_crop,
    sample_ops,
    uniform,
)
from fastvlm_jax.images.operations import OPS, apply

BICUBIC = T.InterpolationMode.BICUBIC
NEAREST = T.InterpolationMode.NEAREST


def augment(image, size, crop, ops=(), exact=True):
    out = np.full((size, size, 3), 77, np.uint8)
    augment_into(image, out, crop, ops, exact)
    return out


def philox(key, counter):
    """Computes Philox4x64-10 (Salmon et al. 2011) in plain integers."""
    mask, (a, b, c, d), (k, m) = 2**64 - 1, counter, key
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * a, 0xCA5A826395121157 * c
        a, b, c, d = (second >> 64) ^ b ^ k, second & mask, (first >> 64) ^ d ^ m, first & mask
        k, m = (k + 0x9E3779B97F4A7C15) & mask, (m + 0xBB67AE8584CAA73B) & mask
    return a, b, c, d


def test_the_reference_philox_gives_the_published_words():
    words = (0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B)  # Random123's kat_vectors
    assert philox((0, 0), (0, 0, 0, 0)) == words


@pytest.mark.parametrize("seed, epoch, record", [(0, 0, 0), (7, 3, 12_345_678_901), (2**64 - 1, 1, 2**64 - 1)])
def test_random_numbers_are_philox_words(seed, epoch, record):
    # NumPy increments the counter before the first words.
    words = [*philox((seed, epoch), (1, record, 0, 0)), *philox((seed, epoch), (2, record, 0, 0))]
    expected = [(word >> 11) / 2**53 for word in words]
    assert uniform(seed, epoch, record, 8).tolist() == expected


def test_numbers_out_of_range_are_refused():
    for numbers in ((-1, 0, 0), (0, 2**64, 0), (0, 0, -5)):
        with pytest.raises(ValueError, match=r"must be 0 to 2\^64 - 1"):
            uniform(*numbers, 4)


def test_parameters_depend_on_seed_epoch_and_record_alone():
    first = sample(1, 2, 3, (480, 640), (224, 224))
    assert first == sample(1, 2, 3, (480, 640), (224, 224))
    others = [sample(*numbers, (480, 640), (224, 224)) for numbers in ((2, 2, 3), (1, 3, 3), (1, 2, 4), (2, 1, 3))]
    assert len({first, *others}) == 5
    # Fixed values: stored parameters have to replay in every later version.
    assert first == (Crop(53, 341, 272, 233), (("AutoContrast", 0.0), ("Contrast", -0.27)))


def test_crop_takes_the_first_that_fits():
    numbers = np.zeros(40)
    numbers[:8] = [1.0, 1.0, 0, 0, 0.5, 0.5, 0.5, 0.99]  # the whole area at 4/3 does not fit a square; 0.54 at 1/1 does
    assert sample_crop(numbers, (100, 100)) == Crop(14, 27, 73, 73)
    assert sample_crop(np.zeros(40), (100, 100)) == Crop(0, 0, 33, 24)  # 0.08 at 3/4


@pytest.mark.parametrize("height, width", [(400, 1), (1, 400), (3, 1000), (1, 1), (2000, 20)])
def test_crop_falls_back_as_torchvision_does(height, width):
    numbers = np.full(40, 1 - 1e-9)  # the whole area at the largest aspect
    theirs = {T.RandomResizedCrop.get_params(torch.empty(3, height, width), [1, 1], [3 / 4, 4 / 3]) for _ in range(20)}
    assert sample_crop(numbers, (height, width), scale=(1, 1)) in theirs


@pytest.mark.parametrize("height, width", [(480, 640), (640, 333), (90, 500)])
def test_crops_are_distributed_as_torchvisions(height, width):
    torch.manual_seed(0)
    image, count = torch.empty(1, height, width), 4000
    theirs = np.array([T.RandomResizedCrop.get_params(image, (0.08, 1), (3 / 4, 4 / 3)) for _ in range(count)])
    ours = np.array([sample(0, 0, record, (height, width), (9, 9))[0] for record in range(count)])
    inside = ours[:, :2] + ours[:, 2:]
    assert (ours[:, :2] >= 0).all() and (inside <= (height, width)).all() and inside.max(0).tolist() == [height, width]
    for one, two in zip(measures(ours), measures(theirs), strict=True):
        assert kolmogorov_smirnov(one, two) < 1.95 * math.sqrt(2 / count)  # p = 0.001


def measures(crops):
    top, left, height, width = crops.T.astype(float)
    return height * width, width / height, top, left


def kolmogorov_smirnov(one, two):
    both = np.sort(np.concatenate([one, two]))
    ranks = [np.searchsorted(np.sort(some), both, side="right") / len(some) for some in (one, two)]
    return abs(ranks[0] - ranks[1]).max()


@pytest.mark.parametrize("height, width", [(224, 224), (100, 333)])
def test_magnitudes_equal_torchvisions(height, width):
    seen = {}
    for which in range(len(OPS)):
        for sign in (0.2, 0.8):
            for magnitude in range(31):
                numbers = np.array([(which + 0.5) / len(OPS), sign])
                ((name, value),) = sample_ops(numbers, (height, width), 1, magnitude)
                magnitudes, signed = T.RandAugment()._augmentation_space(31, (height, width))[name]
                expected = float(magnitudes[magnitude]) if magnitudes.ndim else 0.0
                expected *= -1 if signed and sign > 0.5 else 1
                assert value == pytest.approx(expected, rel=1e-6, abs=1e-5)
                if name.startswith("Translate"):
                    assert int(value) == int(expected)
                seen[name] = True
    assert tuple(seen) == OPS == tuple(T.RandAugment()._augmentation_space(31, (height, width)))


def test_operations_are_drawn_evenly():
    names = [name for record in range(2800) for name, _ in sample(5, 0, record, (60, 60), (32, 32), 2)[1]]
    counts = np.array([names.count(name) for name in OPS])
    assert len(names) == 5600 and (abs(counts - 400) < 5 * 20).all()
    with pytest.raises(ValueError, match="magnitude of RandAugment must be 0 to 30, not 31"):
        sample_ops(np.zeros(4), (9, 9), 2, 31)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("size", [224, 61])
def test_operations_equal_torchvisions(name, size):
    image = photo(size, size)
    for magnitude in (0.0, 0.09, -0.09, 0.27, -0.27, 0.9, 2.0, 4.0, 8.0, 9.0, -9.0, 30.0, 67.3, -67.3, 178.5, 255.0):
        if name == "Posterize" and not 1 <= magnitude <= 8:
            continue
        theirs = _apply_op(PIL.Image.fromarray(image), name, magnitude, NEAREST, None)
        np.testing.assert_array_equal(augment(image, size, None, [(name, magnitude)]), np.asarray(theirs))


def test_operations_equal_torchvisions_on_odd_pictures():
    rng = np.random.default_rng(0)
    for height, width in rng.integers(1, 40, (400, 2)).tolist():
        low = rng.integers(0, 256)
        image = rng.integers(low, rng.integers(low, 256) + 1, (height, width, 3), np.uint8)
        image[..., rng.integers(3)] //= np.uint8(rng.integers(1, 256))
        name, share = OPS[rng.integers(len(OPS))], rng.uniform(-1, 1)
        most = {"Rotate": 180, "Solarize": 256, "Posterize": 8, "TranslateX": 60, "TranslateY": 60}.get(name, 1)
        magnitude = max(1.0, abs(share) * 8) if name == "Posterize" else share * most
        theirs = _apply_op(PIL.Image.fromarray(image), name, magnitude, NEAREST, None)
        shown = f"{name} {magnitude} of {image.shape}"
        np.testing.assert_array_equal(apply(image, name, magnitude), np.asarray(theirs), shown)


@pytest.mark.parametrize("slope", [1777 / 131072, 5477 / 131072])  # halves of the steps in which Pillow counts
def test_the_last_bit_of_a_shear_is_torchvisions(slope):
    image = photo(224, 224)
    theirs = _apply_op(PIL.Image.fromarray(image), "ShearY", slope, NEAREST, None)
    np.testing.assert_array_equal(apply(image, "ShearY", slope), np.asarray(theirs))


@pytest.mark.parametrize("height, width", [(1, 9), (2, 3), (3, 3), (3, 9)])
def test_the_border_is_not_sharpened(height, width):
    image = photo(height, width)
    theirs = _apply_op(PIL.Image.fromarray(image), "Sharpness", 0.9, NEAREST, None)
    np.testing.assert_array_equal(apply(image, "Sharpness", 0.9), np.asarray(theirs))


def test_stored_parameters_replay_the_teachers_pixels():
    image = photo(300, 400)
    entry = [[20, 31, 200, 150], [[1, -0.09], [11, 178.5]]]  # as in paug.json: ShearX, Solarize
    crop, ops = read_params(entry)
    assert crop == Crop(top=20, left=31, height=200, width=150) and ops == (("ShearX", -0.09), ("Solarize", 178.5))
    theirs = F.resized_crop(PIL.Image.fromarray(image), 20, 31, 200, 150, [224, 224], BICUBIC)
    for name, magnitude in (("ShearX", -0.09), ("Solarize", 178.5)):
        theirs = _apply_op(theirs, name, magnitude, NEAREST, None)
    np.testing.assert_array_equal(augment(image, 224, crop, ops), np.asarray(theirs))
    fast = augment(image, 224, crop, exact=False).astype(int)
    assert abs(fast - augment(image, 224, crop)).mean() < 3


@pytest.mark.parametrize("record", range(12))
def test_sampled_parameters_give_torchvisions_pixels(record):
    image = photo(120, 190, record)
    crop, ops = sample(3, 1, record, (120, 190), (96, 96))
    theirs = F.resized_crop(PIL.Image.fromarray(image), *crop, [96, 96], BICUBIC)
    for name, magnitude in ops:
        theirs = _apply_op(theirs, name, magnitude, NEAREST, None)
    np.testing.assert_array_equal(augment(image, 96, crop, ops), np.asarray(theirs))


def test_parameters_that_were_not_applied_are_null():
    assert read_params([None, None]) == (None, ())
    assert read_params([[0, 0, 5, 5], None]) == (Crop(0, 0, 5, 5), ())
    np.testing.assert_array_equal(augment(photo(40, 40), 40, None), photo(40, 40))


ODD = [
    *(None, [], [[0, 0, 5, 5]], {}, "ab", 7, [True, []], [[], []], [None, 5]),
    *([crop, []] for crop in ([0, 0, 5], [0, 0, 5, 5, 5], [0.5, 0, 5, 5], [True, 0, 5, 5])),
    *([None, [op]] for op in ([1], [99, 0.0], [-1, 0.0], ["ShearX", 0.0], [1.5, 0.1], [1, "x"], [10, 9.0], [10, 0.5])),
    *([None, [[1, number]]] for number in (math.nan, math.inf, 1e300, 10**400, None)),
    [None, [[0, 0.0]] * 101],
]


@pytest.mark.parametrize("entry", ODD)
def test_odd_parameters_are_refused(entry):
    with pytest.raises(ValueError, match="param_aug must be") as caught:
        read_params(entry)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


@pytest.mark.parametrize("crop", [(0, 0, 41, 9), (0, 35, 9, 9), (-1, 0, 9, 9), (0, 0, 0, 9), (5, 5, -3, 9)])
def test_a_crop_outside_the_image_is_refused(crop):
    with pytest.raises(ValueError, match="is not inside the image of 40 x 40: was it resized"):
        augment(photo(40, 40), 16, Crop(*crop))


def test_shifts_drawn_for_224_px_shrink_with_a_smaller_view_and_do_not_grow():
    ops = (("TranslateX", 30.0), ("Rotate", 9.0), ("TranslateY", -28.0))
    assert at_side(ops, 112) == (("TranslateX", 15.0), ("Rotate", 9.0), ("TranslateY", -14.0))
    assert at_side(ops, 224) == at_side(ops, 256) == ops
