"""Exponential moving average of a module's weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LitEma(nn.Module):
    """Exponential moving average of a model's trainable weights, in buffers under the published names.

    Update n is average = decay_n * average + (1 - decay_n) * weight, with decay_n = min(decay, (1 + n) / (10 + n)).

    Args:
        model: the model to average.
        decay: from 0 to 1.
        use_num_upates: (spelled as published) False for `decay` at every update, without the ramp.
    """

    decay: Tensor
    num_updates: Tensor

    def __init__(self, model: nn.Module, decay: float = 0.9999, use_num_upates: bool = True) -> None:
        super().__init__()
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"decay must be between 0 and 1, not {decay}")
        self.register_buffer("decay", torch.tensor(decay, dtype=torch.float32, device="cpu"))
        updates = 0 if use_num_upates else -1
        self.register_buffer("num_updates", torch.tensor(updates, dtype=torch.int32, device="cpu"))
        self.m_name2s_name: dict[str, str] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                shadow = name.replace(".", "")  # buffer names cannot hold dots
                self.m_name2s_name[name] = shadow
                self.register_buffer(shadow, parameter.detach().clone())
        self._stored: list[Tensor] = []

    @torch.no_grad()
    def reset(self, model: nn.Module) -> None:
        """Set the averages to the model's present weights."""
        for parameter, shadow in self._pairs(model):
            shadow.copy_(parameter)

    def reset_num_updates(self) -> None:
        """Start the ramp of the decay again."""
        self.num_updates.zero_()

    def _pairs(self, model: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
        parameters = dict(model.named_parameters())
        return [(parameters[name], self.get_buffer(shadow)) for name, shadow in self.m_name2s_name.items()]

    @torch.no_grad()
    def forward(self, model: nn.Module) -> None:
        """Move the average towards the model's weights by one update."""
        decay = float(self.decay)
        if self.num_updates >= 0:
            self.num_updates += 1
            n = int(self.num_updates)
            decay = min(decay, (1 + n) / (10 + n))
        pairs = self._pairs(model)
        shadows = [shadow for _, shadow in pairs]
        # all weights in one call: one by one the launches take longer than the sums
        torch._foreach_lerp_(shadows, [parameter.to(shadow) for parameter, shadow in pairs], 1.0 - decay)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Overwrite the model's weights with the averages."""
        for parameter, shadow in self._pairs(model):
            parameter.copy_(shadow)

    @torch.no_grad()
    def swap(self, model: nn.Module) -> None:
        """Swap the model's weights and the averages without a copy; a second call swaps them back."""
        for parameter, shadow in self._pairs(model):
            parameter.data, shadow.data = shadow.data, parameter.data

    def store(self, parameters: list[nn.Parameter]) -> None:
        """Remember copies of `parameters` for `restore`."""
        self._stored = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def restore(self, parameters: list[nn.Parameter]) -> None:
        """Put back what `store` remembered."""
        parameters = list(parameters)
        if len(parameters) != len(self._stored):
            raise ValueError(f"restore got {len(parameters)} parameters, but store remembers {len(self._stored)}")
        for parameter, stored in zip(parameters, self._stored):
            parameter.copy_(stored)
