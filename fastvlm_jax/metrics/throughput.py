"""How fast a run is and what it takes: rates, model FLOPs utilization, memory of the devices."""

from collections.abc import Collection, Sequence

import jax

from fastvlm_jax.chips import PEAK_FLOPS
from fastvlm_jax.data.load.loader import Flow
from fastvlm_jax.models import flops
from fastvlm_jax.models.fastvlm import FastVLM


def peak_flops(devices: Sequence[jax.Device]) -> float | None:
    """Peak bf16 FLOP/s of all chips that `devices` are of; None where it is not known, as on a CPU."""
    known = [kind for kind in PEAK_FLOPS if devices[0].device_kind.startswith(kind)]
    if not known:
        return None
    # A chip of v7x, and of v4 without megacore, is two devices.
    chips = {(getattr(d, "slice_index", 0), *getattr(d, "coords", (d.id,))) for d in devices}
    return len(chips) * PEAK_FLOPS[max(known, key=len)]


def mfu_scalars(
    model: FastVLM, trainable: Collection[str], flow: Flow, seconds: float, *, row_length: int, peak: float | None
) -> dict[str, float]:
    """Model FLOPs utilization: what `seconds` of steps had to compute, over what the chips could; {} without a peak.

    "mfu" is the sum of the encoder's "mfu/vision", of "mfu/llm", which holds the loss, and of the projector's: all are
    shares of the whole step, not of the time that each part takes.
    """
    if peak is None:
        return {}
    work = flops.useful_flops(model, trainable, flow.sizes, flow.tokens, row_length)
    shares = {part: count / (seconds * peak) for part, count in work.items()}
    return {"mfu": sum(shares.values()), "mfu/vision": shares["vision"], "mfu/llm": shares["llm"] + shares["loss"]}


def memory_scalars(devices: Sequence[jax.Device]) -> dict[str, float]:
    """Memory in use, now and at most so far, in 10**9 bytes, of this process's fullest device; {} where none tells."""
    known = [d.memory_stats() for d in devices if d.process_index == jax.process_index()]
    known = [found for found in known if found]
    names = {"hbm_gb": "bytes_in_use", "hbm_peak_gb": "peak_bytes_in_use"}
    return {name: max(found[key] for found in known) / 1e9 for name, key in names.items() if known}
