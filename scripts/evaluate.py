#!/usr/bin/env python
"""Measure the accuracy of a model of synthetic scenes on sets of prompts, compare sampling settings (`evaluate.py
compare`), or compute the distance (FID, KID) between two folders of images (`evaluate.py distance FOLDER FOLDER`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a clone works without installation

from ldm import cli
from ldm.devices import DEVICES
from ldm.util import public_path

if TYPE_CHECKING:
    from ldm.models.diffusion.ddpm import LatentDiffusion

PROMPT_SETS = ("single", "single-full", "relation", "relation-plain", "held-out", "held-out-relation")
SETTINGS = ("samplers", "schedules", "guidance")


def parser() -> cli.ArgumentParser:
    options = cli.ArgumentParser(description=__doc__)
    count = cli.number(int, 1)
    options.add_argument("--prompts", type=count, default=1000, help="prompts per set (default: %(default)s)")
    options.add_argument(
        "--kinds",
        type=_prompt_sets,
        default=PROMPT_SETS,
        metavar="SET,...",
        help=f"prompt sets, of {', '.join(PROMPT_SETS)} (all)",
    )
    options.add_argument(
        "--sampler",
        choices=cli.SAMPLERS,
        metavar="NAME",
        help="a sampler of the scripts (default: the model's own, else ddim)",
    )
    options.add_argument(
        "--steps", type=cli.number(int, 1, 1000), help="sampling steps (default: the model's own, else 50)"
    )
    options.add_argument("--scale", type=cli.number(float), help="guidance scale (default: the model's own, else 7.5)")
    options.add_argument("--seed", type=cli.number(int, 0, cli.MAX_SEED), default=0, help="(default: %(default)s)")
    options.add_argument(
        "--out", type=cli.user_path, default="outputs/evaluation", help="folder (default: %(default)s)"
    )
    _add_model(options)
    cli.add_speed(options)
    options.set_defaults(batch=100, device="auto")
    commands = options.add_subparsers(dest="command", metavar="compare, distance")
    compare = commands.add_parser("compare", help="samplers, schedules and guidance by network evaluations")
    compare.add_argument("--ways", choices=SETTINGS, nargs="+", default=SETTINGS, help="settings to compare (all)")
    compare.add_argument("--kind", choices=PROMPT_SETS, default="single-full", help="prompt set (default: %(default)s)")
    compare.add_argument(
        "--budgets",
        type=count,
        nargs="+",
        default=(10, 20, 40, 80),
        help="network evaluations per image (default: %(default)s)",
    )
    distance = commands.add_parser("distance", help="distance between two folders of images")
    distance.add_argument("folders", nargs=2, type=cli.user_path, metavar="FOLDER")
    distance.add_argument(
        "--features",
        choices=("first-stage", "inception"),
        default="first-stage",
        help="features: a model's first stage, or Inception v3 if its weights are on disk (default: %(default)s)",
    )
    _add_model(distance, argparse.SUPPRESS)  # options before the command count too
    return options


def _add_model(options: argparse.ArgumentParser, default: str | None = None) -> None:
    path = {"type": cli.user_path, "default": default, "metavar": "FILE"}
    options.add_argument("--ckpt", **path, help="checkpoint (the bundled model)")
    options.add_argument(
        "--verify", action="store_true", default=default or False, help="verify the checkpoint's checksums first"
    )
    options.add_argument("--config", **path, help="the checkpoint's config (detected)")
    cli.add_trust(options)
    options.add_argument("--batch", type=cli.number(int, 1), default=default, help="batch size (default: 100)")
    options.add_argument("--device", choices=DEVICES, default=default, help="device (auto)")


def _prompt_sets(text: str) -> list[str]:
    unknown = [name for name in text.split(",") if name not in PROMPT_SETS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(PROMPT_SETS)}")
    return text.split(",")


def load(args: argparse.Namespace) -> LatentDiffusion:
    """Load the model, by default the bundled one."""
    from ldm import inference
    from ldm.inference.conditioning import TEXT

    ckpt = args.ckpt or public_path(inference.BUNDLED_CKPT)
    if ckpt is None:
        raise FileNotFoundError(f"the bundled {inference.BUNDLED_CKPT} is missing: pass --ckpt")
    model = inference.load_model(
        args.config, ckpt, device=args.device, precision="full", tasks=[TEXT], verify=args.verify
    )
    cli.prepare_model(args, model)
    return model


def evaluate(args: argparse.Namespace) -> None:
    """Score the prompt sets one by one; results are written after each."""
    from benchmarks.report import new_folder
    from benchmarks.shapes import report, scoring
    from ldm import images, inference

    model = load(args)
    scoring.check_model(model)
    acceleration = cli.acceleration_options(args)
    given = {"steps": args.steps, "sampler": args.sampler, "scale": args.scale, "acceleration": acceleration}
    options = inference.Pipeline(model).resolve(**given)
    sampling = {"steps": options.steps, "sampler": options.sampler, "scale": options.scale}
    run = {"model": cli.model_name(model), "prompts": args.prompts, "seed": args.seed, "batch": args.batch}
    run |= {"device": str(model.device), "acceleration": inference.changed(acceleration)}
    folder = new_folder(Path(args.out))
    first, originals, back = scoring.score_first_stage(model, args.prompts, args.batch, args.seed)
    pairs = [image for pair in zip(originals, back) for image in pair]
    wrong = [2 * entry["index"] + 1 for entry in first["wrong"]]
    images.replace_png(report.sheet(pairs, wrong), folder / "reconstructions.png")
    results = {"settings": run | sampling, "first stage": first, "prompt sets": {}}
    for name in args.kinds:
        prompts = scoring.prompts_of(name, args.prompts, args.seed)
        generated = scoring.generate_all(model, prompts, args.batch, args.seed, title=name, options=options)
        found = scoring.summary(prompts, scoring.evaluate_all(generated, prompts))
        results["prompt sets"][name] = found
        sheet = report.sheet(generated, [entry["index"] for entry in found["wrong"]])
        images.replace_png(sheet, folder / f"{name}.png")
        report.write(folder, results)
    cli.say(f"{report.markdown(results)}\nTable, numbers and images: {folder}", sys.stdout)


def compare(args: argparse.Namespace) -> None:
    """Compare sampling settings by accuracy and distance; results are written after each."""
    from benchmarks.report import new_folder
    from benchmarks.shapes import comparison, scoring
    from ldm.inference import changed

    model = load(args)
    scoring.check_model(model)
    folder = new_folder(Path(args.out))
    given = {"model": cli.model_name(model), "prompts": args.prompts, "kind": args.kind, "seed": args.seed}
    acceleration = cli.acceleration_options(args)
    given["acceleration"] = changed(acceleration)
    settings = [setting for name in args.ways for setting in comparison.SETTINGS[name]()]
    settings = [replace(some, options={**some.options, "acceleration": acceleration}) for some in settings]
    rows = []
    for row in comparison.compare(model, settings, args.budgets, args.kind, args.prompts, args.batch, args.seed):
        rows.append(row)
        comparison.write(folder, given, rows)
    cli.say(f"{comparison.markdown(rows)}\nTable, numbers and plot: {folder}", sys.stdout)


def measure(args: argparse.Namespace) -> None:
    """Compute the distance between two folders."""
    from ldm import evaluation
    from ldm.devices import choose_device

    if args.features == "inception":
        features, means = evaluation.inception_features(choose_device(args.device)), "Inception v3, as FID and KID"
    else:
        model = load(args)
        features, means = evaluation.first_stage_features(model), f"the first stage of {cli.model_name(model)}"
    size, found = None, []
    for folder in args.folders:
        one, size = evaluation.folder_features(Path(folder), features, args.batch, size)
        found.append(one)
    result = evaluation.distances(*found)
    counts = " and ".join(str(len(one)) for one in found)
    cli.say(
        f"Frechet distance {result['frechet']:.6g}\n"
        f"kernel distance  {result['kernel']:.6g} +- {result['kernel_deviation']:.2g}\n"
        f"of {counts} images, by {found[0].shape[1]} features of {means}",
        sys.stdout,
    )
    if args.features != "inception":
        cli.say("Not the published FID or KID: comparable only with distances by these features.", sys.stdout)


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    {"distance": measure, "compare": compare, None: evaluate}[args.command](args)


if __name__ == "__main__":
    sys.exit(cli.run(main))
