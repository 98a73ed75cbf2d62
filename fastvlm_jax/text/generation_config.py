"""Reads generation_config.json: the ids that end an answer, and the sampling that a model's authors chose."""

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from absl import logging

from fastvlm_jax.files import read_object

FILE = "generation_config.json"
READ = ("eos_token_id", "do_sample", "temperature", "top_p", "top_k", "repetition_penalty")
# Keys that no answer depends on here: ids that generation never places, limits that --max_tokens replaces, and how
# transformers computes or returns the answers.
NEUTRAL_KEYS = {
    *("bos_token_id", "pad_token_id", "decoder_start_token_id", "max_length", "max_new_tokens", "max_time"),
    *("num_return_sequences", "early_stopping", "length_penalty", "diversity_penalty", "renormalize_logits"),
    *("use_cache", "cache_implementation", "cache_config", "return_legacy_cache", "low_memory", "prefill_chunk_size"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
    *("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
    *("assistant_early_exit", "assistant_lookbehind", "target_lookbehind", "prompt_lookup_num_tokens"),
    *("max_matching_ngram_size", "is_assistant", "disable_compile", "compile_config", "remove_invalid_values"),
    *("chat_format", "max_window_size", "transformers_version", "_from_model_config"),
}
# Keys with a value, besides null, that changes no answer.
NEUTRAL_VALUES = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "typical_p", "encoder_repetition_penalty", "guidance_scale"), 1),
    **dict.fromkeys(("min_length", "min_new_tokens", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), 0),
    **dict.fromkeys(("min_p", "epsilon_cutoff", "eta_cutoff"), 0),
}


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """Holds a generation_config.json.

    Attributes:
      settings: contents of the file; they are written back as they are.
      source: name of the file, for messages.
    """

    settings: Mapping[str, Any]
    source: str = FILE

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Returns the ids of `eos_token_id`, one or a list; none if the file gives none."""
        found = self.settings.get("eos_token_id")
        ids = found if isinstance(found, list) else [] if found is None else [found]
        if not all(type(i) is int and i >= 0 for i in ids):
            raise ValueError(f"{self.source}: eos_token_id is {found!r}, it must be an id or a list of ids")
        return tuple(ids)

    @property
    def sampling(self) -> dict[str, float]:
        """Returns `temperature`, `top_p`, `top_k` and `repetition_penalty`, arguments of `generate.generate`.

        As in transformers 5, a file without do_sample is greedy, and one without top_k draws from 50 tokens.
        """
        penalty = self._number("repetition_penalty", 1.0, math.inf)
        if not self.settings.get("do_sample"):
            return {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": penalty}
        top_k = self.settings.get("top_k")
        if top_k is not None and (type(top_k) is not int or top_k < 0):
            raise ValueError(f"{self.source}: top_k is {top_k!r}, it must be a whole number, 0 for no limit")
        return {
            "temperature": self._number("temperature", 1.0, math.inf),
            "top_p": self._number("top_p", 1.0, 1.0),
            "top_k": 50 if top_k is None else top_k,
            "repetition_penalty": penalty,
        }

    def _number(self, key: str, default: float, most: float) -> float:
        value = self.settings.get(key)
        value = default if value is None else value
        if type(value) not in (int, float) or not 0 < value <= most or math.isinf(value):
            limit = "" if math.isinf(most) else f" up to {most:g}"
            raise ValueError(f"{self.source}: {key} is {value!r}, it must be a positive number{limit}")
        return float(value)

    def unused(self) -> list[str]:
        """Returns the settings, as "key=value", that would change answers and that this package does not compute."""
        others = {key: value for key, value in self.settings.items() if key not in READ and key not in NEUTRAL_KEYS}
        neutral = (None, False, [], {})
        return [f"{k}={v!r}" for k, v in others.items() if v not in neutral and v != NEUTRAL_VALUES.get(k)]

    def with_ends(self, ids: tuple[int, ...]) -> "GenerationConfig":
        """Returns these settings with all of `ids` among those that end an answer."""
        missing = [i for i in ids if i not in self.end_ids]
        if not missing:
            return self
        return dataclasses.replace(self, settings={**self.settings, "eos_token_id": [*self.end_ids, *missing]})


def read_generation_config(folder: pathlib.Path) -> GenerationConfig | None:
    """Reads the generation_config.json of a model directory, without one the end ids in its config.json; None if none.

    A warning names the settings that would change answers and that this package does not compute.

    Raises:
      ValueError: a file is damaged, or its eos_token_id is not an id or a list of ids; the message names it.
    """
    file, settings = folder / FILE, {}
    if file.is_file():
        settings = read_object(file)
    elif (file := folder / "config.json").is_file():
        whole = read_object(file)
        text = whole.get("text_config")
        ends = [part["eos_token_id"] for part in (whole, text) if isinstance(part, dict) and "eos_token_id" in part]
        settings = {"eos_token_id": ends[0]} if ends else {}
    if not settings:
        return None
    config = GenerationConfig(settings, str(file))
    config.end_ids  # noqa: B018 (raises an error for a file that cannot be obeyed)
    if unused := config.unused():
        logging.warning("%s: not computed here, so answers may differ: %s", file, ", ".join(unused))
    return config
