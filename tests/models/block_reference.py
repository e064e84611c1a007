"""Checkpoints of block families with random weights, and their logits by the published formulas, token by token."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

Raw = dict[str, Any]
Weights = dict[str, Tensor]

SHAPE: Raw = {
    "vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 20, "max_position_embeddings": 64, "mask_token_id": 39, "eos_token_id": 1,
    "rms_norm_eps": 1e-5, "rope_theta": 5e3, "head_dim": 8,
}  # fmt: skip
SDAR: Raw = {**SHAPE, "model_type": "sdar", "block_size": 4}
SDAR_MOE: Raw = {
    **SDAR, "model_type": "sdar_moe", "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 10,
    "norm_topk_prob": True,
}  # fmt: skip
LLADA2: Raw = {
    **SHAPE, "model_type": "llada2_moe", "use_bias": False, "use_qk_norm": True, "num_experts": 8, "block_size": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 10, "n_group": 4, "topk_group": 2, "num_shared_experts": 1,
    "routed_scaling_factor": 2.5, "first_k_dense_replace": 1, "partial_rotary_factor": 0.5,
}  # fmt: skip
NEMOTRON: Raw = {**SHAPE, "model_type": "nemotron_labs_diffusion", "block_size": 4}
ILLADA: Raw = {**SHAPE, "model_type": "illada", "head_dim": None, "tie_word_embeddings": True}
YARN: Raw = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def sparse(raw: Raw, layer: int) -> bool:
    if raw["model_type"] == "sdar_moe":
        step = raw.get("decoder_sparse_step", 1)
        return layer not in raw.get("mlp_only_layers", []) and (layer + 1) % step == 0
    return raw["model_type"] == "llada2_moe" and layer >= raw["first_k_dense_replace"]


def layout(raw: Raw) -> dict[str, tuple[int, ...]]:
    """Every tensor's name and shape."""
    hidden, d = raw["hidden_size"], raw["head_dim"] or raw["hidden_size"] // raw["num_attention_heads"]
    q, kv, kind = raw["num_attention_heads"] * d, raw["num_key_value_heads"] * d, raw["model_type"]
    base, head = ("encoder", "diffusion_head") if kind.startswith("nemotron") else ("model", "lm_head")
    embed = "word_embeddings" if kind == "llada2_moe" else "embed_tokens"
    shapes: dict[str, tuple[int, ...]] = {f"{base}.{embed}.weight": (raw["vocab_size"], hidden)}
    shapes[f"{base}.norm.weight"] = (hidden,)
    if not raw.get("tie_word_embeddings"):
        shapes[f"{head}.weight"] = (raw["vocab_size"], hidden)

    def add(name: str, out: int, into: int, bias: bool = False) -> None:
        shapes[f"{name}.weight"] = (out, into)
        if bias:
            shapes[f"{name}.bias"] = (out,)

    def swiglu(name: str, width: int) -> None:
        for x in ("gate_proj", "up_proj"):
            add(f"{name}.{x}", width, hidden)
        add(f"{name}.down_proj", hidden, width)

    for i in range(raw["num_hidden_layers"]):
        layer = f"{base}.layers.{i}"
        shapes |= {f"{layer}.{n}_layernorm.weight": (hidden,) for n in ("input", "post_attention")}
        if kind == "llada2_moe":
            add(f"{layer}.attention.query_key_value", q + 2 * kv, hidden, raw.get("use_qkv_bias", False))
            add(f"{layer}.attention.dense", hidden, q, raw["use_bias"])
            if raw["use_qk_norm"]:
                shapes |= {f"{layer}.attention.{n}_layernorm.weight": (d,) for n in ("query", "key")}
        else:
            bias = raw.get("attention_bias", False)
            for x, out, into in (("q", q, hidden), ("k", kv, hidden), ("v", kv, hidden), ("o", hidden, q)):
                add(f"{layer}.self_attn.{x}_proj", out, into, bias)
            if kind.startswith("sdar"):
                shapes |= {f"{layer}.self_attn.{x}_norm.weight": (d,) for x in "qk"}
        if not sparse(raw, i):
            swiglu(f"{layer}.mlp", raw["intermediate_size"])
            continue
        add(f"{layer}.mlp.gate", raw["num_experts"], hidden)
        if kind == "llada2_moe":
            shapes[f"{layer}.mlp.gate.expert_bias"] = (raw["num_experts"],)
            if raw["num_shared_experts"]:
                swiglu(f"{layer}.mlp.shared_experts", raw["moe_intermediate_size"] * raw["num_shared_experts"])
        for e in range(raw["num_experts"]):
            swiglu(f"{layer}.mlp.experts.{e}", raw["moe_intermediate_size"])
    return shapes


