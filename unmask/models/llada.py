"""LLaDA and LLaDA 1.5 (Nie et al., arXiv 2502.09992): Llama-style blocks; logits[i] predict token i."""

from __future__ import annotations

from unmask.models import config_values as read
from unmask.models.transformer import TransformerConfig

MODEL_TYPE = "llada"

# The published modelling code has many switches; these are the settings its checkpoints use.
SUPPORTED = {
    "block_type": ("llama",),
    "block_group_size": (None, 1),
    "activation_type": ("silu",),
    "layer_norm_type": ("rms",),
    "layer_norm_with_affine": (True,),
    "alibi": (None, False),
    "rope": (True,),
    "attention_layer_norm": (None, False),
    "input_emb_norm": (None, False),
    "include_bias": (None, False),
    "bias_for_layer_norm": (None, False),
    "scale_logits": (None, False),
    "clip_qkv": (None,),
    "sliding_window": (None, False),
}

BLOCK = {
    "attn_norm": "attn_norm",
    "q_proj": "q_proj",
    "k_proj": "k_proj",
    "v_proj": "v_proj",
    "attn_out": "o_proj",
    "ff_norm": "mlp_norm",
    "ff_proj": "gate_proj",
    "up_proj": "up_proj",
    "ff_out": "down_proj",
}


def read_config(raw: read.Raw) -> TransformerConfig:
    """Raises ValueError naming the key for anything this decoder does not implement."""
    read.only(raw, "LLaDA", SUPPORTED)
    read.plain_rope(raw, "LLaDA")
    width, heads = read.integer(raw, "d_model"), read.integer(raw, "n_heads")
    return TransformerConfig(
        # The embedding may be padded beyond the vocabulary; the logits are as wide as the embedding.
        vocab_size=read.integer(raw, "embedding_size", read.integer(raw, "vocab_size")),
        hidden_size=width,
        num_layers=read.integer(raw, "n_layers"),
        num_heads=heads,
        num_kv_heads=read.integer(raw, "n_kv_heads", 1 if read.boolean(raw, "multi_query_attention") else heads),
        intermediate_size=read.integer(raw, "mlp_hidden_size", int(read.number(raw, "mlp_ratio", 4) * width)),
        mask_token_id=read.required_token_id(raw, "mask_token_id"),
        eos_token_id=read.token_id(raw, "eos_token_id"),
        pad_token_id=read.token_id(raw, "pad_token_id"),
        max_position_embeddings=read.integer(raw, "max_sequence_length"),
        rms_norm_eps=read.number(raw, "rms_norm_eps", 1e-5),
        rope_theta=read.number(raw, "rope_theta", 10_000.0),
        qkv_bias=read.boolean(raw, "include_qkv_bias"),
        tie_embeddings=read.boolean(raw, "weight_tying"),
    )


def weight_names(config: TransformerConfig) -> dict[str, str]:
    """Names in the checkpoint -> names of :class:`unmask.models.Transformer`'s parameters."""
    names = {
        "model.transformer.wte.weight": "embed.weight",
        "model.transformer.ln_f.weight": "final_norm.weight",
        "model.transformer.ff_out.weight": "lm_head.weight",
    }
    for i in range(config.num_layers):
        for theirs, ours in BLOCK.items():
            names[f"model.transformer.blocks.{i}.{theirs}.weight"] = f"layers.{i}.{ours}.weight"
        for name in ("q_proj", "k_proj", "v_proj") if config.qkv_bias else ():
            names[f"model.transformer.blocks.{i}.{name}.bias"] = f"layers.{i}.{name}.bias"
    return names
