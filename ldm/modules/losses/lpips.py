"""LPIPS: perceptual distance by features of a VGG16 (Zhang et al. 2018)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.checkpoint import read_checkpoint
from ldm.util import public_path

VGG_WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
VGG_FILE = "vgg16-397923af.pth"  # torchvision's name for the weights trained on ImageNet
VGG_URL = f"https://download.pytorch.org/models/{VGG_FILE}"
LINEAR_FILE = "taming/modules/autoencoder/lpips/vgg.pth"  # where the public code keeps its download
LINEAR_URL = "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/vgg.pth"


class ScalingLayer(nn.Module):
    """Normalise images in [-1, 1] by ImageNet's mean and standard deviation."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188], device="cpu")[None, :, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450], device="cpu")[None, :, None, None])

    shift: Tensor
    scale: Tensor

    def forward(self, x: Tensor) -> Tensor:  # (B, 3, H, W) -> same
        return (x - self.shift) / self.scale


class VGG16(nn.Module):
    """Convolutions of VGG16 (Simonyan and Zisserman 2015) in five slices, numbered as in torchvision."""

    def __init__(self) -> None:
        super().__init__()
        index, channels = 0, 3
        for number, widths in enumerate(VGG_WIDTHS, start=1):
            layers = nn.Sequential()
            if number > 1:
                layers.add_module(str(index), nn.MaxPool2d(2))
                index += 1
            for width in widths:
                layers.add_module(str(index), nn.Conv2d(channels, width, 3, padding=1))
                layers.add_module(str(index + 1), nn.ReLU(inplace=True))
                index, channels = index + 2, width
            self.add_module(f"slice{number}", layers)

    def forward(self, x: Tensor) -> list[Tensor]:  # (B, 3, H, W) -> 5 times (B, C, H / 2^n, W / 2^n)
        features = []
        for layers in self.children():
            x = layers(x)
            features.append(x)
        return features


class NetLinLayer(nn.Module):
    """Weights of a feature map's channels; the identity is in place of the dropout of their training."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Identity(), nn.Conv2d(channels, 1, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, 1, H, W)
        return self.model(x)


class LPIPS(nn.Module):
    """Learned perceptual distance (Zhang et al. 2018, eq. 1), VGG16 with linear weights, always frozen.

    Args:
        vgg_path: torchvision's VGG16; by default in torch hub's cache.
        linear_path: The published linear weights; by default where the public code keeps them, or torch hub's cache.

    Raises:
        FileNotFoundError: If a file is missing: nothing is downloaded.
        ValueError: If it holds something else.
    """

    def __init__(self, vgg_path: str | None = None, linear_path: str | None = None) -> None:
        super().__init__()
        self.scaling_layer = ScalingLayer()
        with torch.device("meta"):  # no values: random weights must never be used by accident
            self.net = VGG16()
            for i, widths in enumerate(VGG_WIDTHS):
                self.add_module(f"lin{i}", NetLinLayer(widths[-1]))
        _fill(self.net, _vgg_state(_find(vgg_path, "vgg_path", VGG_FILE, VGG_URL)))
        linear = _find(linear_path, "lpips_path", LINEAR_FILE, LINEAR_URL)
        lins = nn.ModuleDict({name: module for name, module in self.named_children() if name.startswith("lin")})
        _fill(lins, (linear, read_checkpoint(linear).state))
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> LPIPS:
        """Keep eval mode."""
        return super().train(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Compute the distance (B, 1, 1, 1) of images x and y, (B, 3, H, W) in [-1, 1], H and W at least 16."""
        distance = torch.zeros((), device=x.device)
        features = (self.net(self.scaling_layer(images)) for images in (x, y))
        for i, (fx, fy) in enumerate(zip(*features)):
            difference = (unit_length(fx.float()) - unit_length(fy.float())).square()
            distance = distance + self.get_submodule(f"lin{i}")(difference).mean(dim=(2, 3), keepdim=True)
        return distance


def unit_length(x: Tensor, eps: float = 1e-10) -> Tensor:
    """Scale the channels of every position of x (B, C, H, W) to length 1."""
    # vector_norm, since a root of squares has no gradient where all channels are 0
    return x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + eps)


def _find(path: str | None, option: str, name: str, url: str) -> Path:
    """Find the file of an option, or the cached one."""
    cached = Path(torch.hub.get_dir(), "checkpoints", Path(name).name)
    places = [Path(path).expanduser()] if path is not None else [public_path(name) or Path(name), cached]
    if found := next((place for place in places if place.is_file()), None):
        return found
    raise FileNotFoundError(
        f"LPIPS needs the weights {Path(name).name}, which are not at {' or '.join(map(str, places))}: download them "
        f"from {url} to one of these places, name the file as {option} in the params of lossconfig, "
        "or set perceptual_weight: 0 there to train without LPIPS"
    )


def _vgg_state(path: Path) -> tuple[Path, dict[str, Tensor]]:
    """Read torchvision's VGG16 under the names of the five slices."""
    state = read_checkpoint(path).state
    with torch.device("meta"):
        names = VGG16().state_dict()
    return path, {name: state[key] for name in names if (key := f"features.{name.partition('.')[2]}") in state}


def _fill(module: nn.Module, source: tuple[Path, Mapping[str, Tensor]]) -> None:
    """Assign a file's weights to a module on the meta device. ValueError unless it has all of them."""
    path, state = source
    own = module.state_dict()
    if wrong := [key for key in own if key not in state or state[key].shape != own[key].shape]:
        raise ValueError(
            f"{path} does not hold the published weights of LPIPS: {len(wrong)} of {len(own)} are missing or of "
            f"another shape, such as {wrong[0]}"
        )
    module.load_state_dict({key: state[key].float() for key in own}, assign=True)
