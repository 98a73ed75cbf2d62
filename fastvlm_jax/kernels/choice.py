"""Says whether a function uses its TPU kernels."""

from fastvlm_jax import sharding

KERNELS = ("auto", "none", "interpret")


def used(kernels: str) -> bool:
    """Returns whether TPU kernels are used: never with "none", always with "interpret", which runs them anywhere but
    slowly, and with "auto" if the program is made for TPUs: see `sharding.device_kind`.
    """
    return kernels == "interpret" or (kernels == "auto" and sharding.device_kind().startswith("TPU"))
