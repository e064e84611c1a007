"""How a generation is run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from typing_extensions import Self

from unmask.config import BlockLength, Config, Count, NonNegative, Positive, PositiveInt, Seed

Actions = Literal["bernoulli-argmax", "bernoulli", "greedy", "dpls"]
Cache = Literal["auto", "none", "exact", "prefix", "dual"]
Share = Annotated[float, Field(gt=0, le=1)]
Texts = Annotated[
    tuple[Annotated[str, Field(min_length=1)], ...],
    BeforeValidator(lambda value: () if value is None else (value,) if isinstance(value, str) else value),
]
Ids = Annotated[
    Annotated[tuple[Count, ...], Field(max_length=16)] | None,
    BeforeValidator(lambda value: (value,) if isinstance(value, int) else value),
]
GENERATION_CONFIG = "generation_config.json"


def in_float32(value: float) -> float:
    if value and not 1e-30 <= value <= 1e30:
        raise ValueError("0 or 1e-30 to 1e30")
    return value


Temperature = Annotated[NonNegative, AfterValidator(in_float32)]
Factor = Annotated[float, Field(ge=0, le=1e30)]


class SamplerConfig(Config):
    """Settings of one generation. They are frozen; :meth:`updated` derives variants."""

    RENAMED = {
        **dict.fromkeys(("gen_length", "max_completion_length"), "max_new_tokens"),
        "max_length": "max_new_tokens, which does not count the prompt",
        "do_sample": "temperature, above 0 to draw tokens",
        **dict.fromkeys(("alg", "remasking", "factor", "threshold"), "a policy such as threshold:0.9"),
        "policy": "Sampler.from_pretrained(..., policy=...)",
        "steps": "a policy such as confidence:32, which takes 32 steps, or target_nfe",
        "alg_temp": "policy_temperature",
        "stop_strings": "stop",
        "eos_token_id": "stop_ids",
    }

    max_new_tokens: PositiveInt = 256
    """L, the length of the buffer, in tokens."""
    block_length: BlockLength = 32
    """Tokens per block, filled left to right; the last block may be shorter. None or "full": one block (full
    diffusion)."""
    sub_block_length: PositiveInt | None = None
    """Tokens of a block that are decoded before the next ones, for models whose tokens see no later block; it divides
    ``block_length``. None: all."""
    temperature: Temperature = 0.0
    """Temperature of the tokens: 0 takes the most probable, T > 0 draws an exact sample of softmax(logits / T)."""
    top_k: PositiveInt | None = None
    """Draw only among the k most probable tokens of a position (and those equal to the last of these); None: all. It
    needs a ``temperature`` above 0, as 0 draws nothing. Confidences stay those of all tokens."""
    top_p: Share | None = None
    """Draw only among the most probable tokens that together have this share of softmax(logits / temperature), after
    ``top_k``; 1 or None: all. It needs a ``temperature`` above 0, as 0 draws nothing."""
    repetition_penalty: Positive = 1.0
    """Above 1, tokens that the row's prompt or what is committed of its answer already has become less probable:
    positive logits are divided by it, negative ones multiplied (CTRL, arXiv 1909.05858, as in transformers)."""
    cfg_scale: NonNegative = 0.0
    """Classifier-free guidance, w: a second forward sees the prompt masked, and logits become
    uncond + (w + 1) * (cond - uncond) (LLaDA, arXiv 2502.09992). 0: none. For bidirectional models without a cache."""
    policy_temperature: Annotated[float, Field(ge=1e-30, le=1e30)] = 1.0
    """tau: a learned policy's logits are divided by it before actions are drawn; "greedy" actions draw nothing."""
    policy_scale: Factor = 1.0
    """beta: factor on a learned policy's Bernoulli probabilities, clamped to 1 (speed control at test time)."""
    actions: Actions = "bernoulli-argmax"
    """How actions are drawn from a learned policy's logits: "bernoulli-argmax" (at least one per step),
    "bernoulli", "greedy" (probability above one half, else the highest) or "dpls" (dynamic Plackett-Luce)."""
    alpha: Factor | None = None
    """Speed/accuracy trade-off for a policy that is conditioned on it; None: the policy's default."""
    target_nfe: Positive | None = None
    """Forwards per completion that a calibrated learned policy is to take on average; None: as the policy is.
    `unmask calibrate` measures a policy in another setting."""
    seed: Seed | None = None
    """Seed of every draw; None draws a fresh one. Draws are keyed by it and by a row's number in the call, so that they
    do not depend on the device or on other rows."""
    max_steps: Annotated[PositiveInt, Field(lt=2**62)] | None = None
    """Forwards after which an unfinished row stops; None: as many as the buffer has tokens, L or, as block-causal
    models end with a whole block, a few more."""
    cache: Cache = "auto"
    """Reuse of keys and values between steps. "exact": those of finished blocks, for models whose tokens see no later
    block. "none" recomputes everything in every step. "auto": "exact" where it is possible, else "none". "prefix" and
    "dual" are approximate, for bidirectional models (Fast-dLLM, arXiv 2505.22618): everything is recomputed when a row
    enters a block; within the block, "prefix" recomputes from the block to the end, and "dual" the block alone."""
    cache_refresh: PositiveInt | None = None
    """Steps within a block after which everything is recomputed; 1 makes a cache exact. None: never."""
    stop_at_eos: bool = True
    """Stop a row once an end of sequence and everything before it are committed."""
    stop_ids: Ids = None
    """Ids of tokens that are an end of sequence, at most 16; None: the model's."""
    stop: Texts = ()
    """Texts such as "Q:" or ["\\n\\n", "Q:"] that end an answer. A row stops once its committed tokens up to the first
    mask contain one, and its text is cut before it. It needs a tokenizer."""
    num_return_sequences: Annotated[PositiveInt, Field(le=2**20)] = 1
    """Completions of each prompt, one after the other in the results. Above 1 something must be drawn: a
    ``temperature`` above 0, or the actions of a policy."""
    record: bool = False
    """Keep every step's observation and action: ``result.trajectory``."""
    max_batch_size: PositiveInt | None = None
    """Rows decoded at once; further prompts replace rows that finish. None: all."""
    deterministic: bool = False
    """Run the model on one unpadded row at a time, so that rounding does not depend on other rows either. Slow."""
    cuda_graphs: bool | None = False
    """Launch each step, or where the driver can the whole loop, as one CUDA graph. None: wherever that is possible;
    True: ValueError where it is not; False: never, the default until ``benchmarks/gpu_check.py`` has passed on a GPU.
    Batches are padded with finished rows to a few sizes."""

    def check_draws(self) -> None:
        """Raise ValueError for a choice of what to draw from where nothing is drawn."""
        for name, value in (("top_k", self.top_k), ("top_p", None if self.top_p == 1 else self.top_p)):
            if value is not None and self.temperature == 0:
                raise ValueError(
                    f"{name}={value} says what is drawn from, but at temperature=0 nothing is drawn: set a temperature "
                    f"above 0, or leave {name} out"
                )

    @classmethod
    def from_generation_config(cls, source: Any, **changes: Any) -> Self:
        """What a GenerationConfig of transformers, or Dream's, says about sampling, with ``changes``.

        ``source``: the object, a mapping, or a folder or hub id with a ``generation_config.json``. It may set
        ``temperature``, ``top_p`` and ``top_k`` (``do_sample: false`` switches them off), ``repetition_penalty``,
        ``max_new_tokens``, ``eos_token_id`` (``stop_ids``), ``stop_strings`` (``stop``), Dream's ``steps``
        (``max_steps``; the rule that shares out the tokens among them is the policy, such as "entropy:STEPS") and every
        other field of this class. The rest is about other ways to decode and left out.

        Raises FileNotFoundError if there is no such file, ValueError for a value out of range.
        """
        values = generation_settings(source)
        renamed = {"eos_token_id": "stop_ids", "stop_strings": "stop", "steps": "max_steps"}
        found = {new: values[old] for old, new in renamed.items() if old in values}
        found |= {name: values[name] for name in cls.__dataclass_fields__ if name in values}
        if values.get("do_sample") is False:
            found["temperature"] = 0.0
        elif values.get("do_sample"):
            found.setdefault("temperature", 1.0)
        drawing = found.get("temperature", 0) > 0
        if not drawing or found.get("top_k") in (0, -1):  # both mean all tokens
            found.pop("top_k", None)
        if not drawing:
            found.pop("top_p", None)
        if changes.get("temperature") == 0:
            found = {name: value for name, value in found.items() if name not in ("top_k", "top_p")}
        return cls(**{**found, **changes})


def generation_settings(source: Any) -> dict[str, Any]:
    """What :meth:`SamplerConfig.from_generation_config` reads, without what is None."""
    if isinstance(source, (str, Path)):
        from unmask.models.sources import find_folder, read_json

        file = find_folder(source, None, (GENERATION_CONFIG,)) / GENERATION_CONFIG
        if not file.is_file():
            raise FileNotFoundError(f"{file.parent} has no {GENERATION_CONFIG}")
        source = read_json(file)
    values = source if isinstance(source, Mapping) else source.to_dict() if hasattr(source, "to_dict") else None
    if values is None:
        raise TypeError(
            f"source must be a folder or hub id, a GenerationConfig or a mapping, got {type(source).__name__}"
        )
    return {name: value for name, value in values.items() if value is not None}
