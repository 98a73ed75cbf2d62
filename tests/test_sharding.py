import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec as P
from small import small_config

from fastvlm_jax import sharding
from fastvlm_jax.models import fastvlm


def test_an_unknown_logical_axis_raises():
    with pytest.raises(KeyError, match="embedd"):
        sharding.sharded(nn.initializers.ones, ("embedd", None))


def test_minus_one_takes_the_devices_that_are_left():
    assert dict(sharding.make_mesh((1, -1, 2, 1)).shape) == {"replica": 1, "data": 4, "fsdp": 2, "tensor": 1}


@pytest.mark.parametrize("sizes", [(1, 3, 1, 1), (1, -1, 3, 1), (-1, -1, 1, 1), (1, 8, 1), (0, 8, 1, 1)], ids=str)
def test_a_mesh_that_does_not_multiply_out_is_refused(sizes):
    with pytest.raises(ValueError, match="mesh="):
        sharding.make_mesh(sizes)


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="tensor axis of 4 does not divide 2 key-value heads"):
        sharding.check_mesh(sharding.make_mesh((1, 2, 1, 4)), groups=8, num_kv_heads=2)


def test_parameters_follow_their_logical_axes_and_large_kernels_shard_over_fsdp(monkeypatch):
    monkeypatch.setattr(sharding, "MIN_SHARDED_ELEMENTS", 4096)
    model = fastvlm.build(**small_config("").model.to_dict())
    abstract = jax.eval_shape(lambda: fastvlm.init_variables(model, jax.random.key(0)))
    found = sharding.shardings_of(abstract, sharding.make_mesh((1, 2, 2, 2)))["params"]
    assert found["llm"]["layers"]["q"]["kernel"].spec == P(None, "fsdp", "tensor")
    assert found["llm"]["layers"]["down"]["kernel"].spec == P(None, "tensor", "fsdp")
    assert found["llm"]["embedding"].spec == P(("tensor", "fsdp"), None)
    assert found["vision"]["stage_1"]["ffn"]["fc1"]["kernel"].spec == P(None, None, "fsdp")
    assert found["vision"]["stem_0"]["conv"]["kernel"].spec == P()


def test_what_has_lost_a_parameters_shape_does_not_follow_its_axes(monkeypatch):
    """As the rows, the columns and the placeholders of Adafactor, which a box of the whole parameter holds."""
    monkeypatch.setattr(sharding, "MIN_SHARDED_ELEMENTS", 64)
    shapes = {"whole": (128, 64), "row": (128,), "small": (6,), "placeholder": (1,), "layers": (3, 64)}
    boxed = {
        name: nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.float32), ("vocab", None))
        for name, shape in shapes.items()
    }
    boxed["vector"] = nn.LogicallyPartitioned(boxed["placeholder"].value, ("vocab",))
    boxed["layers"] = boxed["layers"].replace(names=(None, "vocab", None))
    found = sharding.shardings_of(boxed, sharding.make_mesh((1, 2, 2, 2)))
    assert {name: found[name].spec for name in found} == {
        "whole": P(("tensor", "fsdp"), None), "row": P("fsdp"), "small": P(), "placeholder": P(), "vector": P(),
        "layers": P(None, "fsdp"),
    }  # fmt: skip


def test_a_dimension_that_does_not_divide_names_the_parameter():
    args = small_config("").model.to_dict()
    args["llm"]["vocab_size"] = 511
    abstract = jax.eval_shape(lambda: fastvlm.init_variables(fastvlm.build(**args), jax.random.key(0)))
    with pytest.raises(
        ValueError, match="params/llm/embedding: the mesh splits 'vocab' in 4, which does not divide 511"
    ):
        sharding.shardings_of(abstract, sharding.make_mesh((1, 2, 2, 2)))


def test_constrain_acts_inside_a_mesh_and_is_the_identity_outside():
    x = jnp.arange(16.0).reshape(8, 2)
    assert sharding.constrain(x, ("batch", None)) is x
    with jax.set_mesh(sharding.make_mesh((1, 8, 1, 1))):
        y = jax.jit(lambda x: sharding.constrain(x, ("batch", None)))(x)
    assert y.addressable_shards[0].data.shape == (1, 2)
    np.testing.assert_array_equal(x, y)
