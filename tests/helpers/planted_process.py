"""`fastvlm ...` whose training batches are disturbed: bad numbers are planted in some, or their updates left out.

python planted_process.py KIND STEPS DEVICES train --config ... --workdir DIR

KIND   "nan" makes an image of the batch not a number
       "spike" weighs two tokens of it by a million and minus a million, which makes a huge finite gradient
       "omit" plants nothing and leaves the update of that step out, by hand
       "without" plants nothing and never draws the batch
STEPS  numbers of the batches, from 1, as 3,7; the batches are counted as the loader counts them

The numbers pass through the real loader, model, loss and gradient: only the batch is changed, not the program.
"""

import pathlib
import runpy
import sys

import environment  # noqa: F401  sets the environment of jax
import jax
import jax.numpy as jnp

from fastvlm_jax import train
from fastvlm_jax.data.load.loader import Loader

kind, steps = sys.argv.pop(1), [int(step) for step in sys.argv.pop(1).split(",")]


def planted(batch, number):
    """The batch with images in [0, 1] and weights for its tokens, as floats, and with what is planted in it."""
    images, weights = batch.images / jnp.float32(255), batch.loss_mask.astype(jnp.float32)
    if number in steps and kind == "nan":
        images = images.at[0].set(jnp.nan)
    if number in steps and kind == "spike":
        first, second = jnp.argwhere(batch.loss_mask)[:2]
        weights = weights.at[tuple(first)].set(1e6).at[tuple(second)].set(-1e6)
    return batch.replace(images=images, loss_mask=weights)


class PlantedLoader:
    """A loader whose batches are planted."""

    def __init__(self, loader: Loader):
        self._loader = loader

    def __getattr__(self, name):
        return getattr(self._loader, name)

    def __next__(self):
        batch = next(self._loader)
        while kind == "without" and self._loader.position in steps:
            batch = next(self._loader)
        return planted(batch, self._loader.position)


class OmittingStep:
    """A jitted step whose update is dropped after some steps: the state stays, but for its number."""

    def __init__(self, fn):
        self._fn, self.lower = fn, fn.lower

    def __call__(self, state, batch):
        if int(state.step) + 1 not in steps:
            return self._fn(state, batch)
        return state.replace(step=state.step + 1), self._fn(jax.tree.map(jnp.copy, state), batch)[1]


def omitting(make_step):
    def make(*args, **kwargs):
        step = make_step(*args, **kwargs)
        return step._replace(fn=OmittingStep(step.fn))

    return make


make_loader = train.make_loader
train.make_loader = lambda *args, **kwargs: PlantedLoader(make_loader(*args, **kwargs))
if kind == "omit":
    train.make_step = omitting(train.make_step)
runpy.run_path(str(pathlib.Path(__file__).with_name("train_process.py")), run_name="__main__")
