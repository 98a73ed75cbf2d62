"""Fast implementations of attention, cross-entropy, depthwise convolution and embedding lookup."""
