"""Tests of models assembled from parts, and of weights read in slices."""

import json
import math
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from small import small_config

from fastvlm_jax import convert, model_io, optim, sharding
from fastvlm_jax.convert.mapping import LINEAR, Leaf
from fastvlm_jax.models import fastvlm, kinds
from fastvlm_jax.processor import Processor
from fastvlm_jax.stage import adapt
from fastvlm_jax.text.tokenizer import load_tokenizer, train_sentencepiece
from fastvlm_jax.train_state import state_of


class Recorded:
    """Holds a stored matrix and records the shape of each part that is read."""

    def __init__(self, array):
        self.array, self.asked = array, []

    def __getitem__(self, index):
        part = self.array[index]
        self.asked.append(part.shape)
        return part


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(config, model, its random variables, native folder of its tower, transformers folder of its language model)."""
    root = tmp_path_factory.mktemp("parts")
    config = small_config("unused", model__vision__batch_norm="frozen")
    config.model.llm.vocab_size = 320
    model, rng = fastvlm.build(**config.model.to_dict()), np.random.default_rng(0)
    variables = jax.tree.map(lambda x: rng.uniform(0.5, 1, x.shape).astype(np.float32), kinds.abstract_variables(model))
    train_sentencepiece(["what color is the shape?"], root / "tokenizer.model", 320)
    processor = Processor(load_tokenizer(root / "tokenizer.model"), "chatml", 0, 0)
    settings = config.model.to_dict()
    alone = {
        part: {name: {part: tree[part]} for name, tree in variables.items() if part in tree}
        for part in ("vision", "llm")
    }
    convert.write(root / "tower", "native", alone["vision"], {"vision": settings["vision"]}, None, {})
    convert.write(root / "lm", "hf", alone["llm"], {"llm": settings["llm"]}, processor, {}, dtype="bfloat16")
    return config, model, variables, root / "tower", root / "lm"


def state_from(config, model, source, mesh_shape):
    mesh = sharding.make_mesh(mesh_shape, jax.devices()[: math.prod(mesh_shape)])
    groups = ((".*", 1e-3, 0.0),)
    params = kinds.abstract_variables(model)["params"]
    optimizer = optim.make_optimizer(
        params, groups, optim.Course(4, 0.5), beta1=0.9, beta2=0.999, epsilon=1e-8, clip_norm=1.0
    )
    with jax.set_mesh(mesh):
        make_state, abstract = state_of(model, optimizer, groups, mesh)
        return make_state(jax.random.key(1), adapt(model_io.read(source), model)), abstract


@pytest.mark.parametrize("mesh_shape", [(1, 1, 1, 1), (1, 2, 2, 2)], ids=str)
def test_stage_starts_from_parts_and_initializes_the_projector(whole, mesh_shape):
    config, model, variables, tower, language_model = whole
    state, abstract = state_from(config, model, f"vision={tower},llm={language_model}", mesh_shape)
    for part in ("vision", "llm"):
        dtype = np.float32 if part == "vision" else ml_dtypes.bfloat16  # the stored dtype of each part
        expected = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype).astype(np.float32), variables["params"][part])
        jax.tree.map(np.testing.assert_array_equal, state.params[part], expected)
    jax.tree.map(np.testing.assert_array_equal, state.batch_stats["vision"], variables["batch_stats"]["vision"])
    kernel = state.params["projector"]["fc1"]["kernel"]
    assert kernel.shape == (64, 32) and 0.05 < np.std(kernel) < 0.2  # init_std 0.1 of the tiny model
    assert jax.tree.map(lambda x: x.sharding, state.params) == jax.tree.map(lambda x: x.sharding, abstract.params)


def test_stage_from_another_size_is_refused(whole):
    config, _, _, tower, language_model = whole
    other = config.copy_and_resolve_references()
    other.model.llm.mlp_dim = 128
    with pytest.raises(ValueError, match=r"\(key: config, parent\): model\.llm\.mlp_dim: 128, 64\. --config"):
        adapt(model_io.read(f"vision={tower},llm={language_model}"), fastvlm.build(**other.model.to_dict()))


@pytest.mark.parametrize(
    "source, message",
    [
        ("vision={lm}", "has no vision: it holds llm"),
        ("llm={tower}", "has no llm: it holds vision"),
        ("vision={tower},vision={tower}", "'vision={tower}' is not a part; write vision=DIR,llm=DIR"),
        ("vision={tower},{lm}", "'{lm}' is not a part; write vision=DIR,llm=DIR"),
        ("llm=/nowhere", "there is no model at /nowhere"),
        ("projector={lm}", "has no projector"),
    ],
)
def test_wrong_parts_are_named(whole, source, message):
    *_, tower, language_model = whole
    names = {"tower": tower, "lm": language_model}
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        model_io.read(source.format(**names))
    assert message.format(**names) in str(error.value) and "\n" not in str(error.value)


def test_each_device_reads_its_part_of_a_stored_matrix():
    """Stored as [O, I] = [48, 64], ours is [64, 48] in 8 shards of 8 rows: each reads 8 of the 64 stored columns."""
    stored = Recorded(np.random.default_rng(0).standard_normal((48, 64)).astype(ml_dtypes.bfloat16))
    leaf = Leaf((stored,), LINEAR, (64, 48), np.dtype(ml_dtypes.bfloat16), stacked=False)
    mesh = sharding.make_mesh((1, 1, 8, 1))
    placed = sharding.place(leaf, NamedSharding(mesh, P("fsdp")))
    assert stored.asked == [(48, 8)] * 8
    np.testing.assert_array_equal(placed, stored.array.T.astype(np.float32))


def test_each_device_reads_its_layers_of_a_stack():
    """Four stacked layers in two shards: a device does not read the layers of the other."""
    layers = tuple(Recorded(np.full((3, 5), i, np.float32)) for i in range(4))
    leaf = Leaf(layers, LINEAR, (4, 5, 3), np.dtype(np.float32), stacked=True)
    part = leaf[2:4, 1:3]
    assert [x.asked for x in layers] == [[], [], [(3, 2)], [(3, 2)]]
    np.testing.assert_array_equal(part, np.stack([np.full((2, 3), i, np.float32) for i in (2, 3)]))


def test_what_an_earlier_run_recomputed_is_not_of_the_model(whole, tmp_path):
    """Older runs stored true or false under `remat`, which now holds the name of a policy."""
    shutil.copytree(whole[3], tmp_path / "tower")
    file = tmp_path / "tower/config.json"
    settings = json.loads(file.read_text())
    settings["model"]["vision"]["remat"] = True
    file.write_text(json.dumps(settings))
    model, _, _ = model_io.load(tmp_path / "tower")
    assert "remat" not in model.vision_args
