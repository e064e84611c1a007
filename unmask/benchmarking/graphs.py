"""Decoding by captured steps against decoding kernel by kernel, and what the bare forwards take. On CUDA only."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from unmask.benchmarking.calls import Captured, Contender
from unmask.benchmarking.policy_forward import BLOCK, LENGTH, confident_policy
from unmask.benchmarking.timing import Comparison
from unmask.models import Transformer, TransformerConfig
from unmask.policies import Policy, UnmaskingPolicy, make_policy
from unmask.sampling import Sampler, SamplerConfig
from unmask.sampling.graphs import Capture, CudaCapture, StepGraphs

PROMPT = 64
CONFIG = SamplerConfig(LENGTH, BLOCK, actions="greedy", stop_at_eos=False, cuda_graphs=False)


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


@torch.no_grad()
def telling_policy(model: Transformer) -> Policy:
    """A learned policy that unmasks about a quarter of a block in a step, however confident ``model`` is.

    Its logit is 0 at the upper quartile of those in a first generation.
    """
    policy = confident_policy(torch.device(model.device))
    seen = Sampler(model, None, policy, CONFIG).generate(random_prompt(model), record=True).trajectory
    assert seen is not None
    logits = policy(seen.mask[0], seen.confidence[0], seen.time)
    policy.output_proj.bias.sub_(logits[seen.allowed[0]].quantile(0.75))
    return policy


def comparison(model: Transformer, policy: UnmaskingPolicy, capture: Capture) -> Comparison:
    """One prompt, decoded in both ways, and as many bare forwards as that takes, each one replay."""
    prompt, eager = random_prompt(model), Sampler(model, None, policy, CONFIG)
    ours = Sampler(model, None, policy, CONFIG.updated({"cuda_graphs": True}))
    graphs = ours.graphs = StepGraphs(capture)
    result = eager.generate(prompt)
    steps = int(result.steps)
    block = torch.arange(PROMPT, PROMPT + BLOCK, device=result.sequences.device)
    positions = slice(PROMPT, None) if policy.full_context else block
    forward = Captured(lambda: model(result.sequences, None, positions=positions), capture, 1)

    def captured() -> tuple[Tensor, Tensor]:
        found = ours.generate(prompt)
        assert any(step.replay for step in graphs.steps.values()), "nothing was captured"
        return found.sequences, found.steps

    def kernel_by_kernel() -> tuple[Tensor, Tensor]:
        found = eager.generate(prompt)
        return found.sequences, found.steps

    @torch.no_grad()
    def bare() -> None:
        for _ in range(steps):
            forward()

    def agree(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
        assert torch.equal(got[0], want[0]), "other tokens than eager"
        assert torch.equal(got[1], want[1]), "other steps than eager"

    c = model.config
    return Comparison(
        "graphs",
        f"{policy.spec}, {c.num_layers} layers of {c.hidden_size}, {steps} forwards of {PROMPT + LENGTH} tokens",
        {
            "unmask": Contender(captured),
            "eager": Contender(kernel_by_kernel),
            "bare forward": Contender(bare, part=True),
        },
        agree,
        goals={"limit_share": 1 / 1.02},
        floor="bare forward",
        counts={name: {"forwards": float(steps)} for name in ("unmask", "eager", "bare forward")},
    )


def comparisons(device: torch.device, quick: bool = False) -> Iterator[Comparison]:
    """A buffer of 256 in blocks of 32 on a random bfloat16 model of LLaDA-8B's shape; nothing elsewhere than on CUDA."""
    if device.type != "cuda":
        return
    model = random_transformer(llada_config(2, 1024) if quick else llada_config(), device, torch.bfloat16)
    for policy in (make_policy("confidence:64"), telling_policy(model)):
        yield comparison(model, policy, CudaCapture(device))
