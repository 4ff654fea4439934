"""Read safetensors files with limits on their headers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ldm.checkpoint.formats import BadFile, printable
from ldm.checkpoint.formats.storages import Ranges

MAX_HEADER = 100_000_000  # bytes, the format's own limit
MAX_TENSORS = 100_000  # of any file: fifty times as many as a model here, with optimizer and averages


def read_safetensors(path: Path, *, mapped: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors and metadata. The safetensors library checks types, sizes, and that the tensors fill the file.

    Args:
        path: the file.
        mapped: memory-map the tensors instead of reading them.

    Raises:
        BadFile: the file is damaged or its header asks for too much.
    """
    try:
        _check_header_size(path)
        with safe_open(path, framework="pt", device="cpu") as file, path.open("rb") as stream:
            keys = list(file.keys())
            if len(keys) > MAX_TENSORS:
                raise BadFile(f"it holds {len(keys)} tensors, more than any model", damaged=False)
            header, start = _read_header(stream)
            state = {key: file.get_tensor(key) for key in keys}
            if not mapped:  # so far only the header was touched
                ranges = Ranges(stream, mapped=False)
                for key, like in state.items():
                    begin, end = header[key]["data_offsets"]
                    storage = ranges.storage(start + begin, end - begin)
                    state[key] = torch.empty(0, dtype=like.dtype).set_(storage, 0, like.shape)  # type: ignore[call-overload]
            return state, file.metadata() or {}
    except (SafetensorError, KeyError, TypeError) as error:  # escaped names, which two parsers may read differently
        raise BadFile(printable(" ".join(str(error).split()))) from error


def _check_header_size(path: Path) -> None:
    """Refuse a header of so many parts that the library would fill the memory with them.

    Every tensor has a brace of its own, and all numbers but one a comma; texts may have some, too.
    """
    with path.open("rb") as file:
        left = int.from_bytes(file.read(8), "little")
        braces = commas = 0
        while left > 0 and (chunk := file.read(min(left, 2**22))):
            left -= len(chunk)
            braces, commas = braces + chunk.count(b"{"), commas + chunk.count(b",")
            if braces > 2 * MAX_TENSORS or commas > 20 * MAX_TENSORS:
                raise BadFile("its header has more entries than any model", damaged=False)


def _read_header(file: BinaryIO) -> tuple[dict[str, Any], int]:
    """Return the header and where it ends. Refuses duplicate names, of which parsers ignore all but one."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        named = dict(pairs)
        if len(named) != len(pairs):
            raise BadFile("it is ambiguous: its header has the same name twice", damaged=False)
        return named

    length = int.from_bytes(file.read(8), "little")
    return json.loads(file.read(length), object_pairs_hook=unique), 8 + length
