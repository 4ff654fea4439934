"""OpenCLIP's text tower and CLIP's vision towers: goldens, published names, transformers with the same weights."""

from __future__ import annotations

import json
import math

import pytest
import torch

from ldm.checkpoint import build_on_meta
from ldm.modules.encoders.clip_image import prepare, resize
from ldm.modules.encoders.modules import ClipImageEmbedder, FrozenOpenCLIPEmbedder, FrozenOpenCLIPImageEmbedder
from ldm.modules.encoders.open_clip import CLIP, TextTowerConfig, Transformer, VisionTowerConfig
from ldm.modules.encoders.tokenizer import OpenCLIPTokenizer, WordTokenizer
from tests import witness
from tests.golden import REFERENCE, assert_agrees, filled, golden_configs, goldens, tensor

G, SIZE = goldens("sd2"), golden_configs("sd2")["openclip"]
GOLDEN_TOWER = {"width": SIZE["width"], "heads": SIZE["heads"], "layers": SIZE["layers"], "vocab_size": SIZE["vocab"]}
GOLDEN_TOWER |= {"embed_dim": SIZE["width"]}
WORDS = WordTokenizer(["a", "red", "circle"])
TEXT = {"width": 24, "heads": 3, "layers": 3, "vocab_size": 40, "context_length": 9, "embed_dim": 16}
VISION = {"image_size": 28, "patch_size": 7, "width": 40, "heads": 5, "layers": 3, "embed_dim": 16}
BOTH = {"text_cfg": TEXT, "vision_cfg": VISION}


def embedder(**options) -> FrozenOpenCLIPEmbedder:
    options = {"config": GOLDEN_TOWER, "tokenizer": WORDS, **options}
    return filled(FrozenOpenCLIPEmbedder(**options), "cond_stage_model.")


# ---- text ----


@torch.no_grad()
@pytest.mark.parametrize("layer", FrozenOpenCLIPEmbedder.LAYERS)
def test_golden(layer):
    model = embedder(layer=layer)
    assert_agrees(model.encode_with_transformer(torch.from_numpy(G["openclip.tokens"])), G[f"openclip.{layer}"], 1e-5)
    assert sorted(model.model.state_dict()) == sorted(SIZE["keys"])


@torch.no_grad()
def test_prompts_become_features():
    model = embedder(max_length=7)
    tokens = WORDS(["a red circle", "a"], 7)
    assert torch.equal(model.encode(["a red circle", "a"]), model.encode_with_transformer(tokens))
    assert model("a").shape == (1, 7, 32)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    trained = FrozenOpenCLIPEmbedder(config=TEXT, tokenizer=WORDS, max_length=9, freeze=False)
    assert trained.training and all(p.requires_grad for p in trained.parameters())


@torch.no_grad()
def test_half_precision_where_scores_need_float32(monkeypatch):
    """As on MPS, where the causal mask must have the dtype of the widened queries."""
    model = embedder(layer="penultimate")
    wanted = model("a red circle")
    monkeypatch.setattr("ldm.modules.sdpa.FLOAT32_SCORES", ())
    assert (model.half()("a red circle").float() - wanted).abs().max() < 0.02 * wanted.abs().max()


def test_tokens_are_those_of_open_clip():
    cases = json.loads((REFERENCE / "goldens" / "tokens.json").read_text())
    default = build_on_meta({"target": "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder"}).tokenizer
    assert isinstance(default, OpenCLIPTokenizer) and len(cases) == 12
    for case in cases:
        ids = case["open_clip"] or case["clip"]
        ids = ids if len(ids) <= 77 else [*ids[:76], ids[-1]]
        assert default(case["prompt"], 77)[0].tolist() == ids + [0] * (77 - len(ids))


def listed(config: str, prefix: str) -> dict[str, str]:
    """Shapes by key that the public list of `config` has under `prefix`."""
    lines = (REFERENCE / "keys" / f"stable-diffusion.{config}.tsv").read_text().splitlines()
    rows = (line.split("\t") for line in lines if line.startswith(prefix))
    return {key.removeprefix(prefix): shape for key, shape, _ in rows}


