"""Strategies for several processes: DDP, and FSDP that also works on CPUs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.strategies import DDPStrategy, FSDPStrategy, Strategy
from torch import nn
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    FullyShardedDataParallel,
    OptimStateKeyType,
    StateDictType,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.optim import Optimizer

from ldm.modules.diffusionmodules.openaimodel import TimestepEmbedSequential


def choose_strategy(name: str, model: pl.LightningModule, find_unused_parameters: bool = False) -> str | Strategy:
    """Lightning's strategy of that name, configured for a model.

    Raises ValueError for "fsdp" with a model that keeps EMA weights or optimizes manually: neither can be sharded.
    """
    if name == "ddp":
        return DDPStrategy(find_unused_parameters=find_unused_parameters)
    if name == "fsdp":
        if getattr(model, "use_ema", False):
            raise ValueError(
                "use_ema keeps complete copies of the weights, which fsdp shards: set model.params.use_ema=false, or "
                "use --strategy ddp"
            )
        if not model.automatic_optimization:
            raise ValueError(
                f"{type(model).__name__} steps its own optimizers, which fsdp cannot shard: use --strategy ddp"
            )
        return CPUCapableFSDP(auto_wrap_policy=ModuleWrapPolicy({TimestepEmbedSequential}))
    return name


class CPUCapableFSDP(FSDPStrategy):
    """Lightning's FSDP, on CPUs as well.

    Lightning passes the device by its index, which a CPU has none of, and gathers weights with offloading to the CPU,
    which on a CPU leaves them in memory that is freed.
    """

    def _setup_model(self, model: nn.Module) -> nn.Module:
        if self.root_device.type != "cpu":
            return super()._setup_model(model)
        return FullyShardedDataParallel(
            model,
            device_id=self.root_device,
            mixed_precision=self.mixed_precision_config,
            sharding_strategy=self.sharding_strategy,
            **self.kwargs,
        )

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """All weights, on the first process."""
        if self.root_device.type != "cpu":
            return super().lightning_module_state_dict()
        with self._gathered() as model:
            return model.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The complete state of an optimizer, on the first process, by parameter number."""
        if self.root_device.type != "cpu":
            return super().optimizer_state(optimizer)
        with self._gathered() as model:
            state = FullyShardedDataParallel.optim_state_dict(model, getattr(optimizer, "_optimizer", optimizer))
        if self.global_rank:
            return state
        return FullyShardedDataParallel.rekey_optim_state_dict(state, OptimStateKeyType.PARAM_ID, model)

    @contextmanager
    def _gathered(self) -> Iterator[nn.Module]:
        assert self.model is not None
        with FullyShardedDataParallel.state_dict_type(
            self.model,
            StateDictType.FULL_STATE_DICT,
            FullStateDictConfig(offload_to_cpu=False, rank0_only=True),
            FullOptimStateDictConfig(offload_to_cpu=False, rank0_only=True),
        ):
            yield self.model
