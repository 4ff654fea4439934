#!/usr/bin/env python
"""Measure how fast this machine draws, loads and trains, and in how much memory, beside diffusers on the same weights.

benchmark.py --suite unet vae    the shapes of Stable Diffusion v1, with random weights
benchmark.py --device cuda --suite all    everything, on a GPU
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a clone works without installation

from benchmarks.suites import SUITES
from ldm import cli
from ldm.devices import DEVICES

if TYPE_CHECKING:
    import torch

    from benchmarks.settings import Settings

PRECISIONS = ("fp32", "fp16", "bf16")
WAYS = ("eager", "compile", "int8")
logger = logging.getLogger("ldm.benchmark")


def parser() -> cli.ArgumentParser:
    options = cli.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    count = cli.number(int, 1)
    options.add_argument("training", nargs="?", choices=("training",), help="the same as --suite train")
    options.add_argument(
        "--suite", choices=(*SUITES, "all"), nargs="+", metavar="SUITE", help=f"{', '.join(SUITES)}, all"
    )
    options.add_argument("--device", default="auto", help=f"{', '.join(DEVICES)} (%(default)s)")
    options.add_argument("--precision", choices=PRECISIONS, nargs="+", help="to scan (fp32; on a GPU fp16)")
    options.add_argument(
        "--batch", type=count, nargs="+", help="pictures at once, to scan (1; on a GPU 1 8; train 16, on a GPU 32)"
    )
    options.add_argument("--size", type=count, nargs="+", help="pixels a side, to scan (512; memory: 512 1024 2048)")
    options.add_argument("--ways", choices=WAYS, nargs="+", default=WAYS, help="of ours, for the UNet (all)")
    options.add_argument("--compare", choices=("diffusers", "none"), default="diffusers", help="(%(default)s)")
    options.add_argument("--config", type=cli.user_path, metavar="FILE", help="whose shapes (Stable Diffusion v1)")
    options.add_argument("--repeats", type=count, default=3, help="of each, taken in turns (%(default)s)")
    options.add_argument("--warm_up", type=count, help="calls that do not count (1; on a GPU 4)")
    options.add_argument("--loop_steps", type=cli.number(int, 0), help="also time a loop of so many (0; on a GPU 50)")
    options.add_argument("--threads", type=count, help="of the CPU (torch's own choice)")
    options.add_argument(
        "--peak", type=cli.number(float, 1e-3), metavar="TFLOPS", help="what this machine can do at best (measured)"
    )
    options.add_argument("--profile", action="store_true", help="also say where the time goes")
    options.add_argument("--ckpt", type=cli.user_path, metavar="FILE", help="what to load (random weights, 4.3 GB)")
    options.add_argument("--cache", type=cli.user_path, default="outputs/benchmark-cache", help="(%(default)s)")
    options.add_argument("--out", type=cli.user_path, default="outputs/benchmark", help="folder (%(default)s)")
    group = options.add_argument_group("train")
    group.add_argument("--model", choices=("bundled", "v1"), help="v1: its UNet alone (bundled; on a GPU v1)")
    group.add_argument("--steps", type=count, default=50, help="of each kind, taken in turns (%(default)s)")
    group.add_argument(
        "--optimizer", choices=("adamw", "sgd"), default="adamw", help="sgd keeps no state: less memory (%(default)s)"
    )
    return options


def chosen_suites(args: argparse.Namespace) -> list[str]:
    """What to run, in the order of SUITES."""
    wanted = [*(args.suite or ()), *(["train"] if args.training else [])]
    if not wanted:
        raise ValueError(f"name what to measure: --suite all, or some of {', '.join(SUITES)}")
    return [suite for suite in SUITES if suite in wanted or "all" in wanted]


def settings_of(args: argparse.Namespace, device: torch.device) -> Settings:
    """The options as the suites take them, with what the device does by default."""
    from benchmarks import peers
    from benchmarks.settings import V1, Settings

    on_gpu = device.type == "cuda"
    compare = args.compare == "diffusers" and peers.available()
    if args.compare == "diffusers" and not compare:
        logger.warning("diffusers and transformers are not both installed: nothing is compared with them")
    return Settings(
        device=device,
        precisions=chosen_precisions(args.precision or (["fp16"] if on_gpu else ["fp32"]), device),
        batches=tuple(args.batch) if args.batch else None,
        sizes=tuple(args.size) if args.size else None,
        config=args.config or V1,
        ways=tuple(dict.fromkeys(args.ways)),
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
    """Those wanted, with fp32 for what the device cannot do, and a sentence about it."""
    possible = ["fp32" if name == "fp16" and device.type == "cpu" else name for name in wanted]
    if possible != list(wanted):
        logger.warning("fp16 does not work on a CPU: measured in fp32")
    return tuple(dict.fromkeys(possible))


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    suites = chosen_suites(args)

    import torch

    from benchmarks import profiling, report
    from benchmarks.comparing import Bench
    from benchmarks.machine import describe
    from benchmarks.suites import rows
    from ldm.devices import choose_device
    from ldm.evaluation.report import new_folder

    if args.threads:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)  # of the processes to come
        torch.set_num_threads(args.threads)
    device = choose_device(args.device)
    bench = Bench(settings_of(args, device))
    options: dict[str, Any] = vars(args) | {"suites": suites, "precisions": bench.settings.precisions}
    found = report.Report(new_folder(Path(args.out)), describe(device), options)
    found.results |= {"peaks": bench.peaks, "profiles": bench.profiles}
    try:
        for suite in suites:
            for row in rows(suite, bench):
                found.add(row)
                cli.say(report.line(row.record()), sys.stdout)
        found.finish()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; what was measured is in {found.folder}") from None
    finally:
        found.write()
        if found.results["rows"]:
            report.plot(found.results["rows"], found.folder / "plot.png")
            cli.say(f"\n{report.table(found.results)}", sys.stdout)
        for entry in bench.profiles:
            cli.say(f"\n{profiling.table(entry)}", sys.stdout)
    cli.say(f"\nTable, numbers and plot: {found.folder}", sys.stdout)
    failed = [row for row in found.results["rows"] if row["error"]]
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(found.results['rows'])} measurements failed; the table says why")


if __name__ == "__main__":
    sys.exit(cli.run(main))
