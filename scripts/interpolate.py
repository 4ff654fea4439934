#!/usr/bin/env python
"""Interpolate from one prompt or seed to others, as an animated GIF or WebP and its frames."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a clone works without installation

from ldm import cli


def parser() -> cli.ArgumentParser:
    options = cli.ArgumentParser(description=__doc__)
    group = options.add_argument_group("prompts and seeds")
    group.add_argument(
        "--prompts", "--prompt", nargs="+", default=[cli.PROMPT], help=f"first to last (default: {cli.PROMPT})"
    )
    group.add_argument("--negative_prompt", default="", help="what images should not show (default: none)")
    group.add_argument(
        "--seeds",
        "--seed",
        type=cli.number(int, 0, cli.MAX_SEED),
        nargs="+",
        default=[42],
        help="of the noise at each prompt, or one for all; one prompt with several seeds goes from seed to seed "
        "(default: 42)",
    )
    group.add_argument(
        "--contexts",
        choices=("linear", "slerp"),
        default="linear",
        help="how to interpolate encoded prompts (default: %(default)s); noise: slerp",
    )
    cli.add_prompt_options(options)
    group = options.add_argument_group("frames")
    group.add_argument("--frames", type=cli.number(int, 2), default=24, help="number of frames (default: %(default)s)")
    group.add_argument(
        "--fps", type=cli.number(float, 0.1, 50), default=12, help="frames a second (default: %(default)s)"
    )
    ways = group.add_mutually_exclusive_group()
    ways.add_argument("--loop", action="store_true", help="continue from the last prompt to the first")
    ways.add_argument("--bounce", action="store_true", help="show the frames backwards after the last")
    group.add_argument(
        "--n_samples", type=cli.number(int, 1), default=4, help="frames per batch (default: %(default)s)"
    )
    cli.add_size(options)
    cli.add_tiling(options)
    cli.add_sampler(options, scale=7.5)
    cli.add_model(options)
    cli.add_speed(options)
    group = options.add_argument_group("output")
    group.add_argument(
        "--outdir",
        type=cli.user_path,
        default="outputs/interpolations",
        metavar="FOLDER",
        help="where to write (default: %(default)s)",
    )
    group.add_argument(
        "--formats", nargs="+", choices=("gif", "webp"), default=["gif"], help="of the animation (default: gif)"
    )
    group.add_argument("--skip_save", action="store_true", help="do not write the frames as images")
    group.add_argument("--no_metadata", action="store_true", help="leave prompts and settings out of the PNG files")
    cli.add_preview(options)
    options.set_defaults(skip_grid=False, n_rows=0)
    return options


def main(argv: Sequence[str] | None = None) -> None:
    args = cli.parse(parser(), argv)
    args.seed = args.seeds[0]

    from ldm import inference

    prompts, seeds = inference.pair_keys(args.prompts, args.seeds)
    frames = inference.frames_between(len(prompts), args.frames, args.loop)
    pipe = cli.load_pipeline(args)
    options = cli.resolve_options(args, pipe)
    progress = cli.Progress(args, pipe.model, -(-len(frames) // args.n_samples))
    how = {"contexts": args.contexts, "batch_size": args.n_samples, "on_step": progress, "progress": False}
    with cli.AnimationWriter(args, options, model=cli.model_name(pipe.model)) as writer, contextlib.closing(progress):
        done = 0
        for images in inference.interpolate(pipe.model, prompts, seeds, frames, options=options, **how):
            batch = frames[done : done + len(images)]
            settings = [frame_settings(prompts, seeds, frame, args.contexts) for frame in batch]
            writer.write(images, [prompts[frame.start] for frame in batch], settings)
            done += len(images)


def frame_settings(prompts: Sequence[str], seeds: Sequence[int], frame, contexts: str) -> dict:
    """Metadata of a frame beside the run's; without `towards`, txt2img --seed_mode image generates the same image."""
    own = {"seed": seeds[frame.start], "seed_mode": "image", "batch_size": None, "index": None}
    if frame.weight:
        end = {"prompt": prompts[frame.end], "seed": seeds[frame.end]}
        own["towards"] = {**end, "weight": frame.weight, "contexts": contexts}
    return own


if __name__ == "__main__":
    sys.exit(cli.run(main))
