"""Tokenizers, their training, and conversation templates with the mask of supervised tokens."""
