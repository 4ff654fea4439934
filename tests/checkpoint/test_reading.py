"""Files of every kind: readable ones are read bit for bit, all others get one clear sentence."""

from __future__ import annotations

import collections
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ldm.checkpoint import Checkpoint, CheckpointError, read_checkpoint
from tests.lightning1 import save_lightning1


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    return {
        "model.diffusion_model.out.2.weight": torch.randn(4, 3, 3, 3),
        "first_stage_model.quant_conv.bias": torch.randn(7).half(),
        "model_ema.num_updates": torch.tensor(12, dtype=torch.int32),
    }


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for key, value in expected.items():
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key], value), key


# ---- what can be read ----


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", ["a.ckpt", "a.pt", "a.bin", "a.safetensors", "a"])
def test_pickled_files_by_content(tmp_path, state, zipped, name):
    torch.save(
        {"state_dict": state, "global_step": 7, "epoch": 2}, tmp_path / name, _use_new_zipfile_serialization=zipped
    )
    found = read_checkpoint(tmp_path / name)
    assert_same(found.state, state)
    assert (found.global_step, found.epoch, found.path) == (7, 2, tmp_path / name)


def test_safetensors_by_content(tmp_path, state):
    save_file(state, tmp_path / "a.ckpt")
    found = read_checkpoint(str(tmp_path / "a.ckpt"))
    assert_same(found.state, {key: state[key] for key in found.state})
    assert found.state.keys() == state.keys()
    assert found.global_step is None


@pytest.mark.parametrize("wrap", ["bare", "nested", "model", "module", "prefixed", "with scalars"])
def test_places_of_the_state_dict(tmp_path, state, wrap):
    content = {
        "bare": state,
        "nested": {"model": {"state_dict": state}, "lr": 0.1},
        "model": {"model": state, "optimizer": {"state": {}}},
        "module": {"module": collections.OrderedDict(state)},
        "prefixed": {"module." + key: value for key, value in state.items()},
        "with scalars": {"version": "1", **state, "steps": 3},
    }[wrap]
    torch.save(content, tmp_path / "a.ckpt")
    assert_same(read_checkpoint(tmp_path / "a.ckpt").state, state)


