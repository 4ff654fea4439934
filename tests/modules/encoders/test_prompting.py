"""Prompts read with emphasis, in chunks and from earlier layers: by hand, and against the plain reading."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ldm.modules.encoders.modules import BERTEmbedder, FrozenCLIPEmbedder, FrozenOpenCLIPEmbedder
from ldm.modules.encoders.prompting import PromptOptions, encode_prompts, parse_emphasis, weigh
from ldm.modules.encoders.tokenizer import CLIPTokenizer, OpenCLIPTokenizer, WordTokenizer
from tests.golden import filled

WORDS = ["a", "red", "blue", "circle", "square", ",", "(", ")", "[", "]"]
CLIP = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
OPEN_CLIP = {"width": 16, "heads": 2, "layers": 3, "embed_dim": 8}
EMPHASIS, LONG = PromptOptions(emphasis=True), PromptOptions(long_prompt=True)


def clip(length=12, tokenizer=None, **options):
    tokenizer = tokenizer or WordTokenizer(WORDS)
    config = CLIP | {"vocab_size": tokenizer.vocab_size, "max_position_embeddings": length}
    return filled(FrozenCLIPEmbedder(config=config, tokenizer=tokenizer, max_length=length, **options), "text.")


def open_clip(length=12, tokenizer=None, **options):
    tokenizer = tokenizer or WordTokenizer(WORDS)
    config = OPEN_CLIP | {"vocab_size": tokenizer.vocab_size, "context_length": length}
    return filled(FrozenOpenCLIPEmbedder(config=config, tokenizer=tokenizer, max_length=length, **options), "text.")


def bert(length=12, tokenizer=None):
    tokenizer = tokenizer or WordTokenizer(WORDS)
    model = BERTEmbedder(16, 2, vocab_size=tokenizer.vocab_size, max_seq_len=length, tokenizer=tokenizer)
    return filled(model, "text.").eval()


ENCODERS = [clip, open_clip, bert]


def read(encoder, prompts, reading=EMPHASIS):
    with torch.no_grad():
        return encode_prompts(encoder, [prompts], reading)[0]


def plain(encoder, prompts):
    with torch.no_grad():
        return encoder(prompts)


# ---- emphasis ----


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a red circle", [("a red circle", 1)]),
        ("a (red:1.2) circle", [("a ", 1), ("red", 1.2), (" circle", 1)]),
        ("(red) [circle]", [("red", 1.1), (" ", 1), ("circle", 1 / 1.1)]),
        ("((red))", [("red", 1.1 * 1.1)]),
        ("((a red) circle:2)", [("a red", 2.2), (" circle", 2)]),
        ("[(red:2)]", [("red", 2 / 1.1)]),
        ("(red : .5 )(circle:0)", [("red ", 0.5), ("circle", 0)]),
        ("(a:1.0) (red:1)", [("a red", 1)]),
        (r"a \(red\) \[x\] \\ \n", [(r"a (red) [x] \ \n", 1)]),
        (r"(a \(red\):1.5)", [("a (red)", 1.5)]),
        ("(a red", [("(a red", 1)]),
        ("a red:1.2)", [("a red:1.2)", 1)]),
        ("a ) red ] (", [("a ) red ] (", 1)]),
        ("(a [red) circle]", [("a [red", 1.1), (" circle]", 1)]),
        ("((red)", [("(", 1), ("red", 1.1)]),
        ("[red:1.2]", [("red:1.2", 1 / 1.1)]),  # a number is for round brackets
        ("(red:blue)", [("red:blue", 1.1)]),
        ("(red:1.2.3)", [("red:1.2.3", 1.1)]),
        ("()", []),
        ("", []),
    ],
)
def test_parse_emphasis(text, parts):
    found = parse_emphasis(text)
    assert [inner for inner, _ in found] == [inner for inner, _ in parts]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in parts])


@pytest.mark.parametrize("build", ENCODERS)
def test_weights_by_hand(build):
    encoder = build()
    prompts = ["a (red:1.5) [circle]", "a square"]
    z = plain(encoder, ["a red circle", "a square"])
    product = z[:1] * torch.tensor([1, 1, 1.5, 1 / 1.1, 1, 1, 1, 1, 1, 1, 1, 1])[None, :, None]
    ratio = z[:1].mean() / product.mean()
    assert ratio > 0 and abs(ratio - 1) > 1e-6
    found = read(encoder, prompts)
    torch.testing.assert_close(found[:1], product * ratio)
    assert torch.equal(found[1], z[1])  # what is not weighted stays, whatever is beside it in the batch


@pytest.mark.parametrize("build", ENCODERS)
@pytest.mark.parametrize("reading", [EMPHASIS, LONG, PromptOptions(True, True)])
def test_options_without_effect_change_nothing(build, reading):
    encoder = build()
    prompts = ["a red circle", "", "a square , a blue circle a red square a"]
    assert torch.equal(read(encoder, prompts, reading), plain(encoder, prompts))
    weighted = ["(a:1) (red:1.0) circle", "()", "([a square]) , (a blue) circle a red square a"]
    assert torch.equal(read(encoder, weighted[:2]), plain(encoder, prompts[:2]))


@pytest.mark.parametrize("build, tokenizer", [(clip, CLIPTokenizer()), (open_clip, OpenCLIPTokenizer())])
def test_published_tokenizers(build, tokenizer):
    encoder = build(24, tokenizer)
    prompts = ["a café (in (paris)), émigré", r"tom \(& jerry", "(a photo:1) of (an astronaut:1.0)"]
    same = ["a café (in (paris)), émigré", "tom (& jerry", "a photo of an astronaut"]
    assert torch.equal(read(encoder, prompts[1:]), plain(encoder, same[1:]))
    assert torch.equal(read(encoder, prompts, LONG), plain(encoder, prompts))
    ids = tokenizer.encode("a photo of an astronaut, standing")
    z = plain(encoder, ["a photo of an astronaut, standing"])
    weights = torch.ones(24)
    weights[ids.index(tokenizer.encode("astronaut")[1])] = 1.3
    found = read(encoder, ["a photo of an (astronaut:1.3), standing"])
    torch.testing.assert_close(found, z * weights[:, None] * (z.mean() / (z * weights[:, None]).mean()))


def test_the_mean_is_restored_for_each_by_itself():
    z = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0)) + torch.tensor([1.0, -2.0, 0.5])[:, None, None]
    weights = torch.tensor([[1, 1.5, 1, 0.2, 1], [1, 1, 1, 1, 1], [1, 1, 2, 2, 1.0]])
    found = weigh(z, weights)
    torch.testing.assert_close(found.mean((1, 2)), z.mean((1, 2)))
    assert torch.equal(found[1], z[1])
    ratio = found / (z * weights[..., None])
    torch.testing.assert_close(ratio, ratio[:, :1, :1].expand_as(ratio))  # nothing but the size differs
    torch.testing.assert_close(weigh(z[:1], weights[:1]), found[:1])


def test_a_mean_that_cannot_be_restored_leaves_the_product():
    z = torch.tensor([[[1.0, 1.0], [-0.9, -0.9]]])  # twice the second turns the mean's sign
    assert torch.equal(weigh(z, torch.tensor([[1.0, 2.0]])), torch.tensor([[[1.0, 1.0], [-1.8, -1.8]]]))
    z = torch.tensor([[[1.0, 1.0], [-0.5, -0.5]]])  # and here it vanishes
    assert torch.equal(weigh(z, torch.tensor([[1.0, 2.0]])), torch.tensor([[[1.0, 1.0], [-1.0, -1.0]]]))


def test_truncated_text_is_quoted_as_written(caplog):
    encoder = clip(6)
    found = read(encoder, ["a (red:1.2) circle , a (blue:2) square"])
    assert found.shape == (1, 6, 16)
    assert "has 7 tokens and the text encoder reads 4" in caplog.text and "'a blue square'" in caplog.text


# ---- long prompts ----


@pytest.mark.parametrize("build", ENCODERS)
def test_chunks_are_encoded_separately_and_concatenated(build, caplog):
    encoder = build(8)  # room for 6
    long = "a red circle a blue square a red square a square a circle a"
    parts = ["a red circle a blue square", "a red square a square a", "circle a"]
    (cond, uncond) = encode_prompts(encoder, [[long, "a circle"], ["blue"]], LONG)
    assert cond.shape == (2, 24, 16) and uncond.shape == (1, 24, 16)
    rows = plain(encoder, [*parts, "a circle", "", ""])
    assert torch.equal(cond, rows.reshape(2, 24, 16))
    torch.testing.assert_close(uncond[0], plain(encoder, ["blue", "", ""]).flatten(0, 1))
    assert not caplog.records  # nothing is cut off


def test_chunks_end_at_a_comma_among_the_last_tokens():
    encoder = clip(17)  # room for 15, the last 4 of which may be left free
    for place, cut in ((10, 15), (11, 12), (14, 15)):
        words = ["a", "red"] * 10
        words[place] = ","
        found = read(encoder, [" ".join(words)], LONG)
        rows = plain(encoder, [" ".join(words[:cut]), " ".join(words[cut:])])
        assert torch.equal(found, rows.reshape(1, 34, 16)), place


def test_commas_of_published_tokens_and_weights_across_chunks():
    encoder = clip(77, CLIPTokenizer())
    words = [*["house"] * 60, ",", *["(tree:1.4)"] * 30]
    found = read(encoder, [" ".join(words)], PromptOptions(emphasis=True, long_prompt=True))
    first, second = read(encoder, [" ".join(words[:61]), " ".join(words[61:])])
    assert torch.equal(found[0], torch.cat([first, second]))
    assert not torch.equal(second, plain(encoder, ["", " ".join(["tree"] * 30)])[1])


# ---- clip_skip ----


@torch.no_grad()
def test_layers_of_clip():
    encoder, prompts = clip(), ["a red circle", ""]
    states = encoder.transformer(encoder.tokenizer(prompts, 12)).hidden_states
    for skip in (1, 2, 3):
        expected = encoder.transformer.text_model.final_layer_norm(states[4 - skip])  # 0 is the embeddings
        assert torch.equal(read(encoder, prompts, PromptOptions(clip_skip=skip)), expected)
    assert not torch.equal(expected, plain(encoder, prompts))


def test_layers_of_open_clip_count_from_the_published_one():
    prompts, last, penultimate = ["a red circle", ""], open_clip(layer="last"), open_clip(layer="penultimate")
    assert torch.equal(read(last, prompts, PromptOptions(clip_skip=2)), plain(penultimate, prompts))
    assert torch.equal(
        read(penultimate, prompts, PromptOptions(clip_skip=2)), read(last, prompts, PromptOptions(clip_skip=3))
    )
    assert torch.equal(read(penultimate, prompts, PromptOptions(clip_skip=1)), plain(penultimate, prompts))


@pytest.mark.parametrize(
    ("encoder", "reading", "message"),
    [
        (clip, PromptOptions(clip_skip=4), "clip_skip must be from 1, the last layer, to 3, the first; got 4"),
        (clip, PromptOptions(clip_skip=0), "got 0"),
        (lambda: open_clip(layer="penultimate"), PromptOptions(clip_skip=3), "to 2, the first; got 3"),
        (bert, PromptOptions(clip_skip=2), "clip_skip 2 is for CLIP text encoders"),
        (lambda: clip(layer="pooled"), PromptOptions(clip_skip=2), "this encoder uses the 'pooled' one"),
        (lambda: clip(layer="pooled"), EMPHASIS, "one output per token; this one has 1 for 12"),
        (nn.Identity, EMPHASIS, "Identity does not encode text"),
        (lambda: BERTEmbedder(16, 1, vocab_size=20, use_tokenizer=False), LONG, "BERTEmbedder does not encode text"),
    ],
)
def test_unsupported_options_are_refused(encoder, reading, message):
    with pytest.raises(ValueError, match=message):
        read(encoder(), ["a red circle"], reading)
