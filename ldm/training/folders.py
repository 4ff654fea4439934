"""Run folders: `<logdir>/<time>_<name>/{checkpoints,configs,metrics,images}`."""

from __future__ import annotations

import contextlib
import os
from datetime import datetime
from pathlib import Path

LAST = "last.ckpt"


def is_first_process() -> bool:
    """Whether this process is the one of its run that writes, told from the environment before Lightning starts."""
    names = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "NODE_RANK", "GROUP_RANK")
    return all(int(os.environ.get(name) or 0) == 0 for name in names)


def timestamp() -> str:
    """The time now as it is in the names of run folders and of the configs in them."""
    return datetime.now().strftime("%Y-%m-%dT%H-%M-%S")


def run_name(name: str, base: list[str], postfix: str) -> str:
    """What follows the time in a run folder's name: the name given, or that of the first config."""
    return f"_{name or Path(base[0]).stem}{postfix}"


def new_run(logdir: str | Path, now: str, name: str) -> Path:
    """Make a run folder of its own, whatever others were made in the same second; returns it.

    Only the first process makes one; the others learn its name from that one.
    """
    place = Path(logdir) / f"{now}{name}"
    if not is_first_process():
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        try:
            place.mkdir()
            return place
        except FileExistsError:
            number += 1
            place = Path(logdir) / f"{now}{name}-{number}"


def discard_if_empty(folder: Path) -> None:
    """Remove a run folder in which nothing was written."""
    for place in [*sorted((p for p in folder.glob("**/*") if p.is_dir()), reverse=True), folder]:
        with contextlib.suppress(OSError):  # not empty
            place.rmdir()


def find_run(path: str | Path) -> tuple[Path, Path]:
    """The run folder and the checkpoint that `path`, one of the two, stands for.

    Raises FileNotFoundError or ValueError if it is neither.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"--resume {path}: there is no such run folder or checkpoint")
    if path.is_file():
        folder = next((place for place in path.resolve().parents if stored_configs(place)), None)
        if folder is None:
            raise ValueError(
                f"--resume {path} is in no run folder (one with configs/*-project.yaml): to start a new run from its "
                "weights, give them as model.params.ckpt_path"
            )
        return folder, path
    if not stored_configs(path):
        raise ValueError(f"--resume {path} is no run folder: it holds no configs/*-project.yaml")
    checkpoint = path / "checkpoints" / LAST
    if not checkpoint.is_file():
        others = sorted(file.name for file in checkpoint.parent.glob("*.ckpt"))
        hint = f"name one of {', '.join(others)}" if others else "the run ended before it wrote any"
        raise FileNotFoundError(f"--resume {path}: there is no {checkpoint} ({hint})")
    return path, checkpoint


def stored_configs(run: Path) -> list[Path]:
    """The configs in a run folder, oldest first."""
    configs = run / "configs"
    return sorted(configs.glob("*-*.yaml")) if any(configs.glob("*-project.yaml")) else []
