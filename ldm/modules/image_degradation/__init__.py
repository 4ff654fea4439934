"""Degradations that turn images into training inputs for super-resolution."""

from ldm.modules.image_degradation.bsrgan import degradation_fn_bsr, degradation_fn_bsr_light
from ldm.modules.image_degradation.resampling import resize

__all__ = ["degradation_fn_bsr", "degradation_fn_bsr_light", "resize"]
