"""The vision tower, the projector, the language model, and how they are joined; start at llava.py."""
