"""The policy network: parity with upstream, shapes, gradients, conditioning."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from unmask.policies.config import PolicyConfig
from unmask.policies.files import load
from unmask.policies.network import PolicyNetwork, time_frequencies

GOLDEN = Path(__file__).parent.parent / "golden"


def random_network(dtype: torch.dtype = torch.float64, **fields) -> PolicyNetwork:
    """A network whose every part matters: the adaptive scales start at zero, so they are drawn too."""
    torch.manual_seed(3)
    network = PolicyNetwork(PolicyConfig(**fields)).to(dtype)
    with torch.no_grad():
        ada = network.transformer_blocks[0].ada_conditioning
        ada.weight.normal_(std=0.2)
        ada.bias.normal_(std=0.2)
        if network.alpha_mlp is not None:
            network.alpha_mlp[2].weight.normal_(std=0.3)
            network.alpha_shift.weight.normal_(std=0.3)
    return network


def inputs(batch: int, length: int, k: int = 1, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(11)
    mask = torch.rand(batch, length, generator=generator) < 0.6
    confidence = torch.rand(batch, length, k, generator=generator, dtype=dtype).sort(-1, descending=True).values
    return mask, confidence, torch.rand(batch, generator=generator, dtype=dtype)


@pytest.mark.parametrize("name", ["policy-ref", "policy-ref-top8"])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 8e-5), (torch.float32, 1.5e-4)])
def test_matches_upstream_logits(name, dtype, limit):
    """Upstream's logits are float32; with activations of order 100 that alone moves them by 5e-5."""
    config, tensors = load(GOLDEN / name)
    network = PolicyNetwork(config)
    network.load_state_dict(tensors)
    golden = load_file(GOLDEN / name / "golden.safetensors")
    with torch.no_grad():
        logits = network.to(dtype)(golden["mask"], golden["confidence"].to(dtype), golden["time"].to(dtype))
    assert golden["logits"].std() > 1
    assert (logits - golden["logits"]).abs().max() < limit


def test_reference_configuration():
    network = PolicyNetwork(PolicyConfig())
    assert sum(p.numel() for p in network.parameters()) == 331_265
    block = network.transformer_blocks[0]
    assert not block.ada_conditioning.weight.any()
    assert not block.ada_conditioning.bias.any()
    assert network.output_proj.bias.item() == -2
    assert torch.equal(network.frequencies, torch.ones(64))


def test_time_frequencies():
    geometric = time_frequencies(PolicyConfig(min_frequency=1.0, max_frequency=50.0))
    assert geometric[0] == 1
    assert geometric[-1] == pytest.approx(50)
    ratios = geometric[1:] / geometric[:-1]
    assert torch.allclose(ratios, ratios[0].expand(63), rtol=1e-5)
    period = time_frequencies(PolicyConfig(max_period=10_000.0))
    assert period[32] == pytest.approx(0.01)


@pytest.mark.parametrize(("batch", "length"), [(0, 5), (2, 0), (0, 0), (1, 1), (3, 33)])
def test_any_batch_and_length(batch, length):
    mask, confidence, time = inputs(batch, length, k=3)
    logits = random_network(num_confidences=3)(mask, confidence, time)
    assert logits.shape == (batch, length)
    assert logits.isfinite().all()


@pytest.mark.parametrize(
    ("hidden", "heads", "ffn", "k", "alpha"), [(32, 1, 48, 1, None), (64, 4, 128, 5, 0.7), (48, 3, 40, 2, None)]
)
def test_matches_loops_over_positions(hidden, heads, ffn, k, alpha):
    """Against the formulas written out per position and head, conditioning included."""
    network = random_network(
        hidden_size=hidden, num_heads=heads, ffn_size=ffn, num_confidences=k, alpha_conditioned=alpha is not None,
        min_frequency=0.5, max_frequency=20.0,
    )  # fmt: skip
    mask, confidence, time = inputs(2, 9, k)
    with torch.no_grad():
        logits = network(mask, confidence, time, alpha)
        expected = torch.stack([sequence_by_loops(network, mask[b], confidence[b], time[b], alpha) for b in range(2)])
    assert torch.allclose(logits, expected, atol=1e-9)


