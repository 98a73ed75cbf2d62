"""Holds the published benchmarks, a file a family: how its files are read, asked and scored."""
