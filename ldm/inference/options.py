"""One record of everything that determines an image besides the model and the prompt."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

from ldm.acceleration import AccelerationOptions
from ldm.models.diffusion.guidance import CFG_PP_SCALE, Guidance
from ldm.models.diffusion.noise import (
    GeneratorNoise,
    InterpolatedNoise,
    NoiseSource,
    PerImageNoise,
    SeededNoise,
    global_noise,
)
from ldm.models.model_info import ModelInfo, SamplingDefaults
from ldm.modules.encoders.prompting import PromptOptions
from ldm.util import suggestion

SEED_MODES = ("batch", "image")
NOISE_DEVICES = ("model", "cpu")
SEED_LIMIT = 2**32  # seeds wrap around to 0 here
DEFAULT_STEPS = 50
DEFAULT_SAMPLER = "ddim"


@dataclass(frozen=True)
class SeedOptions:
    """Where the noise of images comes from.

    Attributes:
        seed: One seed for the batch, or one per image; None continues torch's global generators.
        seed_mode: "batch", as published: images share one stream of noise. "image": image i of a run has seed
            `seed + i`, and is the same alone or in any batch, on any device.
        noise_device: In mode "batch", "model" generates noise on the model's device, as published; "cpu" gives the
            same noise on every device.
        variation_seed: Image i varies towards the noise of `variation_seed + i`. In mode "image" all images then vary
            `seed` itself.
        variation_strength: How far: 0 is the noise of `seed`, 1 that of the variation seed (`slerp` in between).
        fixed_code: Start every batch of a run from the same noise.
    """

    seed: int | Sequence[int] | None = None
    seed_mode: str = "batch"
    noise_device: str = "model"
    variation_seed: int = 0
    variation_strength: float = 0.0
    fixed_code: bool = False

    def __post_init__(self) -> None:
        for name, value in list(vars(self).items()):
            object.__setattr__(self, name, _own(value))
        check_whole("seed", self.seed if isinstance(self.seed, Sequence) else [self.seed])
        check_whole("variation_seed", [self.variation_seed])
        check_flag("fixed_code", self.fixed_code)
        choices = (("seed_mode", self.seed_mode, SEED_MODES), ("noise_device", self.noise_device, NOISE_DEVICES))
        for name, value, known in choices:
            if value not in known:
                raise ValueError(f"{name} {value!r} is not one of {', '.join(known)}")
        if not 0 <= self.variation_strength <= 1:
            raise ValueError(f"variation_strength must be from 0 to 1, not {self.variation_strength:g}")

    @property
    def per_image(self) -> bool:
        """Whether each image has a generator of its own."""
        return self.seed_mode == "image" or isinstance(self.seed, Sequence)

    def shared_noise(self) -> NoiseSource:
        """The stream of noise that all batches of a run in mode "batch" continue."""
        if self.seed is None or isinstance(self.seed, Sequence):
            return global_noise
        return GeneratorNoise(self.seed) if self.noise_device == "cpu" else SeededNoise(self.seed)

    def noise(self, count: int, first: int = 0, shared: NoiseSource | None = None) -> NoiseSource:
        """Noise for one batch.

        Args:
            count: Images in the batch.
            first: Index of its first image in the run.
            shared: The run's `shared_noise`; None starts a new one.
        """
        rows = self._rows(first, count)
        if self.per_image:
            return self._varied(PerImageNoise(self._seeds(rows)), rows)
        shared = shared or self.shared_noise()
        return shared if self.fixed_code else self._varied(shared, rows)  # a fixed start has the variation already

    def start(self, count: int, shared: NoiseSource) -> NoiseSource:
        """Noise for the latent that every batch of mode "batch" starts from with `fixed_code`."""
        return self._varied(shared, range(count))

    def image_settings(self, first: int, count: int) -> list[dict[str, Any]]:
        """Metadata of each image of a batch that reproduce it; None: has no effect on this image."""
        return [self._settings(row, index) for index, row in enumerate(self._rows(first, count))]

    def _settings(self, row: int, index: int) -> dict[str, Any]:
        settings: dict[str, Any] = {"seed": self.seed}
        if self.per_image:
            seed = self._seeds(range(row, row + 1))[0] if isinstance(self.seed, int) else self._seeds([])[index]
            settings = {"seed": seed, "seed_mode": "image", "batch_size": None, "index": None}
        elif self.noise_device != "model":
            settings["noise_device"] = self.noise_device
        if self.variation_strength:
            settings["variation_seed"] = (self.variation_seed + row) % SEED_LIMIT
            settings["variation_strength"] = self.variation_strength
        return settings

    def _rows(self, first: int, count: int) -> range:
        return range(count) if self.fixed_code else range(first, first + count)

    def _seeds(self, rows: Sequence[int]) -> list[int]:
        if isinstance(self.seed, Sequence):
            return list(self.seed)
        seed = self.seed or 0
        return [seed if self.variation_strength else (seed + row) % SEED_LIMIT for row in rows]

    def _varied(self, source: NoiseSource, rows: range) -> NoiseSource:
        if not self.variation_strength:
            return source
        seeds = [(self.variation_seed + row) % SEED_LIMIT for row in rows]
        return InterpolatedNoise(source, PerImageNoise(seeds), self.variation_strength)


@dataclass(frozen=True)
class SamplingOptions(SeedOptions):
    """Options of a sampling run. None: the model's own default, else the published one (see `resolve`).

    Attributes:
        steps: Number of sampling steps.
        sampler: A name in `SAMPLERS`.
        schedule: A name in `SCHEDULES`, or timesteps.
        eta: Noise of each DDIM step (0: none, 1: as much as DDPM). Above 0 selects DDIM.
        scale: Guidance scale, 1 for no guidance; several are interpolated over the steps.
        terms: Strengths of further guidance terms, such as {"rescale": 0.7}.
        interval: (low, high): apply guidance only while low < sigma <= high.
        cfg_pp: Use CFG++.
        negative_prompt: What images should not show: one for all, or one per prompt.
        emphasis, long_prompt, clip_skip: See `PromptOptions`.
        height, width: Size in pixels.
        tiling: "x", "y" or "both": images that repeat without a seam.
        acceleration: Speed for quality, off by default.
    """

    steps: int | None = None
    sampler: str | None = None
    schedule: str | Sequence[float] | None = None
    eta: float = 0.0
    scale: float | Sequence[float] | None = None
    terms: Mapping[str, float] = field(default_factory=dict)
    interval: Sequence[float] | None = None
    cfg_pp: bool = False
    negative_prompt: str | Sequence[str] = ""
    emphasis: bool = False
    long_prompt: bool = False
    clip_skip: int = 1
    height: int | None = None
    width: int | None = None
    tiling: str | None = None
    acceleration: AccelerationOptions = AccelerationOptions()

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steps", "clip_skip", "height", "width"):
            check_whole(name, [getattr(self, name)])
        for name in ("cfg_pp", "emphasis", "long_prompt"):
            check_flag(name, getattr(self, name))

    @classmethod
    def of(cls, options: SamplingOptions | None = None, **overrides: Any) -> SamplingOptions:
        """`options` with `overrides`, fields by name; None is no override.

        `guidance`, a `Guidance` or a mapping with `terms`, `interval`, `cfg_pp` and `scale`, and `prompt_options` stand
        for their fields; fields given by themselves win.

        Raises:
            ValueError: for names that are not fields, and for a `guidance` of another type.
        """
        guidance, prompt_options = overrides.pop("guidance", None), overrides.pop("prompt_options", None)
        known = [option.name for option in fields(cls)]
        if unknown := [name for name in overrides if name not in known]:
            meant = suggestion(unknown[0], known)
            hint = f", did you mean {meant!r}?" if meant else ";"
            raise ValueError(f"unknown option {unknown[0]!r}{hint} the options are {', '.join(known)}")
        given = {} if guidance is None else _guidance_fields(guidance)
        given |= {} if prompt_options is None else vars(prompt_options)
        given |= {name: value for name, value in overrides.items() if value is not None}
        if "terms" in given:
            given["terms"] = dict(given["terms"])
        return replace(options or cls(), **given)

    def resolve(
        self, info: ModelInfo | None = None, *, default_scale: float = 7.5, default_steps: int = DEFAULT_STEPS
    ) -> SamplingOptions:
        """Fill in what is None: steps, sampler, scale and schedule. Resolving twice changes nothing.

        Args:
            info: What the model knows about itself.
            default_scale, default_steps: Published defaults, for models without their own.
        """
        own = info.sampling if info else SamplingDefaults()
        return replace(
            self,
            steps=_first(self.steps, own.steps, default_steps),
            sampler=_first(self.sampler, "ddim" if self.eta else None, own.sampler, DEFAULT_SAMPLER),
            scale=_first(self.scale, CFG_PP_SCALE if self.cfg_pp else None, own.scale, default_scale),
            schedule=_first(self.schedule, own.schedule),
        )

    @cached_property
    def guidance(self) -> Guidance:
        """The guidance of resolved options. ValueError for what does not go together."""
        if self.scale is None:
            raise ValueError("the guidance scale is not known yet: resolve the options first")
        return Guidance(self.scale, self.interval, self.cfg_pp, self.terms or ())

    @property
    def prompt_options(self) -> PromptOptions:
        """How prompts are read."""
        return PromptOptions(self.emphasis, self.long_prompt, self.clip_skip)

    def metadata(self) -> dict[str, Any]:
        """Settings for the metadata of an image, without those at their defaults that no older file names."""
        settings: dict[str, Any] = {"steps": self.steps, "sampler": self.sampler, "eta": self.eta, "scale": self.scale}
        if self.sampler != "ddim" and not self.eta:
            del settings["eta"]  # this sampler has none
        terms = ", ".join(f"{name}={strength:g}" for name, strength in self.terms.items())
        interval = list(self.interval) if self.interval else None
        optional = {"schedule": self.schedule, "guidance": terms, "guidance_interval": interval, "cfg_pp": self.cfg_pp}
        optional |= changed(self.prompt_options) | {"tiling": self.tiling} | changed(self.acceleration)
        return settings | {name: value for name, value in optional.items() if value}


def _guidance_fields(guidance: Any) -> dict[str, Any]:
    names = [option.name for option in fields(Guidance)]
    if isinstance(guidance, Guidance):
        return {name: value for name in names if (value := getattr(guidance, name)) is not None}
    if not isinstance(guidance, Mapping) or not set(guidance) <= set(names):
        raise ValueError(f"guidance must be a Guidance or a mapping with some of {', '.join(names)}, not {guidance!r}")
    return {name: value for name, value in guidance.items() if value is not None}


def _own(value: Any) -> Any:
    """A copy of a value that could change later; arrays and tensors as Python's numbers."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, list) else value


def check_whole(name: str, values: Iterable[Any]) -> None:
    """Raise ValueError unless all `values` are whole numbers or None."""
    for value in values:
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise ValueError(f"{name} must be a whole number, not {value!r}")


def check_flag(name: str, value: Any) -> None:
    """Raise ValueError unless `value` is true or false."""
    if value not in (True, False):
        raise ValueError(f"{name} must be True or False, not {value!r}")


def changed(options: Any) -> dict[str, Any]:
    """The fields of a dataclass that differ from their defaults."""
    return {f.name: value for f in fields(options) if (value := getattr(options, f.name)) != f.default}


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)
