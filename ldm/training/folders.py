"""Run folders: `<logdir>/<time>_<name>/{checkpoints,configs,metrics,images}`."""

from __future__ import annotations

import contextlib
import os
from datetime import datetime
from pathlib import Path

LAST = "last.ckpt"


def is_first_process() -> bool:
    """Whether this process writes the run's files, by the environment: Lightning has not started yet."""
    names = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "NODE_RANK", "GROUP_RANK")
    return all(int(os.environ.get(name) or 0) == 0 for name in names)


def timestamp() -> str:
    """The current time as in the names of run folders and their configs."""
    return datetime.now().strftime("%Y-%m-%dT%H-%M-%S")


def run_name(name: str, base: list[str], postfix: str) -> str:
    """The part of a run folder's name after the time: the name given, or that of the first config."""
    return f"_{name or Path(base[0]).stem}{postfix}"


def new_run(logdir: str | Path, now: str, name: str) -> Path:
    """Create a run folder, with a number if there is one of the same second, and return it.

    Only the first process creates it.
    """
    folder = Path(logdir) / f"{now}{name}"
    if not is_first_process():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            number += 1
            folder = Path(logdir) / f"{now}{name}-{number}"


def discard_if_empty(folder: Path) -> None:
    """Remove a run folder in which nothing was written."""
    for path in [*sorted((p for p in folder.glob("**/*") if p.is_dir()), reverse=True), folder]:
        with contextlib.suppress(OSError):  # not empty
            path.rmdir()


def find_run(path: str | Path) -> tuple[Path, Path]:
    """The run folder and the checkpoint of `path`, which is one of the two.

    Raises FileNotFoundError or ValueError if it is neither.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"--resume {path}: there is no such run folder or checkpoint")
    if path.is_file():
        folder = next((parent for parent in path.resolve().parents if stored_configs(parent)), None)
        if folder is None:
            raise ValueError(
                f"--resume {path} is not in a run folder (one with configs/*-project.yaml): to start a new run from "
                "its weights, use model.params.ckpt_path={path}"
            )
        return folder, path
    if not stored_configs(path):
        raise ValueError(f"--resume {path} is not a run folder: it has no configs/*-project.yaml")
    checkpoint = path / "checkpoints" / LAST
    if not checkpoint.is_file():
        others = sorted(file.name for file in checkpoint.parent.glob("*.ckpt"))
        hint = f"use one of {', '.join(others)}" if others else "the run ended before it wrote a checkpoint"
        raise FileNotFoundError(f"--resume {path}: there is no {checkpoint} ({hint})")
    return path, checkpoint


def stored_configs(run: Path) -> list[Path]:
    """The configs in a run folder, oldest first."""
    configs = run / "configs"
    return sorted(configs.glob("*-*.yaml")) if any(configs.glob("*-project.yaml")) else []
