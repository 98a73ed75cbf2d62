"""The model as Flax modules: encoders, projector, decoder, their sizes by name, folding and FLOP counts."""
