"""How a network is handed its condition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.util import instantiate_from_config

CONDITIONING_KEYS = (None, "concat", "crossattn", "hybrid", "adm", "hybrid-adm", "crossattn-adm")


class DiffusionWrapper(nn.Module):
    """Hands a network its condition in the way that `conditioning_key` names."""

    def __init__(self, diff_model_config: Mapping[str, Any], conditioning_key: str | None) -> None:
        super().__init__()
        if conditioning_key not in CONDITIONING_KEYS:
            raise ValueError(
                f"conditioning_key {conditioning_key!r} is not one of {', '.join(map(str, CONDITIONING_KEYS))}"
            )
        self.diffusion_model: Any = instantiate_from_config(diff_model_config)
        self.conditioning_key = conditioning_key

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        c_concat: Sequence[Tensor] | None = None,
        c_crossattn: Sequence[Tensor] | None = None,
        c_adm: Tensor | None = None,
    ) -> Tensor:
        """x (B, C, H, W), t (B,), c_concat (B, C', H, W) each, c_crossattn (B, M, D) each, c_adm as the UNet's y."""
        key = self.conditioning_key
        inputs: dict[str, Tensor] = {}
        if key == "adm":  # published: a class-conditional network is handed its labels as the cross-attention list
            inputs["y"] = self._need(c_crossattn, "c_crossattn")[0]
        elif key is not None:
            if "hybrid" in key or key == "concat":
                x = torch.cat([x, *self._need(c_concat, "c_concat")], dim=1)
            if key != "concat":
                contexts = self._need(c_crossattn, "c_crossattn")
                # one stays the tensor that it is, so that a network can see that it is the same as before
                inputs["context"] = contexts[0] if len(contexts) == 1 else torch.cat(list(contexts), dim=1)
            if key.endswith("-adm"):
                inputs["y"] = self._need(c_adm, "c_adm")
        return self.diffusion_model(x, t, **inputs)

    def _need(self, value: Any, name: str) -> Any:
        if value is None:
            raise ValueError(f"conditioning_key {self.conditioning_key!r} needs {name!r} in the condition")
        return value
