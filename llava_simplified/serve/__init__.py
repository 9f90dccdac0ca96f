"""A model that others talk to: over HTTP, and on a page."""
