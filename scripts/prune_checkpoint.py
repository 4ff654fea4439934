#!/usr/bin/env python
"""Prune a training checkpoint to what sampling needs: EMA weights, no optimizer, no losses."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a clone works without installation

from ldm import cli


def parser() -> cli.ArgumentParser:
    options = cli.ArgumentParser(description=__doc__)
    options.add_argument("checkpoint", type=cli.user_path, help=".ckpt or .safetensors file")
    options.add_argument("out", type=cli.user_path, help="file to write, .ckpt or .safetensors; it must not exist")
    options.add_argument("--no_ema", action="store_true", help="save the last weights instead of the EMA weights")
    options.add_argument("--verify", action="store_true", help="compare the checkpoint with its checksums first")
    options.add_argument("--half", action="store_true", help="save float16 weights, for half the size")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    opt = parser().parse_args(argv)

    from ldm.checkpoint import prune, read_checkpoint, save_checkpoint

    source = read_checkpoint(opt.checkpoint, verify=opt.verify)
    pruned = prune(source.state, use_ema=not opt.no_ema, half=opt.half)
    path = save_checkpoint(opt.out, pruned, global_step=source.global_step or 0)
    before, after = (Path(file).stat().st_size / 1e6 for file in (opt.checkpoint, path))
    print(f"{path}: {len(pruned)} tensors, {after:.1f} MB instead of {before:.1f} MB")


if __name__ == "__main__":
    sys.exit(cli.run(main))
