#!/usr/bin/env python
"""Score a model of drawn scenes by the judge, on prompts drawn afresh; compare ways of sampling from it, with
`evaluate.py compare`; or measure how far two folders of pictures are apart, with `evaluate.py distance FOLDER FOLDER`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a clone works without installation

from ldm import cli
from ldm.cli.sampling import sampler_names
from ldm.devices import DEVICES
from ldm.util import public_path

if TYPE_CHECKING:
    from ldm.models.diffusion.ddpm import LatentDiffusion

KINDS = ("single", "single-full", "relation", "relation-plain", "held-out", "held-out-relation")
WAYS = ("samplers", "schedules", "guidance")


def parser() -> cli.ArgumentParser:
    options = cli.ArgumentParser(description=__doc__)
    count = cli.number(int, 1)
    options.add_argument("--prompts", type=count, default=1000, help="prompts of each kind (%(default)s)")
    options.add_argument(
        "--kinds", type=_kinds, default=KINDS, metavar="KIND,...", help=f"of {', '.join(KINDS)} (all of them)"
    )
    options.add_argument(
        "--sampler", choices=sampler_names(), metavar="NAME", help="any of the scripts' (the model's own, else ddim)"
    )
    options.add_argument("--steps", type=cli.number(int, 1, 1000), help="(the model's own, else 50)")
    options.add_argument("--scale", type=cli.number(float), help="guidance scale (the model's own, else 7.5)")
    options.add_argument("--seed", type=cli.number(int, 0, cli.MAX_SEED), default=0, help="(%(default)s)")
    options.add_argument("--out", type=cli.user_path, default="outputs/evaluation", help="folder (%(default)s)")
    _add_model(options)
    cli.add_speed(options)
    options.set_defaults(batch=100, device="auto")
    commands = options.add_subparsers(dest="command", metavar="compare, distance")
    compare = commands.add_parser("compare", help="samplers, schedules and guidance by network evaluations")
    compare.add_argument("--ways", choices=WAYS, nargs="+", default=WAYS, help="(all)")
    compare.add_argument("--kind", choices=KINDS, default="single-full", help="of prompts (%(default)s)")
    compare.add_argument(
        "--budgets", type=count, nargs="+", default=(10, 20, 40, 80), help="evaluations a picture (%(default)s)"
    )
    distance = commands.add_parser("distance", help="the distance between two folders of pictures")
    distance.add_argument("folders", nargs=2, type=cli.user_path, metavar="FOLDER")
    distance.add_argument(
        "--features",
        choices=("first-stage", "inception"),
        default="first-stage",
        help="what pictures are compared by: a model's first stage, or Inception where its weights are (%(default)s)",
    )
    _add_model(distance, argparse.SUPPRESS)  # what stands before the command counts, too
    return options


def _add_model(options: argparse.ArgumentParser, default: str | None = None) -> None:
    path = {"type": cli.user_path, "default": default, "metavar": "FILE"}
    options.add_argument("--ckpt", **path, help="the model (the bundled one)")
    options.add_argument(
        "--verify", action="store_true", default=default or False, help="compare the model with its checksums first"
    )
    options.add_argument("--config", **path, help="its YAML (found from the checkpoint)")
    cli.add_trust(options)
    options.add_argument("--batch", type=cli.number(int, 1), default=default, help="pictures at once (100)")
    options.add_argument("--device", choices=DEVICES, default=default, help="where to compute (auto)")


def _kinds(text: str) -> list[str]:
    unknown = [kind for kind in text.split(",") if kind not in KINDS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(KINDS)}")
    return text.split(",")


def load(args: argparse.Namespace) -> LatentDiffusion:
    """The model to look at: the bundled one, if none is named."""
    from ldm import inference
    from ldm.inference.conditioning import TEXT

    ckpt = args.ckpt or public_path(inference.BUNDLED_CKPT)
    if ckpt is None:
        raise FileNotFoundError(f"the bundled {inference.BUNDLED_CKPT} is not there: name a --ckpt")
    model = inference.load_model(
        args.config, ckpt, device=args.device, precision="full", tasks=[TEXT], verify=args.verify
    )
    cli.take(args, model)
    return model


def evaluate(args: argparse.Namespace) -> None:
    """Score the kinds one by one; what is done is on disk, whatever happens to the rest."""
    from ldm import images, inference
    from ldm.evaluation import report, scores

    model = load(args)
    scores.check_model(model)
    steps, sampler, scale = inference.sampling_settings(model, 7.5, args.steps, args.sampler, args.scale)
    sampling = {"steps": steps, "sampler": sampler, "scale": scale}
    run = {"model": cli.model_name(model), "prompts": args.prompts, "seed": args.seed, "batch": args.batch}
    run |= {"device": str(model.device), "shortcuts": cli.shortcuts(args)}
    folder = report.new_folder(Path(args.out))
    first, originals, back = scores.score_first_stage(model, args.prompts, args.batch, args.seed)
    pairs = [picture for pair in zip(originals, back) for picture in pair]
    wrong = [2 * entry["index"] + 1 for entry in first["wrong"]]
    images.replace_png(report.sheet(pairs, wrong), folder / "reconstructions.png")
    results = {"settings": run | sampling, "first stage": first, "kinds": {}}
    for kind in args.kinds:
        prompts = scores.prompts_of(kind, args.prompts, args.seed)
        pictures = scores.draw_all(model, prompts, args.batch, args.seed, title=kind, **sampling)
        found = scores.summary(prompts, scores.judge_all(pictures, prompts))
        results["kinds"][kind] = found
        sheet = report.sheet(pictures, [entry["index"] for entry in found["wrong"]])
        images.replace_png(sheet, folder / f"{kind}.png")
        report.write(folder, results)
    cli.say(f"{report.markdown(results)}\nTable, numbers and pictures: {folder}", sys.stdout)


def compare(args: argparse.Namespace) -> None:
    """Accuracy and distance of every way of sampling against what it costs; what is done is on disk."""
    from ldm.evaluation import comparison, report, scores

    model = load(args)
    scores.check_model(model)
    folder = report.new_folder(Path(args.out))
    given = {"model": cli.model_name(model), "prompts": args.prompts, "kind": args.kind, "seed": args.seed}
    given["shortcuts"] = cli.shortcuts(args)
    ways = [way for name in args.ways for way in comparison.WAYS[name]()]
    rows = []
    for row in comparison.compare(model, ways, args.budgets, args.kind, args.prompts, args.batch, args.seed):
        rows.append(row)
        comparison.write(folder, given, rows)
    cli.say(f"{comparison.markdown(rows)}\nTable, numbers and plot: {folder}", sys.stdout)


def measure(args: argparse.Namespace) -> None:
    """The distance between two folders, and what it may be compared with."""
    from ldm.devices import choose_device
    from ldm.evaluation import distances

    if args.features == "inception":
        features, means = distances.inception_features(choose_device(args.device)), "Inception v3, as FID and KID"
    else:
        model = load(args)
        features, means = distances.first_stage_features(model), f"the first stage of {cli.model_name(model)}"
    size, found = None, []
    for folder in args.folders:
        one, size = distances.folder_features(Path(folder), features, args.batch, size)
        found.append(one)
    result = distances.distances(*found)
    counts = " and ".join(str(len(one)) for one in found)
    cli.say(
        f"Frechet distance {result['frechet']:.6g}\n"
        f"kernel distance  {result['kernel']:.6g} +- {result['kernel_deviation']:.2g}\n"
        f"of {counts} pictures, by {found[0].shape[1]} features of {means}",
        sys.stdout,
    )
    if args.features != "inception":
        cli.say("Not the published FID or KID: comparable only with distances by these features.", sys.stdout)


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    {"distance": measure, "compare": compare, None: evaluate}[args.command](args)


if __name__ == "__main__":
    sys.exit(cli.run(main))
