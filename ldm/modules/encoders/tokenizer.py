"""Text to token ids: byte-pair encoding (CLIP, OpenCLIP), WordPiece (BERT) and word lists.

Tokenizers are called like those of transformers. Everything works offline: CLIP's merges ship with the package (see
data/NOTICE.txt), BERT's vocabulary is read from disk. No file is read before the first text is tokenized.
"""

from __future__ import annotations

import gzip
import html
import logging
import os
import re
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ldm.util import public_path

if TYPE_CHECKING:
    import tokenizers

logger = logging.getLogger(__name__)

_LONGEST_QUOTE = 300  # characters of a truncated part that a warning quotes


class Tokens(NamedTuple):
    """A tokenized text without special tokens: `ids[i]` begins at the character `text[starts[i]]`."""

    text: str
    ids: list[int]
    starts: list[int]


class BatchEncoding(dict[str, Any]):
    """A tokenizer's output, with entries as attributes too: `input_ids`, `attention_mask`, `length`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Tokenizer(ABC):
    """Base class of tokenizers. Subclasses implement `_tokenize`, `_join` and `get_vocab`.

    Attributes:
        bos_token_id, eos_token_id, pad_token_id: Ids of the start, end and padding tokens.
        vocab_size: Number of ids, without those of `add_tokens`.
    """

    bos_token_id: int
    eos_token_id: int
    pad_token_id: int
    vocab_size: int

    def __init__(self) -> None:
        self.added_tokens: dict[str, int] = {}
        self._warned: deque[int] = deque(maxlen=256)  # warn once per prompt: the same ones come batch after batch

    @abstractmethod
    def _tokenize(self, text: str) -> Tokens:
        """Tokenize a text without added tokens."""

    @abstractmethod
    def _join(self, ids: list[int]) -> str:
        """Decode ids without special and added tokens."""

    @abstractmethod
    def get_vocab(self) -> dict[str, int]:
        """Return ids by token."""

    def __len__(self) -> int:
        return self.vocab_size + len(self.added_tokens)

    def __bool__(self) -> bool:
        return True

    def add_tokens(self, new_tokens: str | Sequence[str]) -> int:
        """Add tokens with ids from `len(self)` on, matched regardless of case; returns how many were new.

        The text encoder needs a row for each: `transformer.resize_token_embeddings(len(tokenizer))`.
        """
        before = len(self)
        for token in [new_tokens] if isinstance(new_tokens, str) else new_tokens:
            if not token or token != token.strip():
                raise ValueError(f"a token must not be empty or begin or end with white space, got {token!r}")
            self.added_tokens.setdefault(token.lower(), len(self))
        return len(self) - before

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """Look up the id of a token, or the ids of several. KeyError for unknown tokens."""
        known = self.get_vocab() | self.added_tokens
        if isinstance(tokens, str):
            return known[tokens] if tokens in known else known[tokens.lower()]
        return [self.convert_tokens_to_ids(token) for token in tokens]

    def tokenize(self, text: str) -> Tokens:
        """Tokenize `text` without special tokens, truncation or padding."""
        if not self.added_tokens:
            return self._tokenize(text)
        pattern = "|".join(re.escape(token) for token in sorted(self.added_tokens, key=len, reverse=True))
        result, ids, starts = "", [], []
        for part in re.split(f"({pattern})", text, flags=re.IGNORECASE):
            added = self.added_tokens.get(part.lower())
            tokens = self._tokenize(part) if added is None else Tokens(part, [added], [0])
            starts += [len(result) + start for start in tokens.starts]
            ids += tokens.ids
            result += tokens.text
        return Tokens(result, ids, starts)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Encode one text with start and end tokens, without truncation or padding.

        Raises:
            TypeError: If `text` is not a string.
        """
        _check_text(text)
        ids = self.tokenize(text).ids
        return [self.bos_token_id, *ids, self.eos_token_id] if add_special_tokens else ids

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """Decode one row of ids, dropping start, end and padding. Case and spacing may differ from the original text.

        Raises:
            ValueError: If an id is outside the vocabulary.
        """
        row = [int(i) for i in ids]
        if wrong := [i for i in row if not 0 <= i < len(self)]:
            raise ValueError(f"token ids run from 0 to {len(self) - 1}, got {wrong[:5]}")
        if self.eos_token_id in row:  # what follows the last end token is padding, whatever its id
            row = row[: len(row) - row[::-1].index(self.eos_token_id)]
        row = [i for i in row if i not in (self.bos_token_id, self.eos_token_id)]
        if not self.added_tokens:
            return self._join(row)
        names = {i: token for token, i in self.added_tokens.items()}
        parts, run = [], list[int]()
        for i in row:
            if i in names:
                parts += [self._join(run)] * bool(run) + [names[i]]
                run = []
            else:
                run.append(i)
        return " ".join(parts + [self._join(run)] * bool(run))

    def __call__(self, text: str | Sequence[str], max_length: int | None = None, **options: Any) -> Any:
        """Encode a batch of texts.

        `tokenizer(texts, max_length)` returns int64 ids (B, max_length), truncated and padded. With options, as in
        transformers, or without `max_length`, it returns a `BatchEncoding`.

        Args:
            text: One or several texts. Each goes through `encode`.
            max_length: Length of rows. Longer texts keep their end token, and a warning quotes the truncated part.
            **options: `padding` ("max_length", "longest", True, False), `truncation`, `return_tensors` ("pt"),
                `add_special_tokens`, `return_length`, `return_overflowing_tokens` (False only).

        Raises:
            TypeError: If a text is not a string, or an option is unknown.
            ValueError: If there is no text, or `max_length` is below 2.
        """
        if max_length is not None and not options:
            batch = self._encode_batch(text, max_length, padding="max_length", truncation=True, return_tensors="pt")
            return batch.input_ids
        return self._encode_batch(text, max_length or 77, **options)

    def _encode_batch(
        self,
        text: str | Sequence[str],
        max_length: int,
        *,
        padding: bool | str = False,
        truncation: bool = False,
        return_tensors: str | None = None,
        add_special_tokens: bool = True,
        return_length: bool = False,
        return_overflowing_tokens: bool = False,
        return_attention_mask: bool = True,
    ) -> BatchEncoding:
        if return_overflowing_tokens or return_tensors not in (None, "pt"):
            raise ValueError("return_overflowing_tokens is not supported, and return_tensors must be 'pt' or None")
        single = isinstance(text, str) and return_tensors is None
        texts = check_texts(text)
        rows = [self.encode(t) if add_special_tokens else self.encode(t, add_special_tokens=False) for t in texts]
        if truncation:
            _check_length(max_length)
            rows = [self._truncate(t, row, max_length, add_special_tokens) for t, row in zip(texts, rows, strict=True)]
        lengths = [len(row) for row in rows]
        width = {"max_length": max_length, "longest": max(lengths), True: max(lengths), False: 0}[padding]
        masks = [[1] * n + [0] * (width - n) for n in lengths]
        rows = [row + [self.pad_token_id] * (width - len(row)) for row in rows]
        columns: dict[str, Any] = {"input_ids": rows} | ({"attention_mask": masks} if return_attention_mask else {})
        if return_length:
            columns["length"] = [len(row) for row in rows]
        if return_tensors == "pt":
            return BatchEncoding({name: torch.tensor(value) for name, value in columns.items()})
        return BatchEncoding({name: value[0] if single else value for name, value in columns.items()})

    def rows(self, batch: Sequence[Tokens], max_length: int) -> Tensor:
        """Add special tokens to tokenized texts, truncate and pad them: int64 (B, max_length)."""
        _check_length(max_length)
        rows = torch.full((len(batch), max_length), self.pad_token_id, dtype=torch.long)
        for row, tokens in zip(rows, batch, strict=True):
            ids = self._truncate(tokens, [self.bos_token_id, *tokens.ids, self.eos_token_id], max_length)
            row[: len(ids)] = torch.tensor(ids)
        return rows

    def _truncate(self, text: str | Tokens, ids: list[int], max_length: int, special: bool = True) -> list[int]:
        """Shorten ids to `max_length`, keeping the end token, and warn of what is lost."""
        if len(ids) <= max_length:
            return ids
        tokens = self.tokenize(text) if isinstance(text, str) else text
        limit = max_length - 2 * special
        rest = tokens.text[tokens.starts[limit] :].strip() if limit < len(tokens.starts) else ""
        count = len(ids) - 2 * special
        self._warn_once(
            tokens.text,
            f"the prompt has {count} tokens and the text encoder reads {limit}; this part was cut off "
            f"({count - limit} tokens): {_quote(rest)}",
        )
        return [*ids[: max_length - 1], ids[-1]] if special else ids[:max_length]

    def _warn_once(self, text: str, message: str) -> None:
        key = hash((text, message))
        if key not in self._warned:
            self._warned.append(key)
            logger.warning(message)


