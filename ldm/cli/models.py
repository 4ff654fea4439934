"""Load the model that a command line names, and what it is conditioned on without text."""

from __future__ import annotations

import argparse
import logging
import os
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ldm.cli.options import ArgumentParser, acceleration_options, number, sampling_options, user_path

if TYPE_CHECKING:
    from PIL import Image

    from ldm.inference import Pipeline, SamplingOptions
    from ldm.inference.conditioning import Task
    from ldm.models.diffusion.ddpm import LatentDiffusion

logger = logging.getLogger(__name__)


def load_pipeline(args: Namespace, *tasks: Task) -> Pipeline:
    """Load the model of `add_model`, with the acceleration of `add_speed` and the tiles of `add_size`.

    Args:
        args: The command line.
        *tasks: What the script can condition a model on.

    Raises:
        ValueError: if the model is conditioned on nothing of that, if --C or --f contradict it, if --tile does not
            suit it, and what loading raises.
    """
    from ldm import inference

    tile = getattr(args, "first_stage_tile", 0)
    if tile and getattr(args, "tiling", None):
        raise ValueError("--tile cuts images where --tiling joins them: leave one of the two out")
    model = inference.load_model(
        args.config,
        args.ckpt,
        device=args.device,
        precision=args.precision,
        overrides=args.settings,
        tasks=tasks,
        lowvram=getattr(args, "lowvram", False),
        verify=args.verify,
    )
    size = inference.default_size(model)
    factor = size // model.latent_size(size, size)[0]
    for flag, actual in (("--C", model.channels), ("--f", factor)):
        given = getattr(args, flag.lstrip("-"), None)
        if given not in (None, actual):
            raise ValueError(f"{flag} {given} does not fit this model, which has {actual}: leave {flag} out")
    if tile:
        inference.tile_first_stage(model.first_stage_model, tile)
    prepare_model(args, model)
    return inference.Pipeline(model)


def prepare_model(args: Namespace, model: LatentDiffusion) -> None:
    """Quantize and compile a model's network, as far as --quantize and --compile ask for it and the device allows."""
    from ldm.acceleration import compile_network, has_int8, quantize_int8

    if acceleration_options(args).quantize:
        try:
            if model.device.type != "cpu" or not has_int8():
                where = f"on {model.device.type}" if model.device.type != "cpu" else "on a CPU without AVX512-VNNI"
                raise ValueError(f"int8 is not faster {where}")
            quantize_int8(model.model.diffusion_model).list_on(model)
        except ValueError as error:
            logger.warning("%s: sampling without int8", error)
    if getattr(args, "compile", False):
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path.home() / ".cache" / "ldm" / "compiled"))
        compile_network(model)


def resolve_options(args: Namespace, pipe: Pipeline, *, sized: bool = False) -> SamplingOptions:
    """The options of a command line with the model's defaults. sized: with the model's size, unless --H and --W."""
    from ldm import inference

    options = pipe.resolve(sampling_options(args), default_scale=args.public_scale, default_steps=args.public_steps)
    if not sized:
        return options
    height, width = inference.resolve_size(pipe.model, args.H, args.W)
    return options.of(options, height=height, width=width)


class ResumedModel(NamedTuple):
    """checkpoint, config: files; config is None if the checkpoint itself tells it. home: the folder they are in."""

    checkpoint: Path
    config: Path | None
    home: Path


def find_model(path: str | Path) -> ResumedModel:
    """Find the model of --resume: a checkpoint, a folder with model.ckpt, or a run folder of scripts/train.py.

    The config is the run's, or a config.yaml beside the checkpoint.

    Raises:
        FileNotFoundError: if there is no checkpoint.
    """
    from ldm.training.folders import find_run, stored_configs

    path = Path(path)
    public = [path / name for name in ("model.ckpt", "model.safetensors")] if path.is_dir() else [path]
    checkpoint = next((place for place in public if place.is_file()), None)
    if checkpoint is None and not stored_configs(path):
        if not path.exists():
            raise FileNotFoundError(f"--resume {path}: no such checkpoint or folder")
        raise FileNotFoundError(f"--resume {path} is a folder without model.ckpt, and no run folder: name a checkpoint")
    run = path if checkpoint is None else checkpoint.parent.parent
    if configs := [place for place in stored_configs(run) if place.name.endswith("-project.yaml")]:
        return ResumedModel(checkpoint or find_run(run)[1], configs[-1], run)
    if checkpoint is None:
        raise FileNotFoundError(f"--resume {path} holds no configs/*-project.yaml: name a checkpoint in it")
    config = checkpoint.with_name("config.yaml")
    return ResumedModel(checkpoint, config if config.is_file() else None, checkpoint.parent)