def write(folder: Path, raw: Raw, seed: int = 0) -> Weights:
    """Write a checkpoint with random weights and return them."""
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: torch.randn(shape, generator=generator) * 0.3 + ("norm" in name) for name, shape in layout(raw).items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(raw))
    return weights


def frequencies(raw: Raw, width: int) -> tuple[list[float], float]:
    """Angles per position of each pair of channels, and what cosines and sines are multiplied by."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    theta = raw.get("rope_theta") or rope["rope_theta"]
    plain = [theta ** (-2 * j / width) for j in range(width // 2)]
    if rope.get("rope_type") != "yarn":
        return plain, 1.0
    turns = (rope.get("beta_fast", 32.0), rope.get("beta_slow", 1.0))
    original = rope["original_max_position_embeddings"]
    low, high = (width * math.log(original / (t * 2 * math.pi)) / (2 * math.log(theta)) for t in turns)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    high = high + 0.001 if low == high else high
    slow = [min(max((j - low) / (high - low), 0), 1) for j in range(width // 2)]
    one, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    size = [0.1 * m * math.log(rope["factor"]) + 1 for m in ((one, all_dim) if one and all_dim else (1, 0))]
    scale = rope.get("attention_factor") or size[0] / size[1]
    return [f / rope["factor"] * s + f * (1 - s) for f, s in zip(plain, slow, strict=True)], scale


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean() + eps).sqrt() * weight


def rotate(raw: Raw, x: Tensor, position: int) -> Tensor:
    """One head (D,) at one position."""
    width = int(len(x) * raw.get("partial_rotary_factor", 1.0))
    angles, scale = frequencies(raw, width)
    out = x.clone()
    for j, f in enumerate(angles):
        cos, sin = math.cos(position * f) * scale, math.sin(position * f) * scale
        a, b = x[j], x[j + width // 2]
        out[j], out[j + width // 2] = a * cos - b * sin, b * cos + a * sin
    return out


def swiglu(w: Weights, name: str, x: Tensor) -> Tensor:
    gate = w[f"{name}.gate_proj.weight"] @ x
    return w[f"{name}.down_proj.weight"] @ (gate * gate.sigmoid() * (w[f"{name}.up_proj.weight"] @ x))


def experts(raw: Raw, w: Weights, name: str, x: Tensor) -> Tensor:
    """The mixture's output (hidden,) for one token."""
    logits, k = w[f"{name}.gate.weight"] @ x, raw["num_experts_per_tok"]
    if raw["model_type"] == "sdar_moe":
        score = logits.softmax(0)
        chosen = sorted(range(len(score)), key=lambda e: -score[e])[:k]
        total = sum(score[e] for e in chosen) if raw["norm_topk_prob"] else 1.0
        return sum(score[e] / total * swiglu(w, f"{name}.experts.{e}", x) for e in chosen)  # type: ignore[return-value]
    score = logits.sigmoid()
    biased = score + w[f"{name}.gate.expert_bias"]
    size = len(score) // raw["n_group"]
    groups = [list(range(g * size, g * size + size)) for g in range(raw["n_group"])]
    best = sorted(groups, key=lambda group: -sum(sorted((biased[e] for e in group), reverse=True)[:2]))
    allowed = [e for group in best[: raw["topk_group"]] for e in group]
    chosen = sorted(allowed, key=lambda e: -biased[e])[:k]
    total = sum(score[e] for e in chosen) if k > 1 else 1.0
    out = sum(score[e] / total * swiglu(w, f"{name}.experts.{e}", x) for e in chosen) * raw["routed_scaling_factor"]
    return out + swiglu(w, f"{name}.shared_experts", x) if raw["num_shared_experts"] else out  # type: ignore[return-value]


