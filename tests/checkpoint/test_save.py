"""Saved files: bit for bit, written atomically, and readable by other tools."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from ldm import files
from ldm.checkpoint import read_checkpoint, save_checkpoint

SUFFIXES = [".ckpt", ".safetensors"]


def states() -> dict[str, torch.Tensor]:
    base = torch.randn(6, 8)
    base[0, 0], base[0, 1] = float("nan"), float("-inf")
    return {
        "model.a.weight": base,
        "model.view": base[2:4],  # a part of another tensor's memory
        "model.same": base,
        "model.transposed": base.T,
        "model.parameter": torch.nn.Parameter(torch.randn(3)),
        "model.half": torch.randn(3).half(),
        "model.bf16": torch.randn(3).bfloat16(),
        "model_ema.num_updates": torch.tensor(3, dtype=torch.int32),
        "empty": torch.zeros(0, 4),
        "flags": torch.tensor([True, False]),
    }


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().flatten().view(torch.uint8).tolist()) if tensor.numel() else b""


def assert_same_bits(found, expected) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert (found[key].dtype, found[key].shape) == (value.dtype, value.shape), key
        assert bits(found[key].reshape(-1)) == bits(value.reshape(-1)), key


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_round_trip_is_exact(tmp_path, suffix):
    state = states()
    path = save_checkpoint(tmp_path / "new" / f"a{suffix}", state, global_step=123, epoch=4)
    found = read_checkpoint(path)
    assert_same_bits(found.state, state)
    assert (found.global_step, found.epoch) == (123, 4)
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # no partial file is left
    again = save_checkpoint(tmp_path / f"b{suffix}", found.state)
    assert_same_bits(read_checkpoint(again).state, state)
    other = [s for s in SUFFIXES if s != suffix][0]
    assert_same_bits(read_checkpoint(save_checkpoint(tmp_path / f"c{other}", found.state)).state, state)


def test_other_tools_read_the_files(tmp_path):
    state = states()
    content = torch.load(save_checkpoint(tmp_path / "a.ckpt", state, global_step=5), weights_only=True)
    assert content.keys() == {"state_dict", "global_step", "epoch"}
    assert_same_bits(content["state_dict"], state)
    assert_same_bits(load_file(save_checkpoint(tmp_path / "a.safetensors", state)), state)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_views_are_saved_without_their_base(tmp_path, suffix):
    base = torch.randn(1000, 1000)
    path = save_checkpoint(tmp_path / f"a{suffix}", {"a": base[:2], "b": base[5:7]})
    assert path.stat().st_size < 100_000


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_existing_files_are_not_replaced(tmp_path, suffix):
    path = save_checkpoint(tmp_path / f"a{suffix}", {"w": torch.zeros(2)})
    with pytest.raises(FileExistsError, match="exists already"):
        save_checkpoint(path, {"w": torch.ones(2)})
    assert torch.equal(read_checkpoint(path).state["w"], torch.zeros(2))
    mapped = read_checkpoint(path).state["w"]
    save_checkpoint(path, {"w": torch.ones(2)}, overwrite=True)
    assert torch.equal(read_checkpoint(path).state["w"], torch.ones(2))
    assert torch.equal(mapped, torch.zeros(2))  # still the old file's


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_failure_leaves_no_partial_file(tmp_path, suffix, monkeypatch):
    path = save_checkpoint(tmp_path / f"a{suffix}", {"w": torch.zeros(2)})

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "sync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(path, {"w": torch.ones(2)}, overwrite=True)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert torch.equal(read_checkpoint(path).state["w"], torch.zeros(2))


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match=r"name it \.ckpt or \.safetensors"):
        save_checkpoint(tmp_path / "a.pickle", {"w": torch.zeros(1)})
    with pytest.raises(ValueError, match="no weights to save"):
        save_checkpoint(tmp_path / "a.ckpt", {})
