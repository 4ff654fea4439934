"""Kills runs of txt2img at random moments, and goes on with them: FOLDER, how many kills, seed, options of the run.

A process that has imported everything forks one for each start. What it finds out is printed as JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import tqdm
from PIL import Image

import ldm.inference  # noqa: F401 - what a run would import
from ldm import cli
from scripts import txt2img


def start(argv: Sequence[str]) -> int:
    """The process id of a run."""
    process = os.fork()
    if process:
        return process
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        os._exit(cli.run(txt2img.main, argv))


def finished(process: int, seconds: float | None) -> bool:
    """Whether it ends in that time, and well; else it is killed. None: as long as it takes."""
    end = None if seconds is None else time.monotonic() + seconds
    while end is None or time.monotonic() < end:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0, status
            return True
        time.sleep(0.002)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return False


def pictures(folder: Path) -> dict[str, bytes]:
    """The files of a run's pictures, every one of which can be read to its end."""
    found = {}
    for path in sorted(folder.rglob("*.png")):
        with Image.open(path) as image:
            image.load()
        found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def main(folder: Path, kills: int, seed: int, options: Sequence[str]) -> None:
    torch.set_num_threads(1)
    tqdm.tqdm.monitor_interval = 0  # a thread would not survive the fork
    moments, killed, held, rounds = random.Random(seed), 0, set(), 0
    began = time.monotonic()
    assert finished(start([*options, "--outdir", str(folder / "whole")]), None)
    length = time.monotonic() - began
    expected = pictures(folder / "whole")
    while killed < kills:
        outdir, rounds = folder / f"round{rounds}", rounds + 1
        argv = [*options, "--resume", "--outdir", str(outdir)]
        while killed < kills and not finished(start(argv), moments.uniform(0.2, 1) * length):
            killed += 1
            held.add(len(found := pictures(outdir)))
            assert found.items() <= expected.items(), sorted(found.keys() - expected.keys())
        assert finished(start(argv), None)
        assert pictures(outdir) == expected
    print(json.dumps({"kills": killed, "rounds": rounds, "held": sorted(held), "pictures": len(expected)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
