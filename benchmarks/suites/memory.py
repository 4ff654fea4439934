"""Peaks of memory of decoding and encoding large pictures, each in a process of its own, at its first call."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.comparing import Bench, explain
from benchmarks.job import in_fresh_process
from benchmarks.memory import Peak
from benchmarks.rows import Row, row_of
from benchmarks.settings import Scan, Settings
from benchmarks.suites import vae
from benchmarks.timing import clock_of, timed

SIZES = (512, 1024, 2048)
PEER_UP_TO = 512  # pixels: without tiles, theirs takes 16 times the memory at 2048


def rows(bench: Bench) -> Iterator[Row]:
    """Both directions at every size, ours and where it fits theirs."""
    settings = bench.settings
    for scan in settings.scans(SIZES, (1,)):
        settings.latent(scan.size)
        for kind in vae.KINDS:
            for who in ("ours eager", *(["diffusers eager"] if settings.compare and scan.size <= PEER_UP_TO else [])):
                row = row_of("memory", kind, who, settings.device, scan, items=scan.batch, unit="images")
                row.note = "first call of a process"
                arguments = {"config": settings.config, "device": str(settings.device), "kind": kind, "who": who}
                try:
                    found = in_fresh_process("suites.memory:first_call", **arguments, scan=vars(scan))
                    row.first, row.seconds, row.memory = found["seconds"], [found["seconds"]], found["memory"]
                except (RuntimeError, MemoryError) as error:
                    row.error = explain(error)
                yield row


@torch.no_grad()
def first_call(config: str, device: str, kind: str, who: str, scan: dict[str, Any]) -> dict[str, Any]:
    """The job: seconds and bytes on top of the weights that a first call takes."""
    from benchmarks.networks import on_meta, with_weights

    settings, point = Settings(torch.device(device), config=config), Scan(**scan)
    meta = on_meta(settings.model_config["model"]).first_stage_model
    weights = with_weights(meta, settings.device, point.dtype)
    call = dict(vae.contenders(settings, weights, kind, point))[who]()
    with Peak(settings.device) as peak:
        seconds = timed(call, clock_of(settings.device))
    return {"seconds": seconds, "memory": peak.extra}
