"""Show training samples token by token, and add up the tokens of a data file."""
