"""Damage that loads without a word: checksums, and values that are no numbers."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

logger = logging.getLogger(__name__)

ALWAYS = 64 * 2**20  # bytes: a file of this size or less is compared with its recorded checksum whenever it is read
SHA256 = "sha256"  # in the metadata of safetensors that we write: of all bytes after the header


def sum_file(path: Path) -> Path:
    """Where the checksum of a file is recorded, as `sha256sum FILE > FILE.sha256` does it."""
    return path.with_name(path.name + ".sha256")


def recorded_sum(path: Path) -> str | None:
    """The sha256 that is recorded beside a file, None if there is no such record.

    Raises ValueError if there is a record that says nothing of the file.
    """
    record = sum_file(path)
    try:
        text = record.read_bytes()[: 2**20].decode("utf-8", "replace")
    except FileNotFoundError:
        return None
    found = re.findall(r"^\\?([0-9a-fA-F]{64})(?: [ *](.*))?$", text, re.MULTILINE)
    named = [digest for digest, name in found if name.rpartition("/")[2].strip() == path.name]
    if len(named) != 1 and len(found) != 1:
        raise ValueError(f"{record} holds no sha256 of {path.name}: write it again with sha256sum, or delete it")
    return str((named or [found[0][0]])[0]).lower()


def compare_with_record(path: Path) -> bool:
    """Whether there is a checksum beside the file; ValueError if the file has another one."""
    recorded = recorded_sum(path)
    if recorded is None:
        return False
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != recorded:
        raise ValueError(
            f"{path} is not the file whose checksum {sum_file(path).name} records (sha256 {found[:12]}..., recorded is "
            f"{recorded[:12]}...): download or copy it again, or delete the record if the file was changed on purpose"
        )
    return True


def data_sum(file: BinaryIO) -> str:
    """sha256 of all that follows the header of a safetensors file, in hexadecimal."""
    file.seek(0)
    file.seek(8 + int.from_bytes(file.read(8), "little"))
    return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]  # typeshed asks for more than a BinaryIO


def note_data_sum(path: Path) -> None:
    """Put the true sum into the metadata of a safetensors file that was written with `PLACEHOLDER` there."""
    with path.open("rb+") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length)
        place = header.index(json.dumps(PLACEHOLDER).encode())
        found = data_sum(file)
        file.seek(8 + place + 1)
        file.write(found.encode())


PLACEHOLDER = "0" * 64


def not_a_number(state: Mapping[str, Tensor]) -> str | None:
    """The first weight with values that are no numbers (NaN), or infinite; None if there is none.

    Only weights and biases count as infinite: masks of attention and tables of noise schedules are so on purpose.
    """
    for key, value in state.items():
        if not (value.is_floating_point() or value.is_complex()):
            continue
        value = value.float() if value.dtype.itemsize == 1 else value
        strict = key.endswith(("weight", "bias"))
        if not bool(value.isfinite().all() if strict else not value.isnan().any()):
            return key
    return None
