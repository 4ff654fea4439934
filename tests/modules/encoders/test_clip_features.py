"""CLIP's embeddings through transformers: its own numbers, its own preparation of pictures, what is said without it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPModel

try:
    from transformers.models.clip import CLIPImageProcessorPil
except ImportError:  # before release 5 it has the plain name
    from transformers.models.clip import CLIPImageProcessor as CLIPImageProcessorPil

from ldm.images import load_image
from ldm.modules.encoders import modules
from ldm.modules.encoders.clip_features import (
    FrozenClipImageEmbedder,
    FrozenCLIPTextEmbedder,
    crop_to_square,
    load_clip,
)
from ldm.modules.encoders.clip_image import MEAN, STD
from tests.golden import assert_agrees, tensor
from tests.tiny import write_clip

PROMPTS = ["a photo of a cat", "", "oil painting, by a master"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip"), width=24)


def features(found):
    """Embeddings as any release of transformers gives them: before 5, alone."""
    return getattr(found, "pooler_output", found)


def test_text_embeddings_are_those_of_transformers(folder):
    embedder = FrozenCLIPTextEmbedder(str(folder))
    theirs = CLIPModel.from_pretrained(folder).eval()
    with torch.no_grad():
        ids = embedder.tokenizer(PROMPTS, 77)
        mask = ((ids == 49407).cumsum(1) <= 1).long()  # up to the first end token: what follows has no effect
        expected = features(theirs.get_text_features(ids, attention_mask=mask))
    assert_agrees(FrozenCLIPTextEmbedder(str(folder), normalize=False)(PROMPTS), expected)
    assert_agrees(embedder(PROMPTS), F.normalize(expected, dim=-1))
    assert not any(parameter.requires_grad for parameter in embedder.parameters()) and not embedder.training


def test_a_context_repeats_each_prompt(folder):
    embedder = FrozenCLIPTextEmbedder(str(folder), max_length=20, n_repeat=3)
    context = embedder.encode(PROMPTS)
    assert context.shape == (3, 3, 24)
    assert torch.equal(context[:, 2], embedder(PROMPTS))


def test_image_embeddings_are_those_of_transformers(folder):
    embedder = FrozenClipImageEmbedder(str(folder))
    pictures = tensor("pictures", 2, 3, 28, 28).clamp(-1, 1)
    normalised = ((pictures + 1) / 2 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    with torch.no_grad():
        expected = features(CLIPModel.from_pretrained(folder).eval().get_image_features(normalised))
    assert_agrees(embedder(pictures), expected)


@pytest.mark.parametrize("size", [(90, 60), (60, 90), (300, 113), (20, 20), (56, 56)])
def test_images_are_prepared_as_by_transformers(size):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    theirs = CLIPImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, do_rescale=False, do_normalize=False
    )
    expected = theirs(image, return_tensors="np")["pixel_values"][0]
    assert_agrees((crop_to_square(image, 28)[0] + 1) * 127.5, expected)


def test_public_names_are_where_configs_look_for_them():
    assert modules.FrozenCLIPTextEmbedder is FrozenCLIPTextEmbedder
    assert modules.FrozenClipImageEmbedder is FrozenClipImageEmbedder


def test_half_precision_files_compute_in_full(folder, tmp_path):
    CLIPModel.from_pretrained(folder).half().save_pretrained(tmp_path)
    assert {parameter.dtype for parameter in load_clip(str(tmp_path)).parameters()} == {torch.float32}


def test_the_repositorys_own_place_comes_first(folder, tmp_path, monkeypatch):
    place = tmp_path / "models" / "clip-vit-large-patch14"
    place.parent.mkdir()
    place.symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    assert load_clip("ViT-L/14").config.projection_dim == 24


def test_missing_weights_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    wanted = r"download config.json and model.safetensors of openai/clip-vit-large-patch14.*--clip FOLDER"
    with pytest.raises(
        FileNotFoundError, match=f"models/clip-vit-large-patch14 or in the Hugging Face cache: {wanted}"
    ):
        load_clip()
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/no .*: {wanted}"):
        load_clip(str(tmp_path / "no"))


def test_other_files_are_refused(folder, tmp_path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ValueError, match="holds no CLIP that transformers can load"):
        load_clip(str(tmp_path))
    weights = load_file(folder / "model.safetensors")
    del weights["text_projection.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"incomplete CLIP: 1 weights are missing, such as text_projection\.weight"):
        load_clip(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(ValueError, match="holds no CLIP that transformers can load"):
        load_clip(str(tmp_path))


def test_towers_with_other_tokens_are_refused(tmp_path):
    with pytest.raises(ValueError, match="the tokenizer has 49408 ids, the text tower only 99"):
        FrozenCLIPTextEmbedder(str(write_clip(tmp_path, width=16, vocab_size=99)))


def test_photos_are_cropped_at_the_center(tmp_path):
    image = Image.new("RGB", (90, 30), "black")
    image.paste((255, 255, 255), (30, 0, 60, 30))
    image.save(tmp_path / "photo.png")
    assert crop_to_square(load_image(tmp_path / "photo.png"), 30).min() == 1.0
