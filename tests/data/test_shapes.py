"""Synthetic scenes, their captions and the grammar of captions."""

from __future__ import annotations

import numpy as np
import pytest

from ldm.data.shapes import (
    ATTRIBUTE_CLASSES,
    BACKGROUNDS,
    COLOURS,
    HELD_OUT,
    RELATIONS,
    SHAPES,
    WORDS,
    Item,
    Scene,
    ShapesCaptions,
    ShapesDataset,
    attributes,
    coverage,
    describe,
    parse,
    random_scene,
    render,
)


def image(shape: str = "circle", colour: str = "red", ground: str = "white", radius: float = 14.0) -> np.ndarray:
    """One object in the middle."""
    return render(Scene(ground, (Item(shape, colour, "large", 32, 32, radius),)))


@pytest.mark.parametrize(
    ("shape", "area"),
    [
        ("circle", np.pi),
        ("ring", np.pi * 0.75),
        ("square", 1.76**2),
        ("diamond", 1.6),
        ("triangle", 1.8),
        ("cross", 4 - 4 * 0.68**2),
    ],
)
def test_shapes_cover_the_area_that_geometry_gives(shape: str, area: float) -> None:
    assert coverage(shape, 32, 32, 20).sum() == pytest.approx(area * 400, rel=0.05)


def test_rendering_is_antialiased_and_centred() -> None:
    rendered = coverage("circle", 32, 32, 10)
    assert np.abs(rendered - rendered[::-1]).max() <= 0.26  # one subsample of rounding
    assert 40 < ((rendered > 0) & (rendered < 1)).sum() < 120
    assert tuple(image()[32, 32]) == COLOURS["red"]
    assert tuple(image(ground="tan")[0, 0]) == BACKGROUNDS["tan"]


def test_unknown_shape_is_named() -> None:
    with pytest.raises(ValueError, match="hexagon"):
        coverage("hexagon", 32, 32, 10)


def test_scenes_depend_on_seed_and_index_alone() -> None:
    one, two = ShapesDataset(50, seed=3), ShapesDataset(80, seed=3)
    assert [one.scene(i) for i in range(20)] == [two.scene(i) for i in range(20)]
    assert one.scene(0) != ShapesDataset(50, seed=4).scene(0)
    assert one[5]["caption"] == two[5]["caption"]
    assert len({one.get(5, np.random.default_rng(epoch))["caption"] for epoch in range(20)}) > 3
    with pytest.raises(IndexError):
        one.scene(50)


def test_items_are_what_training_expects() -> None:
    item = ShapesDataset(3)[1]
    assert item["image"].shape == (64, 64, 3) and item["image"].dtype == np.float32
    assert item["image"].min() >= -1 and item["image"].max() <= 1
    assert isinstance(item["caption"], str)


def test_held_out_pairs_name_every_shape_and_colour_once_and_never_occur() -> None:
    assert {shape for shape, _ in HELD_OUT} == set(SHAPES) and {colour for _, colour in HELD_OUT} == set(COLOURS)
    for held_out in (False, True):
        data = ShapesDataset(300, seed=1, object_weights=(1, 1, 1), held_out=held_out)
        pairs = {(item.shape, item.colour) for i in range(300) for item in data.scene(i).items}
        assert pairs == HELD_OUT if held_out else not pairs & HELD_OUT


@pytest.mark.parametrize("objects", [1, 2, 3])
def test_objects_are_inside_apart_and_unlike_the_ground(objects: int) -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        scene = random_scene(rng, objects)
        masks = [coverage(item.shape, item.x, item.y, item.radius) > 0.3 for item in scene.items]
        assert len(masks) == objects and sum(masks[1:], masks[0].astype(int)).max() == 1
        assert not any(mask[[0, -1]].any() or mask[:, [0, -1]].any() for mask in masks)
        assert scene.background not in [item.colour for item in scene.items]
        if scene.relation is not None:
            dx, dy = RELATIONS[scene.relation]
            first, second = scene.items[:2]
            assert (first.x - second.x) * dx + (first.y - second.y) * dy > 10


def test_captions_use_the_vocabulary_and_can_be_parsed() -> None:
    data = ShapesDataset(200, object_weights=(1, 1, 1))
    for i in range(200):
        scene, text = data.scene(i), data[i]["caption"]
        assert set(text.split()) <= set(WORDS)
        wanted, relation, background = parse(text)
        assert [w.shape for w in wanted] == [item.shape for item in scene.items]
        assert all(w.matches(item) for w, item in zip(wanted, scene.items))
        assert relation in (None, scene.relation) and background in (None, scene.background)


def test_fraction_of_complete_captions() -> None:
    data = ShapesDataset(200, object_weights=(0, 1), complete=1.0)
    assert all(data[i]["caption"] == describe(data.scene(i)) for i in range(20))
    data = ShapesDataset(200, object_weights=(0, 1), complete=0.0)
    assert sum(data[i]["caption"] == describe(data.scene(i)) for i in range(200)) < 20


def test_attributes_match_the_caption() -> None:
    text = "a large red circle to the left of a blue square"
    assert attributes(text).tolist() == [2, 1, 1, 0, 3, 2, 1, 0]
    assert attributes("a ring on a tan background").tolist() == [0, 0, 8, 0, 0, 0, 0, 4]
    item = ShapesCaptions(5, seed=1)[3]
    assert (item["attributes"] == attributes(item["caption"])).all() and "image" not in item
    assert (item["attributes"] < ATTRIBUTE_CLASSES).all()
    with pytest.raises(ValueError, match="more than two"):
        attributes("a ring and a star and a heart")


def test_full_caption() -> None:
    items = (Item("circle", "red", "large", 20, 30, 14), Item("square", "blue", "small", 50, 30, 8))
    text = "a large red circle to the left of a small blue square on a white background"
    assert describe(Scene("white", items, "to the left of")) == text


@pytest.mark.parametrize(
    "prompt", ["", "red circle", "a red house", "a shiny red circle", "a circle on a pink background"]
)
def test_prompts_outside_the_grammar_are_refused(prompt: str) -> None:
    with pytest.raises(ValueError, match="known background|form|no size"):
        parse(prompt)
