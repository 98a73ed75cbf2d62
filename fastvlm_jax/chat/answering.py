"""Answers the questions of conversations, and keeps the KV cache of each for its next question.

A prompt is compared, token by token and image by image, with what the conversation's cache holds: the tokens that both
begin with are not computed again, whatever the template or the tokenizer makes of the rest. A conversation may thus be
edited anywhere, and a cache is never used for another text or image than its own.

    cache    <system> [cat.png] what is it? a cat
    prompt   <system> [cat.png] what is it? a cat <end> and what color is it?
             kept                                 computed
"""

import collections
import dataclasses
import functools
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fastvlm_jax.batch import Batch
from fastvlm_jax.chat import programs
from fastvlm_jax.chat.question import Laid, Question, View, common, lay_out, names_of_text
from fastvlm_jax.generate import Answers, answer_limit, check_answers, choice_of, padded, until
from fastvlm_jax.models.decoder import Cache
from fastvlm_jax.models.fastvlm import FastVLM
from fastvlm_jax.processor import Processor
from fastvlm_jax.sampling import Choice, check_options, seen_in
from fastvlm_jax.text.conversation import Segment
from fastvlm_jax.text.unfinished import certain

MAX_KEPT = 16  # conversations whose caches are kept
MAX_KEPT_BYTES = 2 << 30  # of all these caches; the newest is kept whatever its size
MIN_SLOTS = 512  # of a cache
Event = dict[str, Any]


@dataclasses.dataclass
class Kept:
    """Holds what is kept of a conversation.

    Attributes:
      names: what each token in the cache is; see `Laid.names`.
      cache: keys and values of these tokens; None before the first question.
      numbers: number of each image in `names`.
      features: features of images of the newest question.
    """

    names: np.ndarray = dataclasses.field(default_factory=lambda: names_of_text([]))
    cache: Cache | None = None
    numbers: dict[View, int] = dataclasses.field(default_factory=dict)
    features: dict[View, jax.Array] = dataclasses.field(default_factory=dict)

    @property
    def is_whole(self) -> bool:
        """Returns whether there is a cache that no program, which failed, has taken the memory of."""
        return self.cache is not None and not self.cache.length.is_deleted()

    @property
    def bytes(self) -> int:
        """Returns the memory of cache and features."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves((self.cache, self.features)))


class Clock:
    """Adds up the seconds of the parts of an answer."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def lap(self, part: str) -> None:
        """Counts the time since the last call, or since the beginning, as that of a part."""
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._since
        self._since = now


