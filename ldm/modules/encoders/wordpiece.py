"""BERT's tokenizer, which the first text-to-image latent diffusion models use."""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.modules.encoders.tokenizer import Tokenizer, Tokens

if TYPE_CHECKING:
    import tokenizers

VOCABULARY = "bert-base-uncased"
URL = "https://huggingface.co/google-bert/bert-base-uncased/resolve/main/vocab.txt"


class BERTTokenizer(Tokenizer):
    """WordPiece with BERT's uncased vocabulary (Devlin et al. 2019): 30,522 ids, padded with 0.

    vocab: the file `vocab.txt`, one token a line; by default it is looked for in the Hugging Face cache. It is read
    when the first text comes; FileNotFoundError if there is none, ValueError if it is another vocabulary.
    """

    start_id, end_id, pad_id = 101, 102, 0
    vocab_size = 30522

    def __init__(self, vocab: str | None = None) -> None:
        super().__init__()
        self.vocab = vocab

    @cached_property
    def _pieces(self) -> tokenizers.BertWordPieceTokenizer:
        from tokenizers import BertWordPieceTokenizer

        path = find_vocabulary(self.vocab)
        tokens = path.read_text(encoding="utf-8").splitlines()
        special = {"[PAD]": self.pad_id, "[CLS]": self.start_id, "[SEP]": self.end_id}
        if len(tokens) != self.vocab_size or any(tokens[i] != token for token, i in special.items()):
            raise ValueError(f"{path} is not the vocabulary of {VOCABULARY} ({len(tokens)} tokens): see {URL}")
        return BertWordPieceTokenizer({token: i for i, token in enumerate(tokens)}, lowercase=True)

    def tokenize(self, text: str) -> Tokens:
        encoding = self._pieces.encode(text, add_special_tokens=False)
        return Tokens(text, encoding.ids, [start for start, _ in encoding.offsets])

    def _join(self, ids: list[int]) -> str:
        return self._pieces.decode(ids)


def find_vocabulary(path: str | None) -> Path:
    """The file named, or the one in the Hugging Face cache."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    if path is not None:
        places = [Path(path).expanduser()]
    else:
        places = sorted(hub.glob(f"models--*{VOCABULARY}/snapshots/*/vocab.txt"))
    if found := next((place for place in places if place.is_file()), None):
        return found
    raise FileNotFoundError(
        f"BERT's vocabulary is not {f'at {path}' if path else f'in {hub}'}: download {URL} and name it in the params "
        "of the text encoder, as "
        "tokenizer: {target: ldm.modules.encoders.wordpiece.BERTTokenizer, params: {vocab: path/to/vocab.txt}}"
    )
