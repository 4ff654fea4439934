"""The text tower against transformers', and the names under which its weights are found in the wild."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from ldm.modules.encoders.clip_text import CLIPTextConfig, CLIPTextModel
from tests.reference.fill import fill

SMALL = {"vocab_size": 99, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
SMALL |= {"intermediate_size": 80, "max_position_embeddings": 20, "eos_token_id": 98}
IDS = torch.tensor([[97, 3, 14, 15, 98, 98, 98, 98], [97, 92, 65, 35, 89, 79, 98, 98]])


def small(**options) -> CLIPTextModel:
    model = CLIPTextModel(CLIPTextConfig(**{**SMALL, **options}))
    fill(model.state_dict())
    return model


@torch.no_grad()
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_agrees_with_transformers(activation):
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPTextConfig(**{**SMALL, "hidden_act": activation, "bos_token_id": 97, "pad_token_id": 98})
    ours, theirs = small(hidden_act=activation), transformers.CLIPTextModel(config).eval()
    flat = not any(key.startswith("text_model.") for key in theirs.state_dict())  # transformers 5
    weights = {k.removeprefix("text_model.") if flat else k: v for k, v in ours.state_dict().items()}
    report = theirs.load_state_dict(weights, strict=False)
    assert not report.missing_keys and all("position_ids" in key for key in report.unexpected_keys)

    got, wanted = ours(IDS), theirs(IDS, output_hidden_states=True)
    assert len(got.hidden_states) == len(wanted.hidden_states) == 4
    for a, b in zip(got.hidden_states, wanted.hidden_states, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.last_hidden_state, wanted.last_hidden_state, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.pooler_output, wanted.pooler_output, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_pooled_is_the_first_end_token():
    out = small()(IDS)
    assert torch.equal(out.pooler_output, out.last_hidden_state[[0, 1], [4, 6]])


@torch.no_grad()
def test_later_tokens_do_not_change_earlier_ones():
    model, other = small(), IDS.clone()
    other[:, 5] = 7
    a, b = model(IDS).last_hidden_state, model(other).last_hidden_state
    assert torch.equal(a[:, :5], b[:, :5])
    assert not torch.allclose(a[:, 5:], b[:, 5:])


def test_too_many_tokens_are_refused():
    with pytest.raises(ValueError, match="21 tokens.*at most 20"):
        small()(torch.zeros(1, 21, dtype=torch.long))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_act": "relu"}, "relu"),
        ({"num_attention_heads": 5}, "48.*5"),
        ({"eos_token_id": 99}, "99"),
        ({"hidden": 3}, "'hidden'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CLIPTextConfig.from_mapping({**SMALL, **options})


def _nested(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return state


def _flat(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.replace("text_model.", ""): value for key, value in state.items()}


def _without_position_ids(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if not key.endswith("position_ids")}


def _with_rounded_position_ids(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.float() - 0.01 if k.endswith("position_ids") else v for k, v in state.items()}


@pytest.mark.parametrize("prefix", ["", "transformer.", "model.cond_stage_model.transformer."])
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("ids", [_nested, _without_position_ids, _with_rounded_position_ids])
@pytest.mark.parametrize("layout", [_nested, _flat])
def test_every_published_layout_loads(prefix, layout, ids, assign):
    weights = small().state_dict()
    with torch.device("meta"):
        model = CLIPTextModel(CLIPTextConfig(**SMALL))
    if not assign:
        model.to_empty(device="cpu")
    holder: nn.Module = model
    for name in reversed(prefix.split(".")[:-1]):
        inner, holder = holder, nn.Module()
        holder.add_module(name, inner)
    file = {prefix + key: value for key, value in ids(layout(weights)).items()}
    before = list(file)

    holder.load_state_dict(file, strict=True, assign=assign)
    assert list(file) == before  # the caller's dictionary is left alone
    loaded = model.state_dict()
    assert list(loaded) == list(weights)
    assert all(torch.equal(loaded[key], weights[key]) and loaded[key].dtype == weights[key].dtype for key in weights)
    assert torch.equal(model(IDS).last_hidden_state, small()(IDS).last_hidden_state)


def test_missing_and_unknown_weights_are_still_reported():
    weights = _flat(small().state_dict())
    weights["embeddings.extra"] = weights.pop("final_layer_norm.bias")
    report = small().load_state_dict(weights, strict=False)
    assert report.missing_keys == ["text_model.final_layer_norm.bias"]
    assert report.unexpected_keys == ["text_model.embeddings.extra"]


def test_start_values_are_clips():
    torch.manual_seed(0)
    model = CLIPTextModel(CLIPTextConfig(hidden_size=256, num_hidden_layers=2, num_attention_heads=4, vocab_size=50000))
    layer, embeddings = model.text_model.encoder.layers[1], model.text_model.embeddings
    width, depth = 256**-0.5, (2 * 2) ** -0.5
    expected = {
        embeddings.token_embedding: 0.02,
        embeddings.position_embedding: 0.01,
        layer.self_attn.q_proj: width,
        layer.self_attn.out_proj: width * depth,
        layer.mlp.fc1: width / math.sqrt(2),
        layer.mlp.fc2: width * depth,
    }
    for module, std in expected.items():
        assert module.weight.std().item() == pytest.approx(std, rel=0.02)
    assert not layer.mlp.fc1.bias.any()
