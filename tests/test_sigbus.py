"""Memory-mapped files that are cut short under a run: one sentence and an exit code, wherever the page is touched."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm.checkpoint import save_checkpoint
from ldm.checkpoint.formats import storages
from ldm.inference import retrieval
from tests.tiny import write_tiny

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGBUS"), pytest.mark.subprocess]

PROGRAM = """
import os, sys, threading, torch
from ldm import cli
from ldm.checkpoint import fill_model, read_checkpoint
def main(argv):
    model = torch.nn.Module(); model.a = torch.nn.Linear(2000, 2000, device="meta")
    fill_model(model, read_checkpoint(sys.argv[1]))
    os.truncate(sys.argv[1], 4096)
    print("cut", flush=True)
    {touch}
    print("continued", flush=True)
sys.exit(cli.run(main))
"""
TOUCHES = {
    "one thread": "torch.set_num_threads(1); model.a.weight.sum()",
    "several threads": "torch.set_num_threads(4); (model.a.weight * 2).sum()",
    "a product": "torch.set_num_threads(2); model.a(torch.ones(64, 2000))",
    "numpy": "model.a.weight.detach().numpy().sum()",
    "Python's bytes": "bytes(model.a.weight.detach().numpy().data)",
    "another thread": "t = threading.Thread(target=lambda: model.a.weight.sum()); t.start(); t.join()",
    "while Python is busy": "threading.Thread(target=lambda: [0 for _ in iter(int, 1)], daemon=True).start()\n"
    "    model.a.weight.sum()",
}


def state() -> dict[str, torch.Tensor]:
    return {"a.weight": torch.randn(2000, 2000), "a.bias": torch.ones(2000)}


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
@pytest.mark.parametrize("touch", TOUCHES)
def test_a_missing_page(tmp_path, touch, suffix):
    path = save_checkpoint(tmp_path / f"a{suffix}", state())
    command = [sys.executable, "-c", PROGRAM.format(touch=TOUCHES[touch]), str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1 and done.stdout == "cut\n", done
    assert done.stderr == (
        f"\nerror: {path} was cut short while it was in use: put new files in place by renaming them, not by writing "
        "over others, and run again\n"
    )


def test_faulthandler_takes_precedence(tmp_path):
    path = save_checkpoint(tmp_path / "a.ckpt", state())
    command = [sys.executable, "-X", "faulthandler", "-c", PROGRAM.format(touch=TOUCHES["one thread"]), str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode < 0 and "Fatal Python error: Bus error" in done.stderr


def test_a_library_leaves_signals_alone(tmp_path):
    """A program that imports ldm, or calls `cli.run` with arguments, keeps the system's SIGBUS."""
    path = save_checkpoint(tmp_path / "a.ckpt", state())
    program = PROGRAM.format(touch=TOUCHES["one thread"]).replace("cli.run(main)", "cli.run(main, [])")
    done = subprocess.run([sys.executable, "-c", program, str(path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode < 0


@pytest.mark.parametrize("pictures", [0, 2])
def test_a_checkpoint_that_is_cut_short_under_a_script(tmp_path, pictures):
    ckpt = write_tiny(tmp_path)
    options = ["--ckpt", ckpt, "--device", "cpu", "--n_iter", "3000", "--n_samples", "1", "--steps", "2"]
    command = [sys.executable, ROOT / "scripts/txt2img.py", *options, "--prompt", "a circle", "--outdir"]
    process = subprocess.Popen(
        [*map(str, command), str(tmp_path / "out")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    end = time.monotonic() + 300
    while len(list((tmp_path / "out").glob("samples/*.png"))) < pictures or not (tmp_path / "out").exists():
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.01)
    os.truncate(ckpt, 4096)
    error = process.communicate(timeout=300)[1].splitlines()
    assert process.returncode in (1, 2) and not any("Traceback" in line for line in error), error
    messages = [line for line in error if line.startswith("error: ")]
    assert len(messages) == 1 and str(ckpt) in messages[0]


def test_only_files_that_shrank_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(storages, "_mapped", {})
    for name in ("whole", "longer", "shorter", "another", "gone"):
        (tmp_path / name).write_bytes(b"x" * 100)
        storages.note_mapped(tmp_path / name)
    (tmp_path / "longer").write_bytes(b"x" * 101)
    os.truncate(tmp_path / "shorter", 10)
    shutil.copy(tmp_path / "shorter", tmp_path / "new")
    os.replace(tmp_path / "new", tmp_path / "another")
    (tmp_path / "gone").unlink()
    assert storages.shrunk() == [tmp_path / "shorter"]


@pytest.mark.parametrize("safe", [False, True])
def test_databases_are_mapped_where_that_is_safe(tmp_path, monkeypatch, safe):
    np.save(tmp_path / "a.npy", np.eye(4, dtype=np.float32))
    monkeypatch.setattr(retrieval, "may_map", lambda path: safe)
    found, _ = retrieval._read_embeddings(tmp_path / "a.npy")
    assert isinstance(found, np.memmap) is safe and np.array_equal(found, np.eye(4))