def project(raw: Raw, w: Weights, layer: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (heads, D) of one normalised token, before they are rotated."""
    if raw["model_type"] == "llada2_moe":
        name, norms = f"{layer}.attention.query_key_value", ("attention.query_layernorm", "attention.key_layernorm")
        heads, groups = raw["num_attention_heads"], raw["num_key_value_heads"]
        out = w[f"{name}.weight"] @ x + w.get(f"{name}.bias", 0)
        parts = out.view(heads + 2 * groups, -1).split([heads, groups, groups])
    else:
        norms, d = ("self_attn.q_norm", "self_attn.k_norm"), raw["head_dim"] or 6
        names = [f"{layer}.self_attn.{n}_proj" for n in "qkv"]
        parts = tuple((w[f"{n}.weight"] @ x + w.get(f"{n}.bias", 0)).view(-1, d) for n in names)
    q, k, v = parts
    if f"{layer}.{norms[0]}.weight" in w:
        q, k = (
            torch.stack([norm(h, w[f"{layer}.{n}.weight"], raw["rms_norm_eps"]) for h in t])
            for t, n in zip((q, k), norms, strict=True)
        )
    return q, k, v


def reference(raw: Raw, weights: Weights, ids: Tensor, horizon: list[int]) -> Tensor:
    """Raw logits (T, V) of one row in float64; position i sees the positions up to ``horizon[i]``."""
    w, eps = {name: value.double() for name, value in weights.items()}, raw["rms_norm_eps"]
    base, head = ("encoder", "diffusion_head") if "encoder.norm.weight" in w else ("model", "lm_head")
    embed = w[f"{base}.{'word_embeddings' if raw['model_type'] == 'llada2_moe' else 'embed_tokens'}.weight"]
    rope = raw.get("rope_parameters") or {}
    beta, original = rope.get("llama_4_scaling_beta", 0), rope.get("original_max_position_embeddings", 1)
    x = [embed[i] for i in ids]
    for i in range(raw["num_hidden_layers"]):
        layer = f"{base}.layers.{i}"
        made = [project(raw, w, layer, norm(t, w[f"{layer}.input_layernorm.weight"], eps)) for t in x]
        queries = [
            torch.stack([rotate(raw, h, p) for h in q]) * (1 + beta * math.log(1 + p // original))
            for p, (q, _, _) in enumerate(made)
        ]
        keys = torch.stack([torch.stack([rotate(raw, h, p) for h in k]) for p, (_, k, _) in enumerate(made)])
        values = torch.stack([v for _, _, v in made])
        group = raw["num_attention_heads"] // raw["num_key_value_heads"]
        out = f"{layer}.attention.dense" if raw["model_type"] == "llada2_moe" else f"{layer}.self_attn.o_proj"
        for p, q in enumerate(queries):
            seen = slice(0, horizon[p] + 1)
            heads = [
                (keys[seen, h // group] @ q[h] / math.sqrt(q.shape[1])).softmax(0) @ values[seen, h // group]
                for h in range(len(q))
            ]
            y = x[p] + w[f"{out}.weight"] @ torch.cat(heads) + w.get(f"{out}.bias", 0)
            h = norm(y, w[f"{layer}.post_attention_layernorm.weight"], eps)
            x[p] = y + (experts if sparse(raw, i) else lambda r, *a: swiglu(*a))(raw, w, f"{layer}.mlp", h)
    last = torch.stack([norm(t, w[f"{base}.norm.weight"], eps) for t in x])
    top = w.get(f"{head}.weight", embed)
    return last @ (top / top.norm(dim=0) if raw.get("norm_head") else top).T
