"""The two layouts of `torch.save`: what is pickled in a file, and where the bytes of its tensors lie."""

from __future__ import annotations

import struct
import sys
import zipfile
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO

from torch import UntypedStorage

from ldm.checkpoint.formats.pickles import BadPickle, Machine, Stored, read_pickle
from ldm.checkpoint.formats.storages import Ranges, storage_of

# Numbers that no checkpoint comes near, and that keep hostile files from filling the memory.
MAX_PICKLE = 64 * 2**20  # bytes
MAX_DIRECTORY = 16 * 2**20  # bytes of a zip's directory: 100,000 tensors and more
MAX_UNPACKED = 20  # times the file's size; weights hardly shrink at all when a zip program packs them
SLACK = 64 * 2**20  # bytes that count for nothing

MAGIC = 0x1950A86A20F9469CFC6C  # begins a file of torch < 1.6
_CHUNK = 2**22
# What Python's zipfile raises for files that are damaged.
_FAULTS = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    ValueError,
    ArithmeticError,
    LookupError,
    RuntimeError,
)

OTHER_ORDER = "it was written on a machine of the other byte order: save it again as .safetensors"

Fetch = Callable[[Stored], UntypedStorage]


class BadFile(ValueError):
    """A file that cannot be used; the message says why, and whether another copy could help is `damaged`."""

    def __init__(self, message: str, *, damaged: bool = True) -> None:
        super().__init__(message)
        self.damaged = damaged


# --- zip files ------------------------------------------------------------------------------------


def open_zip(file: BinaryIO) -> zipfile.ZipFile:
    """A zip file whose directory is of a bearable size and names every entry once. Raises BadFile."""
    try:
        if _directory_size(file) > MAX_DIRECTORY:
            raise BadFile("its zip directory has more entries than any checkpoint", damaged=False)
        archive = zipfile.ZipFile(file)
    except BadFile:
        raise
    except (*_FAULTS, OSError) as error:  # seeking to a place that is none is an OSError
        raise BadFile("its zip directory cannot be read") from error
    unpacked = sum(entry.file_size for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED)
    if unpacked > MAX_UNPACKED * (size := file.seek(0, 2)) + SLACK:
        raise BadFile(f"it is a zip bomb: {size} bytes that would become {unpacked}", damaged=False)
    seen: set[str] = set()
    for entry in archive.infolist():
        name = entry.orig_filename
        if name in seen:
            raise BadFile(f"its zip directory names {ascii(name)[:80]} twice", damaged=False)
        if name.startswith("/") or "\\" in name or ".." in name.split("/") or not name.isprintable():
            raise BadFile(f"its zip directory names {ascii(name)[:80]}, a place of its own choice", damaged=False)
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or entry.flag_bits & 0x21:
            raise BadFile(f"its entry {name[:80]} is encrypted, or packed in a rare way", damaged=False)
        seen.add(name)
    if not any(entry.CRC for entry in archive.infolist()):  # torch can be told to leave the checksums out
        for entry in archive.infolist():
            del entry.CRC  # which makes zipfile compare with none
    return archive


def has_sums(archive: zipfile.ZipFile) -> bool:
    """Whether an archive of `open_zip` notes checksums."""
    return any(hasattr(entry, "CRC") for entry in archive.infolist())


def _directory_size(file: BinaryIO) -> int:
    """Bytes of a zip's directory, as its end says: what a reader of the directory will ask memory for."""
    size = file.seek(0, 2)
    file.seek(max(size - 2**16 - 100, 0))
    tail = file.read()
    plain = tail[-22:].startswith(b"PK\x05\x06") and tail.endswith(
        b"\0\0"
    )  # without a comment, which may hold one, too
    end = len(tail) - 22 if plain else tail.rfind(b"PK\x05\x06")
    if end < 0:
        raise BadFile("its zip directory cannot be read")
    if end >= 76 and tail[end - 20 : end - 16] == b"PK\x06\x07":  # the numbers of a file of more than 4 GB
        return int.from_bytes(tail[end - 36 : end - 28], "little")
    return int.from_bytes(tail[end + 12 : end + 16], "little")


