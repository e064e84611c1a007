"""Block families beyond upstream's own small models: other shapes, defaults, stop ids, and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from block_reference import ILLADA, LLADA2, NEMOTRON, SDAR, SDAR_MOE, YARN, Raw, reference, write
from fresh_process import run_python
from safetensors.torch import save_file
from test_loading import PEAK

from unmask import Sampler, SamplerConfig
from unmask.models import Transformer, TransformerConfig, experts, load_model, save_model
from unmask.models.experts import Mixture, MixtureConfig
from unmask.models.loading import FAMILIES
from unmask.sampling.graphs import why_no_graphs

MSCALES = {"mscale": 0.7, "mscale_all_dim": 1.3}
QUERIES = {**MSCALES, "rope_theta": 5e3, "llama_4_scaling_beta": 0.3, "original_max_position_embeddings": 3}
CASES: dict[str, Raw] = {
    "heads wider than the model": {**SDAR, "head_dim": 10},
    "attention bias": {**SDAR, "attention_bias": True},
    "tied head": {**SDAR, "tie_word_embeddings": True, "num_key_value_heads": 4},
    "YaRN without mscale": {**SDAR, "rope_scaling": YARN},
    "YaRN with mscale": {**SDAR, "rope_scaling": {**YARN, **MSCALES, "beta_fast": 4.0, "beta_slow": 0.5}},
    "YaRN, one mscale, untruncated": {**SDAR, "rope_scaling": {**YARN, "mscale": 0.7, "truncate": False}},
    "YaRN, attention factor": {**SDAR, "rope_scaling": {**YARN, **MSCALES, "attention_factor": 0.8}},
    "experts": SDAR_MOE,
    "experts, unnormalised": {**SDAR_MOE, "norm_topk_prob": False, "num_experts_per_tok": 3},
    "every second layer": {**SDAR_MOE, "decoder_sparse_step": 2, "attention_bias": True},
    "layers without experts": {**SDAR_MOE, "mlp_only_layers": [0, 2], "tie_word_embeddings": True},
    "groups": LLADA2,
    "two dense layers": {**LLADA2, "first_k_dense_replace": 2, "num_shared_experts": 2},
    "one expert, all biases": {**LLADA2, "num_experts_per_tok": 1, "use_bias": True, "use_qkv_bias": True},
    "one group, nothing shared": {**LLADA2, "n_group": 1, "topk_group": 1, "num_shared_experts": 0},
    "all groups, no norms": {**LLADA2, "topk_group": 4, "use_qk_norm": False, "num_experts_per_tok": 5},
    "a quarter turned, YaRN": {**LLADA2, "head_dim": 16, "partial_rotary_factor": 0.25, "rope_scaling": YARN},
    "normalised head": {**LLADA2, "norm_head": True},
    "query scale": {**NEMOTRON, "rope_theta": None, "rope_parameters": {**YARN, **QUERIES}},
    "no YaRN": NEMOTRON,
    "iLLaDA": ILLADA,
    "iLLaDA with biases": {**ILLADA, "attention_bias": True, "tie_word_embeddings": False},
}


def own_horizon(raw: Raw, length: int) -> list[int]:
    if raw["model_type"] == "illada":
        return [length - 1] * length
    if raw["model_type"] == "nemotron_labs_diffusion":
        return list(range(length))
    return [min(i // 4 * 4 + 3, length - 1) for i in range(length)]


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_formulas(tmp_path: Path, case: str) -> None:
    """With the model's own attention and with another horizon, in float64 and float32, and after a round trip."""
    raw, length = CASES[case], 11
    weights = write(tmp_path / "model", raw)
    ids = torch.randint(0, 39, (2, length), generator=torch.Generator().manual_seed(1))
    own, other = own_horizon(raw, length), [10, 0, 5, 3, 10, 6, 6, 9, 8, 9, 10]
    expected, else_ = (torch.stack([reference(raw, weights, row, sees) for row in ids]) for sees in (own, other))
    size = expected.abs().max()
    assert expected.std() > 0.1
    assert (expected - else_).abs().max() > 1e-3 * size
    sees = torch.tensor(other).repeat(2, 1)
    for dtype, tolerance in ((torch.float64, 5e-6), (torch.float32, 1e-4)):
        model: Any = load_model(tmp_path / "model", dtype=dtype)
        assert (model(ids) - expected).abs().max() < tolerance * size
        assert (model(ids, horizon=sees) - else_).abs().max() < tolerance * size
    save_model(model, tmp_path / "native")
    assert torch.equal(load_model(tmp_path / "native")(ids), model(ids))