class CLIPTokenizer(Tokenizer):
    """Tokenizer of OpenAI's CLIP and of Stable Diffusion v1: 49,408 ids, padded with the end token.

    Gives the ids of `transformers.CLIPTokenizer`: Unicode NFC, lower case, byte-pair encoding of words, single
    digits and runs of punctuation. `<|startoftext|>` and `<|endoftext|>` in a prompt stand for the special
    tokens. Half a surrogate pair, which UTF-8 cannot encode, becomes U+FFFD.
    """

    bos_token_id = 49406
    eos_token_id = 49407
    pad_token_id = 49407
    vocab_size = 49408
    specials = ("<|startoftext|>", "<|endoftext|>")
    _normalise = True

    def get_vocab(self) -> dict[str, int]:
        """Return ids by token."""
        return _byte_pair_encoder(self.specials, self._normalise).get_vocab() | self.added_tokens

    def _tokenize(self, text: str) -> Tokens:
        text = self._clean(text)
        encoding = _byte_pair_encoder(self.specials, self._normalise).encode(text, add_special_tokens=False)
        return Tokens(text, encoding.ids, [start for start, _ in encoding.offsets])

    def _clean(self, text: str) -> str:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")

    def _join(self, ids: list[int]) -> str:
        return _byte_pair_encoder(self.specials, self._normalise).decode(ids).replace("</w>", " ").strip()


