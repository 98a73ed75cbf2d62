import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tensorstore
from jax.sharding import NamedSharding, PartitionSpec

from fastvlm_jax.checkpoint import digest

ARRAYS = {
    "float32": np.random.default_rng(0).standard_normal((8, 8, 5)).astype(np.float32),
    "bfloat16": np.random.default_rng(1).standard_normal((24, 7)).astype(ml_dtypes.bfloat16),
    "int32": np.random.default_rng(2).integers(-(2**31), 2**31, 40, np.int32),
    "bool": np.random.default_rng(3).random((16, 3)) < 0.5,
    "scalar": np.float32(3.5),
    "empty": np.zeros((0, 4), np.float32),
}


def by_hand(x):
    """The digest as the module's text defines it, element by element in Python's whole numbers."""
    x, first, second = np.asarray(x), 0, 0
    for position, element in enumerate(x.reshape(-1)):
        word = int.from_bytes(element.tobytes(), "little") ^ position * 0x9E3779B1 % 2**32
        word = (word ^ word >> 16) * 0x85EBCA6B % 2**32
        first += word
        word = (word ^ word >> 13) * 0xC2B2AE35 % 2**32
        second += word ^ word >> 16
    return f"{x.dtype}[{','.join(map(str, x.shape))}] {first % 2**32:08x}{second % 2**32:08x}"


def stored(x, chunk=None):
    """The array in memory as TensorStore holds it, in chunks of the shape `chunk`."""
    spec = {"driver": "zarr3", "kvstore": "memory://"}
    layout = tensorstore.ChunkLayout(chunk_shape=chunk) if chunk else None
    array = tensorstore.open(spec, create=True, dtype=x.dtype, shape=x.shape, chunk_layout=layout).result()
    array[...] = x
    return array


def digest_of(x):
    return digest.of_tree({"x": x})[0]["x"]


@pytest.fixture(params=["host", "device"], autouse=True)
def place(request, monkeypatch):
    """Where small arrays are added up: of its own accord a host does it."""
    monkeypatch.setattr(digest, "SMALL", 2**20 if request.param == "host" else -1)
    return request.param


@pytest.mark.parametrize("name", ARRAYS)
def test_digest_of_a_state_and_of_files_is_the_one_by_hand(name):
    assert digest_of(jnp.asarray(ARRAYS[name])) == digest.of_stored(stored(ARRAYS[name])) == by_hand(ARRAYS[name])


def test_digest_of_the_example():
    assert digest_of(jnp.array([1.0, 2.0])) == "float32[2] b8aa4b82d5b681b5"


@pytest.mark.parametrize("spec", [(), ("a",), (None, "b"), ("b", "a"), (("a", "b"),)])
def test_digest_is_the_same_on_every_mesh(spec):
    x = ARRAYS["float32"]
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    assert digest_of(jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))) == by_hand(x)


@pytest.mark.parametrize("chunk", [(8, 8, 5), (1, 8, 5), (3, 4, 2)])
def test_digest_is_the_same_for_every_way_of_storing(monkeypatch, chunk):
    monkeypatch.setattr(digest.blocks, "__defaults__", (7,))
    monkeypatch.setattr(digest, "PIECE", 3)
    assert digest.of_stored(stored(ARRAYS["float32"], chunk)) == by_hand(ARRAYS["float32"])


@pytest.mark.parametrize("limit", [1, 4, 7, 30, 1000])
def test_blocks_hold_every_element_once_and_in_order(limit):
    x = np.arange(3 * 5 * 4).reshape(3, 5, 4)
    found = [(first, x[block].reshape(-1)) for first, block in digest.blocks(x.shape, limit)]
    assert [first for first, _ in found] == [part[0] for _, part in found]
    assert np.concatenate([part for _, part in found]).tolist() == list(range(60))
    assert max(len(part) for _, part in found) <= max(limit, 1)


def test_every_flipped_bit_and_every_exchange_is_noticed():
    x = ARRAYS["float32"].reshape(-1)
    found = {digest_of(jnp.asarray(x))}
    for bit in range(0, 32 * len(x), 37):
        flipped = x.copy()
        flipped.view(np.uint32)[bit // 32] ^= np.uint32(1 << bit % 32)
        found.add(digest_of(jnp.asarray(flipped)))
    for i in range(1, len(x), 17):
        exchanged = x.copy()
        exchanged[[0, i]] = exchanged[[i, 0]]
        found.add(digest_of(jnp.asarray(exchanged)))
    assert len(found) == 1 + len(range(0, 32 * len(x), 37)) + len(range(1, len(x), 17))


def test_arrays_that_are_not_finite_are_named():
    tree = {"a": jnp.array([1.0, jnp.inf]), "b": {"c": jnp.array(jnp.nan), "d": jnp.arange(3)}, "e": jnp.ones(2)}
    assert digest.of_tree(tree)[1] == ["a", "b.c"]
