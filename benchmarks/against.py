"""Compare this checkout with another one, in interleaved processes of their scripts/benchmark.py."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from benchmarks.compare import finish
from benchmarks.measure import in_turns
from benchmarks.settings import Row

KEY = ("suite", "what", "who", "device", "precision", "batch", "size")
SCRIPT = Path("scripts/benchmark.py")


def compare_checkouts(roots: Mapping[str, Path], argv: Sequence[str], repeats: int) -> Iterator[Row]:
    """Run the same benchmark in each checkout, `repeats` times in turns, and yield rows with ratios.

    Args:
        roots: Checkouts by name.
        argv: Options of scripts/benchmark.py without `--out`, `--repeats` and `--against`.
        repeats: Number of turns.

    Raises:
        FileNotFoundError: If a folder is not a checkout.
        RuntimeError: If a run fails, with its last line of error output.
    """
    for root in roots.values():
        if not (root / SCRIPT).is_file():
            raise FileNotFoundError(f"{root} is not a checkout of this project: it has no {SCRIPT}")
    calls = {name: lambda root=root: _run(root, argv) for name, root in roots.items()}
    turns = in_turns(calls, repeats)
    groups: dict[tuple[Any, ...], dict[str, list[dict[str, Any]]]] = {}
    for name, runs in turns.items():
        for record in (record for run in runs for record in run if record["seconds"]):
            groups.setdefault(tuple(record[key] for key in KEY), {}).setdefault(name, []).append(record)
    for group in groups.values():
        rows = {name: _row(name, records) for name, records in group.items()}
        seconds = {name: [_median(record) for record in records] for name, records in group.items()}
        if len({len(values) for values in seconds.values()}) == 1:
            yield from finish(rows, seconds)


def _run(root: Path, argv: Sequence[str]) -> list[dict[str, Any]]:
    """Run the benchmark of a checkout and return its rows."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        command = [sys.executable, str(root / SCRIPT), *argv, "--repeats", "1", "--compare", "none", "--out", str(out)]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{root}: {(done.stderr.strip().splitlines() or ['benchmark failed'])[-1]}")
        return json.loads((out / "results.json").read_text())["rows"]


def _median(record: Mapping[str, Any]) -> float:
    values = sorted(record["seconds"])
    return values[len(values) // 2]


def _row(name: str, records: Sequence[Mapping[str, Any]]) -> Row:
    known = {field.name for field in fields(Row)} - {"seconds", "ratios", "psnr"}
    row = Row(**{key: value for key, value in records[0].items() if key in known})
    row.who = f"{row.who}, {name}"
    return row
