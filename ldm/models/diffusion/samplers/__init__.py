"""Every sampler by its name. A file that is put here, with a registered `Sampler` in it, needs no further mention."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from ldm.models.diffusion import ddim, dpm_solver, plms  # noqa: F401  (they register themselves)
from ldm.models.diffusion.sampler import SAMPLERS as SAMPLERS
from ldm.models.diffusion.sampler import Sampler

for _found in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_found.name}")


def make_sampler(model: Any, name: str, *, sequential_guidance: bool = False) -> Sampler:
    """The sampler called `name` for a model, or for what stands for one.

    Args:
        model: a LatentDiffusion, or anything with the attributes that `sampler` names.
        name: one of `SAMPLERS`.
        sequential_guidance: evaluate both conditions of classifier-free guidance one after the other, not as one batch:
            slower, but takes less memory.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in SAMPLERS:
        raise ValueError(f"sampler {name!r} is not one of {', '.join(sorted(SAMPLERS))}")
    sampler = SAMPLERS[name](model)
    sampler.sequential_guidance = sequential_guidance
    return sampler
