"""The inpainting model's condition: the mask, then the masked image as a latent."""

from __future__ import annotations

import pytest
import torch

from ldm.models.diffusion.special_models import LatentFinetuneDiffusion, LatentInpaintDiffusion
from ldm.util import instantiate_from_config
from tests.golden import assert_agrees, filled, tensor
from tests.models.test_finetuning import inpainting


@pytest.fixture(scope="module")
def model() -> LatentInpaintDiffusion:
    return filled(instantiate_from_config(inpainting()))


def test_condition_of_a_batch(model):
    """At any size; mask first, nearest pixels; the masked image scaled as the latent is."""
    image, mask = tensor("image", 2, 48, 32, 3).clamp(-1, 1), torch.zeros(2, 48, 32, 1)
    mask[:, :24, 2:] = 1
    torch.manual_seed(3)
    concat = model.concat_condition({"mask": mask, "masked_image": image}, (24, 16))
    torch.manual_seed(3)
    latent = model.get_first_stage_encoding(model.encode_first_stage(image.movedim(-1, 1)))
    assert concat.shape == (2, 5, 24, 16)
    assert concat[:, 0, :12, 1:].eq(1).all() and concat[:, 0].sum() == 2 * 12 * 15
    assert_agrees(concat[:, 1:], latent, 1e-6)
    assert torch.equal(
        model.concat_condition({"mask": mask, "masked_image": image}, (24, 16), bs=1)[:, :1], concat[:1, :1]
    )


def test_missing_entries_are_named(model):
    with pytest.raises(ValueError, match="batches have no 'mask', only jpg, txt"):
        model.get_input({"jpg": torch.zeros(1, 32, 32, 3), "txt": [""]}, "jpg")


def test_settings():
    assert issubclass(LatentInpaintDiffusion, LatentFinetuneDiffusion)
    with pytest.raises(ValueError, match="masked_image_key 'image' is not among concat_keys"):
        instantiate_from_config(inpainting(masked_image_key="image"))
    other = instantiate_from_config(inpainting(concat_keys=["hole", "image"], masked_image_key="image"))
    batch = {"hole": torch.ones(1, 32, 32), "image": torch.zeros(1, 32, 32, 3)}
    assert other.concat_condition(batch, (16, 16)).shape == (1, 5, 16, 16)
