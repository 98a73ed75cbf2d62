"""Logs a run: rates, MFU, memory, traces, Weights & Biases."""
