"""A character tokenizer for the packaged models: no dependency, one JSON file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

SPECIAL = ("<pad>", "<eos>", "<mask>")
FILE_NAME = "char_tokenizer.json"


class CharTokenizer:
    """Characters to ids and back; ids 0, 1, 2 are padding, end of sequence and mask."""

    def __init__(self, characters: str) -> None:
        if len(set(characters)) != len(characters):
            raise ValueError(f"characters must be distinct, got {characters!r}")
        self.characters = characters
        self._ids = {c: i for i, c in enumerate(characters, start=len(SPECIAL))}

    pad_token_id, eos_token_id, mask_token_id = range(len(SPECIAL))

    @property
    def vocab_size(self) -> int:
        return len(SPECIAL) + len(self.characters)

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``; raises ValueError naming the first character that is not in the vocabulary."""
        try:
            return [self._ids[c] for c in text]
        except KeyError as error:
            raise ValueError(
                f"prompt {text!r} contains {error.args[0]!r}, which the tokenizer does not know; "
                f"it knows the characters {self.characters!r}"
            ) from None

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of ``ids``; special tokens are dropped, or written by name. Raises ValueError for an unknown id."""
        pieces = []
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"id {i} is outside the vocabulary of {self.vocab_size} tokens")
            if i >= len(SPECIAL):
                pieces.append(self.characters[i - len(SPECIAL)])
            elif not skip_special_tokens:
                pieces.append(SPECIAL[i])
        return "".join(pieces)

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        """One printable token per id, special tokens by name."""
        return [self.decode([i], skip_special_tokens=False) for i in ids]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``char_tokenizer.json`` into an existing folder, replacing an old one in one step."""
        partial = Path(folder, f".{FILE_NAME}.partial")
        partial.write_text(json.dumps({"characters": self.characters}) + "\n", encoding="utf-8")
        partial.replace(Path(folder, FILE_NAME))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> CharTokenizer:
        """Read ``char_tokenizer.json``. Raises FileNotFoundError, or ValueError if it holds no characters."""
        path = Path(folder, FILE_NAME)
        try:
            characters = json.loads(path.read_text(encoding="utf-8"))["characters"]
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
            characters = None
        if not isinstance(characters, str):
            raise ValueError(f'{path} must hold {{"characters": "..."}}')
        return cls(characters)
