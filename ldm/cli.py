"""What the scripts share: options, the choice of device and precision, saving, and the reporting of errors.

Nothing heavy is imported until it is needed, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from ldm import __version__
from ldm.devices import DEVICES, PRECISIONS
from ldm.processes import ALONE, Processes, environment

if TYPE_CHECKING:
    from PIL import Image

    from ldm.models.diffusion.ddpm import LatentDiffusion

logger = logging.getLogger(__name__)

PROMPT = "a painting of a virus monster playing guitar"
FAREWELL = "Your samples are ready and waiting for you here: \n{} \n \nEnjoy."
SAMPLE_NAME = "{:05}.png"
MAX_SEED = 2**32 - 1  # what numpy takes, and what the public scripts' seed_everything allowed


# ------------------------------------------------------------------------------------------------------------ options


class ArgumentParser(argparse.ArgumentParser):
    """An argparse parser that takes "-" and "_" in option names as the same, and reports errors in one line."""

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        args = sys.argv[1:] if args is None else args
        return super().parse_known_args([self._spelling(arg) for arg in args], namespace)

    def _spelling(self, arg: str) -> str:
        name, equals, value = arg.partition("=")
        known = {option.replace("-", "_"): option for option in self._option_string_actions}
        return known.get(name.replace("-", "_"), name) + equals + value if name.startswith("--") else arg

    def error(self, message: str) -> NoReturn:
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


def sampling_parser(description: str, scale: float, **defaults: Any) -> ArgumentParser:
    """A parser with the options that txt2img and img2img share, under the names of the public scripts.

    `scale` is the public script's, for models that name none of their own. `defaults` are the others in which the
    scripts differ: outdir, n_iter, n_samples.
    """
    parser = ArgumentParser(description=description)
    count = number(int, 1)

    what = parser.add_argument_group("what to draw")
    what.add_argument("--prompt", default=PROMPT, help="what the picture shows (%(default)s)")
    what.add_argument("--negative_prompt", default="", help="what the picture should not show")
    what.add_argument(
        "--from-file",
        type=user_path,
        metavar="FILE",
        help="read prompts from a text file, one a line; empty ones count",
    )
    what.add_argument("--repeat", type=count, default=1, help="use each line of --from-file this often (%(default)s)")
    what.add_argument("--n_samples", type=count, help="pictures in a batch (%(default)s)")
    what.add_argument("--n_iter", type=count, help="how often to go through all prompts (%(default)s)")
    what.add_argument("--H", type=count, metavar="PIXELS", help="height of the pictures")
    what.add_argument("--W", type=count, metavar="PIXELS", help="width of the pictures")
    what.add_argument(
        "--seed", type=number(int, 0, MAX_SEED), default=42, help="start of the random numbers (%(default)s)"
    )

    how = parser.add_argument_group("how to sample")
    how.add_argument(
        "--ddim_steps",
        "--steps",
        type=number(int, 1, 1000),
        help="steps of any sampler (the model's own, else 50)",
    )
    how.add_argument("--ddim", action="store_true", help="use the DDIM sampler (the model's own, else DDIM)")
    how.add_argument("--plms", action="store_true", help="use the PLMS sampler")
    how.add_argument("--dpm_solver", "--dpm", action="store_true", help="use DPM-Solver++ (2M); wins over the others")
    how.add_argument(
        "--ddim_eta",
        type=number(float, 0),
        default=0.0,
        help="noise of each DDIM step, 0 for none (%(default)s); more than 0 means DDIM",
    )
    how.add_argument(
        "--scale", type=number(float), help=f"guidance scale, 1 for no guidance (the model's own, else {scale:g})"
    )
    how.add_argument("--fixed_code", action="store_true", help="start every batch from the same noise (txt2img)")

    model = parser.add_argument_group("the model")
    model.add_argument(
        "--ckpt",
        type=user_path,
        metavar="FILE",
        help=".ckpt or .safetensors (Stable Diffusion v1 if present, else the bundled model)",
    )
    model.add_argument(
        "--config", type=user_path, metavar="FILE", help="YAML file of the model (default: found from the checkpoint)"
    )
    model.add_argument("--C", type=count, metavar="CHANNELS", help="latent channels, if you want them checked")
    model.add_argument("--f", type=count, metavar="FACTOR", help="downsampling factor, if you want it checked")
    model.add_argument("--device", choices=DEVICES, default="auto", help="where to compute (%(default)s)")
    model.add_argument(
        "--precision", choices=PRECISIONS, default="autocast", help="(%(default)s; on a CPU that is full)"
    )
    model.add_argument("--bf16", dest="precision", action="store_const", const="bf16", help="same as --precision bf16")

    output = parser.add_argument_group("the output")
    output.add_argument("--outdir", type=user_path, metavar="FOLDER", help="where to write (%(default)s)")
    output.add_argument("--skip_save", action="store_true", help="do not write the single pictures")
    output.add_argument("--skip_grid", action="store_true", help="do not write the grid of all pictures")
    output.add_argument(
        "--n_rows", type=number(int, 0), default=0, help="pictures in a row of the grid (as --n_samples)"
    )
    output.add_argument("--no_metadata", action="store_true", help="leave prompt and settings out of the PNG files")
    parser.set_defaults(public_scale=scale, **defaults)
    return parser


def parse(parser: ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The options in `argv` (None: the command line), and the `sampler` that they choose; None is the model's own.

    Exits as argparse does on options that it refuses. Raises ValueError for options that do not go together.
    """
    args = parser.parse_args(argv)
    args.sampler = _sampler(args)
    return args


