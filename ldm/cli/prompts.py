"""Prompts from the command line or a file, with options of their own, in batches."""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.cli.options import MAX_SEED, number

logger = logging.getLogger(__name__)

MAX_COMBINATIONS = 10_000  # of one prompt; more are a typing error

_GROUP = re.compile(r"\{([^{}]*\|[^{}]*)\}")


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise argparse.ArgumentTypeError(f"{json.dumps(value)} is not a text")
    return value


def _of_json(parse: Callable[[str], Any]) -> Callable[[Any], Any]:
    return lambda value: parse(json.dumps(value))


# The options of a line of a .jsonl file, and how each value is checked.
OPTIONS: dict[str, Callable[[Any], Any]] = {
    "prompt": _text,
    "negative_prompt": _text,
    "seed": _of_json(number(int, 0, MAX_SEED)),
    "steps": _of_json(number(int, 1, 1000)),
    "scale": _of_json(number(float)),
}


@dataclass(frozen=True)
class Line:
    """A prompt and its own options, some of `OPTIONS`."""

    prompt: str
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Batch:
    """Lines to sample together: all have the same steps and scale, and either all have a seed or none."""

    lines: Sequence[Line]

    @property
    def prompts(self) -> list[str]:
        """The prompt of every line."""
        return [line.prompt for line in self.lines]

    @property
    def seeded(self) -> bool:
        """Whether the lines have their own seeds, and so do not use the run's noise."""
        return "seed" in self.lines[0].options

    @property
    def image_settings(self) -> list[dict[str, Any]]:
        """Metadata of each image in place of the run's; None: has no effect on this image."""
        alone = {"seed_mode": "image", "batch_size": None, "index": None} if self.seeded else {}
        return [{**line.options, **alone} for line in self.lines]

    def overrides(self, negative_prompt: str) -> dict[str, Any]:
        """Its own options, fields of `SamplingOptions`; `negative_prompt` is for lines without one."""
        own = {name: value for name, value in self.lines[0].options.items() if name in ("steps", "scale")}
        if self.seeded:
            own["seed"] = [line.options["seed"] for line in self.lines]
        if any("negative_prompt" in line.options for line in self.lines):
            own["negative_prompt"] = [line.options.get("negative_prompt", negative_prompt) for line in self.lines]
        return own


def batches(args: argparse.Namespace) -> list[Batch]:
    """The prompts of a run, `n_iter` times over, in batches of at most `n_samples`.

    These are the prompt repeated, or the lines of --from-file; with --matrix, every combination of each. They keep
    their order: a batch ends where the next line's options need another one. Repetitions of a line with a seed, for
    --repeat or --n_iter, count on from that seed.

    Raises:
        FileNotFoundError, ValueError: if the file has no prompts, or other options than `OPTIONS`.
    """
    lines = _lines(args)
    found: list[Batch] = []
    for number_of_iteration in range(args.n_iter):
        repeated = [_repeated(line, number_of_iteration * args.repeat + copy) for line, copy in lines]
        for _, group in itertools.groupby(repeated, key=_batch_key):
            found += (Batch(part) for part in _parts(list(group), args.n_samples))
    if getattr(args, "matrix", False):
        count = sum(len(batch.lines) for batch in found)
        prompts = sum(copy == 0 for _, copy in lines)
        logger.info("--matrix makes %d prompts: %d images in %d batches", prompts, count, len(found))
    return found


def prompt_batches(args: argparse.Namespace) -> list[list[str]]:
    """The prompts of one iteration in batches of `n_samples`, for scripts whose prompts have no options of their own.

    Raises:
        FileNotFoundError, ValueError: as `batches`, and for a file with such options.
    """
    found = batches(argparse.Namespace(**vars(args) | {"n_iter": 1}))
    if any(line.options for batch in found for line in batch.lines):
        raise ValueError(f"--from-file {args.from_file}: this script takes only prompts, without options of their own")
    return [batch.prompts for batch in found]


