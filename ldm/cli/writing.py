"""Write a run's images as they come, under free names and with metadata, and what is made of them at the end."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import zipfile
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ldm import __version__
from ldm.cli.manifest import MANIFEST, Manifest
from ldm.cli.reporting import FAREWELL, say
from ldm.distributed import SINGLE_PROCESS, DistributedContext
from ldm.files import atomic_write, write_text

if TYPE_CHECKING:
    from PIL import Image

    from ldm.inference import SamplingOptions

logger = logging.getLogger(__name__)

SAMPLE_NAME = "{:05}.png"
RUN_SAMPLE_NAME = "sample_{:06}.png"
MAX_IN_GRID, GRID_COLUMNS = 100, 10  # of sample_diffusion, whose runs may have more images than fit into one


class Interrupted(KeyboardInterrupt):
    """Ctrl-C after the finished images were written; the message says how many."""


def make_folder(folder: Path, option: str = "--outdir") -> list[Path]:
    """Make `folder`, writable; returns the folders that did not exist before, outermost first.

    Raises:
        OSError: naming the `option` that chose it.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file, not a folder: choose another {option}")
    missing = [place for place in (*reversed(folder.parents), folder) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot write to {folder} ({error.strerror}): choose another {option}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder} is not writable: choose another {option}")
    return missing


