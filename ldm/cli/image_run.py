"""The loop over a run's batches, with seeds, resume, several processes, progress and previews."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ldm.cli.manifest import descriptions, image_settings
from ldm.cli.prompts import Batch
from ldm.cli.writing import SampleWriter
from ldm.distributed import SINGLE_PROCESS, DistributedContext

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor
    from tqdm import tqdm

    from ldm.inference import Pipeline, SamplingOptions
    from ldm.models.diffusion.ddpm import LatentDiffusion
    from ldm.models.diffusion.noise import NoiseSource

PREVIEW = "preview.png"


@dataclass(frozen=True)
class SamplingJob:
    """A batch to sample: its prompts, options, noise, and the metadata of each image."""

    prompts: list[str]
    options: SamplingOptions
    noise: NoiseSource
    settings: list[dict[str, Any]]


class ImageRun(SampleWriter):
    """Iterate over the batches that this process has to sample, and write their images.

        with ImageRun(args, pipe, options, batches, processes) as run:
            for batch in run:
                images = pipe(batch.prompts, batch.options, noise=batch.noise, on_step=run.progress, progress=False)
                run.save(batch, images)

    Batches of other processes and images that are there already (--resume) are passed over; their random numbers are
    used all the same, so that the others come out as in one uninterrupted run.

    Args:
        args: The command line.
        pipe: The pipeline.
        options: Resolved options of the run.
        batches: From `cli.batches`.
        processes: The processes among which batches are divided.
        **settings: Metadata of every image beside the options.
    """

    def __init__(
        self,
        args: Namespace,
        pipe: Pipeline,
        options: SamplingOptions,
        batches: Sequence[Batch],
        processes: DistributedContext = SINGLE_PROCESS,
        **settings: Any,
    ) -> None:
        own = len(batches[processes.rank :: processes.world_size])
        self.progress = Progress(args, pipe.model, own, shown=processes.rank == 0)
        super().__init__(args, options, processes, model=model_name(pipe.model), **settings)
        self.pipe, self.options = pipe, options
        self.noise = options.shared_noise()  # continued by all batches in --seed_mode batch
        self._batches = batches

    def __enter__(self) -> ImageRun:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.close()
        super().__exit__(kind, error, trace)

    def __iter__(self) -> Iterator[SamplingJob]:
        return self.batches()

    def batches(self, init: Tensor | None = None, strength: float = 1.0, **determines: Any) -> Iterator[SamplingJob]:
        """The batches to sample.

        Args:
            init: The latents (B, C, h, w) that images start from, if not from noise.
            strength: Of image to image.
            **determines: What else determines the images, for the manifest (see `manifest.descriptions`).
        """
        if self._args.resume:
            self.resume(descriptions(self._args, self.pipe.model, self.options, self._batches, **determines))
        start, first = self._fixed_start(), 0
        for number, batch in enumerate(self._batches):
            count = len(batch.lines)
            options = self.options.of(self.options, **batch.overrides(str(self.options.negative_prompt)))
            noise = options.noise(count, first, self.noise)
            if start is not None and not options.per_image:
                noise = StartNoise(start[:count], noise)
            if self._is_for_others(number, count):
                if not options.per_image:
                    self._use_noise(count, options, noise, None if init is None else init[:count], strength)
            else:
                yield SamplingJob(batch.prompts, options, noise, image_settings(self.options, first, batch))
            first += count

    def save(self, batch: SamplingJob, images: Sequence[Image.Image]) -> None:
        """Write the images of a batch."""
        self.write(images, batch.prompts, batch.settings)

    def _fixed_start(self) -> Tensor | None:
        """The noise that every batch starts from with --fixed_code."""
        if not self.options.fixed_code or self.options.per_image:
            return None
        count = self._args.n_samples
        shape = self.pipe.latent_shape(count, self.options)
        return self.options.start(count, self.noise)(shape, self.pipe.model.device)

    def _is_for_others(self, number: int, count: int) -> bool:
        """Whether another process samples this batch, or its images are there already."""
        if number % self._processes.world_size != self._processes.rank:
            self._index += count
            return True
        if not self.is_done(count):
            return False
        self.skip(count)
        self.progress.skip_batch()
        return True

    def _use_noise(
        self, count: int, options: SamplingOptions, noise: NoiseSource, init: Tensor | None, strength: float
    ) -> None:
        from ldm.inference import Conditioning

        shape = self.pipe.latent_shape(count, options) if init is None else None
        self.pipe.skip_noise(Conditioning(None, shape=shape, init=init, strength=strength), options, noise)


class StartNoise:
    """Noise that begins with a given latent."""

    def __init__(self, start: Tensor, noise: NoiseSource) -> None:
        self.start: Tensor | None = start
        self.noise = noise

    def __call__(self, shape: Sequence[int], device: Any) -> Tensor:
        start, self.start = self.start, None
        return self.noise(shape, device) if start is None else start


class Progress:
    """One progress bar for all steps of a run, and its previews: an `on_step` callback.

    Args:
        args: The command line, perhaps with --preview.
        model: The model.
        batches: Number of batches to come. Another number of steps in one of them changes what is left, not what is
            done.
        shown: Show the bar, and write previews.
    """

    def __init__(self, args: Namespace, model: LatentDiffusion, batches: int, shown: bool = True) -> None:
        self._args, self._batches, self._batch, self._shown = args, batches, 0, shown
        self._bar: tqdm | None = None  # before the first step there is nothing to show
        self._started = time.time()
        self._previews: Any = None
        if args.preview and shown:
            from ldm import inference

            self._previews = inference.Previews(model, args.preview, self._write)

    def start(self) -> None:
        """Start measuring time."""
        self._started = time.time()

    def close(self) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()

    def __call__(self, x0: Tensor, step: int, total: int) -> None:
        """Update after `step` steps of `total`, in the next batch or the same."""
        from tqdm import tqdm

        if self._bar is None:
            self._bar = tqdm(desc="Sampling", unit="step", disable=not self._shown, delay=1e-9)
            self._bar.start_t = self._bar.last_print_t = self._started  # count the time of the first step
        if step == 1:
            self._batch += 1
            self._bar.total = self._bar.n + (self._batches - self._batch + 1) * total
        self._bar.set_postfix_str(f"step {step}/{total} of batch {self._batch}/{self._batches}", refresh=False)
        self._bar.update()
        if self._previews:
            self._previews(x0, step, total)

    def skip_batch(self) -> None:
        """Expect one batch less."""
        self._batches -= 1

    def _write(self, images: list[Image.Image], step: int, total: int) -> None:
        from ldm.images import make_grid, replace_png

        grid = make_grid(images, nrow=self._args.n_rows or self._args.n_samples)
        replace_png(grid, Path(self._args.outdir) / PREVIEW)


def model_name(model: Any) -> str:
    """A loaded model's name: its file, or the folder of a file with the public name model.ckpt or last.ckpt."""
    path = Path(model.info.checkpoint_path).resolve()
    return path.parent.name if path.stem in ("model", "last") else path.stem
