"""MiDaS depth estimation of the depth-to-image model."""
