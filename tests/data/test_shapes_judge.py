"""The judge reads pictures as it did when it fitted shapes on the whole canvas: slower, and simpler."""

from __future__ import annotations

import numpy as np
import pytest

from ldm.data.shapes_judge import UNKNOWN, read_scene
from tests.golden import goldens


def blurred(picture: np.ndarray, seed: int) -> np.ndarray:
    """Means of 3x3 pixels."""
    near = [np.roll(picture.astype(float), (y, x), (0, 1)) for y in (-1, 0, 1) for x in (-1, 0, 1)]
    return np.rint(np.mean(near, axis=0)).astype(np.uint8)


def noisy(picture: np.ndarray, seed: int) -> np.ndarray:
    """With noise of 10 to 40 levels."""
    noise = np.random.RandomState(seed).normal(0, 10 + 10 * (seed % 4), picture.shape)
    return np.clip(np.rint(picture + noise), 0, 255).astype(np.uint8)


def cut(picture: np.ndarray, seed: int) -> np.ndarray:
    """Moved so that objects cross the border and come in on the other side."""
    return np.roll(picture, (11 * seed % 64, 17 * seed % 64), (0, 1))


def reading(picture: np.ndarray) -> str:
    """What the judge finds, in a line; sizes in words follow from the radius."""
    scene = read_scene(picture)
    found = (f"{i.colour} {i.shape} {i.x:.2f} {i.y:.2f} {i.radius:.2f}" for i in scene.items)
    return ", ".join([scene.background, *found])


HARMS = {"true": lambda picture, seed: picture, "blurred": blurred, "noisy": noisy, "cut": cut}


@pytest.mark.parametrize("harm", HARMS)
def test_readings_are_those_recorded(harm: str) -> None:
    pictures, recorded = goldens("shapes_judge")["pictures"], goldens("shapes_judge")[harm].tolist()
    assert [reading(HARMS[harm](picture, seed)) for seed, picture in enumerate(pictures)] == recorded
    unknown = sum(UNKNOWN in line for line in recorded)
    assert unknown == 0 if harm == "true" else unknown < len(recorded)
