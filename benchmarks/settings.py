"""Settings of a benchmark, and the result of one measurement."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

V1 = "configs/stable-diffusion/v1-inference.yaml"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
MODES = ("eager", "compile", "int8")  # see `networks.prepare`


@dataclass(frozen=True)
class Scan:
    """One point to measure: precision (a name in DTYPES), batch size, pixels per side."""

    precision: str
    batch: int
    size: int

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of weights and inputs."""
        return DTYPES[self.precision]


@dataclass(frozen=True)
class Settings:
    """Options of a benchmark.

    Attributes:
        device: Where to compute.
        precisions: Names in DTYPES to scan.
        batches: Batch sizes to scan; None for the suite's own.
        sizes: Pixels per side to scan; None for the suite's own.
        config: Model config.
        modes: Modes of our UNet.
        compare: Whether to compare with diffusers and transformers.
        repeats: Measurements of each contender.
        warm_up: Calls that do not count, at least 1.
        loop_steps: Steps of the sampling loop; None for the default, 0 for no loop.
        peak: Peak operations per second; None to measure it.
        profile: Whether to profile.
        ckpt: Checkpoint to load.
        cache: Folder for generated checkpoints.
        train: Options of the training suite.
    """

    device: torch.device = torch.device("cpu")
    precisions: tuple[str, ...] = ("fp32",)
    batches: tuple[int, ...] | None = None
    sizes: tuple[int, ...] | None = None
    config: str = V1
    modes: tuple[str, ...] = MODES
    compare: bool = True
    repeats: int = 3
    warm_up: int = 1
    loop_steps: int | None = None
    peak: float | None = None
    profile: bool = False
    ckpt: str | None = None
    cache: Path = Path("outputs/benchmark-cache")
    train: Mapping[str, Any] = field(default_factory=dict)

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a CUDA GPU."""
        return self.device.type == "cuda"

    @cached_property
    def model_config(self) -> dict[str, Any]:
        """{"model": {"target": ..., "params": ...}} of `config` as plain values."""
        from omegaconf import OmegaConf

        from ldm.inference import read_config

        plain: Any = OmegaConf.to_container(read_config(self.config), resolve=True)
        return plain

    @property
    def native_size(self) -> int:
        """Pixels per side of the config's model."""
        return self.model_config["model"]["params"]["image_size"] * self.factor

    @property
    def factor(self) -> int:
        """Downsampling factor of the first stage."""
        ddconfig = self.model_config["model"]["params"]["first_stage_config"]["params"]["ddconfig"]
        return 2 ** (len(ddconfig["ch_mult"]) - 1)

    def scans(
        self,
        sizes: tuple[int, ...] | None = None,
        batches: tuple[int, ...] | None = None,
        only_size: int | None = None,
    ) -> Iterator[Scan]:
        """Iterate over all combinations of precision, size and batch.

        Args:
            sizes: The suite's default sizes; the model's own if None.
            batches: The suite's default batch sizes; 1, on a GPU also 8, if None.
            only_size: Fixed size, whatever the user asks for.
        """
        sizes = (only_size,) if only_size else self.sizes or sizes or (self.native_size,)
        batches = self.batches or batches or ((1, 8) if self.on_gpu else (1,))
        for precision, size, batch in itertools.product(self.precisions, sizes, batches):
            yield Scan(precision, batch, size)

    def latent(self, size: int) -> int:
        """Convert pixels to latents per side; ValueError unless divisible."""
        if size % self.factor:
            raise ValueError(f"--size {size} does not fit: this model needs multiples of {self.factor}")
        return size // self.factor


@dataclass
class Row:
    """Measurement of one contender (`who`) for one task (`what`).

    Attributes:
        seconds: Time of every repeat.
        first: Seconds of the first call, with compilation and weight packing.
        items: Number of `unit`s of work in a repeat.
        flops: Counted operations of a repeat.
        peak: Peak operations per second of the machine.
        memory: Peak bytes, on top of those before (of the whole process where `note` says so).
        ratios: Median ratio of times by other contender; below 1 is faster.
        psnr: PSNR in dB against the first contender's result; None if equal.
        error: Why there is no measurement.
    """

    suite: str
    what: str
    who: str
    device: str
    precision: str = ""
    batch: int | None = None
    size: int | None = None
    seconds: Sequence[float] = ()
    first: float | None = None
    items: float = 1
    unit: str = "it"
    flops: int | None = None
    peak: float | None = None
    memory: int | None = None
    ratios: Mapping[str, float] = field(default_factory=dict)
    psnr: float | None = None
    note: str = ""
    error: str | None = None

    @property
    def median(self) -> float | None:
        """Median of the seconds."""
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def spread(self) -> tuple[float, float] | None:
        """Least and greatest of the seconds."""
        return (min(self.seconds), max(self.seconds)) if self.seconds else None

    @property
    def utilization(self) -> float | None:
        """Fraction of the machine's peak."""
        return self.flops / self.median / self.peak if self.flops and self.peak and self.median else None

    @property
    def rate(self) -> float | None:
        """`unit`s per second."""
        return self.items / self.median if self.median else None

    def record(self) -> dict[str, Any]:
        """Return all values for JSON."""
        derived = ("median", "spread", "rate", "utilization")
        return asdict(self) | {name: getattr(self, name) for name in derived}


def row_of(suite: str, what: str, who: str, device: object, scan: Scan, **more: Any) -> Row:
    """Make a row of one point of a scan."""
    return Row(suite, what, who, str(device), scan.precision, scan.batch, scan.size, **more)
