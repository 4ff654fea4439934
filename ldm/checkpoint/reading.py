"""Read checkpoints: tensors under their published names, or a message that says why not."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, UntypedStorage

from ldm.checkpoint.checksums import ALWAYS, SHA256, compare_with_record, data_checksum, find_not_finite
from ldm.checkpoint.formats import BadFile, BadPickle, UnsafePickle, printable
from ldm.checkpoint.formats.containers import Fetch, damaged_entry, has_checksums, open_zip, read_legacy, read_zip
from ldm.checkpoint.formats.safetensors import MAX_HEADER, MAX_TENSORS, read_safetensors
from ldm.checkpoint.formats.storages import Ranges, Stamp, may_map, note_mapped, stamp, tensor_of
from ldm.checkpoint.formats.unpickler import Name, OtherTensor, TensorRef

logger = logging.getLogger(__name__)

# Where a pickled dictionary may have its state dict; they nest ("module" inside "state_dict").
STATE_KEYS = ("state_dict", "model_state_dict", "model", "module")
MAX_NAME = 1000  # characters

# Text towers saved without their outermost module: by early fine-tuning tools and by transformers >= 5.6.
_BARE_TEXT_TOWER = re.compile(r"^(cond_stage_model\.transformer\.)(embeddings|encoder|final_layer_norm)\.")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message is one sentence for the person who named the file."""


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a file under their published names, with its counters.

    Tensors may be memory-mapped: then `mapped` is set, and the file must not be changed in place while they live.
    """

    path: Path
    state: dict[str, Tensor]
    global_step: int | None = None
    epoch: int | None = None
    mapped: Stamp | None = None
    shapes: dict[str, tuple[int, ...]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shapes", {key: tuple(value.shape) for key, value in self.state.items()})


def read_checkpoint(path: str | os.PathLike[str], *, verify: bool = False) -> Checkpoint:
    """Read a `.ckpt` (`.pt`, `.pth`, `.bin`) or `.safetensors` file; its content decides which it is.

    Nothing in a file is executed (see `formats.unpickler`). Uncompressed zip archives and safetensors are
    memory-mapped, except on network file systems (see `formats.storages.may_map`).

    Args:
        path: the file.
        verify: read the whole file first, compare it with every checksum there is (of zip entries, in safetensors
            files written here, beside it in `FILE.sha256`), and look for NaN. Otherwise only files up to 64 MiB are
            compared, with `FILE.sha256`.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it holds no usable weights or is damaged.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(
            f"there is no checkpoint at {path}: put the file there, or give the path of yours (most scripts: --ckpt)"
        )
    if not path.is_file():
        what = "a folder" if path.is_dir() else "not a file"
        raise CheckpointError(f"{path} is {what}: a checkpoint is one file, such as model.ckpt or model.safetensors")
    kind = kind_of_file(path)
    before, mapped = stamp(path), kind != "pickle" and may_map(path)
    if mapped:
        note_mapped(path)
    _check_checksums(path, kind, verify)
    extra: Mapping[str, Any]
    with _explain(path):
        if kind == "safetensors":
            state, extra = read_safetensors(path, mapped=mapped)
            _check_count(path, len(state))
        else:
            state, extra = _read_pickled(path, kind, mapped)
    for name in state:  # names appear in messages
        if not name.isprintable() or len(name) > MAX_NAME:
            raise CheckpointError(f"{path} is refused: its tensors have unprintable or very long names: {shown(name)}")
    state = published_names(state, path)
    if verify and (key := find_not_finite(state)) is not None:
        raise CheckpointError(f"{path} has values that are not finite, in {key}: it cannot make images")
    if stamp(path) != before:
        raise CheckpointError(f"{path} changed while it was read: wait until it is complete")
    return Checkpoint(path, state, _counter(extra, "global_step"), _counter(extra, "epoch"), before if mapped else None)


