"""From a file to tensors under published names, or to one sentence that says why not."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, UntypedStorage

from ldm.checkpoint.checksums import ALWAYS, SHA256, compare_with_record, data_sum, not_a_number
from ldm.checkpoint.formats.containers import BadFile, Fetch, damaged_entry, has_sums, open_zip, read_legacy, read_zip
from ldm.checkpoint.formats.pickles import BadPickle, Name, OtherTensor, StoredTensor, UnsafePickle
from ldm.checkpoint.formats.storages import Ranges, Stamp, may_map, note_mapped, stamp, tensor_of

logger = logging.getLogger(__name__)

# Where a state dict may lie inside a pickled dictionary; they nest ("module" inside "state_dict").
STATE_KEYS = ("state_dict", "model_state_dict", "model", "module")
MAX_SAFETENSORS_HEADER = 100_000_000  # the format's own limit, bytes
MAX_TENSORS = 100_000  # fifty times as many as any model here has, optimiser and averages included
MAX_NAME = 1000  # letters

# Text towers saved without their outermost module: by early fine-tuning tools and by transformers >= 5.6.
_BARE_TEXT_TOWER = re.compile(r"^(cond_stage_model\.transformer\.)(embeddings|encoder|final_layer_norm)\.")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message is one sentence for the person who named the file."""


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a file under their published names, and what else it says of itself.

    Tensors may be memory-mapped: the file must not be changed in place while they live. `mapped` tells whether it was.
    """

    path: Path
    state: dict[str, Tensor]
    global_step: int | None = None
    epoch: int | None = None
    mapped: Stamp | None = None  # None: the tensors are in memory
    shapes: dict[str, tuple[int, ...]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shapes", {key: tuple(value.shape) for key, value in self.state.items()})


def read_checkpoint(path: str | os.PathLike[str], *, verify: bool = False) -> Checkpoint:
    """Read a `.ckpt` (`.pt`, `.pth`, `.bin`) or `.safetensors` file; its content decides which, not its name.

    Nothing in a file is ever run (see `pickles`). Uncompressed zip files and safetensors are memory-mapped, so that
    reading takes a moment whatever the size; on a network's file system they are read (see `storages.may_map`).

    verify: read all of the file first and compare it with every checksum there is, those of a zip file's entries, one
    in a safetensors file that we wrote, one beside it in `FILE.sha256`; and look for values that are no numbers.
    Without it, only files of up to 64 MiB are compared with `FILE.sha256`.

    Raises FileNotFoundError if there is no such file, CheckpointError if it holds no usable weights or is damaged.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(
            f"there is no checkpoint at {path}: put the file there, or name yours with --ckpt path/to/it.ckpt"
        )
    if not path.is_file():
        what = "a folder" if path.is_dir() else "no file"
        raise CheckpointError(f"{path} is {what}: a checkpoint is one file, such as model.ckpt or model.safetensors")
    kind = kind_of_file(path)
    before, mapped = stamp(path), kind != "pickle" and may_map(path)
    if mapped:
        note_mapped(path)
    _check_sums(path, kind, verify)
    extra: Mapping[str, Any]
    if kind == "safetensors":
        state, extra = _read_safetensors(path, mapped)
    else:
        state, extra = _read_pickled(path, kind, mapped)
    _check_names(path, state)
    state = published_names(state, path)
    if verify and (key := not_a_number(state)) is not None:
        raise CheckpointError(f"{path} holds values that are no finite numbers, in {key}: it draws nothing")
    if stamp(path) != before:
        raise CheckpointError(f"{path} changed while it was read: wait until it is complete")
    return Checkpoint(path, state, _counter(extra, "global_step"), _counter(extra, "epoch"), before if mapped else None)


def published_names(state: Mapping[str, Tensor], path: str | os.PathLike[str] = "the file") -> dict[str, Tensor]:
    """The state dict under the names that the original v1 files use, whoever wrote it.

    A text tower without `text_model.` gets it; a `module.` before every key goes; `position_ids` go, for they hold
    nothing but 0 ... 76, some merged files carry them rounded to other numbers, and the model has its own.

    Raises CheckpointError, which calls the file `path`, if two unlike tensors get the same name.
    """
    wrapped = all(key.startswith("module.") for key in state)
    named: dict[str, Tensor] = {}
    for key, value in state.items():
        name = key.removeprefix("module.") if wrapped else key
        name = _BARE_TEXT_TOWER.sub(r"\1text_model.\2.", name)
        if name.endswith("embeddings.position_ids"):
            continue
        if not _same(named.setdefault(name, value), value):
            raise CheckpointError(f"{path} is ambiguous: it holds {name} twice, under an older name, too")
    return named


def _same(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other))


