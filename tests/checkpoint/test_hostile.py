"""Hostile files run nothing, take little memory and time, and end in one sentence."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ldm import cli
from ldm.checkpoint import Checkpoint, CheckpointError, fill_model, read_checkpoint, reading
from ldm.checkpoint.formats import containers, unpickler
from ldm.checkpoint.formats.allowlist import DTYPES
from scripts import prune_checkpoint
from tests.checkpoint import hostile

CORPUS = hostile.corpus()
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory) -> dict[str, str]:
    """What reading each file of the corpus came to, in a process with little memory."""
    folder, here = tmp_path_factory.mktemp("hostile"), tmp_path_factory.mktemp("here")
    for number, (content, _) in enumerate(CORPUS.values()):
        (folder / f"{number:03}").write_bytes(content)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.checkpoint.hostile", str(folder)]
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=600)
    lines = dict(json.loads(line) for line in done.stdout.splitlines())
    assert not list(here.iterdir()), "something ran"
    assert done.returncode == 0, (done.stderr[-2000:], [key for key, what in lines.items() if what.startswith("ended")])
    return {key: lines.get(f"{number:03}", "was not reached") for number, key in enumerate(CORPUS)}


@pytest.mark.subprocess
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc and limits of memory")
@pytest.mark.parametrize("key", CORPUS)
def test_hostile_file(outcome, key):
    expected, found = CORPUS[key][1], outcome[key]
    if expected == hostile.LOADS:
        assert found == hostile.LOADS
        return
    assert re.search(expected, found), found
    assert found.isprintable()
    assert len(found) < 1000


def test_command_line_error_is_one_line(tmp_path, capsys):
    for number, (content, expected) in enumerate(list(CORPUS.values())[:3]):
        (tmp_path / f"{number}.ckpt").write_bytes(content)
        assert cli.run(prune_checkpoint.main, [str(tmp_path / f"{number}.ckpt"), str(tmp_path / "out.ckpt")]) == 2
        complaint = capsys.readouterr().err
        assert re.fullmatch(rf"error: .*{expected}.*\n", complaint)
    assert not (tmp_path / "out.ckpt").exists()


def test_pipes_and_devices_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(CheckpointError, match="is not a file"):
            read_checkpoint(path)


def test_limits(tmp_path, monkeypatch):
    torch.save({f"w{i}": torch.ones(1) for i in range(20)}, tmp_path / "a.ckpt")
    assert len(read_checkpoint(tmp_path / "a.ckpt").state) == 20
    for module, name, expected in [
        (reading, "MAX_TENSORS", "20 tensors, more than any model has"),
        (unpickler, "MAX_STEPS", "too many values"),
        (containers, "MAX_DIRECTORY", "more entries than any"),
        (containers, "MAX_PICKLE", "more beside tensors"),
    ]:
        with monkeypatch.context() as patch:
            patch.setattr(module, name, 10)
            with pytest.raises(CheckpointError, match=expected):
                read_checkpoint(tmp_path / "a.ckpt")
    torch.save({"w": torch.ones(1)}, tmp_path / "b.ckpt", _use_new_zipfile_serialization=False)
    monkeypatch.setattr(containers, "MAX_PICKLE", 100)
    with pytest.raises(CheckpointError, match="more beside tensors"):
        read_checkpoint(tmp_path / "b.ckpt")


@pytest.mark.parametrize("dtype", [torch.complex64, torch.bool, torch.int8, torch.int64])
def test_weights_of_another_dtype_kind_are_refused(tmp_path, dtype):
    model = nn.Linear(2, 2, device="meta")
    state = {"weight": torch.ones(2, 2).to(dtype), "bias": torch.ones(2)}
    torch.save(state, tmp_path / "a.ckpt")
    with pytest.raises(
        CheckpointError, match=rf"weight weight is of type {str(dtype)[6:]}.*in the model of type float32"
    ):
        fill_model(model, read_checkpoint(tmp_path / "a.ckpt"))
    assert all(parameter.is_meta for parameter in model.parameters())


def test_counters_may_be_rounded():
    model = nn.Module()
    model.register_buffer("steps", torch.zeros((), dtype=torch.int32, device="meta"))
    fill_model(model, Checkpoint(Path("x"), {"steps": torch.tensor(3.0).half()}))
    assert (model.steps.item(), model.steps.dtype) == (3, torch.int32)
    with pytest.raises(CheckpointError, match="complex"):
        fill_model(model, Checkpoint(Path("x"), {"steps": torch.tensor(3j)}))


def test_expanded_and_shared_tensors(tmp_path):
    base = torch.randn(6)
    state = {"row": base[None].expand(3, 6), "again": base, "part": base[2:5], "turned": base.view(2, 3).T}
    torch.save(state, tmp_path / "a.ckpt")
    found = read_checkpoint(tmp_path / "a.ckpt").state
    assert all(torch.equal(found[key], value) and found[key].stride() == value.stride() for key, value in state.items())
    assert found["part"].untyped_storage().data_ptr() == found["again"].untyped_storage().data_ptr()


@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_every_dtype(tmp_path):
    state = {name: torch.zeros(3, 2).to(getattr(torch, name)) for name in DTYPES}
    for zipped in (True, False):
        torch.save(state, tmp_path / "a.ckpt", _use_new_zipfile_serialization=zipped)
        found = read_checkpoint(tmp_path / "a.ckpt").state
        assert {key: (value.dtype, value.shape) for key, value in found.items()} == {
            key: (value.dtype, value.shape) for key, value in state.items()
        }


def test_duplicate_names_are_refused(tmp_path):
    tower = "cond_stage_model.transformer."
    for order in (("", "text_model."), ("text_model.", "")):
        state = {f"{tower}{part}encoder.weight": torch.full((1,), float(i)) for i, part in enumerate(order)}
        save_file(state, tmp_path / "a.safetensors")
        with pytest.raises(CheckpointError, match="ambiguous"):
            read_checkpoint(tmp_path / "a.safetensors")
