"""Checkpoints in the formats of other tools: export, import, merge, model cards."""
