"""The same call gives the same picture: again, in another process, on other threads, in another batch, in bfloat16.

Identical calls are compared bit for bit. Where sums are added up in another order results differ by rounding, and the
tolerances say how much that may be, as shares of the largest latent.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm.inference import BUNDLED_CKPT, Pipeline, SamplingOptions, load_model
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.noise import PerImageNoise
from ldm.models.diffusion.samplers import SAMPLERS
from ldm.util import public_path
from tests.golden import filled
from tests.tiny import tiny_config

PROMPTS = ("a red circle", "a large yellow heart on a gray background", "a small green star above a red heart")
SEEDS = (3, 1, 4)
THREADS = 1e-4  # of the largest difference in latents, between numbers of threads
BATCHES = 1e-4  # and between batches
BFLOAT16 = 0.01  # of the mean difference in levels from 0 to 1, between bfloat16 and float32

ELSEWHERE = """
import sys, torch
from tests import test_same_result as same
torch.set_num_threads(int(sys.argv[1]))
print(same.digest(same.latents(same.bundled())))
"""


def bundled(precision: str = "full") -> LatentDiffusion:
    return load_model(ckpt=public_path(BUNDLED_CKPT), device="cpu", precision=precision)


def latents(
    model: LatentDiffusion, rows: Sequence[int] = (0, 1, 2), sampler: str = "dpmpp_2m_sde", steps: int = 3
) -> Tensor:
    """Latents of some of the prompts, each with its seed, drawn together."""
    pipe, options = Pipeline(model), SamplingOptions(steps=steps, sampler=sampler, scale=1.8)
    with pipe.inference_mode(options):
        cond = pipe.encode_prompts([PROMPTS[row] for row in rows], options)
        return pipe.sample(cond, options, PerImageNoise([SEEDS[row] for row in rows]), progress=False).float()


def digest(x: Tensor) -> str:
    return hashlib.sha256(x.numpy().tobytes()).hexdigest()


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / max(1.0, float(b.abs().max())))


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    return bundled()


@pytest.fixture(scope="module")
def tiny() -> LatentDiffusion:
    return filled(LatentDiffusion(**tiny_config()["params"])).eval()


@pytest.fixture
def threads() -> Iterator[int]:
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_call_repeated_is_the_same_to_the_bit(tiny, sampler):
    one, other = (latents(tiny, sampler=sampler) for _ in range(2))
    assert torch.equal(one, other)


def test_pictures_repeated_are_the_same_to_the_bit(model):
    one, other = (Pipeline(model).decode(latents(model)) for _ in range(2))
    assert [image.tobytes() for image in one] == [image.tobytes() for image in other]


@pytest.mark.subprocess
@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_another_process_draws_the_same_to_the_bit(model, threads, count):
    torch.set_num_threads(count)
    command = [sys.executable, "-c", ELSEWHERE, str(count)]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert found[-1] == digest(latents(model))


def test_threads_change_rounding_alone(model, threads):
    drawn = []
    for count in (1, 2):
        torch.set_num_threads(count)
        drawn.append(latents(model))
    print(f"largest difference between 1 and 2 threads: {distance(*drawn):.1e}")
    assert distance(*drawn) <= THREADS


@pytest.mark.parametrize("rows", [(0,), (2, 1), (2, 0, 1)])
@pytest.mark.parametrize("which", ["model", "tiny"])
def test_the_rest_of_the_batch_changes_rounding_alone(request, which, rows):
    given = request.getfixturevalue(which)
    together, otherwise = latents(given), latents(given, rows)
    print(f"largest difference between batches: {distance(otherwise, together[list(rows)]):.1e}")
    assert distance(otherwise, together[list(rows)]) <= BATCHES


def test_bfloat16_draws_a_picture_near_that_of_float32(model):
    half = bundled("bf16")
    one, other = (
        [np.asarray(image) / 255 for image in Pipeline(m).decode(latents(m, sampler="dpm_solver", steps=6))]
        for m in (model, half)
    )
    differences = [float(np.abs(a - b).mean()) for a, b in zip(one, other)]
    print(f"mean differences between bfloat16 and float32: {[f'{value:.3f}' for value in differences]}")
    assert max(differences) <= BFLOAT16