# ---- classes, layouts, segmentation maps ----


class Conditions(NamedTuple):
    """`count` conditions in order.

    generate(numbers, **options): one image for each of these conditions. describe(number): the condition, for metadata.
    """

    count: int  # type: ignore[assignment]  # hides a tuple's method that is of no use here
    generate: Callable[..., list[Image.Image]]
    describe: Callable[[int], dict[str, Any]]


def class_list(text: str) -> list[int]:
    """An argparse `type`: "1,5,10-12" is 1, 5, 10, 11 and 12."""
    classes: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        try:
            span = range(int(first), int(last or first) + 1)
        except ValueError:
            span = range(0)
        if not span:
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of classes such as 1,5,10-12")
        classes += span
    return classes


def add_conditions(parser: ArgumentParser) -> None:
    """--classes, --layout, --segmentation, --categories, --null_class."""
    group = parser.add_argument_group("conditions")
    one = group.add_mutually_exclusive_group()
    one.add_argument(
        "--classes",
        type=class_list,
        metavar="LIST",
        help="the numbers of classes: 1,5,10-12 (for ImageNet's cin256-v2, --scale 3 -c 20 -e 0 works well)",
    )
    one.add_argument(
        "--layout",
        type=user_path,
        metavar="FILE",
        help='JSON: a list of {"class": number or name, "box": [x, y, width, height]}, in fractions of the image\'s '
        "sides; or several such lists",
    )
    one.add_argument(
        "--segmentation",
        type=user_path,
        metavar="FILE",
        help="an image with class numbers as gray levels, or a .npy file of them; it gives the size",
    )
    group.add_argument("--categories", type=user_path, metavar="FILE", help="class names for --layout, one per line")
    group.add_argument(
        "--null_class",
        type=number(int, 0),
        metavar="NUMBER",
        help="the class that means none, which --scale leads away from (default: from the model)",
    )


def read_conditions(args: Namespace) -> Any:
    """Read the file of --layout or --segmentation; None without. ValueError for options without effect."""
    from ldm.data.layouts import read_layouts
    from ldm.data.segmentation import read_segmentation

    for name, needed in (("categories", "layout"), ("null_class", "classes")):
        if getattr(args, name) is not None and getattr(args, needed) is None:
            raise ValueError(f"--{name} has no effect without --{needed}: leave it out")
    if args.layout is not None:
        return read_layouts(args.layout, args.categories)
    return None if args.segmentation is None else read_segmentation(args.segmentation)


def conditions_for(model: LatentDiffusion, args: Namespace, content: Any) -> Conditions:
    """The conditions of a command line for `model`; content: from `read_conditions`.

    Raises:
        ValueError: if the model is conditioned on something else, or cannot take them.
    """
    from ldm import inference
    from ldm.inference.conditioning import CLASSES, LAYOUT, NOTHING, SEGMENTATION, require

    flags = {CLASSES: "classes", LAYOUT: "layout", SEGMENTATION: "segmentation"}
    task = require(model, NOTHING, *flags)
    wanted = flags.get(task)
    given = next((flag for flag in flags.values() if getattr(args, flag) is not None), None)
    if given != wanted:
        use = f"leave --{given} out" if wanted is None else f"use --{wanted}" + (f", not --{given}" if given else "")
        path, family = (model.info.checkpoint_path, model.info.family) if model.info else ("the model", "a model")
        raise ValueError(f"{path} is {family}, which is conditioned on {task.condition}: {use}")
    if wanted == "classes":
        return _classes(model, args)
    if wanted == "layout":
        tokens, name = inference.layout_tokens(model, content), args.layout
        return Conditions(
            len(tokens),
            lambda numbers, **options: inference.layout2img(model, tokens[list(numbers)], **options),
            lambda number: {"layout": name, "layout_number": number},
        )
    if wanted == "segmentation":
        return Conditions(
            1,
            lambda numbers, **options: inference.segmentation2img(model, content, len(numbers), **options),
            lambda number: {"segmentation": args.segmentation},
        )
    return Conditions(1, lambda numbers, **options: inference.noise2img(model, len(numbers), **options), lambda _: {})


def _classes(model: LatentDiffusion, args: Namespace) -> Conditions:
    from ldm import inference

    inference.check_labels(model, args.classes)

    def generate(numbers: Sequence[int], **options: Any) -> list[Image.Image]:
        labels = [args.classes[number] for number in numbers]
        return inference.class2img(model, labels, null_class=args.null_class, **options)

    none = {} if args.null_class is None else {"null_class": args.null_class}
    return Conditions(
        len(args.classes), generate, lambda number: {"class": args.classes[number], "scale": args.scale, **none}
    )
