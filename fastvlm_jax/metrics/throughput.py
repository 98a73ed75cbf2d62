"""Measures how well a run uses its chips: model FLOPs utilization and memory of the devices."""

from collections.abc import Collection, Sequence

import jax

from fastvlm_jax.data.load.loader import Flow
from fastvlm_jax.models import flops
from fastvlm_jax.models.kinds import Model


def mfu_scalars(
    model: Model, trainable: Collection[str], flow: Flow, seconds: float, *, row_length: int, peak: float | None
) -> dict[str, float]:
    """Returns model FLOPs utilization: the FLOPs that the steps require / the FLOPs that the chips can do in `seconds`.

    "mfu" is the sum over encoder ("mfu/vision"), language model with loss ("mfu/llm") and projector; in stage 0 over
    the image tower and the text tower ("mfu/text"). All are fractions of the whole step's time, not of the time that
    each part takes.

    Args:
      trainable: paths of the parameters that learn.
      flow: images and tokens of these steps.
      row_length: tokens in a row.
      peak: FLOP/s of all chips; None gives {}.
    """
    if peak is None:
        return {}
    work = flops.useful_flops(model, trainable, flow.sizes, flow.tokens, row_length)
    shares = {part: count / (seconds * peak) for part, count in work.items()}
    text = {"mfu/llm": shares["llm"] + shares["loss"]} if model.llm_args is not None else {"mfu/text": shares["text"]}
    return {"mfu": sum(shares.values()), "mfu/vision": shares["vision"], **text}


def memory_scalars(devices: Sequence[jax.Device]) -> dict[str, float]:
    """Returns the memory in use on the fullest local device, now and at its peak, in 10**9 bytes; {} if unknown."""
    known = [d.memory_stats() for d in devices if d.process_index == jax.process_index()]
    known = [found for found in known if found]
    names = {"hbm_gb": "bytes_in_use", "hbm_peak_gb": "peak_bytes_in_use"}
    return {name: max(found[key] for found in known) / 1e9 for name, key in names.items() if known}
