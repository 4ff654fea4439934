"""Moved."""

from ldm.models.diffusion.ddpm import image_sides as square  # noqa: F401
