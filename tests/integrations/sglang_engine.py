"""SGLang's scheduler for diffusion models, as small as it can be, around an algorithm and one of our models.

Sequences are cut into blocks of absolute positions. Full blocks of a prompt are run once; then one block at a time is
decoded, the first of them starting with what is left of the prompt. A batch takes one block of each of its requests.
First done, first out: one forward and one step, after which a request goes on, moves to its next block, or leaves.
Otherwise the batch is decoded until all of its blocks are done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from unmask import Policy, PolicyConfig, load_model

BLOCK, VOCAB, MASK = 8, 30, 29


@cache
def tiny() -> Any:
    return load_model("tiny").eval()


def named(settings: dict[str, Any], folder: Path, **config: Any) -> dict[str, Any]:
    """``settings`` with "learned" replaced by a policy saved in ``folder``."""
    if settings.get("policy") != "learned":
        return settings
    learned(**config).save_pretrained(folder)
    return settings | {"policy": str(folder)}


def learned(**config: Any) -> Policy:
    """A random policy that looks at one block, to which the time matters, so that miscounted steps show."""
    torch.manual_seed(4)
    policy = Policy(PolicyConfig(hidden_size=32, ffn_size=32, context="block", trained_block_length=BLOCK, **config))
    for name, value in policy.state_dict().items():
        value.normal_(std=1.0 if name.startswith("time_mlp") else 0.3)
    return policy.eval()


def make_algorithm(settings: dict[str, Any], fdfo: bool = True, block: int = BLOCK, mask: int = MASK) -> Any:
    """The registered algorithm, as SGLang would make it."""
    from sglang.srt.dllm.algorithm import get_algorithm
    from sglang.srt.dllm.config import DllmConfig

    return get_algorithm(DllmConfig("Unmask", settings, block, mask, 64, fdfo))


def batch_of(rows: int) -> Any:
    return forward_batch(torch.full((rows, BLOCK), MASK), "abcdefghijklmnop"[:rows], [BLOCK] * rows)


def forward_batch(tokens: Tensor, names: Sequence[str], ends: Sequence[int], prompt: Tensor | None = None) -> Any:
    """What an algorithm reads of SGLang's, for blocks ``tokens`` (B, BL) that end at ``ends`` (B)."""
    return SimpleNamespace(
        batch_size=len(tokens),
        input_ids=tokens.flatten(),
        rids=list(names),
        seq_lens_cpu=torch.tensor(ends),
        dllm_prompt_mask=prompt,
        mark_forward_metadata_ready=lambda replan_equivalent: None,
    )


@dataclass
class Request:
    rid: str
    tokens: list[int]
    """The prompt, then also what was generated in finished blocks."""
    total: int
    """How many tokens are wanted, prompt included."""
    prefix: int = 0
    """Tokens in finished blocks."""
    partial: list[int] | None = None
    """The block as it was left (first done, first out)."""
    state: Any = None
    seen: list[tuple[int, list[int]]] = field(default_factory=list)
    """Of every forward: where the request's block began, and its tokens."""


class Engine:
    """``mixed``: full prompt blocks and blocks with masks share batches."""

    def __init__(self, algorithm: Any, model: Any, capacity: int = 64, mixed: bool = False) -> None:
        self.algorithm, self.model, self.capacity, self.mixed = algorithm, model, capacity, mixed
        self.block = algorithm.block_size
        self.batch: list[Request] = []

    def run(self, requests: Sequence[Request]) -> None:
        """Serve all requests; with less capacity than requests, some join as others leave."""
        while waiting := [r for r in requests if len(r.tokens) < r.total]:
            running = waiting[: self.capacity]
            prompts = [r for r in running if r.prefix + self.block <= len(r.tokens)]
            self.batch = running if self.mixed else prompts or running
            self.round()

    def round(self) -> None:
        ends = [r.prefix + self.block for r in self.batch]
        given = torch.tensor([[r.prefix + i < len(r.tokens) for i in range(self.block)] for r in self.batch])
        ambiguous = any(self.model.mask_token_id in r.tokens for r in self.batch)
        tokens = torch.tensor([r.partial or self.begun(r) for r in self.batch])
        batch = forward_batch(tokens, [r.rid for r in self.batch], ends, given if ambiguous else None)
        if self.algorithm.fdfo:
            _, rows, accepted, states, _ = self.algorithm.run(self, batch, [r.state for r in self.batch])
            for r, row, length, state in zip(self.batch, rows, accepted, states, strict=True):
                assert (length, state is None) in ((0, False), (self.block, True))
                r.partial, r.state = (None, None) if length else (row, state)
                if length:
                    self.take(r, row)
            return
        new = self.algorithm.run(self, batch)[1] or [torch.tensor([], dtype=torch.int64)] * len(self.batch)
        for r, masks, row in zip(self.batch, (~given).sum(dim=1).tolist(), new, strict=True):
            assert len(row) == masks
            self.take(r, self.begun(r)[: self.block - masks] + row.tolist())

    def begun(self, r: Request) -> list[int]:
        known = r.tokens[r.prefix : r.prefix + self.block]
        return known + [self.model.mask_token_id] * (self.block - len(known))

    def take(self, r: Request, row: list[int]) -> None:
        """A finished block, whose committed beginning must be as it was."""
        known = r.tokens[r.prefix : r.prefix + self.block]
        assert row[: len(known)] == known
        r.tokens += row[len(known) :]
        r.prefix += self.block

    def forward(self, forward_batch: Any, pp_proxy_tensors: None) -> Any:
        """Logits (B * block, V), every row in a forward of its own. As in the Sampler, it sees the masks to come."""
        logits, mask = [], self.model.mask_token_id
        for r, block in zip(self.batch, forward_batch.input_ids.view(-1, self.block).tolist(), strict=True):
            r.seen.append((r.prefix, block))
            row = torch.tensor([r.tokens[: r.prefix] + block + [mask] * (r.total - r.prefix - self.block)])
            with torch.no_grad():
                logits.append(self.model(row, positions=torch.arange(r.prefix, r.prefix + self.block)))
        return SimpleNamespace(logits_output=SimpleNamespace(full_logits=torch.cat(logits)), can_run_graph=True)
