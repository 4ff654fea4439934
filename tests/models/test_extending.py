"""The examples of docs/extending.md, as files of a user's."""

from __future__ import annotations

import importlib
import re
import sys

import numpy as np
import pytest
import torch

from ldm import cli
from ldm.inference import load_model, txt2img
from ldm.models.diffusion.guidance import TERMS
from ldm.models.diffusion.sampler import SAMPLERS
from ldm.util import REPOSITORY
from scripts.txt2img import parser
from tests.tiny import write_tiny

EXAMPLES = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs/extending.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """Both examples, imported from files, and forgotten afterwards."""
    folder, before = tmp_path_factory.mktemp("own"), (dict(SAMPLERS), dict(TERMS))
    sys.path.insert(0, str(folder))
    for number, code in enumerate(EXAMPLES):
        (folder / f"own_example_{number}.py").write_text(code, encoding="utf-8")
        importlib.import_module(f"own_example_{number}")
    yield
    sys.path.remove(str(folder))
    for registry, known in zip((SAMPLERS, TERMS), before):
        for name in registry.keys() - known.keys():
            del registry[name]


@pytest.fixture(scope="module")
def draw(tmp_path_factory):
    model = load_model(ckpt=write_tiny(tmp_path_factory.mktemp("tiny")), device="cpu")

    def _draw(**options):
        images = txt2img(model, ["a red circle"], seed=1, progress=False, **options)
        return np.stack([np.asarray(image) for image in images]).astype(int)

    return _draw


def test_they_are_short():
    assert len(EXAMPLES) == 2 and all(len(code.splitlines()) < 30 for code in EXAMPLES)


def test_a_sampler(examples, draw):
    one, other = (draw(sampler=name, steps=1) for name in ("ab2", "euler"))
    assert np.abs(one - other).max() <= 1  # the first step remembers nothing
    assert (draw(sampler="ab2", steps=4, schedule="karras") != draw(sampler="euler", steps=4, schedule="karras")).any()


def test_a_term(examples, draw):
    plain, none, some = (
        draw(sampler="ab2", steps=3, guidance=g) for g in (None, *({"terms": {"project": s}} for s in (0, 1)))
    )
    assert (plain == none).all() and (plain != some).any()


def test_what_the_term_takes_back(examples):
    from ldm.models.diffusion.guidance import ConditionalModel, ModelOutputs

    cond, output = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    point = ModelOutputs(ConditionalModel(lambda x, t, c: cond, None), cond, torch.zeros(2), 0.5)
    left = TERMS["project"].apply(output, point, 1.0) - cond
    torch.testing.assert_close((left * cond).sum((1, 2, 3)), torch.zeros(2), atol=1e-4, rtol=0)


def test_both_on_the_command_line(examples):
    options = cli.sampling_options(
        cli.parse(parser(), ["--sampler", "ab2", "--guidance", "project=0.8", "--scale", "5"])
    )
    assert (options.sampler, options.terms) == ("ab2", {"project": 0.8})
