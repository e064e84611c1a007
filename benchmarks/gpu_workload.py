"""Every kernel once or twice on small inputs, checked against the CPU: the program compute-sanitizer watches.

Run it with PYTORCH_NO_CUDA_MEMORY_CACHING=1, so that every tensor is an allocation of its own and an access just
outside one is seen. With the argument "graphs" it decodes by captured steps instead, which need the cache.
"""

from __future__ import annotations

import sys

import torch

from unmask import Policy, PolicyConfig, Sampler
from unmask.ops import (
    Choice,
    Proposals,
    Proposed,
    State,
    calm_,
    choose,
    policy_forward,
    prepare,
    select_set,
    topk_confidence,
    unmask_,
)
from unmask.ops.unmask_ import MODES
from unmask.policies import SetPolicy, SetPolicyConfig


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


def sets() -> None:
    """Sets that take one tile and several, rows that take turns, some without a choice."""
    generator = torch.Generator().manual_seed(0)
    for hidden, layers, batch, length in ((64, 2, 1, 24), (64, 2, 300, 9), (128, 1, 3, 100), (256, 3, 2, 40)):
        policy = SetPolicy(SetPolicyConfig(vocab_size=50, hidden_size=hidden, num_layers=layers, sure=0.8))
        torch.nn.init.normal_(policy.output.weight, std=0.5, generator=generator)
        tokens = torch.randint(0, 50, (2, batch, length), generator=generator)
        mask = torch.rand(batch, length, generator=generator) < torch.linspace(0, 1.2, batch)[:, None]
        confidence = torch.rand(batch, length, 5, generator=generator).sort(-1, descending=True).values
        found = []
        for device in ("cpu", "cuda"):
            weights, table = policy.to(device).packed_weights(), policy.tokens.weight
            read = (*tokens, mask, mask, confidence, confidence[..., 0])
            proposals = Proposals(*(t.to(device) for t in read))
            risk = torch.full((batch,), 0.5, device=device)
            found.append(select_set(weights, table, proposals, mask.to(device), risk, 0.8, 6))
        (here, p), (there, q) = found
        torch.testing.assert_close(q.cpu(), p, rtol=0, atol=1e-5)
        assert (there.cpu() != here).any(dim=1).sum() <= 0.02 * batch, "sets differ"


def rules() -> None:
    """Every way to pick, with all options, for rows of one tile and of several."""
    generator = torch.Generator().manual_seed(0)
    for rule, numbers in (
        ("threshold", (0.7, 3.0)), ("factor", (1.0,)), ("cost-bound", (0.5,)), ("count", (4.0,)),
        ("near", (0.9, 0.5, 4.0)), ("fixed-steps", (7.0,)), ("block-steps", (5.0, 0.9)),
    ):  # fmt: skip
        for batch, length in ((2, 24), (3, 300)):
            region = torch.rand(batch, length, generator=generator) < 0.6
            probability = torch.rand(batch, length, generator=generator)
            tokens, candidates = torch.randint(0, 9, (2, batch, length), generator=generator)
            found = []
            for device in ("cpu", "cuda"):
                steps = torch.ones(batch, dtype=torch.int64, device=device)
                memory = torch.full((batch, 2), -1, device=device)
                read = [t.to(device) for t in (region, probability, candidates)]
                edits = {"tokens": tokens.to(device), "editable": ~read[0]}
                given = Proposed(*read, **edits, steps=steps, memory=memory, block_length=length, stop_ids=(2, 7))
                choice = Choice(rule, "probability", numbers, window=20, decay=0.1, spacing=2, hold_eos=True, edit=0.5)
                found.append([t.cpu() for t in (*choose(choice, given), memory) if t is not None])
            for here, there in zip(*found, strict=True):
                assert torch.equal(here, there), rule


def calm(devices: tuple[str, ...] = ("cpu", "cuda")) -> None:
    """Two steps of three rows, one of which has just started, of part of the buffer."""
    for vocab, dtype in ((111, torch.float32), (4099, torch.bfloat16), (20000, torch.float16)):
        found = []
        for device in devices:
            generator = torch.Generator().manual_seed(0)
            positions = torch.arange(3, 7).expand(3, 4).to(device)
            before = torch.empty(3, 4, vocab, dtype=dtype, device=device)
            calm_for = torch.zeros(3, 9, dtype=torch.int32, device=device)
            for step in (0, 1):
                logits = torch.randn(3, 4, vocab, generator=generator).to(device, dtype)
                steps = torch.tensor([0, step, 2 * step], device=device)
                now, moved = calm_(logits, before, calm_for, steps, positions, excluded=2, bound=1.0, needed=1)
            found.append([t.cpu() for t in (now, calm_for, before, moved)])
        (*here, p), (*there, q) = found
        assert all(map(torch.equal, here, there))
        torch.testing.assert_close(q, p, rtol=1e-5, atol=1e-5)


def prepared(devices: tuple[str, ...] = ("cpu", "cuda")) -> None:
    """Rows in different blocks, short last ones among them."""
    for batch, length, block in ((2, 24, 8), (70, 300, 32)):
        found = []
        for device in devices:
            generator = torch.Generator().manual_seed(1)
            canvas = torch.randint(10, 90, (batch, 3 + length), generator=generator)
            canvas[:, 3:][torch.rand(batch, length, generator=generator) < 0.4] = 99
            state = State.create(canvas.to(device), 3, 99, block)
            seed = torch.tensor([5], device=device)
            found.append(prepare(state, horizon=length, seed=seed))
        for here, there in zip(*(vars(said).values() for said in found), strict=True):
            assert (here is None and there is None) or torch.equal(here, there.cpu())


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
        sets()
        rules()
        calm()
        prepared()
        unmask()
    torch.cuda.synchronize()
    print("all equal")


if __name__ == "__main__":
    main()
