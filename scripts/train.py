#!/usr/bin/env python
"""Train a first stage or a diffusion model on the data that a config names."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a clone works without installation

from ldm import cli
from ldm.cli.train import parse_train


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_train(sys.argv[1:] if argv is None else argv)

    from ldm.training.run import train

    train(args)


if __name__ == "__main__":
    sys.exit(cli.run(main))