class OpenCLIPTokenizer(CLIPTokenizer):
    """Tokenizer of open_clip and Stable Diffusion v2: CLIP's vocabulary, padded with 0, text cleaned first.

    Cleaning fixes mojibake and full-width letters with `ftfy`, resolves HTML entities and collapses white space.
    The special tokens are `<start_of_text>` and `<end_of_text>`. ImportError if ftfy is not installed.
    """

    pad_token_id = 0
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
    """One id per word of a closed vocabulary: `<pad>` 0, `<unk>` 1, `<start>` 2, `<end>` 3, then `words`.

    Texts are split into words and single punctuation marks, regardless of case. Unknown words become `<unk>`, with a
    warning. Raises ValueError for duplicates and for entries that are not one lower-case word or punctuation mark.
    """

    pad_token_id, unk_token_id, bos_token_id, eos_token_id = range(4)
    specials = ("<pad>", "<unk>", "<start>", "<end>")
    _pattern = re.compile(r"\w+|[^\w\s]")

    def __init__(self, words: Iterable[str]) -> None:
        super().__init__()
        words = list(words)
        for word in words:
            _check_text(word, "a word of the word list")
        if wrong := [w for w in words if not self._pattern.fullmatch(w) or w != w.lower()]:
            raise ValueError(f"a word list takes single words and punctuation marks in lower case, not {wrong}")
        if duplicates := sorted({w for w in words if words.count(w) > 1}):
            raise ValueError(f"the word list has duplicates: {duplicates}")
        self.words = [*self.specials, *words]
        self.vocab_size = len(self.words)
        self._ids = {word: index for index, word in enumerate(self.words)}

    def get_vocab(self) -> dict[str, int]:
        """Return ids by token."""
        return self._ids | self.added_tokens

    def _tokenize(self, text: str) -> Tokens:
        found = list(self._pattern.finditer(text))
        words = [match[0].lower() for match in found]
        if unknown := [word for word in dict.fromkeys(words) if word not in self._ids]:
            self._warn_once(text, f"unknown words of this model: {_quote(', '.join(unknown))} (in {_quote(text)})")
        ids = [self._ids.get(word, self.unk_token_id) for word in words]
        return Tokens(text, ids, [match.start() for match in found])

    def _join(self, ids: list[int]) -> str:
        return " ".join(self.words[i] for i in ids if i != self.pad_token_id)


BERT = "bert-base-uncased"
BERT_PLACE = f"models/{BERT}/vocab.txt"  # in the repository's layout
BERT_URL = "https://huggingface.co/google-bert/bert-base-uncased/resolve/main/vocab.txt"


