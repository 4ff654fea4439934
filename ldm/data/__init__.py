"""Datasets: folders of images, public data sets, synthetic scenes, cached latents."""
