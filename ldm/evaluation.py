"""Frechet and kernel distances (FID, KID) between folders of images, computed by torchmetrics."""

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

Features = Callable[[Tensor], Tensor]  # images (B, 3, H, W) uint8 to features (B, D) float64

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"  # as torch-fidelity publishes it
_POSITIONS = 4  # side of the grid that latents are averaged to
_KERNEL_SUBSET, _KERNEL_SUBSETS = 1000, 100  # as published (Binkowski et al. 2018)


def first_stage_features(model: LatentDiffusion) -> Features:
    """Return a feature extractor: a first stage's latents averaged to 4x4 positions, D = 16 times its channels."""

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        model.latent_size(*images.shape[2:])
        encoded = model.encode_first_stage(images.to(model.device).float() / 127.5 - 1)
        latents = encoded.mode() if isinstance(encoded, DiagonalGaussianDistribution) else encoded  # (B, C, h, w)
        return nn.functional.adaptive_avg_pool2d(latents.float(), _POSITIONS).flatten(1).cpu().double()

    return features


def inception_features(device: torch.device) -> Features:
    """Return the published feature extractor of FID: Inception v3 of torch-fidelity, D = 2048.

    Raises:
        ImportError: If torch-fidelity is not installed.
        FileNotFoundError: If its weights are not on disk: nothing is downloaded.
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
    def features(images: Tensor) -> Tensor:
        return network(images.to(device)).cpu().double()

    return features


def folder_features(
    folder: Path, features: Features, batch: int, size: tuple[int, int] | None = None
) -> tuple[Tensor, tuple[int, int]]:
    """Compute the features of a folder's images.

    Args:
        folder: The folder.
        features: Feature extractor.
        batch: Images per batch.
        size: (width, height) that all images must have; by default that of the first.

    Returns:
        Features (N, D), and the size.

    Raises:
        ValueError: For fewer than two images, unequal sizes and files that are not images.
    """
    names, _ = scan(folder)
    if len(names) < 2:
        raise ValueError(f"{folder} has one image, and a distance needs two or more in each folder")
    found, images = [], []
    for number, name in enumerate(tqdm(names, desc=folder.name, unit="image"), 1):
        image = load_image(folder / name)
        size = size or image.size
        if image.size != size:
            given, wanted = ("x".join(map(str, pair)) for pair in (image.size, size))
            raise ValueError(f"{folder / name} is {given}, but the images before it are {wanted}: use one size")
        images.append(np.asarray(image))
        if len(images) == batch or number == len(names):
            found.append(features(torch.from_numpy(np.stack(images)).movedim(-1, 1).contiguous()))
            images = []
    assert size is not None  # that of the first image
    return torch.cat(found), size


def distances(one: Tensor, other: Tensor) -> dict[str, float]:
    """Compute Frechet (Heusel et al. 2017) and kernel distance (Binkowski et al. 2018) of features (N, D), (M, D)."""
    mean, deviation = kernel_distance(one, other)
    return {"frechet": frechet_distance(one, other), "kernel": mean, "kernel_deviation": deviation}


def frechet_distance(one: Tensor, other: Tensor) -> float:
    """Compute the Frechet distance between Gaussians fitted to features (N, D), (M, D)."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    counts = (len(one), len(other))
    if min(counts) <= one.shape[1]:
        logger.warning(
            "%d images for %d features: too few to estimate the covariance; the Frechet distance depends on the "
            "number of images",
            min(counts),
            one.shape[1],
        )
    return float(_updated(FrechetInceptionDistance(_as_given(one)), one, other).compute())


def kernel_distance(one: Tensor, other: Tensor) -> tuple[float, float]:
    """Compute mean and standard deviation of the kernel distance over random subsets of features (N, D), (M, D).

    The estimate is unbiased: without a difference it is as often below 0 as above.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torchmetrics warns of memory use
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
