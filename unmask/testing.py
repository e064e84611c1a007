"""Stand-ins: small random checkpoints in the formats of the published models, for trials without their weights.

    python -m unmask.testing llada runs/llada-stand-in

Each folder has what the published one has: a config.json under upstream's own field names, sharded safetensors with
their index, and a tokenizer with a chat template that transformers reads. What such a model says is noise; loading,
prompts, decoding, grading and training take the same path as with the real one. Needs ``pip install "unmask[models]"``.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SIZES = {"hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2, "mlp": 64, "context": 1024}
SIZES |= {"head": 16, "experts": 4, "inner": 32}
"""Of the small models; :func:`write_checkpoint` takes others as keywords."""

TEXT = [
    "Solve this problem. Reason step by step, then give the final answer, a number alone, in \\boxed{}.",
    "Natalia has 48 apples and gives half of them to her friends. How many apples are left? The answer is 24.",
    'def add(a, b):\n    """Return the sum of two numbers."""\n    return a + b\n\nassert add(1, 2) == 3\n',
    "Write a self-contained Python function, with the imports that it needs, in one code block.",
    "Let $x$ be a real number such that $x^2 - 5x + 6 = 0$. Find the sum of all values of $x$.",
    "aBbCcDdE#E 0123456789 + - * / = ( ) [ ] { } < > ? ! , . ; : ' \" $ % & @ # ^ _ ~ |",
]
"""What the tokenizers learn their merges from; with all bytes in the alphabet they encode anything."""


CHATML = (
    "",
    "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}",
    "{{ '<|im_start|>assistant\\n' }}",
)
DENSE = "mlp.gate_proj:MD mlp.up_proj:MD mlp.down_proj:DM"
EXPERTS = "mlp.gate:ED mlp.experts.*.gate_proj:XD mlp.experts.*.up_proj:XD mlp.experts.*.down_proj:DX"
NORMS = "input_layernorm:D post_attention_layernorm:D"
NARROW = (
    "self_attn.q_proj:DD self_attn.k_proj:KD self_attn.v_proj:KD self_attn.o_proj:DD self_attn.q_proj.bias:D "
    "self_attn.k_proj.bias:K self_attn.v_proj.bias:K"
)
WIDE = "self_attn.q_proj:AD self_attn.k_proj:BD self_attn.v_proj:BD self_attn.o_proj:DA"
QK_NORMS = "self_attn.q_norm:H self_attn.k_norm:H"
FUSED = "attention.query_key_value:FD attention.dense:DA attention.query_layernorm:H attention.key_layernorm:H"
EMBEDDED = "model.embed_tokens:VD model.norm:D lm_head:VD"
QWEN = """"hidden_size": $hidden, "num_hidden_layers": $layers, "num_attention_heads": $heads,
            "num_key_value_heads": $kv_heads, "intermediate_size": $mlp, "vocab_size": $vocab,
            "max_position_embeddings": $context, "mask_token_id": $mask, "hidden_act": "silu", "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0, "use_sliding_window": false, "tie_word_embeddings": false"""
IM = {"eos": "<|im_end|>", "pad": "<|endoftext|>", "mask": "<|MASK|>"}


@dataclass(frozen=True)
class Format:
    """What the files of a published checkpoint say."""

    config: str
    """config.json, with ``$name`` for a size, for ``vocab``, or for the id of a special token."""
    layer: str
    """The tensors of each layer, as in ``weights``, behind ``prefix``, in which {} is the layer's number."""
    weights: str = EMBEDDED
    """The other tensors as "name:shape", without ".weight", and with the letters of :func:`dimensions` for sizes."""
    special: dict[str, str] = field(default_factory=lambda: IM)
    """Special tokens by what they are for, as tokenizer_config.json names them."""
    others: tuple[str, ...] = ("<|im_start|>",)
    """Further special tokens."""
    chat: tuple[str, str, str] = CHATML
    """The chat template: what begins it, what a message ``m`` becomes, what asks for the answer."""
    prefix: str = "model.layers.{}."
    absent: str = ""
    """A name that the rules above give and the checkpoint has not."""
    first: str = ""
    """What the first layer has in place of ``layer``, if it is another; in both, a * is each expert's number."""
    generation: str = ""
    """generation_config.json, if there is one."""
    dtype: torch.dtype = torch.bfloat16
    tokenizer: str = "PreTrainedTokenizerFast"
    """Class of the tokenizer."""


