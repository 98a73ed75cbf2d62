"""Draws pages of real numbers and texts with exact transcriptions, for models that learn to read."""
