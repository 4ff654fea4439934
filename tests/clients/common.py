"""What the tests of other projects' patterns share: a small model, its inputs, and DDIM written out."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm.modules.diffusionmodules.util import make_ddim_timesteps
from ldm.util import instantiate_from_config
from tests.golden import filled
from tests.tiny import tiny_config

SHAPE = (4, 16, 16)
PROMPTS = ["a red circle", "a blue square"]


def tiny_model(target: str | None = None, unet: str | None = None, **params: Any) -> Any:
    """A small Stable Diffusion of class `target` with deterministic weights, in evaluation mode."""
    config = tiny_config(**params)
    if target is not None:
        config["target"] = target
    if unet is not None:
        config["params"]["unet_config"]["target"] = unet
    return filled(instantiate_from_config(config)).eval()


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batch() -> dict[str, Any]:
    """A training batch of two captioned images."""
    return {"jpg": noise(2, 32, 32, 3, seed=1).clamp(-1, 1), "txt": list(PROMPTS)}


def ddim(
    eps: Callable[[Tensor, Tensor], Tensor], alphas_cumprod: Tensor, x: Tensor, steps: int, eta: float = 0.0
) -> Tensor:
    """DDIM (Song et al. 2021, equation 12) from noise `x`, by a function eps(x, t). Without noise of its own: eta 0."""
    assert eta == 0
    times = make_ddim_timesteps("uniform", steps, len(alphas_cumprod), verbose=False)
    levels = alphas_cumprod.double()
    for index in reversed(range(len(times))):
        a, a_prev = levels[times[index]], levels[times[index - 1]] if index else levels[0]
        e = eps(x, torch.full((len(x),), int(times[index])))
        x0 = (x - (1 - a).sqrt() * e) / a.sqrt()
        x = (a_prev.sqrt() * x0 + (1 - a_prev).sqrt() * e).float()
    return x


def assert_close(found: Tensor | np.ndarray, expected: Tensor | np.ndarray, tolerance: float = 1e-5) -> None:
    """Within `tolerance` of the largest value, or of 1."""
    found, expected = torch.as_tensor(found), torch.as_tensor(expected)
    assert found.shape == expected.shape
    error = (found - expected).abs().max() / expected.abs().max().clamp(min=1)
    assert error <= tolerance, f"{float(error):.1e}"


def import_or_skip(name: str) -> Any:
    """A package of the extra "clients"; where it is missing or cannot be imported, its tests are skipped."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed: pip install latent-diffusion[clients]", allow_module_level=True)
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"{name} cannot be imported: {error}", allow_module_level=True)
