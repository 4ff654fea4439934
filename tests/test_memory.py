"""Freed memory that stays with the process: said truly, and only where programs ask for it."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
from ldm.memory import keep_freed_memory
import torch
kept = len(sys.argv) > 1 and keep_freed_memory()
def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def work():
    for _ in range(20):
        x = torch.ones(4_000_000)  # 16 MB: 3,900 pages
        del x
work()
before = faults()
work()
print(int(kept), faults() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it is about glibc")
def test_blocks_come_back_without_being_cleared_again():
    def run(*argv: str) -> tuple[int, int]:
        done = subprocess.run([sys.executable, "-c", PROGRAM, *argv], capture_output=True, text=True, check=True)
        kept, faults = done.stdout.split()
        return int(kept), int(faults)

    kept, faults = run("keep")
    assert faults < 3_900 or not kept  # less than one block's pages, for twenty blocks