@pytest.mark.parametrize(
    "name, config, prefix",
    [
        ("FrozenOpenCLIPEmbedder", "v2-inference", "cond_stage_model."),
        ("FrozenOpenCLIPImageEmbedder", "v2-1-stable-unclip-h-inference", "embedder."),
    ],
)
def test_published_names(name, config, prefix):
    state = build_on_meta({"target": f"ldm.modules.encoders.modules.{name}"}).state_dict()
    assert {key: "x".join(map(str, value.shape)) or "-" for key, value in state.items()} == listed(config, prefix)


def test_names_of_openais_clip():
    """The whole model: 12 blocks for text, 24 for pictures, and six weights of either."""
    model = build_on_meta({"target": "ldm.modules.encoders.modules.ClipImageEmbedder"}).model
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert len(shapes) == 12 * (12 + 24) + 6 + 8
    assert shapes["visual.positional_embedding"] == (257, 1024) and shapes["visual.proj"] == (1024, 768)
    assert shapes["visual.conv1.weight"] == (1024, 3, 14, 14) and shapes["text_projection"] == (768, 768)
    assert shapes["transformer.resblocks.11.attn.in_proj_weight"] == (3 * 768, 768)
    assert shapes["visual.transformer.resblocks.23.mlp.c_fc.weight"] == (4096, 1024)
    assert model.logit_scale.shape == () and shapes["token_embedding.weight"] == (49408, 768)


# ---- transformers as witness ----


@torch.no_grad()
@pytest.mark.parametrize("quick", [False, True])
def test_towers_agree_with_transformers(quick):
    config = {part: {**size, "quick_gelu": quick} for part, size in BOTH.items()}
    model = filled(ClipImageEmbedder(config=config)).model
    state = model.state_dict()
    ids = torch.tensor([[37, 3, 14, 15, 38, 39, 0, 0, 0], [37, 9, 26, 5, 35, 8, 9, 7, 39]])
    theirs = witness.clip_text_with_projection(config["text_cfg"], state)
    wanted = theirs(ids, output_hidden_states=True)
    last, earlier = (
        FrozenOpenCLIPEmbedder(config=config["text_cfg"], tokenizer=WORDS, max_length=9, layer=layer)
        for layer in FrozenOpenCLIPEmbedder.LAYERS
    )
    for text in (last, earlier):
        text.model.load_state_dict({name: value for name, value in state.items() if not name.startswith("visual.")})
    assert_agrees(last.encode_with_transformer(ids), wanted.last_hidden_state, 1e-5)
    ends = last.encode_with_transformer(ids)[[0, 1], ids.argmax(dim=1)]
    assert_agrees(ends @ model.text_projection, wanted.text_embeds, 1e-5)
    penultimate = theirs.text_model.final_layer_norm(wanted.hidden_states[-2])
    assert_agrees(earlier.encode_with_transformer(ids), penultimate, 1e-5)
    images = tensor("images", 2, 3, 28, 28)
    assert_agrees(model.visual(images), witness.clip_vision(config["vision_cfg"], state)(images).image_embeds, 1e-5)


# ---- pictures ----


@torch.no_grad()
@pytest.mark.parametrize("kind", [ClipImageEmbedder, FrozenOpenCLIPImageEmbedder])
def test_images_of_any_size_become_embeddings(kind):
    model = filled(kind(config=BOTH))
    images = tensor("images", 2, 3, 60, 33).clamp(-1, 1)
    z = model.encode(images)
    assert z.shape == (2, 16) and torch.equal(z, model.model.visual(prepare(images, 28)))
    assert not torch.allclose(z[0], z[1])
    half = kind(config=BOTH).half()
    half.load_state_dict(model.state_dict())
    assert half(images).dtype == torch.float16 and (half(images) - z).abs().max() < 0.02 * z.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("kind", [ClipImageEmbedder, FrozenOpenCLIPImageEmbedder])
def test_the_text_tower_is_spare(kind):
    model, images = filled(kind(config=BOTH)), tensor("images", 1, 3, 28, 28)
    z = model(images)
    assert {"model.ln_final.bias", "model.text_projection", "model.logit_scale"} < set(model.spare_weights)
    for name in model.spare_weights:
        model.get_parameter(name).fill_(float("nan"))
    assert torch.equal(model(images), z)
    model.model.visual.proj.fill_(0.0)
    assert not model(images).any()