def read_zip(
    archive: zipfile.ZipFile, ranges: Ranges, machine: Callable[[Fetch], Machine] | None = None
) -> tuple[Any, Fetch]:
    """What a checkpoint's zip file has pickled, and a way to the storages. Raises BadFile, and what `read_pickle` does.

    Entries that are not compressed are taken from `ranges` where they lie, the others are unpacked. machine: gets the
    way to the storages, and gives what reads the pickle.
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
    if order and order.file_size < 16 and _unpacked(archive, order).decode("ascii", "replace").strip() != sys.byteorder:
        raise BadFile(OTHER_ORDER, damaged=False)

    def fetch(stored: Stored) -> UntypedStorage:
        """The entry of its key, which must be as long as it says; unpacked, should somebody have packed it."""
        entry = entries.get(f"{root}data/{stored.key}")
        if entry is None or entry.file_size != stored.nbytes:
            raise BadFile(f"there are {entry.file_size if entry else 'no'} bytes where {stored.nbytes} should be")
        if entry.compress_type == zipfile.ZIP_STORED:
            return ranges.storage(starts[entry.filename], entry.file_size)
        return storage_of(_unpacked(archive, entry))

    content = bytes(_unpacked(archive, entries[pickles[0]]))
    return read_pickle(content, machine=machine(fetch) if machine else None), fetch


def _starts(archive: zipfile.ZipFile, ranges: Ranges) -> dict[str, int]:
    """Where the bytes of each entry begin; BadFile if they are not in the file, or belong to two entries."""
    starts, last = {}, 0
    for entry in sorted(archive.infolist(), key=lambda entry: entry.header_offset):
        if 0 <= entry.header_offset < last:
            raise BadFile(f"its zip entry {entry.filename[:80]} overlaps another", damaged=False)
        header = ranges.head(entry.header_offset, 30) if entry.header_offset >= 0 else b""
        start = entry.header_offset + 30 + int.from_bytes(header[26:28], "little")
        start += int.from_bytes(header[28:30], "little")
        last = start + entry.compress_size
        stored = entry.compress_type == zipfile.ZIP_STORED
        if (
            not header.startswith(b"PK\x03\x04")
            or last > ranges.size
            or (stored and entry.compress_size != entry.file_size)
        ):
            raise BadFile(f"its zip entry {entry.filename[:80]} is not where the directory says")
        starts[entry.filename] = start
    return starts


def _unpacked(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytearray:
    """All of an entry, its checksum compared; never more than the directory promises."""
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


def damaged_entry(archive: zipfile.ZipFile) -> str | None:
    """The first entry whose bytes do not have the checksum (CRC-32) that the zip file notes; None if all do."""
    for entry in archive.infolist():
        try:
            with archive.open(entry) as file:
                while file.read(_CHUNK):
                    pass
        except _FAULTS:
            return entry.filename
    return None


# --- the layout before torch 1.6 ------------------------------------------------------------------


def read_legacy(file: BinaryIO, ranges: Ranges) -> tuple[Any, Fetch]:
    """The same of a file that is pickles, one after the other, and then the storages. Raises what `read_zip` does."""
    file.seek(0)
    limited = _Limited(file)
    if read_pickle(limited) != MAGIC:
        raise BadPickle("it is not one of torch.save")
    read_pickle(limited)  # the layout's version
    about = read_pickle(limited)
    if isinstance(about, dict) and about.get("little_endian", True) is not (sys.byteorder == "little"):
        raise BadFile(OTHER_ORDER, damaged=False)
    storages: dict[str, Stored] = {}
    data, keys = read_pickle(limited, storages), read_pickle(limited)
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

    def fetch(stored: Stored) -> UntypedStorage:
        """The bytes behind its count, whose place the loop above has found."""
        if stored.key not in starts:
            raise BadFile("a tensor has no storage")
        return ranges.storage(starts[stored.key], stored.nbytes)

    return data, fetch


class _Limited:
    """A stream that gives so many bytes and no more: lengths inside a pickle may say anything."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._left = file, MAX_PICKLE

    def read(self, count: int) -> bytes:
        """`count` bytes; BadPickle if that is too many."""
        return self._counted(self._file.read(count) if count <= self._left else None)

    def readline(self) -> bytes:
        """A line; BadPickle if it is too long."""
        return self._counted(self._file.readline(self._left))

    def _counted(self, content: bytes | None) -> bytes:
        self._left -= len(content or b"")
        if content is None or self._left <= 0:
            raise BadPickle("it ends too early, or holds more beside tensors than any checkpoint")
        return content
