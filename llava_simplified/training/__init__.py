"""The trainer, and the commands that plan, prepare and run training."""
