"""How a generation is run."""

from __future__ import annotations

from typing import Literal

from unmask.config import BlockLength, Config, NonNegative, Positive, PositiveInt, Seed

Actions = Literal["bernoulli-argmax", "bernoulli", "greedy", "dpls"]
Cache = Literal["auto", "none", "exact", "prefix", "dual"]


class SamplerConfig(Config):
    """Settings of one generation. They are frozen; :meth:`updated` derives variants."""

    max_new_tokens: PositiveInt = 256
    """L, the length of the buffer, in tokens."""
    block_length: BlockLength = 32
    """Tokens per block, filled left to right; the last block may be shorter. None or "full": one block (full
    diffusion)."""
    sub_block_length: PositiveInt | None = None
    """Tokens of a block that are decoded before the next ones, for models whose tokens see no later block; it divides
    ``block_length``. None: all."""
    temperature: NonNegative = 0.0
    """Temperature of the tokens: 0 takes the most probable, T > 0 draws an exact sample of softmax(logits / T)."""
    policy_temperature: Positive = 1.0
    """tau: a learned policy's logits are divided by it before actions are drawn; "greedy" actions draw nothing."""
    policy_scale: NonNegative = 1.0
    """beta: factor on a learned policy's Bernoulli probabilities, clamped to 1 (speed control at test time)."""
    actions: Actions = "bernoulli-argmax"
    """How actions are drawn from a learned policy's logits: "bernoulli-argmax" (at least one per step),
    "bernoulli", "greedy" (probability above one half, else the highest) or "dpls" (dynamic Plackett-Luce)."""
    alpha: NonNegative | None = None
    """Speed/accuracy trade-off for a policy that is conditioned on it; None: the policy's default."""
    target_nfe: Positive | None = None
    """Forwards per completion that a calibrated learned policy is to take on average; None: as the policy is.
    `unmask calibrate` measures a policy in another setting."""
    seed: Seed | None = None
    """Seed of every draw; None draws a fresh one. Draws are keyed by it and by a row's number in the call, so that they
    do not depend on the device or on other rows."""
    max_steps: PositiveInt | None = None
    """Forwards after which an unfinished row stops; None: L."""
    cache: Cache = "auto"
    """Reuse of keys and values between steps. "exact": those of finished blocks, for models whose tokens see no later
    block. "none" recomputes everything in every step. "auto": "exact" where it is possible, else "none". "prefix" and
    "dual" are approximate, for bidirectional models (Fast-dLLM, arXiv 2505.22618): everything is recomputed when a row
    enters a block; within the block, "prefix" recomputes from the block to the end, and "dual" the block alone."""
    cache_refresh: PositiveInt | None = None
    """Steps within a block after which everything is recomputed; 1 makes a cache exact. None: never."""
    stop_at_eos: bool = True
    """Stop a row once an end of sequence and everything before it are committed."""
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
