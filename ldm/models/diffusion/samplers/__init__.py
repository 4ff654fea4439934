"""All samplers by name.

To add one, put a file with a registered `Sampler` into this folder, and its name into `SAMPLERS` of
`ldm/cli/options.py`, which lists them for --help without importing torch.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.plms import PLMSSampler
from ldm.models.diffusion.sampler import SAMPLERS as SAMPLERS
from ldm.models.diffusion.sampler import Sampler, register

register("ddim")(DDIMSampler)
register("plms", convert_v=True)(PLMSSampler)
register("dpm_solver")(DPMSolverSampler)
register("dpmpp_2m")(DPMSolverSampler)
for _found in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_found.name}")


def make_sampler(model: Any, name: str, *, sequential_guidance: bool = False) -> Sampler:
    """Build the sampler called `name`; it serves one run at a time.

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