def sequence_by_loops(net, mask, confidence, time, alpha):
    p = dict(net.named_parameters())
    block = "transformer_blocks.0."
    length, d = mask.shape[0], net.config.hidden_size
    heads, size = net.config.num_heads, net.config.head_dim

    def linear(name, x):
        return p[f"{name}.weight"] @ x + p[f"{name}.bias"]

    def norm(name, x):
        return (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt() * p[f"{name}.weight"] + p[f"{name}.bias"]

    def mlp(name, value, frequencies):
        embedded = torch.tensor([f(value * w) for f in (math.cos, math.sin) for w in frequencies.tolist()]).double()
        hidden = linear(f"{name}.0", embedded)
        return linear(f"{name}.2", hidden * torch.sigmoid(hidden))

    def rotate(x, position):
        even, odd = [], []
        for i in range(size // 2):
            angle = position * float(torch.tensor(10_000.0 ** (-2 * i / size)).float())
            a, b = x[2 * i], x[2 * i + 1]
            even.append(a * math.cos(angle) - b * math.sin(angle))
            odd.append(a * math.sin(angle) + b * math.cos(angle))
        return torch.stack(even + odd)

    shared, shift = mlp("time_mlp", time.item(), net.frequencies.double()), 0.0
    if alpha is not None:
        shared = shared + mlp("alpha_mlp", math.log1p(alpha), net.alpha_frequencies.double())
        angles = [math.log1p(alpha) * f for f in net.alpha_frequencies.double().tolist()]
        embedded = [f(a) for f in (math.cos, math.sin) for a in angles]
        shift = p["alpha_shift.weight"][0] @ torch.tensor(embedded, dtype=torch.float64)
    ada, xs, q, k, v = [], [], [], [], []
    for i in range(length):
        cond = p["mask_embedding.weight"][int(mask[i])] + shared
        ada.append(linear(f"{block}ada_conditioning", cond).split(d))
        xs.append(linear("confidence_proj", confidence[i]))
        h = norm(f"{block}norm1", xs[i]) * (1 + ada[i][0]) + ada[i][1]
        for out, name in ((q, "q_proj"), (k, "k_proj"), (v, "v_proj")):
            out.append(linear(block + name, h).split(size))
    logits = []
    for i in range(length):
        mixed = []
        for h in range(heads):
            query = rotate(q[i][h], i)
            scores = torch.stack([query @ rotate(k[j][h], j) for j in range(length)]) / math.sqrt(size)
            weights = scores.softmax(0)
            mixed.append(sum(weights[j] * v[j][h] for j in range(length)))
        x = xs[i] + linear(f"{block}out_proj", torch.cat(mixed)) * (1 + ada[i][2])
        hidden = linear(f"{block}linear1", norm(f"{block}norm2", x) * (1 + ada[i][3]) + ada[i][4])
        gelu = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        x = x + linear(f"{block}linear2", gelu) * (1 + ada[i][5])
        logits.append(linear("output_proj", norm("final_norm", x))[0] + shift)
    assert heads * size == d
    return torch.stack(logits)


def test_gradients():
    network = random_network(hidden_size=16, num_heads=2, ffn_size=16)
    mask, confidence, time = inputs(2, 4)
    confidence.requires_grad_(True)
    time.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda c, t: network(mask, c, t), (confidence, time), atol=1e-6)
    network(mask, confidence, time).sum().backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0 for n, p in network.named_parameters() if "k_proj.b" not in n
    )


def test_hidden_keys_are_not_seen():
    network = random_network()
    mask, confidence, time = inputs(2, 12)
    valid = (torch.arange(12) < 7).expand(2, 12)
    changed = confidence.clone()
    changed[:, 7:] += 1
    padded = network(mask, changed, time, valid=valid)[:, :7]
    assert torch.allclose(padded, network(mask[:, :7], confidence[:, :7], time), atol=1e-9)


def test_ablations_ignore_their_input():
    mask, confidence, time = inputs(2, 6)
    for fields, other in (
        ({"zero_time": True}, (mask, confidence, 1 - time)),
        ({"zero_mask": True}, (~mask, confidence, time)),
    ):
        assert torch.equal(random_network(**fields)(mask, confidence, time), random_network(**fields)(*other))
        assert not torch.allclose(random_network()(mask, confidence, time), random_network()(*other))


def test_alpha_starts_without_effect_and_then_has_one():
    mask, confidence, time = inputs(2, 6)
    torch.manual_seed(0)
    fresh = PolicyNetwork(PolicyConfig(alpha_conditioned=True)).double()
    with torch.no_grad():
        fresh.transformer_blocks[0].ada_conditioning.weight.normal_(std=0.2)
    assert torch.equal(fresh(mask, confidence, time, 0.1), fresh(mask, confidence, time, 10.0))
    network = random_network(alpha_conditioned=True)
    both = network(mask, confidence, time, torch.tensor([0.1, 10.0]))
    assert torch.allclose(both[0], network(mask, confidence, time, 0.1)[0])
    assert torch.allclose(both[1], network(mask, confidence, time, 10)[1])
    assert not torch.allclose(both[0], network(mask, confidence, time, 10)[0], atol=1e-2)


