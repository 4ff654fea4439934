"""Drawing on a GPU of little memory: each part of a model is there only while it is used."""

from __future__ import annotations

from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

if TYPE_CHECKING:
    from ldm.models.diffusion.ddpm import LatentDiffusion

SMALL = 2**24  # bytes up to which a part is no burden: it moves in for good


class Lodging:
    """`device` for one part of a model at a time: whichever is called comes in, and the one before goes.

    Weights at home are not copied back, since drawing does not change them: they wait there, and cost memory of their
    own. As a context it has none there in the end.
    """

    def __init__(self, parts: list[nn.Module], device: torch.device) -> None:
        self.device = device
        self._there: nn.Module | None = None
        self._homes: list[tuple[dict[str, Tensor | None], str, Tensor]] = []  # where weights belong, and those at home
        for part in parts:
            for entrance in (part, *part.children()):  # autoencoders are not called, only what they are made of
                entrance.register_forward_pre_hook(partial(self._called, part), prepend=True, with_kwargs=True)

    def _called(self, part: nn.Module, _: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """What `part` is called with, where it now is."""
        if part is not self._there:
            self.leave()
            self._enter(part)
        moved: tuple[Any, Any] = tree_map_only(Tensor, lambda x: x.to(self.device), (args, kwargs))
        return moved

    def _enter(self, part: nn.Module) -> None:
        self._there = part
        moved: dict[int, Tensor] = {}  # weights that a part uses twice stay one
        for module in part.modules():
            # which of the two it was is kept below: a parameter's place gets a parameter
            for tensors in (cast("dict[str, Tensor | None]", module._parameters), module._buffers):
                for name, tensor in tensors.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in moved:
                        copied = tensor.detach().to(self.device)
                        whole = isinstance(tensor, nn.Parameter)
                        moved[id(tensor)] = nn.Parameter(copied, requires_grad=False) if whole else copied
                    self._homes.append((tensors, name, tensor))
                    tensors[name] = moved[id(tensor)]

    def leave(self) -> None:
        """Have the part that is there go home."""
        for tensors, name, tensor in self._homes:
            tensors[name] = tensor
        self._homes, self._there = [], None

    def __enter__(self) -> Lodging:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()


def lodge(model: LatentDiffusion, device: torch.device) -> LatentDiffusion:
    """Have `model`, which is on the CPU, draw on `device` in little memory; `model.device` says where that is.

    Its parts are there one at a time, and guidance asks the network under one condition at a time.
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
    model.lodging = Lodging([part for name, part in parts.items() if name not in small], device)
    model.one_by_one = True
    return model


def size_of(part: nn.Module) -> int:
    """Bytes of weights."""
    return sum(tensor.nbytes for tensor in (*part.parameters(), *part.buffers()))
