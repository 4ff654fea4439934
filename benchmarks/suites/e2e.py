"""The command that draws with the bundled model, from the start of its process to its end."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks.comparing import Bench
from benchmarks.rows import Row
from benchmarks.timing import in_turns, timed
from ldm.inference import BUNDLED_CKPT
from ldm.util import REPOSITORY, public_path

SCRIPT = "scripts/txt2img.py"
PRECISIONS = {"fp32": "full", "fp16": "fp16", "bf16": "bf16"}  # as the script calls them


def rows(bench: Bench) -> Iterator[Row]:
    """Of every precision. FileNotFoundError without a clone, which has the script and the model."""
    settings, ckpt = bench.settings, settings_ckpt()
    for precision in settings.precisions:
        options = ["--ckpt", str(ckpt), "--device", str(settings.device), "--precision", PRECISIONS[precision]]
        row = Row("e2e", SCRIPT, "ours", str(settings.device), precision, unit="runs")
        call = partial(timed, partial(draw, options))
        for _ in range(settings.warm_up):
            row.first = row.first or call()
        row.seconds = in_turns({"ours": call}, settings.repeats)["ours"]
        yield row


def settings_ckpt() -> Path:
    """The bundled model's file."""
    ckpt = public_path(BUNDLED_CKPT)
    if ckpt is None or not (REPOSITORY / SCRIPT).is_file():
        raise FileNotFoundError(f"--suite e2e needs {SCRIPT} and {BUNDLED_CKPT}: run it from a clone")
    return ckpt


def draw(options: list[str]) -> None:
    """A run in a fresh folder; RuntimeError, with its last words, unless there is a picture in the end."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(REPOSITORY / SCRIPT), *options, "--outdir", folder]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode or not list(Path(folder).rglob("*.png")):
            raise RuntimeError((done.stderr.strip().splitlines() or ["it wrote no picture"])[-1])
