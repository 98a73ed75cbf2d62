"""Fast implementations of attention, cross-entropy, depthwise convolution, embedding lookup and perceptrons."""
