"""Says what lowers the memory of a training step that a device had too little for, by the arithmetic of gpu.py."""

import jax

from fastvlm_jax.preflight import gpu
from fastvlm_jax.preflight.describe import gib


def advice(config) -> str:
    """Returns in words what a run's step needs of each of these devices, and which settings would fit; "" if unknown.

    The settings are in order of their cost: `accumulate` takes hardly more time, and `remat` up to a third more; a
    bfloat16 moment is less exact; a frozen encoder or a smaller batch makes another recipe.
    """
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    if not limit:  # a CPU
        return ""
    devices = gpu.Gpus("this machine", jax.device_count(), limit)
    needed = sum(gpu.memory(config, devices)[0].values())
    mends = [mend for mend in gpu.mends(config, devices, limit) if not mend.startswith("--topology")]
    return (
        f"by the arithmetic of fastvlm preflight a step needs about {gib(needed)} GiB, {gpu.MARGIN:g} times that when "
        f"compiled, of the {gib(limit)} GiB of a device; what would fit, the cheapest first: "
        f"{'; '.join([*mends, 'more devices'])}"
    )
