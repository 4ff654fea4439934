#!/usr/bin/env python
"""Redraw a picture as a text says, with a latent diffusion model.

torchrun --nproc_per_node N scripts/img2img.py ... shares the batches among N GPUs or processes.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a clone works without installation

from ldm import cli
from ldm.distributed import process_group

logger = logging.getLogger("ldm.img2img")


def parser() -> cli.ArgumentParser:
    options = cli.sampling_parser(__doc__, scale=5.0, outdir="outputs/img2img-samples", n_iter=1, n_samples=2)
    cli.add_speed(options)
    cli.add_seeding(options)
    cli.add_tiling(options)
    cli.add_preview(options)
    cli.add_resume(options)
    options.add_argument(
        "--init-img", type=cli.user_path, required=True, metavar="FILE", help="the picture to start from"
    )
    options.add_argument(
        "--strength",
        type=cli.number(float, 0, 1),
        default=0.75,
        help="how much to change the picture: 0 keeps it, 1 keeps next to nothing of it (%(default)s)",
    )
    options.add_argument(
        "--depth",
        type=cli.user_path,
        metavar="FILE",
        help="for depth-to-image models: a picture of the depth, near parts light (default: estimated)",
    )
    return options


def main(argv: Sequence[str] | None = None) -> None:
    args = cli.parse(parser(), argv)
    batches, reading = cli.batches(args), cli.reading_options(args)
    if args.resume and args.skip_save:
        raise ValueError("--resume goes by the pictures that are there: leave --skip_save out")
    if args.fixed_code:
        logger.warning("--fixed_code has no effect here, as in the public script: the start is the picture")

    from ldm.images import check_mask, load_gray, load_image

    init_image = load_image(args.init_img)
    depth = load_gray(args.depth) if args.depth else None
    if depth is not None:
        check_mask(depth, init_image, f"the depth map {args.depth}", args.init_img)

    from ldm import inference
    from ldm.inference.conditioning import TEXT, TEXT_AND_DEPTH

    with process_group() as processes:
        model = cli.load_model(args, TEXT, TEXT_AND_DEPTH)
        with_depth = inference.needs_depth(model)
        if args.depth and not with_depth:
            raise ValueError(f"{args.ckpt or 'the model'} draws from text alone: leave --depth out")
        settings = {"model": cli.model_name(model), "strength": args.strength}
        settings |= {"init_image": Path(args.init_img).name, **reading}
        settings |= {"depth": Path(args.depth).name} if args.depth else {}
        settings |= {"tiling": args.tiling} if args.tiling else {}
        watch = cli.Watch(args, model, len(batches[processes.rank :: processes.world_size]), shown=processes.rank == 0)
        with cli.SampleWriter(args, processes, **settings) as writer, watch:
            inference.seed_everything(args.seed)
            seeding, first = cli.seeding(args), 0
            with inference.seamless(model, args.tiling):
                latents = inference.encode_image(model, init_image, args.n_samples, args.H, args.W)
            if with_depth:
                depth = inference.depth_map(model, init_image, depth, size=latents.shape[2:])
            if args.resume:
                files = {name: Path(path) for name in ("init_img", "depth") if (path := getattr(args, name))}
                size = {"latents": list(latents.shape[2:])}
                writer.resume(cli.descriptions(args, model, batches, seeding, **files, **size))
            for number, batch in enumerate(batches):
                count = len(batch.prompts)
                options = {"strength": args.strength, "depth": depth, **cli.sampling_options(args)}
                options |= batch.options(args.negative_prompt)
                init = latents[:count]
                if batch.seeded or seeding.per_image:  # their seeds draw the latents too
                    init, options = init_image, {**options, "height": args.H, "width": args.W}
                if reading:
                    options["reading"] = inference.PromptOptions(**reading)
                options["noise"] = seeding.noise(first, count, options.pop("seed", None))
                if writer.passes(number, count, watch):
                    if not (batch.seeded or seeding.per_image):
                        inference.skip_img2img(model, batch.prompts, init, **options)
                else:
                    options |= {"tiling": args.tiling, "on_step": watch, "progress": False}
                    images = inference.img2img(model, batch.prompts, init, **options)
                    writer.save(images, batch.prompts, settings=cli.settings_of(seeding, first, batch))
                first += count
    if processes.rank == 0:
        cli.say(cli.FAREWELL.format(args.outdir), sys.stdout)


if __name__ == "__main__":
    sys.exit(cli.run(main))
