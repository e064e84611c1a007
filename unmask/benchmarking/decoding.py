"""Whole decodings: generations and rollouts with the packaged model, and captured steps of a large one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from unmask.benchmarking.calls import Captured
from unmask.benchmarking.operations import BLOCK, LENGTH, VOCAB, confident_policy
from unmask.benchmarking.timing import Comparison
from unmask.models import Transformer, TransformerConfig, load_model, load_tokenizer
from unmask.policies import UnmaskingPolicy, make_policy
from unmask.sampling import Sampler, SamplerConfig
from unmask.sampling.graphs import Capture, CudaCapture, StepGraphs
from unmask.sampling.result import first_stop
from unmask.tasks import make_task

SHORT, GROUP = 24, 8  # the packaged model's buffer, and rollouts of each prompt where the batch has room for them
PROMPT, STEPS = 64, 64  # tokens before the large model's buffer, and steps of a generation with it


class Products(TorchDispatchMode):
    """Collects the matrix products and attentions that run under it: one call of each shape, and how often it came."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[object, Callable[[], Any]] = {}
        self.times: Counter[object] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, call = func._schema.name, partial(func, *args, **kwargs or {})
        if name in ("aten::mm", "aten::addmm", "aten::bmm") or "scaled_dot_product" in name:
            values = (*args, *call.keywords.values())
            key = (name, *((v.shape, v.stride()) if isinstance(v, Tensor) else v for v in values))
            self.calls.setdefault(key, call)
            self.times[key] += 1
        return call()

    @torch.no_grad()
    def repeat(self) -> None:
        """The same products and attentions as often, on the tensors collected."""
        for key in self.times.elements():
            self.calls[key]()