def test_embeddings_dropped_in_training_alone():
    model = ClipImageEmbedder(config=BOTH, ucg_rate=0.5)
    images = torch.zeros(64, 3, 28, 28)
    dropped = model(images).eq(0).all(dim=1)
    assert 16 < dropped.sum() < 48
    assert not model(images, no_dropout=True).eq(0).any() and not model.eval()(images).eq(0).any()


def test_clip_preprocessing():
    grey, black = torch.zeros(1, 3, 50, 70), -torch.ones(1, 3, 300, 200)
    for image, value in ((grey, 0.5), (black, 0.0)):
        seen = prepare(image, 28)
        wanted = torch.tensor([(value - m) / s for m, s in zip((0.481, 0.458, 0.408), (0.269, 0.261, 0.276))])
        torch.testing.assert_close(seen, wanted[None, :, None, None].expand(1, 3, 28, 28), atol=5e-3, rtol=0)


def test_resizing():
    ramp = torch.linspace(-1, 1, 91).expand(1, 1, 64, 91)
    plain = resize(ramp, 28, antialias=False)
    assert plain[0, 0, 0, [0, -1]].tolist() == pytest.approx([-1, 1])  # corners stay corners
    torch.testing.assert_close(plain[0, 0, 5, 2:-2], torch.linspace(-1, 1, 28)[2:-2], atol=2e-3, rtol=0)
    stripes = torch.ones(1, 1, 64, 224)
    stripes[..., ::2] = -1.0
    assert resize(stripes, 28).abs().max() < 0.02 < 0.9 < resize(stripes, 28, antialias=False).abs().max()
    assert torch.equal(resize(ramp[..., :28, :20], 28), resize(ramp[..., :28, :20], 28, antialias=False))


def test_smoothing_is_a_gaussian():
    """A point, 3.8 times as small: the published spread is 2.8 / 2 pixels, over 5 of them."""
    image = torch.zeros(1, 1, 57, 57)
    image[..., 28, 28] = 1.0
    line = resize(image, 15)[0, 0, 7]
    weights = torch.exp(-(torch.arange(-2, 3) ** 2) / (2 * 1.4**2))
    peak = (1 / weights.sum()) ** 2
    assert line[7].item() == pytest.approx(peak.item(), rel=1e-5) and line[[4, 5, 9, 10]].abs().max() < 1e-6


# ---- start values and mistakes ----


def test_start_values_are_clips():
    blocks = Transformer(256, 2, 4, quick=False).resblocks
    width, depth = 256**-0.5, (2 * 2) ** -0.5
    expected = {
        blocks[1].attn.in_proj_weight: width,
        blocks[1].attn.out_proj.weight: width * depth,
        blocks[1].mlp.c_fc.weight: width / math.sqrt(2),
        blocks[1].mlp.c_proj.weight: width * depth,
    }
    for weight, std in expected.items():
        assert weight.std().item() == pytest.approx(std, rel=0.02)
    assert CLIP(TextTowerConfig(**TEXT), VisionTowerConfig(**VISION)).logit_scale.exp().item() == pytest.approx(
        1 / 0.07
    )


MISTAKES = [
    (lambda: FrozenOpenCLIPEmbedder("ViT-B-32"), "unknown text tower 'ViT-B-32'"),
    (lambda: FrozenOpenCLIPEmbedder(layer="pooled"), "layer must be one of"),
    (lambda: embedder(max_length=78), "max_length 2 to 77, got 78"),
    (lambda: embedder(tokenizer=None), "49408 ids, the text tower only 120"),
    (lambda: embedder(config={"hidden_size": 3}), r"no option \['hidden_size'\]"),
    (lambda: TextTowerConfig(width=10, heads=3), "width 10 is no multiple of heads 3"),
    (lambda: VisionTowerConfig(image_size=20), "image_size 20 is no multiple of patch_size 14"),
    (lambda: FrozenOpenCLIPImageEmbedder("ViT-B-32"), "unknown vision tower 'ViT-B-32'"),
    (lambda: FrozenOpenCLIPImageEmbedder(layer="last"), "layer must be 'pooled'"),
    (lambda: ClipImageEmbedder("RN50"), "unknown CLIP 'RN50'"),
    (lambda: embedder().encode_with_transformer(torch.zeros(1, 78, dtype=torch.long)), "78 tokens"),
]


@pytest.mark.parametrize("make, message", MISTAKES)
def test_mistakes_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
