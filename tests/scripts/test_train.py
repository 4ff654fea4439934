"""The training script: folders, settings, signals, and messages for mistakes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from ldm.checkpoint import read_checkpoint
from ldm.inference import load_model, txt2img
from ldm.training.metrics import read_metrics
from tests.training.toys import (
    assert_same_weights,
    config,
    diffusion,
    pictures,
    run,
    start,
    two_players,
    weights,
    write,
)

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of a short run of a small LatentDiffusion."""
    content = config(diffusion(), validation=2)
    folder = tmp_path_factory.mktemp("trained")
    code, found = start(
        folder, content, "--max_epochs", 2, "-n", "name", "-f", "_postfix", "model.params.log_every_t=7"
    )
    assert code == 0
    return found


def test_layout(trained):
    assert trained.name.endswith("_name_postfix")
    checkpoints = {path.name for path in (trained / "checkpoints").iterdir()}
    assert checkpoints == {"last.ckpt", "000000.ckpt", "000001.ckpt"}  # both among the best three
    project, lightning = sorted((trained / "configs").iterdir(), reverse=True)
    assert project.name.endswith("-project.yaml") and lightning.name.endswith("-lightning.yaml")
    stored = OmegaConf.load(project)
    assert set(stored) == {"model", "data"} and stored.model.params.log_every_t == 7
    section = OmegaConf.load(lightning).lightning
    assert (section.seed, section.scale_lr, section.trainer.max_epochs) == (23, True, 2)
    metrics = read_metrics(trained / "metrics/metrics.csv")
    assert len(metrics["train/loss_step"][0]) == 10 and len(metrics["val/loss_simple_ema"][0]) > 0


def test_the_result_generates_images(trained):
    config_file = next((trained / "configs").glob("*-project.yaml"))
    model = load_model(config_file, trained / "checkpoints/last.ckpt", device="cpu")
    assert txt2img(model, ["a red circle"], steps=1, progress=False)[0].size == (16, 16)
    content = torch.load(trained / "checkpoints/last.ckpt", weights_only=True)
    assert content["global_step"] == 10 and content["state_dict"]["model_ema.num_updates"] == 10


def test_resuming_with_more_steps_is_exact(trained, tmp_path, capsys):
    content = config(two_players())
    _, complete = start(tmp_path / "complete", content, "--max_steps", 16)
    _, parts = start(tmp_path / "parts", content, "--max_steps", 6)  # in the middle of an epoch
    (tmp_path / "elsewhere").mkdir()
    moved = parts.rename(tmp_path / "elsewhere" / "moved")
    bar = "lightning.trainer.enable_progress_bar=true"
    assert run("--resume", moved / "checkpoints/last.ckpt", "-t", "--max_steps", 16, bar) == 0
    assert "Epoch 0: 100%" in capsys.readouterr().out  # the resumed epoch has a length
    assert_same_weights(weights(moved), weights(complete))
    steps = read_metrics(moved / "metrics/metrics.csv")["train/loss"][0].tolist()
    assert steps == sorted(set(steps)) and len(steps) == 8  # two optimisers: a batch is two steps
    assert len(list((moved / "configs").iterdir())) == 4
    capsys.readouterr()
    assert run("--resume", moved, "-t", "--max_steps", 16) == 0
    assert "The run had ended already: continue it with a larger --max_steps" in capsys.readouterr().out
    assert_same_weights(weights(moved), weights(complete))


def test_learning_rate(tmp_path, capsys):
    content = config(two_players())
    content["model"]["base_learning_rate"] = 1.0e-4
    start(tmp_path / "a", content, "--max_steps", 2, "--accumulate_grad_batches", 3)
    assert "Learning rate 6.00e-04 = 3 accumulated batches * 1 processes * 2 items" in capsys.readouterr().out
    start(tmp_path / "b", content, "--max_steps", 2, "--scale_lr", "False")
    assert "Learning rate 1.00e-04\n" in capsys.readouterr().out


