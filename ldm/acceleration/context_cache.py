"""Keys and values of a context, computed once for all steps of a sampler."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ldm.acceleration.onednn import LINEAR, ChangeDetector, is_dense, is_transformed
from ldm.attach import Handle, Override, Priority
from ldm.modules.attention import CrossAttention

MAX_CONTEXTS = 3  # kept per layer: guidance evaluates without the condition, with it, and both in one batch


def cache_contexts(network: nn.Module) -> Handle:
    """Compute the keys and values of a context once in every `CrossAttention` of `network`.

    That is for the same tensor, unchanged and under the same weights, without gradients and in the calling thread;
    `torch.compile` ignores it. Meant for one run of a sampler: on a GPU, where comparing contents would mean waiting,
    a change of weights or contexts through `.data` is seen at the next run only.
    """
    overrides: list[Override] = []
    for part in network.modules():
        if isinstance(part, CrossAttention):
            attention = _CurrentContext(part)
            layers = [layer for layer in (part.to_k, part.to_v) if type(layer) is nn.Linear]
            overrides += [attention, *(_CachedProjection(layer, attention) for layer in layers)]
    return Handle("context cache", [override.attach() for override in overrides])


class _CurrentContext(Override):
    """Override of `CrossAttention` that tells the projections of keys and values which tensor is a context."""

    priority = Priority.CONTEXT_CACHE
    exact = True
    thread_local = True
    context: Tensor | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if not self.is_active():
            return self.original(*args, **kwargs)
        self.context = kwargs.get("context", args[1] if len(args) > 1 else None)
        try:
            return self.original(*args, **kwargs)
        finally:
            self.context = None


class _CachedProjection(Override):
    """Override of a linear layer that keeps its results for contexts."""

    priority = Priority.CONTEXT_CACHE
    thread_local = True
    state = ("attention",)

    def __init__(self, layer: nn.Module, attention: _CurrentContext) -> None:
        super().__init__(layer)
        self.attention = attention

    def reset(self) -> None:
        """Forget all results."""
        self.results: list[_Result] = []

    def __call__(self, input: Tensor) -> Tensor:  # (B, M, D) -> (B, M, inner)
        if not self.is_active() or input is not self.attention.context or not self._can_cache(input):
            return self.original(input)
        weights = tuple(self.module.parameters())
        for result in self.results:
            if result.is_for(input, weights):
                return result.output
        output = self.original(input)
        self.results = [*self.results[1 - MAX_CONTEXTS :], _Result(input, weights, output)]
        return output

    def _can_cache(self, input: Tensor) -> bool:
        below = self.previous
        while isinstance(below, Override):
            below = below.previous
        tensors = (input, *self.module.parameters())
        return (
            below is None  # a foreign forward may compute something else every time
            and type(self.module) is nn.Linear
            and LINEAR.unmodified()
            and not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and not is_transformed()
            and not any(tensor.is_inference() for tensor in tensors)  # which may change unseen
        )


class _Result:
    """The output for a context under some weights, all of which it holds, so that their ids stay their own."""

    def __init__(self, context: Tensor, weights: tuple[Tensor, ...], output: Tensor) -> None:
        self.inputs = (context, *weights)
        self.output = output
        self._state = _state(self.inputs, output)
        self._contents = [
            ChangeDetector(tensor)
            for tensor in (*self.inputs, output)
            if tensor.is_cpu and tensor.dtype is torch.float32 and is_dense(tensor)
        ]

    def is_for(self, context: Tensor, weights: tuple[Tensor, ...]) -> bool:
        """Return whether nothing has changed: the tensors, their versions, autocast, a sample of their contents."""
        return (
            context is self.inputs[0]
            and self._state == _state((context, *weights), self.output)
            and all(content.matches(content.tensor) for content in self._contents)
        )


def _state(inputs: tuple[Tensor, ...], output: Tensor) -> list[Any]:
    device = inputs[0].device.type
    has_autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    autocast = torch.get_autocast_dtype(device) if has_autocast else None
    return [autocast, *((id(tensor), tensor.data_ptr(), tensor._version) for tensor in (*inputs, output))]
