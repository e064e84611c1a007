"""Every kernel once or twice on small inputs, checked against the CPU: the program compute-sanitizer watches.

Run it with PYTORCH_NO_CUDA_MEMORY_CACHING=1, so that every tensor is an allocation of its own and an access just
outside one is seen. With the argument "graphs" it decodes by captured steps and loops instead, which need the cache.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "ops"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "sampling"))

from helpers import random_model
from policy_cases import inputs, pack, random_network
from unmask_cases import assert_same, random_state, run

from unmask import Policy, PolicyConfig, Sampler, SamplerConfig
from unmask.ops import policy_forward, topk_confidence
from unmask.ops.unmask_ import MODES


def topk() -> None:
    generator = torch.Generator().manual_seed(0)
    for vocab, dtype, k, temperature in (
        (4099, torch.float32, 1, 0.0),
        (4099, torch.bfloat16, 8, 0.0),
        (20000, torch.bfloat16, 1, 1.0),
        (20000, torch.float16, 64, 0.7),
        (111, torch.float32, 3, 1.0),
    ):
        logits = (4 * torch.randn(6, vocab, generator=generator)).to(dtype)
        rows = torch.rand(6, generator=generator) < 0.7
        for select in (None, rows):
            here = topk_confidence(logits, k, rows=select, temperature=temperature, exclude=(2, 77), entropy=True)
            there = topk_confidence(
                logits.cuda(),
                k,
                rows=None if select is None else select.cuda(),
                temperature=temperature,
                exclude=(2, 77),
                entropy=True,
            )
            assert torch.equal(there.token.cpu(), here.token)
            assert torch.equal(there.sample.cpu(), here.sample)
            torch.testing.assert_close(there.confidence.cpu(), here.confidence, rtol=0, atol=1e-6)


def policy() -> None:
    for hidden, heads, ffn, k, batch, length in (
        (128, 2, 512, 1, 1, 96),
        (128, 2, 512, 1, 40, 33),
        (64, 4, 128, 50, 2, 40),
        (256, 2, 1024, 8, 1, 20),
    ):
        weights = pack(random_network(hidden, heads, ffn, k))
        mask, confidence, time = inputs(batch, length, k)
        here = policy_forward(weights, mask, confidence, time, rows=mask)
        there = policy_forward(
            weights._replace(packed=weights.packed.cuda()),
            mask.cuda(),
            confidence.cuda(),
            time.cuda(),
            rows=mask.cuda(),
        )
        torch.testing.assert_close(there.cpu(), here, rtol=0, atol=1e-4)


def unmask() -> None:
    for mode in MODES:
        generator = torch.Generator().manual_seed(1)
        here = there = random_state(generator, 5, 3, 40, 16, 0.6)
        for _ in range(3):
            tokens = torch.randint(10, 90, (5, 40), generator=generator)
            action = torch.randn(5, 40, generator=generator)
            here, rank = run(here, tokens, action, mode=mode, max_steps=9, eos=12, seed=4)
            there, rank_there = run(there, tokens, action, "cuda", mode=mode, max_steps=9, eos=12, seed=4)
            assert_same(there, here)
            assert torch.equal(rank_there, rank)


def graphs() -> None:
    """Twice, so that the second generation is nothing but launches of the loop."""
    config = SamplerConfig(max_new_tokens=16, block_length=8, temperature=0.5, seed=3)
    torch.manual_seed(0)
    learned = Policy(PolicyConfig(hidden_size=64, ffn_size=128, output_bias=0.0))
    for chosen in ("confidence:8", learned):
        sampler = Sampler(random_model().cuda(), None, chosen, config)
        for prompts in ([[1, 2, 3]], [[1, 2], [3], [4, 5, 6]]):
            want = sampler.generate(prompts, cuda_graphs=False)
            for _ in range(2):
                got = sampler.generate(prompts, cuda_graphs=True)
                assert torch.equal(got.sequences, want.sequences)
                assert torch.equal(got.steps, want.steps)


def main() -> None:
    if "graphs" in sys.argv[1:]:
        graphs()
    else:
        topk()
        policy()
        unmask()
    torch.cuda.synchronize()
    print("all equal")


if __name__ == "__main__":
    main()
