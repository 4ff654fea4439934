"""The evaluator of synthetic scenes, also against recorded detections on damaged images."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.shapes.evaluator import UNKNOWN, detect_scene, evaluate
from ldm.data.shapes import COLOURS, SHAPES, Item, Scene, ShapesDataset, describe, render
from tests.golden import goldens


def blurred(image: np.ndarray, seed: int) -> np.ndarray:
    """Means of 3x3 pixels."""
    near = [np.roll(image.astype(float), (y, x), (0, 1)) for y in (-1, 0, 1) for x in (-1, 0, 1)]
    return np.rint(np.mean(near, axis=0)).astype(np.uint8)


def noisy(image: np.ndarray, seed: int) -> np.ndarray:
    """With noise of 10 to 40 levels."""
    noise = np.random.RandomState(seed).normal(0, 10 + 10 * (seed % 4), image.shape)
    return np.clip(np.rint(image + noise), 0, 255).astype(np.uint8)


def cut(image: np.ndarray, seed: int) -> np.ndarray:
    """Moved so that objects cross the border and come in on the other side."""
    return np.roll(image, (11 * seed % 64, 17 * seed % 64), (0, 1))


def detected(image: np.ndarray) -> str:
    """Format the detected scene; sizes follow from the radius."""
    scene = detect_scene(image)
    found = (f"{i.colour} {i.shape} {i.x:.2f} {i.y:.2f} {i.radius:.2f}" for i in scene.items)
    return ", ".join([scene.background, *found])


DAMAGES = {"true": lambda image, seed: image, "blurred": blurred, "noisy": noisy, "cut": cut}


@pytest.mark.parametrize("damage", DAMAGES)
def test_detections_are_those_recorded(damage: str) -> None:
    images, recorded = goldens("shapes_evaluator")["pictures"], goldens("shapes_evaluator")[damage].tolist()
    assert [detected(DAMAGES[damage](image, seed)) for seed, image in enumerate(images)] == recorded
    unknown = sum(UNKNOWN in line for line in recorded)
    assert unknown == 0 if damage == "true" else unknown < len(recorded)


def scene_image(shape: str = "circle", colour: str = "red") -> np.ndarray:
    """One object in the middle, on white."""
    return render(Scene("white", (Item(shape, colour, "large", 32, 32, 14.0),)))


@pytest.mark.parametrize("objects", [1, 2, 3])
def test_rendered_scenes_match_their_captions(objects: int) -> None:
    weights = [float(n == objects) for n in (1, 2, 3)][:objects]
    data = ShapesDataset(100, seed=9, object_weights=weights, held_out=objects == 2)
    right = [evaluate(render(data.scene(i)), describe(data.scene(i))).all for i in range(100)]
    assert all(right)


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_and_colours_are_distinguished(shape: str) -> None:
    rendered = scene_image(shape, "blue")
    assert evaluate(rendered, f"a blue {shape}").all
    assert evaluate(rendered, f"a {shape}").all
    assert not any(evaluate(rendered, f"a blue {other}").objects for other in SHAPES if other != shape)
    assert not any(evaluate(rendered, f"a {other} {shape}").objects for other in COLOURS if other != "blue")


def test_size_background_relation_and_count_are_checked() -> None:
    items = (Item("circle", "red", "large", 20, 30, 14), Item("square", "blue", "small", 50, 30, 8))
    rendered = render(Scene("white", items, "to the left of"))
    assert evaluate(rendered, "a blue square to the right of a red circle").all
    assert not evaluate(rendered, "a red circle below a blue square").relation
    assert not evaluate(rendered, "a small red circle and a blue square").sizes
    assert not evaluate(rendered, "a red circle and a blue square on a tan background").background
    assert not evaluate(rendered, "a red circle").objects


def test_noise_blank_images_and_blots_do_not_match() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert not evaluate(noise, "a red circle").objects
    assert not evaluate(np.zeros((64, 64, 3), np.uint8), "a red circle").objects
    blot = scene_image()
    blot[5:12, 2:30] = COLOURS["green"]
    assert UNKNOWN in [item.shape for item in detect_scene(blot).items]
    assert not evaluate(blot, "a red circle").objects


def test_a_wrong_size_is_named() -> None:
    with pytest.raises(ValueError, match="32x32x3"):
        detect_scene(np.zeros((32, 32, 3), np.uint8))
