"""LLaVA Simplified: give a language model eyes."""
