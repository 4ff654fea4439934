"""Published attributes and override points of the encoders, as textual inversion and similar projects use them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ldm.checkpoint import build_on_meta
from ldm.modules.encoders.modules import (
    AbstractEncoder,
    BERTEmbedder,
    BERTTokenizer,
    ClassEmbedder,
    FrozenCLIPEmbedder,
    FrozenCLIPT5Encoder,
    FrozenOpenCLIPEmbedder,
    FrozenT5Embedder,
    IdentityEncoder,
    SpatialRescaler,
    TransformerEmbedder,
    disabled_train,
)
from ldm.modules.encoders.tokenizer import CLIPTokenizer, WordTokenizer
from tests.golden import filled

WORDS = ["a", "red", "circle"]
CLIP = {"vocab_size": 7, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
CLIP |= {"intermediate_size": 32, "max_position_embeddings": 8}
OPEN_CLIP = {"width": 16, "heads": 2, "layers": 3, "vocab_size": 7, "context_length": 8, "embed_dim": 8}


def clip(kind: type[FrozenCLIPEmbedder] = FrozenCLIPEmbedder, **options) -> FrozenCLIPEmbedder:
    return filled(kind(config=CLIP, tokenizer=WordTokenizer(WORDS), max_length=8, **options))


def open_clip(kind: type[FrozenOpenCLIPEmbedder] = FrozenOpenCLIPEmbedder, **options) -> FrozenOpenCLIPEmbedder:
    return filled(kind(config=OPEN_CLIP, tokenizer=WordTokenizer(WORDS), max_length=8, **options))


# ---- textual inversion ----


def test_an_added_token_is_trained_alone():
    model = clip()
    with torch.no_grad():
        before = model("a red circle")
    assert model.tokenizer.add_tokens("<cat-toy>") == 1 and model.tokenizer.add_tokens(["<cat-toy>"]) == 0
    new = model.tokenizer.convert_tokens_to_ids("<cat-toy>")
    assert new == 7 and len(model.tokenizer) == 8 == len(model.tokenizer.get_vocab())
    model.transformer.resize_token_embeddings(len(model.tokenizer))
    embeddings = model.transformer.get_input_embeddings().weight
    embeddings.data[new] = embeddings.data[5]
    assert torch.equal(model("a red circle"), before) and torch.equal(model("a <Cat-Toy> circle"), before)

    embeddings.requires_grad_(True)
    optimizer = torch.optim.SGD([embeddings], lr=1.0)
    model("a <cat-toy>").square().mean().backward()
    embeddings.grad[:new] = 0.0
    optimizer.step()
    assert torch.equal(model("a red circle"), before) and not torch.allclose(model("a <cat-toy> circle"), before)
    assert torch.equal(copy.deepcopy(model)("a <cat-toy>"), model("a <cat-toy>"))


def test_added_tokens_of_clip():
    tokenizer = CLIPTokenizer()
    assert tokenizer.add_tokens(["<a>", "sks"]) == 2
    plain = CLIPTokenizer()
    assert tokenizer.encode("photo of <a> sks, dog") == [
        *plain.encode("photo of")[:-1],
        49408,
        49409,
        *plain.encode(", dog")[1:],
    ]
    assert tokenizer.decode(tokenizer("photo of <a> dog", 77)[0]) == "photo of <a> dog"
    assert tokenizer.tokenize("of <a> dog").starts == [0, 3, 7]
    assert plain.encode("<a>") == CLIPTokenizer().encode("<a>")  # other tokenizers are unaffected
    with pytest.raises(ValueError, match="white space"):
        tokenizer.add_tokens(" a")


def test_replaced_embeddings_take_effect():
    """Textual inversion's way: an instance `forward` that writes a vector in place of a placeholder token."""
    model, vector = clip(), torch.full((16,), 0.3)
    embeddings = model.transformer.text_model.embeddings

    def forward(input_ids=None, position_ids=None, inputs_embeds=None, embedding_manager=None):
        x = embeddings.token_embedding(input_ids)
        x[input_ids == 5] = vector
        return x + embeddings.position_embedding(embeddings.position_ids[:, : x.shape[1]])

    with torch.no_grad():
        before = model("a red circle")
        embeddings.forward = forward
        assert not torch.allclose(model("a red circle"), before)
        assert torch.equal(model("a circle"), clip()("a circle"))
        del embeddings.forward
        assert torch.equal(model("a red circle"), before)


