"""Options on the pictures of a run, each by itself: their seeds, whether they repeat, and watching them come."""

from __future__ import annotations

import time
from argparse import Namespace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ldm.cli.options import MAX_SEED, ArgumentParser, number
from ldm.cli.prompts import Batch

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor
    from tqdm import tqdm

    from ldm.inference import Seeding
    from ldm.models.diffusion.ddpm import LatentDiffusion

PREVIEW = "preview.png"


def add_seeding(parser: ArgumentParser) -> None:
    """What `seeding` goes by: --seed_mode, --noise_device, --variation_seed, --variation_strength."""
    group = parser.add_argument_group("the noise to start from")
    group.add_argument(
        "--seed_mode",
        choices=("batch", "image"),
        default="batch",
        help="batch: pictures of a batch share a seed, as published; image: picture i has the seed --seed + i, and is "
        "the same alone or in any batch, on any device (%(default)s)",
    )
    group.add_argument(
        "--noise_device",
        choices=("model", "cpu"),
        default="model",
        help="where --seed_mode batch draws noise: cpu gives every device the same (%(default)s)",
    )
    group.add_argument(
        "--variation_seed",
        type=number(int, 0, MAX_SEED),
        default=0,
        help="with --variation_strength: picture i varies towards the noise of this + i (%(default)s); with "
        "--seed_mode image all of them vary --seed itself",
    )
    group.add_argument(
        "--variation_strength",
        type=number(float, 0, 1),
        default=0.0,
        metavar="SHARE",
        help="how far: 0 stays, 1 arrives there (%(default)s)",
    )


def add_tiling(parser: ArgumentParser) -> None:
    """--tiling."""
    parser.add_argument(
        "--tiling",
        nargs="?",
        const="both",
        choices=("x", "y", "both"),
        help="draw seamless textures, that repeat along x, y or (without a value) both",
    )


def add_preview(parser: ArgumentParser) -> None:
    """--preview, which `Watch` goes by."""
    parser.add_argument(
        "--preview",
        type=number(int, 1),
        metavar="N",
        help=f"every N steps put what is coming, roughly, into <outdir>/{PREVIEW}, in place of what is there",
    )


def seeding(args: Namespace, fixed_code: bool = False) -> Seeding:
    """The seeds of a run's pictures, as the options of `add_seeding` say; fixed_code: every batch starts the same."""
    from ldm import inference

    return inference.Seeding(
        args.seed, args.seed_mode, args.noise_device, args.variation_seed, args.variation_strength, fixed_code
    )


def settings_of(seeding: Seeding, first: int, batch: Batch) -> list[dict[str, Any]]:
    """What the metadata of a batch's pictures say, each for itself; the first of them is the run's `first`."""
    seeds = seeding.settings(first, len(batch.prompts))
    return [{**seed, **own} for seed, own in zip(seeds, batch.settings)]


class Watch:
    """One progress bar for all steps of a run, and its previews: an `on_step` of `txt2img`, to be used as a context.

    batches: how many there will be. Another number of steps in one of them changes what is left, not what is done.
    """

    def __init__(self, args: Namespace, model: LatentDiffusion, batches: int, shown: bool = True) -> None:
        self._args, self._batches, self._batch, self._shown = args, batches, 0, shown
        self._bar: tqdm | None = None  # from the first step on: till then there is nothing to show
        self._previews: Any = None
        if args.preview and shown:
            from ldm import inference

            self._previews = inference.Previews(model, args.preview, self._write)

    def __enter__(self) -> Watch:
        self._began = time.time()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, x0: Tensor, step: int, total: int) -> None:
        """After `step` steps of `total`, in the next batch or the same."""
        from tqdm import tqdm

        if self._bar is None:
            self._bar = tqdm(desc="Drawing", unit="step", disable=not self._shown, delay=1e-9)
            self._bar.start_t = self._bar.last_print_t = self._began  # the first step took its time too
        if step == 1:
            self._batch += 1
            self._bar.total = self._bar.n + (self._batches - self._batch + 1) * total
        self._bar.set_postfix_str(f"step {step}/{total} of batch {self._batch}/{self._batches}", refresh=False)
        self._bar.update()
        if self._previews:
            self._previews(x0, step, total)

    def skip(self) -> None:
        """One batch less to come."""
        self._batches -= 1

    def _write(self, images: list[Image.Image], step: int, total: int) -> None:
        from ldm.images import make_grid, replace_png

        grid = make_grid(images, nrow=self._args.n_rows or self._args.n_samples)
        replace_png(grid, Path(self._args.outdir) / PREVIEW)
