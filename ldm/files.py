"""Write files atomically: under a temporary name, flushed to disk, then renamed."""

from __future__ import annotations

import contextlib
import itertools
import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

PARTIAL = ".{name}.{pid}.partial"  # temporary names; a killed process may leave such a file


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], exclusive: bool = False) -> Iterator[Path]:
    """Yield a temporary path to write to, which becomes `path` when the block ends without error.

    Neither a killed process nor a power cut leaves an incomplete file at `path`; an error leaves what was there before.

    Args:
        path: the file to create or replace.
        exclusive: never replace a file, whichever process wrote it.

    Raises:
        FileExistsError: with `exclusive`, there is such a file when the block ends.
        OSError: the file cannot be written.
    """
    path = Path(path)
    partial = _partial(path.parent)
    try:
        yield partial
        sync(partial)
        if exclusive:
            _rename_exclusive(partial, path)
        else:
            os.replace(partial, path)
        sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_exclusive(
    folder: Path,
    names: Iterable[Path],
    write: Callable[[BinaryIO], Any],
    before: Callable[[Path], None] | None = None,
) -> Path:
    """Write a file under the first of `names` that no file has. Several processes may do so at once.

    Args:
        folder: where the file is written.
        names: paths in `folder`, read when the file is complete.
        write: writes the content.
        before: called with the complete file before it gets its name.

    Returns:
        The path of the file.

    Raises:
        FileExistsError: all names are taken.
        OSError: the file cannot be written.
    """
    partial = _partial(folder)
    try:
        with partial.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if before is not None:
            before(partial)
        for path in names:
            with contextlib.suppress(FileExistsError):  # perhaps another process took it just now
                _rename_exclusive(partial, path)
                sync_folder(folder)
                return path
        raise FileExistsError(f"every name for a file in {folder} is taken")
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")


def numbered(path: Path, joint: str = "-", first: int = 2) -> Iterator[Path]:
    """Yield a.png, a-2.png, a-3.png ... without end."""
    return itertools.chain([path], (path.with_stem(f"{path.stem}{joint}{n}") for n in itertools.count(first)))


def sync(path: Path) -> None:
    """Flush a file's content to disk. Raises OSError; a full disk may report it only now."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, where the system supports it."""
    with contextlib.suppress(OSError):  # Windows, and some network file systems
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _partial(folder: Path) -> Path:
    return folder / PARTIAL.format(name=uuid.uuid4().hex, pid=os.getpid())


def _rename_exclusive(partial: Path, path: Path) -> None:
    """Rename atomically without replacing; FileExistsError if the name is taken."""
    try:
        try:
            os.link(partial, path)
        except FileExistsError:
            raise
        except OSError:  # no hard links: reserve the name with an empty file, which a kill just here leaves
            path.open("xb").close()
            try:
                os.replace(partial, path)
            except OSError as error:
                path.unlink(missing_ok=True)
                raise OSError(f"{path} could not be written: {error}") from error
    except FileExistsError:
        raise FileExistsError(f"{path} exists already: choose another name") from None
