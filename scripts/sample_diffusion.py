#!/usr/bin/env python
"""Generate images with a latent diffusion model that is not conditioned on text.

Unconditional models need no more than --resume. Class-conditional ones take --classes, layout-to-image ones --layout,
those for semantic synthesis --segmentation. Settings at the end of the line, such as model.params.linear_end=0.02,
override the model's config.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a clone works without installation

from ldm import cli

logger = logging.getLogger("ldm.sample_diffusion")


def parser() -> cli.ArgumentParser:
    options = cli.ArgumentParser(description=__doc__, usage="%(prog)s --resume PATH [options] [key.sub=value ...]")
    options.add_argument(
        "-r",
        "--resume",
        type=cli.user_path,
        metavar="PATH",
        help="the model: a checkpoint, a folder that holds model.ckpt, or a run folder of scripts/train.py",
    )
    cli.add_conditions(options)
    many, count = options.add_argument_group("batch and seed"), cli.number(int, 1)
    many.add_argument(
        "-n",
        "--n_samples",
        type=count,
        default=50000,
        help="images; of each class or layout, where there are any (default: %(default)s)",
    )
    many.add_argument("--batch_size", type=count, default=10, help="images per batch (default: %(default)s)")
    cli.add_seed(many)
    public_names = {"ddim_steps": ["-c", "--custom_steps"], "ddim_eta": ["-e", "--eta"]}
    cli.add_sampler(options, scale=1.0, eta=1.0, also=public_names)
    options.add_argument(
        "-v", "--vanilla_sample", action="store_true", help="ancestral sampling: all timesteps, and no other sampler"
    )
    cli.add_model(options, "the same as --resume")
    cli.add_speed(options)
    output = options.add_argument_group("output")
    output.add_argument(
        "-l",
        "--logdir",
        type=cli.user_path,
        default="none",
        metavar="FOLDER",
        help="where to write samples/STEP/TIME/ (default: none, beside the model)",
    )
    output.add_argument("--skip_grid", action="store_true", help="do not write a grid of the first images")
    output.add_argument("--skip_npz", action="store_true", help="do not write all images as one array")
    output.add_argument("--no_metadata", action="store_true", help="leave settings out of the PNG files")
    return options


def resolve_model(args: argparse.Namespace) -> Path:
    """Set the model's files and the sampler in `args`; returns the folder to write to."""
    if (args.resume is None) == (args.ckpt is None):
        raise ValueError("name one model, with --resume PATH or --ckpt FILE")
    if args.vanilla_sample:
        if args.sampler is not None:
            raise ValueError(f"--vanilla_sample and --{args.sampler} are both given; leave one of the two out")
        if args.schedule or args.guidance or args.guidance_interval or args.cfg_pp:
            raise ValueError("--vanilla_sample walks all timesteps without guidance: leave --schedule and guidance out")
        args.sampler, args.ddim_eta = "ancestral", 0.0  # which has no eta
        if args.ddim_steps is not None:
            logger.warning("--vanilla_sample takes all timesteps, so -c %d has no effect", args.ddim_steps)
    model = cli.find_model(args.resume or args.ckpt)
    args.ckpt, args.config = str(model.checkpoint), args.config or (model.config and str(model.config))
    return model.home if args.logdir == "none" else Path(args.logdir)


def main(argv: Sequence[str] | None = None) -> None:
    args = cli.parse(parser(), argv, with_settings=True)
    logdir = resolve_model(args)
    content = cli.read_conditions(args)

    from tqdm import tqdm

    from ldm.inference.conditioning import CLASSES, LAYOUT, NOTHING, SEGMENTATION

    pipe = cli.load_pipeline(args, NOTHING, CLASSES, LAYOUT, SEGMENTATION)
    conditions = cli.conditions_for(pipe.model, args, content)
    if args.classes is None:
        if args.scale not in (None, 1.0):
            scales = ",".join(f"{number:g}" for number in args.scale_schedule or [args.scale])
            raise ValueError(f"--scale {scales} leads towards a class, and this model has none: leave --scale out")
        args.scale = 1.0
    if args.vanilla_sample:
        args.ddim_steps = pipe.model.num_timesteps
    options = cli.resolve_options(args, pipe)
    args.ddim_steps, args.sampler, args.scale, args.schedule = (
        options.steps,
        options.sampler,
        options.scale,
        options.schedule,
    )
    metadata = options.metadata() | {"model": cli.model_name(pipe.model)}
    del metadata["scale"]  # of classes, and written with them
    total = args.n_samples * conditions.count
    with (
        cli.RunWriter(args, logdir, pipe.model.info.global_step, metadata) as writer,
        tqdm(total=total, desc="Images") as bar,
    ):
        noise = options.shared_noise()
        for start in range(0, total, args.batch_size):
            numbers = [i // args.n_samples for i in range(start, min(start + args.batch_size, total))]
            images = conditions.generate(numbers, options=options, noise=noise)
            writer.write(images, [conditions.describe(number) for number in numbers])
            bar.update(len(images))


if __name__ == "__main__":
    sys.exit(cli.run(main))
