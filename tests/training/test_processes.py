"""Two processes, each on half of every batch, train as one process does on the complete batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ldm.checkpoint import read_checkpoint
from ldm.inference import load_model
from ldm.training.metrics import read_metrics
from tests.training.toys import config, diffusion, start, write

ROOT = Path(__file__).resolve().parent.parent.parent
SAME = 1e-5  # of losses of about one; sums of halves are rounded in another order


def content(batch_size: int, use_ema: bool) -> dict:
    settings = config(diffusion(), length=10, batch_size=batch_size)  # two and a half global batches an epoch
    settings["model"]["params"]["use_ema"] = use_ema
    settings["model"]["params"]["unet_config"]["params"]["dropout"] = 0.0  # each process would draw its own
    # the first process's bar asks for means that all processes have to add to
    settings["lightning"]["trainer"]["enable_progress_bar"] = True
    return settings


def losses(folder: Path) -> list[float]:
    return read_metrics(folder / "metrics/metrics.csv")["train/loss_step"][1].tolist()


def script(*argv) -> str:
    command = [sys.executable, str(ROOT / "scripts/train.py"), "--trust-config", "tests", *map(str, argv)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.subprocess
@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_same_losses_also_after_resuming(tmp_path, strategy):
    use_ema = strategy == "ddp"
    _, one = start(tmp_path / "one", content(4, use_ema), "--max_steps", 5)
    base = write(tmp_path, content(2, use_ema))
    places = ("-t", "--max_steps", 4, "--devices", 2, "--strategy", strategy, "-l", tmp_path / "logs")
    output = script("--base", base, *places)
    assert output.count("Learning rate 4.00e-03") == 1  # logged by one process
    (two,) = (tmp_path / "logs").iterdir()  # and one folder
    script("--resume", two, "-t", "--max_steps", 5)
    assert losses(two) == pytest.approx(losses(one), abs=SAME) and len(losses(one)) == 5

    found, expected = (read_checkpoint(folder / "checkpoints/last.ckpt") for folder in (two, one))
    assert found.shapes == expected.shapes and found.global_step == 5
    config_file = sorted((two / "configs").glob("*-project.yaml"))[-1]
    model = load_model(config_file, two / "checkpoints/last.ckpt", device="cpu")
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_fsdp_refuses_averages(tmp_path, capsys):
    code, _ = _started(tmp_path, content(2, True), "--devices", 2, "--strategy", "fsdp")
    assert code == 2 and "model.params.use_ema=false" in capsys.readouterr().err


def _started(folder: Path, settings: dict, *argv) -> tuple[int, Path]:
    from tests.training.toys import run

    return run("--base", write(folder, settings), "-t", "-l", folder / "logs", *argv), folder
