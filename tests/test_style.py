"""Code, help and docs use the standard words of the field."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ldm.util import REPOSITORY

# A pattern and the word to use instead. People may still read about "pictures" in prose.
FORBIDDEN = {
    r"\b(lay|lays|laying|laid)[ _-]out\b|\blaid_out\b|\bLaidOut": "pack (weights), make_schedule",
    r"\bredraw\w*|\bdrawing\b|\bdrawn\b": "sample, generate, sampled",
    r"\battend_to\b|\bseeing_themselves|\bside_by_side\b": "scaled_dot_product_attention, parallel",
    r"\blodg(e|ing)\b": "offload",
    r"\bshortcuts?_?taken\b|\bShortcuts\b": "acceleration options",
    r"\bBranches\b|\bGuided\b|\bAnswer\b(?!s)": "ModelOutputs, Conditioning, GuidedOutput",
    r"\bAS_PUBLISHED\b|\bReading\b\(": "DEFAULT_PROMPT_OPTIONS, PromptOptions",
    r"\bplus_plus\b|\btakes_eta\b": "cfg_pp, supports_eta",
    r"\bwhole_file\b|\bwrite_new\b": "atomic_write, write_exclusive",
    r"\bprocesses?\.agree\b|\bjoined_processes\b": "broadcast, process_group",
    r"\bthe judge\b|\bshapes_judge\b": "evaluator",
    r"\bis said\b|\bas it is said\b|\bhas its say\b|\bhave a say\b": "describe the behavior",
    r"\bgoes by\b|\bgo by\b": "uses, is identified by",
    r"\ball that there is\b|\bwhat there is to\b": "everything, the available ...",
    r"\bhave (it|them|the \w+) (do|be|go|draw|keep|take)\b": "make, let",
}
SUFFIXES = {".py", ".md", ".yaml"}
FILES = sorted(
    path
    for folder in ("ldm", "scripts", "docs", "benchmarks")
    for path in (REPOSITORY / folder).rglob("*")
    if path.suffix in SUFFIXES
)


@pytest.mark.parametrize("pattern", FORBIDDEN)
def test_no_private_dialect(pattern: str) -> None:
    expression = re.compile(pattern)
    found = [
        f"{path.relative_to(REPOSITORY)}:{number}: {line.strip()}"
        for path in [Path(REPOSITORY) / "README.md", *FILES]
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if expression.search(line)
    ]
    assert not found, f"use instead: {FORBIDDEN[pattern]}\n" + "\n".join(found)
