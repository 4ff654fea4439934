"""Distances between sets of images against closed forms, and refused folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm import evaluation
from ldm.evaluation import distances, first_stage_features, folder_features, inception_features
from ldm.inference import load_model
from tests.tiny import write_tiny


def gaussian(count: int, mean: torch.Tensor, root: torch.Tensor) -> torch.Tensor:
    """`count` points whose mean is exactly `mean` and whose covariance is exactly `root` @ `root`.T."""
    points = torch.randn(count, len(mean), dtype=torch.float64)
    points -= points.mean(0)
    points = points @ torch.linalg.inv(torch.linalg.cholesky(points.T.cov())).T
    return mean + points @ root.T


def test_frechet_distance_of_gaussians() -> None:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)); for covariances that commute, the sum of (s1 - s2)^2."""
    turn = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))[0]
    one, two = torch.tensor([1.0, 2, 3, 4, 5]).double(), torch.tensor([2.0, 2, 1, 7, 0.1]).double()
    shift = torch.tensor([0.5, -1, 0, 2, 3]).double()
    a = gaussian(300, torch.zeros(5).double(), turn @ one.diag())
    b = gaussian(200, shift, turn @ two.diag())
    expected = shift.square().sum() + (one - two).square().sum()
    assert distances(a, b)["frechet"] == pytest.approx(float(expected), rel=1e-9)
    assert distances(b, a)["frechet"] == pytest.approx(float(expected), rel=1e-9)


def test_far_from_the_origin_nothing_is_lost() -> None:
    a = gaussian(500, torch.full((3,), 1e4).double(), torch.eye(3).double())
    found = distances(a, a + torch.tensor([0.1, 0, 0]).double())
    assert found["frechet"] == pytest.approx(0.01, rel=1e-3)


def test_kernel_distance_is_the_unbiased_estimate() -> None:
    """With all points in every subset it is MMD^2 of k(x, y) = (x.y / d + 1)^3 (Binkowski et al. 2018, eq. 4)."""
    x, y = torch.randn(30, 4).double(), torch.randn(30, 4).double() + 0.5
    kernel = [[((p @ q) / 4 + 1) ** 3 for q in torch.cat([x, y])] for p in torch.cat([x, y])]
    kernel = torch.tensor(kernel)
    apart = 1 - torch.eye(30).double()
    expected = ((kernel[:30, :30] + kernel[30:, 30:]) * apart).sum() / (30 * 29) - 2 * kernel[:30, 30:].mean()
    found = distances(x, y)
    assert found["kernel"] == pytest.approx(float(expected), rel=1e-9) and found["kernel_deviation"] < 1e-9
    assert found == distances(x, y)


def test_few_images_are_warned_of(caplog) -> None:
    points = torch.randn(6, 8)
    assert distances(points, points)["frechet"] == pytest.approx(0, abs=1e-6)
    assert "6 images for 8 features: too few" in caplog.text


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a").mkdir()
    for i in range(5):
        noise = np.random.RandomState(i).randint(0, 256, (32, 32, 3)).astype(np.uint8)
        Image.fromarray(noise).save(tmp_path / f"a/{i}.png")
    return tmp_path / "a"


def mean_colour(images: torch.Tensor) -> torch.Tensor:
    assert images.dtype == torch.uint8 and images.shape[1] == 3
    return images.double().mean((2, 3))


def test_a_folder_in_batches(folder: Path) -> None:
    found, size = folder_features(folder, mean_colour, batch=2)
    assert found.shape == (5, 3) and size == (32, 32)
    assert torch.equal(found, folder_features(folder, mean_colour, batch=9)[0])
    expected = np.asarray(Image.open(folder / "3.png")).mean((0, 1))
    assert found[3].numpy() == pytest.approx(expected)


def test_folders_that_cannot_be_compared(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere"):
        folder_features(tmp_path / "nowhere", mean_colour, 2)
    with pytest.raises(ValueError, match="a.0.png is 32x32, but the images before it are 64x64"):
        folder_features(folder, mean_colour, 2, size=(64, 64))
    Image.new("RGB", (16, 32)).save(folder / "4.png")
    with pytest.raises(ValueError, match="a.4.png is 16x32, but the images before it are 32x32"):
        folder_features(folder, mean_colour, 2)
    (folder / "2.png").write_bytes((folder / "3.png").read_bytes()[:900])
    with pytest.raises(ValueError, match="2.png is cut short or damaged"):
        folder_features(folder, mean_colour, 2)
    (tmp_path / "one").mkdir()
    with pytest.raises(ValueError, match="no images in"):
        folder_features(tmp_path / "one", mean_colour, 2)
    Image.new("RGB", (16, 32)).save(tmp_path / "one/1.png")
    with pytest.raises(ValueError, match="one has one image"):
        folder_features(tmp_path / "one", mean_colour, 2)


def test_latents_as_features(folder: Path, tmp_path: Path) -> None:
    """Means of 4x4 blocks of the posterior's mean: latents are 16x16 here, of 4 channels."""
    model = load_model(ckpt=write_tiny(tmp_path), device="cpu")
    found, _ = folder_features(folder, first_stage_features(model), batch=2)
    pixels = torch.from_numpy(np.asarray(Image.open(folder / "1.png")).copy()).movedim(-1, 0)[None]
    with torch.no_grad():
        latents = model.first_stage_model.encode(pixels / 127.5 - 1).mean
    blocks = latents.reshape(4, 4, 4, 4, 4).mean((2, 4))
    assert found.shape == (5, 64) and found.dtype == torch.float64
    assert found[1].numpy() == pytest.approx(blocks.flatten().numpy(), abs=1e-5)
    with pytest.raises(ValueError, match="height 31 is not a multiple of 2"):
        first_stage_features(model)(torch.zeros(1, 3, 31, 32, dtype=torch.uint8))


def test_inception_is_not_downloaded(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(evaluation, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="need torch-fidelity: install it, or use --features first-stage"):
        inception_features(torch.device("cpu"))
    monkeypatch.setattr(evaluation, "find_spec", lambda name: name)
    with pytest.raises(FileNotFoundError, match="no Inception weights at .* or use --features first-stage"):
        inception_features(torch.device("cpu"))
