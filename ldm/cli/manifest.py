"""What an output folder holds of a run, so that a run that was stopped goes on where it was: --resume."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.options import ArgumentParser
from ldm.cli.pictures import settings_of
from ldm.cli.prompts import Batch
from ldm.files import PARTIAL

if TYPE_CHECKING:
    from ldm.inference import Seeding
    from ldm.models.diffusion.ddpm import LatentDiffusion

MANIFEST = "manifest.jsonl"
_DEAD = 600  # seconds after which no process is still busy with a file under a temporary name

# Options without a say in what a picture is, or that are said otherwise (see `descriptions`). Any new one has a say,
# until it is listed here: then too much is drawn, never too little.
_OF_NO_EFFECT = (
    *("outdir", "skip_save", "skip_grid", "n_rows", "preview", "resume", "verify", "trust_config", "settings"),
    *("prompt", "from_file", "repeat", "matrix", "n_iter", "n_samples", "seed", "variation_seed"),
    *("ckpt", "config", "device", "H", "W", "C", "f", "laion400m", "ddim", "plms", "dpm_solver"),
    *("public_scale", "public_steps", "public_eta"),
)


def add_resume(parser: ArgumentParser) -> None:
    """--resume, which `descriptions` and `SampleWriter.resume` go by."""
    parser.add_argument(
        "--resume",
        action="store_true",
        help=f"list what is drawn in <outdir>/{MANIFEST}, and draw only what that lacks of the same prompts, seeds and "
        "options: give it from the start, and again to go on with a run that was stopped",
    )


def descriptions(
    args: Namespace, model: LatentDiffusion, batches: Sequence[Batch], seeding: Seeding, **more: Any
) -> list[dict[str, Any]]:
    """For every picture of a run all that determines it, as plain values.

    more: what else has a say, such as the size; of a Path, which file it is now. Pictures with a seed of their own have
    nothing to do with each other; others depend on how many random numbers were drawn before them, thus on the batches
    before theirs.
    """
    options = {name: value for name, value in vars(args).items() if name not in _OF_NO_EFFECT}
    kind = str(model.device).partition(":")[0]  # not which of several: every process has another
    options |= {"model": _stamp(model.info.checkpoint_path), "config": _stamp(args.config), "device": kind}
    options |= {name: _stamp(value) if isinstance(value, Path) else value for name, value in more.items()}
    before, first, found = hashlib.sha256(), 0, []
    for batch in batches:
        shared: dict[str, Any] = {}
        if not (batch.seeded or seeding.per_image):
            shared = {"before": before.hexdigest(), "batch": len(batch.lines), "n_samples": args.n_samples}
            before.update(json.dumps([len(batch.lines), batch.lines[0].options.get("steps")]).encode())
        for row, (line, seeds) in enumerate(zip(batch.lines, settings_of(seeding, first, batch))):
            place = shared and {**shared, "row": row}
            found.append({**options, "prompt": line.prompt, **line.options, **seeds, **place})
        first += len(batch.lines)
    return found


def _stamp(path: str | Path | None) -> list[Any] | None:
    """A file's name, size and time: another file, or a new one in its place, has another."""
    if path is None:
        return None
    found = os.stat(path)
    return [Path(path).name, found.st_size, found.st_mtime_ns]


def key_of(description: Mapping[str, Any]) -> str:
    """The same for equal descriptions, and for no others."""
    return hashlib.sha256(json.dumps(description, sort_keys=True, default=str).encode()).hexdigest()


class Manifest:
    """A file of JSON lines, one a picture: its `key`, its file's `sha256` and, for people, `prompt` and `seed`.

    A line is on disk before its picture gets its name, and counts if a file with that checksum is in `folder`, so
    neither a kill at any moment nor a deleted, renamed or damaged picture misleads. Lines that are cut short do not
    count. Several processes may add to one file.
    """

    def __init__(self, path: Path, folder: Path) -> None:
        self._path, self._folder = path, folder

    def find(self, wanted: Sequence[Mapping[str, Any]]) -> list[str | None]:
        """The file of each of these pictures, None where there is none; clears away what kills left half-written."""
        self._clear()
        names: dict[str, list[str]] = {}
        for path in sorted(self._folder.glob("*.png"), reverse=True):
            names.setdefault(_checksum(path), []).append(path.name)
        held: dict[str, list[str]] = {}
        for line in self._lines():
            if names.get(line["sha256"]):
                held.setdefault(line["key"], []).append(names[line["sha256"]].pop())
        return [held[key].pop(0) if held.get(key) else None for key in map(key_of, wanted)]

    def _clear(self) -> None:
        for path in self._folder.glob(PARTIAL.format(name="*", pid="*")):
            with contextlib.suppress(FileNotFoundError):  # another process was done with it just now
                if time.time() - path.stat().st_mtime > _DEAD:
                    path.unlink()

    def _lines(self) -> list[dict[str, str]]:
        """The lines that are whole; what is added goes on a line of its own."""
        if not self._path.exists():
            return []
        data = self._path.read_bytes()
        if data and not data.endswith(b"\n"):
            self._append(b"\n")
        lines = []
        for text in data.split(b"\n"):
            try:
                line = json.loads(text)
                if isinstance(line["key"], str) and isinstance(line["sha256"], str):
                    lines.append(line)
            except (ValueError, TypeError, KeyError, RecursionError):
                continue
        return lines

    def add(self, description: Mapping[str, Any], path: Path) -> None:
        """Announce a picture, all of which is in `path`."""
        line = {"key": key_of(description), "sha256": _checksum(path)}
        line |= {name: description[name] for name in ("prompt", "seed")}
        self._append(json.dumps(line).encode() + b"\n")

    def _append(self, data: bytes) -> None:
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            if os.write(descriptor, data) < len(data):
                raise OSError(f"cannot write to {self._path}: no space left")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
