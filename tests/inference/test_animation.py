"""From key to key: where frames lie, and what they show at the keys and between them."""

from __future__ import annotations

import pytest
import torch

from ldm import inference
from ldm.inference import animation, frames_between, interpolate, pair_keys
from ldm.inference.animation import Frame
from tests.tiny import write_tiny

PROMPTS = ["a red circle", "a blue square"]
OPTIONS = {"steps": 3, "sampler": "euler_a", "scale": 2.0, "height": 16, "width": 16, "progress": False}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return inference.load_model(ckpt=write_tiny(tmp_path_factory.mktemp("tiny")), device="cpu")


def places(keys: int, count: int, loop: bool = False) -> list[float]:
    return [frame.start + frame.weight for frame in frames_between(keys, count, loop)]


def test_frames_are_spread_evenly_from_key_to_key():
    assert places(2, 5) == [0, 0.25, 0.5, 0.75, 1]
    assert places(3, 5) == [0, 0.5, 1, 1.5, 2]
    assert places(3, 6, loop=True) == [0, 0.5, 1, 1.5, 2, 2.5]  # and 3 is 0 again
    assert frames_between(3, 6, loop=True)[-1] == Frame(2, 0, 0.5)
    with pytest.raises(ValueError, match="one prompt and one seed leave nothing to interpolate"):
        frames_between(1, 5)
    with pytest.raises(ValueError, match="2 frames cannot show 3 keys"):
        frames_between(3, 2)


def test_prompts_and_seeds_pair():
    assert pair_keys(["a"], [1, 2]) == (["a", "a"], [1, 2])
    assert pair_keys(["a", "b"], [1]) == (["a", "b"], [1, 1])
    assert pair_keys(["a", "b"], [1, 2]) == (["a", "b"], [1, 2])
    with pytest.raises(ValueError, match="2 prompts and 3 seeds do not pair"):
        pair_keys(["a", "b"], [1, 2, 3])


@pytest.mark.parametrize("contexts", ["linear", "slerp"])
def test_keys_are_the_images_of_txt2img(model, contexts):
    steps: list[int] = []
    frames = frames_between(2, 5)
    options = {**OPTIONS, "contexts": contexts, "batch_size": 2, "on_step": lambda x0, step, total: steps.append(step)}
    batches = list(interpolate(model, PROMPTS, [3, 9], frames, **options))
    assert [len(batch) for batch in batches] == [2, 2, 1] and steps == [1, 2, 3] * 3
    pictures = [picture.tobytes() for batch in batches for picture in batch]
    keys = [inference.txt2img(model, [p], seed=[s], **OPTIONS)[0].tobytes() for p, s in zip(PROMPTS, (3, 9))]
    assert [pictures[0], pictures[-1]] == keys and len(set(pictures)) == 5
    with pytest.raises(ValueError, match="contexts 'round' is not one of linear, slerp"):
        next(interpolate(model, PROMPTS, [3], frames, contexts="round"))


def test_contexts_mix():
    keys = torch.eye(3)[:, None]  # (3, 1, 3)
    frames = [Frame(0, 1, 0.5), Frame(2, 0, 0.25)]
    expected = torch.tensor([[0.5, 0.5, 0], [0.25, 0, 0.75]])
    assert torch.equal(animation.interpolated(keys, frames, "linear")[:, 0], expected)
    torch.testing.assert_close(animation.interpolated(keys, frames, "slerp").norm(dim=2), torch.ones(2, 1))
