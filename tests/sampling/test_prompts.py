"""Chat templates: one way for generation, evaluation and training."""

from __future__ import annotations

import json
from collections import UserDict
from pathlib import Path
from shutil import copytree, ignore_patterns
from typing import Any

import numpy as np
import pytest
import torch

from unmask import Sampler, SamplerConfig, Trainer, TrainerConfig
from unmask.evaluation import evaluate
from unmask.models import load_model, load_tokenizer
from unmask.models.loading import packaged_models
from unmask.sampling.prompts import (
    ChatTokenizer,
    describe_prompts,
    encode_prompts,
    end_of_turn,
    text_ids,
    with_chat_template,
)
from unmask.tasks import GSM8K, Hops
from unmask.testing import write_checkpoint

pytest.importorskip("transformers")

SHOWN = "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
ANSWER = "<|start_header_id|>assistant<|end_header_id|>\n\n"
ROWS = [{"question": f"What is {i} + 1?", "answer": f"So.\n#### {i + 1}"} for i in range(8)]


@pytest.fixture(scope="module")
def llada(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("llada", tmp_path_factory.mktemp("llada"), dtype=torch.float32)


@pytest.fixture
def gsm8k(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def test_a_text_becomes_the_users_message(llada: Path) -> None:
    tokenizer = load_tokenizer(llada)
    chat = ChatTokenizer(tokenizer)
    assert tokenizer.decode(chat.encode("Hi there")) == SHOWN.format("Hi there") + ANSWER
    assert chat.encode("a").count(tokenizer.bos_token_id) == 1
    system = ChatTokenizer(tokenizer, "Be brief.")
    assert tokenizer.decode(system.encode("Hi")) == (
        SHOWN.format("Be brief.").replace("user", "system")
        + SHOWN.format("Hi").removeprefix("<|startoftext|>")
        + ANSWER
    )
    ids = tokenizer.encode("Hi")
    assert chat.decode([*ids, tokenizer.eos_token_id]) == "Hi"
    assert chat.mask_token_id == tokenizer.mask_token_id


def test_a_text_with_its_own_bos_gets_no_second() -> None:
    class Tokenizer:
        bos_token_id = 1

        def encode(self, text: str) -> list[int]:
            return [1, *text.encode()] if not text.startswith("<s>") else [1, 1, *text[3:].encode()]

    assert text_ids(Tokenizer(), "ab") == text_ids(Tokenizer(), "<s>ab") == [1, 97, 98]
    assert text_ids(Tokenizer(), "") == [1]
    Tokenizer.bos_token_id = None
    assert text_ids(Tokenizer(), "<s>a") == [1, 1, 97]


def test_a_system_prompt_goes_before_messages_without_one(llada: Path) -> None:
    chat = ChatTokenizer(load_tokenizer(llada), "Be brief.")
    asked = [{"role": "user", "content": "Hi"}]
    told = [{"role": "system", "content": "Rhyme."}, *asked]
    shown = [
        chat.decode(encode_prompts([prompt], None, chat, 0)[0][0].tolist(), False) for prompt in ("Hi", asked, told)
    ]
    assert shown[0] == shown[1] == chat.decode(chat.encode("Hi"), False)
    assert "Be brief." in shown[0]
    assert "Be brief." not in shown[2]
    assert "Rhyme." in shown[2]


@pytest.mark.parametrize(
    ("kind", "ends"),
    [("llada", "<|eot_id|>"), ("sdar", "<|im_end|>"), ("llada2", "<|role_end|>"), ("modernbert", None)],
)
def test_an_answer_ends_with_its_turn(kind: str, ends: str | None, tmp_path: Path) -> None:
    sampler = Sampler.from_pretrained(str(write_checkpoint(kind, tmp_path)), "sequential:8")
    turn = end_of_turn(sampler.tokenizer)
    assert sampler.tokenizer.convert_ids_to_tokens(turn) == ends if ends else turn is None
    assert sampler.stop_ids[-1] == (turn or sampler.model.eos_token_id)
    assert len({*sampler.stop_ids}) == len(sampler.stop_ids)
    sampler.tokenizer.chat_template = None
    assert end_of_turn(sampler.tokenizer) is None


def test_who_decides(llada: Path) -> None:
    with_template, without = load_tokenizer(llada), load_tokenizer("tiny")
    for wanted, instructions, used in (
        (None, True, True),
        (None, False, False),
        (True, False, True),
        (False, True, False),
    ):
        tokenizer = with_chat_template(with_template, wanted, instructions=instructions)
        assert isinstance(tokenizer, ChatTokenizer) == used
        assert isinstance(with_chat_template(tokenizer, wanted, instructions=instructions), ChatTokenizer) == used
    assert with_chat_template(without, None) is without
    with pytest.raises(ValueError, match="the CharTokenizer has no chat template"):
        with_chat_template(without, True)
    with pytest.raises(ValueError, match="system_prompt='x' was given, but no chat template is in use"):
        with_chat_template(with_template, False, "x")
    assert describe_prompts(with_template) == ""
    assert describe_prompts(ChatTokenizer(with_template, "x y")) == "chat_template=True system_prompt='x y'"


def test_a_template_may_refuse(llada: Path) -> None:
    tokenizer = load_tokenizer(llada)
    tokenizer.chat_template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}x"
    assert tokenizer.decode(ChatTokenizer(tokenizer).encode("a")) == "x"
    with pytest.raises(ValueError, match="chat template refuses .*: no system"):
        ChatTokenizer(tokenizer, "s").encode("a")


def test_a_tokenizers_output_is_a_prompt() -> None:
    sampler = Sampler.from_pretrained("tiny", "threshold:0.5")
    ids = [sampler.tokenizer.encode(text) for text in ("cEaCfBeG:a=", "cE:c=")]
    wanted = sampler.generate(ids).completions
    assert not wanted[0].equal(wanted[1])
    padded = [ids[0], ids[1] + [0] * (len(ids[0]) - len(ids[1]))]
    mask = [[1] * len(ids[0]), [1] * len(ids[1]) + [0] * (len(ids[0]) - len(ids[1]))]
    for form in (list, np.array, torch.tensor):
        encoding = {"input_ids": form(padded), "attention_mask": form(mask), "token_type_ids": form(padded) * 0}
        if form is list:
            del encoding["token_type_ids"]
        assert sampler.generate(UserDict(encoding)).completions.equal(wanted)
        assert sampler.generate({"input_ids": form(ids[1])}).completions.equal(wanted[1:])
    assert sampler.generate({"input_ids": ids}).completions.equal(wanted)


def test_a_tokenizer_of_ones_own_and_none(tmp_path: Path) -> None:
    copytree(packaged_models()["tiny"], tmp_path / "bare", ignore=ignore_patterns("char_tokenizer.json"))
    words, ids = "cEaCfBeG:a=", load_tokenizer("tiny").encode("cEaCfBeG:a=")
    wanted = Sampler.from_pretrained("tiny", "threshold:0.5").generate(words)
    bare = Sampler.from_pretrained(str(tmp_path / "bare"), "threshold:0.5")
    assert bare.generate([ids]).completions.equal(wanted.completions)
    with pytest.raises(TypeError, match="the Sampler has no tokenizer"):
        bare.generate(words)
    for own in ("tiny", load_tokenizer("tiny")):
        sampler = Sampler.from_pretrained(str(tmp_path / "bare"), "threshold:0.5", tokenizer=own, device_map="cpu")
        assert sampler.generate(words).texts == wanted.texts
    with pytest.raises(FileNotFoundError, match="has no tokenizer"):
        Sampler.from_pretrained("tiny", tokenizer=str(tmp_path / "bare"))
    with pytest.raises(ValueError, match="revision='x' goes with a hub id"):
        Sampler.from_pretrained("tiny", revision="x")
    with pytest.raises(RuntimeError, match="device '?99"):
        Sampler.from_pretrained("tiny", device_map=99)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ({"role": "user", "content": "a"}, r"got the keys \['role', 'content'\]; a message goes into a list"),
        ({"input_ids": [[5]], "position_ids": [[1]]}, "got the keys"),
        ({"input_ids": [[5, 6, 7]], "attention_mask": [[1, 0, 1]]}, "zeros then ones or ones then zeros"),
        ({"input_ids": [[5, 6]], "attention_mask": [[1, 1], [1, 1]]}, "a row per row of input_ids"),
        ({"input_ids": [[5, 6]], "token_type_ids": [[0, 1]]}, "one segment"),
        ({"cE:c=", "cEaC:a="}, "prompts must be .* got set"),
        ({"cE:c=": 1}.keys(), "prompts must be .* got dict_keys"),
        ([b"ab"], r"prompts\[0\] must be .* got bytes"),
        ([{"role": "user"}], r"prompts\[0\] must be messages with texts as role and content, got {'role': 'user'}"),
        (["a", [{"role": "user", "content": None}]], r"prompts\[1\] must be messages with texts"),
        ([{"role": "user", "content": "a"}], "the CharTokenizer has no chat template"),
    ],
)
def test_other_mappings_and_sets_are_refused(prompts: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        Sampler.from_pretrained("tiny", "threshold:0.5").generate(prompts)


def test_a_sampler_decodes_messages(llada: Path) -> None:
    plain, chat = (
        Sampler.from_pretrained(str(llada), "threshold:0.5", chat_template=wanted, config=SamplerConfig(16, 8))
        for wanted in (False, None)
    )
    shown = plain.generate(SHOWN.format("What is 3?") + ANSWER)
    assert chat.generate("What is 3?").completions.equal(shown.completions)
    assert not plain.generate("What is 3?").completions.equal(shown.completions)
    messages = [{"role": "user", "content": "What is 3?"}]
    for sampler in (plain, chat):
        assert sampler.generate(messages).completions.equal(shown.completions)
        assert sampler.generate([messages, messages]).completions.equal(shown.completions.expand(2, -1))
        assert len([*sampler.stream([messages])]) == int(sampler.generate(messages).steps)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Every prompt that a sampler is given, in ids."""
    prompts: list[list[int]] = []
    prepare = Sampler.prepare

    def noting(self: Sampler, given: Any, *rest: Any) -> Any:
        canvas = prepare(self, given, *rest)
        for row, kept in zip(
            canvas.tokens, canvas.attention if canvas.attention is not None else [None] * 99, strict=False
        ):
            prompt = row[: row.shape[0] - canvas.length]
            prompts.append((prompt if kept is None else prompt[kept[: len(prompt)]]).tolist())
        return canvas

    monkeypatch.setattr(Sampler, "prepare", noting)
    return prompts


@pytest.mark.parametrize(("wanted", "used"), [(None, True), (False, False)])
def test_training_and_evaluation_put_the_same_prompts(
    llada: Path, gsm8k: str, seen: list[list[int]], tmp_path: Path, wanted: bool | None, used: bool
) -> None:
    config = TrainerConfig(
        output_dir=str(tmp_path / "run"), model=str(llada), task="gsm8k",
        task_options={"path": gsm8k, "train_path": gsm8k}, chat_template=wanted,
        policy={"hidden_size": 16, "num_heads": 2, "ffn_size": 16}, max_completion_length=16, block_length=8,
        max_prompt_length=None, num_generations=2, per_device_train_batch_size=4, iterations=1, eval_steps=1,
        eval_problems=2,
    )  # fmt: skip
    trainer = Trainer(config)
    trainer.train()
    tokenizer = load_tokenizer(llada)
    texts = {tokenizer.decode(ids) for ids in seen}
    problems = {p.prompt for p in GSM8K(path=gsm8k).all_problems()}
    expected = {SHOWN.format(p) + ANSWER for p in problems} if used else problems
    assert len(texts) > 2
    assert texts <= expected
    seen.clear()
    sampler = Sampler(load_model(llada), with_chat_template(tokenizer, wanted), "threshold:0.5", SamplerConfig(16, 8))
    row = evaluate(sampler, GSM8K(path=gsm8k), 3, names={"settings": "further"})
    assert {tokenizer.decode(ids) for ids in seen} <= expected
    assert row.settings == ("chat_template=True further" if used else "further")


def test_generated_tasks_are_no_instructions() -> None:
    assert not Hops().instructions
    assert GSM8K().instructions
    with pytest.raises(ValueError, match="chat_template must be true or false, got 'yes'"):
        TrainerConfig(chat_template="yes")  # type: ignore[arg-type]
