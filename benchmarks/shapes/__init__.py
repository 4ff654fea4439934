"""Accuracy of models of synthetic scenes, see `ldm.data.shapes`."""