def _sampler(args: argparse.Namespace) -> str | None:
    if args.dpm_solver:
        for name in ("plms", "ddim"):
            if getattr(args, name):
                logger.warning("--dpm_solver and --%s are both given: using DPM-Solver", name)
        return "dpm_solver"
    if args.plms and args.ddim:
        raise ValueError("--plms and --ddim are both given; leave one of the two out")
    if args.plms and args.ddim_eta != 0:
        raise ValueError(f"--plms needs --ddim_eta 0, not {args.ddim_eta:g}; leave one of the two out")
    if args.plms:
        return "plms"
    return "ddim" if args.ddim else None


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options that `ldm.inference.txt2img` and `img2img` both take, as keyword arguments for them."""
    return {
        "negative_prompt": args.negative_prompt,
        "steps": args.ddim_steps,
        "sampler": args.sampler,
        "eta": args.ddim_eta,
        "scale": args.scale,
    }


def prompt_batches(args: argparse.Namespace) -> list[list[str]]:
    """The prompts of one iteration in batches of `n_samples`: the prompt repeated, or the lines of --from-file.

    The last batch of a file may be smaller. Raises FileNotFoundError or ValueError if the file has no prompts to give.
    """
    if args.from_file is None:
        batches = [[args.prompt] * args.n_samples]
    else:
        lines = [line for line in _read_lines(Path(args.from_file)) for _ in range(args.repeat)]
        batches = [lines[i : i + args.n_samples] for i in range(0, len(lines), args.n_samples)]
    for text in (args.negative_prompt, *sum(batches, [])):
        if any("\ud800" <= char <= "\udfff" for char in text):
            raise ValueError(f"the prompt {text!r} is not valid text: check the terminal's encoding (UTF-8)")
    return batches


def _read_lines(path: Path) -> list[str]:
    if path.is_dir():
        raise ValueError(f"--from-file {path} is a folder, not a text file")
    if not path.exists():
        raise FileNotFoundError(f"--from-file {path}: there is no such file")
    try:
        text = path.read_text(encoding="utf-8-sig").rstrip()
    except UnicodeDecodeError:
        raise ValueError(f"--from-file {path} is not UTF-8 text: save it as UTF-8") from None
    if not text:
        raise ValueError(f"--from-file {path} holds no prompts")
    return text.split("\n")  # not splitlines: a prompt may hold other characters that end lines somewhere


# --------------------------------------------------------------------------------------------------------------- model


def load_model(args: argparse.Namespace) -> LatentDiffusion:
    """The model that the options name; settles the steps, sampler and scale that they leave to it.

    Raises ValueError if --C or --f contradict the model, and what loading raises.
    """
    from ldm import inference

    model = inference.load_model(args.config, args.ckpt, device=args.device, precision=args.precision)
    size = inference.default_size(model)
    factor = size // model.latent_size(size, size)[0]
    for flag, given, actual in (("--C", args.C, model.channels), ("--f", args.f, factor)):
        if given not in (None, actual):
            raise ValueError(f"{flag} {given} does not fit this model, which has {actual}: leave {flag} out")
    args.ddim_steps, args.sampler, args.scale = inference.sampling_settings(
        model, args.public_scale, args.ddim_steps, args.sampler, args.scale, args.ddim_eta
    )
    return model


def model_name(model: LatentDiffusion) -> str:
    """What to call a loaded model: its file, or the folder of a file with the public name model.ckpt or last.ckpt."""
    path = Path(model.checkpoint_path).resolve()
    return path.parent.name if path.stem in ("model", "last") else path.stem


# ------------------------------------------------------------------------------------------------------------- writing


class Interrupted(KeyboardInterrupt):
    """Ctrl-C after the finished pictures were written; the message says how many."""


class SampleWriter:
    """Writes a run's pictures as they come, and their grid when the `with` block ends, however it ends.

    Files are `<outdir>/samples/00000.png` ... and `<outdir>/grid-0000.png` ...; numbers go on after the highest there.
    `settings` go into the metadata of every picture. Several `processes` number and grid their pictures as one would,
    if each calls `skip` for the batches of the others.
    """

    def __init__(self, args: argparse.Namespace, processes: Processes = ALONE, **settings: Any) -> None:
        self.outdir = Path(args.outdir)
        self.samples = self.outdir / "samples"
        for folder in (self.outdir, self.samples):
            if folder.exists() and not folder.is_dir():
                raise ValueError(f"{folder} is a file, not a folder: choose another --outdir")
        self.samples.mkdir(parents=True, exist_ok=True)
        for folder in (self.outdir, self.samples):
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError(f"{folder} is not writable: choose another --outdir")
        self.written = 0
        self._args = args
        self._processes = processes
        self._settings = settings
        self._index = 0
        self._first = None if processes.world == 1 else processes.agree(self._next_number())
        self._for_grid: list[tuple[int, Image.Image]] = []

    def __enter__(self) -> SampleWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._processes.rank == 0 or kind is None:  # after an error the others' pictures cannot be waited for
            self._write_grid(self._processes.gather(self._for_grid) if kind is None else self._for_grid)
        if kind is KeyboardInterrupt:
            raise Interrupted(f"interrupted; {self.written} images written to {self.samples}")

    def _next_number(self) -> int:
        from ldm.images import next_free_index

        return next_free_index(self.samples, SAMPLE_NAME)

    def _write_grid(self, pictures: list[tuple[int, Image.Image]]) -> None:
        if pictures:
            from ldm.images import make_grid, save_png

            in_order = [picture for _, picture in sorted(pictures, key=lambda pair: pair[0])]
            grid = make_grid(in_order, nrow=self._args.n_rows or self._args.n_samples)
            save_png(grid, self.outdir, "grid-{:04}.png")

    def skip(self, count: int) -> None:
        """Leave out `count` pictures that another process draws."""
        self._index += count

    def save(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> None:
        """Write a batch, one prompt per picture, unless --skip_save; keep it for the grid, unless --skip_grid."""
        from ldm.images import save_png

        for image, prompt in zip(images, prompts, strict=True):
            if not self._args.skip_save:
                number = None if self._first is None else self._first + self._index
                save_png(image, self.samples, SAMPLE_NAME, self._metadata(image, prompt), number)
                self.written += 1
            if not self._args.skip_grid:
                self._for_grid.append((self._index, image))
            self._index += 1

    def _metadata(self, image: Image.Image, prompt: str) -> dict[str, str]:
        from ldm.images import png_metadata

        args = self._args
        if args.no_metadata:
            return {}
        settings = sampling_options(args) | self._settings
        if args.scale == 1.0:
            del settings["negative_prompt"]  # of no effect without guidance
        if args.sampler != "ddim":
            del settings["eta"]  # no other sampler has it
        size = f"{image.width}x{image.height}"
        run = {"seed": args.seed, "size": size, "batch_size": args.n_samples, "index": self._index}
        return png_metadata({"prompt": prompt, **settings, **run, "version": f"ldm {__version__}"})


# ----------------------------------------------------------------------------------------------------------- reporting


class _Console(logging.Handler):
    """Messages as plain lines on stdout, as the public scripts print them; warnings and errors on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        warning = record.levelno >= logging.WARNING
        prefix = f"{record.levelname.lower()}: " if warning else ""
        say(f"{prefix}{record.getMessage()}", sys.stderr if warning else sys.stdout)


