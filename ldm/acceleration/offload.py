"""Sample on a GPU of little memory: each part of a model is there only while it is used."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ldm.attach import Handle

if TYPE_CHECKING:
    from ldm.models.diffusion.ddpm import LatentDiffusion

SMALL = 2**24  # bytes up to which a part costs little: it moves to the device for good


class OffloadHook(Handle):
    """Moves one part of a model at a time to `device`: the part that is called, and the one before goes back.

    Weights on the CPU are not copied back, since sampling does not change them: they stay there, and cost memory of
    their own.
    """

    def __init__(self, parts: list[nn.Module], device: torch.device) -> None:
        super().__init__("offload")
        self.device = device
        self._on_device: nn.Module | None = None
        self._originals: list[tuple[dict[str, Tensor | None], str, Tensor]] = []  # where weights belong, on the CPU
        self._hooks = [
            submodule.register_forward_pre_hook(partial(self._on_call, part), prepend=True, with_kwargs=True)
            for part in parts
            for submodule in (part, *part.children())  # autoencoders are not called, only their children
        ]

    def _on_call(self, part: nn.Module, _: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Move `part` to the device, and the arguments with it."""
        if part is not self._on_device:
            self.unload()
            self._load(part)
        moved: tuple[Any, Any] = tree_map_only(Tensor, lambda x: x.to(self.device), (args, kwargs))
        return moved

    def _load(self, part: nn.Module) -> None:
        self._on_device = part
        moved: dict[int, Tensor] = {}  # weights that a part uses twice stay one
        for module in part.modules():
            for tensors in (cast("dict[str, Tensor | None]", module._parameters), module._buffers):
                for name, tensor in tensors.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in moved:
                        copied = tensor.detach().to(self.device)
                        is_parameter = isinstance(tensor, nn.Parameter)
                        moved[id(tensor)] = nn.Parameter(copied, requires_grad=False) if is_parameter else copied
                    self._originals.append((tensors, name, tensor))
                    tensors[name] = moved[id(tensor)]

    def unload(self) -> None:
        """Take the part that is on the device back to the CPU."""
        for tensors, name, tensor in self._originals:
            tensors[name] = tensor
        self._originals, self._on_device = [], None

    def remove(self) -> None:
        """Take everything back to the CPU, and stop moving parts."""
        self.unload()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        super().remove()


def offload(model: LatentDiffusion, device: torch.device) -> OffloadHook:
    """Sample from `model`, which is on the CPU, on `device`, with one part at a time there.

    `model.device` becomes `device`. Small parts move there for good. Call `unload` when sampling ends, and evaluate the
    network under one condition at a time (`sequential_guidance`), which takes less memory.
    """
    parts = dict(model.named_children())
    for name in parts:
        setattr(model, name, None)
    model.to(device)  # its own few numbers, and what it calls its device
    for name, part in parts.items():
        setattr(model, name, part)
    small = {name for name, part in parts.items() if size_of(part) <= SMALL and name != "model_ema"}
    for name in small:
        parts[name].to(device)
    return OffloadHook([part for name, part in parts.items() if name not in small], device)


@contextlib.contextmanager
def unload_afterwards(model: nn.Module) -> Iterator[None]:
    """Context that has no part of an offloaded model on the device at its end; any other model stays as it is."""
    try:
        yield
    finally:
        for handle in getattr(model, "acceleration", ()):
            if isinstance(handle, OffloadHook):
                handle.unload()


def size_of(part: nn.Module) -> int:
    """Return the bytes of a module's weights."""
    return sum(tensor.nbytes for tensor in (*part.parameters(), *part.buffers()))