@pytest.mark.parametrize("alpha", [-1.0, math.nan, math.inf, "1", True])
def test_an_alpha_that_is_none_is_refused(alpha):
    network = PolicyNetwork(PolicyConfig(alpha_conditioned=True))
    with pytest.raises(ValueError, match="alpha must be a.* got"):
        network(torch.ones(2, 3, dtype=torch.bool), torch.zeros(2, 3, 1), torch.zeros(2), alpha)


def test_alphas_beyond_training_act_as_its_ends():
    mask, confidence, time = inputs(2, 6)
    network = random_network(alpha_conditioned=True)
    below, above, within = (network(mask, confidence, time, a) for a in (0.5, 10.0, 3.0))
    network.config = replace(network.config, trained_alphas=(0.5, 10.0))
    assert torch.equal(network(mask, confidence, time, torch.tensor([0.0, 100.0]))[0], below[0])
    assert torch.equal(network(mask, confidence, time, torch.tensor([0.0, 100.0]))[1], above[1])
    assert torch.equal(network(mask, confidence, time, 3.0), within)
    assert PolicyConfig.from_dict({"trained_alphas": [0, 10]}).trained_alphas == (0, 10)


def test_input_errors():
    network = PolicyNetwork(PolicyConfig())
    mask, confidence, time = inputs(2, 6)
    with pytest.raises(ValueError, match="mask must be bool"):
        network(mask.long(), confidence, time)
    with pytest.raises(ValueError, match=r"confidence must be floating .* = \(2, 6, 1\)"):
        network(mask, confidence[..., 0], time)
    with pytest.raises(ValueError, match=r"time must be floating \(B,\) = \(2,\)"):
        network(mask, confidence, time[:1])
    with pytest.raises(ValueError, match="not conditioned"):
        network(mask, confidence, time, 1.0)
    with pytest.raises(ValueError, match="pass alpha"):
        PolicyNetwork(PolicyConfig(alpha_conditioned=True))(mask, confidence, time)
    with pytest.raises(ValueError, match=r"alpha must be a number or have shape \(2,\)"):
        PolicyNetwork(PolicyConfig(alpha_conditioned=True))(mask, confidence, time, torch.ones(3))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_heads", 3, "hidden_size must be a multiple of 2 * num_heads=6, as .*, got 128"),
        ("hidden_size", 0, "hidden_size must be at least 1, got 0"),
        ("ffn_size", 2.5, "ffn_size must be an integer, got 2.5"),
        ("context", "some", "context must be 'full' or 'block', got 'some'"),
        ("min_frequency", 1.0, "min_frequency and max_frequency are given together or not at all"),
        ("max_period", -1.0, "max_period must be greater than 0, got -1.0"),
        ("output_bias", math.nan, "output_bias must be a finite number, got nan"),
        ("default_alpha", True, "default_alpha must be a number, got True"),
        ("trained_actions", "best", "trained_actions must be 'bernoulli', 'dpls' or 'greedy', got 'best'"),
        ("trained_block_length", -1, "trained_block_length must be at least 0, got -1"),
        ("alpha_conditioned", "no", "alpha_conditioned must be true or false, got 'no'"),
        ("trained_alphas", (3, 1), r"trained_alphas must be a pair \(low, high\) with 0 <= low <= high, got \(3, 1\)"),
        ("trained_alphas", (-1, 2), "trained_alphas must be at least 0, got -1"),
        ("trained_alphas", (0, math.inf), "trained_alphas must be a finite number, got inf"),
        ("widht", 3, r"unknown PolicyConfig fields \['widht'\]"),
    ],
)
def test_config_errors(field, value, message):
    with pytest.raises(ValueError, match=message.replace("2 * num", r"2 \* num")):
        PolicyConfig.from_dict({field: value})


def test_frequencies_out_of_order_are_refused():
    with pytest.raises(ValueError, match=r"min_frequency=50.0 is above max_frequency=1.0"):
        PolicyConfig(min_frequency=50.0, max_frequency=1.0)
    assert PolicyConfig(min_frequency=2.0, max_frequency=2.0).max_frequency == 2


def test_a_policy_decodes_as_it_was_trained():
    assert PolicyConfig().decoding() == {}
    full = PolicyConfig(trained_block_length=0, trained_temperature=0.5, trained_actions="bernoulli")
    assert full.decoding() == {"block_length": None, "policy_temperature": 0.5, "actions": "bernoulli-argmax"}
    assert PolicyConfig(trained_block_length=8, trained_actions="dpls").decoding() == {
        "block_length": 8,
        "actions": "dpls",
    }
    assert PolicyConfig.from_dict(full.to_dict()) == full


def test_config_round_trip():
    config = PolicyConfig(num_confidences=4, min_frequency=1.0, max_frequency=50.0, context="block")
    assert PolicyConfig.from_dict(config.to_dict()) == config
