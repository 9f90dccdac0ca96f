"""The trainer and what surrounds a run."""
