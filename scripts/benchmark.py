#!/usr/bin/env python
"""Measure speed and memory of sampling, loading and training, and compare with diffusers on the same weights.

benchmark.py --suite unet vae             Stable Diffusion v1 with random weights
benchmark.py --device cuda --suite all    everything, on a GPU
benchmark.py --suite unet --against DIR   this checkout and another, interleaved
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a clone works without installation

from benchmarks.suites import SUITES
from ldm import cli
from ldm.devices import DEVICES

if TYPE_CHECKING:
    import torch

    from benchmarks.compare import Bench
    from benchmarks.settings import Row, Settings

PRECISIONS = ("fp32", "fp16", "bf16")
MODES = ("eager", "compile", "int8")
logger = logging.getLogger("ldm.benchmark")


def build_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    count = cli.number(int, 1)
    parser.add_argument("training", nargs="?", choices=("training",), help="same as --suite train")
    parser.add_argument(
        "--suite", choices=(*SUITES, "all"), nargs="+", metavar="SUITE", help=f"{', '.join(SUITES)}, all"
    )
    parser.add_argument("--device", default="auto", help=f"{', '.join(DEVICES)} (default: %(default)s)")
    parser.add_argument("--precision", choices=PRECISIONS, nargs="+", help="precisions (fp32; on a GPU fp16)")
    parser.add_argument("--batch", type=count, nargs="+", help="batch sizes (default: 1; GPU 1 8; train 16, GPU 32)")
    parser.add_argument("--size", type=count, nargs="+", help="pixels per side (default: 512; memory: 512 1024 2048)")
    parser.add_argument("--ways", choices=MODES, nargs="+", default=MODES, help="modes of our UNet (all)")
    parser.add_argument("--compare", choices=("diffusers", "none"), default="diffusers", help="(default: %(default)s)")
    parser.add_argument("--against", type=cli.user_path, metavar="DIR", help="another checkout to compare with")
    parser.add_argument("--config", type=cli.user_path, metavar="FILE", help="model config (Stable Diffusion v1)")
    parser.add_argument("--repeats", type=count, default=3, help="measurements, interleaved (default: %(default)s)")
    parser.add_argument("--warm_up", type=count, help="calls that do not count (default: 1; on a GPU 4)")
    parser.add_argument("--loop_steps", type=cli.number(int, 0), help="steps of the sampling loop (default: 0; GPU 50)")
    parser.add_argument("--threads", type=count, help="CPU threads (torch's default)")
    parser.add_argument(
        "--peak", type=cli.number(float, 1e-3), metavar="TFLOPS", help="peak of this machine (measured)"
    )
    parser.add_argument("--profile", action="store_true", help="also profile")
    parser.add_argument("--ckpt", type=cli.user_path, metavar="FILE", help="checkpoint (random weights, 4.3 GB)")
    parser.add_argument("--cache", type=cli.user_path, default="outputs/benchmark-cache", help="(default: %(default)s)")
    parser.add_argument("--out", type=cli.user_path, default="outputs/benchmark", help="folder (default: %(default)s)")
    group = parser.add_argument_group("train")
    group.add_argument("--model", choices=("bundled", "v1"), help="v1: its UNet alone (bundled; on a GPU v1)")
    group.add_argument("--steps", type=count, default=50, help="steps of each, interleaved (default: %(default)s)")
    group.add_argument(
        "--optimizer",
        choices=("adamw", "sgd"),
        default="adamw",
        help="sgd keeps no state: less memory (default: %(default)s)",
    )
    return parser


def chosen_suites(args: argparse.Namespace) -> list[str]:
    """Return the suites to run, in the order of SUITES."""
    wanted = [*(args.suite or ()), *(["train"] if args.training else [])]
    if not wanted:
        raise ValueError(f"name what to measure: --suite all, or some of {', '.join(SUITES)}")
    return [suite for suite in SUITES if suite in wanted or "all" in wanted]


def settings_of(args: argparse.Namespace, device: torch.device) -> Settings:
    """Make the settings, with the device's defaults."""
    from benchmarks.networks import has_baselines
    from benchmarks.settings import V1, Settings

    on_gpu = device.type == "cuda"
    compare = args.compare == "diffusers" and has_baselines()
    if args.compare == "diffusers" and not compare:
        logger.warning("diffusers and transformers are not both installed: no comparison")
    return Settings(
        device=device,
        precisions=chosen_precisions(args.precision or (["fp16"] if on_gpu else ["fp32"]), device),
        batches=tuple(args.batch) if args.batch else None,
        sizes=tuple(args.size) if args.size else None,
        config=args.config or V1,
        modes=tuple(dict.fromkeys(args.ways)),
        compare=compare,
        repeats=args.repeats,
        warm_up=args.warm_up or (4 if on_gpu else 1),
        loop_steps=args.loop_steps,
        peak=args.peak and args.peak * 1e12,
        profile=args.profile,
        ckpt=args.ckpt,
        cache=Path(args.cache),
        train={"model": args.model, "steps": args.steps, "optimizer": args.optimizer},
    )


def chosen_precisions(wanted: Sequence[str], device: torch.device) -> tuple[str, ...]:
    """Replace fp16 by fp32 on a CPU, with a warning."""
    possible = ["fp32" if name == "fp16" and device.type == "cpu" else name for name in wanted]
    if possible != list(wanted):
        logger.warning("fp16 does not work on a CPU: measured in fp32")
    return tuple(dict.fromkeys(possible))


def measured_rows(args: argparse.Namespace, argv: Sequence[str], suites: Sequence[str], bench: Bench) -> Iterator[Row]:
    """Run the suites here, or with --against in both checkouts."""
    from benchmarks.suites import rows

    if args.against:
        from benchmarks.against import compare_checkouts
        from ldm.util import REPOSITORY

        own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        for option in ("--against", "--out", "--repeats", "--compare"):
            own.add_argument(option)
        rest = own.parse_known_args(argv)[1]
        yield from compare_checkouts({"this": REPOSITORY, "other": Path(args.against)}, rest, args.repeats)
        return
    for suite in suites:
        yield from rows(suite, bench)


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    suites = chosen_suites(args)

    import torch

    from benchmarks import report
    from benchmarks.compare import Bench
    from ldm.devices import choose_device

    if args.threads:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)  # for child processes
        torch.set_num_threads(args.threads)
    device = choose_device(args.device)
    bench = Bench(settings_of(args, device))
    options = vars(args) | {"suites": suites, "precisions": bench.settings.precisions}
    found = report.Report(report.new_folder(Path(args.out)), report.describe_machine(device), options)
    found.results |= {"peaks": bench.peaks, "profiles": bench.profiles}
    try:
        for row in measured_rows(args, sys.argv[1:] if argv is None else argv, suites, bench):
            found.add(row)
            cli.say(report.line(row.record()), sys.stdout)
        found.finish()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; results so far are in {found.folder}") from None
    finally:
        found.write()
        if found.results["rows"]:
            report.plot(found.results["rows"], found.folder / "plot.png")
            cli.say(f"\n{report.table(found.results)}", sys.stdout)
        for entry in bench.profiles:
            cli.say(f"\n{report.profile_table(entry)}", sys.stdout)
    cli.say(f"\nTable, numbers and plot: {found.folder}", sys.stdout)
    failed = [row for row in found.results["rows"] if row["error"]]
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(found.results['rows'])} measurements failed; see the table")


if __name__ == "__main__":
    sys.exit(cli.run(main))
