"""Score captions against references, and show captions, scores and images in a report."""
