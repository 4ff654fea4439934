"""BERT's tokenizer, which the first text-to-image latent diffusion models use."""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.modules.encoders.tokenizer import Tokenizer, Tokens
from ldm.util import public_path

if TYPE_CHECKING:
    import tokenizers

VOCABULARY = "bert-base-uncased"
OWN_PLACE = f"models/{VOCABULARY}/vocab.txt"  # in the repository's layout
URL = "https://huggingface.co/google-bert/bert-base-uncased/resolve/main/vocab.txt"


class BERTTokenizer(Tokenizer):
    """WordPiece with BERT's uncased vocabulary (Devlin et al. 2019): 30,522 ids, padded with 0.

    vocab: the file `vocab.txt`, one token a line, or a folder that holds it; by default it is looked for at
    models/bert-base-uncased/vocab.txt and in the Hugging Face cache. It is read when the first text comes;
    FileNotFoundError if there is none, ValueError if it is another vocabulary.
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
        # not splitlines, for which some of Unicode's characters end a line
        tokens = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
        special = {"[PAD]": self.pad_id, "[CLS]": self.start_id, "[SEP]": self.end_id}
        if len(tokens) != self.vocab_size or any(tokens[i] != token for token, i in special.items()):
            raise ValueError(f"{path} is not the vocabulary of {VOCABULARY} ({len(tokens)} tokens): see {URL}")
        return BertWordPieceTokenizer({token: i for i, token in enumerate(tokens)}, lowercase=True)

    def tokenize(self, text: str) -> Tokens:
        """The ids of `text` in pieces of words, and where each begins."""
        encoding = self._pieces.encode(text, add_special_tokens=False)
        return Tokens(text, encoding.ids, [start for start, _ in encoding.offsets])

    def _join(self, ids: list[int]) -> str:
        return self._pieces.decode(ids)


def find_vocabulary(path: str | None) -> Path:
    """The file named, or that of the folder named; by default the repository's own or the one in the hub's cache."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    if path is not None:
        given = Path(path).expanduser()
        places = [given, given / "vocab.txt"]
    else:
        own = public_path(OWN_PLACE)
        places = [own] if own else sorted(hub.glob(f"models--*{VOCABULARY}/snapshots/*/vocab.txt"))
    if found := next((place for place in places if place.is_file()), None):
        return found
    raise FileNotFoundError(
        f"this model reads text with BERT's vocabulary, which is not at {path or f'{OWN_PLACE} or in {hub}'}: "
        f"download {URL} and put it at {OWN_PLACE}"
    )