def test_accumulating_longer_than_an_epoch_scales_by_the_batches_there_are(tmp_path, capsys):
    content = config(two_players())
    content["model"]["base_learning_rate"] = 1.0e-4
    start(tmp_path / "a", content, "--max_steps", 2, "--accumulate_grad_batches", 8)
    shown = capsys.readouterr()
    assert "Learning rate 1.00e-03 = 5 accumulated batches * 1 processes * 2 items" in shown.out
    assert "accumulate_grad_batches=8, but an epoch has only 5 batches" in shown.err
    limits = {"3": 3, "0.4": 2, "99": 5}
    for limit, batches in limits.items():
        argv = ("--max_steps", 2, "--accumulate_grad_batches", 8, "--limit_train_batches", limit)
        start(tmp_path / limit, content, *argv)
        assert f"= {batches} accumulated batches" in capsys.readouterr().out


def test_two_runs_of_one_second(tmp_path, monkeypatch):
    from ldm.training import folders

    monkeypatch.setattr(folders, "timestamp", lambda: "2022-08-22T12-00-00")
    content = write(tmp_path, config(two_players()))
    for _ in range(2):
        assert run("--base", content, "-t", "-l", tmp_path / "logs", "--max_steps", 2) == 0
    assert {path.name for path in (tmp_path / "logs").iterdir()} == {
        "2022-08-22T12-00-00_toy",
        "2022-08-22T12-00-00_toy-2",
    }


def test_later_configs_win_and_no_training_without_t(tmp_path, capsys):
    first = write(tmp_path, config(two_players()), "first.yaml")
    second = write(tmp_path, {"data": {"params": {"batch_size": 5}}}, "second.yaml")
    assert run("--base", first, second, "-l", tmp_path / "logs") == 0
    assert "* 5 items a batch" in capsys.readouterr().out
    assert not list((tmp_path / "logs").iterdir())  # nothing was written, so no folder stays


def test_checkpoints_on_request_and_a_single_batch(tmp_path):
    content = config(two_players())
    steps = {"metrics_over_trainsteps_checkpoint": {"params": {"every_n_train_steps": 4}}}
    content["lightning"]["callbacks"] |= steps
    _, folder = start(tmp_path, content, "--max_steps", 10)
    saved = list((folder / "checkpoints/trainstep_checkpoints").iterdir())
    assert {path.name for path in saved} == {"000000-000000004.ckpt", "000000-000000008.ckpt"}
    assert "optimizer_states" not in torch.load(saved[0], weights_only=True)
    assert run("--base", tmp_path / "toy.yaml", "-t", "--fast_dev_run", 1, "-l", tmp_path / "dev") == 0


# ---- signals ----


def test_save_and_continue(tmp_path, capsys):
    content = config(two_players())
    content["lightning"]["callbacks"]["hand"] = {
        "target": "tests.training.toys.SignalAt",
        "params": {"batch": 1, "name": "SIGUSR1"},
    }
    code, folder = start(tmp_path, content, "--max_epochs", 1)
    assert code == 0 and capsys.readouterr().out.count("Saved") == 1
    assert read_checkpoint(folder / "checkpoints/last.ckpt").global_step == 10


