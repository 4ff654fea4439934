"""Damage that loads without an error, files that change while in use, and fingerprints of weights."""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from ldm import cli
from ldm.checkpoint import CheckpointError, check_unchanged, fill_model, fingerprint, read_checkpoint, save_checkpoint
from ldm.checkpoint import checksums as checks
from ldm.checkpoint.formats import storages
from ldm.inference import BUNDLED_CKPT, load_model
from ldm.util import REPOSITORY
from scripts import prune_checkpoint

SUFFIXES = [".ckpt", ".safetensors"]


def weights() -> dict[str, torch.Tensor]:
    return {"a.weight": torch.randn(20, 30), "a.bias": torch.arange(300.0)}


def flip(path: Path, value: torch.Tensor) -> None:
    """One bit of a tensor's bytes."""
    content = bytearray(path.read_bytes())
    content[content.index(value.numpy().tobytes()) + 5] ^= 1
    path.write_bytes(content)


def record(path: Path, line: str = "{}  {}\n") -> None:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_name(path.name + ".sha256").write_text(line.format(digest, path.name))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_saved_files_detect_a_flipped_bit(tmp_path, suffix, caplog):
    state = weights()
    path = save_checkpoint(tmp_path / f"a{suffix}", state)
    read_checkpoint(path, verify=True)
    assert not caplog.messages  # there was something to compare with
    flip(path, state["a.bias"])
    read_checkpoint(path)  # which is why there is `verify`
    with pytest.raises(CheckpointError, match="damaged.*checksum of its .* differs.*again"):
        read_checkpoint(path, verify=True)


def test_safetensors_checksum_covers_the_data(tmp_path):
    path = save_checkpoint(tmp_path / "a.safetensors", weights())
    content = path.read_bytes()
    expected = hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["sha256"] == expected


@pytest.mark.parametrize(
    "line", ["{}  {}\n", "{} *{}\n", "{}  some/folder/{}\n", "{0}\n", "{}  {}\n" + "0" * 64 + "  b\n"]
)
def test_recorded_checksum_is_compared(tmp_path, line, monkeypatch):
    save_file(state := weights(), path := tmp_path / "a.safetensors")
    record(path, line)
    read_checkpoint(path)
    read_checkpoint(path, verify=True)
    flip(path, state["a.bias"])
    with pytest.raises(CheckpointError, match="not the file whose checksum a.safetensors.sha256 records"):
        read_checkpoint(path)  # it is small
    monkeypatch.setattr(checks, "ALWAYS", 10)
    monkeypatch.setattr("ldm.checkpoint.reading.ALWAYS", 10)
    read_checkpoint(path)
    with pytest.raises(CheckpointError, match="not the file whose checksum"):
        read_checkpoint(path, verify=True)


@pytest.mark.parametrize("content", ["", "abc  a.ckpt\n", "\xff\n", ("0" * 64 + "  b\n") * 2])
def test_record_of_another_file_is_refused(tmp_path, content):
    path = save_checkpoint(tmp_path / "a.ckpt", weights())
    (tmp_path / "a.ckpt.sha256").write_text(content)
    with pytest.raises(CheckpointError, match="holds no sha256 of a.ckpt"):
        read_checkpoint(path)


def test_missing_checksum_is_reported(tmp_path, caplog):
    save_file(weights(), tmp_path / "a.safetensors")
    torch.save(weights(), tmp_path / "a.ckpt", _use_new_zipfile_serialization=False)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(weights(), tmp_path / "b.ckpt")
    finally:
        torch.serialization.set_crc32_options(True)
    for name in ("a.safetensors", "a.ckpt", "b.ckpt"):
        read_checkpoint(tmp_path / name, verify=True)
        assert "no checksum" in caplog.messages.pop()


@pytest.mark.parametrize(
    ("key", "value", "usable"),
    [
        ("a.weight", float("nan"), False),
        ("a.weight", float("inf"), False),
        ("table", float("nan"), False),
        ("attn_mask", float("-inf"), True),
        ("a.weight", 3e38, True),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2])
