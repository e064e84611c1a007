"""``unmask chat``: a conversation with a model whose answers fill in live."""

from __future__ import annotations

import contextlib
import difflib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field
from rich.console import Console
from rich.text import Text
from tyro.conf import Positional, arg

from unmask.cli.options import Decoding, Loading
from unmask.cli.parsing import Command, Flag, given
from unmask.sampling.config import SamplerConfig
from unmask.text import printable
from unmask.training.config_files import parse_value

if TYPE_CHECKING:
    from unmask.cli.live import View

MISTAKES = (ValueError, TypeError, OSError, RuntimeError, FloatingPointError, ImportError)
"""What ends an answer and not the chat."""


class Chat(Command):
    """Talk with a model that has a chat template. Its answers fill in live.

    Ctrl-C stops an answer; what it has written up to the first mask stays. Where the conversation outgrows the model's
    context, its oldest messages are dropped and a line says so. /help lists what can be changed in between. Without a
    terminal each line of standard input is a message, and the answers are printed plainly.

    examples:
      unmask chat GSAI-ML/LLaDA-8B-Instruct --device cuda --dtype bfloat16
      unmask chat JetLM/SDAR-1.7B-Chat --dtype bfloat16 --system-prompt "You are a poet."
      echo "What is 12 * 13?" | unmask chat runs/llada-stand-in
    """

    name: Annotated[str | None, Positional, arg(metavar="MODEL")] = None
    """Packaged name, local folder or hub id; the same as --model."""
    policy: str | None = None
    """Policy name, or folder of a learned one. None: the model's own, else threshold:0.9."""
    system_prompt: str | None = None
    """Message before the conversation."""
    plain: Flag = False
    """No live view, also in a terminal."""
    delay: Annotated[float, Field(ge=0, lt=60)] = 0.02
    """Pause per step of the live view, in seconds."""
    loading: Loading = Loading()
    decoding: Decoding = Decoding()

    def run(self) -> int:
        from unmask.sampling.prompts import check_chat_template

        overrides = given(self.decoding, SamplerConfig)
        if overrides.get("num_return_sequences", 1) != 1:
            raise ValueError("num_return_sequences must be 1: a message has one answer; unmask generate makes several")
        if self.name not in (None, self.loading.model) and self.loading.model != Loading().model:
            raise ValueError(f"which model? {self.name} was given, and --model {self.loading.model}")
        loading = self.loading.updated({"model": self.name} if self.name else {})
        sampler = loading.sampler(self.policy, overrides)
        try:
            check_chat_template(sampler.tokenizer)
        except ValueError as error:
            raise ValueError(
                f"{loading.model}: {error}; name one that answers messages, such as GSAI-ML/LLaDA-8B-Instruct"
            ) from None
        live = sys.stdout.isatty() and not self.plain
        conversation = Conversation(sampler, overrides, self.system_prompt, self.delay if live else None, self.policy)
        if sys.stdin.isatty():
            conversation.say(f"{loading.model}; /help lists commands, Ctrl-D leaves")
            conversation.set_policy("")
        failed = False
        for line in typed_lines() if sys.stdin.isatty() else sys.stdin:
            try:
                if not conversation.take(line):
                    break
            except MISTAKES as error:
                failed = True
                conversation.say(" ".join(str(error).split()))
        return int(failed and not sys.stdin.isatty())


