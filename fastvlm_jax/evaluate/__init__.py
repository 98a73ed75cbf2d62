"""Evaluates models: answers to questions, their accuracy, and validation during training."""
