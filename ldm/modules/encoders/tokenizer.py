"""Text to token ids: CLIP's byte-pair encoding, OpenCLIP's reading of it, and a plain word list.

Everything works offline: the merges ship with the package (see data/NOTICE.txt) and the vocabulary follows from
them. No file is read before a CLIP tokenizer first sees a text.
"""

from __future__ import annotations

import gzip
import html
import logging
import re
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Sequence
from functools import lru_cache
from importlib import resources
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    import tokenizers

logger = logging.getLogger(__name__)

_LONGEST_QUOTE = 300  # characters of a cut-off part that a warning quotes


class Tokens(NamedTuple):
    """A tokenised text, without start and end: `ids[i]` begins at the character `text[starts[i]]`."""

    text: str
    ids: list[int]
    starts: list[int]


class Tokenizer(ABC):
    """Turns prompts into rows of ids: start, text, end, padding. Subclasses supply `tokenize` and `_join`.

    `start_id`, `end_id`, `pad_id` and `vocab_size` are ints; ids run from 0 to vocab_size - 1.
    """

    start_id: int
    end_id: int
    pad_id: int
    vocab_size: int

    def __init__(self) -> None:
        # A run uses the same prompts batch after batch: one warning for each is enough.
        self._warned: deque[int] = deque(maxlen=256)

    @abstractmethod
    def tokenize(self, text: str) -> Tokens:
        """The ids of `text`, without start and end, neither cut nor padded."""

    @abstractmethod
    def _join(self, ids: list[int]) -> str:
        """The text of ids that hold neither start, end nor padding."""

    def encode(self, text: str) -> list[int]:
        """The ids of `text` with start and end, neither cut nor padded. TypeError if `text` is no string."""
        _check_text(text)
        return [self.start_id, *self.tokenize(text).ids, self.end_id]

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """The text of one row of ids, without start, end and padding. Capitals and spacing are not kept.

        Raises ValueError for an id outside the vocabulary.
        """
        row = [int(i) for i in ids]
        if wrong := [i for i in row if not 0 <= i < self.vocab_size]:
            raise ValueError(f"token ids run from 0 to {self.vocab_size - 1}, got {wrong[:5]}")
        if self.end_id in row:  # what follows the last end is padding, whatever its id
            row = row[: len(row) - row[::-1].index(self.end_id)]
        return self._join([i for i in row if i not in (self.start_id, self.end_id)])

    def __call__(self, texts: str | Sequence[str], max_length: int) -> Tensor:
        """Rows of exactly `max_length` ids, int64 (B, max_length), on the CPU.

        Longer texts are cut so that the end token comes last, and a warning names the part cut off.
        Raises TypeError for a text that is no string, ValueError for no text at all or `max_length` below 2.
        """
        return self.rows([self.tokenize(text) for text in check_texts(texts)], max_length)

    def rows(self, read: Sequence[Tokens], max_length: int) -> Tensor:
        """The same of texts that are tokenised."""
        if max_length < 2:
            raise ValueError(f"max_length must leave room for the start and end tokens (2), got {max_length}")
        rows = torch.full((len(read), max_length), self.pad_id, dtype=torch.long)
        for row, tokens in zip(rows, read, strict=True):
            ids = self._fit(tokens, max_length)
            row[: len(ids)] = torch.tensor(ids)
        return rows

    def _fit(self, tokens: Tokens, max_length: int) -> list[int]:
        """Start, as many tokens as fit, end."""
        room = max_length - 2
        if len(tokens.ids) > room:
            rest = tokens.text[tokens.starts[room] :].strip()
            self._warn_once(
                tokens.text,
                f"the prompt has {len(tokens.ids)} tokens and the text encoder reads {room}; "
                f"this part was cut off ({len(tokens.ids) - room} tokens): {_quote(rest)}",
            )
        return [self.start_id, *tokens.ids[:room], self.end_id]

    def _warn_once(self, text: str, message: str) -> None:
        key = hash((text, message))
        if key not in self._warned:
            self._warned.append(key)
            logger.warning(message)


class CLIPTokenizer(Tokenizer):
    """The tokenizer of OpenAI's CLIP, and so of Stable Diffusion v1: 49,408 ids, padded with the end token.

    Gives the ids of `transformers.CLIPTokenizer`: Unicode NFC, lower case, byte-pair encoding of words, single
    digits and runs of punctuation. `<|startoftext|>` and `<|endoftext|>` in a prompt stand for the special
    tokens. Half a surrogate pair, which UTF-8 cannot carry, becomes U+FFFD.
    """

    start_id = 49406
    end_id = 49407
    pad_id = 49407
    vocab_size = 49408
    specials = ("<|startoftext|>", "<|endoftext|>")
    _normalise = True

    def tokenize(self, text: str) -> Tokens:
        """The ids of `text`, cleaned, and where each begins in that."""
        text = self._clean(text)
        encoding = _byte_pair_encoder(self.specials, self._normalise).encode(text, add_special_tokens=False)
        return Tokens(text, encoding.ids, [start for start, _ in encoding.offsets])

    def _clean(self, text: str) -> str:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")

    def _join(self, ids: list[int]) -> str:
        return _byte_pair_encoder(self.specials, self._normalise).decode(ids).replace("</w>", " ").strip()


