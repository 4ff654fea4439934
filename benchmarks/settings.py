"""What to measure, as the command line says it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

V1 = "configs/stable-diffusion/v1-inference.yaml"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
WAYS = ("eager", "compile", "int8")  # of making a network ready: see `networks.build_ours`


@dataclass(frozen=True)
class Scan:
    """One point of what is scanned: precision (a name in DTYPES), pictures at once, pixels a side."""

    precision: str
    batch: int
    size: int

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and inputs."""
        return DTYPES[self.precision]


@dataclass(frozen=True)
class Settings:
    """All options of a benchmark; None is what `scans` and the suites say of it."""

    device: torch.device = torch.device("cpu")
    precisions: tuple[str, ...] = ("fp32",)
    batches: tuple[int, ...] | None = None
    sizes: tuple[int, ...] | None = None
    config: str = V1  # whose shapes
    ways: tuple[str, ...] = WAYS
    compare: bool = True
    repeats: int = 3
    warm_up: int = 1  # calls that are not counted, at least 1
    loop_steps: int | None = None
    peak: float | None = None  # operations a second; None: measured
    profile: bool = False
    ckpt: str | None = None
    cache: Path = Path("outputs/benchmark-cache")
    train: Mapping[str, Any] = field(default_factory=dict)  # see suites/train.py

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a CUDA GPU."""
        return self.device.type == "cuda"

    @cached_property
    def model_config(self) -> dict[str, Any]:
        """{"model": {"target": ..., "params": ...}} of `config`, as plain values."""
        from omegaconf import OmegaConf

        from ldm.inference import read_config

        plain: Any = OmegaConf.to_container(read_config(self.config), resolve=True)
        return plain

    @property
    def own_size(self) -> int:
        """Pixels a side that the config's model was made for."""
        params = self.model_config["model"]["params"]
        return params["image_size"] * self.factor

    @property
    def factor(self) -> int:
        """Pixels a latent."""
        ddconfig = self.model_config["model"]["params"]["first_stage_config"]["params"]["ddconfig"]
        return 2 ** (len(ddconfig["ch_mult"]) - 1)

    def scans(
        self,
        sizes: tuple[int, ...] | None = None,
        batches: tuple[int, ...] | None = None,
        only_size: int | None = None,
    ) -> Iterator[Scan]:
        """Every combination to measure; `sizes` and `batches` are a suite's own where the user names none.

        Without those it is the model's own size, and pictures one at a time, on a GPU by 8, too. only_size: of what
        has but one, whatever the user names.
        """
        sizes = (only_size,) if only_size else self.sizes or sizes or (self.own_size,)
        batches = self.batches or batches or ((1, 8) if self.on_gpu else (1,))
        for precision, size, batch in itertools.product(self.precisions, sizes, batches):
            yield Scan(precision, batch, size)

    def latent(self, size: int) -> int:
        """Latents a side of `size` pixels; ValueError if that does not fit."""
        if size % self.factor:
            raise ValueError(f"--size {size} does not fit: this model needs multiples of {self.factor}")
        return size // self.factor