FORMATS = {
    "llada": Format(  # LLaDA-8B-Instruct
        config="""{"model_type": "llada", "architectures": ["LLaDAModelLM"], "d_model": $hidden, "n_layers": $layers,
            "n_heads": $heads, "n_kv_heads": $heads, "mlp_hidden_size": $mlp, "mlp_ratio": 4, "vocab_size": $words,
            "embedding_size": $vocab, "max_sequence_length": $context, "mask_token_id": $mask, "eos_token_id": $eos,
            "pad_token_id": $pad, "activation_type": "silu", "block_type": "llama", "block_group_size": 1,
            "rope": true, "rope_theta": 500000.0, "alibi": false, "layer_norm_type": "rms", "rms_norm_eps": 1e-05,
            "layer_norm_with_affine": true, "attention_layer_norm": false, "include_bias": false,
            "include_qkv_bias": false, "scale_logits": false, "weight_tying": false}""",
        special={"bos": "<|startoftext|>", "eos": "<|endoftext|>", "pad": "<|endoftext|>", "mask": "<|mdm_mask|>"},
        others=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        chat=(
            "{{ bos_token }}",
            "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content + '<|eot_id|>' }}",
            "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}",
        ),
        weights="model.transformer.wte:VD model.transformer.ln_f:D model.transformer.ff_out:VD",
        layer="q_proj:DD k_proj:DD v_proj:DD attn_out:DD ff_proj:MD up_proj:MD ff_out:DM attn_norm:D ff_norm:D",
        prefix="model.transformer.blocks.{}.",
    ),
    "dream": Format(  # Dream-v0-Instruct-7B and DiffuCoder
        config=f"""{{"model_type": "Dream", "architectures": ["DreamModel"], {QWEN}, "bos_token_id": $eos,
            "eos_token_id": $eos, "pad_token_id": $pad, "rope_scaling": null, "sliding_window": null}}""",
        special={"bos": "<|beginoftext|>", "eos": "<|endoftext|>", "pad": "<|endoftext|>", "mask": "<|mask|>"},
        others=("<|im_start|>", "<|im_end|>"),
        layer=f"{NARROW} {DENSE} {NORMS}",
        tokenizer="DreamTokenizer",
    ),
    "sdar": Format(  # SDAR-4B-Chat, whose config has no block size
        config=f"""{{"model_type": "sdar", "architectures": ["SDARForCausalLM"], {QWEN}, "head_dim": $head,
            "attention_bias": false, "eos_token_id": $pad}}""",
        layer=f"{WIDE} {QK_NORMS} {DENSE} {NORMS}",
        generation='{"eos_token_id": [$eos, $pad]}',
    ),
    "sdar-moe": Format(  # SDAR-30B-A3B-Chat
        config=f"""{{"model_type": "sdar_moe", "architectures": ["SDARMoeForCausalLM"], {QWEN}, "head_dim": $head,
            "attention_bias": false, "eos_token_id": $pad, "num_experts": $experts, "num_experts_per_tok": 2,
            "moe_intermediate_size": $inner, "norm_topk_prob": true, "decoder_sparse_step": 1,
            "mlp_only_layers": []}}""",
        layer=f"{WIDE} {QK_NORMS} {EXPERTS} {NORMS}",
        generation='{"eos_token_id": [$eos, $pad]}',
    ),
    "llada2": Format(  # LLaDA2.0-mini and LLaDA2.1-mini
        config="""{"model_type": "llada2_moe", "architectures": ["LLaDA2MoeModelLM"], "hidden_size": $hidden,
            "num_hidden_layers": $layers, "num_attention_heads": $heads, "num_key_value_heads": $kv_heads,
            "head_dim": $head, "intermediate_size": $mlp, "vocab_size": $vocab, "max_position_embeddings": $context,
            "mask_token_id": $mask, "eos_token_id": $eos, "pad_token_id": $eos, "partial_rotary_factor": 0.5,
            "rope_theta": 600000, "rms_norm_eps": 1e-06, "use_qkv_bias": false, "use_bias": false,
            "use_qk_norm": true, "first_k_dense_replace": 1, "num_experts": $experts, "num_experts_per_tok": 2,
            "n_group": 2, "topk_group": 1, "moe_intermediate_size": $inner, "num_shared_experts": 1,
            "routed_scaling_factor": 2.5, "tie_word_embeddings": false}""",
        special={"eos": "<|endoftext|>", "pad": "<|endoftext|>", "mask": "<|mask|>"},
        others=("<role>", "</role>", "<|role_end|>"),
        chat=(
            "",
            "{{ '<role>' + {'user': 'HUMAN'}.get(m.role, m.role.upper()) + '</role>' + m.content + '<|role_end|>' }}",
            "{{ '<role>ASSISTANT</role>' }}",
        ),
        weights="model.word_embeddings:VD model.norm:D lm_head:VD",
        layer=f"{FUSED} {NORMS} {EXPERTS} mlp.gate.expert_bias:E mlp.shared_experts.gate_proj:XD "
        "mlp.shared_experts.up_proj:XD mlp.shared_experts.down_proj:DX",
        first=f"{FUSED} {NORMS} {DENSE}",
    ),
    "fast-dllm": Format(  # Fast_dLLM_v2_7B
        config=f"""{{"model_type": "Fast_dLLM_Qwen", "architectures": ["Fast_dLLM_QwenForCausalLM"], {QWEN},
            "bd_size": 32, "eos_token_id": $eos}}""",
        special={**IM, "mask": "|<MASK>|"},
        layer=f"{NARROW} {DENSE} {NORMS}",
    ),
    "nemotron": Format(  # Nemotron-Labs-Diffusion-8B
        config="""{"model_type": "nemotron_labs_diffusion", "architectures": ["NemotronLabsDiffusionModel"],
            "hidden_size": $hidden, "num_hidden_layers": $layers, "num_attention_heads": $heads,
            "num_key_value_heads": $kv_heads, "head_dim": $head, "intermediate_size": $mlp, "vocab_size": $vocab,
            "max_position_embeddings": $context, "mask_token_id": $mask, "eos_token_id": $eos, "block_size": 32,
            "hidden_act": "silu", "rms_norm_eps": 1e-05, "attention_bias": false, "mlp_bias": false,
            "sliding_window": null, "tie_word_embeddings": false, "rope_parameters": {"rope_type": "yarn",
            "rope_theta": 1000000.0, "factor": 16.0, "original_max_position_embeddings": 64, "beta_fast": 32.0,
            "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}}""",
        weights="encoder.embed_tokens:VD encoder.norm:D diffusion_head:VD",
        layer=f"{WIDE} {DENSE} {NORMS}",
        prefix="encoder.layers.{}.",
    ),
    "modernbert": Format(  # a ModernBERT fine-tuned to chat by diffusion
        config="""{"model_type": "modernbert", "architectures": ["ModernBertForMaskedLM"], "hidden_size": $hidden,
            "num_hidden_layers": $layers, "num_attention_heads": $heads, "intermediate_size": $mlp,
            "vocab_size": $vocab, "max_position_embeddings": $context, "cls_token_id": $cls, "sep_token_id": $sep,
            "bos_token_id": $cls, "eos_token_id": $sep, "pad_token_id": $pad, "decoder_bias": true,
            "global_attn_every_n_layers": 3, "local_attention": 128, "tie_word_embeddings": true}""",
        special={name: f"[{name.upper()}]" for name in ("unk", "cls", "sep", "pad", "mask")},
        others=("[Question]", "[Answer]"),
        chat=("{{ cls_token }}", "{{ '[Question]' + m.content }}", "{{ '[Answer]' }}"),
        weights="model.embeddings.tok_embeddings:VD model.embeddings.norm:D model.final_norm:D head.dense:DD "
        "head.norm:D decoder.bias:V",
        layer="attn_norm:D attn.Wqkv:QD attn.Wo:DD mlp_norm:D mlp.Wi:GD mlp.Wo:DM",
        absent="model.layers.0.attn_norm",  # the embedding's norm stands for it
        dtype=torch.float32,
    ),
}


