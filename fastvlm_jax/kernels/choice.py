"""Says whether a function uses its TPU kernels."""

from fastvlm_jax import sharding

KERNELS = ("auto", "none", "interpret")


def used(kernels: str) -> bool:
    """Returns whether TPU kernels are used: never with "none", always with "interpret", which runs them anywhere but
    slowly, and with "auto" if the mesh of `jax.set_mesh` consists of TPUs.
    """
    return kernels == "interpret" or (kernels == "auto" and sharding.device_kind().startswith("TPU"))