def _lines(args: argparse.Namespace) -> list[tuple[Line, int]]:
    """The lines of one iteration, each with the number of its earlier copies."""
    lines, copies = [Line(args.prompt, {})], args.n_samples
    if args.from_file is not None:
        lines, copies = _read_lines(Path(args.from_file)), args.repeat
    for text in (getattr(args, "negative_prompt", ""), *_texts(lines)):
        if any("\ud800" <= char <= "\udfff" for char in text):
            raise ValueError(f"the prompt {text!r} is not valid text: check the terminal's encoding (UTF-8)")
    if getattr(args, "matrix", False):
        lines = [Line(prompt, line.options) for line in lines for prompt in combinations(line.prompt)]
        copies = args.repeat
    return [(line, copy) for line in lines for copy in range(copies)]


def _texts(lines: Iterable[Line]) -> Iterator[str]:
    for line in lines:
        yield line.prompt
        yield line.options.get("negative_prompt", "")


def _repeated(line: Line, times: int) -> Line:
    seed = line.options.get("seed")
    return line if seed is None else Line(line.prompt, {**line.options, "seed": (seed + times) % (MAX_SEED + 1)})


def _batch_key(line: Line) -> tuple[Any, ...]:
    """What lines of one batch have in common."""
    return line.options.get("steps"), line.options.get("scale"), "seed" in line.options


def _parts(lines: list[Line], size: int) -> Iterator[list[Line]]:
    return (lines[i : i + size] for i in range(0, len(lines), size))


def combinations(prompt: str) -> list[str]:
    """Every way to take one part of each group `{a|b|...}`; the last group changes fastest.

    Braces without a bar are literal. ValueError for more than `MAX_COMBINATIONS`.
    """
    pieces = _GROUP.split(prompt)  # literal, group, literal, ...
    choices = [[piece] if i % 2 == 0 else piece.split("|") for i, piece in enumerate(pieces)]
    count = math.prod(len(parts) for parts in choices)
    if count > MAX_COMBINATIONS:
        raise ValueError(f"--matrix makes {count} prompts of {prompt!r}: use at most {MAX_COMBINATIONS}")
    return ["".join(parts) for parts in itertools.product(*choices)]


# ---- files ----


def _read_lines(path: Path) -> list[Line]:
    """One prompt per line, or in a .jsonl file one object per line."""
    if path.is_dir():
        raise ValueError(f"--from-file {path} is a folder, not a text file")
    if not path.exists():
        raise FileNotFoundError(f"--from-file {path}: no such file")
    try:
        text = path.read_text(encoding="utf-8-sig").rstrip()
    except UnicodeDecodeError:
        raise ValueError(f"--from-file {path} is not UTF-8 text: save it as UTF-8") from None
    if not text:
        raise ValueError(f"--from-file {path} holds no prompts")
    rows = text.split("\n")  # not splitlines: a prompt may hold other characters that end lines somewhere
    if path.suffix.lower() != ".jsonl":
        return [Line(row, {}) for row in rows]
    return [_line(row, f"--from-file {path}, line {i}") for i, row in enumerate(rows, start=1) if row.strip()]


def _line(text: str, place: str) -> Line:
    """A line of a .jsonl file, checked; `place` says where it is."""
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{place} is not JSON: {error}") from None
    if not isinstance(values, dict) or "prompt" not in values:
        raise ValueError(f'{place} must be like {{"prompt": "a cat", "seed": 1}}, not {text}')
    if unknown := [name for name in values if name not in OPTIONS]:
        raise ValueError(f"{place}: there is no option {unknown[0]!r}, only {', '.join(OPTIONS)}")
    checked = {}
    for name, value in values.items():
        try:
            checked[name] = OPTIONS[name](value)
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"{place}: {name}: {error}") from None
    return Line(checked.pop("prompt"), checked)
