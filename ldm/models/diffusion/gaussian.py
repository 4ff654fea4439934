"""Moved."""

from ldm.models.diffusion.batches import image_sides as square  # noqa: F401
