"""The command line of `scripts/train.py`: options of the public `main.py` and the Trainer's. Imports nothing heavy."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from ldm.cli import MAX_SEED, ArgumentParser, add_trust, is_setting, number, user_path
from ldm.training.compat import TRAINER_KEYS
from ldm.util import suggestion

TRUE, FALSE = ("true", "yes", "on", "1", "y", "t"), ("false", "no", "off", "0", "n", "f")

DESCRIPTION = """Train a first stage or a diffusion model as a config describes it.

Settings come from the YAML files of --base, merged left to right, then from key.sub=value pairs at the end of the line,
such as data.params.batch_size=8 or lightning.trainer.deterministic=true."""


def boolean(text: str) -> bool:
    """An argparse `type` for yes or no."""
    if text.lower() in TRUE + FALSE:
        return text.lower() in TRUE
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def count_or_fraction(text: str) -> int | float:
    """An argparse `type` for a number of batches (an integer) or a fraction of them (with a decimal point)."""
    return number(float if "." in text else int, 0)(text)


# Trainer settings that are options: type and help.
TRAINER_OPTIONS: dict[str, tuple[Any, str]] = {
    "max_steps": (number(int, -1), "stop after so many optimizer steps"),
    "max_epochs": (number(int, -1), "stop after so many epochs (default: 1000 if nothing else ends the run)"),
    "max_time": (str, "stop after DD:HH:MM:SS"),
    "accumulate_grad_batches": (number(int, 1), "batches to accumulate for an optimizer step (default: 1)"),
    "precision": (str, "32-true, bf16-mixed, 16-mixed, ..."),
    "accelerator": (str, "cpu, gpu, mps, auto (auto)"),
    "devices": (str, "number or list of devices: 2 or 0,1 (all GPUs, or one CPU process)"),
    "num_nodes": (number(int, 1), "number of machines (default: 1)"),
    "strategy": (str, "ddp, fsdp, ... (by the devices)"),
    "limit_train_batches": (count_or_fraction, "train only so many batches (2) or this fraction (0.5) of every epoch"),
    "limit_val_batches": (count_or_fraction, "validate only so many batches or this fraction; 0 for none"),
    "val_check_interval": (
        count_or_fraction,
        "validate after so many batches (100) or this fraction of an epoch (0.25)",
    ),
    "check_val_every_n_epoch": (number(int, 1), "validate every N epochs (default: 1)"),
    "num_sanity_val_steps": (number(int, -1), "validation batches before training starts (default: 2)"),
    "gradient_clip_val": (number(float, 0), "clip the gradient to this norm"),
    "log_every_n_steps": (number(int, 1), "log metrics every N steps (default: 50)"),
    "fast_dev_run": (number(int, 0), "train and validate so many batches, and save nothing"),
    "benchmark": (boolean, "let cuDNN search for the fastest convolutions"),
    "deterministic": (boolean, "use only deterministic algorithms"),
}


def train_parser() -> ArgumentParser:
    """The parser of `scripts/train.py`. Unknown arguments are settings or mistakes (see `parse_train`)."""
    parser = ArgumentParser(
        description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter, usage="%(prog)s --base FILE "
        "[FILE ...] [-t] [--resume RUN] [options] [key.sub=value ...]"
    )  # fmt: skip
    run = parser.add_argument_group("the run")
    run.add_argument("-b", "--base", nargs="*", default=[], metavar="FILE", help="YAML files, merged left to right")
    run.add_argument("-t", "--train", type=boolean, default=False, metavar="BOOL", help="train (-t alone: true)")
    run.add_argument("--no-test", type=boolean, default=False, metavar="BOOL", help="skip the test at the end")
    run.add_argument(
        "-r", "--resume", type=user_path, metavar="RUN", help="resume a run: its folder, or a checkpoint in it"
    )
    run.add_argument(
        "--resume_anyway",
        type=boolean,
        default=False,
        metavar="BOOL",
        help="resume although settings differ, which is not exact",
    )
    run.add_argument("-n", "--name", default="", help="name of the run folder (default: that of the first config)")
    run.add_argument("-f", "--postfix", default="", help="suffix of the run folder's name")
    run.add_argument(
        "-l", "--logdir", type=user_path, default="logs", help="folder of run folders (default: %(default)s)"
    )
    run.add_argument("-s", "--seed", type=number(int, 0, MAX_SEED), help="seed (default: 23)")
    run.add_argument(
        "--scale_lr",
        type=boolean,
        metavar="BOOL",
        help="multiply model.base_learning_rate by batch size, processes and accumulated batches (default: true)",
    )
    run.add_argument(
        "-d", "--debug", type=boolean, default=False, metavar="BOOL", help="write the run to LOGDIR/debug_runs"
    )
    add_trust(run)
    run.add_argument("-p", "--project", help="accepted without effect, as in the public script")

    trainer = parser.add_argument_group("Lightning's Trainer (more settings: lightning.trainer.NAME=...)")
    for name, (kind, text) in TRAINER_OPTIONS.items():
        trainer.add_argument(f"--{name}", type=kind, metavar=name.split("_")[-1].upper(), help=text)
    trainer.add_argument("--gpus", metavar="LIST", help="old spelling: 0, is --accelerator gpu --devices 0,")
    return parser


def parse_train(argv: Sequence[str]) -> argparse.Namespace:
    """Parse `argv`. The result also has `dotlist`, the key.sub=value settings, and `trainer`, the Trainer's settings.

    Invalid options exit as argparse does, with a suggestion for an unknown one.
    """
    parser = train_parser()
    args, rest = parser.parse_known_args(_explicit(parser, argv))
    args.dotlist = [text for text in args.base if is_setting(text)]  # --base takes all that follow it
    args.base = [text for text in args.base if not is_setting(text)]
    for text in rest:
        if not is_setting(text):
            parser.error(_unknown(parser, text))
        args.dotlist.append(text)
    names = (*TRAINER_OPTIONS, "gpus")
    args.trainer = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.name and args.resume:
        parser.error("-n/--name and -r/--resume exclude each other: a resumed run stays in its folder")
    if not args.base and not args.resume:
        parser.error("give a config by --base FILE.yaml, or a run by --resume RUN")
    return args


def _explicit(parser: ArgumentParser, argv: Sequence[str]) -> list[str]:
    """Add "true" after every boolean option without a value."""
    actions = parser._option_string_actions
    flags = {text for text, action in actions.items() if action.type is boolean}
    result = []
    for text, following in zip(argv, [*argv[1:], ""]):
        result.append(text)
        spelled = text.replace("_", "-") if text.startswith("--") else text
        known = any(spelled == (flag.replace("_", "-") if flag.startswith("--") else flag) for flag in flags)
        if known and following.lower() not in TRUE + FALSE:
            result.append("true")
    return result


def _unknown(parser: ArgumentParser, text: str) -> str:
    """The message for an argument that is neither an option nor a setting."""
    if not text.startswith("-"):
        return f"{text!r} is neither an option nor a setting such as data.params.batch_size=8"
    name = text.partition("=")[0].lstrip("-").replace("-", "_")
    if name in TRAINER_KEYS:
        return f"there is no option {text}: write lightning.trainer.{name}=... at the end of the line"
    known = [option.lstrip("-") for option in parser._option_string_actions if option.startswith("--")]
    meant = suggestion(name, known)
    return f"there is no option {text}" + (f": did you mean --{meant}?" if meant else "")
