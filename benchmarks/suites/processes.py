"""Measurements in fresh processes: loading, peak memory of the first stage, the txt2img command."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.compare import Bench, explain, finish
from benchmarks.measure import PeakMemory, in_turns, run_in_process, synchronized_clock, timed
from benchmarks.settings import Row, Scan, Settings, row_of
from ldm.util import REPOSITORY, public_path

PRECISIONS = {"fp32": "full", "fp16": "fp16", "bf16": "bf16"}  # names of loading and of the scripts

# ---- loading ----


def load(bench: Bench) -> Iterator[Row]:
    """Measure `load_model`, and on a CPU the public way: initialise, read, copy. The file is in the page cache."""
    settings = bench.settings
    ckpt = settings.ckpt or str(random_checkpoint(settings))
    size = f"{Path(ckpt).stat().st_size / 1e9:.1f} GB"
    note = "memory: of the GPU" if settings.on_gpu else "memory: anonymous, of the whole process"
    for precision in settings.precisions:
        arguments = {"config": settings.config, "ckpt": ckpt, "device": str(settings.device)}
        jobs = {"ours": partial(run_in_process, _job(load_ours), **arguments, precision=PRECISIONS[precision])}
        if settings.compare and settings.device.type == "cpu":
            jobs["public way"] = partial(run_in_process, _job(load_public), **arguments)
        found: dict[str, Row] = {}
        for who, job in jobs.items():
            row = Row("load", f"{size} checkpoint", who, str(settings.device), precision, note=note, unit="models")
            try:
                row.first = job()["seconds"]  # the file may come from the disk
            except (RuntimeError, MemoryError) as error:
                row.error = explain(error)
                yield row
                continue
            found[who] = row
        turns = in_turns({who: jobs[who] for who in found}, settings.repeats)
        for who, row in found.items():
            row.memory = max((result["memory"] for result in turns[who] if result["memory"] is not None), default=None)
        yield from finish(found, {who: [result["seconds"] for result in results] for who, results in turns.items()})


def _job(function: Callable[..., Any]) -> str:
    return f"suites.processes:{function.__name__}"


def random_checkpoint(settings: Settings) -> Path:
    """Return the config's checkpoint of random weights in the cache folder, written if missing."""
    path = settings.cache.resolve() / f"{Path(settings.config).stem}-random.ckpt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        run_in_process(_job(write_checkpoint), config=settings.config, path=str(path))  # returns its memory
    return path


def write_checkpoint(config: str, path: str) -> None:
    """Job: write a checkpoint of random weights."""
    from benchmarks.networks import on_meta, with_weights
    from ldm.checkpoint import save_checkpoint

    settings = Settings(config=config)
    model = with_weights(on_meta(settings.model_config["model"]), settings.device)
    save_checkpoint(Path(path), model.state_dict())


def load_ours(config: str, ckpt: str, device: str, precision: str) -> dict[str, Any]:
    """Job: `load_model` as the scripts call it."""
    from ldm.inference import load_model

    return _measure_load(lambda: load_model(config, ckpt, device=device, precision=precision), device)


def load_public(config: str, ckpt: str, device: str) -> dict[str, Any]:
    """Job: initialise the model, unpickle the file, copy."""
    from ldm.util import instantiate_from_config

    def load() -> object:
        model = instantiate_from_config(Settings(config=config).model_config["model"])
        state = torch.load(ckpt, map_location="cpu", weights_only=False, mmap=False)
        model.load_state_dict(state.get("state_dict", state), strict=False)
        return model.to(device).eval()

    return _measure_load(load, device)


def _measure_load(load: Callable[[], object], device: str) -> dict[str, Any]:
    with PeakMemory(torch.device(device)) as peak:
        seconds = timed(load, synchronized_clock(torch.device(device)))
    return {"seconds": seconds, "memory": peak.total}


# ---- peak memory of the first stage ----

SIZES = (512, 1024, 2048)
BASELINE_UP_TO = 512  # pixels: without tiles the baseline needs 16 times the memory at 2048


def memory(bench: Bench) -> Iterator[Row]:
    """Measure the first call of decoding and encoding at every size."""
    from benchmarks.suites.networks import DIRECTIONS

    settings = bench.settings
    for scan in settings.scans(SIZES, (1,)):
        settings.latent(scan.size)
        for kind in DIRECTIONS:
            baseline = ["diffusers eager"] if settings.compare and scan.size <= BASELINE_UP_TO else []
            for who in ("ours eager", *baseline):
                row = row_of("memory", kind, who, settings.device, scan, items=scan.batch, unit="images")
                row.note = "first call of a process"
                arguments = {"config": settings.config, "device": str(settings.device), "kind": kind, "who": who}
                try:
                    found = run_in_process(_job(first_call), **arguments, scan=vars(scan))
                    row.first, row.seconds, row.memory = found["seconds"], [found["seconds"]], found["memory"]
                except (RuntimeError, MemoryError) as error:
                    row.error = explain(error)
                yield row


@torch.no_grad()
def first_call(config: str, device: str, kind: str, who: str, scan: dict[str, Any]) -> dict[str, Any]:
    """Job: seconds of a first call, and its memory on top of the weights."""
    from benchmarks.networks import on_meta, with_weights
    from benchmarks.suites.networks import vae_builds

    settings, point = Settings(torch.device(device), config=config), Scan(**scan)
    meta = on_meta(settings.model_config["model"]).first_stage_model
    weights = with_weights(meta, settings.device, point.dtype)
    call = vae_builds(settings, weights, kind, point)[who]()
    with PeakMemory(settings.device) as peak:
        seconds = timed(call, synchronized_clock(settings.device))
    return {"seconds": seconds, "memory": peak.extra}


# ---- the command ----

SCRIPT = "scripts/txt2img.py"


def e2e(bench: Bench) -> Iterator[Row]:
    """Measure txt2img with the bundled model from process start to end. FileNotFoundError without a clone."""
    from ldm.inference import BUNDLED_CKPT

    settings, ckpt = bench.settings, public_path(BUNDLED_CKPT)
    if ckpt is None or not (REPOSITORY / SCRIPT).is_file():
        raise FileNotFoundError(f"--suite e2e needs {SCRIPT} and {BUNDLED_CKPT}: run it from a clone")
    for precision in settings.precisions:
        options = ["--ckpt", str(ckpt), "--device", str(settings.device), "--precision", PRECISIONS[precision]]
        row = Row("e2e", SCRIPT, "ours", str(settings.device), precision, unit="runs")
        call = partial(timed, partial(run_script, options))
        for _ in range(settings.warm_up):
            row.first = row.first or call()
        row.seconds = in_turns({"ours": call}, settings.repeats)["ours"]
        yield row


def run_script(options: list[str]) -> None:
    """Run txt2img in a temporary folder; RuntimeError with the last error line unless it writes an image."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(REPOSITORY / SCRIPT), *options, "--outdir", folder]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode or not list(Path(folder).rglob("*.png")):
            raise RuntimeError((done.stderr.strip().splitlines() or ["it wrote no image"])[-1])
