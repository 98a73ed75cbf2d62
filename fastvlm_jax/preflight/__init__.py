"""Compiles a config's program for a TPU slice, without one, and estimates its memory, time and transfers."""
