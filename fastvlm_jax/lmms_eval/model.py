"""Defines the model that lmms-eval asks; lmms-eval imports this file, and nothing else does."""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
from absl import logging
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from tqdm import tqdm

from fastvlm_jax import model_io, sharding
from fastvlm_jax.evaluate.answers import answer_batches
from fastvlm_jax.evaluate.questions import Question, prepare
from fastvlm_jax.generate import answer_limit, generate
from fastvlm_jax.lmms_eval.requests import PROTOCOL, Settings, read_batch_size, read_row, read_settings

SAMPLED = 8  # rows of a batch that is sampled, by default


class FastVLM(lmms):
    """Answers the requests of lmms-eval, in its simple form, in one process that uses all devices.

    Attributes:
      model, variables, processor: see model_io.load.
      mesh: mesh of all devices, which answer different questions; None for a single device.
      batch_size: most questions that a device answers at once; None for as many as fit.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        dtype: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ):
        """Loads the model.

        Args:
          pretrained: model directory, workdir or checkpoint; see model_io.load.
          dtype: dtype of the parameters and the computation; see model_io.load.
          batch_size: lmms-eval's --batch_size; "auto", and its default 1, take as many as fit. Answers do not depend on
            it.
          max_batch_size: most questions with --batch_size auto.
          device: lmms-eval's --device, which is not used: JAX takes the devices that it finds.

        Raises:
          ValueError: lmms-eval runs in several processes, the model cannot answer, or an argument is wrong.
        """
        super().__init__()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(
                "fastvlm_jax uses all devices in one process: start lmms-eval without accelerate or torchrun"
            )
        if device is not None:
            logging.warning("--device %s is not used: JAX_PLATFORMS chooses the devices", device)
        self.mesh = sharding.make_mesh() if jax.device_count() > 1 else None
        loaded = model_io.read(pretrained)
        self.model, self.variables = model_io.put(loaded, dtype, self.mesh)
        self.processor = loaded.processor
        if self.model.llm_args is None or self.processor is None:
            raise ValueError(f"{pretrained} has no language model or no tokenizer, so it answers nothing")
        self.batch_size = read_batch_size(batch_size, max_batch_size)

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Returns the answers to the requests, in their order."""
        groups: dict[Settings, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(read_settings(request.args[1], request.args[4]), []).append(number)
        answers: dict[int, str] = {}

        @functools.lru_cache(64)  # the images of a request are asked for one by one
        def images_of(number: int) -> list[Any]:
            return self._images(requests[number])

        with tqdm(total=len(requests), desc="Model Responding") as bar:
            for settings, numbers in groups.items():
                rows = [
                    read_row(requests[number].args[0], name_of(requests[number]), functools.partial(images_of, number))
                    for number in numbers
                ]
                room = answer_limit(self.model, 1, None)
                questions = prepare(rows, PROTOCOL, self.processor, most_tokens=room).questions
                settings = self._fitting(settings, questions)
                ask = self._decode if settings.greedy else self._sample
                for i, text in ask(questions, settings, bar.update).items():
                    answers[numbers[i]] = text
        return [answers[number] for number in range(len(requests))]

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Raises NotImplementedError: this model generates."""
        raise NotImplementedError("fastvlm_jax answers tasks of the type generate_until, not loglikelihood")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Raises NotImplementedError: this model answers one question of each row."""
        raise NotImplementedError("fastvlm_jax answers tasks of the type generate_until, not of several rounds")

    def clean(self) -> None:
        """Keeps the weights, which lmms-eval would free here: the same object may be evaluated again."""

    def _images(self, request: Instance) -> list[Any]:
        _, _, doc_to_visual, doc_id, task, split = request.args
        return list(doc_to_visual(self.task_dict[task][split][doc_id]) or ())

    def _fitting(self, settings: Settings, questions: Sequence[Question]) -> Settings:
        """Returns settings whose answers fit behind the longest prompt in the model's context; a warning tells."""
        longest = max((question.length for question in questions), default=0)
        room = answer_limit(self.model, 1, None) + 1 - longest
        if settings.max_tokens <= room:
            return settings
        logging.warning("max_new_tokens %d: the model's context leaves room for %d", settings.max_tokens, room)
        return settings._replace(max_tokens=room)

    def _decode(self, questions: Sequence[Question], settings: Settings, done: Callable[[int], Any]) -> dict[int, str]:
        """Returns the greedy answers by the numbers of the questions."""
        answers: dict[int, str] = {}
        for batch in answer_batches(
            self.model, self.variables, self.processor, questions, max_tokens=settings.max_tokens, mesh=self.mesh,
            batch_size=self.batch_size, told=logging.info,
        ):  # fmt: skip
            answers |= {number: answer.text for number, answer in batch.own.items()}
            done(batch.count)
        return answers

    def _sample(self, questions: Sequence[Question], settings: Settings, done: Callable[[int], Any]) -> dict[int, str]:
        """Returns sampled answers by the numbers of the questions; the longest prompts come first."""
        order = sorted(range(len(questions)), key=lambda number: -questions[number].length)
        # All images of a batch have one size, and a question's answer must not depend on those beside it.
        size = 1 if len(self.processor.sizes) > 1 else self.batch_size or SAMPLED
        answers: dict[int, str] = {}
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            images = [[picture.read() for picture in questions[number].pictures] for number in batch]
            texts = generate(
                self.model, self.variables, self.processor, images, [questions[number].turns for number in batch],
                max_tokens=settings.max_tokens, seed=settings.seed + start, **settings.sampling,
            )  # fmt: skip
            answers |= dict(zip(batch, texts, strict=True))
            done(len(batch))
        return answers


def name_of(request: Instance) -> str:
    """Returns the task, split and number of the row that a request is about."""
    return "/".join(map(str, (*request.args[4:], request.args[3])))
