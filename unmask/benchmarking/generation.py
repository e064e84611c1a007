"""What whole generations with the packaged model cost beside the matrix products and the attention in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from unmask.benchmarking.timing import Comparison
from unmask.sampling import Sampler
from unmask.tasks import make_task

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm")
ATTENTION = "scaled_dot_product"

Recorded = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


class Products(TorchDispatchMode):
    """Collects the matrix products and attentions that run under it: one call of each shape, and how often it came."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[object, Recorded] = {}
        self.times: dict[object, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if name in PRODUCTS or ATTENTION in name:
            shapes = tuple((a.shape, a.stride()) if isinstance(a, Tensor) else a for a in (*args, *kwargs.values()))
            key = (name, shapes)
            self.calls.setdefault(key, (func, args, kwargs))
            self.times[key] = self.times.get(key, 0) + 1
        return func(*args, **kwargs)

    @torch.no_grad()
    def repeat(self) -> None:
        """The same products and attentions as often, on the tensors collected."""
        for key, (func, args, kwargs) in self.calls.items():
            for _ in range(self.times[key]):
                func(*args, **kwargs)


class Setting:
    """A batch of prompts, what generating with them calls, and what it produced at last."""

    def __init__(self, sampler: Sampler, batch: int) -> None:
        self.sampler = sampler
        self.prompts = [problem.prompt for problem in make_task("hops").problems(batch, 0)]
        self.counts: dict[str, dict[str, float]] = {}
        self.forwards: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        hook = sampler.model.register_forward_pre_hook(self._see, with_kwargs=True)
        self.expected = self.generate()
        hook.remove()
        with Products() as self.products:
            self.model_alone()

    def _see(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.forwards.append((tuple(a.clone() if isinstance(a, Tensor) else a for a in args), kwargs))

    def generate(self) -> Tensor:
        """Completions (B, L)."""
        result = self.sampler.generate(self.prompts)
        self.counts["unmask"] = {"tokens": int(result.filled.sum()), "forwards": int(result.steps.max())}
        return result.completions

    @torch.no_grad()
    def model_alone(self) -> None:
        """The model's forwards of a generation, one after the other."""
        for args, kwargs in self.forwards:
            self.sampler.model(*args, **kwargs)

    def check(self) -> None:
        """What is timed is the generation that was recorded, and the model's products are part of it."""
        with Products() as whole:
            assert torch.equal(self.generate(), self.expected), "generations with the same seed differ"
        beyond = {key: times - whole.times.get(key, 0) for key, times in self.products.times.items()}
        assert max(beyond.values()) <= 0, "the model alone multiplies more than the generation"


def comparisons(device: torch.device, quick: bool = False) -> list[Comparison]:
    """Batches of 1, 16 and 64 with the packaged model and policy."""
    sampler = Sampler.from_pretrained("tiny", device=device)
    block = sampler.config.block_length
    how = f"blocks of {block}" if block else "full diffusion"
    out = []
    for batch in (1, 16) if quick else (1, 16, 64):
        s = Setting(sampler, batch)
        out.append(
            Comparison(
                "generation",
                f"batch {batch}, {how}, L = {sampler.config.max_new_tokens}",
                {"unmask": s.generate, "model alone": s.model_alone, "products alone": s.products.repeat},
                s.check,
                counts=s.counts,
                yardsticks=frozenset({"model alone", "products alone"}),
                floor="products alone",
            )
        )
    return out
