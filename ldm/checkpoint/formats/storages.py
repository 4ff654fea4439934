"""Where the bytes of tensors come from: ranges of a file, memory-mapped where that is safe, else read."""

from __future__ import annotations

import contextlib
import logging
import math
import mmap
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, UntypedStorage

from ldm.checkpoint.formats.pickles import StoredTensor

logger = logging.getLogger(__name__)

ALIGNMENT = 16  # bytes; ranges that begin elsewhere are read
MAX_PRODUCT = 2**62  # of the sizes that are not 0: torch and numpy multiply these even if there are no elements
MAX_EXPANDED = 2**16  # elements of a tensor that has more of them than its storage

# File systems whose files another machine or program may shorten at any moment: touching a mapped page that is gone
# kills the process (SIGBUS), and no handler in Python can stop that.
_SHARED = re.compile(
    r"nfs\d?|cifs|smb\d?|smbfs|9p|virtiofs|afs|ceph|lustre|gpfs|beegfs|glusterfs|orangefs|pvfs2|gfs2?|ocfs2|davfs|ncpfs"
    r"|vboxsf|vmhgfs|prl_fs|fuse(\..*)?"
)


@dataclass(frozen=True)
class Stamp:
    """What tells that a file was changed in place: a mapped file must not be."""

    path: Path
    place: tuple[int, int]  # device and inode: a new file under the old name does not disturb those who map the old
    size: int
    changed: int  # in nanoseconds


def stamp(path: Path) -> Stamp:
    """The file's `Stamp` of now. Raises OSError."""
    found = path.stat()
    return Stamp(path, (found.st_dev, found.st_ino), found.st_size, found.st_mtime_ns)


_mapped: dict[Path, Stamp] = {}  # the files that were mapped, as they were then


def note_mapped(path: Path) -> None:
    """Remember a file whose bytes are mapped, for `shrunk`. Raises OSError."""
    _mapped[path] = stamp(path)


def shrunk() -> list[Path]:
    """Those files that were cut short in place since they were mapped."""
    found = []
    for path, before in list(_mapped.items()):
        with contextlib.suppress(OSError):
            now = stamp(path)
            if now.place == before.place and now.size < before.size:
                found.append(path)
    return found


def may_map(path: Path, mounts: str | None = None) -> bool:
    """Whether mapping this file is safe: not on a network's file system, or one of another program (FUSE).

    mounts: the text of /proc/self/mountinfo; where there is none, every file counts as a local one.
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
    """Ranges of an open file as storages: private pages of a map, or bytes that are read."""

    def __init__(self, file: BinaryIO, *, mapped: bool) -> None:
        self._file = file
        self.size = os.fstat(file.fileno()).st_size
        self._map = mmap.mmap(file.fileno(), self.size, access=mmap.ACCESS_COPY) if mapped and self.size else None

    @property
    def mapped(self) -> bool:
        """Whether storages are pages of the file, which must then stay as it is."""
        return self._map is not None

    def storage(self, start: int, length: int) -> UntypedStorage:
        """The bytes from `start` on. ValueError if the file does not have them."""
        if start < 0 or length < 0 or start + length > self.size:
            raise ValueError(f"bytes {start} to {start + length} are asked for, of {self.size}")
        if length == 0:
            return UntypedStorage(0)  # type: ignore[no-untyped-call]  # torch's own
        if self._map is not None and start % ALIGNMENT == 0:
            return torch.frombuffer(self._map, dtype=torch.uint8, count=length, offset=start).untyped_storage()
        content = bytearray(length)
        self._file.seek(start)
        if self._file.readinto(content) != length:  # type: ignore[attr-defined]  # what `open` gives has it
            raise ValueError(f"it ends before byte {start + length}")
        return storage_of(content)

    def head(self, start: int, length: int) -> bytes:
        """Bytes from `start` on, as many as there are up to `length`."""
        self._file.seek(start)
        return self._file.read(length)


def storage_of(content: bytearray) -> UntypedStorage:
    """The memory of `content` as a storage."""
    if not content:
        return UntypedStorage(0)  # type: ignore[no-untyped-call]  # torch's own
    return torch.frombuffer(content, dtype=torch.uint8).untyped_storage()


def tensor_of(stored: StoredTensor, storage: UntypedStorage) -> Tensor:
    """The tensor that a file describes, on its storage. ValueError if it would reach beyond that, or far exceed it."""
    dtype = getattr(torch, stored.dtype)
    count, room = math.prod(stored.size), storage.nbytes() // dtype.itemsize
    last = stored.offset + sum((size - 1) * step for size, step in zip(stored.size, stored.stride))
    if count and last >= room:
        raise ValueError(f"it has {room} elements, and shows number {last}")
    if count > max(room, MAX_EXPANDED):
        raise ValueError(f"it has {room} elements, and shows {count}")
    if math.prod(filter(None, stored.size)) >= MAX_PRODUCT:
        raise ValueError(f"it has the shape {stored.size}, which no tensor can have")
    try:
        return torch.empty(0, dtype=dtype).set_(storage, stored.offset if count else 0, stored.size, stored.stride)
    except RuntimeError as error:
        raise ValueError(f"it has the shape {stored.size}, which torch does not take") from error