def test_a_replaced_token_embedding_takes_effect():
    """The web UI's way: a module around the token embedding."""

    class Fixed(nn.Module):
        def __init__(self, wrapped: nn.Module) -> None:
            super().__init__()
            self.wrapped = wrapped

        def forward(self, input_ids):
            return self.wrapped(input_ids) * 2

    model = clip()
    before = model("a")
    embeddings = model.transformer.text_model.embeddings
    embeddings.token_embedding = Fixed(embeddings.token_embedding)
    assert not torch.allclose(model("a"), before)


@pytest.mark.parametrize("build", [clip, open_clip])
def test_a_replaced_tokenizer_takes_effect(build):
    model = build()
    before, encode = model("a red circle"), model.tokenizer.encode
    model.tokenizer.encode = lambda text: encode(text.replace("red", "a"))
    assert torch.equal(model("a red circle"), build()("a a circle")) and not torch.equal(model("a red"), before)


def test_towers_of_transformers_can_replace_ours():
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPTextConfig(
        **CLIP, eos_token_id=3, bos_token_id=2, pad_token_id=0, hidden_act="quick_gelu"
    )
    for options in ({}, {"layer": "hidden", "layer_idx": 1}, {"layer": "pooled"}):
        ours, model = clip(**options), clip(**options)
        model.transformer = transformers.CLIPTextModel(config).eval()
        flat = not any(key.startswith("text_model.") for key in model.transformer.state_dict())  # transformers 5
        state = {k.removeprefix("text_model.") if flat else k: v for k, v in ours.transformer.state_dict().items()}
        model.transformer.load_state_dict(state, strict=False)
        torch.testing.assert_close(model("a red"), ours("a red"), atol=1e-5, rtol=1e-5)


# ---- calls and attributes ----


class Recorder(FrozenOpenCLIPEmbedder):
    calls: list[str]

    def encode_with_transformer(self, text):
        self.calls.append("encode_with_transformer")
        return super().encode_with_transformer(text)

    def text_transformer_forward(self, x, attn_mask=None):
        self.calls.append(f"text_transformer_forward {tuple(x.shape)} {tuple(attn_mask.shape)}")
        for block in self.model.transformer.resblocks[: len(self.model.transformer.resblocks) - self.layer_idx]:
            x = block(x, attn_mask=attn_mask)
        return x


@torch.no_grad()
def test_open_clip_calls_what_the_original_calls():
    model = open_clip(Recorder, layer="penultimate")
    model.calls = []
    z = model.encode(["a", "red"])
    assert model.calls == ["encode_with_transformer", "text_transformer_forward (8, 2, 16) (8, 8)"]
    assert torch.equal(z, open_clip(layer="penultimate")(["a", "red"]))


def test_clip_encode_calls_forward():
    class Doubled(FrozenCLIPEmbedder):
        def forward(self, text):
            return 2 * super().forward(text)

    assert torch.equal(clip(Doubled).encode("a"), 2 * clip()("a"))


@pytest.mark.parametrize("build", [clip, open_clip])
def test_published_attributes(build):
    model = build()
    model.device = "cuda"  # what published scripts set
    assert model.device == torch.device("cpu") and model.max_length == 8 and model.layer == "last"
    assert model("a").device.type == "cpu"
    model.train().requires_grad_(True)
    model.freeze()
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert disabled_train(model, True) is model and not model.training


def test_a_tokenizer_is_called_like_those_of_transformers():
    words = WordTokenizer(WORDS)
    batch = words(["a red", ""], padding="max_length", truncation=True, max_length=5, return_tensors="pt")
    assert torch.equal(batch["input_ids"], words(["a red", ""], 5)) and batch.input_ids is batch["input_ids"]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]
    assert words("a red").input_ids == [2, 4, 5, 3]
    assert words(["a red", "a"], add_special_tokens=False, truncation=False)["input_ids"] == [[4, 5], [4]]
    assert words(["a red", "a"], padding=True, return_length=True).length == [4, 4]
    assert words("a red a", truncation=True, max_length=4).input_ids == [2, 4, 5, 3]
    assert words.convert_tokens_to_ids(["a", "<end>"]) == [4, 3]
    with pytest.raises(TypeError, match="return_offsets"):
        words("a", return_offsets=True)
    with pytest.raises(KeyError):
        words.convert_tokens_to_ids("mauve")


