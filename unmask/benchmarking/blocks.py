"""Decoding by blocks, at the shape of SDAR-1.7B with random weights: the library beside plain loops."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from unmask.benchmarking.timing import Comparison
from unmask.models import Transformer, TransformerConfig
from unmask.models.kv_cache import KVWindow
from unmask.sampling import Sampler, SamplerConfig

if TYPE_CHECKING:
    from unmask.models.quantization import Scheme

PROMPT, LENGTH, PER_STEP = 128, 32, 2
VOCAB, MASK = 151_936, 151_669


@torch.no_grad()
def random_sdar(layers: int, hidden: int, heads: int, intermediate: int, device: torch.device) -> Transformer:
    """A block-causal bfloat16 model whose tokens differ."""
    torch.manual_seed(0)
    config = TransformerConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads // 2,
        head_dim=128,
        intermediate_size=intermediate,
        mask_token_id=MASK,
        eos_token_id=None,
        qk_norm=True,
        tie_embeddings=True,
        attention="block-causal",
        block_length=4,
    )
    with torch.device("meta"):
        model = Transformer(config).to(torch.bfloat16)
    model.to_empty(device=device)
    for p in model.parameters():
        p.normal_(std=1.5 * p.shape[1] ** -0.5) if p.ndim == 2 else p.fill_(1.0)
    model.tie_weights()
    return model.requires_grad_(False).eval()


class Plain:
    """Straightforward loops for one prompt, which commit the surest tokens of each step."""

    def __init__(self, model: Transformer, prompt: Tensor, block: int) -> None:
        self.model, self.prompt, self.block, self.forwards = model, prompt, block, 0

    def forward(self, tokens: Tensor, cache: Any, begin: int, end: int, outputs: bool = True) -> Tensor | None:
        """Raw logits (1, S, V) of positions begin .. end - 1, whose keys are stored."""
        self.forwards += 1
        at = torch.arange(begin, end, device=tokens.device)[None]
        cache.reserve(end)
        horizon = (at // self.block + 1) * self.block - 1
        return self.model.forward_window(tokens, None, KVWindow(cache, at, None, end), at if outputs else None, horizon)

    @torch.no_grad()
    def decode(self, cached: bool) -> Tensor:
        """Tokens (1, L): over cached keys with a separate forward that stores each block, or anew in every step."""
        masks = self.prompt.new_full((1, LENGTH), MASK)
        tokens, start = torch.cat((self.prompt, masks), dim=1), self.prompt.shape[1]
        cache = self.model.new_cache(1, 1)
        if cached:
            self.forward(tokens, cache, 0, start, outputs=False)
        self.forwards = 0
        for begin in range(start, start + LENGTH, self.block):
            end = begin + self.block
            while bool((tokens[:, begin:end] == MASK).any()):
                if cached:
                    logits = self.forward(tokens, cache, begin, end)
                else:
                    self.forwards += 1
                    at = torch.arange(end, device=tokens.device)[None]
                    horizon = (at // self.block + 1) * self.block - 1
                    logits = self.model(tokens[:, :end], positions=slice(begin, end), horizon=horizon)
                self.commit(tokens[:, begin:end], logits)
            if cached and end < start + LENGTH:
                self.forward(tokens, cache, begin, end, outputs=False)
        return tokens[:, start:]

    def commit(self, block: Tensor, logits: Tensor | None) -> None:
        """Write into ``block`` (1, BL) what the rule takes."""
        assert logits is not None
        probability = logits.float().softmax(-1)
        probability[..., MASK] = 0
        confidence, token = probability.max(-1)
        confidence = confidence.masked_fill(block != MASK, -1)
        best = confidence.topk(PER_STEP, dim=1).indices
        block.scatter_(1, best, token.gather(1, best))


def agree(got: Tensor, want: Tensor) -> None:
    """In bfloat16 a near tie may fall either way, and what follows it with it. In float32 tests ask for equality."""
    assert (got == want).float().mean() >= 0.5, "more than half of the tokens differ"


def compared(model: Transformer, block: int, anew: bool) -> Comparison:
    """One prompt; beside the whole generations the library's own forwards again, which nothing can save.

    ``anew``: also a loop that recomputes the canvas in every step.
    """
    generator = torch.Generator().manual_seed(block)
    prompt = torch.randint(0, MASK, (1, PROMPT), generator=generator).to(model.device)
    model.block_length = block
    config = SamplerConfig(LENGTH, block, stop_at_eos=False, seed=0)
    sampler = Sampler(model, None, f"confidence:{LENGTH // PER_STEP}", config)
    calls: list[Callable[[], Any]] = []
    counts: dict[str, dict[str, float]] = {}
    run = model.forward_window

    def seen(*args: Any) -> Any:
        ids, *rest = args
        calls.append(partial(run, ids.clone(), *rest))
        return run(*args)

    def ours() -> Tensor:
        result = sampler.generate(prompt)
        counts["unmask"] = {"tokens": LENGTH, "forwards": int(result.steps[0])}
        return result.completions

    def plainly(name: str, cached: bool) -> Tensor:
        plain = Plain(model, prompt, block)
        out = plain.decode(cached)
        counts[name] = {"tokens": LENGTH, "forwards": plain.forwards}
        return out

    @torch.no_grad()
    def alone() -> None:
        for call in calls:
            call()

    model.forward_window = seen  # type: ignore[assignment, method-assign]
    ours()
    del model.forward_window
    c = model.config
    return Comparison(
        "blocks",
        f"blocks of {block}, prompt {PROMPT}, L = {LENGTH}, {c.num_layers} layers of {c.hidden_size} in bfloat16",
        {
            "unmask": ours,
            "forwards alone": alone,
            "eager": partial(plainly, "eager", True),
            **({"no cache": partial(plainly, "no cache", False)} if anew else {}),
        },
        agree,
        parts=("forwards alone",),
        goals={"limit_share": 1 / 1.05, "ratio": 1.0},
        floor="forwards alone",
        counts=counts,
    )


def blocks(device: torch.device, quick: bool = False) -> Iterator[Comparison]:
    """Blocks of 4 and 32; in full at the shape of SDAR-1.7B, where computing all anew would take minutes.

    The eager loop spends a forward of its own on storing each block.
    """
    model = random_sdar(*((2, 512, 4, 1536) if quick else (28, 2048, 16, 6144)), device)
    for block in (4, 32):
        yield compared(model, block, anew=quick)


@torch.no_grad()
def in_few_bits(model: Transformer, scheme: Scheme) -> Transformer:
    """A copy of ``model`` whose layers' matrices are quantised as ``load_model(..., quantization=scheme)`` does it."""
    from unmask.models.quantization import Quantizer

    quantizer, copied = Quantizer(scheme, model.device, model.dtype), copy.deepcopy(model)
    for name, p in list(copied.named_parameters()):
        if quantizer.takes(name, p):
            owner, _, leaf = name.rpartition(".")
            setattr(copied.get_submodule(owner), leaf, quantizer.matrix(name, p))
    return copied


