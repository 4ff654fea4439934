"""Moved."""

from ldm.models.diffusion.batches import CLASS_KEYS, TEXT_KEYS  # noqa: F401
