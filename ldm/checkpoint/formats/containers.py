"""The two containers of `torch.save`: zip archives, and the layout before torch 1.6."""

from __future__ import annotations

import struct
import sys
import zipfile
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO

from torch import UntypedStorage

from ldm.checkpoint.formats import BadFile, BadPickle
from ldm.checkpoint.formats.storages import Ranges, storage_of
from ldm.checkpoint.formats.unpickler import RestrictedUnpickler, StorageRef, read_pickle

# Limits that no checkpoint comes near, and that keep hostile files from filling the memory.
MAX_PICKLE = 64 * 2**20  # bytes
MAX_DIRECTORY = 16 * 2**20  # bytes of a zip directory: 100,000 tensors and more
MAX_UNPACKED = 20  # times the file's size; weights hardly compress
SLACK = 64 * 2**20  # bytes that may be unpacked in any case

MAGIC = 0x1950A86A20F9469CFC6C  # begins a file of torch < 1.6
_CHUNK = 2**22
# What zipfile raises for damaged files.
_FAULTS = (
    *(zipfile.BadZipFile, zlib.error, struct.error, EOFError),
    *(ValueError, ArithmeticError, LookupError, RuntimeError),
)
_OTHER_ORDER = "it was written on a machine of the other byte order: save it again as .safetensors"

Fetch = Callable[[StorageRef], UntypedStorage]  # reads a storage


# --- zip archives ---------------------------------------------------------------------------------


def open_zip(file: BinaryIO) -> zipfile.ZipFile:
    """Open a zip archive with a directory of limited size and unique, harmless names. Raises BadFile."""
    try:
        if _directory_size(file) > MAX_DIRECTORY:
            raise BadFile("its zip directory has more entries than any checkpoint", damaged=False)
        archive = zipfile.ZipFile(file)
    except BadFile:
        raise
    except (*_FAULTS, OSError) as error:  # seeking to an impossible place is an OSError
        raise BadFile("its zip directory cannot be read") from error
    unpacked = sum(entry.file_size for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED)
    if unpacked > MAX_UNPACKED * (size := file.seek(0, 2)) + SLACK:
        raise BadFile(f"it is a zip bomb: {size} bytes that would become {unpacked}", damaged=False)
    names: set[str] = set()
    for entry in archive.infolist():
        name = entry.orig_filename
        if name in names:
            raise BadFile(f"its zip directory names {ascii(name)[:80]} twice", damaged=False)
        if name.startswith("/") or "\\" in name or ".." in name.split("/") or not name.isprintable():
            raise BadFile(f"its zip directory names {ascii(name)[:80]}, outside of the archive", damaged=False)
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or entry.flag_bits & 0x21:
            raise BadFile(f"its entry {name[:80]} is encrypted, or compressed in a rare way", damaged=False)
        names.add(name)
    if not any(entry.CRC for entry in archive.infolist()):  # torch can leave the checksums out
        for entry in archive.infolist():
            del entry.CRC  # so that zipfile does not compare them
    return archive


def has_checksums(archive: zipfile.ZipFile) -> bool:
    """Return whether an archive of `open_zip` has checksums."""
    return any(hasattr(entry, "CRC") for entry in archive.infolist())


def damaged_entry(archive: zipfile.ZipFile) -> str | None:
    """Return the name of the first entry whose bytes differ from its checksum (CRC-32), or None."""
    for entry in archive.infolist():
        try:
            with archive.open(entry) as file:
                while file.read(_CHUNK):
                    pass
        except _FAULTS:
            return entry.filename
    return None


def read_zip(
    archive: zipfile.ZipFile, ranges: Ranges, make_unpickler: Callable[[Fetch], RestrictedUnpickler] | None = None
) -> tuple[Any, Fetch]:
    """Read the pickle of a checkpoint's archive.

    Args:
        archive: from `open_zip`.
        ranges: the file, where entries that are not compressed are taken from.
        make_unpickler: makes an unpickler that may fetch storages while it reads.

    Returns:
        What is pickled, and the function that reads a storage.

    Raises:
        BadFile, BadPickle, UnsafePickle: the file is unusable.
    """
    entries = {entry.filename: entry for entry in archive.infolist()}
    pickles = [name for name in entries if name.rpartition("/")[2] == "data.pkl"]
    if any(name.rpartition("/")[2] == "constants.pkl" for name in entries):
        raise BadFile("it is a TorchScript program, not a checkpoint: a state dict is needed", damaged=False)
    if not pickles:
        raise BadFile("it is a zip archive of something else: unpack it and name the checkpoint inside", damaged=False)
    if len(pickles) > 1:
        raise BadFile("it is a zip archive of several checkpoints: unpack it and name one", damaged=False)
    if entries[pickles[0]].file_size > MAX_PICKLE:
        raise BadFile("it holds more beside tensors than any checkpoint", damaged=False)
    starts = _starts(archive, ranges)
    root = pickles[0].removesuffix("data.pkl")
    order = entries.get(root + "byteorder")
    if order and order.file_size < 16 and _unpack(archive, order).decode("ascii", "replace").strip() != sys.byteorder:
        raise BadFile(_OTHER_ORDER, damaged=False)

    def fetch(ref: StorageRef) -> UntypedStorage:
        entry = entries.get(f"{root}data/{ref.key}")
        if entry is None or entry.file_size != ref.nbytes:
            raise BadFile(f"there are {entry.file_size if entry else 'no'} bytes where {ref.nbytes} should be")
        if entry.compress_type == zipfile.ZIP_STORED:
            return ranges.storage(starts[entry.filename], entry.file_size)
        return storage_of(_unpack(archive, entry))

    content = bytes(_unpack(archive, entries[pickles[0]]))
    return read_pickle(content, unpickler=make_unpickler(fetch) if make_unpickler else None), fetch


