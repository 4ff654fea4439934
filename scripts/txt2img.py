#!/usr/bin/env python
"""Draw pictures from text with a latent diffusion model.

torchrun --nproc_per_node N scripts/txt2img.py ... shares the batches among N GPUs or processes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a clone works without installation

from ldm import cli
from ldm.processes import joined_processes
from ldm.util import public_path

LAION400M_CONFIG = "configs/latent-diffusion/txt2img-1p4B-eval.yaml"
LAION400M_CKPT = "models/ldm/text2img-large/model.ckpt"


def parser() -> cli.ArgumentParser:
    options = cli.sampling_parser(__doc__, scale=7.5, outdir="outputs/txt2img-samples", n_iter=2, n_samples=3)
    options.add_argument("--laion400m", action="store_true", help="use the LAION-400M model of the public layout")
    return options


def use_laion400m(args) -> None:
    """Point `args` to the LAION-400M model, as the public script does. Raises FileNotFoundError if it is not there."""
    args.config, args.ckpt = public_path(LAION400M_CONFIG), public_path(LAION400M_CKPT)
    args.outdir = "outputs/txt2img-samples-laion400m"
    for name, path in ((LAION400M_CONFIG, args.config), (LAION400M_CKPT, args.ckpt)):
        if path is None:
            raise FileNotFoundError(f"--laion400m needs {name}, which is not there: add it, or leave --laion400m out")


def main(argv: Sequence[str] | None = None) -> None:
    args = cli.parse(parser(), argv)
    if args.laion400m:
        use_laion400m(args)
    batches, reading = cli.batches(args), cli.reading_options(args)

    from ldm import inference

    with joined_processes() as processes:
        model = cli.load_model(args)
        size = dict(zip(("height", "width"), inference.resolve_size(model, args.H, args.W)))
        with cli.SampleWriter(args, processes, model=cli.model_name(model), **reading) as writer:
            inference.seed_everything(args.seed)
            start = inference.start_latent(model, args.n_samples, **size) if args.fixed_code else None
            for number, batch in enumerate(batches):
                prompts = batch.prompts
                options = size | cli.sampling_options(args) | batch.options(args.negative_prompt)
                if reading:
                    options["reading"] = inference.Reading(**reading)
                options["start_code"] = None if start is None or batch.seeded else start[: len(prompts)]
                if number % processes.world == processes.rank:
                    images = inference.txt2img(model, prompts, **options, progress=processes.rank == 0)
                    writer.save(images, prompts, settings=batch.settings)
                else:
                    if not batch.seeded:
                        inference.skip_txt2img(model, prompts, **options)
                    writer.skip(len(prompts))
    if processes.rank == 0:
        cli.say(cli.FAREWELL.format(args.outdir), sys.stdout)


if __name__ == "__main__":
    sys.exit(cli.run(main))
