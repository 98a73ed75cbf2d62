"""The page of config keys: made from config.py, complete, and up to date."""

from paths import ROOT

from fastvlm_jax.config import get_base
from fastvlm_jax.models.sizes import VISION_SIZES
from fastvlm_jax.report import config_keys


def test_docs_hold_the_page_of_today():
    assert (ROOT / "docs/config.md").read_text() == config_keys.page()


def test_comments_beside_and_above_an_assignment_are_its_meaning():
    found = config_keys.meanings()
    assert found["seed"] == "seed of the initial weights, the data order and the randomness of the steps"
    assert found["data.prefetch"] == "batches built ahead"
    assert found["groups"].startswith("Parameter groups, as (path regex, peak learning rate, weight decay): the first")
    assert found["groups"].endswith("Every parameter must match.")


def test_every_key_of_every_encoder_has_its_row():
    page = config_keys.page()
    for vision in VISION_SIZES:
        for key, _ in config_keys.keys(get_base(f"0.5b,{vision}").to_dict()):
            assert f"| `{key}` |" in page, (vision, key)


def test_a_docstrings_attributes_are_meanings_one_by_one():
    class Sized:
        """Has sizes.

        Attributes:
          width, depth: numbers of
            channels and layers.
          rate: a fraction.

        Raises:
          ValueError: never.
        """

    assert config_keys.arguments(Sized) == {
        "width": "numbers of channels and layers.", "depth": "numbers of channels and layers.", "rate": "a fraction."
    }  # fmt: skip
