"""Reinforces pairs of a picture and its caption: augmented views, and the embeddings that teachers give them."""

from fastvlm_jax.reinforce.plan import Settings
from fastvlm_jax.reinforce.run import Progress, reinforce
from fastvlm_jax.reinforce.summary import Summary

__all__ = ["Progress", "Settings", "Summary", "reinforce"]
