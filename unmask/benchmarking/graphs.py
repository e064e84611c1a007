"""What it costs to launch denoising steps: kernel by kernel, as a CUDA graph each, or as one loop on the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from unmask.benchmarking.policy_forward import BLOCK, LENGTH
from unmask.benchmarking.rollouts import confident_policy
from unmask.benchmarking.timing import Comparison
from unmask.models import Transformer, TransformerConfig
from unmask.policies import Policy, UnmaskingPolicy, make_policy
from unmask.sampling import GenerationResult, Sampler, SamplerConfig
from unmask.sampling.capture import Backend, CudaGraphs
from unmask.sampling.graph import StepGraphs

PROMPT = 64
STEPS = 64
GOAL = 1 / 1.02
"""Of the bare forward's time, as the ratio that the table shows."""


def llada_config(layers: int = 32, hidden: int = 4096) -> TransformerConfig:
    """The shape of LLaDA-8B; with other numbers, of a smaller one."""
    return TransformerConfig(
        vocab_size=126_464,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=hidden // 128,
        intermediate_size=3 * hidden,
        mask_token_id=126_336,
        eos_token_id=126_081,
        max_position_embeddings=4096,
    )


def random_transformer(config: TransformerConfig, device: torch.device, dtype: torch.dtype) -> Transformer:
    """Weights drawn on the device, such that positions differ and some are confident, as in a trained model."""
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = Transformer(config)
    finally:
        torch.set_default_dtype(default)
    with torch.no_grad():
        for p in model.layers.parameters():
            if p.ndim == 2:
                p.normal_(std=2 / p.shape[1] ** 0.5)
        model.lm_head.weight.normal_(std=8 / config.hidden_size**0.5)
    return model.requires_grad_(False).eval()


def random_prompt(model: Transformer) -> Tensor:
    """(1, PROMPT) int64, the same for equal vocabularies."""
    low = min(model.mask_token_id, model.eos_token_id or model.vocab_size)
    return torch.randint(0, low, (1, PROMPT), generator=torch.Generator().manual_seed(1))


class Decoding:
    """One prompt, decoded by one policy in several ways. ``graphs`` makes what a sampler captures with."""

    def __init__(self, model: Transformer, policy: UnmaskingPolicy, config: SamplerConfig, graphs: Any) -> None:
        self.model, self.prompt = model, random_prompt(model)
        self.samplers = {
            "eager": Sampler(model, None, policy, config.updated({"cuda_graphs": False})),
            "graph per step": Sampler(model, None, policy, config),
            "unmask": Sampler(model, None, policy, config),
        }
        self.samplers["graph per step"].graphs = graphs(loops=False)
        self.samplers["unmask"].graphs = graphs(loops=True)
        self.whole = policy.full_context
        self.steps = int(self.generate("eager").steps)

    def generate(self, name: str) -> GenerationResult:
        return self.samplers[name].generate(self.prompt)

    @torch.no_grad()
    def forward(self) -> Any:
        """What the model computes in each step: logits of the buffer, or of a block if the policy reads no more."""
        if self.whole:
            return self.model(self.tokens, None, positions=slice(PROMPT, None))
        return self.model(self.tokens, None, positions=self.block)

    def bare(self, backend: Backend) -> Callable[[], None]:
        """As many forwards as a generation takes, each one replay and nothing between them."""
        device = self.model.device
        self.tokens = self.generate("eager").sequences.clone()
        self.block = torch.arange(PROMPT, PROMPT + BLOCK, device=device)
        backend.warm_up(self.forward)
        captured = backend.capture(self.forward)

        def run() -> None:
            for _ in range(self.steps):
                captured.replay()

        return run

    def check(self) -> None:
        """All ways give the same tokens in as many steps; three times, so that everything is captured."""
        want = self.generate("eager")
        for name in ("graph per step", "unmask"):
            for _ in range(3):
                got = self.generate(name)
                assert torch.equal(got.sequences, want.sequences), f"{name}: other tokens than eager"
                assert torch.equal(got.steps, want.steps), f"{name}: other steps than eager"
            graphs = self.samplers[name].graphs
            assert graphs is not None
            assert any(s.captured for s in graphs.steps.values()), f"{name}: nothing was captured"


@torch.no_grad()
def telling_policy(model: Transformer, config: SamplerConfig) -> Policy:
    """A learned policy that unmasks about a quarter of a block in a step, however confident ``model`` is.

    Its logit is 0 at the upper quartile of those in a first generation.
    """
    policy = confident_policy(torch.device(model.device))
    sampler = Sampler(model, None, policy, config.updated({"cuda_graphs": False, "record": True}))
    seen = sampler.generate(random_prompt(model)).trajectory
    assert seen is not None
    logits = policy(seen.mask[0], seen.confidence[0], seen.time)
    policy.output_proj.bias.sub_(logits[seen.allowed[0]].quantile(0.75))
    return policy


def comparisons(device: torch.device, quick: bool = False) -> list[Comparison]:
    """A buffer of 256 in blocks of 32 on a random bfloat16 model of LLaDA-8B's shape; only on CUDA, nothing elsewhere.

    Times are of whole generations of one prompt; the bare forward is replayed as often as a generation takes steps.
    """
    if device.type != "cuda":
        return []
    shape = llada_config(layers=2, hidden=1024) if quick else llada_config()
    model = random_transformer(shape, device, torch.bfloat16)
    config = SamplerConfig(
        max_new_tokens=LENGTH, block_length=BLOCK, actions="greedy", stop_at_eos=False, cuda_graphs=True
    )

    def graphs(loops: bool) -> StepGraphs:
        return StepGraphs(CudaGraphs(model.device), loops=loops)

    out = []
    for name, policy in (
        (f"confidence:{STEPS}", make_policy(f"confidence:{STEPS}")),
        ("learned", telling_policy(model, config)),
    ):
        decoding = Decoding(model, policy, config, graphs)
        contenders: dict[str, Callable[[], Any]] = {"bare forward": decoding.bare(CudaGraphs(model.device))}
        for way in ("unmask", "graph per step", "eager"):
            contenders[way] = lambda way=way, d=decoding: d.generate(way)  # type: ignore[misc]
        out.append(
            Comparison(
                "graphs",
                f"{name}, {shape.num_layers} layers of {shape.hidden_size}, {decoding.steps} forwards of "
                f"{PROMPT + LENGTH} tokens, bfloat16",
                contenders,
                decoding.check,
                baseline="bare forward",
                goal=GOAL,
                counts={way: {"forwards": float(decoding.steps)} for way in contenders},
            )
        )
    return out