def test_bert_tokenizer_as_a_module():
    module = BERTTokenizer(max_length=5, tokenizer=WordTokenizer(WORDS))
    assert module("a red").tolist() == [[2, 4, 5, 3, 0]] and module.decode("a") == "a"
    nothing, none, (first, second, ids) = module.encode("a red")
    assert nothing is none is first is second is None and torch.equal(ids, module("a red"))
    assert torch.equal(BERTTokenizer(vq_interface=False, max_length=5, tokenizer=module.tokenizer).encode("a red"), ids)


@torch.no_grad()
def test_bert_embedder_uses_its_tokenizer_module():
    model = filled(BERTEmbedder(8, 1, vocab_size=7, max_seq_len=6, tokenizer=WordTokenizer(WORDS)))
    before = model.encode("a red")
    plain = TransformerEmbedder(8, 1, 7, max_seq_len=6)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain.encode(model.tknz_fn("a red")), before)
    model.tknz_fn.forward = lambda text: torch.full((1, 6), 5)
    assert not torch.equal(model("a red"), before)
    assert plain.transformer(torch.zeros(1, 2, dtype=torch.long)).shape == (1, 2, 7)  # logits


def test_classes_and_their_null_class():
    model = ClassEmbedder(4, n_classes=1001, key="cls")
    batch = model.get_unconditional_conditioning(2, device="cpu")
    assert batch["cls"].tolist() == [1000, 1000] and model.encode(batch).shape == (2, 1, 4)
    with pytest.raises(ValueError, match="null_class"):
        ClassEmbedder(4, n_classes=10).get_unconditional_conditioning(1)
    dropping = ClassEmbedder(4, n_classes=10, ucg_rate=0.5)
    labels = {"class": torch.zeros(200, dtype=torch.long)}
    dropped = (dropping(labels)[:, 0] == dropping.embedding.weight[9]).all(dim=1).sum()
    assert 60 < dropped < 140
    assert torch.equal(dropping(labels, disable_dropout=True), dropping.eval()(labels))
    assert dropping.get_unconditional_conditioning(1)["class"].tolist() == [9]


def test_small_encoders():
    x = torch.rand(1, 3, 8, 8)
    assert IdentityEncoder().encode(x) is x and isinstance(IdentityEncoder(), AbstractEncoder)
    rescaler = SpatialRescaler(n_stages=2)
    assert rescaler.multiplier == 0.5 and not rescaler.remap_output
    rescaler.interpolator = lambda x, scale_factor: x + scale_factor
    assert torch.equal(rescaler.encode(x), x + 1.0)


# ---- T5 ----


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    """A tiny T5 in transformers' layout."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    folder = tmp_path_factory.mktemp("t5")
    vocab = {"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3, "red": 4, "circle": 5}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(folder)
    config = transformers.T5Config(vocab_size=6, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
    transformers.T5EncoderModel(config).save_pretrained(folder)
    return folder


@torch.no_grad()
def test_t5_from_a_folder(t5):
    from transformers import T5EncoderModel

    model = FrozenT5Embedder(str(t5), max_length=7)
    ids = torch.tensor([[3, 4, 5, 1, 0, 0, 0], [3, 1, 0, 0, 0, 0, 0]])
    expected = T5EncoderModel.from_pretrained(t5).eval()(input_ids=ids).last_hidden_state
    assert torch.equal(model.encode(["a red circle", "a"]), expected) and expected.shape == (2, 7, 8)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    both = FrozenCLIPT5Encoder(
        t5_version=str(t5), t5_max_length=7, clip_config=CLIP | {"vocab_size": 49408}, clip_max_length=8
    )
    first, second = both.encode(["a red circle", "a"])
    assert torch.equal(second, expected) and torch.equal(first, both.clip_encoder(["a red circle", "a"]))


def test_t5_is_built_without_weights_for_a_checkpoint(t5):
    target = {"target": "ldm.modules.encoders.modules.FrozenT5Embedder", "params": {"version": str(t5)}}
    assert all(p.is_meta for p in build_on_meta(target).parameters())


def test_t5_is_not_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        FileNotFoundError, match="download config.json, the tokenizer and model.safetensors of google/t5"
    ):
        FrozenT5Embedder()
    with pytest.raises(FileNotFoundError, match=f"not at {tmp_path}"):
        FrozenT5Embedder(str(tmp_path))
