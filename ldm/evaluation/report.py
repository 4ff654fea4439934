"""An evaluation on disk: a folder of its own with a table, the numbers behind it, and sheets of pictures."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from ldm.evaluation.scores import KINDS, PARTS
from ldm.files import write_text
from ldm.images import make_grid

_FRAME = 3  # pixels around a picture of a sheet
_SHEET = 200  # pictures of a sheet
_RIGHT, _WRONG = (70, 70, 70), (230, 0, 0)


def new_folder(wanted: Path) -> Path:
    """Make the folder `wanted`, or, where that is taken, `wanted-2`, `wanted-3`, ...; gives the one made."""
    wanted.parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        folder = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        try:
            folder.mkdir()
            break
        except FileExistsError:
            continue
    return folder


def sheet(pictures: Sequence[Image.Image], wrong: Sequence[int], across: int = 20) -> Image.Image:
    """The first pictures in rows, those whose index is in `wrong` framed in red."""
    framed = [
        ImageOps.expand(picture, _FRAME, _WRONG if i in wrong else _RIGHT)
        for i, picture in enumerate(pictures[:_SHEET])
    ]
    return make_grid(framed, nrow=across, padding=0)


def markdown(results: dict[str, Any]) -> str:
    """The results as a table, with the settings in words."""
    lines = [
        "| prompts | fully right | " + " | ".join(PARTS) + " |",
        "| --- | --- |" + " --- |" * len(PARTS),
    ]
    for name, scores in results["kinds"].items():
        lines.append(_row(f"{KINDS[name].title} (`{name}`)", scores))
    first = results["first stage"]
    lines.append(_row("true scenes, through the first stage and back", first))
    run = results["settings"]
    shortcuts = "".join(f", --{name} {value}" for name, value in run.get("shortcuts", {}).items())
    lines += [
        "",
        f"First stage: {first['psnr']:.2f} dB PSNR over {first['prompts']} unseen scenes.",
        f"{run['model']}: {run['steps']} steps of {run['sampler']} at scale {run['scale']:g}{shortcuts}, "
        f"{run['prompts']} prompts of each kind in batches of {run['batch']}, seed {run['seed']}, on {run['device']}. "
        "In brackets the 95 % interval of the share.",
    ]
    return "\n".join(lines) + "\n"


def _row(title: str, scores: dict[str, Any]) -> str:
    low, high = scores["interval"]
    parts = ["" if scores["parts"][part] is None else f"{100 * scores['parts'][part]:.1f} %" for part in PARTS]
    share = f"{100 * scores['share']:.1f} % ({100 * low:.1f} to {100 * high:.1f})"
    return f"| {title} | {share} | " + " | ".join(parts) + " |"


def write(folder: Path, results: dict[str, Any]) -> None:
    """`results.json` and `results.md` in the evaluation's own folder."""
    write_text(folder / "results.json", json.dumps(results, indent=1) + "\n")
    write_text(folder / "results.md", markdown(results))
