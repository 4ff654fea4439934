"""Options of the scripts, in groups that a script puts together, and what follows from them."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from ldm.cli import sampling
from ldm.devices import DEVICES, PRECISIONS
from ldm.trust import trust

PROMPT = "a painting of a virus monster playing guitar"
MAX_SEED = 2**32 - 1  # what numpy takes, and what the public scripts' seed_everything allowed


class ArgumentParser(argparse.ArgumentParser):
    """An argparse parser that takes "-" and "_" in option names as the same, and reports errors in one line."""

    def parse_known_args(  # type: ignore[override]  # argparse's overloads say the same
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        """argparse's, after every option is spelt as it was declared."""
        args = sys.argv[1:] if args is None else args
        return super().parse_known_args([self._spelling(arg) for arg in args], namespace)

    def _spelling(self, arg: str) -> str:
        name, equals, value = arg.partition("=")
        known = {option.replace("-", "_"): option for option in self._option_string_actions}
        return known.get(name.replace("-", "_"), name) + equals + value if name.startswith("--") else arg

    def error(self, message: str) -> NoReturn:
        """Leave with `message` and exit code 2, without the usage, which may be pages long."""
        self.exit(2, f"error: {message} (see --help)\n")


def number(kind: type, low: float = -math.inf, high: float = math.inf) -> Callable[[str], Any]:
    """An argparse `type` for a finite number of `kind` (int or float) from `low` to `high`."""
    span = f" from {low} to {high}" if high < math.inf else f" of at least {low}" if low > -math.inf else ""
    wanted = ("a whole number" if kind is int else "a number") + span

    def _parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or value in (math.inf, -math.inf):
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return value

    return _parse


def user_path(text: str) -> str:
    """An argparse `type` for files and folders: `~` is the home folder, even in `--option=~/x`."""
    if not text:
        raise argparse.ArgumentTypeError("an empty path")
    return os.path.expanduser(text)


def add_prompt(parser: ArgumentParser, negative: bool = True) -> None:
    """--prompt, --from-file and how often to use its lines; --negative_prompt unless the model takes none."""
    group = parser.add_argument_group("what to draw")
    group.add_argument("--prompt", default=PROMPT, help="what the picture shows (%(default)s)")
    if negative:
        group.add_argument("--negative_prompt", default="", help="what the picture should not show")
    group.add_argument(
        "--from-file",
        type=user_path,
        metavar="FILE",
        help="read prompts from a text file, one a line; empty ones count",
    )
    group.add_argument(
        "--repeat",
        type=number(int, 1),
        default=1,
        help="use each line of --from-file, or of what --matrix makes, this often (%(default)s)",
    )
    group.add_argument(
        "--matrix", action="store_true", help="of {a|b} in prompts draw both, of several such all combinations"
    )


def add_reading(parser: ArgumentParser) -> None:
    """How to read prompts, if not as published: --emphasis, --long_prompt, --clip_skip."""
    group = parser.add_argument_group("how to read prompts")
    group.add_argument(
        "--emphasis", action="store_true", help="weigh words: (word:1.2), (word) is 1.1, [word] 1/1.1; \\( is literal"
    )
    group.add_argument(
        "--long_prompt",
        action="store_true",
        help="read what exceeds the encoder's length in chunks, and cut off nothing",
    )
    group.add_argument(
        "--clip_skip", type=number(int, 1), default=1, metavar="N", help="CLIP's layer, the N-th last (%(default)s)"
    )


def add_amount(parser: ArgumentParser, n_samples: int, n_iter: int | None = None) -> None:
    """--n_samples, --seed, and --n_iter unless None."""
    group = parser.add_argument_group("how many")
    count = number(int, 1)
    group.add_argument("--n_samples", type=count, default=n_samples, help="pictures in a batch (%(default)s)")
    if n_iter is not None:
        group.add_argument(
            "--n_iter", type=count, default=n_iter, help="how often to go through all prompts (%(default)s)"
        )
    group.add_argument(
        "--seed", type=number(int, 0, MAX_SEED), default=42, help="start of the random numbers (%(default)s)"
    )


def add_size(parser: ArgumentParser) -> None:
    """--H, --W, and --tile."""
    group = parser.add_argument_group("how large")
    group.add_argument("--H", type=number(int, 1), metavar="PIXELS", help="height of the pictures")
    group.add_argument("--W", type=number(int, 1), metavar="PIXELS", help="width of the pictures")
    add_tile(
        group,
        "that the first stage encodes or decodes at once: larger pictures go through it in overlapping tiles, which "
        "bounds memory and changes them, the more the smaller the tiles are; 0: never (%(default)s)",
        dest="first_stage_tile",
        default=0,
    )


