"""SGLang's scheduler for diffusion models, as small as it can be, around an algorithm and one of our models.

Sequences are cut into blocks of absolute positions. Full blocks of a prompt are run once; then one block at a time is
decoded, the first of them starting with what is left of the prompt. A batch takes one block of each of its requests.
First done, first out: one forward and one step, after which a request goes on, moves to its next block, or leaves.
Otherwise the batch is decoded until all of its blocks are full.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


def forward_batch(tokens: Tensor, names: Sequence[str], ends: Sequence[int], prompt: Tensor | None = None) -> Any:
    """What an algorithm reads of SGLang's, for blocks ``tokens`` (B, BL) that end at ``ends`` (B)."""
    return SimpleNamespace(
        batch_size=len(tokens),
        input_ids=tokens.flatten(),
        rids=list(names),
        seq_lens_cpu=torch.tensor(ends),
        dllm_prompt_mask=prompt,
    )


@dataclass
class Request:
    rid: str
    prompt: list[int]
    max_new_tokens: int
    output: list[int] = field(default_factory=list)
    prefix: int = 0
    """Tokens in finished blocks."""
    partial: list[int] | None = None
    """The block as it was left (first done, first out)."""
    state: Any = None
    nfe: int = 0
    """Forwards that saw masks of this request."""

    @property
    def committed(self) -> list[int]:
        return self.prompt + self.output

    @property
    def finished(self) -> bool:
        return len(self.output) >= self.max_new_tokens

    @property
    def completion(self) -> list[int]:
        return self.output[: self.max_new_tokens]


class Engine:
    """``mixed``: full prompt blocks and blocks with masks share batches."""

    def __init__(self, algorithm: Any, model: Any, capacity: int = 64, mixed: bool = False) -> None:
        self.algorithm, self.model, self.capacity, self.mixed = algorithm, model, capacity, mixed
        self.block = algorithm.block_size
        self.batch: list[Request] = []

    def run(self, prompts: Sequence[list[int]], max_new_tokens: Sequence[int]) -> list[Request]:
        """Serve all prompts; with less capacity than prompts, some join as others leave."""
        pairs = zip(prompts, max_new_tokens, strict=True)
        requests = [Request(str(i), list(prompt), length) for i, (prompt, length) in enumerate(pairs)]
        while waiting := [r for r in requests if not r.finished]:
            self.round(waiting[: self.capacity])
        return requests

    def round(self, running: list[Request]) -> None:
        prompts = [r for r in running if r.prefix + self.block <= len(r.prompt)]
        self.batch = running if self.mixed else prompts or running
        tokens = torch.tensor([self.block_of(r) for r in self.batch])
        ends = [r.prefix + self.block for r in self.batch]
        batch = forward_batch(tokens, [r.rid for r in self.batch], ends, self.prompt_mask())
        states = [r.state for r in self.batch] if self.algorithm.fdfo else None
        result = self.algorithm.run(self, batch, states)
        self.first_out(*result[1:4]) if self.algorithm.fdfo else self.together(result[1])

    def block_of(self, r: Request) -> list[int]:
        begun = r.committed[r.prefix : r.prefix + self.block]
        return r.partial or begun + [self.model.mask_token_id] * (self.block - len(begun))

    def prompt_mask(self) -> Tensor | None:
        if not any(self.model.mask_token_id in r.committed for r in self.batch):
            return None
        return torch.tensor([[r.prefix + i < len(r.committed) for i in range(self.block)] for r in self.batch])

    def forward(self, forward_batch: Any, pp_proxy_tensors: None) -> Any:
        """Logits (B * block, V), every row in a forward of its own. As in the Sampler, it sees the masks to come."""
        logits, mask = [], self.model.mask_token_id
        for r, block in zip(self.batch, forward_batch.input_ids.view(-1, self.block).tolist(), strict=True):
            r.nfe += mask in block
            future = [mask] * (len(r.prompt) + r.max_new_tokens - r.prefix - self.block)
            row = torch.tensor([r.committed[: r.prefix] + block + future])
            with torch.no_grad():
                logits.append(self.model(row, positions=torch.arange(r.prefix, r.prefix + self.block)))
        return SimpleNamespace(logits_output=SimpleNamespace(full_logits=torch.cat(logits)), can_run_graph=False)

    def first_out(self, tokens: list[list[int]], accepted: list[int], states: list[Any]) -> None:
        for r, row, length, state in zip(self.batch, tokens, accepted, states, strict=True):
            assert (length, state is None) in ((0, False), (self.block, True))
            r.partial, r.state = (None, None) if length else (row, state)
            if length:
                self.take(r, row)

    def together(self, tokens: list[Tensor]) -> None:
        for i, r in enumerate(self.batch):
            new = tokens[i].tolist() if tokens else []
            assert len(new) == max(0, r.prefix + self.block - max(r.prefix, len(r.committed)))
            self.take(r, self.block_of(r)[: self.block - len(new)] + new)

    def take(self, r: Request, row: list[int]) -> None:
        """A finished block, whose committed beginning must be as it was."""
        begun = r.committed[r.prefix : r.prefix + self.block]
        assert row[: len(begun)] == begun
        r.output += row[len(begun) :]
        r.prefix += self.block
