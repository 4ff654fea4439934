"""Token ids against the published ones, transformers' tokenizer as a witness, and what users type by accident."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import pickle
import random
from pathlib import Path

import pytest
import torch

from ldm.modules.encoders import tokenizer as module
from ldm.modules.encoders.tokenizer import CLIPTokenizer, OpenCLIPTokenizer, WordTokenizer

GOLDENS = json.loads((Path(__file__).parents[2] / "reference/goldens/tokens.json").read_text(encoding="utf-8"))
ASTRONAUT = "a photograph of an astronaut riding a horse"
ASTRONAUT_IDS = [49406, 320, 8853, 539, 550, 18376, 6765, 320, 4558, 49407]


@pytest.fixture(scope="module")
def clip() -> CLIPTokenizer:
    return CLIPTokenizer()


@pytest.fixture()
def fresh() -> CLIPTokenizer:
    return CLIPTokenizer()  # has reported nothing yet


def test_merges_are_the_published_ones():
    text = "".join(f"{first} {second}\n" for first, second in module.clip_merges())
    digest = "d308b7377a8ceaa9707a21614fe8c831b9196e197b7aeb69833359362907af02"
    assert hashlib.sha256(text.encode()).hexdigest() == digest


def test_vocabulary_has_the_published_ids():
    merges = module.clip_merges()
    vocabulary = module.clip_vocabulary(merges, CLIPTokenizer.specials)
    assert len(merges) == 48894
    assert sorted(vocabulary.values()) == list(range(49408))
    published = {"!": 0, "!</w>": 256, "in": 512, "a</w>": 320, "horse</w>": 4558, "<|startoftext|>": 49406}
    assert {token: vocabulary[token] for token in published} == published


@pytest.mark.parametrize("golden", GOLDENS, ids=[g["prompt"][:20] for g in GOLDENS])
def test_goldens(clip, golden):
    assert clip.encode(golden["prompt"]) == golden["clip"]
    assert OpenCLIPTokenizer().encode(golden["prompt"]) == (golden["open_clip"] or golden["clip"])


def _fuzz(count: int) -> list[str]:
    rng = random.Random(0)
    parts = [
        "the ",
        "Cat",
        "'s",
        "'LL ",
        "2022",
        " ½",
        "²",
        "!!",
        "?",
        "\t",
        "\u00a0",
        "\u3000",
        "é",
        "e\u0301",
        "ß",
        "İ",
    ]
    parts += ["Σας", "猫", "ﬁ", "\U0001f469\u200d\U0001f467", "ｗ", "_", "-", "</w>", "<|endoftext|>", "<|ENDOFTEXT|>"]
    parts += [
        "<|startoftext|>",
        "\x00",
        "\u200b",
        "\ufeff",
        "ǅ",
        "&amp;",
        "नमस्ते",
        "مرحبا",
        "\u2028",
        "’",
        "\n",
        "Ⅷ",
        "k",
    ]
    return ["".join(rng.choices(parts, k=rng.randrange(1, 12))) for _ in range(count)]


def test_agrees_with_transformers(clip, tmp_path):
    transformers = pytest.importorskip("transformers")
    merges = module.clip_merges()
    (tmp_path / "vocab.json").write_text(json.dumps(module.clip_vocabulary(merges, CLIPTokenizer.specials)))
    lines = ["#version: 0.2", *(f"{first} {second}" for first, second in merges)]
    (tmp_path / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    witness = transformers.CLIPTokenizerFast.from_pretrained(tmp_path, local_files_only=True)
    prompts = [g["prompt"] for g in GOLDENS] + _fuzz(500)
    if witness("<|ENDOFTEXT|>").input_ids == witness("<|endoftext|>").input_ids:  # before transformers 5
        prompts = [prompt for prompt in prompts if "<|ENDOFTEXT|>" not in prompt]
    assert [clip.encode(p) for p in prompts] == [witness(p).input_ids for p in prompts]
    rows = witness(prompts, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
    assert torch.equal(clip(prompts, 77), rows)


def test_padding(clip):
    ids = clip([ASTRONAUT, ""], 77)
    assert ids.dtype == torch.long and ids.shape == (2, 77)
    assert ids[0].tolist() == ASTRONAUT_IDS + [49407] * 67
    assert ids[1].tolist() == [49406] + [49407] * 76
    assert OpenCLIPTokenizer()(ASTRONAUT, 77)[0].tolist() == ASTRONAUT_IDS + [0] * 67


def test_a_single_string_is_one_prompt(clip):
    assert torch.equal(clip(ASTRONAUT, 20), clip([ASTRONAUT], 20))


def test_long_prompts_are_cut_and_the_part_is_named(fresh, caplog):
    fits = " ".join(["word"] * 75)
    with caplog.at_level(logging.WARNING):
        ids = fresh([fits, fits + " Hidden  Ünïcorn, here"], 77)
    assert torch.equal(ids[0], ids[1])
    assert ids[0].tolist() == [49406] + [2653] * 75 + [49407]
    assert len(caplog.records) == 1
    assert "'Hidden  Ünïcorn, here'" in caplog.text  # in the user's own spelling


def test_truncation_is_reported_once_per_prompt(fresh, caplog):
    with caplog.at_level(logging.WARNING):
        fresh(["one two three four"] * 3, 4)
        fresh(["one two three four", "one two three five"], 4)
    assert [r.getMessage().rpartition(": ")[2] for r in caplog.records] == ["'three four'", "'three five'"]


def test_a_very_long_prompt_is_quoted_in_part(fresh, caplog):
    ids = fresh("lorem ipsum " * 20_000, 77)
    assert ids.shape == (1, 77) and ids[0, -1] == 49407
    assert len(caplog.text) < 1000


def test_half_a_surrogate_pair_becomes_the_replacement_character(clip):
    assert clip.encode("a \ud800cat \udc31") == clip.encode("a \ufffdcat \ufffd")
    assert clip.encode("\ud83d\udc31") == clip.encode("\U0001f431")


@pytest.mark.parametrize("text", [None, 3, b"bytes", ["a", None], ["a", ["b"]]])
def test_non_strings_are_refused(clip, text):
    with pytest.raises(TypeError, match="string"):
        clip(text, 77)


def test_no_prompt_and_too_small_max_length_are_refused(clip):
    with pytest.raises(ValueError, match="no prompt"):
        clip([], 77)
    with pytest.raises(ValueError, match="got 1"):
        clip("a", 1)
    with pytest.raises(TypeError, match="NoneType"):
        clip.encode(None)


def test_decode(clip):
    assert clip.decode(ASTRONAUT_IDS + [49407] * 67) == ASTRONAUT
    assert clip.decode(clip("Ünïcödé 猫 \U0001f431!", 77)[0]) == "ünïcödé 猫 \U0001f431!"
    assert OpenCLIPTokenizer().decode(OpenCLIPTokenizer()(ASTRONAUT, 77)[0]) == ASTRONAUT
    with pytest.raises(ValueError, match="49408"):
        clip.decode([49408])


def test_open_clip_cleans_the_text_first():
    tokenizer = OpenCLIPTokenizer()
    assert tokenizer.encode("tom &amp; jerry’s\n\n CAFÃ©") == tokenizer.encode("tom & jerry's café")


def test_open_clip_says_how_to_get_ftfy(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ftfy", None)
    with pytest.raises(ImportError, match="pip install ftfy"):
        OpenCLIPTokenizer().encode("a")


def test_copies_are_light_and_alike(clip):
    clip.encode("a")
    assert len(pickle.dumps(clip)) < 10_000
    assert copy.deepcopy(clip).encode(ASTRONAUT) == pickle.loads(pickle.dumps(clip)).encode(ASTRONAUT) == ASTRONAUT_IDS


class TestWordTokenizer:
    words = ("a", "red", "circle", ",", "8")

    def test_ids(self):
        tokenizer = WordTokenizer(self.words)
        assert tokenizer.vocab_size == 9
        assert tokenizer.encode("A red CIRCLE, 8") == [2, 4, 5, 6, 7, 8, 3]
        assert tokenizer(["a", ""], 5).tolist() == [[2, 4, 3, 0, 0], [2, 3, 0, 0, 0]]
        assert tokenizer.decode([2, 4, 5, 1, 3, 0, 0]) == "a red <unk>"

    def test_unknown_words_are_named_once(self, caplog):
        tokenizer = WordTokenizer(self.words)
        assert tokenizer(["a mauve dog, mauve"] * 2, 8)[0].tolist() == [2, 4, 1, 1, 7, 1, 3, 0]
        assert len(caplog.records) == 1
        assert "'mauve, dog' " in caplog.text

    def test_the_part_cut_off_is_named(self, caplog):
        assert WordTokenizer(self.words)("a red circle , a red", 5).tolist() == [[2, 4, 5, 6, 3]]
        assert "', a red'" in caplog.text

    def test_special_names_in_a_text_are_only_words(self):
        assert 3 not in WordTokenizer(self.words).tokenize("<end>").ids

    @pytest.mark.parametrize("words", [["red", "red"], ["Red"], ["two words"], [""], ["<unk>"]])
    def test_bad_lists_are_refused(self, words):
        with pytest.raises(ValueError, match="word"):
            WordTokenizer(words)

    def test_a_word_that_is_no_string_is_refused(self):
        with pytest.raises(TypeError, match="int"):
            WordTokenizer(["red", 8])
