"""Writes data sets as shards, from a source in any known format or from records in Python."""

from fastvlm_jax.data.write.dataset import read_questions, write, write_shards
from fastvlm_jax.data.write.job import Settings
from fastvlm_jax.data.write.progress import Progress
from fastvlm_jax.data.write.summary import Summary

__all__ = ["Progress", "Settings", "Summary", "read_questions", "write", "write_shards"]
