"""A tiny config of stage 0, a batch of random pairs for it with two teachers, and a data set of pairs."""

import io

import numpy as np
import PIL.Image

from fastvlm_jax import config as config_lib
from fastvlm_jax.batch import PairBatch
from fastvlm_jax.data.record import Record
from fastvlm_jax.data.write import write_shards
from fastvlm_jax.text.tokenizer import train_sentencepiece

VISION = dict(layers=(2,), embed_dims=(8,), mixers=("repmixer",), head_features=12, head_bias=True,
              layer_scale_init=0.5, init_std=0.3, mlp_ratio=2.0)  # fmt: skip
TEXT = dict(features=12, width=32, num_layers=1, num_heads=1, vocab_size=60, context_length=6)
TEACHERS = ((6, 20.0), (5, 30.0))


def small_pairs_config(**overrides):
    """The config; `overrides` are dotted keys with "__" for the dots."""
    config = config_lib.pairs_of("tiny")
    with config.model.unlocked():
        config.model.vision.update(VISION)
    config.model.text.update(TEXT)
    config.model.vision.batch_norm_images, config.data.image_size = 4, 8
    config.data.groups, config.data.images_per_group = 4, 4
    config.bad_steps.mode, config.eval_batches, config.log_every, config.warmup_ratio = "off", 0, 1, 0.0
    for key, value in overrides.items():
        config.update_from_flattened_dict({key.replace("__", "."): value})
    return config


def distilled(**overrides):
    """The config with both terms of the loss and two texts an image."""
    settings = dict(loss__hard=0.5, loss__soft=1.0, loss__teachers=TEACHERS, data__texts=2, data__augment="replay")
    return small_pairs_config(**settings, **overrides)


def random_pairs(groups=4, images=4, texts=2, side=8, teachers=TEACHERS, seed=0):
    """A batch of random pairs; the largest token of each text, its end, stands at a random place."""
    rng = np.random.default_rng(seed)

    def features(*shape):
        parts = [rng.normal(size=(*shape, width)) for width, _ in teachers]
        return np.concatenate([x / np.linalg.norm(x, axis=-1, keepdims=True) for x in parts], -1).astype(np.float32)

    tokens = rng.integers(1, 59, (groups, images, texts, TEXT["context_length"]))
    np.put_along_axis(tokens, rng.integers(1, 6, (groups, images, texts, 1)), 59, axis=3)
    pixels = rng.integers(0, 256, (groups, images, side, side, 3), np.uint8)
    taught = (features(groups, images), features(groups, images, texts)) if teachers else (None, None)
    return PairBatch(pixels, tokens.astype(np.int32), *taught)


def write_pairs(folder, train=80, validation=40):
    """Writes pairs of a picture of noise and a caption of its own, and a tokenizer, as a data set of stage 0."""
    rng, words = np.random.default_rng(0), ("red", "green", "blue", "round", "small", "old", "wet", "far")
    for split, count in (("train", train), ("validation", validation)):
        records = []
        for number in range(count):
            image = io.BytesIO()
            PIL.Image.fromarray(rng.integers(0, 256, (10, 13, 3), np.uint8)).save(image, "PNG")
            caption = " ".join(words[number // 8**place % 8] for place in range(3))
            turns = (("user", (0, "Describe the image.")), ("assistant", (caption,)))
            records.append(Record(f"{split}/{number}", (image.getvalue(),), turns))
        write_shards(folder, split, records)
    train_sentencepiece([*words, "user Describe the image. assistant"] * 20, folder / "tokenizer.model", 300)


def get_config(data):
    """`--config tests/helpers/small_pairs.py:DATA`, with DATA from `write_pairs`: averages, Adafactor, random crops."""
    config = small_pairs_config(data__path=str(data), data__groups=8, data__augment="random")
    config.model.text.vocab_size = 320
    config.model.vision.image_mean, config.model.vision.image_std = (0.5, 0.4, 0.3), (0.3, 0.3, 0.2)
    config.stage, config.steps, config.ema, config.optimizer = "pairs", 6, 0.75, "adafactor"
    config.warmup, config.warmup_ratio, config.final_rate = "open_clip", 0.3, 0.1
    config.bad_steps.mode, config.eval_batches, config.eval_every = "on", 1, 3
    config.evaluate = (("zero-shot", "", 0), ("retrieval", "", 30))
    config.groups = ((".*", 1e-2, 0.1),)
    return config


def draws_of(schedule, epoch):
    batches = range(epoch * schedule.batches_per_epoch, (epoch + 1) * schedule.batches_per_epoch)
    plans = [schedule.batch(k) for k in batches]
    return [place for plan in plans for g in range(schedule.groups) for place in schedule.group(plan, g)]
