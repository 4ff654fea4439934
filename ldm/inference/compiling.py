"""Networks compiled for drawing (`torch.compile`)."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch._dynamo
from torch import nn
from torch._dynamo.exc import TorchDynamoException

from ldm.modules.attention import BasicTransformerBlock
from ldm.modules.diffusionmodules.openaimodel import ResBlock

if TYPE_CHECKING:
    from ldm.models.diffusion.ddpm import LatentDiffusion

logger = logging.getLogger(__name__)

REPEATED = (BasicTransformerBlock, ResBlock)  # what networks are made of, over and over
VERSIONS = 64  # of one kind of block: Stable Diffusion's networks have some 15 shapes, and each size has its own


def compile_network(model: LatentDiffusion, backend: str = "inductor") -> bool:
    """Have the network of `model` compile its repeated blocks at their first call; whether it will.

    Blocks of one shape share their code, so that it takes a fraction of the time that the whole network would. Names in
    the state dict stay. torch keeps what it compiled on disk (TORCHINDUCTOR_CACHE_DIR), for the next run. Another size
    of picture, or batch, compiles anew. A block that cannot be compiled is said, and computed as it is.

    On a CPU nothing is compiled: the layers' own kernels (see `ldm.modules.layout`) are quicker than what comes out.
    """
    if model.device.type == "cpu" and backend == "inductor":
        logger.warning("--compile has no effect on a CPU, where compiled networks are slower than this one is as it is")
        return False
    blocks = [part for part in model.model.modules() if isinstance(part, REPEATED)]
    if not blocks:
        logger.warning("--compile has no effect: this network has no blocks that repeat")
        return False
    # torch counts versions by class, and would silently leave off at the ninth shape that a network has of one block
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VERSIONS)
    for block in blocks:
        block.compile(backend=backend, dynamic=False)
    _Compiles(model.model, blocks)
    return True


class _Compiles:
    """At a network's first call, says what takes so long; goes on without the compiler if that does not work."""

    def __init__(self, network: nn.Module, blocks: Sequence[nn.Module]) -> None:
        self.network, self.blocks, self.forward = network, blocks, network.forward
        network.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        del self.network.forward  # it is the class's again
        logger.info("compiling the network, which takes up to some minutes at the first run ...")
        began = time.monotonic()
        try:
            output: torch.Tensor = self.forward(*args, **kwargs)
        except TorchDynamoException as error:
            for block in self.blocks:
                block._compiled_call_impl = None  # as it was before `compile`
            reason = " ".join(str(error).split("\n")[:2])
            logger.warning("cannot compile (%s): going on without", reason)
            output = self.forward(*args, **kwargs)
            return output
        logger.info("compiled, and asked for the first time, in %.0f s", time.monotonic() - began)
        return output
