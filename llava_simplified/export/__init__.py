"""Checkpoints as other tools read them."""
