"""A checkpoint of the config's size to a model that is ready to draw, each time in a process of its own.

The file is in the system's cache, as the first run, which does not count, has read it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.comparing import Bench, explain, finished
from benchmarks.job import in_fresh_process
from benchmarks.memory import Peak
from benchmarks.rows import Row
from benchmarks.settings import Settings
from benchmarks.timing import clock_of, in_turns, timed

NOTE = "memory: anonymous, of the whole process"
PRECISIONS = {"fp32": "full", "fp16": "fp16", "bf16": "bf16"}  # as loading calls them


def rows(bench: Bench) -> Iterator[Row]:
    """Ours by precision, and on a CPU the public way: initialise, read, copy."""
    settings = bench.settings
    ckpt = settings.ckpt or str(written(settings))
    size = f"{Path(ckpt).stat().st_size / 1e9:.1f} GB"
    for precision in settings.precisions:
        arguments = {"config": settings.config, "ckpt": ckpt, "device": str(settings.device)}
        jobs = {"ours": partial(in_fresh_process, "suites.load:ours", **arguments, precision=PRECISIONS[precision])}
        if settings.compare and settings.device.type == "cpu":
            jobs["public way"] = partial(in_fresh_process, "suites.load:public_way", **arguments)
        found: dict[str, Row] = {}
        note = "memory: of the GPU" if settings.on_gpu else NOTE
        for who, job in jobs.items():
            row = Row("load", f"{size} checkpoint", who, str(settings.device), precision, note=note, unit="models")
            try:
                row.first = job()["seconds"]  # the file may have come from the disk
            except (RuntimeError, MemoryError) as error:
                row.error = explain(error)
                yield row
                continue
            found[who] = row
        turns = in_turns({who: jobs[who] for who in found}, settings.repeats)
        for who, row in found.items():
            peaks = [result["memory"] for result in turns[who] if result["memory"] is not None]
            row.memory = max(peaks, default=None)
        yield from finished(found, {who: [result["seconds"] for result in results] for who, results in turns.items()})


def written(settings: Settings) -> Path:
    """The config's checkpoint of random weights in the cache folder; written if it is not there."""
    path = settings.cache.resolve() / f"{Path(settings.config).stem}-random.ckpt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        in_fresh_process("suites.load:write", config=settings.config, path=str(path))  # so that its memory comes back
    return path


def write(config: str, path: str) -> None:
    """The job: a checkpoint of random weights in published names."""
    from benchmarks.networks import on_meta, with_weights
    from ldm.checkpoint import save_checkpoint

    settings = Settings(config=config)
    model = with_weights(on_meta(settings.model_config["model"]), settings.device)
    save_checkpoint(Path(path), model.state_dict())


def ours(config: str, ckpt: str, device: str, precision: str) -> dict[str, Any]:
    """The job: `load_model`, as all scripts do it."""
    from ldm.inference import load_model

    return _measured(lambda: load_model(config, ckpt, device=device, precision=precision), device)


def public_way(config: str, ckpt: str, device: str) -> dict[str, Any]:
    """The job: the model initialised, the file unpickled into memory, and copied."""
    from ldm.util import instantiate_from_config

    def load() -> object:
        model = instantiate_from_config(Settings(config=config).model_config["model"])
        state = torch.load(ckpt, map_location="cpu", weights_only=False, mmap=False)
        model.load_state_dict(state.get("state_dict", state), strict=False)
        return model.to(device).eval()

    return _measured(load, device)


def _measured(load: Callable[[], object], device: str) -> dict[str, Any]:
    with Peak(torch.device(device)) as peak:
        seconds = timed(load, clock_of(torch.device(device)))
    return {"seconds": seconds, "memory": peak.total}
