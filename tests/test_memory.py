"""Freed memory that stays with the process: said truly, and only where programs ask for it."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, resource, sys
from ldm.memory import keep_freed_memory
kept = len(sys.argv) > 1 and keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.memset.argtypes, libc.free.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t], [ctypes.c_void_p]
def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def work():
    for _ in range(5):
        blocks = [libc.malloc(25_000_000) for _ in range(8)]
        for block in blocks: libc.memset(block, 1, 25_000_000)  # 6,100 pages
        for block in blocks: libc.free(block)
work()
before = faults()
work()
print(int(kept), faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is about glibc")
def test_blocks_come_back_without_being_cleared_again():
    def run(*argv: str) -> list[int]:
        done = subprocess.run([sys.executable, "-c", PROGRAM, *argv], capture_output=True, text=True, check=True)
        return [int(number) for number in done.stdout.split()]

    (kept, few), (_, many) = run("keep"), run()
    assert kept
    assert 10 * few < many  # what a program does not ask for stays as it was