def _counter(extra: Mapping[str, Any], key: str) -> int | None:
    value = extra.get(key)
    if isinstance(value, str) and value.isdecimal() and len(value) < 18:  # safetensors metadata is text
        return int(value)
    return value if type(value) is int else None


# --- what kind of file ----------------------------------------------------------------------------


def kind_of_file(path: Path) -> str:
    """The layout by the first bytes, "zip", "pickle" or "safetensors"; CheckpointError for everything else."""
    size = path.stat().st_size
    if size == 0:
        raise CheckpointError(f"{path} is empty (0 bytes): download or copy it again")
    with path.open("rb") as file:
        head = file.read(512)
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if head.startswith(b"\x80") and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "pickle"
    if head[8:9] == b"{" and (length := int.from_bytes(head[:8], "little")) <= MAX_SAFETENSORS_HEADER:
        if length + 8 > size:
            raise cut_short(path, f"its header alone takes {length + 8} bytes")
        return "safetensors"
    raise CheckpointError(f"{path} is {_stranger(head, size)}")


def _stranger(head: bytes, size: int) -> str:
    """What a file that is no checkpoint is, and the way out."""
    text = head.decode("utf-8", errors="ignore").strip()
    printable = bool(text) and all(c.isprintable() or c.isspace() for c in text)
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the checkpoint: run `git lfs pull` in its folder, or download the file itself"
    if head.lstrip()[:1] == b"<" and printable:
        return "a web page, not a checkpoint (the download may need a login first): download the file itself"
    if not head.strip(b"\0"):
        return "filled with zeros, as an interrupted download leaves it: download or copy it again"
    if head.startswith(b"GGUF"):
        return "a GGUF file of another program: a .ckpt or .safetensors is needed"
    if printable and text[0] in "{[" and size > 9:
        return "a JSON text, not a checkpoint: name the .ckpt or .safetensors that belongs to it"
    if printable and size > 9:
        return f"a text file, not a checkpoint; it begins with {text[:40]!r}"
    return f"neither a .ckpt nor a .safetensors file, or cut short ({size} bytes): download or copy it again"


def cut_short(path: Path, why: str) -> CheckpointError:
    size = path.stat().st_size
    return CheckpointError(f"{path} is cut short or damaged ({size} bytes; {why}): download or copy it again")


# --- the formats ----------------------------------------------------------------------------------


def _check_sums(path: Path, kind: str, verify: bool) -> None:
    """Compare with the checksum beside a file and, if `verify`, those inside; CheckpointError where they differ."""
    recorded = False
    try:
        if verify or path.stat().st_size <= ALWAYS:
            recorded = compare_with_record(path)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    if not verify:
        return
    with path.open("rb") as file, _in_words(path):
        if kind == "zip":
            with open_zip(file) as archive:
                if (name := damaged_entry(archive)) is not None:
                    raise BadFile(f"the checksum of its part {shown(name)} differs")
                recorded = recorded or has_sums(archive)
        elif kind == "safetensors" and (noted := _read_safetensors(path, True)[1].get(SHA256)):
            if noted != data_sum(file):
                raise BadFile("the checksum of its tensors differs")
            recorded = True
    if not recorded:
        logger.warning("%s has no checksum to compare with; `sha256sum` can record one in %s.sha256", path, path.name)


def _read_safetensors(path: Path, mapped: bool) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """Tensors and metadata. The library checks the header first: types, sizes, and that the tensors fill the file."""
    try:
        _check_header(path)
        with safe_open(path, framework="pt", device="cpu") as file, path.open("rb") as stream:
            keys = list(file.keys())
            _check_number(path, len(keys))
            header, start = _safetensors_header(path, stream)
            state = {key: file.get_tensor(key) for key in keys}
            if not mapped:  # so far nothing was touched but the header
                ranges = Ranges(stream, mapped=False)
                for key, like in state.items():
                    begin, end = header[key]["data_offsets"]
                    storage = ranges.storage(start + begin, end - begin)
                    state[key] = torch.empty(0, dtype=like.dtype).set_(storage, 0, like.shape)  # type: ignore[call-overload]  # torch's stubs lack it
            return state, file.metadata() or {}
    except (SafetensorError, KeyError, TypeError) as error:  # names in escapes that two parsers read differently
        raise cut_short(path, shown(" ".join(str(error).split()))) from error


def _check_header(path: Path) -> None:
    """CheckpointError for a header of so many parts that the library would fill the memory with them.

    Every tensor has a brace of its own, and all numbers but one a comma; texts may have some, too.
    """
    with path.open("rb") as file:
        left = int.from_bytes(file.read(8), "little")
        braces = commas = 0
        while left > 0 and (chunk := file.read(min(left, 2**22))):
            left -= len(chunk)
            braces, commas = braces + chunk.count(b"{"), commas + chunk.count(b",")
            if braces > 2 * MAX_TENSORS or commas > 20 * MAX_TENSORS:
                raise CheckpointError(f"{path} names more in its header than any model has: it is no checkpoint")


