"""A model with random weights and its page, served in a thread of this process."""

import jax
import pytest
from flax import linen as nn
from page_client import MAX_TOKENS, served
from small import ONE_STAGE, small_config

import fastvlm_jax
from fastvlm_jax import convert, model_io
from fastvlm_jax.chat.about import describe
from fastvlm_jax.chat.answering import Answering
from fastvlm_jax.models import fastvlm
from fastvlm_jax.processor import Processor
from fastvlm_jax.text.tokenizer import load_tokenizer

LINEAGE = {"stage": "little", "step": 3, "parent": {"stage": "less", "step": 1, "parent": None}}


@pytest.fixture(scope="session")
def folder(tmp_path_factory, sentencepiece_file):
    """A model directory. Its answers are long, and depend on every token and image before them."""
    folder = tmp_path_factory.mktemp("models") / "little"
    tokenizer = load_tokenizer(sentencepiece_file)
    config = small_config("", model__llm__vocab_size=tokenizer.vocab_size, **ONE_STAGE).model.to_dict()
    model = fastvlm.build(**config)
    variables = jax.jit(lambda: nn.unbox(fastvlm.init_variables(model, jax.random.key(3))))()
    layers = variables["params"]["llm"]["layers"]
    for name, factor in (("q", 5), ("k", 5), ("v", 3), ("o", 3)):
        layers[name]["kernel"] *= factor
    convert.write(folder, "native", variables, config, Processor(tokenizer, "chatml", 8, 4), LINEAGE)
    return folder


@pytest.fixture(scope="session")
def loaded(folder):
    """(model, variables, processor)."""
    return fastvlm_jax.load(folder, "float32")


@pytest.fixture(scope="session")
def address(folder, loaded):
    answering = Answering(*loaded, max_tokens=MAX_TOKENS)
    with served(answering, describe(model_io.read(folder), answering, 0.0)) as (address, _):
        yield address
