"""Depth from a picture, as the depth-to-image model sees it."""
