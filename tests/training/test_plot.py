"""The plot of a run."""

from __future__ import annotations

import builtins
import logging
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image

from ldm.training import metrics
from ldm.training.metrics import CSVMetrics, RunPlot, plot_run, read_metrics, smooth


def write(folder: Path, text: str) -> Path:
    (folder / "metrics").mkdir(parents=True, exist_ok=True)
    path = folder / "metrics/metrics.csv"
    path.write_text(text)
    return path


FULL = """epoch,images_per_second,lr-AdamW,lr-AdamW-momentum,step,train/loss_simple_epoch,train/loss_simple_step,\
val/loss_simple,val/loss_simple_ema,val/loss_simple_t000-499,val/loss_simple_t000-499_ema,val/loss_simple_t500-999
0,50,1e-4,0.9,9,,0.5,,,,,
0,,,,19,,,0.4,0.3,0.6,0.5,0.2
1,60,2e-4,0.9,29,0.5,0.25,,,,,
1,,,,39,,,0.2,0.1,0.3,0.2,0.1
"""


@pytest.fixture
def plotted(monkeypatch) -> list[tuple[str, str, list[float]]]:
    """(title of the panel, label, values) of every line of a plot."""
    from matplotlib.figure import Figure

    lines = []
    savefig = Figure.savefig

    def record(figure, *args, **kwargs):
        for axes in figure.axes:
            lines.extend((axes.get_title(), line.get_label(), list(line.get_ydata())) for line in axes.lines)
        savefig(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", record)
    return lines


def test_every_panel_has_its_curves(tmp_path, plotted):
    write(tmp_path, FULL)
    path = plot_run(tmp_path)
    assert path == tmp_path / "curves.png" and Image.open(path).width > 1000
    assert not list(tmp_path.glob(".*"))
    named = {(title, label): values for title, label, values in plotted if not label.startswith("_")}
    assert named == {
        ("loss_simple", "training"): [0.5, 0.25],
        ("loss_simple", "validation"): [0.4, 0.2],
        ("loss_simple", "validation, averaged weights"): [0.3, 0.1],
        ("validation loss by timestep", "t000-499"): [0.6, 0.3],
        ("validation loss by timestep", "t500-999"): [0.2, 0.1],
        ("learning rate", "lr-AdamW"): [1e-4, 2e-4],
        ("throughput", "images per second"): [50, 60],
    }


def test_a_first_stage_without_validation_has_one_panel(tmp_path, plotted):
    write(tmp_path, "epoch,step,train/aeloss,train/rec_loss_step\n0,0,-1,3\n0,1,-2,2\n")
    plot_run(tmp_path)
    assert [line for line in plotted if not line[1].startswith("_")] == [("rec_loss", "training", [3, 2])]


def test_damaged_lines_and_repeated_headers_are_skipped(tmp_path):
    path = write(tmp_path, "step,train/loss\n5,0.1\nstep,train/loss\n3,nan\n3,0.2\n7,inf\n9")
    steps, values = read_metrics(path)["train/loss"]
    assert steps.tolist() == [3, 5] and values.tolist() == [0.2, 0.1]


def test_smoothing_keeps_a_constant_and_a_mean():
    assert smooth(np.full(500, 3.0)) == pytest.approx(np.full(500, 3.0))
    assert smooth(np.arange(500.0))[250] == pytest.approx(250, abs=0.5)
    assert np.std(smooth(np.random.default_rng(0).normal(size=1000))) < 0.3


def test_mistakes_on_the_command_line_end_in_one_line(tmp_path, capsys):
    write(tmp_path / "empty", "epoch,step\n0,1\n")
    for folder, message in (("nothing", "there are no metrics"), ("empty", "has nothing to plot")):
        with pytest.raises(SystemExit, match=f"error: .*{message}"):
            metrics.main([str(tmp_path / folder)])
    write(tmp_path, "step,train/loss\n0,1\n1,0.5\n")
    metrics.main([str(tmp_path)])
    assert capsys.readouterr().out.strip() == str(tmp_path / "curves.png")


class Line(pl.LightningModule):
    """Learns a line, and fails at batch `fail_at`."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.layer, self.fail_at = torch.nn.Linear(1, 1), fail_at

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch, batch_idx):
        if batch_idx == self.fail_at:
            raise RuntimeError("a fault")
        loss = (self.layer(batch) - 3).square().mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.layer(batch).mean())


def fit(folder: Path, model: Line, **options) -> None:
    data = torch.utils.data.DataLoader([torch.ones(2, 1)] * 4, batch_size=None)
    pl.Trainer(
        default_root_dir=folder,
        logger=CSVMetrics(folder),
        callbacks=[RunPlot()],
        accelerator="cpu",
        max_epochs=1,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        **options,
    ).fit(model, data, data)


def test_a_run_ends_with_its_plot_and_a_second_start_appends(tmp_path, plotted):
    fit(tmp_path, Line())
    fit(tmp_path, Line(), limit_val_batches=0)
    assert (tmp_path / "curves.png").is_file()
    assert [len(values) for _, label, values in plotted if label == "training"] == [4, 8]
    assert [len(values) for _, label, values in plotted if label == "validation"] == [1, 1]


def test_a_run_that_fails_ends_with_its_plot_too(tmp_path, plotted):
    with pytest.raises(RuntimeError, match="a fault"):
        fit(tmp_path, Line(fail_at=3))
    assert [len(values) for _, label, values in plotted if label == "training"] == [3]


def test_without_matplotlib_there_is_one_warning(tmp_path, monkeypatch, caplog):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with caplog.at_level(logging.WARNING, logger="ldm"):
        fit(tmp_path, Line())
    assert [record.message for record in caplog.records] == [
        "Cannot plot the curves of this run: curves need matplotlib: pip install matplotlib"
    ]
    assert not (tmp_path / "curves.png").exists()
