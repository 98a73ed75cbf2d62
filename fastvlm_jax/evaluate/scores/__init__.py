"""Scores answers: pure functions, one rule a file, each with the source of its rule."""
