"""Trains, scores and times a grid of models: which tasks it takes, their state in plain files, the results."""
