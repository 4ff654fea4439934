"""Several real processes that draw the batches of one command."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from ldm import cli, devices
from ldm.processes import ALONE, environment
from scripts import txt2img
from tests.tiny import write_tiny

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def ckpt(tmp_path: Path) -> Path:
    (tmp_path / "p.txt").write_text("a red circle\na blue square\na circle\na square\na red square\n")
    return write_tiny(tmp_path)


def arguments(ckpt: Path, outdir: str) -> list[str]:
    """Six batches, the third and sixth smaller, with noise in every step."""
    options = "--n_samples 2 --n_iter 2 --steps 3 --ddim_eta 1 --device cpu --from-file"
    return [*options.split(), str(ckpt.parent / "p.txt"), "--outdir", str(ckpt.parent / outdir), "--ckpt", str(ckpt)]


def start(commands: list[list[str]]) -> list[subprocess.Popen]:
    """A process for each command line, ranks in order, as a launcher starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(len(commands))}
    place |= {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums in the same order as here
    return [
        subprocess.Popen(
            [sys.executable, str(ROOT / "scripts/txt2img.py"), *command],
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, command in enumerate(commands)
    ]


def test_two_processes_write_what_one_writes(ckpt: Path) -> None:
    for outdir in ("one", "two"):  # numbers go on after what is there
        (ckpt.parent / outdir / "samples").mkdir(parents=True)
        (ckpt.parent / outdir / "samples/00004.png").touch()
    together = start([arguments(ckpt, "two")] * 2)
    assert cli.run(txt2img.main, arguments(ckpt, "one")) == 0
    outputs = [process.communicate(timeout=240) for process in together]
    assert [process.returncode for process in together] == [0, 0], outputs
    assert cli.FAREWELL[:20] in outputs[0][0] and outputs[1] == ("", "")  # one reports, and shows the progress

    names = [[path.name for path in sorted((ckpt.parent / outdir).rglob("*.png"))] for outdir in ("one", "two")]
    assert names[0] == names[1] == ["grid-0000.png", *(f"{number:05}.png" for number in range(4, 15))]
    for name in ["grid-0000.png", *(f"samples/{number:05}.png" for number in range(5, 15))]:
        one, two = (Image.open(ckpt.parent / outdir / name) for outdir in ("one", "two"))
        assert one.tobytes() == two.tobytes() and one.text == two.text, name


def test_when_one_process_fails_none_waits(ckpt: Path) -> None:
    good = arguments(ckpt, "out")
    waiting, failing = start([good, [*good, "--C", "3"]])
    assert "--C 3 does not fit" in failing.communicate(timeout=240)[1]
    error = waiting.communicate(timeout=240)[1]
    assert waiting.returncode == 1 and "Traceback" not in error and "error: " in error


def test_without_a_launcher_a_process_is_alone(monkeypatch) -> None:
    assert ALONE.agree("x") == "x" and ALONE.gather([1, 2]) == [1, 2]
    monkeypatch.setenv("WORLD_SIZE", "8")  # clusters set it for other purposes
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert environment() == (0, 1, 0)


def test_each_process_takes_a_gpu_of_its_own(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert devices.choose_device("auto") == devices.choose_device("cuda") == torch.device("cuda", 1)
    assert devices.choose_device("cuda:0") == torch.device("cuda", 0)
    assert devices.choose_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="no GPU for process 3 on this machine, which has 2"):
        devices.choose_device()
