"""Tiny folders in the layouts of the public data sets."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SYNSETS = {"n01440764": "tench, Tinca tinca", "n01443537": "goldfish, Carassius auratus"}
WIDTH, HEIGHT = 80, 72


def pixels(number: int) -> np.ndarray:
    """A smooth image (72, 80, 3) of uint8 that depends on `number`."""
    down, across = np.mgrid[0:HEIGHT, 0:WIDTH]
    return np.stack([down * 3, across * 3, np.full_like(down, 20 * number % 256)], axis=-1).astype(np.uint8)


def save(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(number)).save(path, quality=95)


def imagenet(root: Path, part: str = "train") -> Path:
    """Two classes of two images; also the broken file of the published set."""
    folder = root / f"ILSVRC2012_{part}"
    for number, synset in enumerate(SYNSETS):
        for k in range(2):
            save(folder / "data" / synset / f"{synset}_{k}.JPEG", 2 * number + k)
    save(folder / "data" / "n01440764" / "n06596364_9591.JPEG", 9)
    (folder / "synset_human.txt").write_text("".join(f"{synset} {name}\n" for synset, name in SYNSETS.items()))
    (folder / "index_synset.yaml").write_text("0: n01440764\n1: n01443537\n2: n01484850\n")
    (folder / "imagenet1000_clsidx_to_labels.txt").write_text(
        "".join(f"{k}: '{name}',\n" for k, name in enumerate(SYNSETS.values()))
    )
    return folder


def lsun(root: Path, kind: str = "church_outdoor", folder: str = "churches") -> Path:
    """Two images in the list of each part."""
    for part, numbers in {"train": (0, 1), "val": (2, 3)}.items():
        for number in numbers:
            save(root / folder / "a" / f"{number}.jpg", number)
        (root / f"{kind}_{part}.txt").write_text("".join(f"a/{number}.jpg\n" for number in numbers))
    return root


def faces(root: Path) -> Path:
    """Two faces of each set and each part."""
    for part, numbers in {"train": (0, 1), "validation": (2, 3)}.items():
        for number in numbers:
            save(root / "ffhq" / f"{number:05}.png", number)
            (root / "celebahq").mkdir(exist_ok=True)
            square = pixels(number)[:64, :64].transpose(2, 0, 1)[None]
            np.save(root / "celebahq" / f"imgHQ{number:05}.npy", square)
        (root / f"ffhq{part}.txt").write_text("".join(f"{number:05}.png\n" for number in numbers))
        (root / f"celebahq{part}.txt").write_text("".join(f"imgHQ{number:05}.npy\n" for number in numbers))
    return root


def openimages(root: Path) -> Path:
    """Two images of each part, with two boxes in the first one and one in the second."""
    rows = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded\n"
    for part in ("train", "validation"):
        for number in range(2):
            save(root / part / f"{part[0]}{number}.jpg", number)
        boxes = [
            f"{part[0]}0,xclick,/m/b,1,0.5,0.75,0.5,0.75,0\n",
            f"{part[0]}0,xclick,/m/a,1,0.0,0.5,0.0,1.0,0\n",
            f"{part[0]}1,xclick,/m/b,1,0.1,0.9,0.1,0.9,0\n",
        ]
        (root / f"{part}-annotations-bbox.csv").write_text(rows + "".join(boxes))
    (root / "class-descriptions-boxable.csv").write_text("/m/a,Tortoise\n/m/b,Container\n")
    return root


def landscapes(root: Path) -> Path:
    """Two images and their maps of classes 0 to 181."""
    for number in range(2):
        save(root / "images" / f"{number}.jpg", number)
        (root / "segmentation").mkdir(exist_ok=True)
        classes = np.tile(np.arange(WIDTH, dtype=np.uint8) + 100, (HEIGHT, 1))
        Image.fromarray(classes).save(root / "segmentation" / f"{number}.png")
    return root


def previews(root: Path) -> Path:
    """Two images with captions, in each part."""
    for part in ("train", "validation"):
        for number in range(2):
            save(root / part / f"{number}.jpg", number)
            (root / part / f"{number}.txt").write_text("a red circle")
    return root


def tars(root: Path, shards: int = 2, samples: int = 3, **facts: Any) -> Path:
    """Tars 00000.tar, ... of samples with facts that pass all filters."""
    known = {"original_width": 600, "original_height": 700, "pwatermark": 0.1, "punsafe": 0.01, "similarity": 0.3}
    root.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        with tarfile.open(root / f"{shard:05}.tar", "w") as tar:
            for number in range(samples):
                key = f"{shard:05}{number:04}"
                file = io.BytesIO()
                Image.fromarray(pixels(number)).save(file, "JPEG")
                entries = {"jpg": file.getvalue(), "txt": b"a red circle", "json": json.dumps(known | facts).encode()}
                for suffix, content in entries.items():
                    info = tarfile.TarInfo(f"{key}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return root