def write_checkpoint(
    kind: str,
    folder: str | Path,
    dtype: torch.dtype | None = None,
    shards: int = 3,
    seed: int = 0,
    **sizes: int,
) -> Path:
    """Write a model in the format ``kind`` of :data:`FORMATS` to ``folder``, which is made if needed, and return it.

    Args:
        dtype: of the weights; None: the published one's.
        shards: about as many safetensors files.
        seed: of the random weights.
        **sizes: any of :data:`SIZES`.
    """
    form, folder, sizes = FORMATS[kind], Path(folder), {**SIZES, **sizes}
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_tokenizer([*dict.fromkeys([*form.special.values(), *form.others])])
    write_tokenizer(folder, form, tokenizer)
    words = tokenizer.get_vocab_size()
    vocab = -(-words // 64) * 64  # the embedding is wider than the vocabulary, as upstream's are
    ids = {name: tokenizer.token_to_id(token) for name, token in form.special.items()}
    config = json.loads(Template(form.config).substitute(sizes, words=words, vocab=vocab, **ids))
    write_json(folder / "config.json", config)
    if form.generation:
        write_json(folder / "generation_config.json", json.loads(Template(form.generation).substitute(ids)))
    write_weights(folder, form, sizes | {"vocab": vocab}, dtype or form.dtype, shards, seed)
    return folder


def byte_tokenizer(special: list[str], vocab_size: int = 400) -> Tokenizer:
    """Byte-level BPE, as LLaDA's and Dream's; the special tokens have the last ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def write_tokenizer(folder: Path, form: Format, tokenizer: Tokenizer) -> None:
    """``tokenizer`` in the files of its class: vocab.json and merges.txt for Dream's, else tokenizer.json."""
    begin, message, answer = form.chat
    config: dict[str, Any] = {
        "tokenizer_class": form.tokenizer,
        "clean_up_tokenization_spaces": False,
        "chat_template": f"{begin}{{% for m in messages %}}{message}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{answer}{{% endif %}}",
        **{f"{name}_token": token for name, token in form.special.items()},
    }
    if form.tokenizer == "DreamTokenizer":
        tokenizer.model.save(str(folder))
        added = tokenizer.get_added_tokens_decoder()
        config["added_tokens_decoder"] = {str(i): {"content": t.content, "special": True} for i, t in added.items()}
    else:
        if "cls" in form.special:
            around = [(form.special[name], tokenizer.token_to_id(form.special[name])) for name in ("cls", "sep")]
            tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=around)
        tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", config)


