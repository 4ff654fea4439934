"""What tests that compare with goldens share: the files, the inputs, the measure of agreement."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldm.util import instantiate_from_config
from tests.reference.fill import fill, noise

agreement: dict[str, float] = {}  # the largest difference found so far, by test module

REFERENCE = Path(__file__).parent / "reference"
BAR = 1e-4


@functools.cache
def goldens(name: str) -> dict[str, np.ndarray]:
    """The arrays of goldens/NAME.npz."""
    with np.load(REFERENCE / "goldens" / f"{name}.npz") as file:
        return dict(file)


@functools.cache
def golden_configs(name: str) -> Any:
    """goldens/NAME.json."""
    return json.loads((REFERENCE / "goldens" / f"{name}.json").read_text())


def tensor(name: str, *shape: int) -> torch.Tensor:
    """The input called `name`."""
    return torch.from_numpy(noise(name, shape))


def filled(model: torch.nn.Module, prefix: str = "") -> torch.nn.Module:
    """`model` in evaluation mode, with deterministic weights for its keys under `prefix`."""
    fill({prefix + key: value for key, value in model.state_dict().items()})
    return model.eval()


def latent_diffusion(params: dict[str, Any], **changes: Any) -> torch.nn.Module:
    """A filled LatentDiffusion."""
    target = "ldm.models.diffusion.ddpm.LatentDiffusion"
    return filled(instantiate_from_config({"target": target, "params": {**params, **changes}}))


def difference(actual: Any, golden: Any) -> float:
    """max |actual - golden| / max(1, max |golden|)."""
    if isinstance(actual, torch.Tensor):
        actual = actual.detach().cpu().numpy()
    actual, golden = np.asarray(actual, np.float64), np.asarray(golden, np.float64)
    assert actual.shape == golden.shape, f"shape {actual.shape}, golden {golden.shape}"
    return float(np.abs(actual - golden).max() / max(1.0, np.abs(golden).max()))


def assert_agrees(actual: Any, golden: Any, bar: float = BAR) -> None:
    """Fail, saying by how much, unless `actual` is within `bar` of `golden`."""
    found = difference(actual, golden)
    module = os.environ.get("PYTEST_CURRENT_TEST", "").partition("::")[0]
    agreement[module] = max(found, agreement.get(module, 0.0))
    assert found <= bar, f"differs from the golden by {found:.3g}, more than {bar:g}"
