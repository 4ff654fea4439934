"""Files at the limits of the readers (millions of names and values) take bounded memory and time."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ldm.checkpoint.formats.containers import MAX_PICKLE
from ldm.checkpoint.formats.safetensors import MAX_HEADER
from ldm.checkpoint.formats.unpickler import MAX_STEPS
from tests.checkpoint.hostile import MORE, START, UNSAFE, archive, name, text
from tests.training.test_trainer_state import READER

ROOT = Path(__file__).parents[2]
ROOM = 1536 * 2**20  # bytes beyond what the libraries take: a file, its pickle, and what becomes of that
OF_STATES = "holds a (tuple|list|str), not the state|holds weights, but not|damaged, or holds|is refused"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc and limits of memory"),
]


def header(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


def filled(room: int, start: bytes, entry: bytes, end: bytes, joint: bytes = b",") -> bytes:
    """As many entries as there is room for, numbered where they say so."""
    size = len(entry % 0 if b"%" in entry else entry) + len(joint)
    count = (room - len(start) - len(end)) // size
    return start + joint.join(entry % n if b"%" in entry else entry for n in range(count)) + end


def headers() -> Iterator[tuple[str, bytes, str]]:
    room = MAX_HEADER - 8
    entry = b'"w%09d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    refused = "names more in its header than any model has"
    yield "names", header(filled(room, b"{", entry, b"}")), refused
    start, end = b'{"w":{"dtype":"F32","data_offsets":[0,0],"shape":[0,', b"]}}"
    yield "axes", header(filled(room, start, b"1", end)), refused
    yield "metadata", header(filled(room, b'{"__metadata__":{', b'"m%09d":""', b"}}")), refused
    yield "escapes", header(filled(room, b"{", entry.replace(b'"shape"', rb'"\u0073hape"'), b"}")), refused


def pickled() -> Iterator[tuple[str, bytes, str]]:
    steps = MAX_STEPS - 10
    yield "dictionaries", archive(START + b"(" + b"}" * steps + b"t."), "holds a tuple"
    yield "too many values", archive(START + b"(" + b"}" * (steps + 20) + b"t."), UNSAFE
    keys = b"".join(text(f"{n:07}") + b"N" for n in range(steps // 2))
    yield "keys", archive(START + b"}(" + keys[: MAX_PICKLE - 8] + b"u."), "holds no weights|" + UNSAFE
    yield "numbers", archive(START + b"(" + b"G\x3f\xf0\0\0\0\0\0\1" * steps + b"t."), "holds a tuple"
    yield "lists of lists", archive(START + b"](" + b"]K\1a" * (steps // 3) + b"e."), "holds a list"
    yield "dictionaries of one", archive(START + b"](" + b"}K\1Ns" * (steps // 4) + b"e."), "holds a list"
    memo = b"".join(b"]r" + struct.pack("<I", n) for n in range(steps // 2))
    yield "things remembered", archive(START + b"(" + memo + b"t."), "holds a tuple"
    names = b"".join(name(f"os.f{n}") for n in range(steps // 2))
    yield "names to call", archive(START + b"(" + names + b"t."), MORE
    yield "a pickle too large", archive(START + text("x" * MAX_PICKLE) + b"."), "more beside tensors"
    yield "a text", archive(START + text("x" * (MAX_PICKLE - 100)) + b"."), "holds a str"


@pytest.mark.subprocess
@pytest.mark.parametrize("make, reader", [(headers, "weights"), (pickled, "weights"), (pickled, "states")])
def test_files_at_the_limits(tmp_path, make, reader):
    expected = {}
    (tmp_path / "files").mkdir()
    for index, (key, content, pattern) in enumerate(make()):
        (tmp_path / "files" / f"{index:02}").write_bytes(content)
        expected[f"{index:02}"] = (key, pattern if reader == "weights" else OF_STATES)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    program = ["-m", "tests.checkpoint.hostile"] if reader == "weights" else ["-c", READER]
    command = [sys.executable, *program, str(tmp_path / "files"), str(ROOM)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    outcome = dict(json.loads(line) for line in done.stdout.splitlines())
    found = {key: outcome.get(number, "was not reached") for number, (key, _) in expected.items()}
    assert done.returncode == 0, (found, done.stderr[-2000:])
    wrong = {key: found[key][:300] for key, pattern in expected.values() if not re.search(pattern, found[key])}
    assert not wrong
    assert all(len(what) < 1000 for what in found.values())
