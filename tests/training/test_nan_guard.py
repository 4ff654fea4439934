"""Non-finite gradients and weights, and throughput."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from ldm.training import callbacks
from ldm.training.callbacks import NonFiniteGuard, ThroughputMonitor, all_finite, batch_size
from ldm.training.metrics import CSVMetrics, read_metrics


class Root(pl.LightningModule):
    """Two layers; at batch `at` the loss is finite, but its gradient for the second layer is not."""

    def __init__(self, at: int | None = None, manual: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 1)
        self.at, self.automatic_optimization = at, not manual

    def configure_optimizers(self):
        parts = [self.first, self.second]
        if self.automatic_optimization:
            return torch.optim.SGD(self.parameters(), lr=0.01)
        return [torch.optim.SGD(part.parameters(), lr=0.01) for part in parts]

    def training_step(self, batch, batch_idx):
        y = self.second(self.first(batch))
        # the slope of a square root is infinite at 0
        loss = (self.second.weight * 0.0).abs().sqrt().sum() if batch_idx == self.at else y.square().mean()
        if self.automatic_optimization:
            return loss
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()


def trainer(folder: Path, *callbacks: pl.Callback, **options) -> pl.Trainer:
    return pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_epochs=1,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=4,
        **{"logger": False, "enable_checkpointing": False, **options},
    )


def batches(count: int) -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader([torch.ones(3, 2)] * count, batch_size=None)


@pytest.mark.parametrize("manual", [False, True])
def test_a_gradient_that_is_not_finite_stops_the_run_before_weights_change(tmp_path, manual):
    model = Root(at=2, manual=manual)
    runner = trainer(tmp_path, NonFiniteGuard(every_n_steps=2))
    with pytest.raises(FloatingPointError, match=r"gradient is not finite at step \d: second\.weight \(Linear\)"):
        runner.fit(model, batches(5))
    assert all(weight.isfinite().all() for weight in model.parameters())


def test_every_nth_step_is_checked(tmp_path):
    model = Root(at=1)
    trainer(tmp_path, NonFiniteGuard(every_n_steps=50)).fit(model, batches(2))
    assert not model.second.weight.isfinite().all()


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    runner = trainer(tmp_path, NonFiniteGuard(every_n_steps=50))
    runner.fit(Root(at=1), batches(2))
    with pytest.raises(FloatingPointError, match="a weight is not finite at step 2: second.weight"):
        runner.save_checkpoint(tmp_path / "last.ckpt")
    assert not (tmp_path / "last.ckpt").exists()


def test_finiteness_of_many_tensors():
    good = [torch.full((3,), 3e38), None, torch.zeros(0), torch.ones(2, 2, dtype=torch.bfloat16)]
    assert all_finite(good) and all_finite([])
    for value in (torch.nan, torch.inf, -torch.inf):
        assert not all_finite([*good, torch.tensor([1.0, value])])


def test_throughput_and_time_spent_waiting_for_data(tmp_path, monkeypatch):
    now = 0.0

    def passes(seconds: float) -> None:
        nonlocal now
        now += seconds

    class Slow(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, index):
            passes(0.02)
            return torch.ones(3, 2)

    class Work(Root):
        def training_step(self, batch, batch_idx):
            passes(0.03)
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            passes(9.0)

    monkeypatch.setattr(callbacks, "time", SimpleNamespace(perf_counter=lambda: now))
    runner = trainer(tmp_path, ThroughputMonitor(), logger=CSVMetrics(tmp_path), val_check_interval=2)
    runner.fit(Work(), torch.utils.data.DataLoader(Slow(), batch_size=None), batches(2))
    metrics = read_metrics(tmp_path / "metrics/metrics.csv")
    for name, expected in {"images_per_second": 60.0, "waiting_for_data": 0.4}.items():
        steps, values = metrics[name]
        assert steps.tolist() == [3, 7] and values == pytest.approx([expected] * 2)


def test_sizes_of_batches():
    assert batch_size({"image": torch.zeros(3, 2)}) == batch_size([torch.zeros(3), ["a"]]) == batch_size("abc") == 3
