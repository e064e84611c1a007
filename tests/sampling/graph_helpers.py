"""Samplers that capture steps, and how their generations are compared with plain ones."""

from __future__ import annotations

from typing import Any

import torch
from helpers import random_model
from recorded_graphs import RecordedGraphs
from torch import Tensor

from unmask import Policy, PolicyConfig, Sampler, SamplerConfig
from unmask.policies import Threshold
from unmask.policies.base import Observation
from unmask.sampling.graph import StepGraphs

POLICIES = [
    "threshold:0.5",
    "confidence:8",
    "random:8",
    "margin:8",
    "entropy:8",
    "factor:1",
    "entropy-bound:0.5",
    "entropy-threshold:0.5",
    "klass:0.5,0.1",
    "learned",
    "learned block",
]
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9], *([i, i + 1] for i in range(14))]  # 17 rows, padded to 18


def learned(**config: Any) -> Policy:
    torch.manual_seed(3)
    return Policy(PolicyConfig(hidden_size=64, ffn_size=128, output_bias=0.0, **config))


def make(policy: Any = "threshold:0.5", loops: bool = True, **config: Any) -> tuple[Sampler, RecordedGraphs]:
    """A sampler that captures, and what it captures with."""
    if isinstance(policy, str) and policy.startswith("learned"):
        policy = learned(context="block" if "block" in policy else "full")
    settings = {"max_new_tokens": 16, "block_length": 4, "stop_at_eos": False} | config
    sampler = Sampler(random_model(), policy=policy, config=SamplerConfig(**{"cuda_graphs": None, **settings}))
    backend = RecordedGraphs(loops)
    sampler.graphs = StepGraphs(backend)
    return sampler, backend


def eager(sampler: Sampler, prompts: Any = PROMPTS, **overrides: Any) -> Any:
    return sampler.generate(prompts, cuda_graphs=False, **overrides)


def graphed(sampler: Sampler, prompts: Any = PROMPTS, **overrides: Any) -> Any:
    return sampler.generate(prompts, cuda_graphs=True, **overrides)


def assert_equal(got: Any, want: Any) -> None:
    for name in ("sequences", "completions", "steps", "finished", "filled"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name


class Waiting(Threshold):
    """Looks at a number on the host."""

    def score(self, observation: Observation) -> Tensor:
        return observation.token_confidence * float(observation.length + 0 * observation.steps.sum().item())
