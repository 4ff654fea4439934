"""Full disks, odd names and encodings, impatience: what was drawn is kept, and one line says what happened."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from ldm import cli, images
from ldm.inference import Pipeline
from scripts import txt2img
from tests.test_processes import start
from tests.tiny import write_tiny

ROOT = Path(__file__).resolve().parents[2]


def contents(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def ckpt(tmp_path) -> Path:
    return write_tiny(tmp_path)


def command(ckpt: Path, *more: str) -> list[str]:
    return ["--ckpt", str(ckpt), "--steps", "2", "--device", "cpu", "--n_samples", "1", "--prompt", "a circle", *more]


# ---- disks ----


class Full:
    """A disk that is full after `room` pictures."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.save = Image.Image.save

    def __call__(self, image, file, **options):
        self.room -= 1
        if self.room < 0:
            file.write(b"\x89PNG half")
            raise OSError(28, "No space left on device")
        self.save(image, file, **options)


@pytest.mark.parametrize("resume", [False, True])
def test_a_full_disk_keeps_what_was_drawn(ckpt, tmp_path, monkeypatch, capsys, resume):
    disk, flags = Full(2), ["--resume"] if resume else []
    monkeypatch.setattr(Image.Image, "save", lambda *args, **options: disk(*args, **options))
    argv = command(ckpt, "--n_iter", "4", "--outdir", str(tmp_path / "out"), *flags)
    assert cli.run(txt2img.main, argv) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    place = tmp_path / "out/samples"
    assert error == (
        f"error: cannot write to {place} (No space left on device), where 2 images of this run are: free some space, "
        "or choose another --outdir"
    )
    assert contents(place) == ["00000.png", "00001.png"]
    disk.room = 99
    assert cli.run(txt2img.main, argv) == 0
    assert len(contents(place)) == (4 if resume else 6)


def test_a_full_disk_at_the_end_costs_only_the_grid(ckpt, tmp_path, monkeypatch, capsys):
    disk = Full(2)
    monkeypatch.setattr(Image.Image, "save", lambda *args, **options: disk(*args, **options))
    assert cli.run(txt2img.main, command(ckpt, "--n_iter", "2", "--outdir", str(tmp_path / "out"))) == 2
    assert f"cannot write to {tmp_path / 'out'} (No space left" in capsys.readouterr().err
    assert contents(tmp_path / "out") == ["samples/00000.png", "samples/00001.png"]


def test_a_limit_of_the_system_on_the_size_of_files(tmp_path):
    """As a quota is: the write itself fails, and half a file is left to clear away."""
    noise = Image.effect_noise((200, 200), 90)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            images.save_png(noise, tmp_path, "{:05}.png")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert contents(tmp_path) == []


def test_a_grid_without_pictures_that_were_taken_away(ckpt, tmp_path, monkeypatch, capsys):
    draw = command(ckpt, "--n_iter", "3", "--outdir", str(tmp_path / "out"))
    finish = cli.SampleWriter._finish

    def taken_away(self, pictures):
        (self.samples / "00001.png").rename(tmp_path / "mine.png")
        finish(self, pictures)

    monkeypatch.setattr(cli.SampleWriter, "_finish", taken_away)
    assert cli.run(txt2img.main, draw) == 0
    assert "00001.png: left out of the grid" in capsys.readouterr().err
    assert Image.open(tmp_path / "out/grid-0000.png").size[1] == 2 * 34 + 2


# ---- several writers ----

HAMMER = """
import sys
from PIL import Image
from ldm import images
for i in range(int(sys.argv[3])):
    images.save_png(Image.new("RGB", (4, 4), (int(sys.argv[2]), i, 0)), sys.argv[1], "{:05}.png")
"""


@pytest.mark.subprocess
def test_two_processes_at_one_folder_never_overwrite(tmp_path):
    count = 100
    argv = [[sys.executable, "-c", HAMMER, str(tmp_path), str(who), str(count)] for who in (1, 2)]
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda call: subprocess.run(call, cwd=ROOT, check=False).returncode, argv))
    assert done == [0, 0]
    found = {Image.open(path).getpixel((0, 0))[:2] for path in tmp_path.iterdir()}
    assert found == {(who, i) for who in (1, 2) for i in range(count)}
    assert contents(tmp_path) == [f"{i:05}.png" for i in range(2 * count)]


@pytest.mark.subprocess
def test_a_process_that_is_killed_takes_the_other_along_but_no_picture(ckpt, tmp_path):
    argv = command(ckpt, "--n_iter", "60", "--outdir", str(tmp_path / "out"))
    one, other = start([argv, argv])
    _until(lambda: len(list((tmp_path / "out").glob("samples/*.png"))) >= 4)
    other.kill()
    other.communicate()
    error = one.communicate(timeout=240)[1]
    assert one.returncode == 1 and "Traceback" not in error
    paths = list((tmp_path / "out/samples").glob("*.png"))
    assert len(paths) >= 30
    for path in paths:
        Image.open(path).load()