def quantization(device: torch.device, quick: bool = False) -> Iterator[Comparison]:
    """Generations with int8 weights, where torchao is, beside bfloat16. Tokens may differ; only time counts."""
    if find_spec("torchao") is None:
        return
    model = random_sdar(*((2, 512, 4, 1536) if quick else (28, 2048, 16, 6144)), device)
    models = {"bfloat16": model, "int8": in_few_bits(model, "int8")}
    if device.type == "cpu":
        models["int8-dynamic"] = in_few_bits(model, "int8-dynamic")
    for block in (4, 32):
        config = SamplerConfig(LENGTH, block, stop_at_eos=False, seed=0)
        prompt = torch.randint(0, MASK, (1, PROMPT), generator=torch.Generator().manual_seed(block)).to(device)
        samplers = {}
        for name, one in models.items():
            one.block_length = block
            samplers[name] = Sampler(one, None, f"confidence:{LENGTH // PER_STEP}", config)
        c = model.config
        yield Comparison(
            "quantization",
            f"blocks of {block}, prompt {PROMPT}, L = {LENGTH}, {c.num_layers} layers of {c.hidden_size}",
            {name: partial(sampler.generate, prompt) for name, sampler in samplers.items()},
            lambda got, want: None,
            baseline="bfloat16",
            counts={name: {"tokens": LENGTH, "forwards": LENGTH // PER_STEP} for name in samplers},
        )