def say(text: str, stream: TextIO | None) -> None:
    """Print a line, above progress bars. A stream that is closed, full or absent (`| head`, daemons) stops nothing."""
    bars = sys.modules.get("tqdm")
    above = bars.tqdm.external_write_mode(file=stream) if bars else contextlib.nullcontext()
    with contextlib.suppress(OSError, ValueError, AttributeError), above:
        stream.write(text + "\n")
        stream.flush()


def _end_bars() -> None:
    """Leave the progress bars of work that failed where they are, and the next line to what is said of it."""
    bars = sys.modules.get("tqdm")
    for bar in list(getattr(bars.tqdm, "_instances", ())) if bars else ():
        with contextlib.suppress(OSError, ValueError, AttributeError):
            bar.close()


def run(main: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None = None) -> int:
    """Call a script's `main` and return its exit code, with what went wrong as one line on stderr.

    0: all well. 2: the user can mend it (files, options). 1: it failed while running (memory). 130: Ctrl-C.
    Other exceptions are bugs and keep their traceback; `python -X dev` shows it for every error.
    """
    library = logging.getLogger("ldm")
    console = _Console()
    library.addHandler(console)
    library.setLevel(logging.INFO if environment()[0] == 0 else logging.WARNING)  # of several processes, one reports
    try:
        main(argv)
        return 0
    except KeyboardInterrupt as error:
        return _fail(130, str(error) or "interrupted; nothing written")
    except ModuleNotFoundError as error:
        return _fail(2, f"error: {error}: install the requirements first (pip install -r requirements.txt)")
    except (ValueError, ImportError, OSError) as error:
        return _fail(2, f"error: {_one_line(error)}")
    except (RuntimeError, ArithmeticError, MemoryError) as error:
        return _fail(1, f"error: {_one_line(error)}")
    finally:
        library.removeHandler(console)


def _fail(code: int, message: str) -> int:
    if sys.flags.dev_mode and code != 130:
        raise  # the exception that the caller is handling
    _end_bars()
    say(message, sys.stderr)
    return code


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    text = " ".join(line.strip() for line in str(error).splitlines()) or type(error).__name__
    if isinstance(error, MemoryError) or "out of memory" in text.lower() or "can't allocate memory" in text:
        size = re.search(r"tried to allocate ([\d.]+ ?\w*)", text, re.IGNORECASE)
        tried = f" (it takes another {size[1]})" if size else ""
        return f"not enough memory{tried}. Try --n_samples 1, a smaller --H and --W, or (on a GPU) --precision fp16"
    return text
