"""``unmask generate``: complete prompts and watch the buffer fill in."""

from __future__ import annotations

import json
import os
import stat
import sys
import time
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from tyro.conf import Positional

from unmask.cli import printable
from unmask.cli.options import Decoding, Loading, Prompting
from unmask.cli.parsing import Command, Flag, given
from unmask.sampling.config import SamplerConfig


class Generate(Command):
    """Complete prompts with a masked diffusion language model.

    In a terminal the buffer is drawn as it fills, one line per prompt; elsewhere only the results are printed. Prompts
    come from the command line, from --file or from a pipe. Without any, a few problems of the packaged model's task
    are drawn.

    examples:
      unmask generate "cEaCfBeG:a=" --policy threshold:0.7
      unmask generate --block-length full --policy entropy-bound:0.1 --delay 0.3
      unmask generate "What is 12 * 13?" --model GSAI-ML/LLaDA-8B-Instruct --device cuda
      echo "bCaBcDfEdG:a=" | unmask generate --json
    """

    REST = "prompts"

    prompts: Positional[tuple[str, ...]] = ()
    """Prompts to complete."""
    file: str | None = None
    """Read prompts from a file, one per line; - for standard input."""
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

        sampler = self.loading.sampler(self.policy, given(self.decoding, SamplerConfig))
        how = self.prompting
        sampler.tokenizer = with_chat_template(sampler.tokenizer, how.chat_template, how.system_prompt)
        prompts = self.read_prompts()
        if self.json or self.plain or not sys.stdout.isatty():
            started = time.perf_counter()
            result = sampler.generate(prompts)
            print_results(prompts, result, time.perf_counter() - started, self.json)
        else:
            from unmask.cli.live import watch

            watch(sampler, prompts, delay=self.delay)
        return 0

    def read_prompts(self) -> list[str]:
        """Prompts from arguments, file, pipe, or else some of the demo task."""
        if self.prompts and self.file:
            raise ValueError("give prompts on the command line or with --file, not both")
        if self.prompts:
            return list(self.prompts)
        lines: list[str] = []
        if self.file == "-" or (self.file is None and has_piped_input()):
            lines = sys.stdin.read().split("\n")
        elif self.file is not None:
            lines = Path(self.file).read_text(encoding="utf-8-sig").split("\n")
        elif self.loading.model == "tiny":
            from unmask.tasks.hops import Hops

            lines = [problem.prompt for problem in Hops().problems(6, seed=7)]
        prompts = [line for line in lines if line.strip()]
        if not prompts:
            raise ValueError(
                'no prompts: give some as arguments, with --file, or through a pipe ("unmask generate --help")'
            )
        return prompts


def has_piped_input() -> bool:
    """Whether standard input is a pipe or a file (and not a terminal, nor nothing at all)."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError, AttributeError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def print_results(prompts: list[str], result: Any, elapsed: float, as_json: bool) -> None:
    rows = zip(prompts, result.texts, result.steps.tolist(), result.tokens_per_forward.tolist(), strict=True)
    for (prompt, text, steps, tpf), finished in zip(rows, result.finished.tolist(), strict=True):
        if as_json:
            row = {"prompt": prompt, "completion": text, "steps": steps}
            row |= {"tokens_per_forward": round(tpf, 4), "finished": finished}
            print(json.dumps(row))
        else:
            print(printable(f"{prompt}{text}"))
            print(f"  {steps} forwards, {tpf:.2f} tokens per forward" + ("" if finished else ", unfinished"))
    if not as_json:
        tokens = int(result.filled.sum())
        print(f"{len(prompts)} prompts, {tokens} tokens in {elapsed:.2f} s", file=sys.stderr)
