"""Deterministic weights, so that two implementations can be compared without shipping any.

`fill(state)` overwrites every floating-point tensor of a state dict in place. A tensor's values depend only on
its published key, its shape and `seed`: numpy's frozen MT19937 stream seeded with crc32(key) + seed.

    ndim >= 2            N(0, 1) / sqrt(prod(shape[1:]))
    ndim == 1, weight    1 + 0.1 * N(0, 1)
    ndim == 1, other     0.05 * N(0, 1)
    ndim == 0            left as it is

Keys that start with, or whose last part starts with, a word of `SKIP` (schedule buffers, counters, running
statistics) are left as the model computed them.
Keys are the *published* ones: a CLIP text tower is `...transformer.text_model.embeddings...` whatever the
installed transformers calls it.
"""

import zlib

import numpy as np
import torch

SKIP = (
    "betas",
    "alphas_",
    "sqrt_",
    "log_one",
    "posterior_",
    "lvlb",
    "position_ids",
    "attn_mask",
    "model_ema.decay",
    "num_updates",
    "logvar",
    "scale_factor",
    "running_",
    "shift",
    "scale",
)


def values(key: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """float32 array of `shape` for the parameter called `key`."""
    rng = np.random.RandomState((zlib.crc32(key.encode()) + seed) % 2**32)
    x = rng.standard_normal(int(np.prod(shape))).astype(np.float32).reshape(shape)
    if len(shape) >= 2:
        return x / np.float32(np.sqrt(np.prod(shape[1:])))
    if key.endswith("weight"):
        return np.float32(1) + np.float32(0.1) * x
    return np.float32(0.05) * x


@torch.no_grad()
def fill(state: dict[str, torch.Tensor], seed: int = 0) -> None:
    for key, tensor in state.items():
        if (
            tensor.ndim == 0
            or not tensor.is_floating_point()
            or key.startswith(SKIP)
            or key.split(".")[-1].startswith(SKIP)
        ):
            continue
        tensor.copy_(torch.from_numpy(values(key, tuple(tensor.shape), seed)))


def noise(name: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Standard normal input called `name`: the inputs of every golden case are made with this."""
    rng = np.random.RandomState((zlib.crc32(name.encode()) + seed) % 2**32)
    return rng.standard_normal(int(np.prod(shape))).astype(np.float32).reshape(shape)
