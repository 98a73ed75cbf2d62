"""What a run logs: rates, MFU, memory, traces, Weights & Biases."""
