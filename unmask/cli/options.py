"""Options that several commands share."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable
from typing import Any

from unmask.sampling.config import ACTIONS, CACHES


def block_length(text: str) -> int | str:
    """``full`` for full diffusion (one block), else a number of tokens."""
    if text != "full" and not re.fullmatch(r"\d+", text):
        raise argparse.ArgumentTypeError(f'expected a number of tokens or "full", got {text!r}')
    return text if text == "full" else int(text)


def parse_pairs(pairs: Iterable[str]) -> dict[str, Any]:
    """``NAME=VALUE`` pairs, the values read by :func:`parse_value`; ValueError names a pair that is none."""
    values = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise ValueError(f"{pair!r} is not NAME=VALUE")
        try:
            values[name] = parse_value(value)
        except ValueError as error:
            raise ValueError(f"{pair!r}: {error}") from error
    return values


def parse_value(text: str) -> Any:
    """null, true, false, numbers, "quoted text", [lists] and {mappings} as YAML has them; all else is text.

    Raises ValueError for brackets that are no list or mapping.
    """
    if text.lower() in ("null", "true", "false"):
        return json.loads(text.lower())
    if re.fullmatch(r"[-+]?\d+", text):
        return int(text)
    if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", text, re.I):
        return float(text)
    if text[:1] not in ("[", "{", '"'):
        return text
    try:
        return json.loads(text)
    except ValueError:
        return parse_yaml(text)


def parse_yaml(text: str) -> Any:
    """A list, mapping or quoted text that is not JSON, such as ``{alpha_conditioned: true}``."""
    try:
        import yaml
    except ImportError as error:
        raise ValueError("the value is not JSON; reading it as YAML needs PyYAML: pip install pyyaml") from error
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"the value is neither JSON nor YAML: {error}") from error


def device_map(text: str) -> Any:
    """A value as :func:`parse_value` reads it, for argparse."""
    try:
        return parse_value(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def progress_bar(**settings: Any) -> Any:
    """The progress bar of the commands that take long: a task's name, a bar, how many of how many, the time left."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), **settings
    )


def add_model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--model", default="tiny", help="packaged name, local folder or hub id (default: tiny)")
    group.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: cpu)")
    group.add_argument(
        "--device-map",
        type=device_map,
        metavar="MAP",
        help='split the model over devices: auto, balanced, ..., or {"": 0, "layers.31": "cpu"}; in place of --device',
    )
    group.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: that of the weights")
    group.add_argument("--trust-remote-code", action="store_true", help="allow model code from the hub to run")
    parser.add_argument("--debug", action="store_true", help="show a full traceback on errors")


def add_prompt_options(parser: argparse.ArgumentParser, default: str) -> None:
    """How text prompts reach the model; ``default`` says when they are messages unless told otherwise."""
    group = parser.add_argument_group("prompts")
    group.add_argument(
        "--chat-template",
        action=argparse.BooleanOptionalAction,
        help=f"put prompts as a user's messages in the tokenizer's chat template (default: {default})",
    )
    group.add_argument("--system-prompt", metavar="TEXT", help="message before the user's, in the chat template")


def add_decoding_options(parser: argparse.ArgumentParser, regimes: bool = False) -> None:
    """Options named after the fields of SamplerConfig; those left out keep the policy's or the model's defaults.

    ``regimes``: whether the command has another option for block lengths, so that this one is not shown.
    """
    group = parser.add_argument_group("decoding")
    group.add_argument("--max-new-tokens", type=int, metavar="L", help="length of the buffer")
    blocks = argparse.SUPPRESS if regimes else 'tokens per block; "full" = one block (full diffusion)'
    group.add_argument("--block-length", type=block_length, metavar="BL", help=blocks)
    group.add_argument("--temperature", type=float, metavar="T", help="of the tokens; 0 = most probable (default)")
    group.add_argument(
        "--actions", choices=ACTIONS, help="how a learned policy's logits become actions (default: as in its training)"
    )
    group.add_argument(
        "--policy-temperature",
        type=float,
        metavar="TAU",
        help="divides a learned policy's logits (default: as in its training)",
    )
    group.add_argument("--policy-scale", type=float, metavar="BETA", help="multiplies its probabilities")
    group.add_argument("--alpha", type=float, help="speed preference, for policies conditioned on it")
    group.add_argument("--seed", type=int, help="of every draw (default 0)")
    group.add_argument("--max-steps", type=int, metavar="N", help="forwards after which a row stops (default L)")
    group.add_argument("--max-batch-size", type=int, metavar="B", help="rows decoded side by side (default: all)")
    group.add_argument("--cache", choices=CACHES, help="keys and values reused within a block (default: none)")
    group.add_argument("--cache-refresh", type=int, metavar="N", help="recompute all every N steps of a block")
    group.add_argument("--deterministic", action="store_true", default=None, help="one row per forward; slow")
    group.add_argument("--cuda-graphs", action="store_true", default=None, help="launch steps as CUDA graphs")


FIELDS = (
    "max_new_tokens",
    "block_length",
    "temperature",
    "actions",
    "policy_temperature",
    "policy_scale",
    "alpha",
    "seed",
    "max_steps",
    "max_batch_size",
    "cache",
    "cache_refresh",
    "deterministic",
    "cuda_graphs",
)


def make_sampler(args: argparse.Namespace, policy: str | None) -> Any:
    """A Sampler for the model and decoding options of a command line."""
    import torch

    from unmask.sampling.sampler import Sampler

    dtype = getattr(torch, args.dtype) if args.dtype else None
    sampler = Sampler.from_pretrained(
        args.model,
        policy=policy,
        device=args.device,
        dtype=dtype,
        trust_remote_code=args.trust_remote_code,
        device_map=args.device_map,
    )
    given = {name: getattr(args, name) for name in FIELDS if getattr(args, name, None) is not None}
    if given.get("block_length") == "full":
        given["block_length"] = None
    sampler.config = sampler.config.updated(given)
    return sampler
