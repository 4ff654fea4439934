"""Retrieval-augmented diffusion (Blattmann et al. 2022, arXiv:2204.11824): images from CLIP embeddings.

A model is conditioned on the embedding of a prompt or image and on those of its nearest neighbors in a database.
"""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ldm.checkpoint.formats.storages import may_map, note_mapped
from ldm.data.folder import scan
from ldm.files import atomic_write
from ldm.images import load_image
from ldm.inference.conditioning import NEIGHBORS, Conditioning, require
from ldm.inference.options import SamplingOptions
from ldm.inference.pipeline import OnStep, Pipeline
from ldm.models.diffusion.noise import NoiseSource
from ldm.modules.attention import BasicTransformerBlock
from ldm.modules.encoders.clip_features import FrozenClipImageEmbedder, FrozenCLIPTextEmbedder, crop_to_square
from ldm.util import REPOSITORY

if TYPE_CHECKING:
    from PIL import Image

    from ldm.models.diffusion.ddpm import LatentDiffusion

logger = logging.getLogger(__name__)

PUBLIC_FOLDER = "data/rdm/retrieval_databases"  # one folder per database: openimages, artbench-surrealism, ...
EMBEDDINGS = ("embeddings", "embedding")  # their names in .npz files: ours, and the public ones


# ---- a database ----


class EmbeddingDatabase:
    """Embeddings of images: float arrays (N, D) of one width, which may be memory-mapped.

    Args:
        parts: The arrays.
        names: Of the images, N in all, or None.

    Raises:
        ValueError: for arrays of other shapes or types, or without embeddings.
    """

    def __init__(self, parts: Sequence[np.ndarray], names: Sequence[str] | np.ndarray | None = None) -> None:
        for part in parts:
            if part.ndim != 2 or not np.issubdtype(part.dtype, np.floating):
                raise ValueError(f"embeddings are floats of shape (N, D), not {part.dtype} of shape {part.shape}")
        widths = sorted({part.shape[1] for part in parts})
        if not sum(map(len, parts)):
            raise ValueError("it holds no embeddings")
        if len(widths) > 1:
            raise ValueError(f"its embeddings must be of one width, not of {', '.join(map(str, widths))}")
        self.parts = parts
        self.width = widths[0]
        if names is not None and len(names) != len(self):
            raise ValueError(f"there are {len(self)} embeddings and {len(names)} names")
        self._names = names

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def name(self, i: int) -> str:
        """The name of image `i`, or its number."""
        return f"no. {i}" if self._names is None else str(self._names[i])

    def embeddings(self, indices: Sequence[int]) -> Tensor:
        """The embeddings of some images, (n, D) float32 of length 1."""
        starts = np.cumsum([0, *map(len, self.parts)])
        part = np.searchsorted(starts, indices, side="right") - 1
        rows = [self.parts[p][i - starts[p]] for p, i in zip(part, indices)]
        return F.normalize(torch.from_numpy(np.stack(rows).astype(np.float32)), dim=-1)

    def nearest(self, queries: Tensor, k: int, chunk: int = 65536) -> tuple[Tensor, Tensor]:
        """The k nearest neighbors of each query (B, D), by exhaustive search, `chunk` embeddings at a time.

        Returns:
            Cosine similarities (B, k), falling, and indices (B, k).

        Raises:
            ValueError: for too many neighbors, queries of another width, and embeddings that are not finite.
        """
        if not 1 <= k <= len(self):
            raise ValueError(f"the database has {len(self)} embeddings: ask for 1 to {len(self)} neighbours, not {k}")
        if queries.shape[-1] != self.width:
            raise ValueError(
                f"the database's embeddings have {self.width} numbers, the query has {queries.shape[-1]}: "
                "both must come from the same CLIP"
            )
        queries = F.normalize(queries.detach().cpu().float(), dim=-1)
        cosines, indices = torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.long)
        start = 0
        with tqdm(total=len(self), desc="neighbours", unit=" embeddings", delay=2) as bar:
            for piece in (part[i : i + chunk] for part in self.parts for i in range(0, len(part), chunk)):
                keys = torch.from_numpy(np.array(piece, dtype=np.float32))
                found = queries @ keys.T / keys.norm(dim=-1).clamp_min(1e-12)  # (B, n)
                if not torch.isfinite(found).all():
                    raise ValueError(
                        f"embeddings {start} to {start + len(piece) - 1} hold NaN or infinity: compute them again"
                    )
                numbers = torch.arange(start, start + len(piece)).expand(len(queries), -1)
                cosines, order = torch.cat([cosines, found], 1).topk(min(k, start + len(piece)), sorted=True)
                indices = torch.cat([indices, numbers], 1).gather(1, order)
                start += len(piece)
                bar.update(len(piece))
        return cosines, indices


