#!/usr/bin/env python
"""Fill holes in pictures with a latent diffusion model: --indir for a folder of them, or --init-img and --mask for one.

A mask is white where to fill. Any model for inpainting will do, and any that draws from text.
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
    group = options.add_argument_group("what to fill")
    group.add_argument(
        "--indir",
        type=cli.user_path,
        metavar="FOLDER",
        help="pictures X.png with masks X_mask.png, or other types; each becomes X.png in --outdir, or X-1.png if "
        "there is one: no file is ever replaced",
    )
    group.add_argument("--init-img", type=cli.user_path, metavar="FILE", help="a picture")
    group.add_argument("--mask", type=cli.user_path, metavar="FILE", help="its mask")
    group.add_argument(
        "--keep_unmasked",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="put the picture's own pixels around what was filled, unchanged to the bit; otherwise they are as the "
        "first stage gives them back (default: keep them)",
    )
    group.add_argument(
        "--feather",
        type=cli.number(int, 0),
        default=0,
        metavar="PIXELS",
        help="soften the edge: over so many pixels around the mask what is drawn goes over into the picture "
        "(%(default)s)",
    )
    group.add_argument(
        "--strength",
        type=cli.number(float, 0, 1),
        default=1.0,
        help="below 1 what is drawn resembles what it replaces; 0 changes nothing (%(default)s)",
    )
    cli.add_prompt(options)
    cli.add_amount(options, n_samples=1, n_iter=1)
    cli.add_reading(options)
    cli.add_size(options)
    cli.add_sampler(options, scale=7.5)
    cli.add_model(options, f"{PUBLIC_CKPT} for --indir, else Stable Diffusion v1 if present, else the bundled model")
    cli.add_output(options, "outputs/inpaint-samples")
    options.set_defaults(prompt="")  # what fits the rest
    return options


def pairs_of(args: argparse.Namespace) -> list[tuple[Path, Path]]:
    """The pictures and masks to work on; FileNotFoundError or ValueError if anything is wrong with them."""
    from tqdm import tqdm

    from ldm.data.pairs import find_pairs, load_pair

    if bool(args.indir) == bool(args.init_img or args.mask):
        raise ValueError("name either a folder with --indir, or a picture with --init-img and its mask with --mask")
    if not args.indir and not (args.init_img and args.mask):
        raise ValueError("--init-img and --mask go together: name both")
    pairs = find_pairs(args.indir) if args.indir else [(Path(args.init_img), Path(args.mask))]
    logger.info("Found %d inputs.", len(pairs))
    for pair in tqdm(pairs, desc="Reading", disable=len(pairs) < 100):  # rather now than in the middle of the run
        load_pair(*pair)
    return pairs


def load_model(args: argparse.Namespace):
    """The model to fill with: for a folder by default the public one, which takes no text and knows no guidance."""
    from ldm import inference

    if args.indir and args.ckpt is None:
        args.ckpt = public_path(PUBLIC_CKPT)
        if args.ckpt is None:
            raise FileNotFoundError(f"there is no {PUBLIC_CKPT}: put it there, or name another model with --ckpt")
    scale = args.scale
    model = cli.load_model(args)
    if not inference.takes_text(model):
        args.scale = 1.0 if scale is None else scale
    return model


def main(argv: Sequence[str] | None = None) -> None:
    args = cli.parse(parser(), argv)
    batches, reading = cli.prompt_batches(args), cli.reading_options(args)
    if args.feather and not args.keep_unmasked:
        raise ValueError("--feather goes over into the pixels that --no-keep_unmasked gives up: leave one of them out")
    pairs = pairs_of(args)

    from ldm import inference
    from ldm.data.pairs import load_pair

    model = load_model(args)
    options = {name: getattr(args, name) for name in ("strength", "feather", "keep_unmasked")}
    settings = options | reading
    if args.init_img:
        settings |= {"init_image": pairs[0][0].name, "mask": pairs[0][1].name}
    if reading:
        options["reading"] = inference.Reading(**reading)
    writer_kind = cli.NamedWriter if args.indir else cli.SampleWriter
    with writer_kind(args, model=cli.model_name(model), **settings) as writer:
        for path, mask_path in pairs:
            image, mask = load_pair(path, mask_path)
            inference.seed_everything(args.seed)  # each picture's own, whatever else is in the folder
            for prompts in batches * args.n_iter:
                size = {"height": args.H, "width": args.W}
                images = inference.inpaint(model, image, mask, prompts, **options, **size, **cli.sampling_options(args))
                writer.save(images, prompts, path.stem)
    cli.say(cli.FAREWELL.format(args.outdir), sys.stdout)


if __name__ == "__main__":
    sys.exit(cli.run(main))
