"""How good are the captions, and what do they look like."""
