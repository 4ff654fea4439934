"""PyTorch Lightning."""

import pytorch_lightning as pl

__all__ = ["pl"]
