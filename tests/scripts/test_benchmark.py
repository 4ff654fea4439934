"""scripts/benchmark.py: every suite on a small model, its files, interruption and errors."""

from __future__ import annotations

import argparse
import itertools
import json
import logging
from importlib import import_module

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from benchmarks import compare, report
from benchmarks.settings import Row
from benchmarks.suites import processes
from benchmarks.suites import training as train
from ldm import cli
from ldm.util import REPOSITORY, instantiate_from_config
from scripts import benchmark
from tests.golden import filled
from tests.tiny import write_tiny


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The script on a small model, whose files are in `tmp_path`; gives its exit code."""
    monkeypatch.chdir(tmp_path)
    ckpt = write_tiny(tmp_path)
    common = ["--config", tmp_path / "config.yaml", "--device", "cpu", "--out", tmp_path / "out", "--peak", 1]
    common += ["--ckpt", ckpt, "--repeats", 2]
    return lambda *argv: cli.run(benchmark.main, [str(arg) for arg in (*common, *argv)])


def results(folder):
    found = json.loads((folder / "results.json").read_text())
    return found, found["rows"]


def test_networks_are_compared_and_scanned(run, tmp_path, capsys):
    options = ["--batch", 1, 2, "--size", 16, "--ways", "eager", "--loop_steps", 2, "--profile"]
    assert run("--suite", "unet", "vae", "text", *options) == 0
    found, rows = results(tmp_path / "out")
    kinds = {(row["suite"], row["what"], row["who"]) for row in rows}
    whats = [("unet", "guided call"), ("unet", "loop of 2 steps"), ("vae", "decode"), ("vae", "encode")]
    both = {(*what, who) for what in whats for who in ("ours eager", "diffusers eager")}
    assert kinds == both | {("text", "12 tokens", who) for who in ("ours eager", "transformers eager")}
    assert len(rows) == 2 * len(kinds)
    for row in rows:
        assert len(row["seconds"]) == 2 and row["first"] > 0 and row["flops"] > 0 and 0 < row["utilization"] < 1
        assert row["psnr"] is None or row["psnr"] > 80  # the same weights, on all sides
        assert len(row["ratios"]) == 1
    assert found["finished"] and found["peaks"] == {"fp32": 1e12}
    assert {"cpu", "cores", "threads", "libraries", "date", "commit"} <= found["machine"].keys()
    assert found["options"]["batch"] == [1, 2] and found["options"]["suites"] == ["unet", "vae", "text"]
    assert len(found["profiles"]) == len(rows) / 2
    assert "of diffusers eager" in (tmp_path / "out/results.md").read_text()
    assert (tmp_path / "out/plot.png").read_bytes().startswith(b"\x89PNG")
    assert "Profile, unet: guided call, ours eager, fp32, batch 1" in capsys.readouterr().out
    assert run("--suite", "text", "--compare", "none") == 0  # and overwrites nothing
    assert [row["who"] for row in results(tmp_path / "out-2")[1]] == ["ours eager"]
    assert results(tmp_path / "out")[0] == found


def test_processes_of_their_own(run, tmp_path, monkeypatch):
    """Jobs run in this process, as tests/benchmarks/test_memory.py starts some in others."""

    def run_here(function, **arguments):
        module, _, name = function.partition(":")
        return getattr(import_module(f"benchmarks.{module}"), name)(**json.loads(json.dumps(arguments)))

    calls = []
    monkeypatch.setattr(processes, "run_in_process", run_here)
    monkeypatch.setattr(processes, "run_script", calls.append)  # other tests run the command
    assert run("--suite", "load", "e2e", "memory", "--size", 16, "--repeats", 1, "--compare", "none") == 0
    _, rows = results(tmp_path / "out")
    whats = [(row["suite"], row["what"], row["who"]) for row in rows]
    assert whats[:2] == [("load", "0.0 GB checkpoint", "ours"), ("e2e", "scripts/txt2img.py", "ours")]
    assert whats[2:] == [("memory", kind, "ours eager") for kind in ("decode", "encode")]
    assert len(calls) == 1 + 1  # one does not count
    for row in rows:
        assert len(row["seconds"]) == 1 and not row["error"]
        assert row["suite"] == "e2e" or row["memory"] is not None


@pytest.fixture
def narrow(monkeypatch):
    """v1's UNet with 32 channels in place of 320, two levels of four."""
    real = train.model_and_latents

    def configs(name, size=256, recompute=True):
        model, latents = real(name, size, recompute)
        if name == "v1":
            unet = model["params"]["unet_config"]["params"]
            unet |= {"model_channels": 32, "num_res_blocks": 1, "channel_mult": [1, 2], "attention_resolutions": [2]}
        return model, latents

    monkeypatch.setattr(train, "model_and_latents", configs)


