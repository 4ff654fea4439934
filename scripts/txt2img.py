#!/usr/bin/env python
"""Generate images from text with a latent diffusion model.

torchrun --nproc_per_node N scripts/txt2img.py ... divides the batches among N GPUs or processes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a clone works without installation

from ldm import cli
from ldm.distributed import process_group
from ldm.util import public_path

LAION400M_CONFIG = "configs/latent-diffusion/txt2img-1p4B-eval.yaml"
LAION400M_CKPT = "models/ldm/text2img-large/model.ckpt"


def parser() -> cli.ArgumentParser:
    options = cli.sampling_parser(__doc__, scale=7.5, outdir="outputs/txt2img-samples", n_iter=2, n_samples=3)
    options.add_argument("--laion400m", action="store_true", help="use the LAION-400M model of the public layout")
    return options


def use_laion400m(args) -> None:
    """Select the LAION-400M model, as the public script does; FileNotFoundError if it is not there."""
    args.config, args.ckpt = public_path(LAION400M_CONFIG), public_path(LAION400M_CKPT)
    args.outdir = "outputs/txt2img-samples-laion400m"
    for name, path in ((LAION400M_CONFIG, args.config), (LAION400M_CKPT, args.ckpt)):
        if path is None:
            raise FileNotFoundError(f"--laion400m needs {name}, which is not there: add it, or leave --laion400m out")


def main(argv: Sequence[str] | None = None) -> None:
    args = cli.parse(parser(), argv)
    if args.laion400m:
        use_laion400m(args)
    batches = cli.batches(args)

    from ldm.inference.conditioning import TEXT

    with process_group() as processes:
        pipe = cli.load_pipeline(args, TEXT)
        options = cli.resolve_options(args, pipe, sized=True)
        with cli.ImageRun(args, pipe, options, batches, processes) as run:
            for batch in run:
                images = pipe(batch.prompts, batch.options, noise=batch.noise, on_step=run.progress, progress=False)
                run.save(batch, images)


if __name__ == "__main__":
    sys.exit(cli.run(main))
