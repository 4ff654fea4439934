"""Files that are whole or not there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ldm.files import whole_file


def test_the_name_is_given_last(tmp_path):
    path = tmp_path / "a.bin"
    path.write_text("old")
    with whole_file(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
        assert partial.parent == path.parent
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_error_leaves_what_was_there(tmp_path, error):
    path = tmp_path / "a.bin"
    path.write_text("old")
    with pytest.raises(type(error)), whole_file(path) as partial:
        partial.write_text("ne")
        raise error
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_content_and_name_are_brought_to_the_disk(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda fd: (order.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name), fsync(fd))
    )
    monkeypatch.setattr(os, "replace", lambda *paths: (order.append("renamed"), replace(*paths)))
    with whole_file(tmp_path / "a.bin") as partial:
        partial.write_text("x")
    assert order == [f".a.bin.{os.getpid()}.partial", "renamed", tmp_path.name]


def test_a_process_that_is_killed(tmp_path):
    (tmp_path / "a.bin").write_text("old")
    code = (
        "import os, signal, sys; from ldm.files import whole_file\n"
        "with whole_file(sys.argv[1]) as partial: partial.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "a.bin"], cwd=root)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "a.bin").read_text() == "old"
