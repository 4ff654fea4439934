#!/usr/bin/env python
"""Embed a folder of images with CLIP, as a database for scripts/knn2img.py."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a clone works without installation

from ldm import cli
from ldm.devices import DEVICES


def parser() -> cli.ArgumentParser:
    options = cli.ArgumentParser(description=__doc__)
    options.add_argument("folder", type=cli.user_path, metavar="FOLDER", help="the images; subfolders count too")
    options.add_argument("out", type=cli.user_path, metavar="OUT.npz", help="the file to write")
    cli.add_clip(options)
    options.add_argument(
        "--batch_size", type=cli.number(int, 1), default=32, help="images per batch (default: %(default)s)"
    )
    options.add_argument("--device", choices=DEVICES, default="auto", help="where to compute (default: %(default)s)")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    out = Path(args.out)
    if out.suffix != ".npz":
        raise ValueError(f"{out} must be an .npz file: name it {out.stem}.npz")
    if out.exists():
        raise FileExistsError(f"{out} exists already: choose another name")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"cannot write {out.name}: there is no folder {out.parent}: create it first")

    from ldm import inference
    from ldm.data.folder import scan
    from ldm.devices import choose_device
    from ldm.modules.encoders.clip_features import FrozenClipImageEmbedder

    scan(Path(args.folder))  # fails before CLIP is loaded
    embedder = FrozenClipImageEmbedder(args.clip).to(choose_device(args.device))
    embeddings, paths = inference.embed_folder(embedder, args.folder, args.batch_size)
    inference.save_database(out, embeddings, paths)
    cli.say(f"{out}: {len(paths)} images. Use it with scripts/knn2img.py --use_neighbors --database {out}", sys.stdout)


if __name__ == "__main__":
    sys.exit(cli.run(main))
