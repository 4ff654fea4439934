"""Files that are whole or not there: written under another name, brought to the disk, and only then given their own."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

PARTIAL = ".{name}.{pid}.partial"  # what a process that is killed may leave; no program takes it for a file's name


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path beside `path` to write a file to, which gets its name, in place of what had it, when the block ends well.

    Neither a process that is killed nor a power cut leaves a file of that name that is not complete. An error leaves
    what was there before, and nothing else. Raises OSError.
    """
    path = Path(path)
    partial = path.with_name(PARTIAL.format(name=path.name, pid=os.getpid()))
    try:
        yield partial
        sync(partial)
        os.replace(partial, path)
        sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file, in UTF-8, that is whole or not there; see `whole_file`."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Have a file's content on the disk. Raises OSError, for a disk that is full may say so only now."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Have a folder's names on the disk, where the system can do that."""
    with contextlib.suppress(OSError):  # Windows, and some network file systems
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