@pytest.mark.parametrize("numpy", ["old", "new"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_lightning1_extras_are_ignored(tmp_path, state, numpy, zipped):
    path = save_lightning1(tmp_path / "model.ckpt", state, numpy=numpy, zipped=zipped, global_step=470000)
    if zipped:
        asked = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        assert "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint" in asked  # the file is what it claims
        assert any(name.endswith("core.multiarray.scalar") for name in asked)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    before = set(torch.serialization.get_safe_globals())
    found = read_checkpoint(path)
    assert_same(found.state, state)
    assert found.global_step == 470000
    assert set(torch.serialization.get_safe_globals()) == before  # admitted for this file only


@pytest.mark.subprocess
def test_reading_imports_neither_lightning_nor_numpy_internals(tmp_path, state):
    path = save_lightning1(tmp_path / "model.ckpt", state)
    code = (
        "import sys; from ldm.checkpoint import read_checkpoint; before = set(sys.modules); "
        f"read_checkpoint({str(path)!r}); new = set(sys.modules) - before; "
        "bad = [m for m in sys.modules if m.startswith(('pytorch_lightning', 'lightning', 'transformers'))]; "
        "assert not bad, bad; assert not [m for m in new if m.startswith('numpy.core')], new"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


def test_real_lightning_numpy_and_omegaconf_extras(tmp_path, state):
    import numpy as np
    from omegaconf import OmegaConf

    extras = {
        "hyper_parameters": OmegaConf.create({"lr": 1e-4, "mult": [1, 2], "name": "x", "inner": {"on": True}}),
        "best": np.float32(0.5),
        "array": np.arange(6.0).reshape(2, 3),
        "tree": collections.defaultdict(list, {"a": [1]}),
        "folder": tmp_path,
    }
    torch.save({"state_dict": state, **extras}, tmp_path / "a.ckpt")
    assert_same(read_checkpoint(tmp_path / "a.ckpt").state, state)


def test_lightning2_file(tmp_path, state):
    from pytorch_lightning import LightningModule, Trainer

    class Tiny(LightningModule):
        def __init__(self):
            super().__init__()
            self.register_buffer("weight", state["model.diffusion_model.out.2.weight"].clone())

    trainer = Trainer(accelerator="cpu", logger=False, max_epochs=0, default_root_dir=tmp_path, barebones=False)
    model = Tiny()
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    found = read_checkpoint(tmp_path / "a.ckpt")
    assert_same(found.state, {"weight": model.weight})
    assert found.global_step == 0


def test_zip_files_are_mapped_and_private(tmp_path, state):
    torch.save(state, tmp_path / "a.ckpt")
    before = (tmp_path / "a.ckpt").read_bytes()
    found = read_checkpoint(tmp_path / "a.ckpt").state["model.diffusion_model.out.2.weight"]
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(tmp_path / "a.ckpt") in maps.read_text()
    found.zero_()  # training writes into weights; the file must not change
    assert (tmp_path / "a.ckpt").read_bytes() == before


def test_compressed_zip_is_not_mistaken_for_raw_weights(tmp_path, state):
    torch.save({"state_dict": state}, tmp_path / "a.ckpt")
    with (
        zipfile.ZipFile(tmp_path / "a.ckpt") as old,
        zipfile.ZipFile(tmp_path / "b.ckpt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    assert_same(read_checkpoint(tmp_path / "b.ckpt").state, state)


def test_safetensors_with_unaligned_header(tmp_path):
    weight = torch.randn(5)
    for pad in range(4):
        header = json.dumps({"w": {"dtype": "F32", "shape": [5], "data_offsets": [0, 20]}}).encode() + b" " * pad
        (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + weight.numpy().tobytes())
        assert torch.equal(read_checkpoint(tmp_path / "a.safetensors").state["w"], weight)


# ---- names ----


def test_layouts_of_the_text_tower(tmp_path):
    prefix = "cond_stage_model.transformer."
    inner = ["embeddings.token_embedding.weight", "encoder.layers.0.mlp.fc1.bias", "final_layer_norm.weight"]
    published = [prefix + "text_model." + key for key in inner]
    layouts = [
        {prefix + "text_model.embeddings.position_ids": torch.arange(77.0).half()[None]} | dict.fromkeys(published),
        {prefix + "embeddings.position_ids": torch.arange(77)[None]} | dict.fromkeys(prefix + key for key in inner),
        dict.fromkeys(prefix + key for key in inner),
    ]
    for i, layout in enumerate(layouts):
        torch.save({key: torch.ones(2) if v is None else v for key, v in layout.items()}, tmp_path / f"{i}.ckpt")
        assert list(read_checkpoint(tmp_path / f"{i}.ckpt").state) == published


def test_other_names_are_unchanged(tmp_path):
    names = [
        "cond_stage_model.transformer.token_emb.weight",
        "cond_stage_model.model.transformer.resblocks.0.ln_1.bias",
    ]
    names += ["first_stage_model.encoder.conv_in.weight", "cond_stage_model.encoder.x", "embeddings.x", "module.x"]
    torch.save(dict.fromkeys(names, torch.ones(1)), tmp_path / "a.ckpt")
    assert list(read_checkpoint(tmp_path / "a.ckpt").state) == names


# ---- what cannot ----


class Attack:
    def __init__(self, call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_hostile_pickles_are_refused_and_do_not_run(tmp_path, state, zipped):
    marker = tmp_path / "ran"
    for call, name in [
        ((os.system, (f"touch {marker}",)), f"{os.system.__module__}.system"),
        ((eval, (f"open({str(marker)!r}, 'w')",)), "eval"),
        ((shutil.copy, (__file__, str(marker))), "shutil.copy"),
        ((torch.hub.load, ("x/y", "z")), "torch.hub.load"),
    ]:
        content = {"state_dict": state, "callbacks": Attack(call)}
        torch.save(content, tmp_path / "a.ckpt", _use_new_zipfile_serialization=zipped)
        with pytest.raises(CheckpointError, match="references names outside the allowlist") as caught:
            read_checkpoint(tmp_path / "a.ckpt")
        assert name in str(caught.value)
        assert not marker.exists()


def test_every_unknown_name_is_listed(tmp_path, state):
    content = {"state_dict": state, "a": Attack((os.system, ("true",))), "b": Attack((shutil.rmtree, (str(tmp_path),)))}
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=rf"{os.system.__module__}.system, shutil.rmtree"):
        read_checkpoint(tmp_path / "a.ckpt")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_plain_pickles_run_nothing(tmp_path):
    for protocol in range(6):
        (tmp_path / "a.ckpt").write_bytes(pickle.dumps(Attack((os.system, (f"touch {tmp_path}/ran",))), protocol))
        with pytest.raises(CheckpointError):
            read_checkpoint(tmp_path / "a.ckpt")
    assert not (tmp_path / "ran").exists()


def sentence(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    text = str(caught.value)
    assert str(path) in text
    assert "\n" not in text
    return text


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*absent\.ckpt.*--ckpt"):
        read_checkpoint(tmp_path / "absent.ckpt")
    assert "is a folder" in sentence(tmp_path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 4265380512\n", "Git LFS pointer"),
        (b"<!DOCTYPE html>\n<html><head><title>Log in</title></head></html>", "web page"),
        (b"\n<html>Acc\xc3\xa8s</html>", "web page"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "web page"),
        (b'{"_class_name": "UNet2DConditionModel", "in_channels": 4}', "JSON"),
        (b"Invalid username or password.", "text file.*Invalid username"),
        (b"\0" * 5000, "filled with zeros"),
        (b"GGUF\x03\0\0\0" + b"\0" * 50, "GGUF"),
        (b"\x1f\x8b\x08\x00" + bytes(range(200)), "neither a .ckpt nor a .safetensors"),
        (b"PK\x03\x04" + b"\0" * 100, "truncated or damaged"),
        (b"\x80\x02}q\x00.", "truncated or damaged|cannot be read safely"),
    ],
)
def test_other_files_are_described(tmp_path, content, expected):
    path = tmp_path / "model.ckpt"
    path.write_bytes(content)
    assert re.search(expected, sentence(path))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_other_zip_files(tmp_path, state):
    with zipfile.ZipFile(tmp_path / "a.ckpt", "w") as archive:
        archive.writestr("model.ckpt", b"x")
    assert "zip archive of something else" in sentence(tmp_path / "a.ckpt")
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "b.pt")
    assert "TorchScript" in sentence(tmp_path / "b.pt")


def test_files_without_weights(tmp_path):
    cases = {
        "textual inversion": {"string_to_param": torch.nn.ParameterDict({"*": torch.nn.Parameter(torch.ones(1, 768))})},
        "hypernetwork": {320: [{}], 640: [{}]},
        "its entries: optimizer": {"optimizer": {"lr": 1}},
        "entries: none": {},
        "holds a list": [torch.ones(2)],
        "holds a Tensor": torch.ones(2),
    }
    for expected, content in cases.items():
        torch.save(content, tmp_path / "a.pt")
        assert expected in sentence(tmp_path / "a.pt")
    loop = {}
    loop["model"] = loop
    torch.save(loop, tmp_path / "a.pt")
    assert "holds no weights" in sentence(tmp_path / "a.pt")
    save_file({}, tmp_path / "a.safetensors")
    assert "holds no weights" in sentence(tmp_path / "a.safetensors")


def test_tensors_without_plain_values(tmp_path):
    torch.save({"w": torch.ones(2, device="meta")}, tmp_path / "a.ckpt")
    assert "tensor w is empty" in sentence(tmp_path / "a.ckpt")
    torch.save({"w": torch.eye(3).to_sparse()}, tmp_path / "a.ckpt")
    assert "sparse" in sentence(tmp_path / "a.ckpt")


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_truncation_at_every_point(tmp_path, kind):
    state = {"a.weight": torch.randn(3, 5), "b": torch.randn(4).half()}
    whole, cut = tmp_path / "whole", tmp_path / "cut.ckpt"
    if kind == "safetensors":
        save_file(state, whole)
    else:
        torch.save({"state_dict": state, "global_step": 1}, whole, _use_new_zipfile_serialization=kind == "zip")
    content = whole.read_bytes()
    for length in {*range(0, len(content), 7), *range(64), *range(len(content) - 64, len(content))}:
        cut.write_bytes(content[:length])
        sentence(cut)
    cut.write_bytes(content)
    assert read_checkpoint(cut).state.keys() == state.keys()


def test_shapes_of_a_checkpoint():
    checkpoint = Checkpoint(Path("x"), {"a": torch.zeros(2, 3), "b": torch.tensor(1)})
    assert checkpoint.shapes == {"a": (2, 3), "b": ()}
