"""The model card of a policy: what it is, how to use it, how it was trained, how well it does."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unmask.models.sources import packaged_models
from unmask.policies.config import PolicyConfig, SetPolicyConfig

TAGS = ("unmask", "unmasking-policy", "masked-diffusion", "diffusion-language-model")
PAPER = "arxiv:2512.09106"
"""A further tag of policies of the kind described there."""
COLUMNS = ("task", "policy", "block_length", "length", "accuracy", "nfe", "tpf")
"""Required in a row of results. ``alpha``, ``policy_scale`` and the ``_se`` of the last three are optional."""

EXAMPLE_PROMPTS = {"little": "Reverse the line: Tom, Ann, Eve.", "tiny": "cEaCfBeGgD:a="}
"""A prompt that a packaged model understands."""


def policy_card(
    config: PolicyConfig | SetPolicyConfig,
    repo_id: str,
    base_model: str | None = None,
    results: Sequence[Mapping[str, Any]] = (),
    training: Mapping[str, Any] | None = None,
    license: str = "apache-2.0",
    datasets: Sequence[str] = (),
    prompt: str | None = None,
) -> str:
    """README.md of a policy's repository: metadata in YAML, then Markdown.

    Args:
        repo_id: the hub repository, "user/name".
        base_model: the language model that the policy was trained on: a hub id or a packaged name.
        results: rows of ``unmask evaluate`` for this policy and its baselines, as dicts with :data:`COLUMNS`
            (``dataclasses.asdict`` of what ``unmask.evaluation.results.read_csv`` reads).
        training: the training configuration.
        license: an identifier of the hub, such as "mit".
        datasets: hub ids of the training data.
        prompt: the prompt of the example, in place of a question.

    Raises ImportError without ``huggingface_hub``, ValueError for a wrong ``repo_id`` or ``base_model``, or for a row
    that lacks a column.
    """
    if not is_hub_id(repo_id):
        raise ValueError(f'repo_id must be "user/name", got {repo_id!r}')
    packaged = base_model in packaged_models()
    local = base_model is not None and not packaged and (not is_hub_id(base_model) or Path(base_model).is_dir())
    if local:
        raise ValueError(
            f"base_model must be a hub id (user/name) or a packaged model ({', '.join(packaged_models())}), "
            f"got {base_model!r}"
        )
    parts = [
        f"---\n{metadata(base_model if not packaged else None, license, datasets, tags(config))}\n---",
        f"# {repo_id.rpartition('/')[2]}",
        description(config, base_model),
        "## Use\n\n" + usage(repo_id, base_model, packaged, prompt, isinstance(config, SetPolicyConfig)),
        "## Policy\n\n" + shape(config, training or {}),
    ]
    if results:
        parts.append("## Results\n\n" + results_table(results))
    if training:
        parts.append(f"## Training\n\n```json\n{json.dumps(public(training), indent=2, default=str)}\n```")
    return "\n\n".join(parts) + "\n"


def is_hub_id(text: str) -> bool:
    """Whether ``text`` has the form "owner/name"."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", text) is not None


def tags(config: PolicyConfig | SetPolicyConfig) -> list[str]:
    return [*TAGS, *([PAPER] if isinstance(config, PolicyConfig) else [])]


def metadata(base_model: str | None, license: str, datasets: Sequence[str], tags: Sequence[str] = TAGS) -> str:
    """The front matter in YAML, without the enclosing lines."""
    try:
        from huggingface_hub import ModelCardData
    except ImportError as error:
        raise ImportError("a model card needs huggingface_hub: `pip install huggingface_hub`") from error
    data = ModelCardData(
        library_name="unmask",
        license=license,
        base_model=base_model,
        datasets=list(datasets) or None,
        pipeline_tag="text-generation",
        tags=list(tags),
    )
    return str(data.to_yaml()).strip()


def description(config: PolicyConfig | SetPolicyConfig, base_model: str | None) -> str:
    where = {None: "", 0: " It was trained for full diffusion (the whole buffer is one block)."}.get(
        config.trained_block_length, f" It was trained for blocks of {config.trained_block_length} tokens."
    )
    model = f"`{base_model}`" if base_model else "a masked diffusion language model"
    if isinstance(config, SetPolicyConfig):
        return (
            f"A set policy for {model}: a small transformer that reads the proposed tokens and, in each denoising "
            f"step, picks one position after another while all that it picked is likely to survive together.{where}"
        )
    return (
        f"An unmasking policy for {model}: a small transformer that reads the model's confidences and decides which "
        "masked positions to fill in each denoising step, after [Learning Unmasking Policies for Diffusion Language "
        f"Models](https://arxiv.org/abs/2512.09106).{where}"
    )


