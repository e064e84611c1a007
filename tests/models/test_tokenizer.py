"""The tokenizers of the packaged models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from unmask.models import CharTokenizer, WordTokenizer, load_tokenizer

TOKENIZER = CharTokenizer("ab+1é")


def test_round_trip_and_special_tokens() -> None:
    assert (TOKENIZER.pad_token_id, TOKENIZER.eos_token_id, TOKENIZER.mask_token_id) == (0, 1, 2)
    assert TOKENIZER.vocab_size == 8
    assert TOKENIZER.encode("b+é") == [4, 5, 7]
    assert TOKENIZER.decode([0, 4, 2, 5, 7, 1]) == "b+é"
    assert TOKENIZER.decode([0, 4, 2, 1], skip_special_tokens=False) == "<pad>b<mask><eos>"
    assert TOKENIZER.convert_ids_to_tokens([2, 3]) == ["<mask>", "a"]
    assert TOKENIZER.encode("") == []


@pytest.mark.parametrize("bad", [-1, 8])
def test_unknown_ids_are_named(bad: int) -> None:
    with pytest.raises(ValueError, match=f"id {bad} is outside the vocabulary of 8"):
        TOKENIZER.decode([3, bad])


def test_unknown_characters_are_named() -> None:
    with pytest.raises(ValueError, match="'z', which the tokenizer does not know; it knows the characters 'ab"):
        TOKENIZER.encode("abz")
    with pytest.raises(ValueError, match="this prompt is for the model little$"):
        TOKENIZER.encode("Shuffle the line: Ann, Ben.")
    with pytest.raises(ValueError, match="must be distinct"):
        CharTokenizer("aba")


def test_saving(tmp_path: Path) -> None:
    CharTokenizer("old").save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    assert CharTokenizer.from_pretrained(tmp_path).characters == "ab+1é"
    assert [p.name for p in tmp_path.iterdir()] == ["char_tokenizer.json"]


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"characters": 3}'])
def test_damaged_files_are_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "char_tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match=r"char_tokenizer\.json (must hold|is not valid JSON)"):
        CharTokenizer.from_pretrained(tmp_path)


def test_dream_tokenizers_need_no_remote_code(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    vocabulary = {"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "DreamTokenizer",
                "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
                "added_tokens_decoder": {"4": {"content": "<|mask|>", "special": True}},
                "mask_token": "<|mask|>",
                "eos_token": "<|endoftext|>",
            }
        ),
    )
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("aba<|mask|>") == [2, 0, 4]
    assert (tokenizer.mask_token_id, tokenizer.eos_token_id) == (4, 3)


WORDS = WordTokenizer.of_texts(["Ann has 12 pears.", "Is it a+b, Ann?"])
SPELLED = ("<pad>", "<eos>", "<mask>", *"+,.?b", *(f"▁{w}" for w in ("12", "Ann", "Is", "a", "has", "it", "pears")))


def test_words_keep_the_space_before_them() -> None:
    assert tuple(WORDS.tokens) == SPELLED
    text = "Ann has 12, a+b pears?"
    assert " ".join(WORDS.convert_ids_to_tokens(WORDS.encode(text))) == "▁Ann ▁has ▁12 , ▁a + b ▁pears ?"
    assert WORDS.decode(WORDS.encode(text)) == text
    assert WORDS.decode([10, 1, 2, 9], skip_special_tokens=False) == "Is<eos><mask> Ann"
    assert WORDS.encode("Ann <mask> <mask>.") == [9, 2, 2, 5]
    assert WORDS.encode("") == []
    with pytest.raises(ValueError, match="'Ann lost' contains 'lost', which the tokenizer does not know"):
        WORDS.encode("Ann lost")
    with pytest.raises(ValueError, match="id 15 is outside the vocabulary of 15"):
        WORDS.decode([15])


def test_word_files_are_those_of_hugging_face(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    WORDS.save_pretrained(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert WordTokenizer.of_folder(tmp_path).ids == WORDS.ids  # type: ignore[union-attr]
    assert (theirs.pad_token_id, theirs.eos_token_id, theirs.mask_token_id) == (0, 1, 2)
    for text in ("Ann has 12, a+b pears?", "Is Ann,", "Ann <mask> <mask>.", ""):
        assert theirs.encode(text) == WORDS.encode(text)
        ids = WORDS.encode(text)
        assert theirs.decode(ids, skip_special_tokens=True) == WORDS.decode(ids)


@pytest.mark.parametrize("text", ["{", "[]", '{"model": {"vocab": {"a": 0, "b": 1}}}', '{"model": {"vocab": ["a"]}}'])
def test_files_of_other_tokenizers_are_left_alone(tmp_path: Path, text: str) -> None:
    assert WordTokenizer.of_folder(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text(text)
    assert WordTokenizer.of_folder(tmp_path) is None