def typed_lines() -> Iterator[str]:
    """Lines that are asked for in the terminal; Ctrl-C discards one that is being typed."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (input() then has history and cursor keys)
    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            return


class Conversation:
    """What was said, and the settings of what comes."""

    def __init__(
        self,
        sampler: Any,
        overrides: dict[str, Any],
        system: str | None = None,
        delay: float | None = None,
        policy: str | None = None,
    ) -> None:
        """``overrides`` are settings that a new policy keeps; ``delay`` is that of the live view, None for no view;
        ``policy`` is the name by which the sampler's was asked for, if it was."""
        self.sampler, self.overrides, self.delay = sampler, dict(overrides), delay
        self.system = system
        self.policy = policy or sampler.policy.spec
        self.turns: list[dict[str, str]] = []

    def say(self, text: str) -> None:
        """A remark, beside the conversation."""
        Console(stderr=True, highlight=False).print(Text(printable(text), "dim"), soft_wrap=True)

    def take(self, line: str) -> bool:
        """Answer a message or obey a command. Returns whether the chat goes on."""
        line = line.rstrip("\r\n")
        if line.startswith("/"):
            return self.obey(*line[1:].split(None, 1))
        if line.strip():
            self.answer(line)
        return True

    def answer(self, text: str) -> None:
        """Decode the answer to ``text`` and add both to the conversation.

        An answer that Ctrl-C stopped is what stands before its first mask; without any, the message is forgotten, too.
        Raises ValueError if the message is too long by itself.
        """
        from unmask.cli.live import View, watch

        turns = self.fitting([*self.turns, {"role": "user", "content": text}])
        view, stopped = View(self.sampler, [""]), False
        events = self.sampler.stream(self.messages(turns))
        try:
            if self.delay is None:
                with contextlib.closing(events):
                    for event in events:
                        view.update(event)
            else:
                watch(view, events, Console(), self.delay)
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            stopped = True
        reply = self.written(view)
        if reply or not stopped:
            self.turns = [*turns, {"role": "assistant", "content": reply}]
            print(printable(reply), flush=True)
        else:
            self.say("stopped before anything could be read; the message is forgotten")
        if self.delay is not None:
            self.say(view.summary().partition(", the end")[0])

    def written(self, view: View) -> str:
        """The text up to the first mask, stop string or end of the answer."""
        return str(view.read((*view.stops, view.mask))[1][0]) if view.completions else ""

    def messages(self, turns: list[dict[str, str]]) -> list[dict[str, str]]:
        return [*([] if self.system is None else [{"role": "system", "content": self.system}]), *turns]

    def fitting(self, turns: list[dict[str, str]]) -> list[dict[str, str]]:
        """``turns`` without the oldest questions and answers that the context has no room for."""
        from unmask.sampling.prompts import chat_ids

        limit, length = getattr(self.sampler.model, "max_length", None), self.sampler.config.max_new_tokens
        first = 0
        while (
            limit is not None and len(chat_ids(self.sampler.tokenizer, self.messages(turns[first:]))) + length > limit
        ):
            if first + 1 == len(turns):
                raise ValueError(
                    f"the message and an answer of {length} tokens are too long for the model's context of {limit}: "
                    "write less, or take fewer tokens by /length"
                )
            first += 2
        if first:
            self.say(f"dropped the oldest {first} messages: the model's context has room for {limit} tokens")
        return turns[first:]

    def obey(self, name: str = "", value: str = "") -> bool:
        """Run the command ``name``; returns whether the chat goes on."""
        if name in ("quit", "exit"):
            return False
        if name not in COMMANDS:
            close = difflib.get_close_matches(name, COMMANDS, n=1)
            hint = f"did you mean /{close[0]}?" if close else "/help lists them."
            raise ValueError(
                f"there is no command /{name}; {hint} A message that begins with a slash needs a space first"
            )
        COMMANDS[name][1](self, value.strip())
        return True

    def change(self, name: str, value: Any) -> None:
        """Set a field of the sampler's config, also for later policies."""
        config = self.sampler.config.updated({name: value})
        self.sampler.check_config(config)
        self.sampler.config = config
        self.overrides[name] = value

    def set_alpha(self, value: str) -> None:
        if not self.sampler.policy.conditioned:
            raise ValueError(f"the policy {self.policy} is not conditioned on alpha")
        if value:
            self.change("alpha", parse_value(value))
        alpha = self.sampler.config.alpha
        self.say(f"alpha {self.sampler.policy.default_alpha if alpha is None else alpha}")

    def set_length(self, value: str) -> None:
        if value:
            self.change("max_new_tokens", parse_value(value))
        self.say(f"up to {self.sampler.config.max_new_tokens} tokens")

    def set_policy(self, value: str) -> None:
        if value:
            changed = type(self.sampler)(self.sampler.model, self.sampler.tokenizer, value)
            kept = {k: v for k, v in self.overrides.items() if k != "alpha" or changed.policy.conditioned}
            changed.config = changed.config.updated(kept)
            changed.check_config(changed.config)
            self.sampler, self.overrides, self.policy = changed, kept, value
        self.say(f"policy {self.policy}, block length {self.sampler.config.block_length or 'full'}")

    def set_system(self, value: str) -> None:
        self.system = value or None
        self.say("system prompt set" if value else "no system prompt")

    def clear(self, value: str) -> None:
        self.turns = []
        self.say("the conversation is forgotten")

    def help(self, value: str) -> None:
        self.say("\n".join(f"/{name:<14}{about}" for name, (about, _) in COMMANDS.items()))
        self.say(f"/{'quit':<14}leave, as Ctrl-D does; Ctrl-C stops an answer")


COMMANDS: dict[str, tuple[str, Callable[[Conversation, str], None]]] = {
    "alpha": ("speed against accuracy, for a policy conditioned on it: /alpha 10", Conversation.set_alpha),
    "policy": ("another policy: /policy threshold:0.8", Conversation.set_policy),
    "length": ("tokens of an answer, at most: /length 512", Conversation.set_length),
    "system": ("the system prompt: /system Be brief. Without a text, none", Conversation.set_system),
    "clear": ("forget the conversation and keep the settings", Conversation.clear),
    "help": ("this list; without a value a command shows what is set", Conversation.help),
}