@pytest.mark.parametrize("model, options", [("bundled", []), ("v1", ["--optimizer", "sgd", "--precision", "bf16"])])
def test_training_is_compared_with_a_plain_loop(run, narrow, tmp_path, model, options):
    options += [] if model == "bundled" else ["--size", 64]
    assert run("training", "--model", model, "--steps", 2, "--batch", 3, *options) == 0
    _, rows = results(tmp_path / "out")
    assert [row["who"] for row in rows] == ["plain loop", "training run"]
    assert rows[0]["what"].startswith(model) and rows[0]["size"] == 64
    for row in rows:
        assert len(row["seconds"]) == 2 and row["rate"] == pytest.approx(3 / row["median"])
    assert 0.1 < rows[1]["ratios"]["plain loop"] < 10


def test_a_plain_step_trains_the_same_parameters(narrow):
    config, latents = train.model_and_latents("v1")
    model = filled(instantiate_from_config(config | {"params": config["params"] | {"use_ema": True}}))
    data = train.RandomLatents(2, **latents)
    batch = torch.utils.data.default_collate([data.get(i, np.random.default_rng(i)) for i in range(2)])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train.plain_step(model, torch.optim.SGD(model.trainable_parameters(), lr=0.1), batch, bf16=False)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    trained = {name for name, _ in model.model.named_parameters(prefix="model")}
    averages = {"model_ema." + name.removeprefix("model.").replace(".", "") for name in trained}
    assert moved <= trained | averages | {"model_ema.num_updates"}
    assert len(moved & trained) > 0.9 * len(trained) and moved >= averages


@pytest.mark.subprocess
def test_checkouts_are_compared(run, tmp_path, capsys):
    """A second checkout, here a link to this one, takes turns with it."""
    other = tmp_path / "other"
    other.mkdir()
    for name in ("ldm", "scripts", "benchmarks", "configs"):
        (other / name).symlink_to(REPOSITORY / name)
    (other / "scripts").unlink()
    (other / "scripts").mkdir()
    (other / "scripts/benchmark.py").write_text((REPOSITORY / "scripts/benchmark.py").read_text())
    assert run("--suite", "text", "--against", other, "--repeats", 1) == 0
    _, rows = results(tmp_path / "out")
    assert [row["who"] for row in rows] == ["ours eager, this", "ours eager, other"]
    for row, name in zip(rows, ("other", "this")):
        assert len(row["seconds"]) == 1 and list(row["ratios"]) == [name]
    assert "of other" in (tmp_path / "out/results.md").read_text()
    assert run("--suite", "text", "--against", tmp_path) == 2
    assert "is not a checkout of this project" in capsys.readouterr().err


def test_ctrl_c_keeps_finished_results(run, tmp_path, monkeypatch, capsys):
    def interrupted(suite, bench):
        yield Row(suite, "something", "ours", "cpu", "fp32", 1, 16, seconds=[1.0])
        raise KeyboardInterrupt

    monkeypatch.setattr("benchmarks.suites.rows", interrupted)
    assert run("--suite", "unet") == 130
    found, rows = results(tmp_path / "out")
    assert [row["what"] for row in rows] == ["something"] and not found["finished"]
    assert (tmp_path / "out/plot.png").is_file()
    assert "interrupted; results so far are in" in capsys.readouterr().err


def test_failed_contenders_do_not_stop_others(run, tmp_path, monkeypatch, capsys):
    def full(network, mode, device):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.")

    monkeypatch.setattr("benchmarks.suites.networks.prepare", full)
    assert run("--suite", "vae", "--size", 16) == 1
    _, rows = results(tmp_path / "out")
    assert [(row["who"], bool(row["error"]), len(row["seconds"])) for row in rows] == 2 * [
        ("ours eager", True, 0),
        ("diffusers eager", False, 2),
    ]
    assert "needs another 3.00 GiB" in rows[0]["error"] and "--batch" in rows[0]["error"]
    assert "2 of 4 measurements failed" in capsys.readouterr().err