class WordPieceTokenizer(Tokenizer):
    """WordPiece with BERT's uncased vocabulary (Devlin et al. 2019): 30,522 ids, padded with 0.

    Args:
        vocab: The file `vocab.txt`, one token per line, or its folder. The default is
            models/bert-base-uncased/vocab.txt, or the Hugging Face cache. Read when the first text is tokenized:
            FileNotFoundError if it is missing, ValueError if it is another vocabulary.
    """

    bos_token_id, eos_token_id, pad_token_id = 101, 102, 0
    vocab_size = 30522

    def __init__(self, vocab: str | None = None) -> None:
        super().__init__()
        self.vocab = vocab

    def get_vocab(self) -> dict[str, int]:
        """Return ids by token."""
        return self._pieces.get_vocab() | self.added_tokens

    @cached_property
    def _pieces(self) -> tokenizers.BertWordPieceTokenizer:
        from tokenizers import BertWordPieceTokenizer

        path = _find_bert_vocabulary(self.vocab)
        # not splitlines: some of Unicode's line ends are tokens
        tokens = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
        special = {"[PAD]": self.pad_token_id, "[CLS]": self.bos_token_id, "[SEP]": self.eos_token_id}
        if len(tokens) != self.vocab_size or any(tokens[i] != token for token, i in special.items()):
            raise ValueError(f"{path} is not the vocabulary of {BERT} ({len(tokens)} tokens): see {BERT_URL}")
        return BertWordPieceTokenizer({token: i for i, token in enumerate(tokens)}, lowercase=True)

    def _tokenize(self, text: str) -> Tokens:
        encoding = self._pieces.encode(text, add_special_tokens=False)
        return Tokens(text, encoding.ids, [start for start, _ in encoding.offsets])

    def _join(self, ids: list[int]) -> str:
        return self._pieces.decode(ids)


def _find_bert_vocabulary(path: str | None) -> Path:
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    if path is not None:
        given = Path(path).expanduser()
        places = [given, given / "vocab.txt"]
    else:
        own = public_path(BERT_PLACE)
        places = [own] if own else sorted(hub.glob(f"models--*{BERT}/snapshots/*/vocab.txt"))
    if found := next((place for place in places if place.is_file()), None):
        return found
    raise FileNotFoundError(
        f"this model needs BERT's vocabulary, which is not at {path or f'{BERT_PLACE} or in {hub}'}: "
        f"download {BERT_URL} and put it at {BERT_PLACE}"
    )


def _quote(text: str) -> str:
    """Quote `text` for a message, shortened and without control characters."""
    return repr(text if len(text) <= _LONGEST_QUOTE else text[:_LONGEST_QUOTE] + "...")


def check_texts(texts: object) -> list[str]:
    """Return one or several strings as a list. TypeError for anything else, ValueError for none."""
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


def _check_length(max_length: int) -> None:
    if max_length < 2:
        raise ValueError(f"max_length must leave room for the start and end tokens (2), got {max_length}")


def clip_merges() -> list[tuple[str, str]]:
    """Read CLIP's 48,894 byte-pair merges in order of priority."""
    packed = resources.files(__package__).joinpath("data", "clip_merges.txt.gz").read_bytes()
    pairs = (line.split(" ") for line in gzip.decompress(packed).decode("utf-8").splitlines())
    return [(first, second) for first, second in pairs]


def clip_vocabulary(merges: Iterable[tuple[str, str]], specials: Sequence[str]) -> dict[str, int]:
    """Build CLIP's vocabulary: 256 bytes, 256 bytes that end a word, one token per merge, the special tokens.

    A byte's symbol is its Latin-1 character where that is printable; the others follow from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    symbols = [chr(i) for i in [*printable, *range(0x100, 0x200 - len(printable))]]
    merged = [first + second for first, second in merges]
    return {t: i for i, t in enumerate([*symbols, *(s + "</w>" for s in symbols), *merged, *specials])}


@lru_cache(maxsize=2)
def _byte_pair_encoder(specials: tuple[str, str], normalise: bool) -> tokenizers.Tokenizer:
    """Build CLIP's byte-pair encoder, once per process, so that copies of a tokenizer stay light."""
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
