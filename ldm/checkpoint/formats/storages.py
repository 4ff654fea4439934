"""Storages of tensors: ranges of a file, memory-mapped where that is safe, otherwise read."""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, UntypedStorage

from ldm.checkpoint.formats.unpickler import TensorRef

ALIGNMENT = 16  # bytes; ranges that begin elsewhere are read
MAX_PRODUCT = 2**62  # of the sizes that are not 0: torch and numpy multiply these even without elements
MAX_EXPANDED = 2**16  # elements of a tensor that has more of them than its storage

# File systems whose files another machine or program may shorten at any moment: touching a mapped page that is gone
# kills the process (SIGBUS), and no handler in Python can prevent that.
_SHARED = re.compile(
    r"nfs\d?|cifs|smb\d?|smbfs|9p|virtiofs|afs|ceph|lustre|gpfs|beegfs|glusterfs|orangefs|pvfs2|gfs2?|ocfs2|davfs|ncpfs"
    r"|vboxsf|vmhgfs|prl_fs|fuse(\..*)?"
)


@dataclass(frozen=True)
class Stamp:
    """Identifies the content of a file, to notice that it was changed in place."""

    path: Path
    place: tuple[int, int]  # device and inode: a new file under the old name does not change mapped pages
    size: int
    changed: int  # in nanoseconds


def stamp(path: Path) -> Stamp:
    """Return the current `Stamp` of a file. Raises OSError."""
    found = path.stat()
    return Stamp(path, (found.st_dev, found.st_ino), found.st_size, found.st_mtime_ns)


_mapped: dict[Path, Stamp] = {}  # mapped files, as they were then


def note_mapped(path: Path) -> None:
    """Remember a memory-mapped file, for `shrunk`. Raises OSError."""
    _mapped[path] = stamp(path)


def shrunk() -> list[Path]:
    """Return the mapped files that have been truncated in place since."""
    found = []
    for path, before in list(_mapped.items()):
        with contextlib.suppress(OSError):
            now = stamp(path)
            if now.place == before.place and now.size < before.size:
                found.append(path)
    return found


def may_map(path: Path, mounts: str | None = None) -> bool:
    """Return whether mapping a file is safe: not on a network file system or one of another program (FUSE).

    Args:
        path: the file.
        mounts: the text of /proc/self/mountinfo; where there is none, every file counts as local.
    """
    if mounts is None:
        try:
            mounts = Path("/proc/self/mountinfo").read_text(errors="surrogateescape")
        except OSError:
            return True
    place, kind, depth = os.path.realpath(path), "", -1
    for line in mounts.splitlines():
        mounted, _, source = line.partition(" - ")
        fields = mounted.split(" ")
        if len(fields) < 5 or not source:
            continue
        point = re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), fields[4])
        if len(point) >= depth and (place + "/").startswith(point.rstrip("/") + "/"):  # the last one covers others
            kind, depth = source.split(" ")[0], len(point)
    return _SHARED.fullmatch(kind) is None


class Ranges:
    """Ranges of an open file as storages: private pages of a memory map, or bytes that are read."""

    def __init__(self, file: BinaryIO, *, mapped: bool) -> None:
        self._file = file
        self.size = os.fstat(file.fileno()).st_size
        self._map = mmap.mmap(file.fileno(), self.size, access=mmap.ACCESS_COPY) if mapped and self.size else None

    @property
    def mapped(self) -> bool:
        """Whether storages are pages of the file, which must then not change."""
        return self._map is not None

    def storage(self, start: int, length: int) -> UntypedStorage:
        """Return `length` bytes from `start` on. Raises ValueError if the file does not have them."""
        if start < 0 or length < 0 or start + length > self.size:
            raise ValueError(f"bytes {start} to {start + length} are needed, of {self.size}")
        if self._map is not None and length and start % ALIGNMENT == 0:
            return torch.frombuffer(self._map, dtype=torch.uint8, count=length, offset=start).untyped_storage()
        content = bytearray(length)
        self._file.seek(start)
        if self._file.readinto(content) != length:  # type: ignore[attr-defined]  # files of `open` have it
            raise ValueError(f"it ends before byte {start + length}")
        return storage_of(content)

    def head(self, start: int, length: int) -> bytes:
        """Return up to `length` bytes from `start` on."""
        self._file.seek(start)
        return self._file.read(length)


def storage_of(content: bytearray) -> UntypedStorage:
    """Return the memory of `content` as a storage."""
    if not content:
        return UntypedStorage(0)  # type: ignore[no-untyped-call]
    return torch.frombuffer(content, dtype=torch.uint8).untyped_storage()


def tensor_of(ref: TensorRef, storage: UntypedStorage) -> Tensor:
    """Build a tensor on its storage. Raises ValueError if it would reach beyond that, or far exceed it."""
    dtype = getattr(torch, ref.dtype)
    count, room = math.prod(ref.size), storage.nbytes() // dtype.itemsize
    last = ref.offset + sum((size - 1) * step for size, step in zip(ref.size, ref.stride))
    if count and last >= room:
        raise ValueError(f"its storage has {room} elements, and it needs number {last}")
    if count > max(room, MAX_EXPANDED):
        raise ValueError(f"its storage has {room} elements, and it expands them to {count}")
    if math.prod(filter(None, ref.size)) >= MAX_PRODUCT:
        raise ValueError(f"it has the shape {ref.size}, which no tensor can have")
    try:
        return torch.empty(0, dtype=dtype).set_(storage, ref.offset if count else 0, ref.size, ref.stride)
    except RuntimeError as error:
        raise ValueError(f"it has the shape {ref.size}, which torch does not accept") from error
