"""Evaluation of a model: answers to questions, their accuracy, and validation during training."""
