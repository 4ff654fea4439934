"""Compare samplers, schedules and guidance: accuracy against network evaluations."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.shapes.scoring import evaluate_all, generate_all, prompts_of, scenes_of, summary
from ldm.data.shapes import render
from ldm.evaluation import first_stage_features, kernel_distance
from ldm.files import atomic_write, write_text

if TYPE_CHECKING:
    from ldm.models.diffusion.ddpm import LatentDiffusion

REFERENCES = 1000  # rendered scenes to compare with


@dataclass(frozen=True)
class Setting:
    """A sampling setting: name in tables, network evaluations per step, options of `ldm.inference.txt2img`."""

    name: str
    cost: int
    options: Mapping[str, Any]


def _samplers() -> list[Setting]:
    twice = ("heun", "dpm2", "dpmpp_2s")  # two evaluations per step
    names = (
        *("ddim", "plms", "euler", "euler_a", "heun", "dpm2", "lms"),
        *("dpmpp_2m", "dpmpp_3m", "dpmpp_2s", "dpmpp_2m_sde", "unipc"),
    )
    return [Setting(name, 4 if name in twice else 2, {"sampler": name}) for name in names]


def _schedules() -> list[Setting]:
    choices = ("uniform", "trailing", "karras", "exponential")
    return [Setting(f"dpmpp_2m, {name}", 2, {"sampler": "dpmpp_2m", "schedule": name}) for name in choices]


def _guidance() -> list[Setting]:
    given: dict[str, dict[str, Any]] = {
        "no guidance": {"scale": 1.0},
        "scale 3": {"scale": 3.0},
        "rescale 0.7 at scale 3": {"scale": 3.0, "guidance": {"terms": {"rescale": 0.7}}},
        "threshold 0.995 at scale 3": {"scale": 3.0, "guidance": {"terms": {"threshold": 0.995}}},
        "CFG++ 0.6": {"scale": 0.6, "guidance": {"cfg_pp": True}},
        "interval 0.3 to 5 at scale 3": {"scale": 3.0, "guidance": {"interval": (0.3, 5.0)}},
        "scale 3 falling to 1": {"scale": [3.0, 1.0]},
        "perturbed attention 1": {"guidance": {"terms": {"pag": 1.0}}},
    }
    cost = {"no guidance": 1, "perturbed attention 1": 3}
    return [Setting(name, cost.get(name, 2), {"sampler": "dpmpp_2m", **options}) for name, options in given.items()]


SETTINGS = {"samplers": _samplers, "schedules": _schedules, "guidance": _guidance}


class Counter:
    """Number of network evaluations; a batch of two counts as two."""

    rows = 0


@contextlib.contextmanager
def counted(model: LatentDiffusion) -> Iterator[Counter]:
    """Count the evaluations of the model's network in a `with` block."""
    counter, network = Counter(), model.model.diffusion_model

    def count(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        counter.rows += len(args[0])

    hook = network.register_forward_pre_hook(count)
    try:
        yield counter
    finally:
        hook.remove()


def measure(
    model: LatentDiffusion,
    setting: Setting,
    steps: int,
    prompts: Sequence[str],
    reference: Tensor,
    batch: int,
    seed: int,
) -> dict[str, Any]:
    """Measure accuracy, and kernel distance to rendered scenes, of one setting and number of steps.

    reference: features of rendered scenes other than the prompts', see `ldm.evaluation.first_stage_features`.
    """
    with counted(model) as counter:
        title = f"{setting.name}, {steps} steps"
        images = generate_all(model, prompts, batch, seed, title, steps=steps, **setting.options)
    found = summary(prompts, evaluate_all(images, prompts))
    return {
        "setting": setting.name,
        "steps": steps,
        "evaluations": counter.rows / len(prompts),
        "accuracy": found["accuracy"],
        "interval": found["interval"],
        "distance": kernel_distance(features_of(model, images), reference)[0],
    }


def features_of(model: LatentDiffusion, images: Sequence[Image.Image]) -> Tensor:
    """Compute first-stage features (N, D) of images."""
    stacked = torch.from_numpy(np.stack([np.asarray(image) for image in images])).movedim(-1, 1)
    return first_stage_features(model)(stacked)


def compare(
    model: LatentDiffusion,
    settings: Sequence[Setting],
    budgets: Sequence[int],
    prompt_set: str,
    count: int,
    batch: int,
    seed: int,
) -> Iterator[dict[str, Any]]:
    """`measure` each setting with the steps that each budget (evaluations per image) allows."""
    prompts = prompts_of(prompt_set, count, seed)
    others = scenes_of(prompt_set, max(count, REFERENCES), seed + 1)
    reference = features_of(model, [Image.fromarray(render(scene)) for scene in others])
    for setting in settings:
        for budget in budgets:
            if steps := budget // setting.cost:
                yield {"budget": budget} | measure(model, setting, steps, prompts, reference, batch, seed)


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format results as a table of settings by budgets: accuracy in percent, 1000 times the distance in brackets."""
    budgets = sorted({row["budget"] for row in rows})
    lines = ["| | " + " | ".join(map(str, budgets)) + " |", "| --- |" + " --- |" * len(budgets)]
    for name in dict.fromkeys(row["setting"] for row in rows):
        cells = {row["budget"]: row for row in rows if row["setting"] == name}
        texts = [
            f"{100 * cells[b]['accuracy']:.0f} ({1000 * cells[b]['distance']:.0f})" if b in cells else ""
            for b in budgets
        ]
        lines.append(f"| {name} | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plot accuracy and distance against network evaluations, one line per setting."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    figure = Figure(figsize=(14, 5), layout="constrained")
    FigureCanvasAgg(figure)
    accuracies, distances = figure.subplots(1, 2)
    for number, name in enumerate(dict.fromkeys(row["setting"] for row in rows)):
        line = sorted((row for row in rows if row["setting"] == name), key=lambda row: row["evaluations"])
        x = [row["evaluations"] for row in line]
        style = {"marker": "osv^Dx+"[number % 7], "linestyle": ("-", "--", ":", "-.")[number // 7 % 4], "label": name}
        accuracies.plot(x, [100 * row["accuracy"] for row in line], **style)
        distances.plot(x, [max(row["distance"], 1e-4) for row in line], **style)
    for axes, title in ((accuracies, "all correct, %"), (distances, "kernel distance to rendered scenes")):
        axes.set(xscale="log", xlabel="network evaluations per image", title=title)
        axes.set_xticks(sorted({row["budget"] for row in rows}))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
    distances.set(yscale="log")
    figure.legend(*accuracies.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    with atomic_write(path) as partial:
        figure.savefig(partial, format="png", dpi=100)


def write(folder: Path, settings: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write `samplers.json`, `samplers.md` and `samplers.png`."""
    results = {"settings": dict(settings), "rows": list(rows)}
    write_text(folder / "samplers.json", json.dumps(results, indent=1) + "\n")
    write_text(folder / "samplers.md", markdown(rows))
    plot(rows, folder / "samplers.png")