def test_yarn_is_transformers() -> None:
    """Frequencies and scale over many settings."""
    rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
    from transformers import Qwen3Config

    from unmask.models.rotary import Yarn, rotary_tables

    for more in ({}, MSCALES, {"mscale": 1.0}, {"attention_factor": 1.4}, {"truncate": False, "beta_fast": 20.0}):
        for factor, original in ((16.0, 16384), (4.0, 100), (1.0, 512), (40.0, 20)):
            rope = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original, **more}
            config = Qwen3Config(rope_parameters={**rope, "rope_theta": 1e6}, head_dim=32)
            theirs, scale = rope_utils.ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
            yarn = Yarn.from_dict({name: value for name, value in rope.items() if name != "rope_type"})
            cos, sin = rotary_tables(torch.tensor([1]), 32, 1e6, yarn)
            angles = torch.atan2(sin[0, 0, 16:], cos[0, 0, 16:])
            assert torch.allclose(angles, theirs, rtol=1e-4)
            assert torch.allclose(cos.square() + sin.square(), torch.tensor(scale) ** 2)


@pytest.mark.parametrize("prefix", ["", "wrapped"])
@pytest.mark.parametrize("fused", [False, True])
def test_other_layouts_of_a_checkpoint(tmp_path: Path, prefix: str, fused: bool) -> None:
    """Fused experts, and the names of a wrapped language model, also left on the disk."""
    weights = write(tmp_path, LLADA2)
    ids = torch.randint(0, 39, (2, 9), generator=torch.Generator().manual_seed(1))
    expected = load_model(tmp_path)(ids)
    if fused:
        for layer in ("model.layers.1.mlp.experts", "model.layers.2.mlp.experts"):
            for x in ("gate_proj", "up_proj", "down_proj"):
                weights[f"{layer}.{x}"] = torch.stack([weights.pop(f"{layer}.{e}.{x}.weight") for e in range(8)])
    if prefix:
        longer = {"model.": "model.language_model.", "lm_head.": "model.lm_head."}
        weights = {
            long + n.removeprefix(p): t for n, t in weights.items() for p, long in longer.items() if n.startswith(p)
        }
    save_file(weights, tmp_path / "model.safetensors")
    assert torch.equal(load_model(tmp_path)(ids), expected)
    pytest.importorskip("accelerate")
    split = load_model(tmp_path, device_map={"": "cpu", "layers.0": "disk", "layers.2": "disk", "lm_head": "disk"})
    assert all(p.is_meta for p in split.get_submodule("layers.2").parameters())
    assert torch.equal(split(ids), expected)
    write(tmp_path / "unit", {**LLADA2, "norm_head": True})
    with pytest.raises(ValueError, match="norm_head=true normalises the head, so device_map cannot leave lm_head on"):
        load_model(tmp_path / "unit", device_map={"": "cpu", "lm_head": "disk"})


def test_experts_stream_into_their_stacks(tmp_path: Path) -> None:
    """One expert at a time: the peak exceeds the model by less than one stack (17 MB) of the six."""
    sizes = {"hidden_size": 512, "num_hidden_layers": 2, "moe_intermediate_size": 512, "num_experts": 16}
    write(tmp_path / "large", {**SDAR_MOE, **sizes})
    write(tmp_path / "small", SDAR_MOE)
    done = run_python(PEAK, str(tmp_path / "small"), str(tmp_path / "large"), "float32")
    assert done.returncode == 0, done.stderr
    peak, held = map(int, done.stdout.split())
    assert held > 100e6
    assert peak < held + 10e6, f"peak {peak / 1e6:.0f} MB, model {held / 1e6:.0f} MB"


def mixture(dtype: torch.dtype, **changes: Any) -> Mixture:
    torch.manual_seed(0)
    sizes = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "sparse_layers": (0,), **changes}
    return Mixture(24, MixtureConfig(**sizes)).to(dtype)


