"""Serve a model over HTTP, with an OpenAI-compatible API and a web page."""