def test_nan_and_infinite_values(tmp_path, key, value, usable, dtype):
    state = {
        "fine": torch.ones(3),
        key: torch.tensor([1.0, value if dtype.itemsize > 1 or abs(value) != 3e38 else 3.0]),
    }
    path = save_checkpoint(tmp_path / "a.ckpt", {name: tensor.to(dtype) for name, tensor in state.items()})
    read_checkpoint(path)
    if usable:
        read_checkpoint(path, verify=True)
        return
    with pytest.raises(CheckpointError, match=f"not finite, in {key}"):
        read_checkpoint(path, verify=True)


def test_bundled_model_is_always_verified(tmp_path):
    bundled = REPOSITORY / BUNDLED_CKPT
    digest = hashlib.sha256(bundled.read_bytes()).hexdigest()
    assert checks.checksum_file(bundled).read_text() == f"{digest}  {bundled.name}\n"
    assert bundled.stat().st_size < checks.ALWAYS
    content = bytearray(bundled.read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "model.ckpt").write_bytes(content)
    (tmp_path / "model.ckpt.sha256").write_bytes(checks.checksum_file(bundled).read_bytes())
    with pytest.raises(CheckpointError, match="not the file whose checksum"):
        load_model(ckpt=tmp_path / "model.ckpt", device="cpu")
    (tmp_path / "model.ckpt.sha256").unlink()
    with pytest.raises(CheckpointError, match="checksum of its part .* differs"):
        load_model(ckpt=tmp_path / "model.ckpt", device="cpu", verify=True)


def test_scripts_with_a_checkpoint_have_verify():
    taken = set()
    for path in sorted((REPOSITORY / "scripts").glob("*.py")):
        parser = getattr(importlib.import_module(f"scripts.{path.stem}"), "parser", None)
        options = parser()._option_string_actions if parser else {}
        if "--ckpt" in options and path.stem != "benchmark":  # which only measures how long a file takes
            taken.add(path.stem)
            assert "--verify" in options, path
    assert taken >= {"txt2img", "img2img", "inpaint", "upscale", "sample_diffusion", "reconstruct", "evaluate"}


def test_command_line_error_is_one_line(tmp_path, capsys):
    state = weights()
    path = save_checkpoint(tmp_path / "a.ckpt", state)
    flip(path, state["a.bias"])
    assert cli.run(prune_checkpoint.main, [str(path), str(tmp_path / "b.ckpt"), "--verify"]) == 2
    assert re.fullmatch(r"error: .*checksum of its part \S+/data/1 differs.*\n", capsys.readouterr().err)
    assert not (tmp_path / "b.ckpt").exists()


# ---- files that change under a run ----


def filled(path: Path) -> nn.Module:
    model = nn.Module()
    model.a = nn.Linear(30, 20, device="meta")
    fill_model(model, read_checkpoint(path))
    return model