def test_the_grouped_product_is_the_product_of_each_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and gradients in bfloat16; experts without tokens, no token at all, and one graph without host reads."""
    x = torch.randn(7, 24, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    results = []
    for grouped in (True, False):
        if not grouped:
            monkeypatch.setattr(experts, "has_grouped_product", lambda *a: False)
        m = mixture(torch.bfloat16)
        assert m.grouped == grouped
        out = m(x[:3].clone().requires_grad_(True))
        out.float().square().sum().backward()
        results.append([out, *(p.grad for p in m.parameters())])
        assert m(x[:0]).shape == (0, 24)
        assert torch.equal(m(x.view(7, 1, 24)).view(7, 24), m(x))
    for a, b in zip(*results, strict=True):
        assert b.abs().max() > 0
        assert (a - b).abs().max() <= 0.02 * b.abs().max()
    monkeypatch.undo()
    compiled = torch.compile(mixture(torch.bfloat16), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), mixture(torch.bfloat16)(x))
    assert mixture(torch.bfloat16).to("meta")(x.to("meta")).shape == (7, 24)
    assert not mixture(torch.float32).grouped
    assert not mixture(torch.bfloat16, moe_intermediate_size=12).grouped  # rows of 24 bytes
    torch.compiler.reset()


def test_the_bias_of_experts_is_not_rounded() -> None:
    m = mixture(torch.float32, router="sigmoid", expert_bias=True)
    with torch.no_grad():
        m.router.expert_bias.copy_(torch.tensor([1.0, 1.001, 0.999, 1.0005, 0.0, 0.0]))
    bias = m.router.expert_bias.clone()
    for dtype in (torch.bfloat16, torch.float16):
        moved = copy.deepcopy(m).to(dtype)
        assert moved.router.expert_bias.dtype == torch.float32
        assert torch.equal(moved.router.expert_bias, bias)
        assert moved.gate_proj.dtype == dtype
    assert m.double().router.expert_bias.dtype == torch.float64


def test_experts_without_a_grouped_product_are_not_captured() -> None:
    """Their forward reads the sizes of groups on the host."""
    sizes = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "sparse_layers": (1,)}
    model = Transformer(TransformerConfig(40, 24, 2, 2, 32, 39, 1, mixture=MixtureConfig(**sizes)))
    policy, config = Sampler(load_model("tiny")).policy, SamplerConfig(cuda_graphs=True)
    reasons = [why_no_graphs(model.to(dtype), policy, config) for dtype in (torch.float32, torch.bfloat16)]
    assert reasons == ["the model's experts have no grouped product in this dtype on this device", None]


def test_training_reaches_every_part(tmp_path: Path) -> None:
    write(tmp_path, {**LLADA2, "use_qkv_bias": True})
    model = load_model(tmp_path).requires_grad_(True)
    ids = torch.randint(0, 39, (3, 12), generator=torch.Generator().manual_seed(1))
    model(ids).logsumexp(-1).sum().backward()
    for name, p in model.named_parameters():
        chosen_by = name.endswith("expert_bias")  # moves the choice alone, which has no gradient
        assert (p.grad is None) if chosen_by else (p.grad is not None and p.grad.abs().max() > 0), name


WORDS: dict[str, Any] = {"vocab_size": 151936, "mask_token_id": None, "eos_token_id": None}


@pytest.mark.parametrize(
    ("kind", "raw", "mask", "stops"),
    [
        ("sdar", SDAR, 151669, (151643, 151645)),
        ("sdar_moe", SDAR_MOE, 151669, (151643, 151645)),
        ("llada2_moe", {**LLADA2, "vocab_size": 157184}, 156895, (156892,)),
        ("Fast_dLLM_Qwen", {**SDAR, "head_dim": None}, 151665, (151645,)),
        ("nemotron_labs_diffusion", NEMOTRON, 100, (11,)),
        ("illada", ILLADA, 5, ()),
    ],
)
def test_family_defaults_fill_what_a_config_lacks(kind: str, raw: Raw, mask: int, stops: Any) -> None:
    family = FAMILIES[kind]
    config = family.read_config({**raw, **WORDS, "vocab_size": max(raw["vocab_size"], 151936), "block_size": None})
    assert (config.mask_token_id, config.stop_ids) == (mask, stops)
    assert config.eos_token_id == next(iter(stops), None)
    assert config.block_length == (None if kind == "illada" else 4 if kind.startswith("sdar") else 32)
    if mask < 40:  # it lies in the small vocabulary too
        return
    small = {**raw, "vocab_size": 40, "mask_token_id": None, "eos_token_id": None, "model_type": kind}
    asked = rf"family's {mask} lies outside the 40 tokens; give it as load_model\(\.\.\., mask_token_id=\.\.\.\)"
    with pytest.raises(ValueError, match=asked):
        family.read_config(small)
    assert family.read_config({**small, "mask_token_id": 7}).stop_ids == tuple(i for i in stops if i < 40)


def test_published_sizes() -> None:
    """Parameters of the published models, as their pages give them, and of the models they were made from."""
    words = {"vocab_size": 151936, "max_position_embeddings": 32768, "num_attention_heads": 32, "head_dim": 128}
    small = {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_key_value_heads": 8}
    large = {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48, "num_key_value_heads": 4}
    of_experts = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
    sdar, sdar_moe = FAMILIES["sdar"], FAMILIES["sdar_moe"]
    assert parameters(sdar.read_config({**words, **small})) == 8_190_735_360  # Qwen3-8B's
    assert parameters(sdar_moe.read_config({**words, **large, **of_experts})) == 30_532_122_624  # Qwen3-30B-A3B's
    tied = {**small, "num_hidden_layers": 32, "intermediate_size": 14336, "head_dim": None, "tie_word_embeddings": True}
    assert round(parameters(FAMILIES["illada"].read_config({**words, **tied, "vocab_size": 155136})) / 1e9, 2) == 7.62


def parameters(config: TransformerConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Transformer(config).parameters())


@pytest.mark.parametrize(
    ("raw", "changes", "message"),
    [
        (SDAR, {"mask_token_id": 40}, "mask_token_id must be below vocab_size=40, got 40"),
        (SDAR, {"eos_token_id": [1, 41]}, "stop_ids must be below vocab_size=40, got 41"),
        (SDAR, {"bd_size": 8}, r"one block size is expected, got {'block_size': 4, 'bd_size': 8}"),
        (SDAR, {"block_size": "4"}, "block_size must be an integer, got '4'"),
        (SDAR, {"block_size": 0}, "block_size must be at least 1, got 0"),
        (SDAR, {"head_dim": 7}, r"head_dim=7 \* rotary_factor=1.0 must be an even number of channels, got 7"),
        (SDAR, {"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling must be .*'linear'"),
        (SDAR, {"rope_scaling": {**YARN, "factor": "big"}}, "rotary embeddings .*factor must be a number, got 'big'"),
        (SDAR, {"rope_scaling": {**YARN, "beta": 2}}, r"rotary embeddings .*unknown Yarn fields \['beta'\]"),
        (SDAR, {"use_sliding_window": True}, "use_sliding_window must be False, got True"),
        (SDAR_MOE, {"num_experts_per_tok": 7}, "num_experts_per_tok must be at most 6, got 7"),
        (SDAR_MOE, {"mlp_only_layers": [3]}, r"mlp_only_layers must be below num_hidden_layers=3, got \[3\]"),
        (SDAR_MOE, {"num_experts": None}, "num_experts is missing"),
        (SDAR_MOE, {"decoder_sparse_step": 0}, "decoder_sparse_step must be at least 1, got 0"),
        (SDAR_MOE, {"num_experts": 7}, r"lacks 9 tensors .*model\.layers\.0\.mlp\.experts\.6\.down_proj\.weight"),
        (LLADA2, {"score_function": "softmax"}, "score_function must be 'sigmoid', got 'softmax'"),
        (LLADA2, {"router_dtype": "bf16"}, "router_dtype must be 'fp32', got 'bf16'"),
        (LLADA2, {"n_group": 3}, "num_experts must be a multiple of n_group=3, got 8"),
        (LLADA2, {"n_group": 8}, "n_group must leave two experts to a group, got 8"),
        (LLADA2, {"topk_group": 5}, "topk_group must be at most n_group=4, got 5"),
        (LLADA2, {"num_experts_per_tok": 5}, "num_experts_per_tok must be at most 4, got 5"),
        (LLADA2, {"norm_head": True, "tie_word_embeddings": True}, "norm_head=true .* tie_word_embeddings is true"),
        (LLADA2, {"expert_capacity": 4}, r"expert_capacity=4 \(LLaDA2\.2\) is not supported"),
        (NEMOTRON, {"sliding_window": 64}, "sliding_window must be None, got 64"),
        (ILLADA, {"rope_scaling": YARN}, "rope_scaling must be unscaled rotary embeddings"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, raw: Raw, changes: Raw, message: str) -> None:
    write(tmp_path, raw)
    (tmp_path / "config.json").write_text(json.dumps({**raw, **changes}))
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)


def test_overrides(tmp_path: Path) -> None:
    write(tmp_path, {**SDAR, "bd_size": 8})
    model = load_model(tmp_path, block_length=16, mask_token_id=7, eos_token_id=[3, 5, 3])
    assert (model.block_length, model.mask_token_id, model.eos_token_id, model.stop_ids) == (16, 7, 3, (3, 5))
    assert model.generation_defaults["block_length"] == 16
    save_model(model, tmp_path / "native")
    assert load_model(tmp_path / "native").stop_ids == (3, 5)
    again = load_model(tmp_path / "native", block_length=8, eos_token_id=4)
    assert (again.block_length, again.eos_token_id, again.stop_ids) == (8, 4, (4,))
    for wrong, error, message in (
        ({"mask_tokn_id": 1}, TypeError, r"arguments of load_model \['mask_tokn_id'\]; did you mean mask_token_id\?"),
        ({"block_length": 0}, ValueError, "block_length must be at least 1, got 0"),
        ({"eos_token_id": "x"}, ValueError, "eos_token_id must be an integer or a list, got 'x'"),
    ):
        with pytest.raises(error, match=message):
            load_model(tmp_path, **wrong)
    write(tmp_path / "whole", ILLADA)
    with pytest.raises(ValueError, match="block_length=8 is for models that see blocks, but model_type 'illada' sees"):
        load_model(tmp_path / "whole", block_length=8)


@pytest.mark.parametrize(
    ("config", "generation", "stops"),
    [
        (1, None, (1,)),
        (1, [5, 1], (1, 5)),
        ([6, 2], 5, (6, 2, 5)),
        (None, [7, 8], (7, 8)),
        ([3, 3], 3, (3,)),
    ],
)
def test_every_stop_id_of_a_checkpoint_is_known(tmp_path: Path, config: Any, generation: Any, stops: Any) -> None:
    for raw in (SDAR, ILLADA):
        write(tmp_path, {**raw, "eos_token_id": config})
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation, "top_k": 1}))
        model = load_model(tmp_path)
        assert (model.eos_token_id, model.stop_ids) == (stops[0], stops)
        assert Sampler(model).stop_ids == stops
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "<eos>"}')
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id must be an integer or .*'<eos>'"):
        load_model(tmp_path)


def test_generation_ends_at_any_stop_id() -> None:
    folder = Path(__file__).parents[1] / "golden" / "llada-tiny"
    settings: dict[str, Any] = {"max_new_tokens": 24, "block_length": 4}
    free = Sampler(load_model(folder, eos_token_id=[]), policy="confidence:24").generate([[5, 6, 7]], **settings)
    tokens = free.completions[0].tolist()
    stop = next(t for i, t in enumerate(tokens) if 8 <= i < 16 and t not in tokens[:i])
    unused = next(i for i in range(250) if i not in tokens)
    for ids in ([unused, stop], [stop, unused]):
        model = load_model(folder, eos_token_id=ids)
        assert model.eos_token_id == ids[0]
        ended = Sampler(model, policy="confidence:24").generate([[5, 6, 7]], **settings)
        assert ended.steps < free.steps
        assert ended.completions[0].tolist()[: tokens.index(stop) + 1] == tokens[: tokens.index(stop) + 1]
