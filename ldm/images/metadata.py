"""How a picture was made, as PNG files say it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

# Our names of settings, and what the A1111 web UI calls them. The order is the order of the text.
_PARAMETER_NAMES = {
    "steps": "Steps",
    "sampler": "Sampler",
    "schedule": "Schedule type",
    "scale": "CFG scale",
    "cfg_pp": "CFG++",
    "guidance": "Guidance",
    "guidance_interval": "Guidance interval",
    "eta": "Eta",
    "seed": "Seed",
    "size": "Size",
    "model": "Model",
    "strength": "Denoising strength",
    "seed_mode": "Seed mode",
    "variation_seed": "Variation seed",
    "variation_strength": "Variation seed strength",
    "noise_device": "RNG",
    "tiling": "Tiling",
    "clip_skip": "Clip skip",
    "batch_size": "Batch size",
    "index": "Image index",
    "version": "Version",
}
_SAMPLER_NAMES = {
    **{"ddim": "DDIM", "plms": "PLMS", "ddpm": "DDPM", "euler": "Euler", "euler_a": "Euler a", "heun": "Heun"},
    **{"dpm2": "DPM2", "lms": "LMS", "unipc": "UniPC", "dpm_solver": "DPM++ 2M", "dpmpp_2m": "DPM++ 2M"},
    **{"dpmpp_2m_sde": "DPM++ 2M SDE", "dpmpp_2s": "DPM++ 2S", "dpmpp_3m": "DPM++ 3M"},
}


def parameters_text(settings: Mapping[str, Any]) -> str:
    """How a picture was made, in the text form of the A1111 web UI, which other tools read too.

    Lines for `prompt` and, if it is not empty, `negative_prompt`, then one line of "Name: value" for the rest.
    """
    lines = [settings.get("prompt", "")]
    if settings.get("negative_prompt"):
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    values = {name: settings[key] for key, name in _PARAMETER_NAMES.items() if settings.get(key) is not None}
    if "Sampler" in values:
        values["Sampler"] = _SAMPLER_NAMES.get(values["Sampler"], values["Sampler"])
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in values.items()))
    return "\n".join(lines)


def _quoted(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r'[,:\n"]', text) else text


def png_metadata(settings: Mapping[str, Any]) -> dict[str, str]:
    """The text chunks for a picture made with `settings`: A1111's `parameters`, and all of it as JSON under `ldm`."""
    return {"parameters": parameters_text(settings), "ldm": json.dumps(dict(settings), ensure_ascii=False)}