class OpenCLIPTokenizer(CLIPTokenizer):
    """The same vocabulary as open_clip uses it (Stable Diffusion v2): padded with 0, the text cleaned first.

    Cleaning mends mojibake and full-width letters (by `ftfy`), resolves HTML entities and joins white space.
    The special tokens are spelled `<start_of_text>` and `<end_of_text>`. ImportError if ftfy is not installed.
    """

    pad_id = 0
    specials = ("<start_of_text>", "<end_of_text>")
    _normalise = False

    def _clean(self, text: str) -> str:
        try:
            import ftfy
        except ImportError as error:
            raise ImportError("the OpenCLIP tokenizer needs the package ftfy: pip install ftfy") from error
        text = html.unescape(html.unescape(ftfy.fix_text(super()._clean(text))))
        return super()._clean(" ".join(text.split()).lower())


class WordTokenizer(Tokenizer):
    """One id a word, for a closed vocabulary: `<pad>` 0, `<unk>` 1, `<start>` 2, `<end>` 3, then `words`.

    Texts are split into words and single punctuation marks, regardless of case. Words outside the list become
    `<unk>` and a warning names them. Raises ValueError for a list with doubles, or with an entry that no text
    can give: one that has capitals, or that is not a single word or punctuation mark.
    """

    pad_id, unknown_id, start_id, end_id = range(4)
    specials = ("<pad>", "<unk>", "<start>", "<end>")
    _pattern = re.compile(r"\w+|[^\w\s]")

    def __init__(self, words: Iterable[str]) -> None:
        super().__init__()
        words = list(words)
        for word in words:
            _check_text(word, "a word of the word list")
        if wrong := [w for w in words if not self._pattern.fullmatch(w) or w != w.lower()]:
            raise ValueError(f"a word list takes single words and punctuation marks in lower case, not {wrong}")
        if doubles := sorted({w for w in words if words.count(w) > 1}):
            raise ValueError(f"the word list holds these more than once: {doubles}")
        self.words = [*self.specials, *words]
        self.vocab_size = len(self.words)
        self._ids = {word: index for index, word in enumerate(self.words)}

    def tokenize(self, text: str) -> Tokens:
        """The ids of the words of `text`, and where each begins; says once which words it does not know."""
        found = list(self._pattern.finditer(text))
        words = [match[0].lower() for match in found]
        if unknown := [word for word in dict.fromkeys(words) if word not in self._ids]:
            self._warn_once(
                text, f"words that this model does not know: {_quote(', '.join(unknown))} (in {_quote(text)})"
            )
        ids = [self._ids.get(word, self.unknown_id) for word in words]
        return Tokens(text, ids, [match.start() for match in found])

    def _join(self, ids: list[int]) -> str:
        return " ".join(self.words[i] for i in ids if i != self.pad_id)


def _quote(text: str) -> str:
    """`text` in quotes, short enough for a message and without control characters."""
    return repr(text if len(text) <= _LONGEST_QUOTE else text[:_LONGEST_QUOTE] + "...")


def check_texts(texts: object) -> list[str]:
    """One string, or a sequence of them, as a list. TypeError for anything else, ValueError for no text at all."""
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, Sequence) or isinstance(texts, bytes):
        raise TypeError(f"prompts must be a string or a list of strings, got {type(texts).__name__}: {texts!r}")
    if not texts:
        raise ValueError("there is no prompt: pass at least one string (the empty string '' is one)")
    for index, text in enumerate(texts):
        _check_text(text, f"prompt {index} of {len(texts)}")
    return list(texts)


def _check_text(text: object, name: str = "a prompt") -> None:
    if not isinstance(text, str):
        raise TypeError(f"{name} must be a string, got {type(text).__name__}: {text!r}")


def clip_merges() -> list[tuple[str, str]]:
    """CLIP's 48,894 byte-pair merges, the most urgent first."""
    packed = resources.files(__package__).joinpath("data", "clip_merges.txt.gz").read_bytes()
    first_second = (line.split(" ") for line in gzip.decompress(packed).decode("utf-8").splitlines())
    return [(first, second) for first, second in first_second]


def clip_vocabulary(merges: Iterable[tuple[str, str]], specials: Sequence[str]) -> dict[str, int]:
    """Token to id: 256 bytes, 256 bytes that end a word, one token a merge, the specials.

    A byte's symbol is its Latin-1 character where that is printable; the others follow from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    symbols = [chr(i) for i in [*printable, *range(0x100, 0x200 - len(printable))]]
    merged = [first + second for first, second in merges]
    return {t: i for i, t in enumerate([*symbols, *(s + "</w>" for s in symbols), *merged, *specials])}


@lru_cache(maxsize=2)
def _byte_pair_encoder(specials: tuple[str, str], normalise: bool) -> tokenizers.Tokenizer:
    """CLIP's byte-pair encoder, built once a process and shared: copies of a tokenizer stay light."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import BPE

    merges = clip_merges()
    vocabulary = clip_vocabulary(merges, specials)
    encoder = Tokenizer(BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>"))
    encoder.add_special_tokens([AddedToken(s, normalized=False, special=True) for s in specials])
    if normalise:
        encoder.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
    words = "|".join(re.escape(s) for s in specials) + r"|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
    encoder.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    encoder.decoder = decoders.ByteLevel()
    return encoder
