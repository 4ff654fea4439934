"""Ways of sampling compared: how good pictures are for how many network evaluations."""

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

from ldm.data.shapes import draw
from ldm.evaluation.distances import first_stage_features, kernel_distance
from ldm.evaluation.scores import draw_all, judge_all, prompts_of, scenes_of, summary
from ldm.files import atomic_write, write_text

if TYPE_CHECKING:
    from ldm.models.diffusion.ddpm import LatentDiffusion

TRUE = 1000  # drawings to compare with


@dataclass(frozen=True)
class Way:
    """A way of sampling: its name in tables, the evaluations of a step, and options of `ldm.inference.txt2img`."""

    name: str
    cost: int
    options: Mapping[str, Any]


def _samplers() -> list[Way]:
    twice = ("heun", "dpm2", "dpmpp_2s")  # ask two times a step
    names = (
        *("ddim", "plms", "euler", "euler_a", "heun", "dpm2", "lms"),
        *("dpmpp_2m", "dpmpp_3m", "dpmpp_2s", "dpmpp_2m_sde", "unipc"),
    )
    return [Way(name, 4 if name in twice else 2, {"sampler": name}) for name in names]


def _schedules() -> list[Way]:
    choices = ("uniform", "trailing", "karras", "exponential")
    return [Way(f"dpmpp_2m, {name}", 2, {"sampler": "dpmpp_2m", "schedule": name}) for name in choices]


def _guidance() -> list[Way]:
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
    return [Way(name, cost.get(name, 2), {"sampler": "dpmpp_2m", **options}) for name, options in given.items()]


WAYS = {"samplers": _samplers, "schedules": _schedules, "guidance": _guidance}


class Counter:
    """How many times a network was evaluated, a batch of two for one picture counting as two."""

    rows = 0


@contextlib.contextmanager
def counted(model: LatentDiffusion) -> Iterator[Counter]:
    """Count what the model's network is asked meanwhile."""
    counter, network = Counter(), model.model.diffusion_model

    def count(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        counter.rows += len(args[0])

    hook = network.register_forward_pre_hook(count)
    try:
        yield counter
    finally:
        hook.remove()


def measure(
    model: LatentDiffusion, way: Way, steps: int, prompts: Sequence[str], truth: Tensor, batch: int, seed: int
) -> dict[str, Any]:
    """Accuracy by the judge and distance to true drawings of one way with so many steps.

    truth: features of true drawings, not those that the prompts describe, see `distances.first_stage_features`.
    """
    with counted(model) as counter:
        pictures = draw_all(model, prompts, batch, seed, f"{way.name}, {steps} steps", steps=steps, **way.options)
    found = summary(prompts, judge_all(pictures, prompts))
    return {
        "way": way.name,
        "steps": steps,
        "evaluations": counter.rows / len(prompts),
        "share": found["share"],
        "interval": found["interval"],
        "distance": kernel_distance(features_of(model, pictures), truth)[0],
    }


def features_of(model: LatentDiffusion, pictures: Sequence[Image.Image]) -> Tensor:
    """The features (N, D) of pictures."""
    stacked = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).movedim(-1, 1)
    return first_stage_features(model)(stacked)


def compare(
    model: LatentDiffusion, ways: Sequence[Way], budgets: Sequence[int], kind: str, count: int, batch: int, seed: int
) -> Iterator[dict[str, Any]]:
    """`measure` each way with as many steps as each budget of evaluations a picture allows, where it allows any."""
    prompts = prompts_of(kind, count, seed)
    others = scenes_of(kind, max(count, TRUE), seed + 1)
    truth = features_of(model, [Image.fromarray(draw(scene)) for scene in others])
    for way in ways:
        for budget in budgets:
            if steps := budget // way.cost:
                yield {"budget": budget} | measure(model, way, steps, prompts, truth, batch, seed)


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The results as a table: ways down, budgets across; percent right, and in brackets 1000 times the distance."""
    budgets = sorted({row["budget"] for row in rows})
    lines = ["| | " + " | ".join(map(str, budgets)) + " |", "| --- |" + " --- |" * len(budgets)]
    for name in dict.fromkeys(row["way"] for row in rows):
        cells = {row["budget"]: row for row in rows if row["way"] == name}
        texts = [
            f"{100 * cells[b]['share']:.0f} ({1000 * cells[b]['distance']:.0f})" if b in cells else "" for b in budgets
        ]
        lines.append(f"| {name} | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Share right and distance against network evaluations, a line for every way."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    figure = Figure(figsize=(14, 5), layout="constrained")
    FigureCanvasAgg(figure)
    shares, apart = figure.subplots(1, 2)
    for number, name in enumerate(dict.fromkeys(row["way"] for row in rows)):
        line = sorted((row for row in rows if row["way"] == name), key=lambda row: row["evaluations"])
        x = [row["evaluations"] for row in line]
        style = {"marker": "osv^Dx+"[number % 7], "linestyle": ("-", "--", ":", "-.")[number // 7 % 4], "label": name}
        shares.plot(x, [100 * row["share"] for row in line], **style)
        apart.plot(x, [max(row["distance"], 1e-4) for row in line], **style)
    for axes, title in ((shares, "fully right, %"), (apart, "kernel distance to true drawings")):
        axes.set(xscale="log", xlabel="network evaluations a picture", title=title)
        axes.set_xticks(sorted({row["budget"] for row in rows}))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
    apart.set(yscale="log")
    figure.legend(*shares.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    with atomic_write(path) as partial:
        figure.savefig(partial, format="png", dpi=100)


def write(folder: Path, settings: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """`samplers.json`, `samplers.md` and `samplers.png` in a folder."""
    results = {"settings": dict(settings), "rows": list(rows)}
    write_text(folder / "samplers.json", json.dumps(results, indent=1) + "\n")
    write_text(folder / "samplers.md", markdown(rows))
    plot(rows, folder / "samplers.png")
