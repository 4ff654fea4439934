"""FrozenCLIPEmbedder: published names, layers, freezing, building without data; full-size goldens marked slow."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from ldm.modules.encoders.tokenizer import CLIPTokenizer, WordTokenizer
from tests.reference.fill import fill, values

REFERENCE = Path(__file__).parents[2] / "reference"
WORDS = ["a", "red", "circle"]
CONFIG = {"vocab_size": 7, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIG |= {"intermediate_size": 32, "max_position_embeddings": 8, "hidden_act": "quick_gelu"}


def small(**options) -> FrozenCLIPEmbedder:
    model = FrozenCLIPEmbedder(**{"config": CONFIG, "tokenizer": WordTokenizer(WORDS), "max_length": 8, **options})
    fill(model.state_dict())
    return model


def published_keys() -> list[tuple[str, str, str]]:
    lines = (REFERENCE / "keys/stable-diffusion.v1-inference.tsv").read_text().splitlines()
    rows = [tuple(line.split("\t")) for line in lines if line.startswith("cond_stage_model.")]
    return [(key.removeprefix("cond_stage_model."), shape, dtype) for key, shape, dtype in rows]


def on_meta() -> FrozenCLIPEmbedder:
    with torch.device("meta"):
        return FrozenCLIPEmbedder()


def test_state_dict_is_the_published_one():
    ours = [
        (key, "x".join(map(str, t.shape)) or "-", str(t.dtype).removeprefix("torch."))
        for key, t in on_meta().state_dict().items()
    ]
    assert len(ours) == 197
    assert sorted(ours) == sorted(published_keys())


def test_position_ids_are_real_on_meta():
    embeddings = on_meta().transformer.text_model.embeddings
    assert embeddings.token_embedding.weight.is_meta
    assert torch.equal(embeddings.position_ids, torch.arange(77)[None])


@torch.no_grad()
def test_layers():
    last, pooled = small(), small(layer="pooled")
    prompts = ["a red circle", ""]
    assert torch.equal(last.encode(prompts), last(prompts))
    assert last(prompts).shape == (2, 8, 16)
    ends = last(prompts)[[0, 1], [4, 1]]  # start, three words, end; start, end
    assert torch.equal(pooled(prompts), ends[:, None])
    norm = last.transformer.text_model.final_layer_norm
    assert torch.equal(norm(small(layer="hidden", layer_idx=2)(prompts)), last(prompts))
    assert torch.equal(small(layer="hidden", layer_idx=-1)(prompts), small(layer="hidden", layer_idx=2)(prompts))
    embedded = last.transformer.text_model.embeddings(last.tokenizer(prompts, 8))
    assert torch.equal(small(layer="hidden", layer_idx=0)(prompts), embedded)


@torch.no_grad()
def test_a_single_string_and_a_shorter_length():
    assert small()("a red circle").shape == (1, 8, 16)
    torch.testing.assert_close(small(max_length=6)(["a red"]), small()(["a red"])[:, :6])


def test_freezing():
    frozen, trained = small(), small(freeze=False)
    assert not frozen.training and not any(p.requires_grad for p in frozen.parameters())
    assert not frozen("a red circle").requires_grad
    trained("a red circle").square().mean().backward()
    gradients = {name: p.grad for name, p in trained.named_parameters()}
    assert trained.training and all(g is not None and g.isfinite().all() for g in gradients.values())
    assert gradients["transformer.text_model.embeddings.token_embedding.weight"][[4, 5, 6]].any(dim=1).all()


def test_tokenizer_from_a_config():
    config = {"target": "ldm.modules.encoders.tokenizer.WordTokenizer", "params": {"words": WORDS}}
    assert torch.equal(small(tokenizer=config)("red"), small()("red"))


def test_omegaconf_values_are_taken():
    omegaconf = pytest.importorskip("omegaconf")
    tokenizer = {"target": "ldm.modules.encoders.tokenizer.WordTokenizer", "params": {"words": WORDS}}
    model = small(config=omegaconf.OmegaConf.create(CONFIG), tokenizer=omegaconf.OmegaConf.create(tokenizer))
    assert torch.equal(model("red"), small()("red"))


def test_flat_names_load_into_the_embedder():
    filled, model = small(), small()
    flat = {key.replace(".text_model.", "."): value for key, value in filled.state_dict().items()}
    del flat["transformer.embeddings.position_ids"]
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    model.load_state_dict(flat, strict=True)
    assert torch.equal(model("a red circle"), filled("a red circle"))


def test_device_argument_is_ignored():
    assert small(device="cuda")("a").device.type == "cpu"


def test_works_in_half_precision_and_copied():
    model = copy.deepcopy(small()).bfloat16()
    assert model("a red circle").dtype == torch.bfloat16
    torch.testing.assert_close(model("a red circle").float(), small()("a red circle"), atol=0.1, rtol=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": "penultimate"}, "penultimate"),
        ({"layer": "hidden"}, "layer_idx from -2 to 2, got None"),
        ({"layer": "hidden", "layer_idx": 3}, "got 3"),
        ({"max_length": 9}, "2 to 8.*got 9"),
        ({"tokenizer": None}, "49408 ids"),
        ({"config": {**CONFIG, "eos_token_id": 6}}, "eos_token_id is 6.*ends with 3"),
        ({"config": {**CONFIG, "layers": 6}}, "'layers'"),
        ({"config": None, "version": "openai/clip-vit-base-patch32"}, "clip-vit-base-patch32"),
    ],
)
def test_contradictions_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_non_string_prompts_are_refused():
    with pytest.raises(TypeError, match="prompt 1 of 2 must be a string, got NoneType"):
        small()(["a", None])


def test_truncated_prompts_are_reported(caplog):
    with caplog.at_level(logging.WARNING):
        small()(["a red circle a red circle a"] * 2)
    assert len(caplog.records) == 1 and "'a'" in caplog.text


@pytest.mark.subprocess
def test_nothing_but_torch_is_imported_and_no_connection_is_made():
    code = """
