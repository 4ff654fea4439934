"""Peak memory, and jobs in processes of their own."""

from __future__ import annotations

import mmap
import subprocess
import sys
import threading

import pytest
import torch

from benchmarks import measure
from benchmarks.compare import explain
from benchmarks.measure import PeakMemory, run_in_process
from ldm.util import REPOSITORY
from tests.tiny import write_tiny

CPU = torch.device("cpu")
needs_proc = pytest.mark.skipif(measure.anonymous_memory() is None, reason="the system does not tell")


@needs_proc
def test_a_past_peak_of_memory_is_measured():
    # of the system's memory, since torch may be given some that this process has kept
    with PeakMemory(CPU) as peak, mmap.mmap(-1, 200_000_000, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as pages:
        pages[::4096] = b"x" * len(range(0, len(pages), 4096))
        threading.Event().wait(10 * measure.INTERVAL)
    assert 195e6 < peak.extra < 260e6
    assert peak.total == peak.before + peak.extra


@needs_proc
def test_mapped_files_do_not_count(tmp_path):
    path = tmp_path / "numbers"
    torch.ones(25_000_000).numpy().tofile(path)
    with PeakMemory(CPU) as peak:
        mapped = torch.from_file(str(path), size=25_000_000)
        assert mapped.sum() == 25_000_000
        threading.Event().wait(10 * measure.INTERVAL)
    assert peak.extra < 50e6


def test_memory_is_none_without_proc(monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "STATUS", tmp_path / "none")
    with PeakMemory(CPU) as peak:
        pass
    assert (peak.total, peak.extra) == (None, None)


@pytest.mark.subprocess
def test_a_job_runs_in_another_process(tmp_path):
    path = tmp_path / "new.ckpt"
    config = write_tiny(tmp_path).with_name("config.yaml")
    assert run_in_process("suites.processes:write_checkpoint", config=str(config), path=str(path)) is None
    found = run_in_process(
        "suites.processes:load_ours", config=str(config), ckpt=str(path), device="cpu", precision="full"
    )
    assert found["seconds"] > 0


@pytest.mark.subprocess
def test_a_failed_job_raises_its_error():
    with pytest.raises(RuntimeError, match="FileNotFoundError.*nowhere.ckpt"):
        run_in_process("suites.processes:load_ours", config=None, ckpt="nowhere.ckpt", device="cpu", precision="full")


@pytest.mark.subprocess
def test_last_line_is_the_error_with_a_custom_excepthook():
    job = "import runpy; runpy.run_module('benchmarks.measure', run_name='__main__')"
    program = f"import sys; sys.excepthook = lambda *error: print('pretty', file=sys.stderr); {job}"
    command = [sys.executable, "-c", program, "compare:nothing", "{}"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("AttributeError: module 'benchmarks.compare' has no attribute")


def test_running_out_of_memory_is_explained():
    found = explain(
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 17 bytes")
    )
    assert "needs another 17 bytes" in found and "--batch" in found and "--size" in found
    found = explain(RuntimeError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has ..."))
    assert "needs another 2.50 GiB" in found
    assert explain(RuntimeError("a\n  b")) == "a b"
