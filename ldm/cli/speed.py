"""Options that make drawing quicker at the price of other pictures; all of them off by default."""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.options import ArgumentParser, number

if TYPE_CHECKING:
    from ldm.models.diffusion.ddpm import LatentDiffusion

OFF = {"cache_features": 1, "merge_tokens": 0.0, "quantize": None}  # the first two as in `inference.Shortcuts`


def add_speed(parser: ArgumentParser) -> None:
    """What `shortcuts` goes by: --cache_features, --merge_tokens, --quantize; and --compile, --lowvram."""
    group = parser.add_argument_group("trading quality for speed, off by default")
    group.add_argument(
        "--cache_features",
        type=number(int, 1),
        default=OFF["cache_features"],
        metavar="N",
        help="compute the inner part of the network at every N-th step only (%(default)s: at every step)",
    )
    group.add_argument(
        "--merge_tokens",
        type=number(float, 0, 0.75),
        default=OFF["merge_tokens"],
        metavar="SHARE",
        help="let this share of the places, those most like others, not attend for themselves, where the network "
        "attends at its finest; 0.5 is usual (%(default)g)",
    )
    group.add_argument(
        "--quantize",
        choices=("int8",),
        default=OFF["quantize"],
        help="int8: have the network multiply in 8-bit integers, on CPUs that do so quickly",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the network for a GPU: some minutes at the first run, kept on disk for the next; without effect "
        "on a CPU",
    )
    parser.add_argument(
        "--lowvram",
        action="store_true",
        help="for a GPU of little memory: have a part of the model there only while it is used, and guide in two calls "
        "of the network instead of one; slower, and the same pictures; goes best with --precision fp16",
    )


def shortcuts(args: Namespace) -> dict[str, Any]:
    """The options of `add_speed` that were asked for, for metadata, and for `take`."""
    return {name: getattr(args, name) for name, off in OFF.items() if getattr(args, name, off) != off}


def take(args: Namespace, model: LatentDiffusion) -> None:
    """Have `model` take the shortcuts that were asked for, and compile it if that was."""
    from ldm import inference

    asked = shortcuts(args)
    if asked.pop("quantize", None):
        inference.quantize_network(model)
    model.shortcuts = inference.Shortcuts(**asked)
    if getattr(args, "compile", False):
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path.home() / ".cache" / "ldm" / "compiled"))
        from ldm.acceleration.compile import compile_network

        compile_network(model)