def _until(true, seconds: int = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


# ---- names ----

PROMPTS = [
    "../../up",
    "/etc/x",
    "a\0b",
    "CON",
    "{} {0} %s",
    "~/home",
    "…ünï 猫 🐈 \u202e",
    "-" * 300,
    "a\u2028b\x0cc",
    "",
]


def test_prompts_are_no_paths(ckpt, tmp_path):
    (tmp_path / "p.txt").write_text("\n".join([*PROMPTS, "end"]), encoding="utf-8")
    inside = tmp_path / "inner/out ünï {} %s"
    flags = ["--from-file", str(tmp_path / "p.txt"), "--n_iter", "1", "--outdir", str(inside), "--resume"]
    before = set(contents(tmp_path))
    assert cli.run(txt2img.main, command(ckpt, *flags)) == 0
    expected = [f"samples/{i:05}.png" for i in range(len(PROMPTS) + 1)]
    assert contents(inside) == ["grid-0000.png", "manifest.jsonl", *expected]
    assert set(contents(tmp_path)) - before == {f"inner/{inside.name}/{name}" for name in contents(inside)}
    for prompt, name in zip(PROMPTS, expected):
        assert json.loads(Image.open(inside / name).text["ldm"])["prompt"] == prompt
    lines = (inside / "manifest.jsonl").read_text().splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == [*PROMPTS, "end"]


def test_names_that_are_no_utf_8_are_kept_in_pictures(tmp_path):
    path = images.save_png(Image.new("RGB", (2, 2)), tmp_path, "{:05}.png", {"ldm": json.dumps("caf\udce9 猫")})
    path = images.save_png(
        Image.new("RGB", (2, 2)), tmp_path, "{:05}.png", images.png_metadata({"prompt": "caf\udce9"})
    )
    assert json.loads(Image.open(path).text["ldm"])["prompt"] == "caf\udce9"


def test_messages_where_the_terminal_has_no_letters_for_them():
    class Ascii:
        encoding, text = "ascii", ""

        def write(self, text):
            self.text += text.encode("ascii").decode()

        def flush(self):
            pass

    stream = Ascii()
    cli.say("café caf\udce9 猫", stream)
    assert stream.text == "caf\\xe9 caf\\udce9 \\u732b\n"


@pytest.mark.subprocess
def test_a_process_without_utf_8_that_listens_nowhere(ckpt, tmp_path):
    """A folder whose name is no UTF-8, a locale that knows ASCII alone; with a watch on what sockets are bound."""
    program = (
        "import runpy, sys\n"
        "def watch(event, args):\n"
        "    if event == 'socket.bind': raise SystemExit(f'listens at {args[1]}')\n"
        "sys.addaudithook(watch)\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    outdir = os.fsencode(tmp_path) + b"/caf\xe9"
    argv = [str(ROOT / "scripts/txt2img.py"), *command(ckpt, "--n_iter", "1", "--resume", "--outdir"), outdir]
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", program, *argv], env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert b"caf" in done.stdout and b"Enjoy" in done.stdout and b"Traceback" not in done.stderr
    assert sorted(os.listdir(outdir)) == [b"grid-0000.png", b"manifest.jsonl", b"samples"]


# ---- impatience, and numbers that are none ----


@pytest.mark.subprocess
def test_ctrl_c_many_times(ckpt, tmp_path):
    argv = [str(ROOT / "scripts/txt2img.py"), *command(ckpt, "--n_iter", "2000", "--outdir", str(tmp_path / "out"))]
    process = subprocess.Popen([sys.executable, *argv], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    _until(lambda: len(list((tmp_path / "out").glob("samples/*.png"))) >= 3)
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
        time.sleep(0.02)
    error = process.stderr.read()
    paths = sorted((tmp_path / "out/samples").iterdir())
    assert process.returncode == 130 and "Traceback" not in error and "Exception ignored" not in error
    assert error.splitlines()[-1] == f"interrupted; {len(paths)} images written to {tmp_path / 'out/samples'}"
    for path in paths:
        Image.open(path).load()


def test_pictures_that_are_not_finite_end_the_run_and_cost_no_other(ckpt, tmp_path, monkeypatch, capsys):

    sample, calls = Pipeline.sample, []

    def broken(*args, **options):
        calls.append(None)
        return sample(*args, **options) * (float("nan") if len(calls) == 3 else 1)

    monkeypatch.setattr(Pipeline, "sample", broken)
    assert cli.run(txt2img.main, command(ckpt, "--n_iter", "5", "--outdir", str(tmp_path / "out"))) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: the latents came out as NaN") and "--precision full" in error
    assert contents(tmp_path / "out/samples") == ["00000.png", "00001.png"]


# ---- long runs ----


@pytest.mark.subprocess
@pytest.mark.parametrize("prompts", [40, pytest.param(2000, marks=pytest.mark.slow)])
def test_a_long_run_needs_no_more_as_it_goes_on(tmp_path, prompts):
    """With the bundled model, in batches of four: memory within 8 MiB after the start, and the same files open."""
    call = [sys.executable, "-m", "tests.scripts.long_run", str(tmp_path), str(prompts), "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(call, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["code"] == 0 and found["bound"] == [], done.stderr
    assert len(found["memory"]) == prompts // 4 and len(contents(tmp_path / "out/samples")) == prompts
    settled = found["memory"][prompts // 16 :]
    assert max(settled) - settled[0] < 8
    assert len(set(found["files"][1:])) == 1
