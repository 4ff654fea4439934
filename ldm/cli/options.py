"""Command-line options of the scripts, in groups that a script puts together, and what they mean together."""

from __future__ import annotations

import argparse
import logging
import math
import os
import random
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from ldm.devices import DEVICES, PRECISIONS
from ldm.distributed import environment
from ldm.trust import trust
from ldm.util import suggestion

if TYPE_CHECKING:
    from ldm.inference import AccelerationOptions, SamplingOptions

logger = logging.getLogger(__name__)

UNRECOGNIZED = "unrecognized arguments: "  # argparse's words
PROMPT = "a painting of a virus monster playing guitar"
MAX_SEED = 2**32 - 1  # the limit of numpy, and of the public scripts' seed_everything
RANDOM_SEED = -1

# Names for --help, which does not wait for torch; a test compares them with the registries.
SAMPLERS = (
    *("ddim", "plms", "dpm_solver", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_2s", "dpmpp_3m", "euler", "euler_a", "heun"),
    *("dpm2", "lms", "unipc", "ddpm"),
)
BATCH_AND_SEED, SIZE, MODEL, OUTPUT = "batch and seed", "size", "model", "output"  # titles of groups
TERMS = ("pag", "rescale", "threshold")
SCHEDULES = ("uniform", "quad", "even", "leading", "trailing", "karras", "exponential")


class ArgumentParser(argparse.ArgumentParser):
    """An argparse parser that takes "-" and "_" in option names as the same, and reports errors in one line.

    Options cannot be abbreviated, so that a new option never changes what an old command means.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def parse_known_args(  # type: ignore[override]  # argparse's overloads say the same
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        """As argparse does, after spelling every option as it was declared."""
        args = sys.argv[1:] if args is None else args
        return super().parse_known_args([self._spelling(arg) for arg in args], namespace)

    def _spelling(self, arg: str) -> str:
        name, equals, value = arg.partition("=")
        known = {option.replace("-", "_"): option for option in self._option_string_actions}
        return known.get(name.replace("-", "_"), name) + equals + value if name.startswith("--") else arg

    def error(self, message: str) -> NoReturn:
        """Exit with `message` and code 2, without the usage, which may be pages long; suggest known options."""
        known = [option[2:] for option in self._option_string_actions if option.startswith("--")]
        if message.startswith(UNRECOGNIZED):
            for word in message.removeprefix(UNRECOGNIZED).split():
                meant = suggestion(word[2:].partition("=")[0].replace("-", "_"), known) if word[:2] == "--" else None
                message += f"; did you mean --{meant} for {word}?" if meant else ""
        self.exit(2, f"error: {message} (see --help)\n")


# ---- types of options ----


def number(kind: type, low: float = -math.inf, high: float = math.inf) -> Callable[[str], Any]:
    """An argparse `type` for a finite number of `kind` (int or float) from `low` to `high`."""
    span = f" from {low} to {high}" if high < math.inf else f" of at least {low}" if low > -math.inf else ""
    wanted = ("an integer" if kind is int else "a finite number") + span

    def _parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or value in (math.inf, -math.inf):
            raise argparse.ArgumentTypeError(f"must be {wanted}, not {text!r}")
        return value

    return _parse


def seed_number(text: str) -> int:
    """An argparse `type` for a seed; -1 is `RANDOM_SEED`, which `parse` replaces."""
    seed: int = RANDOM_SEED if text == str(RANDOM_SEED) else number(int, 0, MAX_SEED)(text)
    return seed


def user_path(text: str) -> str:
    """An argparse `type` for files and folders: `~` is the home folder, even in `--option=~/x`."""
    if not text:
        raise argparse.ArgumentTypeError("an empty path")
    return os.path.expanduser(text)


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


class _Trust(argparse.Action):
    """Trusts a prefix as soon as it is read, because whatever is built later may use it."""

    def __call__(self, parser: Any, namespace: Namespace, values: Any, option_string: Any = None) -> None:
        try:
            trust(values)
        except ValueError as error:
            raise argparse.ArgumentError(self, str(error)) from None
        setattr(namespace, self.dest, [*(getattr(namespace, self.dest) or ()), values])


# ---- groups ----


def _group(parser: ArgumentParser, title: str) -> argparse._ArgumentGroup:
    """The group of this title; several functions add to one."""
    found = next((group for group in parser._action_groups if group.title == title), None)
    return found or parser.add_argument_group(title)


def add_prompt(parser: ArgumentParser, negative: bool = True, default: str = PROMPT) -> None:
    """--prompt, --from-file, --repeat, --matrix; --negative_prompt unless the model takes none."""
    group = parser.add_argument_group("prompts")
    shown = default or "none"
    group.add_argument("--prompt", default=default, help=f"what the image shows (default: {shown})")
    if negative:
        group.add_argument(
            "--negative_prompt", default="", help="what the image should not show (default: nothing in particular)"
        )
    group.add_argument(
        "--from-file",
        type=user_path,
        metavar="FILE",
        help="read prompts from a text file, one per line; empty lines are empty prompts",
    )
    group.add_argument(
        "--repeat",
        type=number(int, 1),
        default=1,
        help="use each line of --from-file, or each prompt of --matrix, this often (default: %(default)s)",
    )
    group.add_argument(
        "--matrix", action="store_true", help="generate all combinations of the alternatives {a|b} in prompts"
    )


def add_prompt_options(parser: ArgumentParser) -> None:
    """--emphasis, --long_prompt, --clip_skip."""
    group = _group(parser, "prompt encoding")
    group.add_argument(
        "--emphasis", action="store_true", help="weight words: (word:1.2), (word) is 1.1, [word] 1/1.1; \\( is literal"
    )
    group.add_argument(
        "--long_prompt",
        action="store_true",
        help="encode prompts beyond the encoder's length in several chunks instead of cutting them off",
    )
    group.add_argument(
        "--clip_skip",
        type=number(int, 1),
        default=1,
        metavar="N",
        help="use the N-th CLIP layer from the end (default: %(default)s)",
    )


def add_amount(parser: ArgumentParser, n_samples: int, n_iter: int | None = None) -> None:
    """--n_samples, --seed, and --n_iter unless None."""
    group = _group(parser, BATCH_AND_SEED)
    count = number(int, 1)
    group.add_argument("--n_samples", type=count, default=n_samples, help="images per batch (default: %(default)s)")
    if n_iter is not None:
        group.add_argument(
            "--n_iter", type=count, default=n_iter, help="how often to go through all prompts (default: %(default)s)"
        )
    add_seed(group)


def add_seed(group: argparse._ActionsContainer) -> None:
    """--seed."""
    help_text = "random seed; -1 chooses one, and reports it (default: %(default)s)"
    group.add_argument("--seed", type=seed_number, default=42, help=help_text)


def add_size(parser: ArgumentParser) -> None:
    """--H, --W, and --tile."""
    group = _group(parser, SIZE)
    group.add_argument("--H", "--height", type=number(int, 1), metavar="PIXELS", help="image height")
    group.add_argument("--W", "--width", type=number(int, 1), metavar="PIXELS", help="image width")
    add_tile(
        group,
        "VAE tiling: encode and decode larger images in overlapping tiles of at most this longest side, which "
        "bounds memory and changes images, the more the smaller the tiles are; 0: never (default: %(default)s)",
        dest="first_stage_tile",
        default=0,
    )


def add_tile(parser: argparse._ActionsContainer, what: str, **options: Any) -> None:
    """--tile, with `what` it does as its help; `options` are further ones of `add_argument`."""
    parser.add_argument("--tile", type=number(int, 0), metavar="PIXELS", help=what, **options)


def add_sampler(
    parser: ArgumentParser,
    scale: float,
    steps: int = 50,
    eta: float = 0.0,
    also: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """The sampler, its steps and noise, and guidance; `scale` and `steps` are for models without their own.

    also: further spellings of --ddim_steps and --ddim_eta in a public script, {"ddim_steps": ["-c"], ...}.
    """
    group, also = parser.add_argument_group("sampling"), also or {}
    group.add_argument(
        "--ddim_steps",
        "--steps",
        *also.get("ddim_steps", ()),
        type=number(int, 1, 1000),
        help=f"number of steps, of any sampler (default: the model's own, else {steps})",
    )
    group.add_argument(
        "--sampler", metavar="NAME", help=f"one of {', '.join(SAMPLERS)} (default: the model's own, else ddim)"
    )
    group.add_argument("--ddim", action="store_true", help="the same as --sampler ddim")
    group.add_argument("--plms", action="store_true", help="the same as --sampler plms")
    group.add_argument(
        "--dpm_solver", "--dpm", action="store_true", help="DPM-Solver++ (2M); takes precedence over --plms and --ddim"
    )
    group.add_argument(
        "--ddim_eta",
        *also.get("ddim_eta", ()),
        type=number(float, 0),
        help=f"noise of each DDIM step, 0 for none ({eta:g}); more than 0 selects DDIM",
    )
    group.add_argument(
        "--schedule",
        type=schedule,
        metavar="NAME",
        help=f"placement of the steps: {', '.join(SCHEDULES)}, or timesteps such as 999,850,700 (default: the model's "
        "own, else the sampler's)",
    )
    _add_guidance(parser, scale)
    parser.set_defaults(public_scale=scale, public_steps=steps, public_eta=eta)


def _add_guidance(parser: ArgumentParser, scale: float) -> None:
    group = parser.add_argument_group("guidance")
    group.add_argument(
        "--scale",
        "--cfg",
        type=number(float),
        help=f"guidance scale, 1 for no guidance (default: the model's own, else {scale:g})",
    )
    group.add_argument(
        "--scale_schedule",
        type=numbers,
        metavar="SCALES",
        help="several scales, interpolated over the steps: 9,3 falls from 9 to 3",
    )
    group.add_argument(
        "--guidance",
        type=term,
        action="append",
        metavar="NAME=STRENGTH",
        help=f"further guidance terms, repeatable: {', '.join(TERMS)}; rescale=0.7 against overexposure, "
        "threshold=0.995 against saturation, pag=3 for form",
    )
    group.add_argument(
        "--guidance_interval",
        type=number(float, 0),
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="apply guidance only while LOW < sigma <= HIGH",
    )
    group.add_argument("--cfg_pp", action="store_true", help="CFG++: --scale is from 0 to 1 (default: 0.6)")


def add_model(parser: ArgumentParser, default: str = "Stable Diffusion v1 if present, else the bundled model") -> None:
    """--ckpt, --verify, --config, --device, --precision. default: in words, the model without --ckpt."""
    group = _group(parser, MODEL)
    group.add_argument("--ckpt", type=user_path, metavar="FILE", help=f".ckpt or .safetensors ({default})")
    group.add_argument(
        "--verify",
        action="store_true",
        help="read the complete checkpoint first, and compare it with its checksums: those inside, and FILE.sha256",
    )
    group.add_argument(
        "--config",
        type=user_path,
        metavar="FILE",
        help="YAML file of the model (default: detected from the checkpoint)",
    )
    add_trust(group)
    group.add_argument("--device", choices=DEVICES, default="auto", help="where to compute (default: %(default)s)")
    group.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="autocast",
        help="full (float32), autocast (mixed precision), fp16 or bf16 weights (default: %(default)s; on a CPU "
        "autocast means full)",
    )
    group.add_argument("--bf16", dest="precision", action="store_const", const="bf16", help="same as --precision bf16")


def add_trust(parser: argparse._ActionsContainer) -> None:
    """--trust-config."""
    parser.add_argument(
        "--trust-config",
        action=_Trust,
        metavar="PREFIX",
        help="let configs call what this module or package defines, repeatable (ldm, torch.nn, torch.optim and "
        "Lightning's callbacks are trusted): a config runs whatever it names",
    )


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


def add_speed(parser: ArgumentParser) -> None:
    """--cache_features, --merge_tokens, --quantize, --compile, --lowvram."""
    group = _group(parser, "acceleration that changes the image")
    group.add_argument(
        "--cache_features",
        type=number(int, 1),
        default=1,
        metavar="N",
        help="recompute deep UNet blocks every N steps (DeepCache; default: %(default)s, every step)",
    )
    group.add_argument(
        "--merge_tokens",
        type=number(float, 0, 0.75),
        default=0.0,
        metavar="RATIO",
        help="merge this fraction of similar tokens in self-attention at the highest resolution (ToMe); 0.5 is usual "
        "(default: %(default)g)",
    )
    group.add_argument(
        "--quantize", choices=("int8",), help="int8 linear and convolution layers (CPU with AVX512-VNNI)"
    )
    group = _group(parser, MODEL)
    group.add_argument(
        "--compile",
        action="store_true",
        help="compile the network for a GPU: some minutes at the first run, cached on disk; no effect on a CPU",
    )
    group.add_argument(
        "--lowvram",
        action="store_true",
        help="for GPUs with little memory: offload parts of the model to the CPU while they are not used, and run "
        "guidance sequentially; slower, same images; best with --precision fp16",
    )


def add_seeds(parser: ArgumentParser) -> None:
    """--seed_mode, --noise_device, --variation_seed, --variation_strength."""
    group = _group(parser, BATCH_AND_SEED)
    group.add_argument(
        "--seed_mode",
        choices=("batch", "image"),
        default="batch",
        help="batch: the images of a batch share a seed, as published; image: image i has the seed --seed + i, and is "
        "the same alone or in any batch, on any device (default: %(default)s)",
    )
    group.add_argument(
        "--noise_device",
        choices=("model", "cpu"),
        default="model",
        help="where --seed_mode batch generates noise: cpu gives every device the same (default: %(default)s)",
    )
    group.add_argument(
        "--variation_seed",
        type=number(int, 0, MAX_SEED),
        default=0,
        help="with --variation_strength: image i varies towards the noise of this + i (default: %(default)s); with "
        "--seed_mode image all of them vary --seed itself",
    )
    group.add_argument(
        "--variation_strength",
        type=number(float, 0, 1),
        default=0.0,
        metavar="RATIO",
        help="how far: 0 is the noise of --seed, 1 that of the variation seed (default: %(default)s)",
    )


def add_tiling(parser: ArgumentParser) -> None:
    """--tiling."""
    _group(parser, SIZE).add_argument(
        "--tiling",
        nargs="?",
        const="both",
        choices=("x", "y", "both"),
        help="seamless texture: images repeat along x, y or (without a value) both",
    )


def add_preview(parser: ArgumentParser) -> None:
    """--preview."""
    _group(parser, OUTPUT).add_argument(
        "--preview",
        type=number(int, 1),
        metavar="N",
        help="every N steps write a rough preview to <outdir>/preview.png, replacing the one before",
    )


def add_resume(parser: ArgumentParser) -> None:
    """--resume."""
    _group(parser, OUTPUT).add_argument(
        "--resume",
        action="store_true",
        help="record images in <outdir>/manifest.jsonl, and generate only those missing there for the same prompts, "
        "seeds and options: give it from the start, and again to resume a run that was stopped",
    )


def add_output(parser: ArgumentParser, outdir: str) -> None:
    """--outdir, what to write there, and whether to write metadata (see `SampleWriter`)."""
    group = _group(parser, OUTPUT)
    group.add_argument(
        "--outdir", type=user_path, default=outdir, metavar="FOLDER", help="where to write (default: %(default)s)"
    )
    group.add_argument("--skip_save", action="store_true", help="do not write the single images")
    group.add_argument("--skip_grid", action="store_true", help="do not write the grid of all images")
    group.add_argument("--n_rows", type=number(int, 0), default=0, help="images per row of the grid (as --n_samples)")
    group.add_argument("--no_metadata", action="store_true", help="leave prompt and settings out of the PNG files")


def sampling_parser(description: str, scale: float, outdir: str, n_iter: int, n_samples: int) -> ArgumentParser:
    """A parser with the options that txt2img and img2img share, under the names of the public scripts.

    The other arguments are the defaults in which the scripts differ.
    """
    parser = ArgumentParser(description=description)
    add_prompt(parser)
    add_prompt_options(parser)
    add_amount(parser, n_samples, n_iter)
    add_size(parser)
    add_sampler(parser, scale)
    fixed = "start every batch from the same noise (txt2img)"
    _group(parser, BATCH_AND_SEED).add_argument("--fixed_code", action="store_true", help=fixed)
    add_model(parser)
    for flag, metavar, what in (("--C", "CHANNELS", "latent channels"), ("--f", "FACTOR", "downsampling factor")):
        help_text = f"{what}; error if the model's differ"
        _group(parser, MODEL).add_argument(flag, type=number(int, 1), metavar=metavar, help=help_text)
    add_output(parser, outdir)
    for add in (add_speed, add_seeds, add_tiling, add_preview, add_resume):
        add(parser)
    return parser


# ---- parsing ----


def parse(parser: ArgumentParser, argv: Sequence[str] | None, *, with_settings: bool = False) -> Namespace:
    """Parse `argv` (None: the command line), and resolve options that depend on each other.

    Afterwards `args.sampler` is one name or None (the model's own), `args.scale` one scale or several, `args.guidance`
    a dict, and `args.ddim_eta` a number.

    Args:
        parser: The script's parser.
        argv: Arguments.
        with_settings: Collect other arguments of the form `model.params.x=1` in `args.settings`.

    Raises:
        ValueError: for options that do not go together, before a model is loaded.
    """
    args, rest = parser.parse_known_args(argv)
    unknown = [text for text in rest if not (with_settings and is_setting(text))]
    if unknown:
        parser.error(UNRECOGNIZED + " ".join(unknown))
    args.settings = rest
    if getattr(args, "resume", None) is True and args.skip_save:
        raise ValueError("--resume needs the images that were saved: leave --skip_save out")
    _choose_seed(args)
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
    eta, args.ddim_eta = args.ddim_eta, args.ddim_eta or 0.0
    _check(args)
    if eta is None and args.sampler in (None, "ddim"):
        args.ddim_eta = args.public_eta
    return args


def is_setting(text: str) -> bool:
    """Whether `text` is like `key.sub=value`, and not an option."""
    key, equals, _ = text.partition("=")
    return bool(equals and key) and not text.startswith("-")


def _choose_seed(args: Namespace) -> None:
    """Replace --seed -1 by a random seed, and report it."""
    if getattr(args, "seed", None) != RANDOM_SEED:
        return
    if getattr(args, "resume", None) is True:
        raise ValueError("--resume needs the seed of the run to resume: give the one that it reported, not --seed -1")
    if environment()[1] > 1:
        raise ValueError("several processes need the same seed: give one, not --seed -1")
    args.seed = random.SystemRandom().randrange(MAX_SEED + 1)
    logger.info("Seed: %d", args.seed)


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
    """Raise ValueError for unknown names and for combinations without meaning; torch is imported only for those."""
    guided = args.guidance or args.guidance_interval or args.cfg_pp
    if args.sampler in (None, "ddim") and args.schedule is None and not guided:
        return
    from ldm.models.diffusion.sampler import cfg_pp_samplers
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
            raise ValueError(f"--cfg_pp is for the samplers {', '.join(cfg_pp_samplers())}, not for {args.sampler}")
    options = sampling_options(args)
    if args.scale is not None or args.public_scale != 1 or args.cfg_pp:  # else the model may have a scale of its own
        options = options.resolve(default_scale=args.public_scale)
        options.guidance  # noqa: B018  # raises for what does not go together


# ---- to the records of the library ----


def sampling_options(args: Namespace) -> SamplingOptions:
    """The `SamplingOptions` of a command line, without the model's defaults (see `Pipeline.resolve`)."""
    from ldm.inference import SamplingOptions

    renamed = {"ddim_steps": "steps", "ddim_eta": "eta", "guidance": "terms", "guidance_interval": "interval"}
    renamed |= {"H": "height", "W": "width"}
    same = ("sampler", "scale", "schedule", "cfg_pp", "negative_prompt", "emphasis", "long_prompt", "clip_skip")
    seeds = ("seed", "seed_mode", "noise_device", "variation_seed", "variation_strength", "fixed_code")
    names = renamed | {name: name for name in (*same, *seeds, "tiling")}
    given = {field: getattr(args, name) for name, field in names.items() if hasattr(args, name)}
    return SamplingOptions.of(acceleration=acceleration_options(args), **given)


def acceleration_options(args: Namespace) -> AccelerationOptions:
    """The `AccelerationOptions` of `add_speed`."""
    from ldm.inference import AccelerationOptions

    names = ("cache_features", "merge_tokens", "quantize")
    return AccelerationOptions(**{name: getattr(args, name) for name in names if hasattr(args, name)})