def published_names(state: Mapping[str, Tensor], path: str | os.PathLike[str] = "the file") -> dict[str, Tensor]:
    """Rename a state dict's keys as in the original v1 files.

    Adds a missing `text_model.` in text towers and removes a `module.` before every key. Drops `position_ids`: they
    are 0 ... 76, some merged files have them rounded to other numbers, and the model has its own.

    Raises:
        CheckpointError: two different tensors of the file `path` get the same name.
    """
    wrapped = all(key.startswith("module.") for key in state)
    named: dict[str, Tensor] = {}
    for key, value in state.items():
        name = key.removeprefix("module.") if wrapped else key
        name = _BARE_TEXT_TOWER.sub(r"\1text_model.\2.", name)
        if name.endswith("embeddings.position_ids"):
            continue
        other = named.setdefault(name, value)
        same = other is value or (other.shape == value.shape and other.dtype == value.dtype)
        if not same or not (other is value or torch.equal(other, value)):
            raise CheckpointError(f"{path} is ambiguous: it holds {name} twice, once under an older name")
    return named


def _counter(extra: Mapping[str, Any], key: str) -> int | None:
    value = extra.get(key)
    if isinstance(value, str) and value.isdecimal() and len(value) < 18:  # safetensors metadata is text
        return int(value)
    return value if type(value) is int else None


# --- kinds of files -------------------------------------------------------------------------------


def kind_of_file(path: Path) -> str:
    """Return "zip", "pickle" or "safetensors" by the first bytes of a file. Raises CheckpointError for all others."""
    size = path.stat().st_size
    if size == 0:
        raise CheckpointError(f"{path} is empty (0 bytes): download or copy it again")
    with path.open("rb") as file:
        head = file.read(512)
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if head.startswith(b"\x80") and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "pickle"
    if head[8:9] == b"{" and (length := int.from_bytes(head[:8], "little")) <= MAX_HEADER:
        if length + 8 > size:
            raise truncated(path, f"its header alone takes {length + 8} bytes")
        return "safetensors"
    raise CheckpointError(f"{path} is {_describe_other(head, size)}")


def _describe_other(head: bytes, size: int) -> str:
    """Return what a file that is not a checkpoint is, and what to do."""
    text = head.decode("utf-8", errors="ignore").strip()
    readable = bool(text) and all(c.isprintable() or c.isspace() for c in text)
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the checkpoint: run `git lfs pull` in its folder, or download the file itself"
    if head.lstrip()[:1] == b"<" and readable:
        return "a web page, not a checkpoint (the download may need a login first): download the file itself"
    if not head.strip(b"\0"):
        return "filled with zeros, as an interrupted download leaves it: download or copy it again"
    if head.startswith(b"GGUF"):
        return "a GGUF file of another program: a .ckpt or .safetensors is needed"
    if readable and text[0] in "{[" and size > 9:
        return "a JSON text, not a checkpoint: name the .ckpt or .safetensors that belongs to it"
    if readable and size > 9:
        return f"a text file, not a checkpoint; it begins with {text[:40]!r}"
    return f"neither a .ckpt nor a .safetensors file, or truncated ({size} bytes): download or copy it again"


def truncated(path: Path, reason: str) -> CheckpointError:
    """Return the error for a file of which another copy may be complete."""
    size = path.stat().st_size
    return CheckpointError(f"{path} is truncated or damaged ({size} bytes; {reason}): download or copy it again")


def unusable(path: Path, error: BadFile) -> CheckpointError:
    """Return the error for a file that its container makes unusable."""
    return truncated(path, str(error)) if error.damaged else CheckpointError(f"{path} is refused: {error}")


@contextlib.contextmanager
def _explain(path: Path) -> Iterator[None]:
    """Turn the errors of `formats` into a CheckpointError that says what to do."""
    try:
        yield
    except UnsafePickle as error:
        names = ", ".join(error.names[:10]) + (f" and {len(error.names) - 10} more" if error.names[10:] else "")
        raise CheckpointError(
            f"{path} is refused: unsafe pickle: it references names outside the allowlist ({names}): "
            "save it again as .safetensors, or as a plain state dict, with the program that made it"
        ) from error
    except BadPickle as error:
        raise CheckpointError(
            f"{path} is damaged, or pickled in a way that cannot be read safely ({error}): "
            "download it again, or save it as .safetensors with the program that made it"
        ) from error
    except BadFile as error:
        raise unusable(path, error) from error


