"""A long run of txt2img with the bundled model, watched: FOLDER, how many prompts, steps. Prints JSON.

For every batch the memory that the process holds (MiB) and how many files it has open, the time, and the addresses that
sockets were bound to.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ldm import cli, inference
from scripts import txt2img


def main(folder: Path, prompts: int, steps: int) -> None:
    torch.set_num_threads(1)
    memory, files, bound = [], [], []
    sys.addaudithook(lambda event, args: bound.append(str(args[1])) if event == "socket.bind" else None)
    sample = inference.Pipeline.__call__

    def watched(*args: Any, **options: Any) -> Any:
        result = sample(*args, **options)
        resident = int(Path("/proc/self/statm").read_text().split()[1])
        memory.append(resident * os.sysconf("SC_PAGE_SIZE") / 2**20)
        files.append(len(os.listdir("/proc/self/fd")))
        return result

    inference.Pipeline.__call__ = watched
    colors, shapes = ("red", "green", "blue", "yellow", "white"), ("circle", "square", "star", "ring", "cross")
    lines = [f"a {colors[i % 5]} {shapes[i // 5 % 5]}" for i in range(prompts)]
    (folder / "prompts.txt").write_text("\n".join(lines))
    argv = ["--from-file", str(folder / "prompts.txt"), "--outdir", str(folder / "out"), "--steps", str(steps)]
    began = time.monotonic()
    code = cli.run(txt2img.main, [*argv, "--n_iter", "1", "--n_samples", "4", "--device", "cpu", "--resume"])
    found = {"code": code, "seconds": round(time.monotonic() - began, 1), "bound": bound}
    print(json.dumps(found | {"memory": [round(value, 1) for value in memory], "files": files}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
