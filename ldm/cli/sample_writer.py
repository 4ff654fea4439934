"""What scripts/sample_diffusion.py writes: a folder for every run, laid out as the public script does it."""

from __future__ import annotations

import logging
import zipfile
from argparse import Namespace
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ldm import __version__
from ldm.cli.writing import Interrupted, make_folder
from ldm.files import atomic_write, write_text

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger(__name__)

SAMPLE_NAME = "sample_{:06}.png"
IN_GRID, COLUMNS = 100, 10  # a run may have more pictures than fit into one


class RunWriter:
    """Writes the pictures of a run as they come, and what is made of them when the `with` block ends, however it ends.

    `<logdir>/samples/<global_step:08>/<time>/` holds `img/sample_000000.png` ..., `sampling_config.yaml` with the
    options, `numpy/<NxHxWxC>-samples.npz` with all pictures as arr_0 (uint8) unless --skip_npz, `grid-0000.png` with
    the first hundred unless --skip_grid. `settings` go into the metadata of every picture.
    """

    def __init__(self, args: Namespace, logdir: Path, global_step: int | None, **settings: Any) -> None:
        from ldm.training.folders import new_run

        self.written = 0
        self._args = args
        self._settings = settings
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

    def save(self, images: Sequence[Image.Image], conditions: Sequence[Mapping[str, Any]]) -> None:
        """Write a batch. conditions: what each picture was drawn from, for its metadata."""
        from ldm.images import save_png

        for image, condition in zip(images, conditions, strict=True):
            save_png(image, self.images, SAMPLE_NAME, self._metadata(image, condition), self.written)
            self.written += 1
            if len(self._for_grid) < IN_GRID and not self._args.skip_grid:
                self._for_grid.append(image)

    def _metadata(self, image: Image.Image, condition: Mapping[str, Any]) -> dict[str, str]:
        from ldm.images import png_metadata

        if self._args.no_metadata:
            return {}
        size = f"{image.width}x{image.height}"
        run = {"seed": self._args.seed, "size": size, "batch_size": self._args.batch_size, "index": self.written}
        return png_metadata({**self._settings, **condition, **run, "version": f"ldm {__version__}"})

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
            columns = min(self._args.n_samples, COLUMNS)  # a row for every condition, if they fit
            save_png(make_grid(self._for_grid, nrow=columns), self.folder, "grid-{:04}.png")
        if not self._args.skip_npz:
            self._write_npz()

    def _write_npz(self) -> None:
        """All pictures as one array, read back one by one: a run may be larger than the memory."""
        import numpy as np
        from PIL import Image
        from tqdm import tqdm

        paths = [self.images / SAMPLE_NAME.format(number) for number in range(self.written)]
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
