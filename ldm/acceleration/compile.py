"""Compile a network's repeated blocks for GPUs (`torch.compile`)."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ldm.attach import Handle, Override, Priority
from ldm.modules.attention import BasicTransformerBlock
from ldm.modules.diffusionmodules.openaimodel import ResBlock

if TYPE_CHECKING:
    from ldm.models.diffusion.ddpm import LatentDiffusion

logger = logging.getLogger(__name__)

REPEATED = (BasicTransformerBlock, ResBlock)
METHODS = ("forward", "_forward", "attend")
VERSIONS = 64  # of one kind of block: Stable Diffusion's networks have some 15 shapes, and each size has its own


def compile_network(model: LatentDiffusion, backend: str = "inductor") -> Handle | None:
    """Compile the repeated blocks of a model's network at their first call.

    Blocks of one shape share their code, so that it takes a fraction of the time that the complete network would. Names
    in the state dict stay. torch keeps what it compiled on disk (TORCHINDUCTOR_CACHE_DIR) for the next run. Another
    image size, or batch size, compiles anew. A block that cannot be compiled is reported, and runs as it is.

    Returns:
        The handle; None where nothing is compiled: on a CPU, where the kernels of `accelerate` are faster than what
        comes out, and for networks without such blocks.
    """
    if model.device.type == "cpu" and backend == "inductor":
        logger.warning("--compile has no effect on a CPU, where compiled networks are slower than this one is as it is")
        return None
    blocks = [part for part in model.model.modules() if isinstance(part, REPEATED)]
    if not blocks:
        logger.warning("--compile has no effect: this network has no blocks that repeat")
        return None
    import torch._dynamo  # takes a second

    # torch counts versions by class, and would silently leave off at the ninth shape that a network has of one block
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VERSIONS)
    torch._dynamo.config.skip_nnmodule_hook_guards = False  # or hooks on layers would have no effect from then on
    for block in blocks:
        block.compile(backend=backend, dynamic=False)
    first_call = _FirstCall(model.model, blocks).attach()
    return Handle("compile", [first_call], on_remove=lambda: _uncompile(blocks))


def _uncompile(blocks: Sequence[nn.Module]) -> None:
    for block in blocks:
        block._compiled_call_impl = None  # as it was before `compile`


class _FirstCall(Override):
    """Override of the network that reports what takes so long at its first call, and goes on if it does not work.

    It also has blocks compiled anew where a method has been replaced on a class, which torch does not notice.
    """

    priority = Priority.COMPILE
    done = True  # in copies
    kinds: Sequence[type] = ()
    methods: Sequence[Any] = ()

    def __init__(self, network: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__(network)
        self.blocks = blocks
        self.done = False
        self.kinds = list({type(part): None for block in blocks for part in block.modules()})
        self.methods = self._methods()

    def _methods(self) -> Sequence[Any]:
        return [getattr(kind, name, None) for kind in self.kinds for name in METHODS]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the network, and then only pass calls on."""
        if (methods := self._methods()) != self.methods:
            self.methods = methods
            torch.compiler.reset()
        if self.done:
            return self.original(*args, **kwargs)
        from torch._dynamo.exc import TorchDynamoException

        self.done = True
        logger.info("compiling the network, which takes up to some minutes at the first run ...")
        start = time.monotonic()
        try:
            output = self.original(*args, **kwargs)
        except TorchDynamoException as error:
            _uncompile(self.blocks)
            logger.warning("cannot compile (%s): going on without", " ".join(str(error).split("\n")[:2]))
            return self.original(*args, **kwargs)
        logger.info("compiled and ran the network once in %.0f s", time.monotonic() - start)
        return output
