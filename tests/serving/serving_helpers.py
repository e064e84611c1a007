"""What the serving tests share: the packaged model, prompts for it, policies, and what to compare with."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unmask import Policy, Sampler, SamplerConfig, load_model, load_tokenizer
from unmask.tasks import Hops

BLOCK, LENGTH = 8, 24

HEURISTICS = [
    "threshold:0.9",
    "factor:1",
    "entropy-bound:0.1",
    "entropy-threshold:0.45",
    "confidence:12",
    "margin:6",
    "entropy:24",
]


@cache
def tiny() -> Any:
    return load_model("tiny").eval()


@cache
def problems(count: int = 6) -> list[list[int]]:
    """Prompts of 19 to 27 tokens or so, as the model knows them."""
    tokenizer = load_tokenizer("tiny")
    return [tokenizer.encode(problem.prompt) for problem in Hops().problems(count, seed=7)]


def aligned_prompts(count: int = 6) -> list[list[int]]:
    """Prompts of 8, 16 and (the first block twice over) 24 tokens: whole blocks."""
    cut = [prompt[-16:] for prompt in problems(count)]
    return [(p[8:], p, p[:8] + p)[i % 3] for i, p in enumerate(cut)]


def learned(folder: Path, **config: Any) -> Policy:
    """The packaged policy for blocks, made to look at the active block alone, and saved to ``folder``.

    Made more sensitive to the time, so that miscounted steps show. ``config`` may give it more inputs, whose weights
    are random.
    """
    packaged = Policy.from_pretrained("tiny-blocks")
    changes = {"context": "block", "alpha_conditioned": False, "trained_alphas": None, **config}
    policy = Policy(replace(packaged.config, **changes))
    torch.manual_seed(0)
    known = packaged.state_dict()
    for name, value in policy.state_dict().items():
        if name not in known or known[name].shape != value.shape:
            value.normal_(std=0.3)
        if name in known:
            value[..., : known[name].shape[-1]] = known[name]
        if name.startswith("time_mlp.2"):
            value.mul_(3.0)
    policy.save_pretrained(folder)
    return policy.eval()


def make_algorithm(settings: dict[str, Any], fdfo: bool, block: int = BLOCK, mask: int | None = None) -> Any:
    """The registered algorithm, as SGLang would make it."""
    from sglang.srt.dllm.algorithm import get_algorithm
    from sglang.srt.dllm.config import DllmConfig

    config = DllmConfig(
        algorithm="Unmask",
        algorithm_config=settings,
        block_size=block,
        mask_id=tiny().mask_token_id if mask is None else mask,
        max_running_requests=64,
        first_done_first_out_mode=fdfo,
    )
    return get_algorithm(config)


class BlockCausal:
    """A model that, for each row, sees nothing beyond the row's first block with masks; blocks count from 0."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, tokens: Tensor, attention: None = None, positions: Any = None) -> Tensor:
        assert attention is None
        rows = []
        for row in tokens:
            first = int((row == self.mask_token_id).to(torch.uint8).argmax())
            seen = self.model(row[None, : first - first % BLOCK + BLOCK])[0]
            rows.append(torch.nn.functional.pad(seen, (0, 0, 0, len(row) - len(seen))))
        logits = torch.stack(rows)
        return logits[:, positions] if isinstance(positions, slice) else logits.flatten(0, 1)[positions]


def reference(model: Any, policy: Any, **config: Any) -> Sampler:
    settings = {"max_new_tokens": LENGTH, "block_length": BLOCK, "stop_at_eos": False, "deterministic": True}
    return Sampler(model, policy=policy, config=SamplerConfig(**{**settings, **config}))
