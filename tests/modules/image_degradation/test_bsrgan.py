"""BSRGAN's degradations: shapes, the same numbers from the same seed, and each operation against its formula."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from ldm.modules.image_degradation import bsrgan, degradation_fn_bsr, degradation_fn_bsr_light, resize

IMAGE = np.random.default_rng(0).integers(0, 256, (50, 67, 3), dtype=np.uint8)
FUNCTIONS = [degradation_fn_bsr, degradation_fn_bsr_light]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("sf", [1, 2, 3, 4])
def test_shape_and_type(function, sf):
    for seed in range(6):
        image = function(image=IMAGE, sf=sf, rng=seed)["image"]
        assert image.dtype == np.uint8 and image.shape == (50 // sf, 67 // sf, 3)
    assert function(IMAGE, sf=sf, up=True, rng=0)["image"].shape == (50 // sf * sf, 67 // sf * sf, 3)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_seed(function):
    same = [function(IMAGE, rng=5)["image"] for _ in range(2)]
    assert (same[0] == same[1]).all()
    generators = [function(IMAGE, rng=np.random.default_rng(5))["image"] for _ in range(2)]
    assert (generators[0] == generators[1]).all() and (generators[0] == same[0]).all()
    assert (function(IMAGE, rng=6)["image"] != same[0]).any()
    by_global_state = []
    for _ in range(2):
        np.random.seed(3)
        by_global_state.append(function(IMAGE)["image"])
    assert (by_global_state[0] == by_global_state[1]).all()
    assert (function(IMAGE)["image"] != by_global_state[0]).any()


def test_light_is_nearer_to_the_image():
    smooth = np.tile(np.linspace(0, 255, 64).astype(np.uint8)[:, None, None], (1, 64, 3))
    target = resize(smooth, (16, 16), "area")
    full, light = (
        np.mean([np.abs(function(smooth, rng=seed)["image"] - target).mean() for seed in range(20)])
        for function in FUNCTIONS
    )
    assert light < full < 20


@pytest.mark.parametrize(
    "image, sf, text",
    [
        (IMAGE.astype(np.float32), 4, "uint8"),
        (IMAGE[..., 0], 4, "uint8"),
        (IMAGE[:2], 4, "4 times smaller"),
        (IMAGE, 5, "sf must"),
    ],
)
def test_mistakes(image, sf, text):
    with pytest.raises(ValueError, match=text):
        degradation_fn_bsr(image, sf)


# ---- operations ----


def test_gaussian_kernel():
    kernel = bsrgan.gaussian_kernel(21, (4.0, 1.0))
    place = np.arange(21) - 10
    expected = np.exp(-(place**2) / (2 * 1.0))[:, None] * np.exp(-(place**2) / (2 * 4.0))
    assert np.allclose(kernel, expected / expected.sum())
    turned = bsrgan.gaussian_kernel(21, (4.0, 1.0), angle=np.pi / 2)
    assert np.allclose(turned, kernel.T)
    shifted = bsrgan.gaussian_kernel(25, (2.0, 2.0), shift=1.5)
    place = np.arange(25) - 12
    assert np.allclose([(shifted.sum(0) * place).sum(), (shifted.sum(1) * place).sum()], 1.5, atol=1e-4)


def test_random_kernels():
    rng = np.random.default_rng(0)
    sizes = set()
    for isotropic in (True, False):
        for _ in range(60):
            kernel = bsrgan.random_kernel(4, rng, isotropic)
            sizes.add(len(kernel))
            assert kernel.shape[0] == kernel.shape[1] and np.isclose(kernel.sum(), 1)
            assert np.allclose(kernel, kernel[::-1, ::-1])
            assert not isotropic or np.allclose(kernel, kernel.T)
    assert sizes == set(range(7, 22, 2))


def test_blur_is_a_convolution_with_a_reflected_border():
    x = np.random.default_rng(0).random((9, 8, 3))
    kernel = np.random.default_rng(1).random((3, 3))
    padded = np.pad(x, ((1, 1), (1, 1), (0, 0)), mode="reflect")
    expected = sum(kernel[1 - i, 1 - j] * padded[1 + i : 10 + i, 1 + j : 9 + j] for i in (-1, 0, 1) for j in (-1, 0, 1))
    assert np.allclose(bsrgan.blur(x, kernel), expected, atol=1e-6)


def test_nearest_downsampling_keeps_places():
    """After the shifted blur, pixel 0 stands for the middle of the pixels that it replaces."""
    ramp = np.tile(np.arange(64.0)[None, :, None], (64, 1, 3))
    kernel = bsrgan.gaussian_kernel(25, (1.0, 1.0), shift=-1.5)
    small = bsrgan.decimate(bsrgan.blur(ramp, kernel), 4)
    assert np.allclose(small[4, 4:12, 0], 4 * np.arange(4, 12) + 1.5, atol=1e-4)


def test_gaussian_noise():
    x = np.full((300, 300, 3), 0.5)
    covariance = np.array([[4.0, 1.0, 0.0], [1.0, 2.0, 0.5], [0.0, 0.5, 1.0]]) * 1e-3
    noise = (bsrgan.gaussian_noise(x, covariance, np.random.default_rng(0)) - x).reshape(-1, 3)
    assert np.allclose(np.cov(noise.T), covariance, atol=5e-5) and np.abs(noise.mean(0)).max() < 1e-3
    gray = bsrgan.gaussian_noise(x, 1e-4 * np.ones((3, 3)), np.random.default_rng(0))
    assert np.allclose(gray[..., 0], gray[..., 2])


def test_speckle_noise_is_in_proportion():
    rng = np.random.default_rng(0)
    x = np.concatenate([np.full((200, 200, 3), 0.2), np.full((200, 200, 3), 0.8), np.zeros((9, 200, 3))])
    noise = bsrgan.speckle_noise(x, 1e-2 * np.eye(3), rng) - x
    assert np.isclose(noise[:200].std(), 0.02, rtol=0.03) and np.isclose(noise[200:400].std(), 0.08, rtol=0.03)
    assert (noise[400:] == 0).all()


def test_noise_levels():
    rng = np.random.default_rng(0)
    for ranges in (bsrgan.FULL, bsrgan.LIGHT):
        deviations = [np.sqrt(np.diag(bsrgan._covariance(rng, ranges))).max() for _ in range(200)]
        assert max(deviations) <= ranges.noise[1] / 255 + 1e-9


def test_jpeg():
    smooth = np.tile(np.linspace(0, 1, 64)[:, None, None], (1, 64, 3))
    errors = [np.abs(bsrgan.jpeg(smooth, quality) - smooth).mean() for quality in (95, 30)]
    assert errors[0] < 0.005 and errors[0] < errors[1] < 0.05


def _recorded(seen, name, inner, *args, **kwargs):
    seen.append(name)
    return inner(*args, **kwargs)


def test_order_is_random(monkeypatch):
    """The blur is before the downsampling in some images and after it in others."""
    orders = set()
    for seed in range(12):
        seen = []
        with monkeypatch.context() as patch:
            for name in ("blur", "gaussian_noise", "_downsample", "jpeg"):
                inner = getattr(bsrgan, name)
                patch.setattr(bsrgan, name, partial(_recorded, seen, name, inner))
            degradation_fn_bsr(IMAGE, rng=seed)
        assert seen[-1] == "jpeg" and {"blur", "gaussian_noise", "_downsample"} <= set(seen)
        orders.add(tuple(seen))
    assert len(orders) > 4


# ---- resampling ----


@pytest.mark.parametrize("size", [(13, 20), (80, 99), (50, 67)])
@pytest.mark.parametrize("method", ["nearest", "bilinear", "bicubic"])
def test_resize_as_torch(method, size):
    import torch

    x = torch.from_numpy(IMAGE).double().movedim(-1, 0)[None]
    options = {} if method == "nearest" else {"align_corners": False}
    expected = torch.nn.functional.interpolate(x, size, mode=method, **options)[0].movedim(0, -1)
    assert np.allclose(resize(IMAGE, size, method), expected.numpy(), atol=1e-9)


@pytest.mark.parametrize("size", [(13, 20), (80, 99)])
@pytest.mark.parametrize("method", ["bilinear", "bicubic", "lanczos"])
def test_resize_as_pillow(method, size):
    from PIL import Image

    planes = [Image.fromarray(IMAGE[..., k].astype(np.float32)) for k in range(3)]
    resized = [np.asarray(plane.resize(size[::-1], Image.Resampling[method.upper()])) for plane in planes]
    assert np.allclose(resize(IMAGE, size, method, antialias=True), np.stack(resized, -1), atol=1e-3)


def test_resize_by_area():
    assert np.allclose(resize(IMAGE[:48, :64], (12, 16), "area"), IMAGE[:48, :64].reshape(12, 4, 16, 4, 3).mean((1, 3)))
    line = np.array([[0.0, 3.0, 6.0]])
    assert np.allclose(resize(line, (1, 2), "area"), [[1.0, 5.0]])  # (0 + 3 / 2) / 1.5, (3 / 2 + 6) / 1.5
    constant = np.full((30, 40), 7.0)
    for method in ("nearest", "bilinear", "bicubic", "area", "lanczos"):
        assert np.allclose(resize(constant, (11, 55), method), 7.0)
    with pytest.raises(ValueError, match="method 'cubic'"):
        resize(line, (1, 2), "cubic")
