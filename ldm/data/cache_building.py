"""Making a cache: every picture through the first stage, every caption through the text encoder, shard by shard."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from ldm.checkpoint import fingerprint
from ldm.data.cache_files import (
    FORMAT,
    VERSION,
    alone,
    describe,
    finish,
    is_finished,
    note_shard,
    resume,
    write_shard,
)
from ldm.data.loading import SeededItems

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "float16": torch.float16}
NOT_ENCODING = ("loss.", "model_ema.")  # parts of a first stage that do not take part in encoding


def build_cache(
    model: nn.Module | Any,
    dataset: Any,
    folder: str | os.PathLike[str],
    *,
    batch_size: int = 8,
    device: str | torch.device = "cpu",
    text: bool = False,
    variants: int = 1,
    flips: bool = False,
    dtype: str = "float32",
    num_workers: int = 0,
    seed: int = 0,
    shard_bytes: int = 256 * 2**20,
) -> Path:
    """Encode all pictures of `dataset` by a `LatentDiffusion`'s first stage into `folder`; returns the folder.

    text: also embed the captions, one of each variant. variants: how many of the data set's own random crops, flips
    and captions to keep of every picture. flips: keep each of them mirrored as well. dtype: "float32" or "float16".
    num_workers: processes that read pictures. seed: of the variants.

    A shard appears when it is whole, so that a build that was stopped goes on when the call is repeated. Raises
    FileExistsError if there is a finished cache, CacheError if what lies there belongs to other settings, ValueError
    for options, data or models that cannot be cached, OSError if the disk is full.
    """
    folder = Path(folder).expanduser()
    if not hasattr(model, "first_stage_model"):
        raise ValueError(f"{type(model).__name__} has no first stage, so there are no latents to cache")
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if variants < 1:
        raise ValueError(f"variants is a number from 1, not {variants}")
    if is_finished(folder):
        raise FileExistsError(f"{folder} holds a finished cache: delete it first, or choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    draws = _Draws(dataset, str(model.first_stage_key), variants, seed)
    with alone(folder), _moved(model, device):
        if is_finished(folder):  # another process was quicker
            return folder
        encoder = _Encoder(model, torch.device(device), text, flips, DTYPES[dtype])
        plan = _plan(encoder, draws, shard_bytes) | {"dtype": dtype, "seed": seed}
        shards = resume(folder, plan)
        _check_room(folder, plan, sum(shard["items"] for shard in shards.values()))
        _write_shards(folder, plan, shards, encoder, draws, batch_size, num_workers)
        finish(folder)
    return folder


class _Draws(Dataset[Any]):
    """The random versions of all items in order: number n is version n % variants of item n // variants."""

    def __init__(self, dataset: Any, image_key: str, variants: int, seed: int) -> None:
        self.dataset = dataset
        self.image_key = image_key
        self.variants = variants
        self.items = SeededItems(dataset, seed)  # a variant is drawn as that epoch's item would be

    def __len__(self) -> int:
        return len(self.dataset) * self.variants

    def __getitem__(self, n: int) -> tuple[np.ndarray, dict[str, str], dict[str, int], int]:
        """Picture (H, W, 3), texts, labels, and the number of the picture that the data set really took."""
        i, variant = divmod(n, self.variants)
        item = self.items[variant, i]
        if self.image_key not in item:
            raise ValueError(
                f"the data set gives {', '.join(item)}, and the model learns from {self.image_key!r}: "
                "set model.params.first_stage_key to what holds the picture"
            )
        texts = {key: value for key, value in item.items() if isinstance(value, str)}
        labels = {key: int(value) for key, value in item.items() if isinstance(value, (int, np.integer))}
        source = self.dataset.resolve(i) if hasattr(self.dataset, "resolve") else i
        return np.asarray(item[self.image_key], np.float32), texts, labels, source


def _collate(drawn: Sequence[tuple]) -> tuple[Tensor, list[dict[str, str]], list[dict[str, int]], list[int]]:
    images, texts, labels, sources = map(list, zip(*drawn))
    shapes = sorted({image.shape for image in images})
    if len(shapes) > 1:
        raise ValueError(f"a cache needs pictures of one size; there are {shapes[0]} and {shapes[1]}")
    return torch.from_numpy(np.stack(images)), texts, labels, sources


class _Encoder:
    """What a model makes of pictures and captions, on its device, as CPU tensors of the cache's dtype."""

    def __init__(self, model: Any, device: torch.device, text: bool, flips: bool, dtype: torch.dtype) -> None:
        if text and (model.cond_stage_model is None or model.cond_stage_trainable):
            why = "has no text encoder" if model.cond_stage_model is None else "trains its text encoder"
            raise ValueError(f"text embeddings cannot be cached: the model {why}; leave text out")
        self.model = model
        self.device = device
        self.text = text
        self.flips = flips
        self.dtype = dtype

    @torch.no_grad()
    def pictures(self, images: Tensor) -> tuple[str, Tensor]:
        """(B, H, W, 3) in -1..1 to "moments" or "latents" and the tensor (B, 1 or 2 (mirrored), C, h, w)."""
        x = images.to(self.device).movedim(-1, 1).contiguous()  # (B, 3, H, W)
        encoded = [self.model.encode_first_stage(x) for x in ((x, x.flip(-1)) if self.flips else (x,))]
        kind = "moments" if hasattr(encoded[0], "parameters") else "latents"
        found = torch.stack([getattr(one, "parameters", one) for one in encoded], dim=1).to(self.dtype).cpu()
        if not found.isfinite().all():
            raise ValueError(f"the first stage gives values that are not finite in {self.dtype}: check its weights")
        return kind, found

    @torch.no_grad()
    def captions(self, texts: Sequence[Mapping[str, str]]) -> Tensor | None:
        """Embeddings (B, L, D) of what the model is conditioned on, None if they are not wanted."""
        if not self.text:
            return None
        prompts = [text[self.model.cond_stage_key] for text in texts]
        return self.model.get_learned_conditioning(prompts).to(self.dtype).cpu()

    def check_condition(self, texts: Mapping[str, str], labels: Mapping[str, int]) -> None:
        """Raise ValueError if the model needs a condition that a cache does not hold."""
        key = self.model.cond_stage_key
        if self.model.model.conditioning_key is not None and key not in (texts if self.text else {**texts, **labels}):
            raise ValueError(
                f"the model is conditioned on {key!r}, which the data set does not give as a "
                f"{'text' if self.text else 'text or a label'} (it gives {', '.join([*texts, *labels]) or 'neither'}): "
                "set its captions, or train from the data set itself"
            )