@pytest.mark.subprocess
def test_sigterm_saves_and_stops(tmp_path):
    """As another process sees it."""
    content = config(two_players(), length=4000)
    base = write(tmp_path, content)
    command = [sys.executable, str(ROOT / "scripts/train.py"), "--base", str(base), "-t", "-l", str(tmp_path / "logs")]
    command += ["--trust-config", "tests"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    (folder,) = _wait_for(lambda: [p for p in (tmp_path / "logs").glob("*") if (p / "metrics/metrics.csv").is_file()])
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert (
        process.returncode == 130
        and "Stopped. Resume with: python scripts/train.py --resume" in output
        and "Traceback" not in output
    )
    assert read_checkpoint(folder / "checkpoints/last.ckpt").global_step > 0


def _wait_for(find, seconds: int = 120):
    import time

    for _ in range(10 * seconds):
        if found := find():
            return found
        time.sleep(0.1)
    raise TimeoutError


# ---- mistakes ----


def change(path: str, value) -> dict:
    content = OmegaConf.create(config(two_players()))
    OmegaConf.update(content, path, value)
    return OmegaConf.to_container(content)


MISTAKES = [
    ("model.params", {"chanels": 3}, "chanels"),
    ("model.target", "ldm.models.Nothing", "'ldm.models.Nothing'"),
    ("model.base_learning_rate", None, "base_learning_rate"),
    ("model.base_learning_rate", "fast", "model.base_learning_rate must be a number, not 'fast'"),
    ("model.base_learning_rat", 1e-3, "no setting 'base_learning_rat': did you mean base_learning_rate?"),
    ("modle.params.channels", 3, "no section 'modle': did you mean model?"),
    ("lightning.callback", {}, "no setting 'callback': did you mean callbacks?"),
    ("lightning.trainer.devices", "0,", "invalid Trainer settings"),
    ("folder", "???", "needs a value for folder: add folder=..."),
    ("data.target", None, "'target'"),
    ("data.params.batch_sise", 3, "batch_sise"),
    ("data.params.batch_size", "four", "batch_size must be a whole number of at least 1, not 'four'"),
    ("data.params.batch_size", 100, "batch_size 100 is larger than the training set, which has 10 items"),
    ("data.params.train", None, "data.params.train"),
    ("data.params.train", pictures(0), "data.params.train: tests.training.toys.Pictures has no items"),
    ("lightning.trainer.max_stepps", 3, "no setting 'max_stepps': did you mean max_steps?"),
    ("lightning.trainer.precision", "33", "33"),
    ("lightning.modelcheckpoint", {"params": {"moniter": "x"}}, "lightning.modelcheckpoint.params"),
    ("lightning.callbacks.x", {"target": "main.ImageLogger", "params": {"batch_frequence": 3}}, "batch_frequence"),
]


@pytest.mark.parametrize("path, value, message", MISTAKES, ids=[f"{path}-{i}" for i, (path, *_) in enumerate(MISTAKES)])
def test_mistakes_end_in_one_line_and_leave_nothing(tmp_path, capsys, path, value, message):
    base = write(tmp_path, change(path, value))
    assert run("--base", base, "-t", "-l", tmp_path / "logs", "--max_steps", 2) == 2
    err = capsys.readouterr().err
    assert message in err and len(err.strip().splitlines()) == 1
    assert not list((tmp_path / "logs").glob("*"))


def test_unused_settings(tmp_path, capsys):
    base = write(tmp_path, config(two_players()) | {"width": 3, "also": "${ width }"})
    assert run("--base", base, "-t", "false", "-l", tmp_path, "width=4") == 0
    capsys.readouterr()
    for given, message in {"max_steps=3": "max_steps=...", "widht=3": "widht=...: did you mean width?"}.items():
        assert run("--base", base, "-t", "-l", tmp_path / "logs", given) == 2
        assert f"the config does not use the setting {message}" in capsys.readouterr().err


def test_no_config(tmp_path, capsys):
    assert run("--base", tmp_path / "nothing.yaml", "-t") == 2
    assert "no such file" in capsys.readouterr().err
    base = write(tmp_path, {"model": two_players()})
    assert run("--base", base, "-t") == 2
    assert "no `data:` section" in capsys.readouterr().err


def test_resuming_with_another_config(trained, tmp_path, capsys):
    changed = ("data.params.batch_size=5", "model.params.channels=3")
    assert run("--resume", trained, "-t", "--max_epochs", 3, "--seed", 1, *changed) == 2
    err = capsys.readouterr().err
    for text in ("data.params.batch_size: 2 -> 5", "lightning.seed: 23 -> 1", "model.params.channels: 4 -> 3"):
        assert text in err
    assert "--resume_anyway" in err and "max_epochs" not in err


@pytest.mark.parametrize("what", ["missing", "empty", "loose", "weights", "damaged"])
def test_nothing_to_resume_from(trained, tmp_path, capsys, what):
    folder = tmp_path / "run"
    (folder / "configs").mkdir(parents=True)
    if what != "missing":
        for path in (trained / "configs").iterdir():
            (folder / "configs" / path.name).write_bytes(path.read_bytes())
    path = {"loose": tmp_path / "a.ckpt", "weights": folder / "w.ckpt"}.get(what, folder)
    if what == "damaged":
        (folder / "checkpoints").mkdir()
        content = (trained / "checkpoints/last.ckpt").read_bytes()
        for name, data in {"last.ckpt": content[: len(content) // 2], "000001.ckpt": content}.items():
            (folder / "checkpoints" / name).write_bytes(data)
    if path.suffix:
        torch.save({"state_dict": {"w": torch.ones(1)}}, path)
    messages = {
        "missing": "is not a run folder",
        "empty": "the run ended before it wrote a checkpoint",
        "loose": "model.params.ckpt_path",
        "weights": "holds weights, but not the state of a run",
        "damaged": f"other checkpoints of the run, which --resume accepts too: {folder / 'checkpoints/000001.ckpt'}",
    }
    assert run("--resume", path, "-t") == 2
    err = capsys.readouterr().err
    assert messages[what] in err and len(err.strip().splitlines()) == 1


def failing(error: str, batch: int = 7) -> dict:
    content = config(two_players())
    params = {"batch": batch, "error": error}
    content["lightning"]["callbacks"]["fail"] = {"target": "tests.training.toys.FailAt", "params": params}
    return content


FAILURES = [
    ("FloatingPointError: loss is not finite at step 14", 1, "loss is not finite at step 14; the last good checkpoint"),
    ("OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.", 1, "2.00 GiB"),
    ("OSError: [Errno 28] No space left on device", 2, "No space left on device"),
    ("ValueError: every picture is broken", 2, "every picture is broken"),
]


@pytest.mark.parametrize("error, code, message", FAILURES)
def test_failures_keep_the_last_good_checkpoint(tmp_path, capsys, error, code, message):
    found, folder = start(tmp_path, failing(error), "--max_epochs", 3)
    err = capsys.readouterr().err.strip().splitlines()
    assert found == code and message in err[-1] and len(err) == 1
    assert read_checkpoint(folder / "checkpoints/last.ckpt").global_step == 10  # the end of the first epoch
    if "memory" in error:
        assert "use_checkpoint" in err[-1] and "batch_size" in err[-1]


def test_a_worker_that_dies_ends_the_run_in_one_sentence(tmp_path, capsys):
    dying = {"target": "tests.training.toys.KilledWorker", "params": {"length": 10}}
    code, _ = start(tmp_path, config(two_players(), train=dying, num_workers=2), "--max_epochs", 2)
    err = capsys.readouterr().err.strip().splitlines()
    assert code == 1 and len(err) == 1
    assert "a worker process that loads data" in err[0] and "num_workers" in err[0] and "no checkpoint yet" in err[0]


def test_nan_images_end_the_run_in_one_sentence(tmp_path, capsys):
    """A real loss of NaN, not a raised error: nothing of it reaches the weights or a file."""
    content = config(diffusion())
    content["data"]["params"]["train"]["params"]["nan_from"] = 6
    code, folder = start(tmp_path, content, "--max_epochs", 2)
    err = capsys.readouterr().err.strip().splitlines()
    assert (
        code == 1 and "not finite at step" in err[-1] and [line for line in err if line.startswith("error")] == err[-1:]
    )
    assert not list(folder.glob("checkpoints/*.ckpt"))


def test_a_full_disk_while_saving_stops_the_run(tmp_path, capsys, monkeypatch):
    from ldm.training import checkpoints

    save = checkpoints.torch.save

    def full(state, file):
        if state["global_step"] > 10:
            raise OSError(28, "No space left on device")
        save(state, file)

    monkeypatch.setattr(checkpoints.torch, "save", full)
    code, folder = start(tmp_path, config(two_players()), "--max_epochs", 3)
    err = capsys.readouterr().err
    assert code == 2 and f"to {folder / 'checkpoints'}: No space left" in err and "the last good checkpoint is" in err
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"000000.ckpt", "last.ckpt"}
    monkeypatch.setattr(checkpoints.torch, "save", save)
    assert run("--resume", folder, "-t") == 0


@pytest.mark.subprocess
def test_help_imports_nothing_heavy():
    shown = subprocess.run(
        [sys.executable, "-X", "importtime", str(ROOT / "scripts/train.py"), "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "120"},
    )
    assert "--scale_lr" in shown.stdout and "torch" not in shown.stderr
