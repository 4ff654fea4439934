"""Files that are whole or not there: written under another name, brought to the disk, and only then given their own."""

from __future__ import annotations

import contextlib
import itertools
import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

PARTIAL = ".{name}.{pid}.partial"  # what a process that is killed may leave; no program takes it for a file's name


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], new: bool = False) -> Iterator[Path]:
    """A path beside `path` to write a file to, which gets its name, in place of what had it, when the block ends well.

    Neither a process that is killed nor a power cut leaves a file of that name that is not complete. An error leaves
    what was there before, and nothing else. Raises OSError; with `new` FileExistsError if there is such a file by then,
    which then stays, whichever process it came from.
    """
    path = Path(path)
    partial = path.with_name(PARTIAL.format(name=uuid.uuid4().hex, pid=os.getpid()))
    try:
        yield partial
        sync(partial)
        if new:
            _give_new_name(partial, path)
        else:
            os.replace(partial, path)
        sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_new(
    folder: Path,
    names: Iterable[Path],
    write: Callable[[BinaryIO], Any],
    before: Callable[[Path], None] | None = None,
) -> Path:
    """Have `write` write a file, and give it the first of `names`, paths in `folder`, that no file has; returns that.

    Several processes may do so at once: every file gets a name of its own, and is whole when it has it. names: asked
    for when the file is complete. before: called with the whole file, just before that gets its name. Raises OSError.
    """
    partial = folder / PARTIAL.format(name=uuid.uuid4().hex, pid=os.getpid())
    try:
        with partial.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if before is not None:
            before(partial)
        for path in names:
            with contextlib.suppress(FileExistsError):  # taken, perhaps by another process just now
                _give_new_name(partial, path)
                sync_folder(folder)
                return path
        raise FileExistsError(f"every name for a file in {folder} is taken")
    finally:
        partial.unlink(missing_ok=True)


def numbered(path: Path, joint: str = "-", first: int = 2) -> Iterator[Path]:
    """a.png, a-2.png, a-3.png ... for ever."""
    return itertools.chain([path], (path.with_stem(f"{path.stem}{joint}{n}") for n in itertools.count(first)))


def _give_new_name(partial: Path, path: Path) -> None:
    """Give a file another name, atomically; FileExistsError if that is taken."""
    try:
        try:
            os.link(partial, path)
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links: reserve the name, then replace the empty file
            path.open("xb").close()  # which is what a kill just here leaves
            try:
                os.replace(partial, path)
            except OSError as error:
                path.unlink(missing_ok=True)
                raise OSError(f"{path} could not be written: {error}") from error
    except FileExistsError:
        raise FileExistsError(f"{path} exists already: choose another name") from None


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file, in UTF-8, that is whole or not there; see `atomic_write`."""
    with atomic_write(path) as partial:
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
