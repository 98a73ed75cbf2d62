"""Decides which pictures are held out, by a hash of the concept, so that nothing else about the data changes it.

concept   hash   styles that draw it, in an order of its own    goes to
boar      0.10   noto, openmoji, twemoji                        unseen_concept: noto; the others nowhere
comet     0.52   twemoji, noto, openmoji                        unseen_style: twemoji; train: noto, openmoji
anchor    0.80   openmoji, noto, twemoji                        validation: openmoji; train: noto, twemoji
kite      0.97   noto, twemoji, openmoji                        train: noto, twemoji, openmoji
"""

from collections.abc import Collection

from fastvlm_jax.data.write.shard import hash_of

SPLITS = ("train", "validation", "unseen_style", "unseen_concept")
# Shares of the concepts. The held-out splits have a picture a concept, so that no caption of theirs has two.
UNSEEN_CONCEPT, UNSEEN_STYLE, VALIDATION = 0.35, 0.37, 0.19


def split_of(code: str, styles: Collection[str]) -> dict[str, str]:
    """Returns style -> split of the pictures of a concept; a picture without a split is left out.

    Every concept of `unseen_style` and `validation` has another style in `train`; none of `unseen_concept` has one.
    """
    if not styles:
        return {}
    first, *others = sorted(styles, key=lambda style: hash_of(f"{code} {style}".encode()))
    number = hash_of(code.encode()) / 2**64
    if number < UNSEEN_CONCEPT:
        return {first: "unseen_concept"}
    trained = dict.fromkeys(others, "train")
    if not others or number >= UNSEEN_CONCEPT + UNSEEN_STYLE + VALIDATION:
        return {first: "train", **trained}
    return {first: "unseen_style" if number < UNSEEN_CONCEPT + UNSEEN_STYLE else "validation", **trained}
