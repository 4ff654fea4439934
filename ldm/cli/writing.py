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
from ldm.cli.options import sampling_metadata
from ldm.cli.speed import shortcuts
from ldm.processes import ALONE, Processes

if TYPE_CHECKING:
    from PIL import Image

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
    if each calls `skip` for the batches of the others.
    """

    FOLDER = "samples"  # in outdir

    def __init__(self, args: Namespace, processes: Processes = ALONE, **settings: Any) -> None:
        self.outdir = Path(args.outdir)
        self.samples = self.outdir / self.FOLDER
        self._made = make_folder(self.outdir) + make_folder(self.samples)
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
        pictures = self._for_grid
        if kind is None:  # after an error the others' pictures cannot be waited for
            pictures = self._processes.gather(pictures)
        try:
            with finishing():
                self._finish(pictures if self._processes.rank == 0 else [])
        except KeyboardInterrupt:
            kind = KeyboardInterrupt
        if kind is not None and self._processes.world == 1:  # of several, another may still write
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

    def _finish(self, pictures: list[tuple[int, Image.Image]]) -> None:
        """Write what is made of all pictures, each with its place in the run."""
        if pictures:
            from ldm.images import make_grid, save_png

            in_order = [picture for _, picture in sorted(pictures, key=lambda pair: pair[0])]
            grid = make_grid(in_order, nrow=self._args.n_rows or self._args.n_samples)
            save_png(grid, self.outdir, "grid-{:04}.png")

    def skip(self, count: int) -> None:
        """Leave out `count` pictures that another process draws."""
        self._index += count

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
        with finishing():
            for image, prompt, own in zip(images, prompts, settings or [{}] * len(images), strict=True):
                self._save(image, prompt, name, own)

    def _save(self, image: Image.Image, prompt: str, name: str, own: Mapping[str, Any]) -> None:
        from ldm.images import save_png

        if not self._args.skip_save:
            number = None if self._first is None else self._first + self._index
            save_png(image, self.samples, SAMPLE_NAME, self._metadata(image, prompt, own), number)
            self.written += 1
        if not self._args.skip_grid:
            self._for_grid.append((self._index, image))
        self._index += 1

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

    def _finish(self, pictures: list[tuple[int, Image.Image]]) -> None:
        from ldm.images import save_animation

        frames = [picture for _, picture in pictures]
        if self._args.bounce:
            frames += frames[-2:0:-1]
        for kind in self._args.formats if frames else ():
            save_animation(frames, self.outdir, f"animation-{{:04}}.{kind}", self._args.fps)
