"""Images logged in training: when, where, and without effect on the run."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image

from ldm.training.callbacks import ImageLogger
from ldm.util import instantiate_from_config
from tests.tiny import tiny_config


class ImageModel(pl.LightningModule):
    """Logs its batch and noise; remembers the arguments of `log_images` and the model's mode."""

    def __init__(self, manual: bool = False, error: Exception | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList([torch.nn.Linear(1, 1), torch.nn.Dropout()])
        self.layers[1].eval()  # a part that is in a mode of its own
        self.last = torch.nn.Dropout()
        self.automatic_optimization = not manual
        self.error = error
        self.calls: list[dict] = []
        self.numbers: list[float] = []

    def configure_optimizers(self):
        count = 1 if self.automatic_optimization else 2
        optimizers = [torch.optim.SGD(self.layers.parameters(), lr=0.1) for _ in range(count)]
        return optimizers[0] if count == 1 else optimizers

    def training_step(self, batch, batch_idx):
        assert self.layers[0].training and not self.layers[1].training and self.last.training
        torch.manual_seed(self.trainer.fit_loop.total_batch_idx)  # as the runner does
        loss = self.layers[0](torch.rand(1, 1)).sum()
        self.numbers.append(loss.item())
        if self.automatic_optimization:
            return loss
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def on_train_batch_end(self, *_):
        self.numbers.append(torch.rand(1).item())

    def validation_step(self, batch, batch_idx):
        pass

    def log_images(self, batch, **kwargs):
        parts = (self, *self.layers, self.last)
        self.calls.append(kwargs | {"quiet": not any(x.training for x in parts) and not torch.is_grad_enabled()})
        if self.error:
            raise self.error
        return {"inputs": batch, "noise": torch.randn(len(batch), 1, 8, 8)}


def fit(folder: Path, model: pl.LightningModule, callback: ImageLogger, batches: int = 6, **options) -> pl.Trainer:
    torch.manual_seed(5)
    data = [torch.linspace(-1, 1, 6 * 3 * 8 * 8).view(6, 3, 8, 8)] * batches
    loader = torch.utils.data.DataLoader(data, batch_size=None)
    path = options.pop("ckpt_path", None)
    defaults = {"max_epochs": 1, "logger": False, "limit_val_batches": 0, "num_sanity_val_steps": 0}
    trainer = pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        callbacks=[callback],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **defaults | options,
    )
    trainer.fit(model, loader, loader, ckpt_path=path)
    return trainer


def names(folder: Path, split: str = "train", key: str = "inputs") -> list[str]:
    found = (folder / "images" / split).glob(f"{key}_*.png")
    return sorted(path.name.removeprefix(f"{key}_").removesuffix(".png") for path in found)


def test_every_so_many_batches_and_at_powers_of_two_with_public_names(tmp_path):
    model = ImageModel()
    fit(tmp_path, model, ImageLogger(batch_frequency=5, max_images=4), batches=4, max_epochs=3)
    expected = ["gs-000001_e-000000_b-000001", "gs-000002_e-000000_b-000002", "gs-000004_e-000001_b-000000"]
    assert names(tmp_path) == [*expected, "gs-000005_e-000001_b-000001", "gs-000010_e-000002_b-000002"]
    assert model.calls == [{"split": "train", "N": 4, "quiet": True}] * 5


@pytest.mark.parametrize(
    "options, batches",
    [
        ({"increase_log_steps": False}, [3, 6]),
        ({"log_first_step": True}, [0, 1, 2, 3, 6]),
        ({"log_on_batch_idx": True}, [1, 2, 3, 1, 2, 3]),
        ({"disabled": True}, []),
        ({"max_images": 0}, []),
    ],
)
def test_public_options_of_when(tmp_path, options, batches):
    fit(tmp_path, ImageModel(), ImageLogger(**{"batch_frequency": 3, **options}), batches=4, max_epochs=2)
    found = [int(name[-6:]) + (0 if "log_on_batch_idx" in options else 4 * int(name[17])) for name in names(tmp_path)]
    assert found == batches


def test_two_optimisers_count_a_batch_once(tmp_path):
    trainer = fit(
        tmp_path, ImageModel(manual=True), ImageLogger(batch_frequency=3, increase_log_steps=False), batches=7
    )
    assert trainer.global_step == 14
    assert names(tmp_path) == ["gs-000003_e-000000_b-000003", "gs-000006_e-000000_b-000006"]


def test_micro_batches_count_and_share_a_step(tmp_path):
    fit(tmp_path, ImageModel(), ImageLogger(batch_frequency=3, increase_log_steps=False), 7, accumulate_grad_batches=2)
    assert names(tmp_path) == ["gs-000001_e-000000_b-000003", "gs-000003_e-000000_b-000006"]


def test_training_is_unaffected_and_images_of_different_times_have_the_same_noise(tmp_path):
    logged, plain = ImageModel(), ImageModel()
    fit(tmp_path, logged, ImageLogger(batch_frequency=1))
    fit(tmp_path, plain, ImageLogger(disabled=True))
    assert logged.numbers == plain.numbers and len(logged.calls) == 5
    noise = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "images/train").glob("noise_*"))]
    assert len(noise) == 5 and all(np.array_equal(noise[0], other) for other in noise)


