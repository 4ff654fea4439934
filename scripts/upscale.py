#!/usr/bin/env python
"""Make a small picture four times as large, with the Stable Diffusion x4 upscaler or latent super-resolution (bsr_sr).

Large pictures are drawn in overlapping tiles that share their noise, so that no seams show.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a clone works without installation

from ldm import cli
from ldm.util import public_path

PUBLIC_CKPT = "models/ldm/bsr_sr/model.ckpt"


def parser() -> cli.ArgumentParser:
    options = cli.ArgumentParser(description=__doc__)
    group = options.add_argument_group("what to upscale")
    group.add_argument("--init-img", type=cli.user_path, required=True, metavar="FILE", help="the small picture")
    cli.add_tile(
        group,
        "of the small picture that is drawn at once: larger ones are drawn in overlapping tiles; 0: never (twice the "
        "model's own size)",
    )
    group = options.add_argument_group("for the upscaler that reads")
    group.add_argument("--prompt", help="what the picture shows (nothing in particular)")
    group.add_argument("--negative_prompt", default="", help="what it should not show")
    group.add_argument(
        "--noise_level",
        type=cli.number(int, 0),
        help="noise on the small picture, 0 if it has no faults of its own, up to the model's 350 (20)",
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
    from ldm.inference.conditioning import SMALL_PICTURE, SMALL_PICTURE_AND_TEXT

    image, own_scale = load_image(args.init_img), args.scale
    model = cli.load_model(args, SMALL_PICTURE_AND_TEXT, SMALL_PICTURE)
    if not inference.takes_prompt(model):
        args.scale = own_scale  # no default where there is no guidance
    elif args.noise_level is None:
        args.noise_level = inference.NOISE_LEVEL
    args.skip_grid |= args.n_samples == 1  # of one picture it would be the same again
    prompts = None if args.prompt is None else [args.prompt] * args.n_samples
    settings = {"noise_level": args.noise_level, "tile": args.tile}
    own = {"model": cli.model_name(model), "init_image": Path(args.init_img).name, **settings}
    with cli.SampleWriter(args, **own) as writer:
        options = {**settings, **cli.sampling_options(args), "seed": args.seed}
        images = inference.upscale(model, [image] * args.n_samples, prompts, **options)
        writer.save(images, prompts or [""] * args.n_samples)
    cli.say(cli.FAREWELL.format(args.outdir), sys.stdout)


if __name__ == "__main__":
    sys.exit(cli.run(main))
