"""Options for what is drawn without text: classes, layouts, segmentation maps."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ldm.cli.options import ArgumentParser, number, user_path

if TYPE_CHECKING:
    from PIL import Image

    from ldm.models.diffusion.ddpm import LatentDiffusion


class Conditions(NamedTuple):
    """What to draw under, `count` conditions in order.

    draw(numbers, **options): a picture for each of these numbers. describe(number): the condition, for metadata.
    """

    count: int  # type: ignore[assignment]  # a tuple's method of that name is of no use here
    draw: Callable[..., list[Image.Image]]
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
    """--classes, --layout or --segmentation, and what belongs to them."""
    group = parser.add_argument_group("what to draw")
    one = group.add_mutually_exclusive_group()
    one.add_argument(
        "--classes",
        type=class_list,
        metavar="LIST",
        help="the numbers of classes: 1,5,10-12 (for ImageNet's cin256-v2, --scale 3 -c 20 -e 0 is best known)",
    )
    one.add_argument(
        "--layout",
        type=user_path,
        metavar="FILE",
        help='JSON: a list of {"class": number or name, "box": [x, y, width, height]}, in shares of the picture\'s '
        "sides; or several such lists",
    )
    one.add_argument(
        "--segmentation",
        type=user_path,
        metavar="FILE",
        help="a picture with class numbers as grey levels, or a .npy file of them; it gives the size",
    )
    group.add_argument("--categories", type=user_path, metavar="FILE", help="class names for --layout, one a line")
    group.add_argument(
        "--null_class",
        type=number(int, 0),
        metavar="NUMBER",
        help="the class that means none, which --scale leads away from (default: if the model says it)",
    )


def read_conditions(args: argparse.Namespace) -> Any:
    """What the file of --layout or --segmentation holds, None without. Raises ValueError for options of no effect."""
    from ldm.data.layouts import read_layouts
    from ldm.data.segmentation import read_segmentation

    for name, needed in (("categories", "layout"), ("null_class", "classes")):
        if getattr(args, name) is not None and getattr(args, needed) is None:
            raise ValueError(f"--{name} has no effect without --{needed}: leave it out")
    if args.layout is not None:
        return read_layouts(args.layout, args.categories)
    return None if args.segmentation is None else read_segmentation(args.segmentation)


def conditions_for(model: LatentDiffusion, args: argparse.Namespace, read: Any) -> Conditions:
    """What the options have `model` draw under. read: what `read_conditions` gave.

    Raises ValueError if the model draws from something else, or cannot take them.
    """
    from ldm import inference
    from ldm.inference.conditioning import CLASSES, LAYOUT, NOTHING, SEGMENTATION, require

    flags = {CLASSES: "classes", LAYOUT: "layout", SEGMENTATION: "segmentation"}
    task = require(model, NOTHING, *flags)
    wanted = flags.get(task)
    given = next((flag for flag in flags.values() if getattr(args, flag) is not None), None)
    if given != wanted:
        use = f"leave --{given} out" if wanted is None else f"use --{wanted}" + (f", not --{given}" if given else "")
        path, family = model.info.checkpoint_path, model.info.family
        raise ValueError(f"{path} is {family}, which draws from {task.draws_from}: {use}")
    if wanted == "classes":
        return _classes(model, args)
    if wanted == "layout":
        tokens, name = inference.layout_tokens(model, read), args.layout
        return Conditions(
            len(tokens),
            lambda numbers, **options: inference.layout2img(model, tokens[list(numbers)], **options),
            lambda number: {"layout": name, "layout_number": number},
        )
    if wanted == "segmentation":
        return Conditions(
            1,
            lambda numbers, **options: inference.segmentation2img(model, read, len(numbers), **options),
            lambda number: {"segmentation": args.segmentation},
        )
    return Conditions(1, lambda numbers, **options: inference.noise2img(model, len(numbers), **options), lambda _: {})


def _classes(model: LatentDiffusion, args: argparse.Namespace) -> Conditions:
    from ldm import inference

    inference.check_labels(model, args.classes)
    guidance = {"scale": args.scale, "null_class": args.null_class}

    def draw(numbers: Sequence[int], **options: Any) -> list[Image.Image]:
        return inference.class2img(model, [args.classes[number] for number in numbers], **guidance, **options)

    none = {} if args.null_class is None else {"null_class": args.null_class}
    return Conditions(
        len(args.classes), draw, lambda number: {"class": args.classes[number], "scale": args.scale, **none}
    )
