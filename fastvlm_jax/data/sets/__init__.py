"""Holds the built-in data sets, which `fastvlm data NAME` writes."""
