"""Takes one layer of a variable that stacks the layers, without reading the others."""

import dataclasses

import numpy as np

from fastvlm_jax.convert.mapping import Leaf, Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class _Layer:
    """Describes the tensor of one layer in a stored stack of layers, which is read when it is indexed."""

    stack: Tensor
    number: int

    def get_shape(self) -> list[int]:
        return self.stack.get_shape()[1:]

    def get_dtype(self) -> str:
        return self.stack.get_dtype()

    def __getitem__(self, index) -> np.ndarray:
        index = index if isinstance(index, tuple) else (index,)
        return self.stack[(slice(self.number, self.number + 1), *index)][0]


def layer_of(stack: Leaf | np.ndarray, number: int) -> Leaf | np.ndarray:
    """Returns one layer of a variable that stacks the layers along its leading axis.

    A Leaf stays one: it reads only that layer of the files.
    """
    if not isinstance(stack, Leaf):
        return stack[number]
    tensors = stack.tensors[number : number + 1] if stack.stacked else (_Layer(stack.tensors[0], number),)
    return dataclasses.replace(stack, tensors=tensors, shape=stack.shape[1:], stacked=False)