def _safetensors_header(path: Path, file: BinaryIO) -> tuple[dict[str, Any], int]:
    """What the header says, and where it ends; CheckpointError if it names something twice, which parsers pass over."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        named = dict(pairs)
        if len(named) != len(pairs):
            raise CheckpointError(f"{path} is ambiguous: its header names something twice")
        return named

    length = int.from_bytes(file.read(8), "little")
    return json.loads(file.read(length), object_pairs_hook=once), 8 + length


def _read_pickled(path: Path, kind: str, mapped: bool) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    with path.open("rb") as file, _in_words(path):
        ranges = Ranges(file, mapped=mapped)
        if kind == "zip":
            with open_zip(file) as archive:
                data, fetch = read_zip(archive, ranges)
                return _find_state(path, data, fetch)
        data, fetch = read_legacy(file, ranges)
        return _find_state(path, data, fetch)


@contextlib.contextmanager
def _in_words(path: Path) -> Iterator[None]:
    """What reading a pickled file raises becomes a CheckpointError with a way out."""
    try:
        yield
    except CheckpointError:
        raise
    except UnsafePickle as error:
        names = ", ".join(error.names[:10]) + (f" and {len(error.names) - 10} more" if error.names[10:] else "")
        raise CheckpointError(
            f"{path} is refused because it asks for more than weights ({names}): "
            "save it again as .safetensors, or as a plain state dict, with the program that made it"
        ) from error
    except BadPickle as error:
        raise CheckpointError(
            f"{path} is damaged, or pickled in a way that cannot be read safely ({error}): "
            "download it again, or save it as .safetensors with the program that made it"
        ) from error
    except BadFile as error:
        if error.damaged:
            raise cut_short(path, str(error)) from error
        raise CheckpointError(f"{path} is refused: {error}") from error


def _find_state(path: Path, data: Any, fetch: Fetch) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """The state dict in what was unpickled, at whatever depth, and the dictionary that surrounds it."""
    if not isinstance(data, dict):
        kind = "Tensor" if isinstance(data, (StoredTensor, OtherTensor)) else type(data).__name__.strip("_")
        raise CheckpointError(f"{path} holds a {kind}, not a dictionary of weights")
    state = data
    for _ in range(len(STATE_KEYS)):
        inner = next((state[key] for key in STATE_KEYS if isinstance(state.get(key), dict)), None)
        if inner is None:
            break
        state = inner
    given = {k: v for k, v in state.items() if isinstance(k, str) and isinstance(v, (StoredTensor, OtherTensor))}
    if not given:
        raise CheckpointError(f"{path} {_without_weights(data)}")
    _check_number(path, len(given))
    storages: dict[str, UntypedStorage] = {}
    tensors = {}
    for key, value in given.items():
        if isinstance(value, OtherTensor):
            raise CheckpointError(
                f"{path} cannot be used: its tensor {shown(key)} is {value.kind}, and plain tensors are needed"
            )
        try:
            if value.storage.key not in storages:
                storages[value.storage.key] = fetch(value.storage)
            tensors[key] = tensor_of(value, storages[value.storage.key])
        except ValueError as error:
            raise cut_short(path, f"its tensor {shown(key)}: {error}") from error
    return tensors, data


def _without_weights(data: Mapping[Any, Any]) -> str:
    if "string_to_param" in data:
        return "is a textual inversion embedding, an addition to a model: name the model's own checkpoint"
    if data and all(isinstance(key, int) for key in data):
        return "is a hypernetwork, an addition to a model: name the model's own checkpoint"
    entries = ", ".join(shown(key) for key in list(data)[:5]) or "none"
    return f"holds no weights (its entries: {entries})"


def _check_number(path: Path, count: int) -> None:
    if count == 0:
        raise CheckpointError(f"{path} holds no weights")
    if count > MAX_TENSORS:
        raise CheckpointError(f"{path} holds {count} tensors, more than any model has: it is no checkpoint")


def _check_names(path: Path, state: Mapping[str, Tensor]) -> None:
    """Names stand in messages, which no file may write into."""
    for key in state:
        if not key.isprintable() or len(key) > MAX_NAME:
            raise CheckpointError(f"{path} is refused: its tensors have names that are no names, such as {shown(key)}")


def shown(key: Any) -> str:
    """A key of a file as a message may show it: on one line, and not too long."""
    text = key if isinstance(key, str) else key.path if isinstance(key, Name) else repr(key)[:100]
    return (text if text.isprintable() else ascii(text))[:100]
