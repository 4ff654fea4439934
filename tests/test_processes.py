"""Several real processes that draw the batches of one command."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from ldm import cli, devices
from ldm.cli.writing import SampleWriter
from ldm.distributed import SINGLE_PROCESS, DistributedContext, environment
from ldm.models.model_info import ModelInfo
from scripts import img2img, txt2img
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


def start(commands: list[list[str]], script: str = "txt2img") -> list[subprocess.Popen]:
    """A process for each command line, ranks in order, as a launcher starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(len(commands))}
    place |= {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums in the same order as here
    return [
        subprocess.Popen(
            [sys.executable, str(ROOT / f"scripts/{script}.py"), *command],
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, command in enumerate(commands)
    ]


def output_of(process: subprocess.Popen[str]) -> tuple[str, str]:
    """What a process wrote to its two streams, but for what old releases of torch tell of their connections."""
    out, error = process.communicate(timeout=240)
    return "".join(line for line in out.splitlines(True) if not line.startswith("[Gloo]")), error


@pytest.mark.subprocess
def test_two_processes_write_what_one_writes(ckpt: Path) -> None:
    for outdir in ("one", "two"):  # numbers go on after what is there
        (ckpt.parent / outdir / "samples").mkdir(parents=True)
        (ckpt.parent / outdir / "samples/00004.png").touch()
    together = start([arguments(ckpt, "two")] * 2)
    assert cli.run(txt2img.main, arguments(ckpt, "one")) == 0
    outputs = [output_of(process) for process in together]
    assert [process.returncode for process in together] == [0, 0], outputs
    assert cli.FAREWELL[:20] in outputs[0][0] and outputs[1] == ("", "")  # one reports, and shows the progress

    names = [[path.name for path in sorted((ckpt.parent / outdir).rglob("*.png"))] for outdir in ("one", "two")]
    assert names[0] == names[1] == ["grid-0000.png", *(f"{number:05}.png" for number in range(4, 15))]
    for name in ["grid-0000.png", *(f"samples/{number:05}.png" for number in range(5, 15))]:
        one, two = (Image.open(ckpt.parent / outdir / name) for outdir in ("one", "two"))
        assert one.tobytes() == two.tobytes() and one.text == two.text, name


def pictures(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.png")}


@pytest.mark.subprocess
@pytest.mark.parametrize("mode", ["batch", "image"])
def test_two_processes_resume_after_kills(ckpt: Path, mode: str) -> None:
    """Either of them at some moment; then with two again, with a launcher, and alone: as if nothing had happened."""
    options = [*arguments(ckpt, "out"), "--seed_mode", mode]
    assert cli.run(txt2img.main, [*options, "--outdir", str(ckpt.parent / "whole")]) == 0
    expected, out = pictures(ckpt.parent / "whole"), ckpt.parent / "out"
    for victim, wanted in ((0, 2), (1, 5)):
        for path in sorted(out.glob("samples/*.png"))[wanted - 1 :]:  # the survivor may have gone far
            path.unlink()
        together = start([[*options, "--resume"]] * 2)
        end = time.monotonic() + 240
        while len(list(out.glob("samples/*.png"))) < wanted and time.monotonic() < end:
            if all(process.poll() is not None for process in together):
                break
            time.sleep(0.005)
        together[victim].kill()
        errors = [process.communicate(timeout=240)[1] for process in together]
        assert "Traceback" not in errors[1 - victim], errors
        assert pictures(out).items() <= expected.items(), "a picture that differs, or has another name"
    together = start([[*options, "--resume"]] * 2)
    outputs = [output_of(process) for process in together]
    assert [process.returncode for process in together] == [0, 0], outputs
    assert " images: " in outputs[0][0] and outputs[1] == ("", "")
    assert pictures(out) == expected

    for number in (0, 3, 9):
        (out / f"samples/{number:05}.png").unlink()
    (out / "grid-0000.png").unlink()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launcher, str(ROOT / "scripts/txt2img.py"), *options, "--resume"],
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "holds 7 of 10 images" in done.stdout and pictures(out) == expected
    assert cli.run(txt2img.main, [*options, "--resume"]) == 0
    assert pictures(out) == expected


def test_descriptions_are_equal_across_processes(ckpt: Path) -> None:
    """Whichever GPU it draws with, and whenever its copy of the model was made."""
    args = cli.parse(txt2img.parser(), [*arguments(ckpt, "out"), "--resume"])
    batches, options = cli.batches(args), cli.sampling_options(args).resolve()
    models = [SimpleNamespace(info=ModelInfo(str(ckpt)), device=torch.device("cuda", number)) for number in (0, 1)]
    one, other = (cli.descriptions(args, model, options, batches) for model in models)
    assert one == other

    class Second(DistributedContext):
        def broadcast(self, value):
            return one if isinstance(value, list) and value and isinstance(value[0], dict) else value

    writer = SampleWriter(args, None, Second(1, 2))
    writer.resume([{**description, "model": ["model.ckpt", 1, 2]} for description in one])
    assert writer._wanted == one


@pytest.mark.subprocess
@pytest.mark.parametrize("mode", ["batch", "image"])
def test_two_processes_write_what_one_writes_in_img2img(ckpt: Path, mode: str) -> None:
    Image.effect_noise((32, 32), 90).save(ckpt.parent / "init.png")
    more = ["--init-img", str(ckpt.parent / "init.png"), "--strength", "0.9", "--seed_mode", mode]
    together = start([[*arguments(ckpt, "two"), *more, "--resume"]] * 2, "img2img")
    assert cli.run(img2img.main, [*arguments(ckpt, "one"), *more]) == 0
    outputs = [output_of(process) for process in together]
    assert [process.returncode for process in together] == [0, 0], outputs
    assert outputs[1] == ("", "")
    expected = pictures(ckpt.parent / "one")
    assert pictures(ckpt.parent / "two") == expected and len(expected) == 11
    for number in (1, 4, 7):
        (ckpt.parent / f"two/samples/{number:05}.png").unlink()
    (ckpt.parent / "two/grid-0000.png").unlink()
    together = start([[*arguments(ckpt, "two"), *more, "--resume"]] * 2, "img2img")
    outputs = [output_of(process) for process in together]
    assert "holds 7 of 10 images" in outputs[0][0], outputs
    assert pictures(ckpt.parent / "two") == expected


@pytest.mark.subprocess
def test_failing_process_ends_the_others(ckpt: Path) -> None:
    good = arguments(ckpt, "out")
    waiting, failing = start([good, [*good, "--C", "3"]])
    assert "--C 3 does not fit" in failing.communicate(timeout=240)[1]
    error = waiting.communicate(timeout=240)[1]
    assert waiting.returncode == 1 and "Traceback" not in error and "error: " in error


def test_single_process_without_a_launcher(monkeypatch) -> None:
    assert SINGLE_PROCESS.broadcast("x") == "x" and SINGLE_PROCESS.gather([1, 2]) == [1, 2]
    monkeypatch.setenv("WORLD_SIZE", "8")  # clusters set it for other purposes
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert environment() == (0, 1, 0)


def test_each_process_uses_its_own_gpu(monkeypatch) -> None:
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