def _directory_size(file: BinaryIO) -> int:
    """Return the size of the zip directory as the file's end states it: what zipfile will allocate."""
    size = file.seek(0, 2)
    file.seek(max(size - 2**16 - 100, 0))
    tail = file.read()
    # without a comment, which may contain the signature too
    plain = tail[-22:].startswith(b"PK\x05\x06") and tail.endswith(b"\0\0")
    end = len(tail) - 22 if plain else tail.rfind(b"PK\x05\x06")
    if end < 0:
        raise BadFile("its zip directory cannot be read")
    if end >= 76 and tail[end - 20 : end - 16] == b"PK\x06\x07":  # zip64, for files beyond 4 GB
        return int.from_bytes(tail[end - 36 : end - 28], "little")
    return int.from_bytes(tail[end + 12 : end + 16], "little")


def _starts(archive: zipfile.ZipFile, ranges: Ranges) -> dict[str, int]:
    """Return where the bytes of each entry begin. BadFile if they lie outside of the file or overlap."""
    starts, last = {}, 0
    for entry in sorted(archive.infolist(), key=lambda entry: entry.header_offset):
        if 0 <= entry.header_offset < last:
            raise BadFile(f"its zip entry {entry.filename[:80]} overlaps another", damaged=False)
        header = ranges.head(entry.header_offset, 30) if entry.header_offset >= 0 else b""
        name_length, extra_length = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
        start = entry.header_offset + 30 + name_length + extra_length
        last = start + entry.compress_size
        resized = entry.compress_type == zipfile.ZIP_STORED and entry.compress_size != entry.file_size
        if not header.startswith(b"PK\x03\x04") or last > ranges.size or resized:
            raise BadFile(f"its zip entry {entry.filename[:80]} is not where the directory says")
        starts[entry.filename] = start
    return starts


def _unpack(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytearray:
    """Read an entry and compare its checksum; it cannot be longer than the directory states."""
    content = bytearray()
    try:
        with archive.open(entry) as file:
            while chunk := file.read(_CHUNK):
                content += chunk
    except _FAULTS as error:
        raise BadFile(f"its zip entry {entry.filename[:80]} cannot be unpacked") from error
    if len(content) != entry.file_size:
        raise BadFile(f"its zip entry {entry.filename[:80]} is {len(content)} bytes instead of {entry.file_size}")
    return content


# --- the layout before torch 1.6 ------------------------------------------------------------------


def read_legacy(file: BinaryIO, ranges: Ranges) -> tuple[Any, Fetch]:
    """Read a file of pickles, one after the other, followed by the storages. As `read_zip`."""
    file.seek(0)
    stream = _LimitedStream(file)
    if read_pickle(stream) != MAGIC:
        raise BadPickle("it was not written by torch.save")
    read_pickle(stream)  # the version of the layout
    system = read_pickle(stream)
    if isinstance(system, dict) and system.get("little_endian", True) is not (sys.byteorder == "little"):
        raise BadFile(_OTHER_ORDER, damaged=False)
    storages: dict[str, StorageRef] = {}
    data, keys = read_pickle(stream, storages), read_pickle(stream)
    if not isinstance(keys, list) or not all(isinstance(key, str) and key in storages for key in keys):
        raise BadPickle("it has no list of its storages")
    starts, position = {}, file.tell()
    for key in keys:
        file.seek(position)
        count = int.from_bytes(file.read(8), "little")
        if count != storages[key].count:
            raise BadFile(f"there are {count} elements where {storages[key].count} should be")
        starts[key] = position + 8
        position += 8 + storages[key].nbytes

    def fetch(ref: StorageRef) -> UntypedStorage:
        if ref.key not in starts:
            raise BadFile("a tensor has no storage")
        return ranges.storage(starts[ref.key], ref.nbytes)

    return data, fetch


class _LimitedStream:
    """A stream of at most `MAX_PICKLE` bytes: lengths inside a pickle may claim anything."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._left = file, MAX_PICKLE

    def read(self, count: int) -> bytes:
        """Read `count` bytes. Raises BadPickle if that exceeds the limit."""
        return self._counted(self._file.read(count) if count <= self._left else None)

    def readline(self) -> bytes:
        """Read a line. Raises BadPickle if that exceeds the limit."""
        return self._counted(self._file.readline(self._left))

    def _counted(self, content: bytes | None) -> bytes:
        self._left -= len(content or b"")
        if content is None or self._left <= 0:
            raise BadPickle("it ends too early, or holds more beside tensors than any checkpoint")
        return content