def dimensions(sizes: dict[str, int]) -> dict[str, int]:
    """Sizes by the letters of :class:`Format`.

    V vocabulary, D hidden, M mlp, G gated mlp; K keys, Q all of attention's inputs where heads divide the hidden size;
    H a head of its own width, A queries, B keys, F all three; E experts, X their mlp.
    """
    width, mlp, head, heads, kv = (sizes[name] for name in ("hidden", "mlp", "head", "heads", "kv_heads"))
    plain = {"V": sizes["vocab"], "D": width, "K": width // heads * kv, "M": mlp, "Q": 3 * width, "G": 2 * mlp}
    wide = {"H": head, "A": heads * head, "B": kv * head, "F": (heads + 2 * kv) * head}
    return plain | wide | {"E": sizes["experts"], "X": sizes["inner"]}


def write_weights(
    folder: Path, form: Format, sizes: dict[str, int], dtype: torch.dtype, shards: int, seed: int
) -> None:
    """Random weights, in about ``shards`` safetensors files with an index."""
    generator, letters = torch.Generator().manual_seed(seed), dimensions(sizes)
    names = form.weights.split()
    for i in range(sizes["layers"]):
        own = form.first if i == 0 and form.first else form.layer
        names += [form.prefix.format(i) + name for name in own.split()]
    each = [name.replace("*", str(e)) for name in names for e in range(sizes["experts"] if "*" in name else 1)]
    weights = {}
    for name, _, shape in (text.partition(":") for text in each):
        values = torch.randn([letters[c] for c in shape], generator=generator)
        if values.ndim == 2:
            values.mul_(1.5 / values.shape[1] ** 0.5)
        else:
            values.mul_(0.1).add_(0.0 if name.endswith("bias") else 1.0)  # a bias or a norm
        if name != form.absent:
            weights[name if name.endswith("bias") else f"{name}.weight"] = values.to(dtype)
    size = sum(w.numel() * w.element_size() for w in weights.values())
    save_torch_state_dict(weights, folder, max_shard_size=max(1, size // shards))
    for file in folder.glob("*.safetensors"):
        file.chmod((folder / "config.json").stat().st_mode)  # what the umask gives


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("format", choices=FORMATS)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    print(write_checkpoint(args.format, args.folder))


if __name__ == "__main__":
    main()