@pytest.mark.subprocess
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_truncating_a_mapped_file_is_detected(tmp_path, suffix):
    """The process must be another one: without the check it would be killed."""
    path = save_checkpoint(tmp_path / f"a{suffix}", {"a.weight": torch.randn(1000, 1000), "a.bias": torch.ones(1000)})
    code = (
        "import os, sys, torch\nfrom ldm import cli\nfrom ldm.checkpoint import *\n"
        "def main(argv):\n model = torch.nn.Module(); model.a = torch.nn.Linear(1000, 1000, device='meta')\n"
        " fill_model(model, read_checkpoint(sys.argv[1]))\n check_unchanged(model)\n os.truncate(sys.argv[1], 4096)\n"
        " check_unchanged(model)\n model.a(torch.ones(1000))\n"
        "sys.exit(cli.run(main))"
    )
    done = subprocess.run([sys.executable, "-c", code, path], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"error: {path} was changed while its weights were in use: load it again\n"


def test_check_unchanged(tmp_path):
    state = {"a.weight": torch.randn(20, 30), "a.bias": torch.randn(20)}
    path = save_checkpoint(tmp_path / "a.ckpt", state)
    model = filled(path)
    check_unchanged(model)
    check_unchanged(nn.Linear(1, 1))  # read from nowhere
    save_checkpoint(path, state, overwrite=True)  # a new file of that name
    check_unchanged(model)
    model = filled(path)
    with path.open("rb+") as file:
        file.write(b"PK")
    os.utime(path, ns=(0, 0))
    with pytest.raises(CheckpointError, match="changed while"):
        check_unchanged(model)
    model = filled(path)
    path.unlink()
    check_unchanged(model)  # a file that is removed stays as long as it is mapped


MOUNTS = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 22 0:40 / /mnt/share\\040of\\040all rw - {kind} server:/x rw
31 30 8:2 / /mnt/share\\040of\\040all/disk rw - ext4 /dev/sdb1 rw
"""


@pytest.mark.parametrize(
    ("kind", "safe"),
    [("nfs4", False), ("cifs", False), ("9p", False), ("fuse.sshfs", False), ("fuse", False), ("virtiofs", False)]
    + [("xfs", True), ("tmpfs", True), ("fuseblk", True), ("overlay", True), ("btrfs", True)],
)
def test_network_file_systems_are_not_mapped(kind, safe):
    mounts = MOUNTS.format(kind=kind)
    assert storages.may_map(Path("/mnt/share of all/a/b.ckpt"), mounts) is safe
    assert storages.may_map(Path("/mnt/share of all/disk/b.ckpt"), mounts)
    assert storages.may_map(Path("/mnt/share of allies/b.ckpt"), mounts)
    assert storages.may_map(Path("/b.ckpt"), mounts)
    assert not storages.may_map(Path("/b.ckpt"), mounts + "40 22 0:9 / / rw - nfs x rw\n")  # the last one covers


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_files_are_read_where_mapping_is_unsafe(tmp_path, suffix, monkeypatch):
    state = weights() | {"half": torch.randn(3).half(), "none": torch.zeros(0, 4), "one": torch.tensor(3)}
    path = save_checkpoint(tmp_path / f"a{suffix}", state, global_step=3)
    monkeypatch.setattr("ldm.checkpoint.reading.may_map", lambda path: False)
    found = read_checkpoint(path)
    assert found.mapped is None
    assert found.global_step == 3
    assert found.state.keys() == state.keys()
    assert all(torch.equal(found.state[key], value) for key, value in state.items())
    if Path("/proc/self/maps").exists():
        assert str(path) not in Path("/proc/self/maps").read_text()


# ---- fingerprints ----


def module() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"a": nn.Linear(3, 4), "b": nn.BatchNorm1d(4)})


def test_equal_weights_have_equal_fingerprints() -> None:
    one = module()
    other = nn.ModuleDict({"b": one["b"], "a": one["a"]})  # another order
    assert fingerprint(one) == fingerprint(module()) == fingerprint(other)
    assert len(fingerprint(one)) == 64


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["a"].weight.data[0, 0].add_(1e-7),
        lambda m: m["b"].running_mean.add_(1),  # buffers count
        lambda m: m.half(),
        lambda m: m.add_module("c", nn.Linear(1, 1)),
        lambda m: setattr(m["a"], "weight", nn.Parameter(m["a"].weight.detach().reshape(3, 4))),
    ],
)
def test_any_change_alters_the_fingerprint(change) -> None:
    changed = module()
    with torch.no_grad():
        change(changed)
    assert fingerprint(changed) != fingerprint(module())


def test_fingerprint_ignores_prefixes() -> None:
    changed = module()
    changed["b"].running_mean.add_(1)
    assert fingerprint(changed, ignore=["b."]) == fingerprint(module(), ignore=["b."])


def test_fingerprint_of_bf16_and_empty_modules() -> None:
    assert fingerprint(module().bfloat16()) != fingerprint(module())
    assert fingerprint(nn.Identity()) == fingerprint(nn.SiLU())


def test_meta_modules_have_no_fingerprint() -> None:
    with torch.device("meta"):
        empty = module()
    with pytest.raises(ValueError, match="has no fingerprint .*meta device"):
        fingerprint(empty)
