"""Every kernel once or twice on small inputs, checked against the CPU: the program compute-sanitizer watches.

Run it with PYTORCH_NO_CUDA_MEMORY_CACHING=1, so that every tensor is an allocation of its own and an access just
outside one is seen. With the argument "graphs" it decodes by captured steps instead, which need the cache.
"""

from __future__ import annotations

import sys

import torch

from unmask import Policy, PolicyConfig, Sampler
from unmask.ops import State, policy_forward, topk_confidence, unmask_
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
            settings = {"temperature": temperature, "exclude": (2, 77), "entropy": True}
            here = topk_confidence(logits, k, rows=select, **settings)
            there = topk_confidence(logits.cuda(), k, rows=None if select is None else select.cuda(), **settings)
            assert torch.equal(there.token.cpu(), here.token)
            assert torch.equal(there.sample.cpu(), here.sample)
            torch.testing.assert_close(there.confidence.cpu(), here.confidence, rtol=0, atol=1e-6)


def policy() -> None:
    generator = torch.Generator().manual_seed(0)
    for hidden, heads, ffn, k, batch, length in (
        (128, 2, 512, 1, 1, 96),
        (128, 2, 512, 1, 40, 33),
        (64, 4, 128, 50, 2, 40),
        (256, 2, 1024, 8, 1, 20),
    ):
        network = Policy(PolicyConfig(num_confidences=k, hidden_size=hidden, num_heads=heads, ffn_size=ffn))
        with torch.no_grad():
            for p in network.parameters():
                p.normal_(std=0.1, generator=generator)
        mask, time = torch.rand(batch, length, generator=generator) < 0.6, torch.rand(batch, generator=generator)
        confidence = torch.rand(batch, length, k, generator=generator).sort(-1, descending=True).values
        here = policy_forward(network.packed_weights(), mask, confidence, time, mask)
        weights = network.cuda().packed_weights()
        there = policy_forward(weights, mask.cuda(), confidence.cuda(), time.cuda(), mask.cuda())
        torch.testing.assert_close(there.cpu(), here, rtol=0, atol=1e-4)


def unmask() -> None:
    """Three steps of five rows, some of whose positions are filled, on both devices."""
    mask_id, start, length = 99, 3, 40
    for mode in MODES:
        results = []
        for device in ("cpu", "cuda"):
            generator = torch.Generator().manual_seed(1)
            canvas = torch.randint(10, 90, (5, start + length), generator=generator)
            canvas[:, start:][torch.rand(5, length, generator=generator) < 0.6] = mask_id
            candidates = torch.randint(10, 90, (5, length), generator=generator).to(device)
            state = State.create(canvas.to(device), start, mask_id, 16)
            for _ in range(3):
                score = torch.randn(5, length, generator=generator).to(device)
                rank = unmask_(state, candidates, score, mode=mode, max_steps=9, eos=12, seed=4)
            results.append([*dict(state.tensors()).values(), rank])
        for here, there in zip(*results, strict=True):
            assert torch.equal(there.cpu(), here), mode


def graphs() -> None:
    """Three times, so that the last generation is nothing but replays."""
    torch.manual_seed(0)
    learned = Policy(PolicyConfig(hidden_size=64, ffn_size=128, output_bias=0.0))
    for chosen in ("confidence:8", learned):
        sampler = Sampler.from_pretrained("tiny", policy=chosen, device="cuda")
        settings = {"max_new_tokens": 16, "block_length": 8, "temperature": 0.5, "seed": 3}
        for prompts in ([[4, 5, 6]], [[4, 5], [6], [7, 8, 9]]):
            want = sampler.generate(prompts, cuda_graphs=False, **settings)
            for _ in range(3):
                got = sampler.generate(prompts, cuda_graphs=True, **settings)
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
