"""``unmask chat``: history, commands, what no longer fits, Ctrl-C, pipes and a terminal."""

from __future__ import annotations

import io
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from unmask import Sampler, SamplerConfig
from unmask.cli import main
from unmask.cli.chat import Conversation
from unmask.sampling.prompts import chat_ids
from unmask.text import printable

pytest.importorskip("transformers")
from unmask.testing import write_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_checkpoint("llada", tmp_path_factory.mktemp("chat"), dtype=torch.float32, context=256))


@pytest.fixture
def chat(folder: str) -> Conversation:
    settings = {"max_new_tokens": 16, "block_length": 8}
    sampler = Sampler.from_pretrained(folder, "confidence:8", config=SamplerConfig(**settings))
    return Conversation(sampler, settings)


def asked(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def test_answers_see_the_conversation(chat: Conversation, capsys: pytest.CaptureFixture[str]) -> None:
    assert chat.take("Hi\n")
    (first,) = chat.sampler.generate(asked("Hi")).texts
    assert chat.turns == asked("Hi", first)
    chat.take(" /is a slash")
    (second,) = chat.sampler.generate(asked("Hi", first, " /is a slash")).texts
    assert chat.turns == asked("Hi", first, " /is a slash", second)
    chat.take("/system Rhyme.")
    chat.take("/clear")
    chat.take("   ")
    chat.take("Hi")
    (told,) = chat.sampler.generate([{"role": "system", "content": "Rhyme."}, *asked("Hi")]).texts
    assert chat.turns == asked("Hi", told)
    assert told != first
    assert "the conversation is forgotten" in capsys.readouterr().err


def test_commands_change_what_comes(chat: Conversation, capsys: pytest.CaptureFixture[str]) -> None:
    chat.take("/length 24")
    chat.take("/policy threshold:0.5,hold-eos")
    assert chat.sampler.policy.spec == "threshold:0.5,hold-eos"
    assert chat.sampler.config.max_new_tokens == 24, "settings outlive a policy"
    chat.take("/policy tiny")
    chat.take("/alpha 3")
    assert (chat.sampler.config.alpha, chat.sampler.policy.conditioned) == (3, True)
    chat.take("/policy")
    chat.take("/policy top-k:4")
    chat.take("Hi")
    assert chat.sampler.config.alpha is None, "which the new policy does not take"
    printed = capsys.readouterr().err
    assert "up to 24 tokens" in printed
    assert "policy tiny, block length 8" in printed
    chat.take("/help")
    assert {"/alpha", "/policy", "/length", "/system", "/clear", "/quit"} <= {*capsys.readouterr().err.split()}
    assert not chat.take("/quit")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/alpha 3", "policy confidence:8 is not conditioned on alpha"),
        ("/length none", "max_new_tokens must be an integer, got 'none'"),
        ("/policy treshold:0.9", "Did you mean threshold"),
        ("/lenght 3", "no command /lenght; did you mean /length?"),
        ("/length 300", None),
        ("word " * 200, "the message and an answer of 16 tokens are too long for the model's context of 256"),
    ],
)
def test_mistakes_change_nothing(chat: Conversation, line: str, message: str | None) -> None:
    before = (chat.sampler, chat.sampler.config)
    if message is None:  # found when a message no longer fits
        chat.take(line)
        line, message = "Hi", "an answer of 300 tokens are too long for the model's context of 256"
        before = (chat.sampler, chat.sampler.config)
    with pytest.raises(ValueError, match=message):
        chat.take(line)
    assert before == (chat.sampler, chat.sampler.config)
    assert chat.turns == []


def test_the_oldest_messages_make_room(chat: Conversation, capsys: pytest.CaptureFixture[str]) -> None:
    chat.take("/system S")
    chat.turns = asked("a" * 60, "b" * 60, "c" * 60, "d" * 60)
    chat.take("e")
    assert [turn["content"][:1] for turn in chat.turns[:3]] == ["c", "d", "e"]
    assert "dropped the oldest 2 messages: the model's context has room for 256 tokens" in capsys.readouterr().err
    tokenizer, kept = chat.sampler.tokenizer, chat.messages(chat.turns[:3])
    assert len(chat_ids(tokenizer, kept)) <= 256 - 16 < len(chat_ids(tokenizer, [*kept, *asked("a" * 60, "b" * 60)]))


@pytest.mark.parametrize("steps", [3, 0])
def test_ctrl_c_stops_the_answer(
    chat: Conversation, steps: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = Sampler.stream

    def interrupted(self: Sampler, prompts: Any) -> Iterator[Any]:
        for taken, event in enumerate(stream(self, prompts)):
            if taken == steps:
                raise KeyboardInterrupt
            yield event

    chat.take("/policy sequential:8")
    whole = chat.sampler.generate(asked("Hi")).completions[0]
    monkeypatch.setattr(Sampler, "stream", interrupted)
    with pytest.raises(KeyboardInterrupt):
        chat.take("Hi")  # not of a terminal
    monkeypatch.setattr(sys, "stdin", type("Terminal", (), {"isatty": lambda self: True})())
    chat.take("Hi")
    if steps:
        assert chat.turns == asked("Hi", chat.sampler.tokenizer.decode(whole[:steps], skip_special_tokens=True))
    else:
        assert chat.turns == []
        assert "stopped before anything could be read; the message is forgotten" in capsys.readouterr().err


def test_pipes(folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n/lenght 3\nMore\n/quit\nnever asked\n"))
    code = main(["chat", folder, "--max-new-tokens", "8", "--policy", "confidence:4", "--system-prompt", "S"])
    printed = capsys.readouterr()
    assert code == 1, printed.err
    sampler = Sampler.from_pretrained(
        folder, "confidence:4", config=SamplerConfig(8), system_prompt="S", chat_template=True
    )
    (first,) = sampler.generate("Hi").texts
    (second,) = sampler.generate(asked("Hi", first, "More")).texts
    assert printed.out == printable(f"{first}\n{second}\n")
    assert (
        printed.err
        == "there is no command /lenght; did you mean /length? A message that begins with a slash needs a space first\n"
    )


def test_a_model_without_a_template(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "tiny"]) == 2
    assert "unmask chat: tiny: the CharTokenizer has no chat template" in capsys.readouterr().err


def test_in_a_terminal(folder: str) -> None:
    """The canvas is drawn while it fills, Ctrl-C stops that, and the chat goes on to its end."""
    ours, theirs = pty.openpty()
    words = [folder, "--max-new-tokens", "64", "--policy", "confidence:64", "--delay", "0.2"]
    command = [sys.executable, "-m", "unmask", "chat", *words]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    shown, end = "", time.monotonic() + 60

    def until(text: str) -> None:
        nonlocal shown
        while text not in shown:
            assert time.monotonic() < end, shown
            if select.select([ours], [], [], 1)[0]:
                shown += os.read(ours, 65536).decode(errors="replace")
        shown = shown.partition(text)[2]

    try:
        until("/help lists commands")
        until("> ")
        os.write(ours, b"Hi\n")
        until("░░░░")
        until(" 2 forwards")
        process.send_signal(signal.SIGINT)
        until("tokens per forward")
        until("> ")
        os.write(ours, b"/quit\n")
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        os.close(ours)
