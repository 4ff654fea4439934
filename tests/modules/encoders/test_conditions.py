"""The encoders of the first latent diffusion models against the goldens and the published names; BERT's tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ldm.checkpoint import build_on_meta
from ldm.modules.encoders.modules import BERTEmbedder, ClassEmbedder, SpatialRescaler
from ldm.modules.encoders.tokenizer import WordPieceTokenizer, WordTokenizer
from ldm.modules.x_transformer import TransformerWrapper
from tests.golden import assert_agrees, filled, goldens, tensor

G = goldens("losses")
KEYS = Path(__file__).parents[2] / "reference" / "keys"
PREFIX = "cond_stage_model."


@torch.no_grad()
def test_bert_golden():
    model = filled(BERTEmbedder(n_embed=32, n_layer=3, vocab_size=50, max_seq_len=12, use_tokenizer=False), PREFIX)
    tokens = torch.arange(24).reshape(2, 12) % 50
    assert_agrees(model.encode(tokens), G["bert.out"], 1e-5)
    assert [f"{key} {tuple(value.shape)}" for key, value in model.state_dict().items()] == G["bert.keys"].tolist()
    torch.testing.assert_close(model(tokens)[:1], model(tokens[:1]))


@torch.no_grad()
def test_class_golden():
    model = filled(ClassEmbedder(16, n_classes=11, key="class_label"), PREFIX)
    assert_agrees(model.encode({"class_label": torch.tensor([0, 10, 4])}), G["class.out"], 1e-6)
    assert model({"other": torch.tensor([3])}, key="other").shape == (1, 1, 16)
    for label in (11, -1):
        with pytest.raises(ValueError, match=rf"0 to 10 \(n_classes\), not \[{label}\]"):
            model({"class_label": torch.tensor([1, label])})


@torch.no_grad()
def test_rescaler_golden():
    model = filled(SpatialRescaler(n_stages=2, in_channels=5, out_channels=3), PREFIX)
    assert_agrees(model.encode(tensor("rescaler.x", 2, 5, 32, 32)), G["rescaler.out"], 1e-6)
    x = torch.rand(1, 3, 8, 8)
    assert torch.equal(SpatialRescaler(method="nearest")(x), x[:, :, ::2, ::2])
    with pytest.raises(ValueError, match="'cubic'"):
        SpatialRescaler(method="cubic")


PUBLISHED = [
    ("latent-diffusion.txt2img-1p4B-eval", "BERTEmbedder", {"n_embed": 1280, "n_layer": 32}),
    ("ldm.text2img256", "BERTEmbedder", {"n_embed": 640, "n_layer": 32}),
    ("ldm.cin256", "ClassEmbedder", {"embed_dim": 512, "key": "class_label"}),
    ("ldm.semantic_synthesis256", "SpatialRescaler", {"n_stages": 2, "in_channels": 182, "out_channels": 3}),
]


@pytest.mark.parametrize("name, encoder, params", PUBLISHED)
def test_published_names(name, encoder, params):
    model = build_on_meta({"target": f"ldm.modules.encoders.modules.{encoder}", "params": params})
    rows = (line.split("\t") for line in (KEYS / f"{name}.tsv").read_text().splitlines())
    theirs = {key.removeprefix(PREFIX): shape for key, shape, _ in rows if key.startswith(PREFIX)}
    assert theirs == {key: "x".join(map(str, value.shape)) for key, value in model.state_dict().items()}


def test_every_weight_of_bert_is_trained():
    """Otherwise processes that train together would wait for a gradient that never comes."""
    model = BERTEmbedder(n_embed=8, n_layer=1, vocab_size=10, tokenizer=WordTokenizer(["a", "cat"]), max_seq_len=6)
    model(["a cat", ""]).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="7 tokens are more than this transformer's max_seq_len of 6"):
        TransformerWrapper(10, 6, 8, 1)(torch.zeros(1, 7, dtype=torch.long))
    with pytest.raises(ValueError, match="the tokenizer has 30522 ids, vocab_size is only 50"):
        BERTEmbedder(8, 1, vocab_size=50)


# ---- BERT's tokenizer ----


@pytest.fixture(scope="module")
def vocab(tmp_path_factory) -> Path:
    """As many tokens as BERT has, a few of them real."""
    tokens = [f"[unused{i}]" for i in range(30522)]
    tokens[0], tokens[100:104] = "[PAD]", ["[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokens[2000:2012] = ["a", "photo", "##graph", "of", "cafe", "##s", ",", "!", "un", "##aff", "##able", "中"]
    path = tmp_path_factory.mktemp("bert") / "vocab.txt"
    path.write_text("\n".join(tokens) + "\n", encoding="utf-8")
    return path


def test_tokens_may_hold_any_character_of_unicode(vocab, tmp_path):
    tokens = vocab.read_text(encoding="utf-8").split("\n")
    tokens[5000:5003] = ["\u2028", "x\x85y", "\x1c"]  # each ends a line to str.splitlines
    (tmp_path / "vocab.txt").write_bytes("\r\n".join(tokens).encode())
    assert torch.equal(WordPieceTokenizer(str(tmp_path))("a photo", 5), WordPieceTokenizer(str(vocab))("a photo", 5))


TEXTS = ["", "A Photograph of cafés, unaffable!", "a 中中 photo xyz of a", "a, a! " * 40]


def test_agrees_with_transformers(vocab):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.BertTokenizerFast(str(vocab), do_lower_case=True)
    ids = theirs(TEXTS, truncation=True, max_length=20, padding="max_length", return_tensors="pt")["input_ids"]
    tokenizer = WordPieceTokenizer(str(vocab))
    assert torch.equal(tokenizer(TEXTS, 20), ids)
    assert tokenizer.decode(ids[1]) == "a photograph of cafes, unaffable!"


def test_texts_too_long_are_reported(vocab, caplog):
    WordPieceTokenizer(str(vocab))(["a photo of a"], 4)
    assert "cut off (2 tokens): 'of a'" in caplog.text


def test_where_the_vocabulary_is_looked_for(vocab, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    embedder = BERTEmbedder(8, 1)  # building needs no file
    with pytest.raises(FileNotFoundError, match=r"in .*hub: download https://.*vocab.txt and put it at models/"):
        embedder("a")
    with pytest.raises(FileNotFoundError, match="is not at none.txt: download"):
        WordPieceTokenizer("none.txt")("a", 4)
    (tmp_path / "bad.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match=r"bad.txt is not the vocabulary of bert-base-uncased \(2 tokens\)"):
        WordPieceTokenizer(str(tmp_path / "bad.txt"))("a", 4)
    snapshot = tmp_path / "hub/models--google-bert--bert-base-uncased/snapshots/1"
    snapshot.mkdir(parents=True)
    (snapshot / "vocab.txt").symlink_to(vocab)
    assert WordPieceTokenizer()("a", 4).tolist() == [[101, 2000, 102, 0]]
    own = tmp_path / "models/bert-base-uncased"
    own.mkdir(parents=True)
    (own / "vocab.txt").write_text("a\nb\n")  # comes before the cache, and can be named as a folder
    for tokenizer in (WordPieceTokenizer(), WordPieceTokenizer(str(own))):
        with pytest.raises(ValueError, match="bert-base-uncased/vocab.txt is not the vocabulary"):
            tokenizer("a", 4)
