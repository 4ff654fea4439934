"""How several processes share the work."""

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
    """Lightning's strategy of that name, set up for models of this kind.

    Raises ValueError for a model with running averages under "fsdp": they are whole copies of weights that lie in
    pieces there.
    """
    if name == "ddp":
        return DDPStrategy(find_unused_parameters=find_unused_parameters)
    if name == "fsdp":
        if getattr(model, "use_ema", False):
            raise ValueError(
                "use_ema keeps whole copies of the weights, which fsdp divides: set model.params.use_ema=false, or use "
                "--strategy ddp"
            )
        if not model.automatic_optimization:
            raise ValueError(f"{type(model).__name__} has optimisers of its own, which fsdp cannot divide: use ddp")
        return Sharded(auto_wrap_policy=ModuleWrapPolicy({TimestepEmbedSequential}))
    return name


class Sharded(FSDPStrategy):
    """Lightning's FSDP, on CPUs as well.

    There Lightning names the device by its index, which a CPU has none of, and has torch move weights from the CPU to
    the CPU when it gathers them, which leaves them in memory that is given back.
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
        """Lightning's hook: all weights, on the first process."""
        if self.root_device.type != "cpu":
            return super().lightning_module_state_dict()
        with self._gathered() as model:
            return model.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Lightning's hook: its whole state, on the first process, by the numbers of its weights."""
        if self.root_device.type != "cpu":
            return super().optimizer_state(optimizer)
        with self._gathered() as model:
            state = FullyShardedDataParallel.optim_state_dict(model, getattr(optimizer, "_optimizer", optimizer))
        if self.global_rank:
            return state
        return FullyShardedDataParallel.rekey_optim_state_dict(state, OptimStateKeyType.PARAM_ID, model)

    @contextmanager
    def _gathered(self) -> Iterator[nn.Module]:
        assert self.model is not None  # Lightning has set it up
        with FullyShardedDataParallel.state_dict_type(
            self.model,
            StateDictType.FULL_STATE_DICT,
            FullStateDictConfig(offload_to_cpu=False, rank0_only=True),
            FullOptimStateDictConfig(offload_to_cpu=False, rank0_only=True),
        ):
            yield self.model
