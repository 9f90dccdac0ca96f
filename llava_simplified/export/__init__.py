"""Convert checkpoints to and from the formats of other tools, merge adapters, and write model cards."""
