#!/usr/bin/env python
"""Fill holes in images with a latent diffusion model: --indir for a folder of them, or --init-img and --mask for one.

A mask is white where to fill. Inpainting models and text-to-image models will do.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a clone works without installation

from ldm import cli
from ldm.util import public_path

logger = logging.getLogger("ldm.inpaint")

PUBLIC_CKPT = "models/ldm/inpainting_big/last.ckpt"


def parser() -> cli.ArgumentParser:
    options = cli.ArgumentParser(description=__doc__)
    group = options.add_argument_group("images")
    indir = "images X.png with masks X_mask.png, or of other types; they become X.png in --outdir, or X-1.png ... "
    group.add_argument("--indir", type=cli.user_path, metavar="FOLDER", help=indir + "where there is one already")
    group.add_argument("--init-img", type=cli.user_path, metavar="FILE", help="an image")
    group.add_argument("--mask", type=cli.user_path, metavar="FILE", help="its mask")
    keep = "keep the image's own pixels outside the mask, unchanged to the bit; else they are what the first stage "
    group.add_argument(
        "--keep_unmasked", action=argparse.BooleanOptionalAction, default=True, help=keep + "makes (default: keep)"
    )
    soft = "soften the edge: fade into the image over this many pixels around the mask (default: %(default)s)"
    group.add_argument("--feather", type=cli.number(int, 0), default=0, metavar="PIXELS", help=soft)
    strength = "below 1 the result resembles what it replaces; 0 changes nothing (default: %(default)s)"
    group.add_argument("--strength", type=cli.number(float, 0, 1), default=1.0, help=strength)
    cli.add_prompt(options, default="")  # what fits the rest
    cli.add_amount(options, n_samples=1, n_iter=1)
    cli.add_prompt_options(options)
    cli.add_size(options)
    cli.add_sampler(options, scale=7.5)
    cli.add_model(options, f"{PUBLIC_CKPT} for --indir, else Stable Diffusion v1 if present, else the bundled model")
    cli.add_speed(options)
    cli.add_output(options, "outputs/inpaint-samples")
    return options


def find_images(args: argparse.Namespace) -> list[tuple[Path, Path]]:
    """The images and masks to fill; FileNotFoundError or ValueError if anything is wrong with them."""
    from tqdm import tqdm

    from ldm.data.masks import find_pairs, load_pair

    if bool(args.indir) == bool(args.init_img or args.mask):
        raise ValueError("name either a folder with --indir, or an image with --init-img and its mask with --mask")
    if not args.indir and not (args.init_img and args.mask):
        raise ValueError("--init-img and --mask go together: name both")
    if args.indir and args.skip_save:
        raise ValueError("--indir writes single images and no grid: leave --skip_save out")
    pairs = find_pairs(args.indir) if args.indir else [(Path(args.init_img), Path(args.mask))]
    logger.info("Found %d inputs.", len(pairs))
    for pair in tqdm(pairs, desc="Reading", disable=len(pairs) == 1, leave=False):
        load_pair(*pair)  # fail now, not in the middle of the run
    return pairs


def main(argv: Sequence[str] | None = None) -> None:
    args = cli.parse(parser(), argv)
    batches = cli.prompt_batches(args)
    if args.feather and not args.keep_unmasked:
        raise ValueError("--feather fades into the pixels that --no-keep_unmasked gives up: leave one of the two out")
    pairs = find_images(args)
    if args.indir and args.ckpt is None:
        args.ckpt = public_path(PUBLIC_CKPT)
    if args.indir and args.ckpt is None:
        raise FileNotFoundError(f"there is no {PUBLIC_CKPT}: put it there, or name another model with --ckpt")

    from tqdm import tqdm

    from ldm import inference
    from ldm.data.masks import load_pair
    from ldm.inference.conditioning import MASK, TEXT, TEXT_AND_MASK

    pipe = cli.load_pipeline(args, TEXT, MASK, TEXT_AND_MASK)
    if not inference.takes_text(pipe.model):
        args.scale = 1.0 if args.scale is None else args.scale  # no guidance, whatever other models' default
    options = cli.resolve_options(args, pipe)
    how = {name: getattr(args, name) for name in ("strength", "feather", "keep_unmasked")}
    settings = how | ({} if args.indir else {"init_image": pairs[0][0].name, "mask": pairs[0][1].name})
    writer_class = cli.NamedWriter if args.indir else cli.SampleWriter
    with writer_class(args, options, model=cli.model_name(pipe.model), **settings) as writer:
        for path, mask_path in tqdm(pairs, desc="Images", disable=len(pairs) == 1):
            image, mask = load_pair(path, mask_path)
            noise = options.shared_noise()  # of each image, so that it does not depend on the others
            for prompts in batches * args.n_iter:
                images = inference.inpaint(pipe.model, image, mask, prompts, options=options, noise=noise, **how)
                writer.write(images, prompts, name=path.stem)


if __name__ == "__main__":
    sys.exit(cli.run(main))
