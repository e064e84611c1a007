"""``unmask generate``: complete prompts and watch the buffer fill in."""

from __future__ import annotations

import json
import os
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from tyro.conf import Positional, arg

from unmask.cli.options import Decoding, Loading, Prompting
from unmask.cli.parsing import Command, Flag, given
from unmask.sampling.config import SamplerConfig
from unmask.text import parse_json, printable, read_text


class Prompted(Command):
    """What the commands that take prompts have in common."""

    REST = "prompts"

    prompts: Positional[tuple[str, ...]] = ()
    """Prompts to complete."""
    file: str | None = None
    """Read prompts from a file, one per line; - for standard input."""
    rows: Annotated[str | None, arg(name="prompts")] = None
    """Read prompts from JSON lines, each with "prompt", a text, or "messages", a list of {"role": ..., "content": ...},
    which need a chat template; - for standard input."""

    def read_prompts(self, model: str) -> list[Any]:
        """Prompts from arguments, file, pipe, or else some of what ``model`` was made for."""
        if bool(self.prompts) + (self.file is not None) + (self.rows is not None) > 1:
            raise ValueError("give prompts on the command line, with --file or with --prompts, not in several ways")
        prompts: list[Any] = list(self.prompts)
        if self.rows is not None:
            prompts = [*read_rows(self.rows)]
        elif self.file is not None or (not self.prompts and has_piped_input()):
            prompts = [line for line in read_lines("-" if self.file is None else self.file) if line.strip()]
        elif not prompts:
            prompts = demo_prompts(model)
        if not prompts:
            raise ValueError(
                'no prompts: give some as arguments, with --file, or through a pipe ("unmask generate --help")'
            )
        return prompts


class Generate(Prompted):
    """Complete prompts with a masked diffusion language model.

    In a terminal the buffers are drawn as they fill; elsewhere only the results are printed. Prompts come from the
    command line, from --file, from --prompts or from a pipe. Without any, a few problems of the packaged model's task
    are drawn.

    examples:
      unmask generate "Ann has 7 pears. She buys 5 more. How many pears does Ann have now?"
      unmask generate --block-length full --policy entropy-bound:0.1 --delay 0.3
      unmask generate "What is 12 * 13?" --model GSAI-ML/LLaDA-8B-Instruct --device cuda
      unmask generate --prompts questions.jsonl --model GSAI-ML/LLaDA-8B-Instruct --device cuda --json
      unmask generate "Shuffle the line: Tom, Ann, Eve." --temperature 0.8 --top-p 0.95 --num-return-sequences 4
      echo "Reverse the line: Tom, Ann, Eve." | unmask generate --json
    """

    policy: str | None = None
    """Policy name, or folder of a learned one. None: the model's own, else threshold:0.9."""
    json: Flag = False
    """Print one JSON object per prompt."""
    plain: Flag = False
    """No live view, also in a terminal."""
    delay: Annotated[float, Field(ge=0, lt=60)] = 0.08
    """Pause per step of the live view, in seconds."""
    loading: Loading = Loading()
    prompting: Prompting = Prompting()
    decoding: Decoding = Decoding()

    def run(self) -> int:
        from unmask.sampling.prompts import with_chat_template

        prompts, how = self.read_prompts(self.loading.model), self.prompting
        sampler = self.loading.sampler(self.policy, given(self.decoding, SamplerConfig))
        sampler.tokenizer = with_chat_template(sampler.tokenizer, how.chat_template, how.system_prompt)
        sampler.check_config(sampler.config)
        prompts = [prompt for prompt in prompts for _ in range(sampler.config.num_return_sequences)]
        sampler.config = sampler.config.updated({"num_return_sequences": 1})
        if self.json or self.plain or not sys.stdout.isatty():
            started = time.perf_counter()
            result = sampler.generate(prompts)
            elapsed = time.perf_counter() - started
            if self.json:
                print_json(prompts, result)
            else:
                print_results(prompts, result, elapsed, between(sampler.tokenizer))
            return 0
        from rich.console import Console
        from rich.text import Text

        from unmask.cli.live import View, watch

        console, view = Console(), View(sampler, [*map(shown, prompts)])
        try:
            watch(view, sampler.stream(prompts), console, self.delay)
        finally:
            if view.completions:
                console.print(view, Text(view.summary(), "dim"))
        return 0


def demo_prompts(model: str) -> list[str]:
    """Problems of what a packaged model was made for; none for another model."""
    from unmask.tasks import make_task

    tasks = {"little": ("story", "line", "letters", "grid", "quiz", "form"), "tiny": ("hops",) * 6}.get(model, ())
    return [make_task(task).problems(i + 1, seed=7)[i].prompt for i, task in enumerate(tasks)]


def read_lines(file: str) -> list[str]:
    """The lines of ``file``, of standard input for "-"; only line ends end them."""
    return (sys.stdin.read() if file == "-" else read_text(Path(file))).split("\n")


def read_rows(file: str) -> Iterator[Any]:
    """The prompts in ``file``, texts and messages. Raises ValueError naming the line that has none."""
    from unmask.sampling.prompts import are_messages, check_messages

    for number, line in enumerate(read_lines(file), 1):
        if not line.strip():
            continue
        row = parse_json(line, f"{file}:{number}")
        found = [row[key] for key in ("prompt", "messages") if key in row] if isinstance(row, dict) else []
        if len(found) != 1 or not (isinstance(found[0], str) if "prompt" in row else are_messages(found[0])):
            wanted = '"prompt", a text, or "messages", a list of objects'
            raise ValueError(f"{file}:{number} must have either {wanted}, got {line[:80]}")
        if "messages" in row:
            check_messages(f"{file}:{number}", found[0])
        yield found[0]


def shown(prompt: Any) -> str:
    """What is printed of a prompt: itself, or what the last of its messages says."""
    return prompt if isinstance(prompt, str) else str(prompt[-1].get("content"))


def has_piped_input() -> bool:
    """Whether standard input is a pipe or a file (and not a terminal, nor nothing at all)."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError, AttributeError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def print_json(prompts: list[Any], result: Any) -> None:
    """One object per prompt."""
    columns = (result.texts, result.steps, result.tokens_per_forward, result.finished)
    for prompt, text, steps, rate, finished in zip(prompts, *columns, strict=True):
        row = {"prompt" if isinstance(prompt, str) else "messages": prompt, "completion": text, "steps": int(steps)}
        print(json.dumps(row | {"tokens_per_forward": round(float(rate), 4), "finished": bool(finished)}))


def between(tokenizer: Any) -> str:
    """What stands between a prompt and its completion: nothing where the completion goes on from the prompt's text."""
    from unmask.models.tokenizer import WordTokenizer
    from unmask.sampling.prompts import ChatTokenizer

    return "\n" if isinstance(tokenizer, (ChatTokenizer, WordTokenizer)) else ""


def print_results(prompts: list[Any], result: Any, elapsed: float, between: str) -> None:
    """Prompts and completions with ``between`` between them, and what they took."""
    columns = (result.texts, result.steps, result.tokens_per_forward, result.finished)
    for prompt, text, steps, rate, finished in zip(prompts, *columns, strict=True):
        print(printable(f"{shown(prompt)}{between}{text}"))
        print(
            f"  {steps} forward{'s' * (steps != 1)}, {rate:.2f} tokens per forward"
            + ("" if finished else ", unfinished")
        )
    print(
        f"{len(prompts)} prompt{'s' * (len(prompts) != 1)}, {int(result.filled.sum())} tokens in {elapsed:.2f} s",
        file=sys.stderr,
    )
