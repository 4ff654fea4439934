"""A run that is killed again and again, and what it leaves each time: `python -m tests.training.kills FOLDER KILLS`.

One process imports everything, then forks every life of the run, since a life is shorter than its imports. A life tells
of each of its steps, so that kills spread over start, training and saving however busy the machine is.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ldm.training.checkpoints import read_training_state
from ldm.util import trust
from tests.training.toys import TwoPlayers, assert_same_weights, config, run, start, weights

FOREVER = 10**6
LONGEST = 8  # steps of a life before its kill
WITHIN = 0.2  # seconds from a step to the kill, longer than the next step and its files take
AFTER = 4  # steps of the last life, which nothing kills

_told: int | None = None  # where a life writes a byte a step


class Heavy(TwoPlayers):
    """`TwoPlayers` with as much ballast as makes saving a good part of the time."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("ballast", torch.zeros(1 << 19))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        super().training_step(batch, batch_idx)
        self.ballast += 1  # a file of tensors from different steps would show
        if _told is not None:
            os.write(_told, b".")


def content() -> dict[str, Any]:
    """Five batches an epoch, and two files after every one of them."""
    result = config({"target": "tests.training.kills.Heavy", "base_learning_rate": 1e-3})
    result["lightning"]["modelcheckpoint"] = {"params": {"every_n_train_steps": 1, "save_top_k": 2}}
    return result


def life(work: Callable[[], Any], steps: int | None = None, delay: float = 0.0) -> int:
    """`work` in a process of its own, killed `delay` seconds after so many steps; gives how it ended (-9: killed)."""
    global _told
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ours)
        _told = theirs
        os._exit(work())
    os.close(theirs)
    for _ in range(steps or 0):
        os.read(ours, 1)
    if steps is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    else:
        while os.read(ours, 1):
            pass
    os.close(ours)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def check(run_folder: Path) -> int:
    """Every file under a checkpoint's name is complete, to the last bit; returns the step of the last one, or 0."""
    checkpoints = run_folder / "checkpoints"
    for path in checkpoints.glob("*.ckpt"):
        assert zipfile.ZipFile(path).testzip() is None, f"{path} is damaged"
        state = read_training_state(path)
        steps = state["state_dict"]["ballast"].unique().tolist()
        assert steps == [state["place"]["total"]], f"{path} mixes steps {steps}"
    last = checkpoints / "last.ckpt"
    return int(read_training_state(last)["place"]["total"]) if last.is_file() else 0


def check_kept(checkpoints: Path) -> None:
    """No file is left over that the run would not delete any more."""
    (state,) = (
        value for value in read_training_state(checkpoints / "last.ckpt")["callbacks"].values() if "kept" in value
    )
    named = {path.name for path in checkpoints.glob("*.ckpt")} - {"last.ckpt"}
    assert named == set(state["kept"]) and len(named) <= 2, (named, state["kept"])


def killed(folder: Path, kills: int, rng: random.Random) -> Path:
    """A run killed so often, and once more until it has a checkpoint; gives its folder."""
    last: Path | None = None
    midway = step = 0
    for number in itertools.count(1):
        if last is None:
            base = folder / f"life-{number}"
            ended = life(lambda: start(base, content(), "--max_steps", FOREVER)[0], rng.randrange(LONGEST))  # noqa: B023
        else:
            ended = life(lambda: run("--resume", last, "-t"), rng.randrange(LONGEST), rng.uniform(0, WITHIN))  # noqa: B023
        assert ended == -signal.SIGKILL, f"the run ended by itself, with {ended}, after {number - 1} kills"
        for run_folder in [last] if last else list(base.glob("logs/*")):
            midway += any((run_folder / "checkpoints").glob(".*.partial"))
            now = check(run_folder)
            assert now >= step, f"the run fell back from step {step} to {now}"
            step, last = now, run_folder if now else None
        if number >= kills and last is not None:
            print(f"{number} kills, {midway} of them while a file was written; {step} steps survived them")
            return last


def main(folder: Path, kills: int, seed: int) -> None:
    """Kill a run, resume it, and compare its weights with those of an uninterrupted run."""
    trust("tests")
    torch.set_num_threads(1)  # a thread pool does not survive a fork
    parts = killed(folder, kills, random.Random(seed))
    end = ("--max_steps", 2 * (check(parts) + AFTER))  # Lightning counts the steps of both optimisers
    assert life(lambda: run("--resume", parts, "-t", *end)) == 0, "the run did not resume"
    assert not list((parts / "checkpoints").glob(".*.partial"))
    check_kept(parts / "checkpoints")
    assert life(lambda: start(folder / "complete", content(), *end)[0]) == 0
    (complete,) = (folder / "complete/logs").iterdir()
    assert_same_weights(weights(parts), weights(complete))


if __name__ == "__main__":
    from tests.training import kills  # the module that the config's target is in, not a second one called __main__

    kills.main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0)
