"""Presents stored tensors without their leading dimensions of size 1."""

import dataclasses

import numpy as np

from fastvlm_jax.convert.mapping import Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class _Squeezed:
    """Describes a stored tensor without its first `ones` dimensions, which is read when it is indexed."""

    tensor: Tensor
    ones: int

    def get_shape(self) -> list[int]:
        return list(self.tensor.get_shape())[self.ones :]

    def get_dtype(self) -> str:
        return self.tensor.get_dtype()

    def __getitem__(self, index) -> np.ndarray:
        index = index if isinstance(index, tuple) else (index,)
        return self.tensor[(slice(0, 1),) * self.ones + index][(0,) * self.ones]


def squeezed(tensors: dict[str, Tensor], rank: int, *names: str) -> dict[str, Tensor]:
    """Returns the tensors, those of `names` with `rank` dimensions where all that precede these have size 1.

    [1, 1, 77, 512]  rank 2  [77, 512]      positions in ml-mobileclip's files
    [1]              rank 0  []             logit_scale in some of open_clip's
    """
    found = dict(tensors)
    for name in set(names) & set(tensors):
        shape = list(tensors[name].get_shape())
        ones = len(shape) - rank
        if ones > 0 and shape[:ones] == [1] * ones:
            found[name] = _Squeezed(tensors[name], ones)
    return found
