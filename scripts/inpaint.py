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
    indir = "pictures X.png with masks X_mask.png, or of other types; they become X.png in --outdir, or X-1.png ... "
    group.add_argument("--indir", type=cli.user_path, metavar="FOLDER", help=indir + "where there is one already")
    group.add_argument("--init-img", type=cli.user_path, metavar="FILE", help="a picture")
    group.add_argument("--mask", type=cli.user_path, metavar="FILE", help="its mask")
    keep = "put the picture's own pixels around what was drawn, unchanged to the bit; else they are as the first stage "
    group.add_argument(
        "--keep_unmasked", action=argparse.BooleanOptionalAction, default=True, help=keep + "sees them (default: keep)"
    )
    soft = "soften the edge: over so many pixels around the mask what was drawn fades into the picture (%(default)s)"
    group.add_argument("--feather", type=cli.number(int, 0), default=0, metavar="PIXELS", help=soft)
    strength = "below 1 what is drawn resembles what it replaces; 0 changes nothing (%(default)s)"
    group.add_argument("--strength", type=cli.number(float, 0, 1), default=1.0, help=strength)
    cli.add_prompt(options)
    cli.add_amount(options, n_samples=1, n_iter=1)
    cli.add_reading(options)
    cli.add_size(options)
    cli.add_sampler(options, scale=7.5)
    cli.add_model(options, f"{PUBLIC_CKPT} for --indir, else Stable Diffusion v1 if present, else the bundled model")
    cli.add_speed(options)
    cli.add_output(options, "outputs/inpaint-samples")
    options.set_defaults(prompt="")  # what fits the rest
    return options


def pairs_of(args: argparse.Namespace) -> list[tuple[Path, Path]]:
    """The pictures and masks to work on; FileNotFoundError or ValueError if anything is wrong with them."""
    from tqdm import tqdm

    from ldm.data.masks import find_pairs, load_pair

    if bool(args.indir) == bool(args.init_img or args.mask):
        raise ValueError("name either a folder with --indir, or a picture with --init-img and its mask with --mask")
    if not args.indir and not (args.init_img and args.mask):
        raise ValueError("--init-img and --mask go together: name both")
    if args.indir and args.skip_save:
        raise ValueError("--indir writes single pictures and no grid: leave --skip_save out")
    pairs = find_pairs(args.indir) if args.indir else [(Path(args.init_img), Path(args.mask))]
    logger.info("Found %d inputs.", len(pairs))
    for pair in tqdm(pairs, desc="Reading", disable=len(pairs) == 1, leave=False):
        load_pair(*pair)  # mistakes now, not in the middle of the run
    return pairs


def load_model(args: argparse.Namespace):
    """The model to fill with; one without text has no guidance, whatever others have by default."""
    from ldm import inference
    from ldm.inference.conditioning import MASK, TEXT, TEXT_AND_MASK

    if args.indir and args.ckpt is None:
        args.ckpt = public_path(PUBLIC_CKPT)
        if args.ckpt is None:
            raise FileNotFoundError(f"there is no {PUBLIC_CKPT}: put it there, or name another model with --ckpt")
    scale = args.scale
    model = cli.load_model(args, TEXT, MASK, TEXT_AND_MASK)
    if not inference.takes_text(model):
        args.scale = 1.0 if scale is None else scale
    return model


def main(argv: Sequence[str] | None = None) -> None:
    args = cli.parse(parser(), argv)
    batches, reading = cli.prompt_batches(args), cli.reading_options(args)
    if args.feather and not args.keep_unmasked:
        raise ValueError("--feather fades into the pixels that --no-keep_unmasked gives up: leave one of the two out")
    pairs = pairs_of(args)

    from tqdm import tqdm

    from ldm import inference
    from ldm.data.masks import load_pair

    model = load_model(args)
    options = {name: getattr(args, name) for name in ("strength", "feather", "keep_unmasked")}
    settings = options | reading
    settings |= {} if args.indir else {"init_image": pairs[0][0].name, "mask": pairs[0][1].name}
    options |= {"height": args.H, "width": args.W, **cli.sampling_options(args)}
    options |= {"reading": inference.PromptOptions(**reading)} if reading else {}
    writer_kind = cli.NamedWriter if args.indir else cli.SampleWriter
    with writer_kind(args, model=cli.model_name(model), **settings) as writer:
        for path, mask_path in tqdm(pairs, desc="Pictures", disable=len(pairs) == 1):
            image, mask = load_pair(path, mask_path)
            inference.seed_everything(args.seed)  # of each picture, so that it does not depend on the others
            for prompts in batches * args.n_iter:
                writer.save(inference.inpaint(model, image, mask, prompts, **options), prompts, path.stem)
    cli.say(cli.FAREWELL.format(args.outdir), sys.stdout)


if __name__ == "__main__":
    sys.exit(cli.run(main))
