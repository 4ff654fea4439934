#!/usr/bin/env python
"""Draw pictures with a latent diffusion model that takes no text.

Unconditional models need no more than --resume. Class-conditional ones take --classes, layout-to-image ones --layout,
those for semantic synthesis --segmentation. Settings at the end of the line, such as model.params.linear_end=0.02, are
laid over the model's config.
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
    many, count = options.add_argument_group("how many"), cli.number(int, 1)
    many.add_argument(
        "-n",
        "--n_samples",
        type=count,
        default=50000,
        help="pictures; of each class or layout, where there are any (%(default)s)",
    )
    many.add_argument("--batch_size", type=count, default=10, help="pictures in a batch (%(default)s)")
    seed = cli.number(int, 0, cli.MAX_SEED)
    many.add_argument("--seed", type=seed, default=42, help="start of the random numbers (%(default)s)")
    public_names = {"ddim_steps": ["-c", "--custom_steps"], "ddim_eta": ["-e", "--eta"]}
    cli.add_sampler(options, scale=1.0, eta=1.0, also=public_names)
    options.add_argument(
        "-v", "--vanilla_sample", action="store_true", help="ancestral sampling: all timesteps, and no other sampler"
    )
    cli.add_model(options, "the same as --resume")
    cli.add_speed(options)
    output = options.add_argument_group("the output")
    output.add_argument(
        "-l",
        "--logdir",
        type=cli.user_path,
        default="none",
        metavar="FOLDER",
        help="where to write samples/STEP/TIME/ (none: beside the model)",
    )
    output.add_argument("--skip_grid", action="store_true", help="do not write a grid of the first pictures")
    output.add_argument("--skip_npz", action="store_true", help="do not write all pictures as one array")
    output.add_argument("--no_metadata", action="store_true", help="leave settings out of the PNG files")
    return options


def settle(args: argparse.Namespace) -> Path:
    """Have `args` name the model's files and the sampler; gives the folder to write to."""
    if (args.resume is None) == (args.ckpt is None):
        raise ValueError("name one model, with --resume PATH or --ckpt FILE")
    if args.vanilla_sample:
        if args.sampler is not None:
            raise ValueError(f"--vanilla_sample and --{args.sampler} are both given; leave one of the two out")
        if args.schedule or cli.sampling_options(args).get("guidance"):
            raise ValueError("--vanilla_sample walks all timesteps without guidance: leave --schedule and guidance out")
        args.sampler, args.ddim_eta = "ancestral", 0.0  # which knows no eta
        if args.ddim_steps is not None:
            logger.warning("--vanilla_sample takes all timesteps, so -c %d has no effect", args.ddim_steps)
    model = cli.resumed(args.resume or args.ckpt)
    args.ckpt, args.config = str(model.checkpoint), args.config or (model.config and str(model.config))
    return model.home if args.logdir == "none" else Path(args.logdir)


def main(argv: Sequence[str] | None = None) -> None:
    args = cli.parse(parser(), argv, with_settings=True)
    logdir = settle(args)
    read = cli.read_conditions(args)
    scale = args.scale

    from tqdm import tqdm

    from ldm import inference
    from ldm.inference.conditioning import CLASSES, LAYOUT, NOTHING, SEGMENTATION

    model = cli.load_model(args, NOTHING, CLASSES, LAYOUT, SEGMENTATION)
    conditions = cli.conditions_for(model, args, read)
    if scale not in (None, 1.0) and args.classes is None:
        said = ",".join(f"{number:g}" for number in args.scale_schedule or [scale])
        raise ValueError(f"--scale {said} leads towards a class, and this model has none: leave --scale out")
    if args.vanilla_sample:
        args.ddim_steps = model.num_timesteps
    options, metadata = cli.sampling_options(args), cli.sampling_metadata(args) | cli.shortcuts(args)
    for settings in (options, metadata):
        del settings["scale"]  # that is for classes, and goes with them
    total = args.n_samples * conditions.count
    with cli.RunWriter(args, logdir, model.info.global_step, model=cli.model_name(model), **metadata) as writer:
        inference.seed_everything(args.seed)
        with tqdm(total=total, desc="Pictures") as bar:
            for start in range(0, total, args.batch_size):
                pictures = range(start, min(start + args.batch_size, total))
                numbers = [picture // args.n_samples for picture in pictures]
                images = conditions.draw(numbers, **options)
                writer.save(images, [conditions.describe(number) for number in numbers])
                bar.update(len(images))
    cli.say(cli.FAREWELL.format(writer.folder), sys.stdout)


if __name__ == "__main__":
    sys.exit(cli.run(main))