def load_database(place: str) -> EmbeddingDatabase:
    """Load a database.

    Args:
        place: An .npz file with `embeddings` (N, D), and `paths` (N,) if the images have names; an .npy file, which is
            memory-mapped; a folder of these; or a public name, which is a folder in data/rdm/retrieval_databases.

    Raises:
        FileNotFoundError: with the places that were searched.
        ValueError: for other contents.
    """
    files = _database_files(place)
    parts, names = zip(*map(_read_embeddings, files))
    try:
        known = None if any(some is None for some in names) else np.concatenate(names)
        database = EmbeddingDatabase(parts, known)
    except ValueError as error:
        raise ValueError(f"database {place}: {error}") from error
    logger.info("Database %s: %d embeddings", place, len(database))
    return database


def _database_files(place: str) -> list[Path]:
    folder = Path(place).expanduser()
    if folder.is_file():
        return [folder]
    if not folder.exists():
        public = f"{PUBLIC_FOLDER}/{place}"
        folder = next((root / public for root in (Path(), REPOSITORY) if (root / public).is_dir()), folder)
    files = sorted(path for path in folder.glob("*") if path.suffix in (".npz", ".npy"))
    if not files:
        raise FileNotFoundError(
            f"there is no database {place}, nor {PUBLIC_FOLDER}/{place} with .npz files: put a public one there, or "
            "name an .npz file with `embeddings` (N, 768), such as scripts/embed_images.py makes of your images"
        )
    return files


def _read_embeddings(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """The embeddings of a file, and the names of its images if it holds them."""
    try:
        mapped = may_map(path)
        found = np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)  # .npz files are read all the same
        if isinstance(found, np.ndarray):
            if mapped:
                note_mapped(path)
            return found, None
        with found:
            name = next((name for name in EMBEDDINGS if name in found.files), None)
            if name is None:
                raise ValueError(f"it holds {', '.join(found.files) or 'nothing'}, but no {EMBEDDINGS[0]}")
            return found[name], found["paths"] if "paths" in found.files else None
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        why = "it holds no plain arrays" if "allow_pickle" in str(error) else error  # a setting that numpy suggests
        raise ValueError(f"{path} is no file of embeddings: {why}") from error


def save_database(path: str | Path, embeddings: np.ndarray, names: Sequence[str]) -> None:
    """Write embeddings (N, D) and image names for `load_database`. FileExistsError if `path` exists."""
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists already: choose another name")
    with atomic_write(path, exclusive=True) as partial, partial.open("wb") as file:
        np.savez(file, embeddings=embeddings, paths=np.array(names))


@torch.no_grad()
def embed_folder(
    embedder: FrozenClipImageEmbedder, folder: str | Path, batch_size: int = 32
) -> tuple[np.ndarray, list[str]]:
    """Embed the images under a folder.

    Returns:
        Embeddings (N, D) float16 of length 1, and the images' paths relative to the folder. Images that cannot be read
        are left out with a warning.

    Raises:
        ValueError: if there are no images, or none can be read.
    """
    names, _ = scan(Path(folder))
    embeddings: list[Tensor] = []
    kept: list[str] = []
    with tqdm(total=len(names), desc=f"images of {Path(folder).name}", unit="") as bar:
        for some in (names[i : i + batch_size] for i in range(0, len(names), batch_size)):
            images = []
            for name in some:
                try:
                    images.append(clip_image(Path(folder) / name, embedder.image_size))
                    kept.append(name)
                except (ValueError, FileNotFoundError, PermissionError) as error:
                    logger.warning("%s; left out", error)
            if images:
                embeddings.append(embed_images(embedder, images).half().cpu())
            bar.update(len(some))
    if not kept:
        raise ValueError(f"none of the {len(names)} images in {folder} can be read")
    return torch.cat(embeddings).numpy(), kept


