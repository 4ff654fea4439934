"""Decide what configs may name. A config says which code to call, so one from a stranger is a program.

Configs that scripts and `load_model` read (`allowlist_only`) may name the classes of `OWN` and what `trust`,
`--trust-config` or the environment variable LDM_TRUST add. A program that calls `ldm.util.instantiate_from_config`
directly may also name its own classes. docs/security.md has the whole rule.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import os
import re
import sys
import sysconfig
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# Packages of public configs: their own classes can be named, nothing else in them.
OWN = ("ldm", "torch.nn", "torch.optim", "pytorch_lightning.callbacks")
VARIABLE = "LDM_TRUST"

_added: set[str] = set()
_strict = 0  # open blocks of `allowlist_only`; of the whole process, so that threads started inside are covered
_lock = threading.Lock()

_DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*\.?")
_REFERENCE = re.compile(r"\$\{\s*([^{}:$]*)([:$])")  # of ${name:...}, or ${...${, the name


def trust(*prefixes: str) -> None:
    """Let configs name these modules, packages (`mypackage`) or OmegaConf resolvers (`oc.env`) in this process.

    Raises:
        ValueError: a prefix is not a dotted name.
    """
    _added.update(_valid(prefix) for prefix in prefixes)


@contextlib.contextmanager
def allowlist_only() -> Iterator[None]:
    """Refuse the running program's own classes too, for configs that may come from strangers. Also a decorator."""
    global _strict
    with _lock:
        _strict += 1
    try:
        yield
    finally:
        with _lock:
            _strict -= 1


def check_path(target: str, path: str) -> None:
    """Raise ImportError unless `path`, the module and name of `target`, is trusted. Imports nothing."""
    if not (_within(path, (*OWN, *_trusted())) or _is_program_code(path)):
        raise ImportError(
            f"the config names {target!r}, and only what is in {', '.join(OWN)} is called without asking: if you trust "
            f"whoever wrote the config, {_allow(path)}"
        )


def check_found(target: str, found: Any) -> None:
    """Raise ImportError unless `found`, the object of a trusted path, is a class (or a function of an added package)
    that is defined in a trusted place.

    Modules hold what they import too: `ldm.anything.os.system` begins well.
    """
    if not (inspect.isclass(found) or inspect.isroutine(found)):
        raise ImportError(f"target {target!r} is not a class: it leads to a {type(found).__name__}")
    home = f"{found.__module__}.{found.__qualname__}"
    if _within(home, _trusted()):
        return
    if not (_within(home, OWN) or _is_program_code(home)):
        raise ImportError(
            f"the config names {target!r}, which is {home} and only imported there: if you trust whoever wrote the "
            f"config, {_allow(home)}"
        )
    if not inspect.isclass(found):
        raise ImportError(f"target {target!r} is not a class: configs can name functions of trusted packages only")


def check_references(config: Any, name: Any) -> None:
    """Raise ValueError if a config refers to anything but its own values.

    OmegaConf's resolvers reach further: `${oc.env:NAME}` copies the environment to where configs go, such as run
    folders, messages and image metadata.

    Args:
        config: plain values with `${...}` in them.
        name: the file, for the message.
    """
    for text in _texts(config):
        for match in _REFERENCE.finditer(text):
            resolver, computed = match[1].strip(), match[2] == "$"
            if computed and ":" in text[match.end() :]:
                raise ValueError(f"config {name}: {text!r} computes the name of a reference: write it out")
            if not computed and not _within(resolver, _trusted()):
                raise ValueError(
                    f"config {name}: {text!r} asks {resolver!r} for a value, which reaches beyond the config: write "
                    f"the value down or, if you trust whoever wrote the config, {_allow(resolver + '.')}"
                )


def _valid(prefix: Any, source: str = "") -> str:
    if not isinstance(prefix, str) or not _DOTTED.fullmatch(prefix):
        raise ValueError(f"{source}{prefix!r} is not the name of a module or package such as mypackage.data")
    return prefix.removesuffix(".")


def _trusted() -> set[str]:
    """What was added, with the names in the environment variable."""
    names = filter(None, map(str.strip, os.environ.get(VARIABLE, "").split(",")))
    return _added | {_valid(name, f"{VARIABLE}: ") for name in names}


def _is_program_code(path: str) -> bool:
    """Whether `path` belongs to the running program, in a call that may use its classes.

    Its top-level package must be outside the standard library and site-packages, and either imported already or in
    the folder of the main script or the working directory.
    """
    top = path.partition(".")[0]
    if _strict or top == "ldm" or top in sys.stdlib_module_names:
        return False
    if top == "__main__":
        return True
    if module := sys.modules.get(top):
        places = [*getattr(module, "__path__", ())] or [getattr(module, "__file__", None)]
        own: list[Path] = [Path("/")]
    else:
        try:
            spec = importlib.util.find_spec(top)  # of a top-level name this imports nothing
        except (ImportError, ValueError):
            return False
        if spec is None:
            return False
        places = [*(spec.submodule_search_locations or ())] or [spec.origin if spec.has_location else None]
        main = getattr(sys.modules.get("__main__"), "__file__", None)
        own = [Path.cwd(), *([Path(main).resolve().parent] if main else [])]
    files = [Path(place).resolve() for place in places if place]
    return bool(files) and all(
        any(file.is_relative_to(folder) for folder in own) and not _is_installed(file) for file in files
    )


def _is_installed(file: Path) -> bool:
    """Whether a file is of the standard library or of an installed package."""
    if {"site-packages", "dist-packages"} & set(file.parts):
        return True
    return any(file.is_relative_to(Path(sysconfig.get_path(name)).resolve()) for name in ("stdlib", "platstdlib"))


def _within(path: str, prefixes: Iterable[str]) -> bool:
    return any(path == prefix or path.startswith(prefix + ".") for prefix in prefixes)


def _allow(path: str) -> str:
    module = path.rpartition(".")[0]
    return f"add --trust-config {module} or set {VARIABLE}={module} (from Python, ldm.util.trust({module!r}))"


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
