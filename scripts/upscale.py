#!/usr/bin/env python
"""Upscale an image four times, with the Stable Diffusion x4 upscaler or latent super-resolution (bsr_sr).

Large images are sampled in overlapping tiles that share their noise, so that no seams show.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a clone works without installation

from ldm import cli
from ldm.util import public_path

PUBLIC_CKPT = "models/ldm/bsr_sr/model.ckpt"


def parser() -> cli.ArgumentParser:
    options = cli.ArgumentParser(description=__doc__)
    group = options.add_argument_group("image")
    group.add_argument("--init-img", type=cli.user_path, required=True, metavar="FILE", help="the small image")
    cli.add_tile(
        group,
        "sample small images larger than this in overlapping tiles of at most this longest side; 0: never (default: "
        "twice the model's own size)",
    )
    group = options.add_argument_group("for upscalers with text")
    group.add_argument("--prompt", help="what the image shows (default: nothing in particular)")
    group.add_argument("--negative_prompt", default="", help="what it should not show")
    group.add_argument(
        "--noise_level",
        type=cli.number(int, 0),
        help="noise on the small image, 0 if it has no faults of its own, up to the model's 350 (default: 20)",
    )
    cli.add_amount(options, n_samples=1)
    cli.add_sampler(options, scale=9.0)
    cli.add_model(options, f"{PUBLIC_CKPT}, if it is there")
    cli.add_speed(options)
    cli.add_output(options, "outputs/upscale-samples")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    args = cli.parse(parser(), argv)
    args.ckpt = args.ckpt or public_path(PUBLIC_CKPT)
    if args.ckpt is None:
        raise FileNotFoundError(f"there is no {PUBLIC_CKPT}: name an upscaler with --ckpt")

    from ldm import inference
    from ldm.images import load_image
    from ldm.inference.conditioning import SMALL_IMAGE, SMALL_IMAGE_AND_TEXT

    image = load_image(args.init_img)
    pipe = cli.load_pipeline(args, SMALL_IMAGE_AND_TEXT, SMALL_IMAGE)
    options = cli.resolve_options(args, pipe)
    if not inference.takes_prompt(pipe.model):
        options = replace(options, scale=args.scale)  # no default where there is no guidance
    elif args.noise_level is None:
        args.noise_level = inference.NOISE_LEVEL
    args.skip_grid |= args.n_samples == 1  # of one image it would be the same again
    prompts = None if args.prompt is None else [args.prompt] * args.n_samples
    how = {"noise_level": args.noise_level, "tile": args.tile}
    settings = {"model": cli.model_name(pipe.model), "init_image": Path(args.init_img).name, **how}
    with cli.SampleWriter(args, options, **settings) as writer:
        images = inference.upscale(pipe.model, [image] * args.n_samples, prompts, options=options, **how)
        writer.write(images, prompts or [""] * args.n_samples)


if __name__ == "__main__":
    sys.exit(cli.run(main))
