#!/usr/bin/env python
"""Encode and decode images with a first stage: original and reconstruction side by side, with their PSNR."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a clone works without installation

from ldm import cli

logger = logging.getLogger("ldm.reconstruct")


def parser() -> cli.ArgumentParser:
    options = cli.ArgumentParser(description=__doc__)
    options.add_argument("images", nargs="+", type=cli.user_path, metavar="IMAGE", help="images of any size")
    cli.add_tile(
        options,
        "VAE tiling: process images larger than this in overlapping tiles of at most this longest side; 0: never "
        "(default: %(default)s)",
        default=1024,
    )
    cli.add_model(options, "an autoencoder or a complete model: Stable Diffusion v1 if present, else the bundled model")
    options.add_argument(
        "--outdir",
        type=cli.user_path,
        default="outputs/reconstructions",
        metavar="FOLDER",
        help="where to write (default: %(default)s)",
    )
    options.add_argument("--no_metadata", action="store_true", help="leave PSNR and names out of the PNG files")
    options.set_defaults(precision="full")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    outdir = Path(args.outdir)

    from ldm.images import load_image, make_grid, save_png_named

    if not any(Path(path).is_file() for path in args.images):
        load_image(args.images[0])  # fails with the reason

    from ldm import inference

    first_stage = inference.load_first_stage(
        args.config, args.ckpt, device=args.device, precision=args.precision, verify=args.verify
    )
    cli.make_folder(outdir)
    found: list[float] = []
    broken: list[str] = []
    try:
        for path in args.images:
            try:
                image = load_image(path)
            except (ValueError, OSError) as error:
                logger.warning("%s", error)
                broken.append(path)
                continue
            reconstruction, psnr = inference.reconstruct(first_stage, image, tile=args.tile)
            settings = {"psnr": f"{psnr:.2f}", "model": cli.model_name(first_stage), "source": Path(path).name}
            pair = make_grid([image, reconstruction])
            written = save_png_named(pair, outdir, Path(path).stem, {} if args.no_metadata else settings)
            found.append(psnr)
            cli.say(f"{path}: {psnr:.2f} dB, see {written}", sys.stdout)
    except KeyboardInterrupt:
        raise cli.Interrupted(f"interrupted; {len(found)} images written to {outdir}") from None
    if len(found) > 1:
        cli.say(f"mean of {len(found)} images: {mean(found):.2f} dB", sys.stdout)
    if broken:
        raise ValueError(f"{len(broken)} of {len(args.images)} images could not be read: {', '.join(broken)}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
