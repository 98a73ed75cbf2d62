"""Scores models on published benchmarks; each has a file with its questions, scoring and summary."""
