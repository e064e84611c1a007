"""Tokenizers of the packaged models, of characters or of words: no dependency."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from unmask.files import write_atomically
from unmask.models.sources import packaged_models, read_json

SPECIAL = ("<pad>", "<eos>", "<mask>")
FILE_NAME = "char_tokenizer.json"
WORD_FILE, SPACE = "tokenizer.json", "\u2581"
PIECES = rf"{SPACE}?\w+|{SPACE}?[^\w\s{SPACE}]|{SPACE}"
"""A word or a punctuation mark with the space before it."""


class PieceTokenizer:
    """Pieces of text to ids and back; ids 0, 1, 2 are padding, end of sequence and mask."""

    pad_token_id, eos_token_id, mask_token_id = range(len(SPECIAL))
    kind: str
    """What a piece is, for messages."""

    def __init__(self, known: Sequence[str]) -> None:
        self.tokens = [*SPECIAL, *known]
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        if len(self.ids) != len(self.tokens):
            raise ValueError(f"{self.kind}s must be distinct, got {known!r}")

    @property
    def vocab_size(self) -> int:
        return len(self.tokens)

    def pieces(self, text: str) -> list[str]:
        return list(text)

    def joined(self, pieces: Iterable[str]) -> str:
        return "".join(pieces)

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``; raises ValueError naming the first piece that is not in the vocabulary."""
        try:
            return [self.ids[piece] for piece in self.pieces(text)]
        except KeyError as error:
            others = " or ".join(packaged_readers(text))
            raise ValueError(
                f"prompt {text!r} contains {self.joined(error.args)!r}, which the tokenizer does not know; "
                f"it knows {self.known()}" + (f"; this prompt is for the model {others}" if others else "")
            ) from None

    def known(self) -> str:
        """The vocabulary without the special tokens, as a message shows it."""
        pieces = [self.joined([piece]) for piece in self.tokens[len(SPECIAL) :]]
        if len(pieces) <= 100:
            return f"the {self.kind}s {self.joined(self.tokens[len(SPECIAL) :])!r}"
        words = [piece for piece in pieces if piece.isalpha()]
        return f"{len(pieces)} {self.kind}s, such as {', '.join(map(repr, words[:: max(1, len(words) // 6)][:6]))}"

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of ``ids``; special tokens are dropped, or written by name. Raises ValueError for an unknown id."""
        kept = []
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"id {i} is outside the vocabulary of {self.vocab_size} tokens")
            if i >= len(SPECIAL) or not skip_special_tokens:
                kept.append(self.tokens[i])
        return self.joined(kept)

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        """One printable token per id, special tokens by name."""
        return [self.tokens[i] for i in ids]


class CharTokenizer(PieceTokenizer):
    """Characters to ids and back, from one small JSON file."""

    kind = "character"

    def __init__(self, characters: str) -> None:
        super().__init__(characters)
        self.characters = characters

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``char_tokenizer.json`` into an existing folder, replacing an old one in one step."""
        write_json(Path(folder, FILE_NAME), {"characters": self.characters})

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> CharTokenizer:
        """Read ``char_tokenizer.json``. Raises FileNotFoundError, or ValueError if it holds no characters."""
        path = Path(folder, FILE_NAME)
        characters = read_json(path).get("characters")
        if not isinstance(characters, str):
            raise ValueError(f'{path} must hold {{"characters": "..."}}')
        return cls(characters)


class WordTokenizer(PieceTokenizer):
    """Whole words, numbers and punctuation marks to ids and back, each with the space before it.

    Its file is a ``tokenizer.json`` of Hugging Face's tokenizers (WordLevel), which read it to the same ids and texts.
    A leading space is written as in SentencePiece; the first word of a text counts as having one.
    """

    kind = "word"

    @classmethod
    def of_texts(cls, texts: Iterable[str]) -> WordTokenizer:
        """The tokenizer that knows all words of ``texts``."""
        return cls(sorted({piece for text in texts for piece in split_words(text)} - set(SPECIAL)))

    def pieces(self, text: str) -> list[str]:
        return split_words(text)

    def joined(self, pieces: Iterable[str]) -> str:
        return "".join(pieces).replace(SPACE, " ").removeprefix(" ")

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json`` into an existing folder, each in one step."""
        space = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}
        split = {"type": "Split", "pattern": {"Regex": PIECES}, "behavior": "Isolated", "invert": False}
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        flags["lstrip"] = True  # the space before a mask is its own
        added = [{"id": i, "content": token, **flags, "special": True} for i, token in enumerate(SPECIAL)]
        tokenizer = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [space, split]},
            "post_processor": None,
            "decoder": space,
            "model": {"type": "WordLevel", "vocab": self.ids, "unk_token": "<unk>"},
        }
        names = dict(zip(("pad_token", "eos_token", "mask_token"), SPECIAL, strict=True))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names}
        write_json(Path(folder, WORD_FILE), tokenizer)
        write_json(Path(folder, "tokenizer_config.json"), config)

    @classmethod
    def of_folder(cls, folder: str | Path) -> WordTokenizer | None:
        """The tokenizer that :meth:`save_pretrained` wrote; None if there is none or one of another kind."""
        try:
            vocab = read_json(Path(folder, WORD_FILE))["model"]["vocab"]
            tokens = sorted(vocab, key=vocab.__getitem__)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        ours = tuple(tokens[: len(SPECIAL)]) == SPECIAL and [vocab[t] for t in tokens] == list(range(len(tokens)))
        return cls(tokens[len(SPECIAL) :]) if ours else None


def packaged_readers(text: str) -> list[str]:
    """Packaged models whose tokenizers know every piece of ``text``."""
    found = []
    for name, folder in packaged_models().items():
        tokenizer = WordTokenizer.of_folder(folder) or CharTokenizer.from_pretrained(folder)
        if all(piece in tokenizer.ids for piece in tokenizer.pieces(text)):
            found.append(name)
    return found


def split_words(text: str) -> list[str]:
    """Words and punctuation marks of ``text``, each with the space before it; the first counts as having one."""
    spaced = text.replace(" ", SPACE)
    if text and not spaced.startswith(SPACE):
        spaced = SPACE + spaced
    found = re.split(f"({SPACE}?<mask>|{PIECES})", spaced)
    return [piece.removeprefix(SPACE) if piece.endswith("<mask>") else piece for piece in found if piece]


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write ``path`` in one step: a crash leaves the old file or the new one, whole."""
    text = json.dumps(content, ensure_ascii=False) + "\n"
    write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))