class Answering:
    """Answers questions one after the other, for one thread.

    Attributes:
      model, variables, processor: see `model_io.load`.
      max_tokens, repetition_penalty: see `generate.generate`.
      limit: most tokens of a conversation before its answer.
      kept: what is kept of the conversations, the newest last.
    """

    def __init__(
        self,
        model: FastVLM,
        variables: Any,
        processor: Processor,
        *,
        max_tokens: int = 256,
        top_p: float = 1.0,
        top_k: int = 0,
        repetition_penalty: float = 1.0,
        max_length: int | None = None,
    ):
        """Takes a loaded model, and options of `generate.generate`.

        Raises:
          ValueError: the model cannot answer, or an option is out of range.
        """
        check_answers(model, processor)
        check_options(max_tokens, 0.0, top_p, top_k, repetition_penalty)
        self.limit = answer_limit(model, max_tokens, max_length)
        self.model, self.variables, self.processor = model, variables, processor
        self.max_tokens, self.repetition_penalty = max_tokens, repetition_penalty
        self.kept: collections.OrderedDict[str, Kept] = collections.OrderedDict()
        self._choice = functools.partial(
            choice_of, processor, top_p=top_p, top_k=top_k, repetition_penalty=repetition_penalty
        )
        self._programs: dict[Any, Any] = {}

    def answer(self, question: Question) -> Iterator[Event]:
        """Yields the answer in events, as it is written; who stops iterating ends it.

        {"doing": "encoder"}     what begins now
        {"first": {...}}         the first token is there: seconds of the parts, and numbers of tokens
        {"text": "a c"}          further text
        {"done": {...}}          the answer is whole: its tokens, seconds, and whether the limit of tokens cut it

        The texts, joined, are what `generate` answers.

        Raises:
          ValueError: see `generate.generate`; before the first token.
        """
        kept = self.kept.pop(question.conversation, None) or Kept()
        try:
            yield from self._answer(question, kept)
        finally:
            if kept.is_whole:
                self.kept[question.conversation] = kept
            while len(self.kept) > 1 and (len(self.kept) > MAX_KEPT or self._bytes > MAX_KEPT_BYTES):
                self.kept.popitem(last=False)

    def forget(self) -> None:
        """Frees the memory of all conversations; each is computed anew if it goes on."""
        self.kept.clear()

    @property
    def _bytes(self) -> int:
        return sum(kept.bytes for kept in self.kept.values())

    def _answer(self, question: Question, kept: Kept) -> Iterator[Event]:
        check_options(self.max_tokens, question.temperature, 1.0, 0, 1.0)
        if question.pictures and not (self.processor.image_size and self.model.vision_args):
            raise ValueError("this model reads text alone: leave the image out")
        clock, laid = Clock(), lay_out(self.processor, question)
        length = len(laid.segment.tokens)
        if length > self.limit:
            raise ValueError(
                f"the conversation is {length} tokens long, more than the {self.limit} that leave room for an answer: "
                "begin a new one"
            )
        for view in laid.views:
            kept.numbers.setdefault(view, len(kept.numbers))
        names = laid.names(kept.numbers)
        start = min(common(names, kept.names), length - 1)  # the last token is read again: its logits are wanted
        needed, image_index = laid.behind(start)
        clock.lap("tokenize")
        yield from self._encode(question, kept, laid, needed, clock)
        yield {"doing": "prefill"}
        greedy = question.temperature < 1e-6
        choice = self._choice(temperature=0.0 if greedy else 1.0)
        unread = programs.Unread(
            tokens=_row(laid.segment.tokens[start:], 0),
            image_index=_row(image_index, -1),
            start=np.int32(start),
            count=np.int32(length - start),
            seen=None if self.repetition_penalty == 1 else self._seen(laid.segment, choice),
            rng=jax.random.key(question.seed),
            temperature=np.float32(1 if greedy else question.temperature),
        )
        features = [kept.features[laid.views[number]] for number in needed]
        answers = self._read(kept, jnp.concatenate(features, axis=1) if features else None, unread, choice, clock)
        kept.names = names
        clock.lap("prefill")
        images = int(np.sum(laid.image >= 0))
        counts = {"prompt_tokens": length, "image_tokens": images, "kept_tokens": start}
        yield {"first": {"seconds": dict(clock.seconds), **counts}}
        yield from self._write(kept, answers, unread, choice, clock)

    def _encode(self, question: Question, kept: Kept, laid: Laid, needed: list[int], clock: Clock) -> Iterator[Event]:
        """Encodes the images whose features are needed and not kept; forgets those of other questions."""
        kept.features = {view: kept.features[view] for view in laid.views if view in kept.features}
        for number in needed:
            view = laid.views[number]
            if view in kept.features:
                continue
            yield {"doing": "decode, resize"}
            pixels = self.processor.decode(question.pictures[number].data, f"image {number + 1}")
            views = self.processor.views(pixels, view.size, view.grid)[None]
            clock.lap("decode, resize")
            yield {"doing": "encoder"}
            encode = self._program(clock, "encoder", programs.encode, views)
            kept.features[view] = jax.block_until_ready(encode(views))
            clock.lap("encoder")

    def _read(
        self, kept: Kept, features: jax.Array | None, unread: programs.Unread, choice: Choice, clock: Clock
    ) -> Answers:
        """Reads what the cache lacks into it; returns the answer with its first id."""
        end = int(unread.start) + max(unread.tokens.shape[-1], int(unread.count) + self.max_tokens)
        slots = max(MIN_SLOTS, 2 ** (end - 1).bit_length())  # a power of two: so few programs are compiled
        if unread.start:
            if kept.cache.segment_ids.shape[-1] < slots:
                kept.cache = programs.grown(kept.cache, slots=slots)
            args = (kept.cache, features, unread)
            answers = self._program(clock, "prefill", programs.go_on, *args, choice=choice)(*args)
        else:
            kept.cache, args = None, (features, unread)
            answers = self._program(clock, "prefill", programs.begin, *args, slots=slots, choice=choice)(*args)
        kept.cache = jax.block_until_ready(answers.cache)
        return answers

    def _write(
        self, kept: Kept, answers: Answers, unread: programs.Unread, choice: Choice, clock: Clock
    ) -> Iterator[Event]:
        """Writes the rest of an answer, and yields its text."""
        decode, ids, shown, names = self.processor.tokenizer.decode, [int(answers.last[0])], "", kept.names
        args = (unread.rng, unread.temperature)
        further = self._program(clock, "prefill", programs.step, answers, *args, choice=choice)
        began = time.perf_counter()
        while True:
            ended = ids[-1] in choice.end
            whole = ended or len(ids) == self.max_tokens
            written = until(np.array(ids), choice.end)
            text = decode(written).strip() if whole else certain(self.processor.tokenizer, written)
            if len(text) > len(shown):
                yield {"text": text[len(shown) :]}
                shown = text
            if whole:
                break
            answers = further(answers, *args)
            kept.cache, kept.names = answers.cache, np.concatenate([names, names_of_text(ids)])
            ids.append(int(answers.last[0]))
        seconds = time.perf_counter() - began
        yield {"done": {"tokens": len(ids), "seconds": seconds, "cut": not ended}}

    def _program(self, clock: Clock, part: str, function: Any, *args: Any, **static: Any) -> Any:
        """Returns the program of a function for arguments of these shapes; compiling it is a part of its own."""
        leaves, tree = jax.tree.flatten(args)
        key = (function, tree, tuple((np.shape(x), x.dtype) for x in leaves), tuple(static.items()))
        if key not in self._programs:
            clock.lap(part)
            self._programs[key] = function.lower(self.model, self.variables, *args, **static).compile()
            clock.lap("compile")
        return functools.partial(self._programs[key], self.variables)

    def _seen(self, segment: Segment, choice: Choice) -> jax.Array:
        tokens, index, ones = (
            x[None, None] for x in (segment.tokens, segment.image_index, np.ones_like(segment.tokens))
        )
        batch = Batch(None, None, tokens, index, None, None, ones, None)
        return seen_in(batch, self.model.llm_args["vocab_size"], choice.image_id)


def _row(values: np.ndarray, fill: int) -> np.ndarray:
    """Returns a row of tokens as int32 [1, 1, T], with T as `generate.padded` says."""
    row = np.full((1, 1, padded(len(values))), fill, np.int32)
    row[0, 0, : len(values)] = values
    return row