def clip_image(path: str | Path, size: int) -> Tensor:
    """Load an image for CLIP: (1, 3, size, size) in [-1, 1]. The errors are those of `load_image`."""
    return crop_to_square(load_image(path, shrink_to=2 * size), size)


@torch.no_grad()
def embed_images(embedder: FrozenClipImageEmbedder, images: Sequence[Tensor]) -> Tensor:
    """Embeddings (B, D) of length 1 of B images from `clip_image`."""
    return F.normalize(embedder(torch.cat(list(images))).float(), dim=-1)


# ---- sampling ----


@torch.no_grad()
def text_context(clip: str, batches: Sequence[Sequence[str]], n_repeat: int, device: torch.device) -> Tensor:
    """Embed N prompts, given in batches, with the CLIP of a folder (see `load_clip`): (N, n_repeat, D)."""
    embedder = FrozenCLIPTextEmbedder(clip, n_repeat=n_repeat).to(device)
    return torch.cat([embedder.encode(prompts) for prompts in batches])


@torch.no_grad()
def image_context(clip: str, path: str | Path, count: int, n_repeat: int, device: torch.device) -> Tensor:
    """Embed one image, repeated `count` times: (count, n_repeat, D)."""
    embedder = FrozenClipImageEmbedder(clip).to(device)
    found = embed_images(embedder, [clip_image(path, embedder.image_size)])  # (1, D)
    return found[:, None].repeat(count, n_repeat, 1)


def with_neighbors(context: Tensor, database: EmbeddingDatabase, k: int) -> Tensor:
    """Append to embeddings (B, n, D) the k nearest neighbors of the first of each: (B, n + k, D)."""
    cosines, indices = database.nearest(context[:, 0], k)
    for row in {tuple(row): row for row in indices.tolist()}.values():
        best = ", ".join(database.name(i) for i in row[:3]) + (", ..." if k > 3 else "")
        logger.info("Neighbors: %s", best)
    found = torch.stack([database.embeddings(row) for row in indices.tolist()])  # (B, k, D)
    return torch.cat([context, found.to(context)], dim=1)


@torch.no_grad()
def knn2img(
    model: LatentDiffusion,
    context: Tensor,
    *,
    options: SamplingOptions | None = None,
    noise: NoiseSource | None = None,
    on_step: OnStep | None = None,
    progress: bool = True,
    **overrides: Any,
) -> list[Image.Image]:
    """Generate one image per context, as one batch.

    Args:
        model: A retrieval-augmented model.
        context: (B, n, D) CLIP embeddings of length 1, of a text or image and of its neighbors.
        options, noise, on_step, progress, **overrides: See `txt2img`; the default scale is 5. Guidance leads away from
            zeros.
    """
    require(model, NEIGHBORS)
    wanted = _context_width(model)
    if context.ndim != 3 or context.shape[2] != wanted:
        raise ValueError(
            f"this model takes embeddings (B, n, {wanted}), not {tuple(context.shape)}: use the CLIP that it was "
            "trained with (ViT-L/14 for the public model)"
        )
    pipe = Pipeline(model)
    options = pipe.resolve(options, default_scale=5.0, **overrides)
    noise = noise or options.noise(len(context))
    pipe.latent_shape(len(context), options)
    with pipe.inference_mode(options):
        c = model.get_learned_conditioning(context.to(model.device))
        cond = Conditioning(c, torch.zeros_like(c) if options.guidance.needs_uncond else None)
        return pipe.decode(pipe.sample(cond, options, noise, on_step=on_step, progress=progress))


def _context_width(model: LatentDiffusion) -> int:
    blocks = (module for module in model.model.modules() if isinstance(module, BasicTransformerBlock))
    return next(blocks).attn2.to_k.in_features
