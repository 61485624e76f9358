"""Checkpoints of a run, and models of other programs."""