def _check_checksums(path: Path, kind: str, verify: bool) -> None:
    """Compare a file with its checksums, all of them if `verify`. Raises CheckpointError if they differ."""
    recorded = False
    try:
        if verify or path.stat().st_size <= ALWAYS:
            recorded = compare_with_record(path)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    if not verify:
        return
    with path.open("rb") as file, _explain(path):
        if kind == "zip":
            with open_zip(file) as archive:
                if (name := damaged_entry(archive)) is not None:
                    raise BadFile(f"the checksum of its part {shown(name)} differs")
                recorded = recorded or has_checksums(archive)
        elif kind == "safetensors" and (checksum := read_safetensors(path, mapped=True)[1].get(SHA256)):
            if checksum != data_checksum(file):
                raise BadFile("the checksum of its tensors differs")
            recorded = True
    if not recorded:
        logger.warning("%s has no checksum to compare with; `sha256sum` can record one in %s.sha256", path, path.name)


# --- state dicts in pickles -----------------------------------------------------------------------


def _read_pickled(path: Path, kind: str, mapped: bool) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """Return the state dict of a pickled file and the dictionary around it."""
    with path.open("rb") as file:
        ranges = Ranges(file, mapped=mapped)
        if kind == "pickle":
            return _find_state(path, *read_legacy(file, ranges))
        with open_zip(file) as archive:
            return _find_state(path, *read_zip(archive, ranges))


def _find_state(path: Path, data: Any, fetch: Fetch) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    if not isinstance(data, dict):
        kind = "Tensor" if isinstance(data, (TensorRef, OtherTensor)) else type(data).__name__.strip("_")
        raise CheckpointError(f"{path} holds a {kind}, not a dictionary of weights")
    state = data
    for _ in range(len(STATE_KEYS)):
        inner = next((state[key] for key in STATE_KEYS if isinstance(state.get(key), dict)), None)
        if inner is None:
            break
        state = inner
    refs = {k: v for k, v in state.items() if isinstance(k, str) and isinstance(v, (TensorRef, OtherTensor))}
    if not refs:
        raise CheckpointError(f"{path} {_describe_without_weights(data)}")
    _check_count(path, len(refs))
    storages: dict[str, UntypedStorage] = {}
    tensors = {}
    for key, ref in refs.items():
        if isinstance(ref, OtherTensor):
            raise CheckpointError(
                f"{path} cannot be used: its tensor {shown(key)} is {ref.kind}, and plain tensors are needed"
            )
        try:
            if ref.storage.key not in storages:
                storages[ref.storage.key] = fetch(ref.storage)
            tensors[key] = tensor_of(ref, storages[ref.storage.key])
        except ValueError as error:
            raise truncated(path, f"its tensor {shown(key)}: {error}") from error
    return tensors, data


def _describe_without_weights(data: Mapping[Any, Any]) -> str:
    if "string_to_param" in data:
        return "is a textual inversion embedding, an addition to a model: name the model's own checkpoint"
    if data and all(isinstance(key, int) for key in data):
        return "is a hypernetwork, an addition to a model: name the model's own checkpoint"
    entries = ", ".join(shown(key) for key in list(data)[:5]) or "none"
    return f"holds no weights (its entries: {entries})"


def _check_count(path: Path, count: int) -> None:
    if count == 0:
        raise CheckpointError(f"{path} holds no weights")
    if count > MAX_TENSORS:
        raise CheckpointError(f"{path} holds {count} tensors, more than any model has: it is not a checkpoint")


def shown(key: Any) -> str:
    """Return a key of a file as a message may show it."""
    return printable(key if isinstance(key, str) else key.path if isinstance(key, Name) else repr(key)[:100])