def add_tile(parser: argparse._ActionsContainer, what: str, **options: Any) -> None:
    """--tile, the longest side of `what`, in words; `options` are further ones of `add_argument`."""
    parser.add_argument("--tile", type=number(int, 0), metavar="PIXELS", help=f"longest side {what}", **options)


def add_sampler(
    parser: ArgumentParser,
    scale: float,
    steps: int = 50,
    eta: float = 0.0,
    also: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """The sampler, its steps and noise, and guidance; `scale` and `steps` are for models that name none of their own.

    also: further spellings of --ddim_steps and --ddim_eta in a public script, {"ddim_steps": ["-c"], ...}.
    """
    group, also = parser.add_argument_group("how to sample"), also or {}
    group.add_argument(
        "--ddim_steps",
        "--steps",
        *also.get("ddim_steps", ()),
        type=number(int, 1, 1000),
        help=f"steps of any sampler (the model's own, else {steps})",
    )
    names = ", ".join(sampling.sampler_names())
    group.add_argument("--sampler", metavar="NAME", help=f"one of {names} (the model's own, else ddim)")
    group.add_argument("--ddim", action="store_true", help="the same as --sampler ddim")
    group.add_argument("--plms", action="store_true", help="the same as --sampler plms")
    group.add_argument("--dpm_solver", "--dpm", action="store_true", help="DPM-Solver++ (2M); wins over --plms, --ddim")
    group.add_argument(
        "--ddim_eta",
        *also.get("ddim_eta", ()),
        type=number(float, 0),
        help=f"noise of each DDIM step, 0 for none ({eta:g}); more than 0 means DDIM",
    )
    group.add_argument(
        "--schedule",
        type=sampling.schedule,
        metavar="NAME",
        help=f"where the steps lie: {', '.join(sampling.SCHEDULES)}, or timesteps such as 999,850,700 (the "
        "model's own, else the sampler's)",
    )
    _add_guidance(parser, scale)
    parser.set_defaults(public_scale=scale, public_steps=steps, public_eta=eta)


def _add_guidance(parser: ArgumentParser, scale: float) -> None:
    group = parser.add_argument_group("guidance")
    group.add_argument(
        "--scale", type=number(float), help=f"guidance scale, 1 for no guidance (the model's own, else {scale:g})"
    )
    group.add_argument(
        "--scale_schedule",
        type=sampling.numbers,
        metavar="SCALES",
        help="several scales, gone through evenly from the first step to the last: 9,3 falls from 9 to 3",
    )
    group.add_argument(
        "--guidance",
        type=sampling.term,
        action="append",
        metavar="NAME=STRENGTH",
        help=f"what else guides, as often as you like: {', '.join(sampling.term_names())}; rescale=0.7 against "
        "overexposure, threshold=0.995 against saturation, pag=3 for form",
    )
    group.add_argument(
        "--guidance_interval",
        type=number(float, 0),
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="guide only where there is so much noise, in sigma",
    )
    group.add_argument("--cfg_pp", action="store_true", help="CFG++: --scale is from 0 to 1 (0.6)")


def add_model(parser: ArgumentParser, default: str = "Stable Diffusion v1 if present, else the bundled model") -> None:
    """--ckpt, --verify, --config, --device, --precision. default: in words, what serves without --ckpt."""
    group = parser.add_argument_group("the model")
    group.add_argument("--ckpt", type=user_path, metavar="FILE", help=f".ckpt or .safetensors ({default})")
    group.add_argument(
        "--verify",
        action="store_true",
        help="read all of the checkpoint first, and compare it with its checksums: those inside, and FILE.sha256",
    )
    group.add_argument(
        "--config", type=user_path, metavar="FILE", help="YAML file of the model (default: found from the checkpoint)"
    )
    add_trust(group)
    group.add_argument("--device", choices=DEVICES, default="auto", help="where to compute (%(default)s)")
    group.add_argument(
        "--precision", choices=PRECISIONS, default="autocast", help="(%(default)s; on a CPU that is full)"
    )
    group.add_argument("--bf16", dest="precision", action="store_const", const="bf16", help="same as --precision bf16")


def add_trust(parser: argparse._ActionsContainer) -> None:
    """--trust-config, which counts as soon as it is read: whatever is built later may use what it names."""
    parser.add_argument(
        "--trust-config",
        action=_Trust,
        metavar="PREFIX",
        help="let configs call what this module or package defines, as often as you like (ldm, torch.nn, torch.optim "
        "and Lightning's callbacks): a config runs whatever it names",
    )


class _Trust(argparse.Action):
    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        try:
            trust(values)
        except ValueError as error:
            raise argparse.ArgumentError(self, str(error)) from None
        setattr(namespace, self.dest, [*(getattr(namespace, self.dest) or ()), values])


def add_clip(parser: ArgumentParser) -> None:
    """--clip."""
    parser.add_argument(
        "--clip",
        "--clip_type",
        type=user_path,
        default="ViT-L/14",
        metavar="FOLDER",
        help="a folder with a CLIP as transformers reads it; %(default)s is looked for at its usual places",
    )


def add_output(parser: ArgumentParser, outdir: str) -> None:
    """--outdir, what to write there, and whether to say how it was made: what `SampleWriter` goes by."""
    group = parser.add_argument_group("the output")
    group.add_argument(
        "--outdir", type=user_path, default=outdir, metavar="FOLDER", help="where to write (%(default)s)"
    )
    group.add_argument("--skip_save", action="store_true", help="do not write the single pictures")
    group.add_argument("--skip_grid", action="store_true", help="do not write the grid of all pictures")
    group.add_argument(
        "--n_rows", type=number(int, 0), default=0, help="pictures in a row of the grid (as --n_samples)"
    )
    group.add_argument("--no_metadata", action="store_true", help="leave prompt and settings out of the PNG files")


def sampling_parser(description: str, scale: float, outdir: str, n_iter: int, n_samples: int) -> ArgumentParser:
    """A parser with the options that txt2img and img2img share, under the names of the public scripts.

    The others are the defaults in which the scripts differ.
    """
    parser = ArgumentParser(description=description)
    add_prompt(parser)
    add_reading(parser)
    add_amount(parser, n_samples, n_iter)
    add_size(parser)
    add_sampler(parser, scale)
    parser.add_argument("--fixed_code", action="store_true", help="start every batch from the same noise (txt2img)")
    add_model(parser)
    parser.add_argument(
        "--C", type=number(int, 1), metavar="CHANNELS", help="latent channels, if you want them checked"
    )
    parser.add_argument(
        "--f", type=number(int, 1), metavar="FACTOR", help="downsampling factor, if you want it checked"
    )
    add_output(parser, outdir)
    return parser


def parse(parser: ArgumentParser, argv: Sequence[str] | None, *, with_settings: bool = False) -> argparse.Namespace:
    """The options in `argv` (None: the command line), with those of `add_sampler` settled (see `sampling.settle`).

    with_settings: what else there is, pairs such as `model.params.x=1`, becomes `args.settings`. Exits as argparse does
    on options that it refuses. Raises ValueError for options that do not go together.
    """
    args, rest = parser.parse_known_args(argv)
    unknown = [text for text in rest if not (with_settings and is_setting(text))]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    args.settings = rest
    sampling.settle(args)
    return args


def is_setting(text: str) -> bool:
    """Whether `text` is like `key.sub=value`, and not an option."""
    key, equals, _ = text.partition("=")
    return bool(equals and key) and not text.startswith("-")


def reading_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_reading` that were asked for: `inference.PromptOptions(**these)`, and for metadata."""
    defaults = {"emphasis": False, "long_prompt": False, "clip_skip": 1}
    return {name: getattr(args, name) for name, default in defaults.items() if getattr(args, name) != default}


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_sampler`, and the negative prompt if there is one, as `ldm.inference` takes them."""
    text = {"negative_prompt": args.negative_prompt} if hasattr(args, "negative_prompt") else {}
    settled = {"steps": args.ddim_steps, "sampler": args.sampler, "eta": args.ddim_eta, "scale": args.scale}
    chosen = {"schedule": args.schedule, "guidance": sampling.guidance_options(args)}
    return text | settled | {name: value for name, value in chosen.items() if value}


def sampling_metadata(args: argparse.Namespace) -> dict[str, Any]:
    """The same for a picture's metadata: in the names of the options, and without an eta that no sampler saw."""
    options = {name: value for name, value in sampling_options(args).items() if name != "guidance"}
    if args.sampler != "ddim" and not args.ddim_eta:
        del options["eta"]
    tile = getattr(args, "first_stage_tile", 0)
    return options | sampling.chosen(args) | ({"tile": tile} if tile else {})
