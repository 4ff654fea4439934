"""Distances between two folders of pictures, by features of the pictures; the arithmetic is torchmetrics'."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ldm.data.folder import scan
from ldm.images import load_image
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution

if TYPE_CHECKING:
    from ldm.models.diffusion.ddpm import LatentDiffusion

logger = logging.getLogger(__name__)

Features = Callable[[Tensor], Tensor]  # pictures (B, 3, H, W) uint8 to (B, D) float64

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"  # as torch-fidelity publishes it
_POSITIONS = 4  # latents are averaged to this many positions a side
_KERNEL_SUBSET, _KERNEL_SUBSETS = 1000, 100  # as published (Binkowski et al. 2018)


def first_stage_features(model: LatentDiffusion) -> Features:
    """The latents of a model's first stage, averaged to 4x4 positions: D = 16 times its channels."""

    @torch.no_grad()
    def features(pictures: Tensor) -> Tensor:
        model.latent_size(*pictures.shape[2:])
        encoded = model.encode_first_stage(pictures.to(model.device).float() / 127.5 - 1)
        latents = encoded.mode() if isinstance(encoded, DiagonalGaussianDistribution) else encoded  # (B, C, h, w)
        return nn.functional.adaptive_avg_pool2d(latents.float(), _POSITIONS).flatten(1).cpu().double()

    return features


def inception_features(device: torch.device) -> Features:
    """The 2048 features of Inception v3 that FID is published with, from torch-fidelity and its weights on disk.

    Raises ImportError or FileNotFoundError where one of them is missing: nothing is downloaded.
    """
    if find_spec("torch_fidelity") is None:
        raise ImportError("Inception features need torch-fidelity: install it, or use --features first-stage")
    from torchmetrics.image.fid import NoTrainInceptionV3

    weights = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    if not weights.is_file():
        raise FileNotFoundError(
            f"there are no Inception weights at {weights}: put torch-fidelity's {INCEPTION_FILE} there, or use "
            "--features first-stage"
        )
    network = NoTrainInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(weights))
    network = network.to(device)

    @torch.no_grad()
    def features(pictures: Tensor) -> Tensor:
        return network(pictures.to(device)).cpu().double()

    return features


def folder_features(
    folder: Path, features: Features, batch: int, size: tuple[int, int] | None = None
) -> tuple[Tensor, tuple[int, int]]:
    """(features (N, D), (width, height)) of the pictures in a folder, which need one size: `size` if that is given.

    Raises ValueError for fewer than two pictures, unequal sizes and files that are no pictures.
    """
    names, _ = scan(folder)
    if len(names) < 2:
        raise ValueError(f"{folder} holds one picture, and a distance needs two or more in each folder")
    found, pictures = [], []
    for number, name in enumerate(tqdm(names, desc=folder.name, unit="picture"), 1):
        picture = load_image(folder / name)
        size = size or picture.size
        if picture.size != size:
            given, wanted = ("x".join(map(str, pair)) for pair in (picture.size, size))
            raise ValueError(f"{folder / name} is {given}, but the pictures before it are {wanted}: use one size")
        pictures.append(np.asarray(picture))
        if len(pictures) == batch or number == len(names):
            found.append(features(torch.from_numpy(np.stack(pictures)).movedim(-1, 1).contiguous()))
            pictures = []
    assert size is not None  # that of the first picture
    return torch.cat(found), size


def distances(one: Tensor, other: Tensor) -> dict[str, float]:
    """Frechet distance (Heusel et al. 2017) and kernel distance (Binkowski et al. 2018) of features (N, D), (M, D)."""
    mean, deviation = kernel_distance(one, other)
    return {"frechet": frechet_distance(one, other), "kernel": mean, "kernel_deviation": deviation}


def frechet_distance(one: Tensor, other: Tensor) -> float:
    """Between normal distributions of the mean and covariance of features (N, D), (M, D)."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    counts = (len(one), len(other))
    if min(counts) <= one.shape[1]:
        logger.warning(
            "%d pictures for %d features: too few to know their covariance, and the Frechet distance depends on the "
            "number of pictures",
            min(counts),
            one.shape[1],
        )
    return float(_updated(FrechetInceptionDistance(_as_given(one)), one, other).compute())


def kernel_distance(one: Tensor, other: Tensor) -> tuple[float, float]:
    """The mean over random subsets of features (N, D), (M, D), with its standard deviation.

    As an unbiased estimate it is below 0 about as often as above where nothing differs.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that features take memory
        metric = KernelInceptionDistance(_as_given(one), _KERNEL_SUBSETS, min(_KERNEL_SUBSET, len(one), len(other)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of the subsets
        mean, deviation = _updated(metric, one, other).compute()
    return float(mean), float(deviation)


def _as_given(features: Tensor) -> nn.Module:
    as_given = nn.Identity()
    as_given.num_features = features.shape[1]  # type: ignore[assignment]  # torchmetrics asks for it by this name
    return as_given


def _updated(metric: Any, one: Tensor, other: Tensor) -> Any:
    metric.update(one.double(), real=True)
    metric.update(other.double(), real=False)
    return metric
