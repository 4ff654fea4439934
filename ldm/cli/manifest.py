"""The manifest of an output folder, for --resume: which images of a run are there already."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.prompts import Batch
from ldm.files import PARTIAL

if TYPE_CHECKING:
    from ldm.inference import SamplingOptions
    from ldm.models.diffusion.ddpm import LatentDiffusion

MANIFEST = "manifest.jsonl"
_ABANDONED_AFTER = 600  # seconds after which no process still writes a file under a temporary name

# Arguments that do not determine an image, or do so by other entries of `descriptions`. New arguments count until they
# are listed here: then too many images are generated, never too few.
_IGNORED = (
    *("outdir", "skip_save", "skip_grid", "n_rows", "preview", "resume", "verify", "trust_config", "settings"),
    *("prompt", "from_file", "repeat", "matrix", "n_iter", "n_samples", "seed", "variation_seed"),
    *("ckpt", "config", "device", "H", "W", "C", "f", "laion400m", "ddim", "plms", "dpm_solver"),
    *("public_scale", "public_steps", "public_eta"),
    *("ddim_steps", "ddim_eta", "scale_schedule", "guidance", "guidance_interval", "cache_features", "merge_tokens"),
)


def descriptions(
    args: Namespace, model: LatentDiffusion, options: SamplingOptions, batches: Sequence[Batch], **more: Any
) -> list[dict[str, Any]]:
    """Everything that determines each image of a run, as plain values.

    Args:
        args: The command line.
        model: The loaded model.
        options: Resolved options of the run.
        batches: The run's batches.
        **more: What else determines images, such as their size; a Path stands for the file that it is now.

    Images with their own seeds do not depend on each other; others depend on how many random numbers were used before,
    and so on the batches before theirs.
    """
    names = {field.name for field in fields(options)}
    common = {name: value for name, value in vars(args).items() if name not in (*_IGNORED, *names)} | asdict(options)
    for name in ("seed", "variation_seed"):  # of each image, below
        common.pop(name)
    kind = str(model.device).partition(":")[0]  # not the index: every process has another
    assert model.info is not None
    common |= {"model": _stamp(model.info.checkpoint_path), "config": _stamp(args.config), "device": kind}
    common |= {name: _stamp(value) if isinstance(value, Path) else value for name, value in more.items()}
    before, first, found = hashlib.sha256(), 0, []
    for batch in batches:
        position: dict[str, Any] = {}
        if not (batch.seeded or options.per_image):
            position = {"before": before.hexdigest(), "batch": len(batch.lines), "n_samples": args.n_samples}
            before.update(json.dumps([len(batch.lines), batch.lines[0].options.get("steps")]).encode())
        settings = image_settings(options, first, batch)
        for row, (line, own) in enumerate(zip(batch.lines, settings)):
            place = position and {**position, "row": row}
            found.append({**common, "prompt": line.prompt, **line.options, **own, **place})
        first += len(batch.lines)
    return found


def image_settings(options: SamplingOptions, first: int, batch: Batch) -> list[dict[str, Any]]:
    """Metadata of a batch's images, each for itself; the first of them is image `first` of the run."""
    seeds = options.image_settings(first, len(batch.lines))
    return [{**seed, **own} for seed, own in zip(seeds, batch.image_settings)]


def _stamp(path: str | Path | None) -> list[Any] | None:
    """A file's name, size and time, which change with the file."""
    if path is None:
        return None
    found = os.stat(path)
    return [Path(path).name, found.st_size, found.st_mtime_ns]


def key_of(description: Mapping[str, Any]) -> str:
    """A hash that is the same for equal descriptions only."""
    return hashlib.sha256(json.dumps(description, sort_keys=True, default=str).encode()).hexdigest()


class Manifest:
    """A file of JSON lines, one per image: its `key`, its file's `sha256` and, for people, `prompt` and `seed`.

    A line is on disk before its image gets its name, and counts only if a file with that checksum is in `folder`, so
    it stays right after a kill at any moment and when images are deleted, renamed or damaged. Truncated lines do not
    count. Several processes may append to one file.
    """

    def __init__(self, path: Path, folder: Path) -> None:
        self._path, self._folder = path, folder

    def find(self, wanted: Sequence[Mapping[str, Any]]) -> list[str | None]:
        """The file of each of these images, or None; removes files that killed processes left half-written."""
        self._remove_partial_files()
        names: dict[str, list[str]] = {}
        for path in sorted(self._folder.glob("*.png"), reverse=True):
            names.setdefault(_checksum(path), []).append(path.name)
        found: dict[str, list[str]] = {}
        for line in self._lines():
            if names.get(line["sha256"]):
                found.setdefault(line["key"], []).append(names[line["sha256"]].pop())
        return [found[key].pop(0) if found.get(key) else None for key in map(key_of, wanted)]

    def _remove_partial_files(self) -> None:
        for path in self._folder.glob(PARTIAL.format(name="*", pid="*")):
            with contextlib.suppress(FileNotFoundError):  # another process has just finished it
                if time.time() - path.stat().st_mtime > _ABANDONED_AFTER:
                    path.unlink()

    def _lines(self) -> list[dict[str, str]]:
        """The complete lines; ends a truncated last line, so that new lines start on their own."""
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
        """Add an image, which is complete in `path`."""
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
