#!/usr/bin/env python
"""Generate images from an image and a text with a latent diffusion model.

torchrun --nproc_per_node N scripts/img2img.py ... divides the batches among N GPUs or processes.
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
    group = options.add_argument_group("image")
    group.add_argument("--init-img", type=cli.user_path, required=True, metavar="FILE", help="the initial image")
    group.add_argument(
        "--strength",
        type=cli.number(float, 0, 1),
        default=0.75,
        help="how much to change the image: 0 keeps it, 1 keeps next to nothing of it (default: %(default)s)",
    )
    group.add_argument(
        "--depth",
        type=cli.user_path,
        metavar="FILE",
        help="for depth-to-image models: a depth map, near parts light (default: estimated)",
    )
    return options


def load_images(args):
    """The initial image, and the depth map or None; ValueError if their proportions differ."""
    from ldm.images import check_mask, load_gray, load_image

    image, depth = load_image(args.init_img), load_gray(args.depth) if args.depth else None
    if depth is not None:
        check_mask(depth, image, f"the depth map {args.depth}", args.init_img)
    return image, depth


def main(argv: Sequence[str] | None = None) -> None:
    args = cli.parse(parser(), argv)
    batches = cli.batches(args)
    if args.fixed_code:
        logger.warning("--fixed_code has no effect here, as in the public script: the start is the image")
        args.fixed_code = False
    image, depth = load_images(args)

    from ldm import inference
    from ldm.inference.conditioning import TEXT, TEXT_AND_DEPTH

    with process_group() as processes:
        pipe = cli.load_pipeline(args, TEXT, TEXT_AND_DEPTH)
        options, with_depth = cli.resolve_options(args, pipe), inference.needs_depth(pipe.model)
        if args.depth and not with_depth:
            raise ValueError(f"{args.ckpt or 'the model'} is conditioned on text alone: leave --depth out")
        files = {name: Path(path) for name in ("init_img", "depth") if (path := getattr(args, name))}
        settings = {"strength": args.strength, "init_image": files["init_img"].name}
        settings |= {"depth": files["depth"].name} if args.depth else {}
        with cli.ImageRun(args, pipe, options, batches, processes, **settings) as run:
            latents = pipe.encode_image(image, args.n_samples, options, run.noise)
            if with_depth:
                depth = inference.depth_map(pipe.model, image, depth, size=latents.shape[2:])
            for batch in run.batches(latents, args.strength, latents=list(latents.shape[2:]), **files):
                # images with their own seeds have their own latents
                init = image if batch.options.per_image else latents[: len(batch.prompts)]
                how = {"options": batch.options, "noise": batch.noise, "on_step": run.progress, "progress": False}
                images = inference.img2img(pipe.model, batch.prompts, init, strength=args.strength, depth=depth, **how)
                run.save(batch, images)


if __name__ == "__main__":
    sys.exit(cli.run(main))
