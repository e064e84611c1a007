"""Small random checkpoints in the formats of the published models, for dry runs without their weights.

    python tests/stand_ins.py llada runs/llada-stand-in

Each folder has what the published one has: a config.json under upstream's own field names, sharded safetensors with
their index, and a tokenizer with a chat template that transformers reads. What such a model says is noise; loading,
prompts, decoding, grading and training take the same path as with the real one. Nothing here imports unmask.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

SIZES: dict[str, int] = {"hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2, "mlp": 64, "context": 1024}
"""Of the small models; every builder takes others as keywords."""

TEXT = [
    "Solve this problem. Reason step by step, then give the final answer, a number alone, in \\boxed{}.",
    "Natalia has 48 apples and gives half of them to her friends. How many apples are left? The answer is 24.",
    'def add(a, b):\n    """Return the sum of two numbers."""\n    return a + b\n\nassert add(1, 2) == 3\n',
    "Write a self-contained Python function, with the imports that it needs, in one code block.",
    "Let $x$ be a real number such that $x^2 - 5x + 6 = 0$. Find the sum of all values of $x$.",
    "aBbCcDdE#E 0123456789 + - * / = ( ) [ ] { } < > ? ! , . ; : ' \" $ % & @ # ^ _ ~ |",
]
"""What the tokenizers learn their merges from; with all bytes in the alphabet they encode anything."""


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


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def turns(start: str, end: str, reply: str, first: str = "") -> str:
    """A Jinja chat template: ``start`` role ... content ``end`` for each message, then ``reply`` for the answer."""
    message = "{{ " + start + " + message['content'] + " + json.dumps(end) + " }}"
    return (
        f"{first}{{% for message in messages %}}{message}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ {json.dumps(reply)} }}}}{{% endif %}}"
    )


def write_weights(folder: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, shards: int, seed: int) -> None:
    """Random weights under ``shapes``' names, in about ``shards`` safetensors files with an index."""
    generator = torch.Generator().manual_seed(seed)

    def draw(name: str, shape: tuple[int, ...]) -> Tensor:
        values = torch.randn(shape, generator=generator)
        if len(shape) == 1:  # norms and biases
            return values.mul_(0.1).add_(0.0 if name.endswith("bias") else 1.0).to(dtype)
        return values.mul_(1.5 / shape[1] ** 0.5).to(dtype)

    weights = {name: draw(name, shape) for name, shape in shapes.items()}
    size = sum(w.numel() * w.element_size() for w in weights.values())
    save_torch_state_dict(weights, folder, max_shard_size=max(1, size // shards))


def llada_shapes(vocab: int, s: dict[str, int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, mlp = s["hidden"], s["mlp"]
    yield "model.transformer.wte.weight", (vocab, width)
    for i in range(s["layers"]):
        block = f"model.transformer.blocks.{i}."
        for name in ("q_proj", "k_proj", "v_proj", "attn_out"):
            yield f"{block}{name}.weight", (width, width)
        yield f"{block}ff_proj.weight", (mlp, width)
        yield f"{block}up_proj.weight", (mlp, width)
        yield f"{block}ff_out.weight", (width, mlp)
        yield f"{block}attn_norm.weight", (width,)
        yield f"{block}ff_norm.weight", (width,)
    yield "model.transformer.ln_f.weight", (width,)
    yield "model.transformer.ff_out.weight", (vocab, width)


def write_llada(
    folder: str | Path, dtype: torch.dtype = torch.bfloat16, shards: int = 3, seed: int = 0, **sizes: int
) -> Path:
    """A folder in the format of LLaDA-8B-Instruct."""
    folder, s = Path(folder), {**SIZES, **sizes}
    folder.mkdir(parents=True, exist_ok=True)
    special = ["<|startoftext|>", "<|endoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer = byte_tokenizer([*special, "<|mdm_mask|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    header = "<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n"
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|startoftext|>",
            "eos_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
            "mask_token": "<|mdm_mask|>",
            "add_bos_token": False,
            "clean_up_tokenization_spaces": False,
            "chat_template": turns(
                f"'{header}'".replace("\n", "\\n"),
                "<|eot_id|>",
                "<|start_header_id|>assistant<|end_header_id|>\n\n",
                "{{ bos_token }}",
            ),
        },
    )
    vocab = tokenizer.get_vocab_size()
    embedded = -(-vocab // 64) * 64  # wider than the vocabulary, as upstream's is
    eos = tokenizer.token_to_id("<|endoftext|>")
    config = {
        "model_type": "llada",
        "architectures": ["LLaDAModelLM"],
        "auto_map": {
            "AutoConfig": "configuration_llada.LLaDAConfig",
            "AutoModel": "modeling_llada.LLaDAModelLM",
            "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
        },
        "d_model": s["hidden"],
        "n_heads": s["heads"],
        "n_kv_heads": s["heads"],
        "n_layers": s["layers"],
        "mlp_ratio": 4,
        "mlp_hidden_size": s["mlp"],
        "activation_type": "silu",
        "block_type": "llama",
        "block_group_size": 1,
        "alibi": False,
        "rope": True,
        "rope_theta": 500000.0,
        "flash_attention": False,
        "multi_query_attention": None,
        "attention_layer_norm": False,
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "rms_norm_eps": 1e-05,
        "include_bias": False,
        "include_qkv_bias": False,
        "bias_for_layer_norm": False,
        "scale_logits": False,
        "weight_tying": False,
        "max_sequence_length": s["context"],
        "vocab_size": vocab,
        "embedding_size": embedded,
        "eos_token_id": eos,
        "pad_token_id": eos,
        "mask_token_id": tokenizer.token_to_id("<|mdm_mask|>"),
    }
    write_json(folder / "config.json", config)
    write_weights(folder, dict(llada_shapes(embedded, s)), dtype, shards, seed)
    return folder


def dream_shapes(vocab: int, s: dict[str, int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, mlp, kv = s["hidden"], s["mlp"], s["hidden"] // s["heads"] * s["kv_heads"]
    yield "model.embed_tokens.weight", (vocab, width)
    for i in range(s["layers"]):
        layer = f"model.layers.{i}."
        for name, rows in (("q_proj", width), ("k_proj", kv), ("v_proj", kv)):
            yield f"{layer}self_attn.{name}.weight", (rows, width)
            yield f"{layer}self_attn.{name}.bias", (rows,)
        yield f"{layer}self_attn.o_proj.weight", (width, width)
        yield f"{layer}mlp.gate_proj.weight", (mlp, width)
        yield f"{layer}mlp.up_proj.weight", (mlp, width)
        yield f"{layer}mlp.down_proj.weight", (width, mlp)
        yield f"{layer}input_layernorm.weight", (width,)
        yield f"{layer}post_attention_layernorm.weight", (width,)
    yield "model.norm.weight", (width,)
    yield "lm_head.weight", (vocab, width)


def write_dream(
    folder: str | Path, dtype: torch.dtype = torch.bfloat16, shards: int = 3, seed: int = 0, **sizes: int
) -> Path:
    """A folder in the format of Dream-v0-Instruct-7B and DiffuCoder: vocab.json, merges.txt and a DreamTokenizer."""
    folder, s = Path(folder), {**SIZES, **sizes}
    folder.mkdir(parents=True, exist_ok=True)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|beginoftext|>", "<|mask|>"]
    tokenizer = byte_tokenizer(special)
    tokenizer.model.save(str(folder))
    ids = {token: tokenizer.token_to_id(token) for token in special}
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "DreamTokenizer",
            "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
            "added_tokens_decoder": {str(i): {"content": token, "special": True} for token, i in ids.items()},
            "bos_token": "<|beginoftext|>",
            "eos_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
            "mask_token": "<|mask|>",
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "chat_template": turns(
                "'<|im_start|>' + message['role'] + '\\n'", "<|im_end|>\n", "<|im_start|>assistant\n"
            ),
        },
    )
    vocab = -(-tokenizer.get_vocab_size() // 64) * 64
    config = {
        "model_type": "Dream",
        "architectures": ["DreamModel"],
        "auto_map": {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
        "hidden_size": s["hidden"],
        "intermediate_size": s["mlp"],
        "num_hidden_layers": s["layers"],
        "num_attention_heads": s["heads"],
        "num_key_value_heads": s["kv_heads"],
        "hidden_act": "silu",
        "max_position_embeddings": s["context"],
        "max_window_layers": s["layers"],
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "rope_scaling": None,
        "sliding_window": None,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "attention_dropout": 0.0,
        "vocab_size": vocab,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|endoftext|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "mask_token_id": ids["<|mask|>"],
    }
    write_json(folder / "config.json", config)
    write_weights(folder, dict(dream_shapes(vocab, s)), dtype, shards, seed)
    return folder


def write_modernbert(
    folder: str | Path, dtype: torch.dtype = torch.float32, shards: int = 3, seed: int = 0, **sizes: int
) -> Path:
    """A folder in the format of a ModernBERT fine-tuned to chat by diffusion."""
    folder, s = Path(folder), {**SIZES, **sizes}
    folder.mkdir(parents=True, exist_ok=True)
    special = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "[Question]", "[Answer]"]
    tokenizer = byte_tokenizer(special)
    cls, sep = (tokenizer.token_to_id(token) for token in ("[CLS]", "[SEP]"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", cls), ("[SEP]", sep)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{f"{name}_token": f"[{name.upper()}]" for name in ("unk", "cls", "sep", "pad", "mask")},
            "clean_up_tokenization_spaces": False,
            "chat_template": turns("'[Question]'", "", "[Answer]", "{{ cls_token }}"),
        },
    )
    vocab = -(-tokenizer.get_vocab_size() // 64) * 64
    width, mlp = s["hidden"], s["mlp"]
    config = {
        "model_type": "modernbert",
        "architectures": ["ModernBertForMaskedLM"],
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": s["layers"],
        "num_attention_heads": s["heads"],
        "max_position_embeddings": s["context"],
        "global_attn_every_n_layers": 3,
        "local_attention": 128,
        "global_rope_theta": 160000.0,
        "local_rope_theta": 10000.0,
        "hidden_activation": "gelu",
        "norm_eps": 1e-05,
        "decoder_bias": True,
        "tie_word_embeddings": True,
        "cls_token_id": cls,
        "sep_token_id": sep,
        "bos_token_id": cls,
        "eos_token_id": sep,
        "pad_token_id": tokenizer.token_to_id("[PAD]"),
    }
    write_json(folder / "config.json", config)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embeddings.tok_embeddings.weight": (vocab, width),
        "model.embeddings.norm.weight": (width,),
        "model.final_norm.weight": (width,),
        "head.dense.weight": (width, width),
        "head.norm.weight": (width,),
        "decoder.bias": (vocab,),
    }
    for i in range(s["layers"]):
        layer = f"model.layers.{i}."
        shapes |= {f"{layer}attn_norm.weight": (width,)} if i else {}  # the first layer's norm is the embedding's
        shapes |= {f"{layer}attn.Wqkv.weight": (3 * width, width), f"{layer}attn.Wo.weight": (width, width)}
        shapes |= {f"{layer}mlp_norm.weight": (width,), f"{layer}mlp.Wi.weight": (2 * mlp, width)}
        shapes |= {f"{layer}mlp.Wo.weight": (width, mlp)}
    write_weights(folder, shapes, dtype, shards, seed)
    return folder


WRITERS: dict[str, Callable[..., Path]] = {"llada": write_llada, "dream": write_dream, "modernbert": write_modernbert}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("format", choices=WRITERS)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    print(WRITERS[args.format](args.folder))


if __name__ == "__main__":
    main()
