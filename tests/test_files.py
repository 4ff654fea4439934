"""Files that are whole or not there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ldm import files
from ldm.files import atomic_write, numbered, write_exclusive

ROOT = Path(__file__).resolve().parents[1]


def test_file_appears_when_complete(tmp_path):
    path = tmp_path / "a.bin"
    path.write_text("old")
    with atomic_write(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
        assert partial.parent == path.parent
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_error_keeps_the_old_file(tmp_path, error):
    path = tmp_path / "a.bin"
    path.write_text("old")
    with pytest.raises(type(error)), atomic_write(path) as partial:
        partial.write_text("ne")
        raise error
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_content_and_folder_are_synced(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda fd: (order.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name), fsync(fd))
    )
    monkeypatch.setattr(os, "replace", lambda *paths: (order.append("renamed"), replace(*paths)))
    with atomic_write(tmp_path / "a.bin") as partial:
        partial.write_text("x")
    assert order == [partial.name, "renamed", tmp_path.name]


@pytest.mark.subprocess
def test_killed_process_keeps_the_old_file(tmp_path):
    (tmp_path / "a.bin").write_text("old")
    code = (
        "import os, signal, sys; from ldm.files import atomic_write\n"
        "with atomic_write(sys.argv[1]) as partial: partial.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "a.bin"], cwd=root)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "a.bin").read_text() == "old"


# ---- names that are taken ----


@pytest.fixture(params=["links", "no links"])
def links(request, monkeypatch) -> str:
    """With hard links, and on a file system that has none."""
    if request.param == "no links":

        def refuse(*_):
            raise OSError(95, "Operation not supported")

        monkeypatch.setattr(os, "link", refuse)
    return request.param


def test_exclusive_write_replaces_nothing(tmp_path, links):
    path = tmp_path / "a.bin"
    with pytest.raises(FileExistsError, match="a.bin exists already: choose another name"):  # noqa: SIM117
        with atomic_write(path, exclusive=True) as partial:
            partial.write_text("ours")
            path.write_text("theirs")  # another process was faster
    assert path.read_text() == "theirs" and os.listdir(tmp_path) == ["a.bin"]
    with atomic_write(tmp_path / "b.bin", exclusive=True) as partial:
        partial.write_text("ours")
    assert (tmp_path / "b.bin").read_text() == "ours" and len(os.listdir(tmp_path)) == 2


def test_write_exclusive_takes_the_first_free_name(tmp_path, links):
    (tmp_path / "a.bin").write_text("theirs")

    def write(file):
        (tmp_path / "a-2.bin").write_text("theirs, too")  # while ours is written
        file.write(b"ours")

    seen = []
    path = write_exclusive(tmp_path, numbered(tmp_path / "a.bin"), write, lambda whole: seen.append(whole.read_bytes()))
    assert path == tmp_path / "a-3.bin" and path.read_bytes() == b"ours" and seen == [b"ours"]
    assert sorted(os.listdir(tmp_path)) == ["a-2.bin", "a-3.bin", "a.bin"]
    with pytest.raises(FileExistsError, match="every name for a file in .* is taken"):
        write_exclusive(tmp_path, [path], lambda file: None)
    assert sorted(os.listdir(tmp_path)) == ["a-2.bin", "a-3.bin", "a.bin"]


def test_error_leaves_no_new_file(tmp_path):
    def full(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_exclusive(tmp_path, [tmp_path / "a.bin"], full)
    assert os.listdir(tmp_path) == []


def test_exclusive_files_are_synced(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(os, "fsync", lambda fd: order.append(Path(os.readlink(f"/proc/self/fd/{fd}")).suffix))
    monkeypatch.setattr(files, "_rename_exclusive", lambda *paths: order.append("named"))
    write_exclusive(tmp_path, [tmp_path / "a.bin"], lambda file: file.write(b"x"))
    assert order == [".partial", "named", ""]


HAMMER = """
import sys
from pathlib import Path
from ldm.files import numbered, atomic_write, write_exclusive
folder, who = Path(sys.argv[1]), sys.argv[2].encode()
for i in range(60):
    write_exclusive(folder, numbered(folder / "a.bin"), lambda file: file.write(who * 1000))
won = 0
for i in range(60):
    try:
        with atomic_write(folder / f"one-{i}", exclusive=True) as partial:
            partial.write_bytes(who * 1000)
        won += 1
    except FileExistsError:
        pass
print(won)
"""


@pytest.mark.subprocess
def test_two_processes_never_share_a_name(tmp_path):
    command = [sys.executable, "-c", HAMMER, str(tmp_path)]
    both = [subprocess.Popen([*command, who], cwd=ROOT, stdout=subprocess.PIPE, text=True) for who in "xy"]
    won = [int(process.communicate(timeout=240)[0]) for process in both]
    assert [process.returncode for process in both] == [0, 0] and sum(won) == 60
    found = [path.read_bytes() for path in tmp_path.glob("a*.bin")]
    assert sorted(found) == [b"x" * 1000] * 60 + [b"y" * 1000] * 60
    assert {path.read_bytes() for path in tmp_path.glob("one-*")} <= {b"x" * 1000, b"y" * 1000}
    assert not list(tmp_path.glob(".*"))


def test_longest_file_names(tmp_path):
    with atomic_write(tmp_path / ("a" * 255)) as partial:
        partial.write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == ["a" * 255]


def test_failed_rename_leaves_no_reserved_name(tmp_path, monkeypatch):
    """Without hard links names are reserved first: what then fails leaves no empty file, and is not taken for a name
    that somebody else has."""
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError(1, "no links")))
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(FileExistsError(17, "odd file system")))
    with pytest.raises(OSError, match="could not be written") as found:
        write_exclusive(tmp_path, numbered(tmp_path / "a.png"), lambda file: file.write(b"x"))
    assert not isinstance(found.value, FileExistsError) and not list(tmp_path.iterdir())