@contextlib.contextmanager
def delayed_interrupt() -> Iterator[None]:
    """Delay Ctrl-C to the end of the block, so that finished images get written."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread receives signals
        yield
        return
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt


class SampleWriter:
    """Write a run's images as they come, and their grid when the `with` block ends, however it ends.

    Files are `<outdir>/samples/00000.png` ... and `<outdir>/grid-0000.png` ...; numbers continue after the highest
    there. After an error with nothing written, no folder is left either.

    Args:
        args: The command line.
        options: Resolved options, for the metadata.
        processes: The processes of the run; they number and grid their images as one process would.
        **settings: Further metadata of every image.
    """

    FOLDER = "samples"  # in outdir

    def __init__(
        self,
        args: Namespace,
        options: SamplingOptions | None = None,
        processes: DistributedContext = SINGLE_PROCESS,
        **settings: Any,
    ) -> None:
        self.outdir = Path(args.outdir)
        self.samples = self.outdir / self.FOLDER
        self._made = make_folder(self.outdir) + make_folder(self.samples)
        self.written = 0
        self._args, self._processes = args, processes
        self._settings = image_metadata(args, options, **settings)
        self._index = 0
        self._first = None if processes.world_size == 1 else processes.broadcast(self._next_number())
        self._for_grid: list[tuple[int, Image.Image | Path]] = []
        self._manifest: Manifest | None = None
        self._wanted: Sequence[Mapping[str, Any]] = ()
        self._existing: list[str | None] = []

    def resume(self, wanted: Sequence[Mapping[str, Any]]) -> None:
        """Resume a run of these images (see `manifest.descriptions`): `is_done` tells which are there already."""
        wanted = self._processes.broadcast(wanted)  # machines may have copies of the model's file with other times
        self._wanted, self._manifest = wanted, Manifest(self.outdir / MANIFEST, self.samples)
        found = self._manifest.find(wanted) if self._processes.rank == 0 else []
        self._existing = self._processes.broadcast(found)
        numbers = (int(name[:-4]) - i for i, name in enumerate(self._existing) if name and name[:-4].isdecimal())
        self._first = self._processes.broadcast(max(next(numbers, self._next_number()), 0))
        if count := sum(name is not None for name in self._existing):
            rest = "generating the others" if count < len(wanted) else "nothing is left to generate"
            logger.info("%s holds %d of %d images: %s", self.samples, count, len(wanted), rest)

    def is_done(self, count: int) -> bool:
        """Whether the run's next `count` images are there already."""
        existing = self._existing[self._index : self._index + count]
        return len(existing) == count and None not in existing

    def __enter__(self) -> Any:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        images = self._for_grid
        if kind is None:  # after an error the other processes cannot be waited for
            images = self._processes.gather(images)
        try:
            with delayed_interrupt(), self._writing(self.outdir):
                self._finish(_read(images) if self._processes.rank == 0 else iter(()))
        except KeyboardInterrupt:
            kind = KeyboardInterrupt
        except OSError:
            if kind is None:  # else the first error says more
                raise
        if kind is not None and self._processes.world_size == 1:  # another process may still write
            for folder in reversed(self._made):
                with contextlib.suppress(OSError):
                    folder.rmdir()  # if it is empty
        if kind is KeyboardInterrupt:
            raise Interrupted(f"interrupted; {self.written} images written to {self.samples}")
        if kind is not None and self.written:
            logger.warning("stopped early; %d images written to %s", self.written, self.samples)
        if kind is None and self._processes.rank == 0:
            say(FAREWELL.format(self._args.outdir), sys.stdout)

    def _next_number(self) -> int:
        from ldm.images import next_free_index

        return next_free_index(self.samples, SAMPLE_NAME)

    @contextlib.contextmanager
    def _writing(self, folder: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(
                f"cannot write to {folder} ({error.strerror or error}), where {self.written} images of this run are: "
                "free some space, or choose another --outdir"
            ) from error

    def _finish(self, images: Iterator[tuple[int, Image.Image]]) -> None:
        """Write the grid of all images, each given with its place in the run."""
        if self._existing and None not in self._existing and any(self.outdir.glob("grid-*.png")):
            return  # nothing is new
        if found := list(images):
            from ldm.images import make_grid, save_png

            in_order = [image for _, image in sorted(found, key=lambda pair: pair[0])]
            grid = make_grid(in_order, nrow=self._args.n_rows or self._args.n_samples)
            save_png(grid, self.outdir, "grid-{:04}.png")

    def skip(self, count: int) -> None:
        """Pass over `count` images that are there already; they are in the grid."""
        for name in self._existing[self._index : self._index + count]:
            if name is not None and not self._args.skip_grid:
                self._for_grid.append((self._index, self.samples / name))
            self._index += 1

    def write(
        self,
        images: Sequence[Image.Image],
        prompts: Sequence[str],
        settings: Sequence[Mapping[str, Any]] | None = None,
        name: str = "",
    ) -> None:
        """Write a batch unless --skip_save, and keep it for the grid unless --skip_grid.

        Args:
            images: The batch.
            prompts: One per image; empty where there is none.
            settings: Metadata of each image in place of the run's; None removes an entry.
            name: For a `NamedWriter`.
        """
        with delayed_interrupt(), self._writing(self.samples):
            for image, prompt, own in zip(images, prompts, settings or [{}] * len(images), strict=True):
                self._write(image, prompt, name, own)

    def _write(self, image: Image.Image, prompt: str, name: str, own: Mapping[str, Any]) -> None:
        from ldm.images import save_png

        entry: Image.Image | Path = image
        if self._existing and (existing := self._existing[self._index]):  # regenerated with the rest of its batch
            entry = self.samples / existing
        elif not self._args.skip_save:
            number = None if self._first is None else self._first + self._index
            metadata = self._metadata(image, prompt, own)
            path = save_png(image, self.samples, SAMPLE_NAME, metadata, number, self._announce)
            entry = path if self._processes.world_size == 1 else image  # a long run does not collect images in memory
            self.written += 1
        if not self._args.skip_grid:
            self._for_grid.append((self._index, entry))
        self._index += 1

    def _announce(self, path: Path) -> None:
        if self._manifest is not None:
            self._manifest.add(self._wanted[self._index], path)

    def _metadata(self, image: Image.Image, prompt: str, own: Mapping[str, Any]) -> dict[str, str]:
        place = {"batch_size": self._args.n_samples, "index": self._index}
        return png_text(self._args, image, {"prompt": prompt, **self._settings}, place, own)


def image_metadata(args: Namespace, options: SamplingOptions | None, **settings: Any) -> dict[str, Any]:
    """Metadata that all images of a run share: the sampling options under the options' names, and `settings`."""
    sampling = options.metadata() if options else {}
    if options is not None and hasattr(args, "negative_prompt"):
        sampling = {"negative_prompt": options.negative_prompt, **sampling}
    tile = getattr(args, "first_stage_tile", 0)
    return sampling | ({"tile": tile} if tile else {}) | settings


def png_text(
    args: Namespace,
    image: Image.Image,
    settings: Mapping[str, Any],
    place: Mapping[str, Any],
    own: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """The text chunks of a PNG file; empty with --no_metadata.

    Args:
        args: The command line.
        image: The image.
        settings: Of the run.
        place: Of the image in the run: `batch_size` and `index`.
        own: Settings in place of the run's; None removes an entry.
    """
    from ldm.images import png_metadata

    if args.no_metadata:
        return {}
    own = own or {}
    size = f"{image.width}x{image.height}"
    found = {**settings, "seed": args.seed, "size": size, **place, **own}
    if found.get("scale") == 1.0 and not args.cfg_pp:
        found.pop("negative_prompt", None)  # has no effect without guidance
    known = {name: value for name, value in found.items() if name not in own or value is not None}
    return png_metadata({**known, "version": f"ldm {__version__}"})


def _read(images: list[tuple[int, Image.Image | Path]]) -> Iterator[tuple[int, Image.Image]]:
    """Load images from their files; those that were removed meanwhile are left out."""
    from ldm.images import load_image

    for place, image in images:
        try:
            yield place, load_image(image) if isinstance(image, Path) else image
        except (OSError, ValueError) as error:
            logger.warning("%s: left out of the grid", error)


class NamedWriter(SampleWriter):
    """Write images under names: `<outdir>/NAME.png`, or NAME-1.png ... where that is taken. There is no grid."""

    FOLDER = ""

    def _write(self, image: Image.Image, prompt: str, name: str, own: Mapping[str, Any]) -> None:
        from ldm.images import save_png_named

        save_png_named(image, self.samples, name, self._metadata(image, prompt, own))
        self.written += 1
        self._index += 1


class AnimationWriter(SampleWriter):
    """Write a run's frames, and instead of their grid animations of them, `<outdir>/animation-0000.gif` ..."""

    def _finish(self, images: Iterator[tuple[int, Image.Image]]) -> None:
        from ldm.images import save_animation

        frames = [image for _, image in images]
        if self._args.bounce:
            frames += frames[-2:0:-1]
        for kind in self._args.formats if frames else ():
            save_animation(frames, self.outdir, f"animation-{{:04}}.{kind}", self._args.fps)


class RunWriter:
    """Write the run folder of sample_diffusion, with the files of the public script.

    `<logdir>/samples/<global_step:08>/<time>/` holds `img/sample_000000.png` ..., `sampling_config.yaml` with the
    options, `numpy/<NxHxWxC>-samples.npz` with all images as arr_0 (uint8) unless --skip_npz, `grid-0000.png` with
    the first hundred unless --skip_grid.

    Args:
        args: The command line, with the resolved options in place (see `resolved_args`).
        logdir: Where to make the run folder.
        global_step: Of the checkpoint.
        metadata: Of every image.
    """

    def __init__(self, args: Namespace, logdir: Path, global_step: int | None, metadata: Mapping[str, Any]) -> None:
        from ldm.training.folders import new_run

        self.written = 0
        self._args, self._settings = args, metadata
        self._for_grid: list[Image.Image] = []
        make_folder(logdir, "--logdir")
        now = datetime.now().strftime("%Y-%m-%d-%H-%M-%S")
        self.folder = new_run(logdir / "samples" / f"{global_step or 0:08}", now, "")
        self.images = self.folder / "img"
        self.images.mkdir()
        self._config = self.folder / "sampling_config.yaml"
        self._write_config()

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._finish()
        except KeyboardInterrupt:
            kind = KeyboardInterrupt
        if kind is KeyboardInterrupt:
            raise Interrupted(f"interrupted; {self.written} images written to {self.images}")
        if kind is not None and self.written:
            logger.warning("stopped early; %d images written to %s", self.written, self.images)
        if kind is None:
            say(FAREWELL.format(self.folder), sys.stdout)

    def write(self, images: Sequence[Image.Image], conditions: Sequence[Mapping[str, Any]]) -> None:
        """Write a batch. conditions: of each image, for its metadata."""
        from ldm.images import save_png

        for image, condition in zip(images, conditions, strict=True):
            place = {"batch_size": self._args.batch_size, "index": self.written}
            metadata = png_text(self._args, image, {**self._settings, **condition}, place)
            save_png(image, self.images, RUN_SAMPLE_NAME, metadata, self.written)
            self.written += 1
            if len(self._for_grid) < MAX_IN_GRID and not self._args.skip_grid:
                self._for_grid.append(image)

    def _write_config(self) -> None:
        import yaml

        public = {"ddim_eta": "eta", "ddim_steps": "custom_steps"}
        options = {name: value for name, value in vars(self._args).items() if not name.startswith("public_")}
        named = {public.get(name, name): value for name, value in options.items()}
        write_text(self._config, yaml.safe_dump(named, default_flow_style=False))

    def _finish(self) -> None:
        from ldm.images import make_grid, save_png
        from ldm.training.folders import discard_if_empty

        if self.written == 0:
            self._config.unlink()
            discard_if_empty(self.folder)
            return
        if self._for_grid:
            columns = min(self._args.n_samples, GRID_COLUMNS)  # a row for every condition, if they fit
            save_png(make_grid(self._for_grid, nrow=columns), self.folder, "grid-{:04}.png")
        if not self._args.skip_npz:
            self._write_npz()

    def _write_npz(self) -> None:
        """Write all images as one array, reading them back one by one: a run may be larger than the memory."""
        import numpy as np
        from PIL import Image
        from tqdm import tqdm

        paths = [self.images / RUN_SAMPLE_NAME.format(number) for number in range(self.written)]
        with Image.open(paths[0]) as first:
            shape = (self.written, first.height, first.width, len(first.getbands()))
        folder = self.folder / "numpy"
        folder.mkdir()
        name = f"{'x'.join(map(str, shape))}-samples.npz"
        with (
            atomic_write(folder / name) as partial,
            zipfile.ZipFile(partial, "x") as archive,
            archive.open("arr_0.npy", "w", force_zip64=True) as file,
        ):
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for path in tqdm(paths, desc="Writing the npz file"):
                with Image.open(path) as image:
                    file.write(np.asarray(image).tobytes())