def _plan(encoder: _Encoder, draws: _Draws, shard_bytes: int) -> dict[str, Any]:
    """All of the index but the shards; the first item is encoded for its shapes."""
    image, texts, labels, _ = draws[0]
    encoder.check_condition(texts, labels)
    kind, latents = encoder.pictures(torch.from_numpy(image)[None])
    context = encoder.captions([texts])
    size = latents.nbytes + (0 if context is None else context.nbytes)  # bytes of one variant
    model = encoder.model
    return {
        "format": FORMAT,
        "version": VERSION,
        "items": len(draws.dataset),
        "variants": draws.variants,
        "flips": encoder.flips,
        "kind": kind,
        "shape": list(latents.shape[2:]),
        "context": None if context is None else list(context.shape[1:]),
        "texts": sorted(texts),
        "labels": sorted(labels),
        "bytes_per_item": size * draws.variants,
        "items_per_shard": max(1, shard_bytes // (size * draws.variants)),
        "first_stage": fingerprint(model.first_stage_model, NOT_ENCODING),
        "text_encoder": None if context is None else fingerprint(model.cond_stage_model),
        "dataset": describe(draws.dataset),
    }


def _check_room(folder: Path, plan: Mapping[str, Any], finished: int) -> None:
    """Say how large the cache will be; raise OSError if the disk has no room for it."""
    needed, free = (plan["items"] - finished) * plan["bytes_per_item"], shutil.disk_usage(folder).free
    logger.info("%s: %.3g GB for %d pictures", folder, plan["items"] * plan["bytes_per_item"] / 1e9, plan["items"])
    if needed > free:
        sizes = f"the cache needs {needed / 1e9:.3g} GB more, and {free / 1e9:.3g} GB are free"
        raise OSError(errno.ENOSPC, f"{sizes}: choose another disk, dtype float16 or fewer variants", str(folder))


def _write_shards(
    folder: Path,
    plan: Mapping[str, Any],
    shards: dict[int, dict[str, Any]],
    encoder: _Encoder,
    draws: _Draws,
    batch_size: int,
    num_workers: int,
) -> None:
    """Make the shards that are not in `shards` yet."""
    items, each = plan["items"], plan["items_per_shard"]
    ranges = [range(start, min(start + each, items)) for start in range(0, items, each)]
    done = sum(shard["items"] for shard in shards.values())
    with tqdm(total=items, initial=done, desc=f"caching {folder.name}", unit="picture") as bar:
        for number, numbers in enumerate(ranges):
            if number in shards:
                continue
            rows = range(numbers.start * draws.variants, numbers.stop * draws.variants)
            # its own generator: the order of the global random numbers is not touched
            generator = torch.Generator().manual_seed(0)
            loader: DataLoader[Any] = DataLoader(
                Subset(draws, rows), batch_size, num_workers=num_workers, collate_fn=_collate, generator=generator
            )
            tensors, texts = _encode(loader, encoder, plan, bar)
            entry = write_shard(folder, number, tensors, texts)
            shards[number] = entry | {"items": len(numbers)}
            note_shard(folder, plan, shards)


def _encode(
    loader: DataLoader, encoder: _Encoder, plan: Mapping[str, Any], bar: tqdm
) -> tuple[dict[str, Tensor], dict[str, list[list[str]]]]:
    """The tensors and the texts of one shard: latents (n, variants, C, h, w), context (n, variants, L, D), labels."""
    latents, contexts, texts, labels, sources = [], [], [], [], []
    for images, batch_texts, batch_labels, batch_sources in loader:
        latents.append(encoder.pictures(images)[1])
        if (context := encoder.captions(batch_texts)) is not None:
            contexts.append(context)
        texts += batch_texts
        labels += batch_labels
        sources += batch_sources
        bar.update(len(images) / plan["variants"])
    variants = plan["variants"]
    tensors = {plan["kind"]: torch.cat(latents).reshape(-1, variants * (1 + plan["flips"]), *plan["shape"])}
    if plan["context"]:
        tensors["context"] = torch.cat(contexts).reshape(-1, variants, *plan["context"])
    tensors |= {key: torch.tensor([one[key] for one in labels[::variants]]) for key in plan["labels"]}
    tensors["source"] = torch.tensor(sources[::variants])
    said = {key: [one[key] for one in texts] for key in plan["texts"]}
    return tensors, {key: [all_[i : i + variants] for i in range(0, len(all_), variants)] for key, all_ in said.items()}


@contextlib.contextmanager
def _moved(model: Any, device: str | torch.device) -> Iterator[None]:
    """The parts that encode on `device`, and afterwards where they were."""
    parts = [part for part in (model.first_stage_model, model.cond_stage_model) if part is not None]
    places = [next((p.device for p in part.parameters()), torch.device("cpu")) for part in parts]
    try:
        for part in parts:
            part.to(device)
        yield
    finally:
        for part, place in zip(parts, places):
            part.to(place)
