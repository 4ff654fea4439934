"""Moved."""

from ldm.models.autoencoder import FirstStage, psnr  # noqa: F401