def test_a_grid_has_four_in_a_row_two_pixels_apart(tmp_path):
    x = torch.linspace(-1, 1, 6)[:, None, None, None].expand(6, 1, 8, 8)
    grid = np.asarray(ImageLogger(max_images=5).grid(x))
    assert grid.shape == (2 * 10 + 2, 4 * 10 + 2, 3)
    assert not grid[:2].any() and not grid[:, 10:12].any()
    assert [int(grid[6, 6 + 10 * i, 0]) for i in range(4)] == [0, 50, 102, 153] and grid[16, 6, 0] == 204
    zero_to_one = np.asarray(ImageLogger(max_images=5, rescale=False).grid((x + 1) / 2))
    assert np.array_equal(zero_to_one, grid)


def test_validation_logs_its_first_batch_now_and_then(tmp_path):
    model, callback = ImageModel(), ImageLogger(batch_frequency=4, increase_log_steps=False)
    options = {"max_epochs": 4, "limit_val_batches": 3, "num_sanity_val_steps": 2}
    trainer = fit(tmp_path, model, callback, batches=3, **options)
    assert names(tmp_path, "val") == ["gs-000002_e-000000_b-000000", "gs-000008_e-000002_b-000000"]
    assert {call["split"] for call in model.calls} == {"train", "val"}
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = ImageLogger(batch_frequency=4, increase_log_steps=False)
    fit(tmp_path, ImageModel(), again, 3, **options | {"max_epochs": 5}, ckpt_path=tmp_path / "last.ckpt")
    assert names(tmp_path, "val")[2:] == ["gs-000014_e-000004_b-000000"]


def test_a_second_run_in_the_same_place_replaces_nothing(tmp_path):
    for rescale in (True, False, True):
        fit(tmp_path, ImageModel(), ImageLogger(batch_frequency=2, rescale=rescale), batches=3)
    name = "gs-000002_e-000000_b-000002"
    assert names(tmp_path)[-3:] == [name, f"{name}_2", f"{name}_3"]
    first, second, third = (
        (tmp_path / f"images/train/inputs_{name}{end}.png").read_bytes() for end in ("", "_2", "_3")
    )
    assert first == third != second


def test_a_failure_is_one_warning_and_no_half_written_file(tmp_path, caplog, monkeypatch):
    with caplog.at_level(logging.WARNING, logger="ldm"):
        model = ImageModel(error=RuntimeError("CUDA out of memory.\nmany details"))
        trainer = fit(tmp_path, model, ImageLogger(batch_frequency=1))
    assert trainer.global_step == 6 and len(model.calls) == 5
    reason = "Cannot log the images of step 1 (RuntimeError: CUDA out of memory.): training continues without"
    assert [record.message for record in caplog.records] == [reason]

    def full(self, file, **_):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    assert fit(tmp_path, ImageModel(), ImageLogger(batch_frequency=1)).global_step == 6
    warnings = [record.message for record in caplog.records if record.name.startswith("ldm")]
    assert len(warnings) == 2 and "No space left on device" in warnings[1] and not names(tmp_path)


def test_pictures_go_to_tensorboard(tmp_path):
    board = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from pytorch_lightning.loggers import TensorBoardLogger

    place = TensorBoardLogger(tmp_path, name="", version="tensorboard")
    fit(tmp_path / "elsewhere", ImageModel(), ImageLogger(batch_frequency=4, increase_log_steps=False), logger=place)
    place.experiment.flush()
    events = board.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Images("train/inputs")] == [4]
    assert names(tmp_path) == ["gs-000004_e-000000_b-000004"]


def test_a_batch_frequency_of_none_is_refused():
    with pytest.raises(ValueError, match="batch_frequency must be at least 1, not 0"):
        ImageLogger(batch_frequency=0)


def test_a_latent_diffusion_model_logs_all_its_images(tmp_path):
    torch.manual_seed(0)
    model = instantiate_from_config(tiny_config(use_ema=True, image_size=8))
    model.learning_rate = 1e-4
    batch = {"jpg": torch.rand(2, 16, 16, 3) * 2 - 1, "txt": ["a red circle", "a blue square"]}
    options = {"ddim_steps": 2, "plot_progressive_rows": False, "inpaint": False, "plot_denoise_rows": True}
    callback = ImageLogger(batch_frequency=1, max_images=2, log_images_kwargs=options)
    trainer = pl.Trainer(
        default_root_dir=tmp_path,
        max_steps=2,
        accelerator="cpu",
        precision="bf16-mixed",
        logger=False,
        callbacks=[callback],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, torch.utils.data.DataLoader([batch] * 2, batch_size=None))
    found = {path.name.rpartition("_gs-")[0] for path in (tmp_path / "images/train").iterdir()}
    assert found == {"inputs", "reconstruction", "conditioning", "diffusion_row", "samples", "denoise_row"}
    assert Image.open(tmp_path / "images/train/samples_gs-000001_e-000000_b-000001.png").size == (2 * 18 + 2, 20)
