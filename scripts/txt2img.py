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
from ldm.distributed import process_group
from ldm.util import public_path

LAION400M_CONFIG = "configs/latent-diffusion/txt2img-1p4B-eval.yaml"
LAION400M_CKPT = "models/ldm/text2img-large/model.ckpt"


def parser() -> cli.ArgumentParser:
    options = cli.sampling_parser(__doc__, scale=7.5, outdir="outputs/txt2img-samples", n_iter=2, n_samples=3)
    cli.add_speed(options)
    cli.add_seeding(options)
    cli.add_tiling(options)
    cli.add_preview(options)
    cli.add_resume(options)
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
    if args.resume and args.skip_save:
        raise ValueError("--resume goes by the pictures that are there: leave --skip_save out")

    from ldm import inference
    from ldm.inference.conditioning import TEXT

    with process_group() as processes:
        model = cli.load_model(args, TEXT)
        size = dict(zip(("height", "width"), inference.resolve_size(model, args.H, args.W)))
        settings = {"model": cli.model_name(model), **reading, **({"tiling": args.tiling} if args.tiling else {})}
        watch = cli.Watch(args, model, len(batches[processes.rank :: processes.world_size]), shown=processes.rank == 0)
        with cli.SampleWriter(args, processes, **settings) as writer, watch:
            inference.seed_everything(args.seed)
            seeding = cli.seeding(args, args.fixed_code)
            if args.resume:
                writer.resume(cli.descriptions(args, model, batches, seeding, **size))
            start, first = None, 0
            if args.fixed_code and not seeding.per_image:
                start = inference.start_latent(model, args.n_samples, **size, noise=seeding.start(args.n_samples))
            for number, batch in enumerate(batches):
                prompts, count = batch.prompts, len(batch.prompts)
                options = size | cli.sampling_options(args) | batch.options(args.negative_prompt)
                if reading:
                    options["reading"] = inference.PromptOptions(**reading)
                options["noise"] = seeding.noise(first, count, options.pop("seed", None))
                options["start_code"] = None if start is None or batch.seeded else start[:count]
                if writer.passes(number, count, watch):
                    if not (batch.seeded or seeding.per_image):
                        inference.skip_txt2img(model, prompts, **options)
                else:
                    options |= {"tiling": args.tiling, "on_step": watch, "progress": False}
                    images = inference.txt2img(model, prompts, **options)
                    writer.save(images, prompts, settings=cli.settings_of(seeding, first, batch))
                first += count
    if processes.rank == 0:
        cli.say(cli.FAREWELL.format(args.outdir), sys.stdout)


if __name__ == "__main__":
    sys.exit(cli.run(main))
