"""Two-way tables of weight names: tensors in published checkpoints, and their paths in the variables."""