def usage(repo_id: str, base_model: str | None, packaged: bool, prompt: str | None, is_set: bool = False) -> str:
    """A program that runs as it stands, on the base model if that is known."""
    policy = json.dumps(repo_id)
    if base_model is None:
        name, home = ("SetPolicy", "unmask.policies") if is_set else ("Policy", "unmask")
        code = f"from {home} import {name}\n\npolicy = {name}.from_pretrained({policy})\nprint(policy.config)"
    elif packaged or prompt is not None:
        question = json.dumps(prompt or EXAMPLE_PROMPTS.get(base_model, ""))
        code = (
            "from unmask import Sampler\n\n"
            f"sampler = Sampler.from_pretrained({json.dumps(base_model)}, policy={policy})\n"
            f"result = sampler.generate({question})\n"
            "print(result.texts[0], result.steps[0].item())"
        )
    else:
        code = (
            "import torch\nfrom unmask import Sampler\n\n"
            "sampler = Sampler.from_pretrained(\n"
            f'    {json.dumps(base_model)}, policy={policy}, device="cuda", dtype=torch.bfloat16\n)\n'
            'chat = [{"role": "user", "content": "What is 12 * 13?"}]\n'
            "prompt = sampler.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)\n"
            "result = sampler.generate(prompt)\n"
            "print(result.texts[0], result.steps[0].item())"
        )
    return f"```python\n{code}\n```"


def shape(config: PolicyConfig | SetPolicyConfig, training: Mapping[str, Any]) -> str:
    """A table of the configuration, with the task and alpha of training if they are known."""
    blocks = {None: "any", 0: "full diffusion"}.get(config.trained_block_length, str(config.trained_block_length))
    if isinstance(config, SetPolicyConfig):
        tokens = "an embedding of its own" if config.embedding_size is None else "the model's embedding"
        own = {"risk (alpha)": f"an input, {config.default_risk:g} by default", "tokens": tokens}
    else:
        fixed = f"{training['alpha']}, fixed in training" if "alpha" in training else "fixed in training"
        fixed = "none; a threshold is the dial" if config.trained_actions == "greedy" else fixed
        alpha = f"an input, {config.default_alpha:g} by default" if config.alpha_conditioned else fixed
        own = {"context": {"full": "the whole buffer", "block": "the active block"}[config.context], "alpha": alpha}
    lines = {
        "block length": blocks,
        **({"task": code(training["task"])} if "task" in training else {}),
        **own,
        "confidences per position": config.num_confidences,
        "hidden size, heads, feed-forward": f"{config.hidden_size}, {config.num_heads}, {config.ffn_size}",
    }
    return table(["", ""], [[name, str(value)] for name, value in lines.items()])


def results_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line per row. Raises ValueError naming a column that a row lacks."""
    for i, row in enumerate(rows):
        missing = [name for name in COLUMNS if name not in row]
        if missing:
            raise ValueError(f"results[{i}] has no {', '.join(missing)}; a row is one of `unmask evaluate`")
    alphas = any(row.get("alpha") is not None for row in rows)
    header = ["task", "policy", *(["alpha"] if alphas else []), "blocks", "accuracy", "NFE", "TPF"]
    lines = []
    for row in rows:
        scale = row.get("policy_scale", 1.0)
        alpha = row.get("alpha")
        lines.append(
            [
                str(row["task"]) if re.fullmatch(r"[\w+.-]+", str(row["task"])) else code(str(row["task"])),
                code(public(row["policy"])) + ("" if scale == 1 else f" x {scale:g}"),
                *(["" if alpha is None else f"{alpha:g}"] if alphas else []),
                "full" if row["block_length"] == row["length"] else str(row["block_length"]),
                *(number(row, name, digits) for name, digits in (("accuracy", 3), ("nfe", 2), ("tpf", 2))),
            ]
        )
    note = "NFE: forwards per sequence; TPF: generated tokens per forward; ±: standard error of the mean."
    return f"{table(header, lines)}\n\n{note}"


def number(row: Mapping[str, Any], name: str, digits: int) -> str:
    error = row.get(f"{name}_se")
    return f"{row[name]:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def public(value: Any) -> Any:
    """``value`` with local places, also within lists and mappings, cut to their last names."""
    if isinstance(value, Mapping):
        return {name: public(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [public(one) for one in value]
    if isinstance(value, str) and ("/" in value or os.sep in value) and not is_public_place(value):
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    return value


def is_public_place(text: str) -> bool:
    """Whether ``text``, which has slashes, is a hub id or an address, and no place here."""
    return (is_hub_id(text) or "://" in text) and not Path(text).exists()


def code(text: str) -> str:
    """``text`` as inline code of Markdown, also in a table."""
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text else f"`{text}`"


def cell(text: str) -> str:
    """``text`` in one line, without the ends of a table's cell."""
    return re.sub(r"\s*[\r\n]+\s*", " ", text).replace("|", "\\|")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [" | ".join(map(cell, row)) for row in (header, ["---"] * len(header), *rows)]
    return "\n".join(f"| {line} |" for line in lines)
