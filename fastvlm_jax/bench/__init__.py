"""Benchmarks: the training input against PyTorch, loading of weights, and the depthwise convolution."""
