"""What a model is conditioned on, which script provides it, and the conditions of one sampling run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from ldm.models.diffusion.batches import CLASS_KEYS, TEXT_KEYS
from ldm.models.diffusion.guidance import Condition, condition_batch_size
from ldm.modules.encoders.modules import BERTEmbedder, SpatialRescaler
from ldm.modules.encoders.prompting import DEFAULT_PROMPT_OPTIONS, PromptOptions, encode_prompts

if TYPE_CHECKING:
    from ldm.models.diffusion.ddpm import LatentDiffusion

logger = logging.getLogger(__name__)


class Task(NamedTuple):
    """What a model is conditioned on, in words, and the script for it."""

    condition: str
    script: str


TEXT = Task("text", "scripts/txt2img.py")
TEXT_AND_DEPTH = Task("text and a depth map", "scripts/img2img.py")
TEXT_AND_MASK = Task("text and an image with a mask", "scripts/inpaint.py")
MASK = Task("an image with a mask", "scripts/inpaint.py")
SMALL_IMAGE_AND_TEXT = Task("a small image and text", "scripts/upscale.py")
SMALL_IMAGE = Task("a small image", "scripts/upscale.py")
IMAGE = Task("an image to vary", "scripts/variations.py")
NEIGHBORS = Task("embeddings of text and neighbors", "scripts/knn2img.py")
NOTHING = Task("nothing but noise", "scripts/sample_diffusion.py")
CLASSES = Task("class labels", "scripts/sample_diffusion.py")
SEGMENTATION = Task("a segmentation map", "scripts/sample_diffusion.py")
LAYOUT = Task("a layout of boxes", "scripts/sample_diffusion.py")
OTHER = Task("a condition that no script provides", "a script of your own")

# Stable Diffusion's special models, by class name: subclasses are conditioned as their parents are.
BY_CLASS = {
    "LatentInpaintDiffusion": TEXT_AND_MASK,
    "LatentDepth2ImageDiffusion": TEXT_AND_DEPTH,
    "LatentUpscaleDiffusion": SMALL_IMAGE_AND_TEXT,
    "ImageEmbeddingConditionedLatentDiffusion": IMAGE,
}


def task_of(model: LatentDiffusion) -> Task:
    """What `model` is conditioned on, by its class, conditioning key and condition encoder."""
    for parent in type(model).__mro__:
        if parent.__name__ in BY_CLASS:
            return BY_CLASS[parent.__name__]
    key, encoder, entry = model.model.conditioning_key, model.cond_stage_model, model.cond_stage_key
    if key is None:
        return NOTHING
    if entry in CLASS_KEYS:
        return CLASSES
    if key == "crossattn":
        if isinstance(encoder, BERTEmbedder) and encoder.tokenizer is None:
            return LAYOUT
        # the condition of retrieval-augmented models is made outside of them, and its key is "nix"
        return TEXT if entry in TEXT_KEYS and encoder is not None else NEIGHBORS if entry == "nix" else OTHER
    if key == "concat":
        if encoder is model.first_stage_model:
            return MASK
        return SEGMENTATION if isinstance(encoder, SpatialRescaler) else SMALL_IMAGE
    return OTHER


def require(model: LatentDiffusion, *tasks: Task) -> Task:
    """The task of `model`; ValueError, naming the script for it, if it is none of `tasks`."""
    found = task_of(model)
    if found in tasks:
        return found
    info = getattr(model, "info", None)
    path, family = (info.checkpoint_path, info.family) if info else ("the model", type(model).__name__)
    *others, last = dict.fromkeys(task.condition for task in tasks)
    wanted = f"{', '.join(others)} or {last}" if others else last
    raise ValueError(
        f"{path} is {family}, which is conditioned on {found.condition}, not on {wanted}: use {found.script} for it"
    )


@dataclass(frozen=True)
class Conditioning:
    """What one sampling run is conditioned on, and what it starts from.

    Attributes:
        cond: Condition of the network: a tensor, or a dict with c_concat, c_crossattn, c_adm.
        uncond: The unconditional one for guidance; None without guidance.
        shape: (B, C, h, w) of the latents; None: from the options' size.
        start: Latents (B, C, h, w) to start from instead of noise.
        init: Latents (B, C, h, w) to start from under noise (SDEdit), or known data outside a mask.
        strength: Fraction of the schedule to apply to `init`.
        mask: (1, 1, h, w), 1 where latents stay those of `init`.
    """

    cond: Condition
    uncond: Condition = None
    shape: Sequence[int] | None = None
    start: Tensor | None = None
    init: Tensor | None = None
    strength: float = 1.0
    mask: Tensor | None = None

    @property
    def batch_size(self) -> int:
        """Number of images."""
        if self.init is not None:
            return len(self.init)
        size = self.shape[0] if self.shape else condition_batch_size(self.cond)
        if size is None:
            raise ValueError("a Conditioning without tensors needs a shape")
        return size

    def with_parts(
        self, c_concat: Tensor | None = None, c_adm: Tensor | None = None, uncond_adm: Tensor | None = None
    ) -> Conditioning:
        """Add c_concat and c_adm. They apply to cond and uncond alike, unless uncond_adm is given."""
        without = c_adm if uncond_adm is None else uncond_adm
        uncond = None if self.uncond is None else _hybrid(self.uncond, c_concat, without)
        return replace(self, cond=_hybrid(self.cond, c_concat, c_adm), uncond=uncond)


def _hybrid(context: Condition, c_concat: Tensor | None, c_adm: Tensor | None) -> dict[str, Any]:
    parts = {"c_crossattn": [context], "c_concat": None if c_concat is None else [c_concat], "c_adm": c_adm}
    return {name: part for name, part in parts.items() if part is not None}


# ---- prompts ----


def text_condition(
    model: LatentDiffusion,
    prompts: Sequence[str],
    negative_prompt: str | Sequence[str] = "",
    guided: bool = True,
    prompt_options: PromptOptions = DEFAULT_PROMPT_OPTIONS,
) -> Conditioning:
    """Encode prompts (B, L, D), and negative prompts if guidance needs them; both get the same length L.

    Args:
        model: A text-conditional model.
        prompts: At least one.
        negative_prompt: One for all, or one per prompt.
        guided: Whether guidance needs the negative prompts.
        prompt_options: How to read prompts.
    """
    if isinstance(prompts, str) or not prompts:
        raise ValueError("prompts must be a list of at least one text")
    negatives = negative_prompts(negative_prompt, len(prompts))
    if not guided and any(negatives):
        logger.warning("the negative prompt has no effect at scale 1, which is without guidance")
    distinct = list(dict.fromkeys(negatives)) if guided else []  # equal negative prompts are encoded once
    groups = [list(prompts), distinct] if distinct else [list(prompts)]
    if prompt_options == DEFAULT_PROMPT_OPTIONS:
        contexts = [model.get_learned_conditioning(group) for group in groups]
    else:
        contexts = encode_prompts(model.cond_stage_model, groups, prompt_options)
    uncond = contexts[1][[distinct.index(text) for text in negatives]] if distinct else None
    return Conditioning(contexts[0], uncond)


def negative_prompts(negative_prompt: str | Sequence[str], count: int) -> list[str]:
    """One negative prompt per image, from one for all or from `count` of them."""
    if isinstance(negative_prompt, str):
        return [negative_prompt] * count
    if len(negative_prompt) != count:
        raise ValueError(f"there are {len(negative_prompt)} negative prompts for {count} prompts: give one, or {count}")
    return list(negative_prompt)
