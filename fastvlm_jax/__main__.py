"""Runs `python -m fastvlm_jax`, the same as `fastvlm`."""

from fastvlm_jax.cli import program

program()
