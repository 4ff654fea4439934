"""Latent diffusion models: a faithful, modern reimplementation of the CompVis `ldm` system."""

__version__ = "0.1.0"
