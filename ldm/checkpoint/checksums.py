"""Find damage that loads without an error (checksums, NaN), and identify weights (fingerprints)."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

ALWAYS = 64 * 2**20  # bytes: files up to this size are compared with their recorded checksum whenever they are read
SHA256 = "sha256"  # key in the metadata of safetensors written here: the checksum of all bytes after the header
PLACEHOLDER = "0" * 64


def checksum_file(path: Path) -> Path:
    """Return where the checksum of a file is recorded, as by `sha256sum FILE > FILE.sha256`."""
    return path.with_name(path.name + ".sha256")


def recorded_checksum(path: Path) -> str | None:
    """Return the sha256 recorded beside a file, or None. Raises ValueError if the record is of another file."""
    record = checksum_file(path)
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
    """Compare a file with the checksum beside it; return whether there is one. Raises ValueError if they differ."""
    recorded = recorded_checksum(path)
    if recorded is None:
        return False
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != recorded:
        raise ValueError(
            f"{path} is not the file whose checksum {checksum_file(path).name} records (sha256 {found[:12]}..., "
            f"recorded is {recorded[:12]}...): download or copy it again, or delete the record if the file was changed "
            "on purpose"
        )
    return True


def data_checksum(file: BinaryIO) -> str:
    """Return the sha256 of everything after the header of a safetensors file."""
    file.seek(0)
    file.seek(8 + int.from_bytes(file.read(8), "little"))
    return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def write_data_checksum(path: Path) -> None:
    """Replace `PLACEHOLDER` in the metadata of a safetensors file by the checksum of its data."""
    with path.open("rb+") as file:
        length = int.from_bytes(file.read(8), "little")
        place = file.read(length).index(json.dumps(PLACEHOLDER).encode())
        checksum = data_checksum(file)
        file.seek(8 + place + 1)
        file.write(checksum.encode())


def find_not_finite(state: Mapping[str, Tensor]) -> str | None:
    """Return the first key with NaN values, or with infinite ones in a weight or bias, or None.

    Attention masks and noise schedules are infinite on purpose.
    """
    for key, value in state.items():
        if not (value.is_floating_point() or value.is_complex()):
            continue
        value = value.float() if value.dtype.itemsize == 1 else value
        strict = key.endswith(("weight", "bias"))
        if not bool(value.isfinite().all() if strict else not value.isnan().any()):
            return key
    return None


def fingerprint(module: nn.Module, ignore: Sequence[str] = ()) -> str:
    """Return a sha256 over names, shapes, dtypes and values of a state dict, for caches of what a model computed.

    The device and the order of registration do not matter.

    Args:
        module: the module.
        ignore: prefixes of keys that do not count.

    Raises:
        ValueError: the module is on the meta device and has no values.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if name.startswith(tuple(ignore)):
            continue
        if tensor.is_meta:
            raise ValueError(f"a model without weights has no fingerprint ({name} is on the meta device)")
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
