"""What a config may name. A config says which code to call and with what, so one from a stranger is a program."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

# Where the classes of public configs live. Of these packages nothing but their own classes can be named.
OWN = ("ldm", "torch.nn", "torch.optim", "pytorch_lightning.callbacks")
_added: set[str] = set()

_DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*\.?")
_REFERENCE = re.compile(r"\$\{\s*([^{}:$]*)([:$])")  # of ${name:...}, or ${...${, the name


def trust(*prefixes: str) -> None:
    """Let configs name what is defined in these modules or packages (`mypackage`), or references use these resolvers
    (`oc.env`), from now on and in the whole process.

    Raises ValueError for a text that is not a dotted name.
    """
    for prefix in prefixes:
        if not isinstance(prefix, str) or not _DOTTED.fullmatch(prefix):
            raise ValueError(f"{prefix!r} is not the name of a module or package such as mypackage.data")
    _added.update(prefix.removesuffix(".") for prefix in prefixes)


def check_path(target: str, path: str) -> None:
    """ImportError unless `path`, where `target` lives, is in a place that is trusted. Nothing has been imported yet."""
    if not _within(path, (*OWN, *_added)):
        raise ImportError(
            f"the config names {target!r}, and only what is in {', '.join(OWN)} is called without asking: if you trust "
            f"whoever wrote the config, {_allow(path)}"
        )


def check_found(target: str, found: Any) -> None:
    """ImportError unless `found`, what a trusted path leads to, is defined in a trusted place, and is to be called.

    Modules hold what they import too: `ldm.anything.os.system` begins well.
    """
    if not (inspect.isclass(found) or inspect.isroutine(found)):
        raise ImportError(f"target {target!r} is no class: it leads to a {type(found).__name__}")
    home = f"{found.__module__}.{found.__qualname__}"
    if _within(home, _added):
        return
    if not _within(home, OWN):
        raise ImportError(
            f"the config names {target!r}, which is {home} and only imported there: if you trust whoever wrote the "
            f"config, {_allow(home)}"
        )
    if not inspect.isclass(found):
        raise ImportError(f"target {target!r} is no class: of {', '.join(OWN)} configs can name classes only")


def check_references(config: Any, place: Any) -> None:
    """ValueError if a config, plain values with `${...}` in them, refers to anything but its own values.

    OmegaConf's resolvers reach further: `${oc.env:NAME}` copies the environment to where configs go, such as run
    folders, messages and pictures. place: the file, for the message.
    """
    for text in _texts(config):
        for match in _REFERENCE.finditer(text):
            name, computed = match[1].strip(), match[2] == "$"
            if computed and ":" in text[match.end() :]:
                raise ValueError(f"config {place}: {text!r} computes what it refers to: write it out")
            if not computed and not _within(name, _added):
                raise ValueError(
                    f"config {place}: {text!r} asks {name!r} for a value, which reaches beyond the config: write the "
                    f"value down or, if you trust whoever wrote the config, {_allow(name + '.')}"
                )


def _within(path: str, prefixes: Any) -> bool:
    return any(path == prefix or path.startswith(prefix + ".") for prefix in prefixes)


def _allow(path: str) -> str:
    module = path.rpartition(".")[0]
    return f"add --trust-config {module} (from Python, ldm.util.trust({module!r}))"


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _texts(key)
            yield from _texts(entry)
    elif isinstance(value, Sequence) and not isinstance(value, bytes):
        for entry in value:
            yield from _texts(entry)
