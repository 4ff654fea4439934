"""Files of an evaluation: a table, the numbers, and contact sheets of images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from benchmarks.shapes.scoring import PARTS, PROMPT_SETS
from ldm.files import write_text
from ldm.images import make_grid

_FRAME = 3  # pixels around an image
_SHEET = 200  # images of a sheet
_RIGHT, _WRONG = (70, 70, 70), (230, 0, 0)


def sheet(images: Sequence[Image.Image], wrong: Sequence[int], across: int = 20) -> Image.Image:
    """Arrange the first images in rows; those with an index in `wrong` get a red frame."""
    framed = [
        ImageOps.expand(image, _FRAME, _WRONG if i in wrong else _RIGHT) for i, image in enumerate(images[:_SHEET])
    ]
    return make_grid(framed, nrow=across, padding=0)


def markdown(results: dict[str, Any]) -> str:
    """Format the results as a table with the settings."""
    lines = [
        "| prompts | all correct | " + " | ".join(PARTS) + " |",
        "| --- | --- |" + " --- |" * len(PARTS),
    ]
    for name, scores in results["prompt sets"].items():
        lines.append(_row(f"{PROMPT_SETS[name].title} (`{name}`)", scores))
    first = results["first stage"]
    lines.append(_row("true scenes, through the first stage and back", first))
    run = results["settings"]
    acceleration = "".join(f", --{name} {value}" for name, value in run.get("acceleration", {}).items())
    lines += [
        "",
        f"First stage: {first['psnr']:.2f} dB PSNR over {first['prompts']} unseen scenes.",
        f"{run['model']}: {run['steps']} steps of {run['sampler']} at scale {run['scale']:g}{acceleration}, "
        f"{run['prompts']} prompts per set in batches of {run['batch']}, seed {run['seed']}, on {run['device']}. "
        "In brackets the 95 % confidence interval.",
    ]
    return "\n".join(lines) + "\n"


def _row(title: str, scores: dict[str, Any]) -> str:
    low, high = scores["interval"]
    parts = ["" if scores["parts"][part] is None else f"{100 * scores['parts'][part]:.1f} %" for part in PARTS]
    accuracy = f"{100 * scores['accuracy']:.1f} % ({100 * low:.1f} to {100 * high:.1f})"
    return f"| {title} | {accuracy} | " + " | ".join(parts) + " |"


def write(folder: Path, results: dict[str, Any]) -> None:
    """Write `results.json` and `results.md`."""
    write_text(folder / "results.json", json.dumps(results, indent=1) + "\n")
    write_text(folder / "results.md", markdown(results))
