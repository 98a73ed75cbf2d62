"""Says which part of an unfinished answer is certain, for showing it while it is written."""

import functools
from collections.abc import Sequence

from fastvlm_jax.text.tokenizer import Tokenizer


def certain(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Returns the text of the first ids of an answer that further ids do not change, without white space around it.

    A byte is the id that can change most: it may complete a character, or make the bytes before it invalid.
    """
    text = tokenizer.decode(ids)
    if (byte := _byte(tokenizer)) is not None:
        pairs = zip(text, tokenizer.decode([*ids, byte]), strict=False)
        text = text[: next((i for i, (a, b) in enumerate(pairs) if a != b), len(text))]
    return text.rstrip("\ufffd").strip()


@functools.lru_cache(maxsize=4)
def _byte(tokenizer: Tokenizer) -> int | None:
    """Returns the first id that is a byte of a character and so has U+FFFD as its text; None if there is none."""
    return next((i for i in range(tokenizer.vocab_size) if tokenizer.decode([i]) == "\ufffd"), None)
