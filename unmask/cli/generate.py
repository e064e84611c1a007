"""``unmask generate``: complete prompts and watch the buffer fill in."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from unmask.cli.options import add_decoding_options, add_model_options, add_prompt_options, make_sampler

DESCRIPTION = """Complete prompts with a masked diffusion language model.

In a terminal the buffer is drawn as it fills, one line per prompt; elsewhere only the results are printed.
Prompts come from the command line, from --file (one per line; - is standard input) or from a pipe. Without
any, a few problems of the packaged model's task are drawn."""

EXAMPLES = """examples:
  unmask generate "cEaCfBeG:a=" --policy threshold:0.7
  unmask generate --block-length full --policy entropy-bound:0.1 --delay 0.3
  unmask generate "What is 12 * 13?" --model GSAI-ML/LLaDA-8B-Instruct --device cuda
  echo "bCaBcDfEdG:a=" | unmask generate --json"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "generate",
        help="complete prompts and watch the buffer fill in",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("prompts", nargs="*", help="prompts to complete")
    parser.add_argument("--file", help="read prompts from a file, one per line; - for standard input")
    parser.add_argument(
        "--policy", help="policy name or folder of a learned one (default: the model's own, else threshold:0.9)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per prompt")
    parser.add_argument("--plain", action="store_true", help="no live view, also in a terminal")
    parser.add_argument(
        "--delay", type=float, default=0.08, metavar="S", help="pause per step of the live view (0.08 s)"
    )
    add_model_options(parser)
    add_prompt_options(parser, "if the tokenizer has one")
    add_decoding_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from unmask.sampling.prompts import with_chat_template

    if not 0 <= args.delay < 60:
        raise ValueError(f"--delay must be from 0 to 60 seconds, got {args.delay}")
    sampler = make_sampler(args, args.policy)
    sampler.tokenizer = with_chat_template(sampler.tokenizer, args.chat_template, args.system_prompt)
    prompts = read_prompts(args)
    if args.json or args.plain or not sys.stdout.isatty():
        started = time.perf_counter()
        result = sampler.generate(prompts)
        elapsed = time.perf_counter() - started
        print_results(prompts, result, elapsed, as_json=args.json)
    else:
        from unmask.cli.live import watch

        watch(sampler, prompts, delay=args.delay)
    return 0


def read_prompts(args: argparse.Namespace) -> list[str]:
    """Prompts from arguments, file, pipe, or else some of the demo task."""
    if args.prompts and args.file:
        raise ValueError("give prompts on the command line or with --file, not both")
    if args.prompts:
        return list(args.prompts)
    if args.file and args.file != "-":
        lines = Path(args.file).read_text(encoding="utf-8-sig").splitlines()
    elif args.file == "-" or has_piped_input():
        lines = sys.stdin.read().splitlines()
    elif args.model == "tiny":
        from unmask.tasks.hops import Hops

        return [problem.prompt for problem in Hops().problems(6, seed=7)]
    else:
        lines = []
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise ValueError(
            'no prompts: give some as arguments, with --file, or through a pipe ("unmask generate --help")'
        )
    return prompts


def has_piped_input() -> bool:
    """Whether standard input is a pipe or a file (and not a terminal, nor nothing at all)."""
    import os
    import stat

    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError, AttributeError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def print_results(prompts: list[str], result: Any, elapsed: float, as_json: bool) -> None:
    rows = zip(prompts, result.texts, result.steps.tolist(), result.tokens_per_forward.tolist(), strict=True)
    finished = result.finished.tolist()
    for i, (prompt, text, steps, tpf) in enumerate(rows):
        if as_json:
            row = {
                "prompt": prompt,
                "completion": text,
                "steps": steps,
                "tokens_per_forward": round(tpf, 4),
                "finished": finished[i],
            }
            print(json.dumps(row, ensure_ascii=False))
        else:
            print(f"{prompt}{text}")
            print(f"  {steps} forwards, {tpf:.2f} tokens per forward" + ("" if finished[i] else ", unfinished"))
    if not as_json:
        tokens = int(result.filled.sum())
        print(f"{len(prompts)} prompts, {tokens} tokens in {elapsed:.2f} s", file=sys.stderr)