import socket, sys
def refuse(*_, **__): raise OSError("no network in this test")
socket.socket.connect = socket.getaddrinfo = refuse
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
assert "tokenizers" not in sys.modules
import torch
with torch.device("meta"):
    model = FrozenCLIPEmbedder()
assert model.tokenizer("a horse", 77)[0, 2] == 4558
assert "transformers" not in sys.modules and "huggingface_hub" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REFERENCE.parents[1])


@pytest.fixture(scope="module")
def full_size() -> dict[str, torch.Tensor]:
    prefix = "cond_stage_model."
    shapes = {k: t for k, t in on_meta().state_dict().items() if t.is_floating_point()}
    return {key: torch.from_numpy(values(prefix + key, tuple(t.shape))) for key, t in shapes.items()}


@pytest.mark.slow
@torch.no_grad()
def test_full_size_goldens(full_size):
    golden = np.load(REFERENCE / "goldens/e2e_v1.npz")
    astronaut = "a photograph of an astronaut riding a horse"

    def features(prompt: str, **options) -> np.ndarray:
        with torch.device("meta"):
            model = FrozenCLIPEmbedder(tokenizer=CLIPTokenizer(), **options)
        model.load_state_dict(full_size, strict=True, assign=True)
        return model(prompt).numpy()

    got = {
        "text.last": features(astronaut)[..., ::8],
        "text.empty": features("")[..., ::8],
        "text.hidden11": features(astronaut, layer="hidden", layer_idx=11)[..., ::8],
        "text.pooled": features(astronaut, layer="pooled")[:, 0],
    }
    for name, value in got.items():
        error = np.abs(value - golden[name]).max() / max(1, np.abs(golden[name]).max())
        assert error < 1e-5, name


def test_weights_can_come_from_any_checkpoint_that_has_them(tmp_path):
    trained = small()
    state = {f"cond_stage_model.{key}": value for key, value in trained.state_dict().items()}
    torch.save({"state_dict": {**state, "head.weight": torch.zeros(3, 3)}}, tmp_path / "reader.ckpt")
    fresh = FrozenCLIPEmbedder(
        config=CONFIG, tokenizer=WordTokenizer(WORDS), max_length=8, ckpt_path=str(tmp_path / "reader.ckpt")
    )
    assert torch.equal(fresh(["a red circle"]), trained(["a red circle"]))
    with pytest.raises(FileNotFoundError):
        FrozenCLIPEmbedder(config=CONFIG, tokenizer=WordTokenizer(WORDS), max_length=8, ckpt_path="no.ckpt")
