"""Prompts as a model's condition: what to draw, what to avoid, and how to read both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from ldm.modules.encoders.prompting import DEFAULT_PROMPT_OPTIONS, PromptOptions, encode_prompts

if TYPE_CHECKING:
    from ldm.models.diffusion.ddpm import LatentDiffusion

__all__ = ["DEFAULT_PROMPT_OPTIONS", "PromptOptions", "negative_prompts", "text_contexts"]


def negative_prompts(negative_prompt: str | Sequence[str], count: int) -> list[str]:
    """One negative prompt for each of `count` pictures, of one for all or of as many. ValueError for another number."""
    if isinstance(negative_prompt, str):
        return [negative_prompt] * count
    if len(negative_prompt) != count:
        raise ValueError(f"there are {len(negative_prompt)} negative prompts for {count} prompts: give one, or {count}")
    return list(negative_prompt)


def text_contexts(
    model: LatentDiffusion,
    prompts: Sequence[str],
    negatives: Sequence[str] | None,
    reading: PromptOptions = DEFAULT_PROMPT_OPTIONS,
) -> tuple[Tensor, Tensor | None]:
    """The encodings (B, L, D) of the prompts and of the negative prompts, if there are any; both of the same length.

    Equal negative prompts are encoded once.
    """
    distinct = list(dict.fromkeys(negatives or ()))
    groups = [list(prompts), distinct] if distinct else [list(prompts)]
    if reading == DEFAULT_PROMPT_OPTIONS:
        contexts = [model.get_learned_conditioning(group) for group in groups]
    else:
        contexts = encode_prompts(model.cond_stage_model, groups, reading)
    if negatives is None or not distinct:
        return contexts[0], None
    return contexts[0], contexts[1][[distinct.index(text) for text in negatives]]
