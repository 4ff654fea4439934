#!/usr/bin/env python
"""Generate variations of an image, or of what several have in common, with a Stable unCLIP model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a clone works without installation

from ldm import cli
from ldm.util import public_path

CKPT = "checkpoints/sd21-unclip-h.ckpt"  # where the public app expects it


def parser() -> cli.ArgumentParser:
    options = cli.ArgumentParser(description=__doc__)
    cli.add_prompt(options, default="")
    group = options.add_argument_group("images")
    group.add_argument(
        "--init-img", type=cli.user_path, nargs="+", required=True, metavar="FILE", help="the image, or several to mix"
    )
    group.add_argument(
        "--weights", type=cli.number(float, 0), nargs="+", metavar="WEIGHT", help="how to mix them (default: equally)"
    )
    group.add_argument(
        "--noise_level",
        type=cli.number(int, 0, 999),
        default=0,
        help="how freely to vary, from 0 to 999 (default: %(default)s)",
    )
    cli.add_amount(options, n_samples=3, n_iter=1)
    cli.add_size(options)
    cli.add_sampler(options, scale=10.0)
    cli.add_model(options, CKPT)
    cli.add_speed(options)
    cli.add_output(options, "outputs/variations")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    args = cli.parse(parser(), argv)
    batches = cli.prompt_batches(args)
    args.ckpt = args.ckpt or public_path(CKPT) or CKPT

    from ldm import inference
    from ldm.images import load_image
    from ldm.inference.conditioning import IMAGE

    inference.check_weights(args.weights, len(args.init_img))
    images = [load_image(path) for path in args.init_img]
    pipe = cli.load_pipeline(args, IMAGE)
    embedding = inference.image_embedding(pipe.model, images, args.weights)
    options = cli.resolve_options(args, pipe, sized=True)
    settings = {"init_image": ", ".join(Path(path).name for path in args.init_img), "noise_level": args.noise_level}
    settings |= {"weights": args.weights} if args.weights else {}
    with cli.SampleWriter(args, options, model=cli.model_name(pipe.model), **settings) as writer:
        how = {"options": options, "noise": options.shared_noise(), "noise_level": args.noise_level}
        for prompts in batches * args.n_iter:
            writer.write(inference.variations(pipe.model, embedding, prompts, **how), prompts)


if __name__ == "__main__":
    sys.exit(cli.run(main))
