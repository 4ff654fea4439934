"""Text models of BERT's tokenizer (the LAION-400M model's kind), from files to files; and without its vocabulary."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from ldm import cli
from scripts import img2img, txt2img
from tests.modules.encoders.test_conditions import vocab  # noqa: F401
from tests.tiny import write_tiny

BERT = {
    "target": "ldm.modules.encoders.modules.BERTEmbedder",
    "params": {"n_embed": 24, "n_layer": 2, "max_seq_len": 12},
}


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("bert"), cond_stage_config=BERT, cond_stage_key="caption")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to work in, where neither it nor the hub's cache has a vocabulary."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


def run(script, ckpt, *flags) -> int:
    flags = ("--ckpt", ckpt, "--device", "cpu", "--steps", "2", "--n_samples", "1", "--outdir", "out", *flags)
    return cli.run(script.main, [str(flag) for flag in flags])


def drawn(folder) -> list[np.ndarray]:
    return [np.asarray(Image.open(path)) for path in sorted((folder / "out" / "samples").iterdir())]


@pytest.mark.parametrize("place", ["models/bert-base-uncased", "hub/models--bert-base-uncased/snapshots/1"])
def test_prompts_become_pictures(ckpt, here, vocab, place):  # noqa: F811
    (here / place).mkdir(parents=True)
    (here / place / "vocab.txt").symlink_to(vocab)
    for prompt in ("a photograph of cafes", "un"):
        assert run(txt2img, ckpt, "--n_iter", "1", "--prompt", prompt) == 0
    one, other = drawn(here)
    assert one.shape == (32, 32, 3) and (one != other).any()
    Image.fromarray(one).save("photo.png")
    assert run(img2img, ckpt, "--init-img", "photo.png", "--prompt", "of", "--n_iter", "1") == 0
    assert len(drawn(here)) == 3


def test_without_a_vocabulary_it_is_asked_for(ckpt, here, capsys):
    assert run(txt2img, ckpt, "--prompt", "a") == 2
    said = capsys.readouterr().err
    assert "BERT's vocabulary, which is not at models/bert-base-uncased/vocab.txt or in" in said
    assert "put it at models/bert-base-uncased/vocab.txt" in said and "Traceback" not in said
