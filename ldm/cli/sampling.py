"""How to sample, as a command line says it: what there is to choose from, and what the choices mean together."""

from __future__ import annotations

import argparse
import logging
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import ldm

logger = logging.getLogger(__name__)

SCHEDULES = ("uniform", "quad", "even", "leading", "trailing", "karras", "exponential")
RULES, TERMS = "models/diffusion/**/*.py", "models/diffusion/guidance.py"  # where samplers and terms are registered
UNSETTLED = 0.5  # stands for a scale that the model is to say, where a scale is needed to check the rest


def sampler_names() -> list[str]:
    """Every registered sampler; read from the sources, as importing them takes seconds, which --help does not have."""
    return [name for name in _registered(RULES) if name not in _registered(TERMS)]


def term_names() -> list[str]:
    """Every registered term of guidance, in the same way."""
    return _registered(TERMS)


def _registered(places: str) -> list[str]:
    texts = [path.read_text(encoding="utf-8") for path in sorted(Path(ldm.__file__).parent.glob(places))]
    return [name for text in texts for name in re.findall(r'^@register\("(\w+)"', text, re.MULTILINE)]


# ---- types of options ----


def numbers(text: str) -> list[float]:
    """An argparse `type`: "9,3" is [9, 3]."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 9,3") from None


def schedule(text: str) -> str | list[float]:
    """An argparse `type`: the name of a schedule, or timesteps such as "999,850,...,5"."""
    return numbers(text) if "," in text or text.isdigit() else text


def term(text: str) -> tuple[str, float]:
    """An argparse `type`: "rescale=0.7" is ("rescale", 0.7)."""
    name, _, strength = text.partition("=")
    try:
        return name, float(strength)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not like rescale=0.7") from None


# ---- what they mean ----


def settle(args: Namespace) -> None:
    """Have `args` say the `sampler` (None: the model's own), `ddim_eta`, `scale`, and the `guidance` as a dict.

    Raises ValueError for options that do not go together, or that nothing goes by.
    """
    args.sampler = _sampler(args)
    if args.scale is not None and args.scale_schedule:
        raise ValueError("--scale and --scale_schedule are both given; leave one of the two out")
    args.scale = args.scale_schedule or args.scale
    terms = dict(args.guidance or [])
    if len(terms) < len(args.guidance or []):
        raise ValueError("--guidance names one term twice: leave one of the two out")
    args.guidance = terms or None
    if args.dpm_solver and args.ddim_eta:  # as published
        logger.warning("--dpm_solver adds no noise: --ddim_eta %g has no effect", args.ddim_eta)
        args.ddim_eta = 0.0
    _check(args)
    if args.ddim_eta is None:
        args.ddim_eta = args.public_eta if args.sampler in (None, "ddim") else 0.0


def _sampler(args: Namespace) -> str | None:
    flags = [name for name in ("dpm_solver", "plms", "ddim") if getattr(args, name)]
    if args.sampler is not None:
        if others := [name for name in flags if name != args.sampler]:
            raise ValueError(f"--sampler {args.sampler} and --{others[0]} are both given; leave one of the two out")
        return args.sampler
    if args.dpm_solver:
        for name in flags[1:]:
            logger.warning("--dpm_solver and --%s are both given: using DPM-Solver", name)
    elif len(flags) > 1:
        raise ValueError("--plms and --ddim are both given; leave one of the two out")
    return flags[0] if flags else None


def _check(args: Namespace) -> None:
    """ValueError, before a model is loaded, for names that there are not, and for what has no meaning together."""
    options = guidance_options(args)
    if args.sampler in (None, "ddim") and args.schedule is None and not options:
        return
    from ldm.models.diffusion.guidance import Guidance
    from ldm.models.diffusion.samplers import SAMPLERS
    from ldm.models.diffusion.schedules import SCHEDULES

    for flag, value, known in (("sampler", args.sampler, SAMPLERS), ("schedule", args.schedule, SCHEDULES)):
        if isinstance(value, str) and value not in known:
            raise ValueError(f"--{flag} {value} is not one of {', '.join(known)}")
    if args.sampler is not None:
        kind: Any = SAMPLERS[args.sampler].func
        if args.ddim_eta and not kind.supports_eta:
            flag = "--plms" if args.plms else f"--sampler {args.sampler}"
            raise ValueError(f"{flag} needs --ddim_eta 0, not {args.ddim_eta:g}; leave one of the two out")
        if args.cfg_pp and not kind.cfg_pp:
            able = ", ".join(name for name, make in SAMPLERS.items() if getattr(make.func, "cfg_pp", False))
            raise ValueError(f"--cfg_pp is for the samplers {able}, not for {args.sampler}")
    Guidance(UNSETTLED if args.scale is None else args.scale, **options)


def guidance_options(args: Namespace) -> dict[str, Any]:
    """What the options say of `Guidance` beside its scale."""
    given = {"terms": args.guidance, "interval": args.guidance_interval, "cfg_pp": args.cfg_pp}
    return {name: value for name, value in given.items() if value}


def chosen(args: Namespace) -> dict[str, Any]:
    """The schedule and the guidance beside the scale, as far as they were asked for, in the options' own names."""
    terms = ", ".join(f"{name}={strength:g}" for name, strength in (args.guidance or {}).items())
    interval, cfg_pp = args.guidance_interval, args.cfg_pp
    said = {"schedule": args.schedule, "guidance": terms, "guidance_interval": interval, "cfg_pp": cfg_pp}
    return {name: value for name, value in said.items() if value}