def generated(sampler: Sampler, batch: int) -> Comparison:
    """A generation; beside it the model's forwards, and their products. Nothing else does the whole work: no ratio."""
    prompts = [problem.prompt for problem in make_task("hops").problems(batch, 0)]
    forwards: list[Callable[[], Any]] = []
    counts: dict[str, dict[str, float]] = {}

    def see(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        forwards.append(partial(model, *(a.clone() if isinstance(a, Tensor) else a for a in args), **kwargs))

    def generate() -> None:
        result = sampler.generate(prompts, seed=0)
        counts["unmask"] = {"tokens": int(result.filled.sum()), "forwards": int(result.steps.max())}

    @torch.no_grad()
    def model_alone() -> None:
        for forward in forwards:
            forward()

    hook = sampler.model.register_forward_pre_hook(see, with_kwargs=True)
    with Products() as products:
        generate()
    hook.remove()
    block = sampler.config.block_length
    return Comparison(
        "generation",
        f"batch {batch}, {f'blocks of {block}' if block else 'full diffusion'}, L = {sampler.config.max_new_tokens}",
        {"unmask": generate, "model alone": model_alone, "products alone": products.repeat},
        lambda got, want: None,
        parts=("model alone", "products alone"),
        floor="products alone",
        counts=counts,
    )


def generation(device: torch.device, quick: bool = False) -> Iterator[Comparison]:
    """Batches of 1, 16 and 64 with the packaged model and policy."""
    sampler = Sampler.from_pretrained("tiny", device=device)
    for batch in (1, 16) if quick else (1, 16, 64):
        yield generated(sampler, batch)


class Rollouts:
    """Prompts, each ``group`` times, to be decoded at most ``batch`` at a time with a learned policy."""

    def __init__(self, sampler: Sampler, batch: int, rollouts: int, block: int) -> None:
        self.sampler, self.model, self.batch = sampler, sampler.model, batch
        self.group = GROUP if batch >= GROUP else 1
        self.config = sampler.settled({"seed": 0, "block_length": block, "max_batch_size": batch})
        problems = make_task("hops").problems(rollouts // self.group, 0)
        self.fresh = sampler.prepare([p.prompt for p in problems for _ in range(self.group)], None, self.config)
        self.counts: dict[str, dict[str, float]] = {}
        self.rows: list[int] = []
        self.counter = self.model.register_forward_pre_hook(lambda _, seen: self.rows.append(seen[0].shape[0]))

    def noted(self, contender: str, completions: Tensor) -> Tensor:
        """Keep the counts of a contender's latest run; returns its completions (N, L)."""
        self.counts[contender] = {"rollouts": len(completions), "row forwards": sum(self.rows)}
        self.rows.clear()
        return completions

    def ours(self, actions: str) -> Tensor:
        """The library, as training runs it: refilled batch, blocks per row, equal rows computed once."""
        state, config = self.fresh.take(self.fresh.sequence), replace(self.config, actions=actions)
        steps = self.sampler.steps(state, config, share=self.group > 1)
        return self.noted("unmask", self.sampler.result(state, config, steps).completions)

    @torch.no_grad()
    def lockstep(self, actions: str) -> Tensor:
        """Research code: batch after batch, block after block, each as long as its slowest row; the whole buffer."""
        out, masked = [], self.model.mask_token_id
        for rows in self.fresh.sequence.split(self.batch):
            state = self.fresh.take(rows)  # of which only tokens and steps are kept up to date
            for end in range(state.block_length, SHORT + 1, state.block_length):
                while bool((state.buffer[:, :end] == masked).any()):
                    mask = state.buffer == masked
                    allowed = mask.clone()
                    allowed[:, end:] = False
                    logits = self.model(state.tokens, state.attention)[:, state.start :]
                    confidence = torch.softmax(logits, dim=-1).topk(1, dim=-1).values
                    score = self.sampler.policy(mask, confidence, state.steps / SHORT)
                    score.masked_fill_(~allowed, float("-inf"))
                    action = act(score, 0.0 if actions == "greedy" else None) & allowed
                    state.buffer[action] = logits.argmax(dim=-1)[action]
                    state.steps.add_(allowed.any(dim=1))
            out.append(state.buffer)
        return self.noted("eager", torch.cat(out))

    def agree(self, got: Tensor, want: Tensor) -> None:
        """Equal completions up to the first end of sequence, but for 1 %: probabilities may lie near one half."""
        end = first_stop(want, self.sampler.stop_ids)
        matters = torch.arange(SHORT, device=end.device) <= end[:, None]
        different = int(((got != want) & matters).any(dim=1).sum())
        assert different <= 0.01 * len(want), f"{different} of {len(want)} completions differ"


def act(score: Tensor, cutoff: float | None = None) -> Tensor:
    """(B, L) bool: positions that eager code unmasks by a score (B, L), drawn or above ``cutoff``, else the best."""
    action = torch.bernoulli(torch.sigmoid(score)).bool() if cutoff is None else score > cutoff
    best = torch.zeros_like(action).scatter_(1, score.argmax(dim=1, keepdim=True), True)
    return torch.where(action.any(dim=1, keepdim=True), action, best)


def rollouts(device: torch.device, quick: bool = False) -> Iterator[Comparison]:
    """Batches of 1 to 256, in blocks of 8 and as one block, four or two of each; compared are greedy actions."""
    model, tokenizer = load_model("tiny", device=device), load_tokenizer("tiny")
    sampler = Sampler(model, tokenizer, confident_policy(device), SamplerConfig(SHORT, None))
    for block in (8, SHORT):
        for batch in (16,) if quick else (1, 16, 64, 256):
            r = Rollouts(sampler, batch, max(16, min(4 * batch, 512)), block)
            ways = {"unmask": r.ours, "eager": r.lockstep}
            yield Comparison(
                "rollouts",
                f"batch {batch}, {'full diffusion' if block == SHORT else f'blocks of {block}'}, L = {SHORT}",
                {name: partial(way, "bernoulli-argmax") for name, way in ways.items()},
                r.agree,
                {name: partial(way, "greedy") for name, way in ways.items()},
                goals={"ratio": 3.0} if device.type == "cpu" and batch == 64 else {},
                counts=r.counts,
            )
            r.counter.remove()


@torch.no_grad()
def random_llada(layers: int, hidden: int, vocab: int, device: torch.device, dtype: torch.dtype) -> Transformer:
    """A model of LLaDA-8B's shape or a smaller one, whose positions differ and are confident here and there."""
    torch.manual_seed(0)
    config = TransformerConfig(vocab, hidden, layers, hidden // 128, 3 * hidden, vocab - 128, vocab - 383)
    with device:
        model = Transformer(config).to(dtype)
    for p in model.parameters():
        if p.ndim == 2:
            p.normal_(std=2 / p.shape[1] ** 0.5)
    model.lm_head.weight.mul_(4)
    return model.requires_grad_(False).eval()


def captured(model: Transformer, policy: UnmaskingPolicy, capture: Capture) -> Comparison:
    """One prompt decoded by captured steps or kernel by kernel; beside it as many bare forwards, each a graph."""
    config = SamplerConfig(LENGTH, BLOCK, actions="greedy", stop_at_eos=False, max_steps=STEPS, cuda_graphs=False)
    prompt = torch.randint(0, model.vocab_size - 383, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    eager = Sampler(model, None, policy, config)
    ours = Sampler(model, None, policy, replace(config, cuda_graphs=True))
    graphs = ours.graphs = StepGraphs(capture)
    tokens = eager.generate(prompt).sequences
    positions = slice(PROMPT, None) if policy.full_context else torch.arange(PROMPT, PROMPT + BLOCK).to(tokens.device)
    forward = Captured(lambda: model(tokens, None, positions=positions), capture, 1)

    def by_graphs() -> Tensor:
        sequences = ours.generate(prompt).sequences
        assert any(step.replay for step in graphs.steps.values()), "nothing was captured"
        return sequences

    @torch.no_grad()
    def bare() -> None:
        for _ in range(STEPS):
            forward()

    c = model.config
    return Comparison(
        "graphs",
        f"{policy.spec}, {c.num_layers} layers of {c.hidden_size}, {STEPS} forwards of {PROMPT + LENGTH} tokens",
        {"unmask": by_graphs, "eager": lambda: eager.generate(prompt).sequences, "bare forward": bare},
        torch.testing.assert_close,
        parts=("bare forward",),
        goals={"limit_share": 1 / 1.02},
        floor="bare forward",
    )


def graphs(device: torch.device, quick: bool = False) -> Iterator[Comparison]:
    """A buffer of 256 in blocks of 32 on a random bfloat16 model of LLaDA-8B's shape; on CUDA only."""
    if device.type == "cuda":
        model = random_llada(*((2, 1024) if quick else (32, 4096)), VOCAB, device, torch.bfloat16)
        for policy in (make_policy(f"confidence:{STEPS}"), confident_policy(device)):
            yield captured(model, policy, CudaCapture(device))
