"""The seeds of a run's pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ldm.models.diffusion.noise import InterpolatedNoise, NoiseSource, PerImageNoise, global_cpu_noise, global_noise

MODES = ("batch", "image")
DEVICES = ("model", "cpu")
LIMIT = 2**32  # seeds start again at 0 where they come to this


@dataclass(frozen=True)
class Seeding:
    """How the pictures of a run, counted from 0, come to their noise.

    mode: "batch", as published: a batch draws together, and goes on where the one before it ended. "image": picture i
    has the seed `seed` + i, and is the same alone or in any batch, on any device.
    device: where batches draw: on the model's, as published, or on the "cpu", which gives every device the same.
    variation_strength: how far to go from there to the noise of picture i's variation seed, `variation_seed` + i: 0
    stays, 1 arrives. All pictures of mode "image" then vary `seed` itself.
    every_batch: every batch starts as the first does; in mode "batch" from a latent drawn by `start`.
    """

    seed: int
    mode: str = "batch"
    device: str = "model"
    variation_seed: int = 0
    variation_strength: float = 0.0
    every_batch: bool = False

    def __post_init__(self) -> None:
        for name, value, choices in (("mode", self.mode, MODES), ("device", self.device, DEVICES)):
            if value not in choices:
                raise ValueError(f"{name} {value!r} is not one of {', '.join(choices)}")
        if not 0 <= self.variation_strength <= 1:
            raise ValueError(f"variation_strength must be from 0 to 1, not {self.variation_strength:g}")

    @property
    def per_image(self) -> bool:
        """Whether pictures know nothing of each other."""
        return self.mode == "image"

    def noise(self, first: int, count: int, seeds: Sequence[int] | None = None) -> NoiseSource:
        """Random numbers of one batch: `count` pictures, from the run's picture `first` on; seeds: those of their own.

        A source for this one batch: a picture's numbers go on from draw to draw.
        """
        rows = self._rows(first, count)
        if seeds is None and self.per_image:
            seeds = [self._seed(row) for row in rows]
        if seeds is None and self.every_batch:
            return self._together()  # the variation is in the start
        return self._varied(self._together() if seeds is None else PerImageNoise(seeds), rows)

    def start(self, count: int) -> NoiseSource:
        """What to draw the latent from that every batch of mode "batch" starts at."""
        return self._varied(self._together(), range(count))

    def settings(self, first: int, count: int) -> list[dict[str, Any]]:
        """Of each picture of that batch: what to know to draw it again. None: of no effect on it."""
        return [self._setting(row) for row in self._rows(first, count)]

    def _rows(self, first: int, count: int) -> range:
        return range(count) if self.every_batch else range(first, first + count)

    def _varied(self, source: NoiseSource, rows: range) -> NoiseSource:
        if not self.variation_strength:
            return source
        return InterpolatedNoise(source, PerImageNoise([self._variation(row) for row in rows]), self.variation_strength)

    def _together(self) -> NoiseSource:
        return global_cpu_noise if self.device == "cpu" else global_noise

    def _seed(self, row: int) -> int:
        return self.seed if self.variation_strength else (self.seed + row) % LIMIT

    def _variation(self, row: int) -> int:
        return (self.variation_seed + row) % LIMIT

    def _setting(self, row: int) -> dict[str, Any]:
        setting: dict[str, Any] = {"seed": self.seed}
        if self.per_image:
            setting = {"seed": self._seed(row), "seed_mode": "image", "batch_size": None, "index": None}
        elif self.device != "model":
            setting["noise_device"] = self.device
        if self.variation_strength:
            setting |= {"variation_seed": self._variation(row), "variation_strength": self.variation_strength}
        return setting
