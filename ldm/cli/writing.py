"""What a script writes: pictures as they come, under free names, with how they were made; their grid at the end."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ldm import __version__
from ldm.cli.manifest import MANIFEST, Manifest
from ldm.cli.options import sampling_metadata
from ldm.cli.speed import shortcuts
from ldm.distributed import SINGLE_PROCESS, DistributedContext

if TYPE_CHECKING:
    from PIL import Image

    from ldm.cli.pictures import Watch

logger = logging.getLogger(__name__)

SAMPLE_NAME = "{:05}.png"


class Interrupted(KeyboardInterrupt):
    """Ctrl-C after the finished pictures were written; the message says how many."""


def make_folder(folder: Path, option: str = "--outdir") -> list[Path]:
    """Have `folder` exist, and pictures go into it; gives the folders that had to be made, outermost first.

    Raises OSError, naming the `option` that chose it, if that cannot be.
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
def finishing() -> Iterator[None]:
    """Ctrl-C waits for the block's end: what is drawn gets written."""
    if threading.current_thread() is not threading.main_thread():  # where no signals arrive
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
    """Writes a run's pictures as they come, and their grid when the `with` block ends, however it ends.
    After an error with nothing written, no folder is left either.

    Files are `<outdir>/samples/00000.png` ... and `<outdir>/grid-0000.png` ...; numbers go on after the highest there.
    `settings` go into the metadata of every picture. Several `processes` number and grid their pictures as one would,
    if each asks `passes` of every batch.
    """

    FOLDER = "samples"  # in outdir

    def __init__(self, args: Namespace, processes: DistributedContext = SINGLE_PROCESS, **settings: Any) -> None:
        self.outdir = Path(args.outdir)
        self.samples = self.outdir / self.FOLDER
        self._made = make_folder(self.outdir) + make_folder(self.samples)
        self.written = 0
        self._args = args
        self._processes = processes
        self._settings = settings
        self._index = 0
        self._first = None if processes.world_size == 1 else processes.broadcast(self._next_number())
        self._for_grid: list[tuple[int, Image.Image | Path]] = []
        self._manifest: Manifest | None = None
        self._wanted: Sequence[Mapping[str, Any]] = ()
        self._held: list[str | None] = []

    def resume(self, wanted: Sequence[Mapping[str, Any]]) -> None:
        """Go on with a run of these pictures (see `manifest.descriptions`): `holds` tells what is there already."""
        wanted = self._processes.broadcast(wanted)  # of several machines each may have a copy of the model's file
        self._wanted, self._manifest = wanted, Manifest(self.outdir / MANIFEST, self.samples)
        here = self._manifest.find(wanted) if self._processes.rank == 0 else []
        self._held = self._processes.broadcast(here)
        numbers = (int(name[:-4]) - i for i, name in enumerate(self._held) if name and name[:-4].isdecimal())
        self._first = self._processes.broadcast(max(next(numbers, self._next_number()), 0))
        if count := sum(name is not None for name in self._held):
            logger.info("%s holds %d of %d pictures: going on with the others", self.samples, count, len(wanted))

    def holds(self, count: int) -> bool:
        """Whether the run's next `count` pictures are there already."""
        held = self._held[self._index : self._index + count]
        return len(held) == count and None not in held

    def __enter__(self) -> SampleWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pictures = self._for_grid
        if kind is None:  # after an error the others' pictures cannot be waited for
            pictures = self._processes.gather(pictures)
        try:
            with finishing(), self._writing(self.outdir):
                self._finish(_read(pictures) if self._processes.rank == 0 else iter(()))
        except KeyboardInterrupt:
            kind = KeyboardInterrupt
        except OSError:
            if kind is None:  # else the first error says more
                raise
        if kind is not None and self._processes.world_size == 1:  # of several, another may still write
            for folder in reversed(self._made):
                with contextlib.suppress(OSError):
                    folder.rmdir()  # if nothing came into it
        if kind is KeyboardInterrupt:
            raise Interrupted(f"interrupted; {self.written} images written to {self.samples}")
        if kind is not None and self.written:
            logger.warning("stopped early; %d images written to %s", self.written, self.samples)

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
                "make room there, or choose another --outdir"
            ) from error

    def _finish(self, pictures: Iterator[tuple[int, Image.Image]]) -> None:
        """Write what is made of all pictures, each with its place in the run."""
        if self._held and None not in self._held and any(self.outdir.glob("grid-*.png")):
            return  # nothing is new
        if found := list(pictures):
            from ldm.images import make_grid, save_png

            in_order = [picture for _, picture in sorted(found, key=lambda pair: pair[0])]
            grid = make_grid(in_order, nrow=self._args.n_rows or self._args.n_samples)
            save_png(grid, self.outdir, "grid-{:04}.png")

    def passes(self, number: int, count: int, watch: Watch) -> bool:
        """Whether the next batch, the `number`-th of the run, of `count` pictures, is not for this process to draw.

        Another draws it, or it is there already; then it is gone past, and `watch` told of what need not be waited for.
        """
        if number % self._processes.world_size != self._processes.rank:
            self._index += count
            return True
        if not self.holds(count):
            return False
        self.keep(count)
        watch.skip()
        return True

    def keep(self, count: int) -> None:
        """Go past `count` pictures that are there already; they are in the grid."""
        for name in self._held[self._index : self._index + count]:
            if name is not None and not self._args.skip_grid:
                self._for_grid.append((self._index, self.samples / name))
            self._index += 1

    def save(
        self,
        images: Sequence[Image.Image],
        prompts: Sequence[str],
        name: str = "",
        settings: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        """Write a batch unless --skip_save, and keep it for the grid unless --skip_grid.

        prompts: what each picture was drawn from; empty texts where that is no text. name: for a `NamedWriter`.
        settings: of each picture, what its metadata say in place of the run's; None: nothing.
        """
        with finishing(), self._writing(self.samples):
            for image, prompt, own in zip(images, prompts, settings or [{}] * len(images), strict=True):
                self._save(image, prompt, name, own)

    def _save(self, image: Image.Image, prompt: str, name: str, own: Mapping[str, Any]) -> None:
        from ldm.images import save_png

        picture: Image.Image | Path = image
        if self._held and (
            held := self._held[self._index]
        ):  # drawn once more, with those beside it that were not there
            picture = self.samples / held
        elif not self._args.skip_save:
            number = None if self._first is None else self._first + self._index
            metadata = self._metadata(image, prompt, own)
            path = save_png(image, self.samples, SAMPLE_NAME, metadata, number, self._announce)
            picture = path if self._processes.world_size == 1 else image  # the memory of a long run stays as it is
            self.written += 1
        if not self._args.skip_grid:
            self._for_grid.append((self._index, picture))
        self._index += 1

    def _announce(self, path: Path) -> None:
        if self._manifest is not None:
            self._manifest.add(self._wanted[self._index], path)

    def _metadata(self, image: Image.Image, prompt: str, own: Mapping[str, Any]) -> dict[str, str]:
        from ldm.images import png_metadata

        args = self._args
        if args.no_metadata:
            return {}
        size = f"{image.width}x{image.height}"
        run = {"seed": args.seed, "size": size, "batch_size": args.n_samples, "index": self._index}
        settings = {"prompt": prompt, **sampling_metadata(args), **shortcuts(args), **self._settings, **run, **own}
        if settings["scale"] == 1.0 and not args.cfg_pp:
            settings.pop("negative_prompt", None)  # of no effect without guidance
        known = {name: value for name, value in settings.items() if name not in own or value is not None}
        return png_metadata({**known, "version": f"ldm {__version__}"})


def _read(pictures: list[tuple[int, Image.Image | Path]]) -> Iterator[tuple[int, Image.Image]]:
    """The same with pictures in place of their files; those that were taken away meanwhile are left out."""
    from ldm.images import load_image

    for place, picture in pictures:
        try:
            yield place, load_image(picture) if isinstance(picture, Path) else picture
        except (OSError, ValueError) as error:
            logger.warning("%s: the grid is made without it", error)


class NamedWriter(SampleWriter):
    """Writes pictures under names: `<outdir>/NAME.png`, or NAME-1.png ... where that is taken. There is no grid."""

    FOLDER = ""

    def _save(self, image: Image.Image, prompt: str, name: str, own: Mapping[str, Any]) -> None:
        from ldm.images import save_png_named

        save_png_named(image, self.samples, name, self._metadata(image, prompt, own))
        self.written += 1
        self._index += 1


class AnimationWriter(SampleWriter):
    """Writes a run's frames, and in place of their grid the animations of them, `<outdir>/animation-0000.gif` ..."""

    def _finish(self, pictures: Iterator[tuple[int, Image.Image]]) -> None:
        from ldm.images import save_animation

        frames = [picture for _, picture in pictures]
        if self._args.bounce:
            frames += frames[-2:0:-1]
        for kind in self._args.formats if frames else ():
            save_animation(frames, self.outdir, f"animation-{{:04}}.{kind}", self._args.fps)
