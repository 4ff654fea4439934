"""scripts/reconstruct.py on small models from their own files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from ldm import cli
from ldm.checkpoint import save_checkpoint
from scripts.reconstruct import main
from tests.golden import filled, golden_configs
from tests.tiny import super_resolution_config, write_model, write_tiny

NO_LOSS = {"target": "torch.nn.Identity"}


@pytest.fixture(autouse=True)
def photo(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Image.effect_noise((41, 27), 60).convert("RGB").save("photo.png")
    return Path("photo.png")


def autoencoder() -> dict:
    """`model:` section of a small KL autoencoder in a file of its own."""
    params = {"ddconfig": golden_configs("diffusion")["kl"], "lossconfig": NO_LOSS, "embed_dim": 4}
    return {"target": "ldm.models.autoencoder.AutoencoderKL", "params": params}


def run(*argv: object) -> int:
    return cli.run(main, ["--device", "cpu", *map(str, argv)])


def psnr_of(path: Path) -> float:
    return float(Image.open(path).text["psnr"])


@pytest.mark.parametrize("kind", ["whole", "whole VQ", "alone"])
def test_originals_and_reconstructions_side_by_side(tmp_path, capsys, kind):
    config = super_resolution_config() if kind == "whole VQ" else autoencoder()
    ckpt = write_tiny(tmp_path) if kind == "whole" else write_model(tmp_path, config)
    assert run("photo.png", "--ckpt", ckpt) == 0
    (path,) = Path("outputs/reconstructions").iterdir()
    pair, original = Image.open(path), Image.open("photo.png")
    assert path.name == "photo.png" and pair.size == (2 * (41 + 2) + 2, 27 + 4)
    assert pair.crop((2, 2, 43, 29)).tobytes() == original.tobytes()
    assert pair.crop((45, 2, 86, 29)).tobytes() != original.tobytes()
    assert pair.text["source"] == "photo.png" and pair.text["model"] == tmp_path.name
    assert f"photo.png: {psnr_of(path):.2f} dB" in capsys.readouterr().out


def test_half_precision(tmp_path):
    ckpt = write_tiny(tmp_path)
    for out in (["full"], ["half", "--bf16"]):
        assert run("photo.png", "--ckpt", ckpt, "--outdir", *out) == 0
    assert psnr_of(Path("full/photo.png")) == pytest.approx(psnr_of(Path("half/photo.png")), abs=0.5)


def test_config_by_option(tmp_path):
    config = autoencoder()
    OmegaConf.save({"model": config}, "mine.yaml")
    (tmp_path / "files").mkdir()
    ckpt = write_model(tmp_path / "files", config)
    ckpt.with_name("config.yaml").unlink()
    assert run("photo.png", "--ckpt", ckpt, "--config", "mine.yaml") == 0


def test_several_pictures_their_mean_and_files_that_are_there(tmp_path, capsys):
    ckpt = write_tiny(tmp_path)
    Image.new("RGB", (40, 40), "red").save("{}.png")
    for _ in range(2):
        assert run("photo.png", "{}.png", "--ckpt", ckpt, "--outdir", "out") == 0
    assert sorted(path.name for path in Path("out").iterdir()) == ["photo-1.png", "photo.png", "{}-1.png", "{}.png"]
    mean = (psnr_of(Path("out/photo.png")) + psnr_of(Path("out/{}.png"))) / 2
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("mean of 2 images:"))
    assert float(line.split()[-2]) == pytest.approx(mean, abs=0.011)


def test_tiles(tmp_path, capsys):
    ckpt = write_tiny(tmp_path)
    assert run("photo.png", "--ckpt", ckpt, "--tile", "16") == 0
    assert "Tiles: 100%" in capsys.readouterr().err
    assert run("photo.png", "--ckpt", ckpt, "--tile", "0") == 0
    assert "Tiles" not in capsys.readouterr().err
    assert run("photo.png", "--ckpt", ckpt, "--tile", "3") == 2
    assert "tiles of 3 are too small" in capsys.readouterr().err


def test_broken_pictures_do_not_stop_the_others(tmp_path, capsys):
    Path("broken.png").write_text("no picture")
    assert run("broken.png", "photo.png", "missing.png", "--ckpt", write_tiny(tmp_path)) == 2
    assert [path.name for path in Path("outputs/reconstructions").iterdir()] == ["photo.png"]
    error = capsys.readouterr().err
    assert "warning: broken.png is not an image" in error
    assert error.endswith("error: 2 of 3 images could not be read: broken.png, missing.png\n")


def test_nothing_is_loaded_for_no_pictures(capsys):
    assert run("missing.png", "--ckpt", "missing.ckpt") == 2
    assert capsys.readouterr().err == "error: there is no image missing.png\n"
    assert not Path("outputs").exists()


def test_ctrl_c_keeps_what_is_finished(tmp_path, monkeypatch, capsys):
    from ldm import inference

    reconstruct, calls = inference.reconstruct, []

    def interrupted(*args, **options):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return reconstruct(*args, **options)

    monkeypatch.setattr(inference, "reconstruct", interrupted)
    assert run("photo.png", "photo.png", "--ckpt", write_tiny(tmp_path), "--outdir", "out") == 130
    assert "interrupted; 1 images written to out" in capsys.readouterr().err
    assert [path.name for path in Path("out").iterdir()] == ["photo.png"]


def test_files_without_an_autoencoder(tmp_path, capsys):
    save_checkpoint("lora.ckpt", {"lora_unet_down.lora_up.weight": torch.zeros(2, 2)})
    assert run("photo.png", "--ckpt", "lora.ckpt") == 2
    assert "lora.ckpt is a LoRA, not a complete model" in capsys.readouterr().err
    model = filled(torch.nn.Linear(2, 2))
    save_checkpoint("other.ckpt", model.state_dict())
    OmegaConf.save({"model": {"target": "torch.nn.Linear", "params": {"in_features": 2, "out_features": 2}}}, "o.yaml")
    assert run("photo.png", "--ckpt", "other.ckpt", "--config", "o.yaml") == 2
    assert "torch.nn.Linear has no first stage: fix the config" in capsys.readouterr().err


def test_a_folder_is_no_picture(tmp_path, capsys):
    assert run(".", "--ckpt", write_tiny(tmp_path)) == 2
    assert capsys.readouterr().err == "error: . is a folder, not an image\n"
    assert not Path("outputs").exists()


def test_a_checkpoint_that_is_none_leaves_no_folder(capsys):
    assert run("photo.png", "--ckpt", "photo.png") == 2
    assert "photo.png is neither a .ckpt nor a .safetensors file" in capsys.readouterr().err
    assert not Path("outputs").exists()


def test_metadata_may_be_left_out(tmp_path):
    assert run("photo.png", "--ckpt", write_tiny(tmp_path), "--no_metadata") == 0
    assert not Image.open("outputs/reconstructions/photo.png").text


def test_outdir_that_is_a_file(tmp_path, capsys):
    assert run("photo.png", "--ckpt", write_tiny(tmp_path), "--outdir", "photo.png") == 2
    assert capsys.readouterr().err == "error: photo.png is a file, not a folder: choose another --outdir\n"
