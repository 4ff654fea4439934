"""What a model draws from, and which script does that."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ldm.models.diffusion.stages import CLASS_KEYS, TEXT_KEYS
from ldm.modules.encoders.modules import BERTEmbedder, SpatialRescaler

if TYPE_CHECKING:
    from ldm.models.diffusion.ddpm import LatentDiffusion


class Task(NamedTuple):
    """draws_from: in words. script: the one that does it."""

    draws_from: str
    script: str


TEXT = Task("text", "scripts/txt2img.py")
TEXT_AND_DEPTH = Task("text and a depth map", "scripts/img2img.py")
TEXT_AND_MASK = Task("text and a picture with a mask", "scripts/inpaint.py")
MASK = Task("a picture with a mask", "scripts/inpaint.py")
SMALL_PICTURE_AND_TEXT = Task("a small picture and text", "scripts/upscale.py")
SMALL_PICTURE = Task("a small picture", "scripts/upscale.py")
PICTURE = Task("a picture to vary", "scripts/variations.py")
NEIGHBOURS = Task("embeddings of text and neighbours", "scripts/knn2img.py")
NOTHING = Task("nothing but noise", "scripts/sample_diffusion.py")
CLASSES = Task("class labels", "scripts/sample_diffusion.py")
SEGMENTATION = Task("a segmentation map", "scripts/sample_diffusion.py")
LAYOUT = Task("a layout of boxes", "scripts/sample_diffusion.py")
OTHER = Task("a condition that no script knows", "a script of your own")

# Stable Diffusion's special models, by the names of their classes: a subclass draws as its parent does.
BY_CLASS = {
    "LatentInpaintDiffusion": TEXT_AND_MASK,
    "LatentDepth2ImageDiffusion": TEXT_AND_DEPTH,
    "LatentUpscaleDiffusion": SMALL_PICTURE_AND_TEXT,
    "ImageEmbeddingConditionedLatentDiffusion": PICTURE,
}


def task_of(model: LatentDiffusion) -> Task:
    """What `model` draws from, by its class, its conditioning key and its condition's encoder."""
    for parent in type(model).__mro__:
        if parent.__name__ in BY_CLASS:
            return BY_CLASS[parent.__name__]
    key, encoder, wants = model.model.conditioning_key, model.cond_stage_model, model.cond_stage_key
    if key is None:
        return NOTHING
    if wants in CLASS_KEYS:
        return CLASSES
    if key == "crossattn":
        if isinstance(encoder, BERTEmbedder) and encoder.tokenizer is None:
            return LAYOUT
        # the retrieval-augmented models' condition is made outside of them, and its key is "nix"
        return TEXT if wants in TEXT_KEYS and encoder is not None else NEIGHBOURS if wants == "nix" else OTHER
    if key == "concat":
        if encoder is model.first_stage_model:
            return MASK
        return SEGMENTATION if isinstance(encoder, SpatialRescaler) else SMALL_PICTURE
    return OTHER


def require(model: LatentDiffusion, *tasks: Task) -> Task:
    """The task of `model`; ValueError, naming both, if it is none of `tasks`."""
    found = task_of(model)
    if found in tasks:
        return found
    path, family = (
        (model.info.checkpoint_path, model.info.family) if model.info else ("the model", type(model).__name__)
    )
    *others, last = dict.fromkeys(task.draws_from for task in tasks)
    wanted = f"{', '.join(others)} or {last}" if others else last
    raise ValueError(
        f"{path} is {family}, which draws from {found.draws_from}, not from {wanted}: use {found.script} for it"
    )