def test_results_of_other_shapes_are_refused():
    settings = benchmark.settings_of(benchmark.build_parser().parse_args(["--repeats", "1"]), torch.device("cpu"))
    found = [
        compare.Contender(Row("unet", "call", who, "cpu"), lambda shape=shape: lambda: torch.zeros(shape))
        for who, shape in (("a", (2, 3)), ("b", (3, 2)))
    ]
    with pytest.raises(ValueError, match=r"b gives \(3, 2\), not \(2, 3\)"):
        list(compare.Bench(settings).compare(found))


def test_a_cpu_does_fp16_in_fp32(caplog):
    with caplog.at_level(logging.WARNING):
        assert benchmark.chosen_precisions(["fp16", "fp32", "bf16"], torch.device("cpu")) == ("fp32", "bf16")
    assert "fp16 does not work on a CPU" in caplog.text
    assert benchmark.chosen_precisions(["fp16"], torch.device("cuda")) == ("fp16",)


def test_defaults_of_a_gpu():
    settings = benchmark.settings_of(benchmark.build_parser().parse_args([]), torch.device("cuda"))
    assert settings.precisions == ("fp16",) and settings.warm_up > 1
    assert [(scan.size, scan.batch) for scan in settings.scans()] == [(512, 1), (512, 8)]


def test_scans_are_all_combinations():
    args = benchmark.build_parser().parse_args(
        ["--size", "64", "32", "--batch", "4", "1", "--precision", "fp32", "bf16"]
    )
    settings = benchmark.settings_of(args, torch.device("cpu"))
    found = [(scan.precision, scan.size, scan.batch) for scan in settings.scans()]
    assert found == list(itertools.product(("fp32", "bf16"), (64, 32), (4, 1)))
    assert {scan.size for scan in settings.scans(only_size=512)} == {512}  # of what has but one


def test_plots_have_one_line_per_contender(tmp_path):
    rows = [
        Row("vae", "decode", who, "cpu", "fp32", batch, size, seconds=[size * batch / 1e3], memory=memory)
        for who, memory in (("ours", 10**8), ("theirs", None))
        for batch, size in ((1, 64), (2, 64), (1, 128))
    ]
    report.plot([row.record() for row in rows], tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as image:
        assert image.width > 800
    figure = Figure()
    axes = figure.subplots()
    report._panel(axes, [row.record() for row in rows], "size", "batch", "median", 1)
    assert [list(line.get_xdata()) for line in axes.lines] == 2 * [[64, 128]]
    assert list(axes.lines[0].get_ydata()) == [0.064, 0.128]


def test_all_means_all_in_order():
    args = argparse.Namespace(suite=["memory", "all"], training=None)
    assert benchmark.chosen_suites(args) == list(benchmark.SUITES)


def test_format_of_amounts_and_durations():
    assert (report.duration(0.01234), report.duration(98.57)) == ("12.3 ms", "98.57 s")
    assert (report.amount(2.5e9), report.amount(815e6)) == ("2.50 GB", "815 MB")


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--suite", "train", "--steps", "0"], "must be an integer of at least 1"),
        (["--suite", "speed"], "invalid choice: 'speed'"),
        (["--suite", "unet", "--precision", "int4"], "invalid choice: 'int4'"),
        ([], "name what to measure: --suite all, or some of unet, vae"),
        (["--suite", "unet", "--device", "abacus"], "abacus"),
        (["--suite", "unet", "--config", "none.yaml"], "none.yaml"),
        (["--suite", "vae", "--size", "20"], "--size 20 does not fit: this model needs multiples of 8"),
        (["--suite", "load", "--ckpt", "none.ckpt"], "none.ckpt"),
    ],
)
def test_mistakes_end_in_one_line(argv, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        code = cli.run(benchmark.main, argv)
    except SystemExit as error:
        code = error.code
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and words in lines[-1] and "Traceback" not in "".join(lines)
