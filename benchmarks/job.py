"""A measurement in a process of its own, where nothing that was done before is in memory or in caches.

python -m benchmarks.job MODULE:FUNCTION '{"argument": ...}'
"""

from __future__ import annotations

import json
import subprocess
import sys
import traceback
from importlib import import_module
from typing import Any

from ldm.util import REPOSITORY


def in_fresh_process(function: str, **arguments: Any) -> dict[str, Any]:
    """What `function`, "suites.load:ours" or the like, gives there. Both ways through JSON.

    Raises RuntimeError with its last words, MemoryError if the system ended it.
    """
    command = [sys.executable, "-m", "benchmarks.job", function, json.dumps(arguments)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    if done.returncode == -9:
        raise MemoryError("the system ended the process, which it does when memory runs out")
    if done.returncode:
        words = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RuntimeError(words[-1])
    return json.loads(done.stdout.strip().splitlines()[-1])


def main(function: str, arguments: str) -> None:
    """What is run in the fresh process: the last line that it prints is the answer."""
    module, _, name = function.partition(":")
    print(json.dumps(getattr(import_module(f"benchmarks.{module}"), name)(**json.loads(arguments))))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except Exception:
        # not left to sys.excepthook, which torchmetrics 1.4.0 replaces with one that breaks the last line
        traceback.print_exc()
        sys.exit(1)
