"""Reads the HLO text of a compiled program: its instructions, FLOPs, cost and transfers."""
