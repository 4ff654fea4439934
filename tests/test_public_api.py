"""Every published name of `ldm` can be imported from its module and takes the published parameters.

`reference/api/public_api.tsv` lists names and signatures of CompVis latent-diffusion and stable-diffusion and of
Stability-AI stablediffusion; `excused.tsv` lists names that need not exist, with reasons.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from collections import defaultdict
from typing import Any

import pytest

from tests.golden import REFERENCE


def read_table(name: str) -> list[list[str]]:
    return [line.split("\t") for line in (REFERENCE / "api" / name).read_text().splitlines()[1:]]


EXCUSED = {(module, name) for module, name, _ in read_table("excused.tsv")}
PUBLIC: dict[str, dict[str, list[tuple[str, str]]]] = defaultdict(lambda: defaultdict(list))
for module_, name_, kind_, _, signature_ in read_table("public_api.tsv"):
    if not {(module_, "*"), (module_, name_), (module_, name_.split(".")[0])} & EXCUSED:
        PUBLIC[module_][name_].append((kind_, signature_))


def find(module: str, dotted: str) -> Any:
    """Return what a dotted name in a module is, methods as plain functions."""
    found: Any = importlib.import_module(module)
    for part in dotted.split("."):
        static = inspect.isclass(found) and part not in vars(object)
        found = inspect.getattr_static(found, part) if static else getattr(found, part)
        if isinstance(found, (staticmethod, classmethod)):
            found = found.__func__
    return found


def shortfall(found: Any, signature: str) -> str:
    """Return how a function differs from a published signature: every parameter by name, positional ones in order."""
    if inspect.isclass(found) or not callable(found):
        return "" if callable(found) else "is not callable"
    arguments = ast.parse(f"def f{signature}: pass").body[0].args  # type: ignore[attr-defined]
    public = [argument.arg for argument in arguments.posonlyargs + arguments.args]
    own = inspect.signature(found).parameters
    kinds = {parameter.kind for parameter in own.values()}
    positional = [name for name, p in own.items() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    named = public + [argument.arg for argument in arguments.kwonlyargs]
    missing = [name for name in named if name not in own and name not in ("self", "cls")]
    if missing and inspect.Parameter.VAR_KEYWORD not in kinds:
        return f"takes no {', '.join(missing)}"
    shared = [name for name in public if name in positional]
    if shared != positional[: len(shared)] and inspect.Parameter.VAR_POSITIONAL not in kinds:
        return f"has the order {', '.join(positional[: len(public)])}"
    return ""


def check(module: str, name: str, versions: list[tuple[str, str]]) -> str:
    """Return what is wrong with a name, or "". Where the repositories differ, any one's signature will do."""
    try:
        found = find(module, name)
    except Exception as error:  # whatever importing raises
        return f"{name} is missing ({type(error).__name__}: {error})"
    wrong = [shortfall(found, signature) if kind in ("function", "method") else "" for kind, signature in versions]
    return "" if "" in wrong else f"{name} {wrong[0]}"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("module", sorted(PUBLIC))
def test_names_and_signatures(module):
    results = [check(module, name, versions) for name, versions in PUBLIC[module].items()]
    assert not (wrong := [result for result in results if result]), "\n".join(wrong)
