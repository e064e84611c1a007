"""What whole generations with the packaged model cost beside the matrix products and the attention in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from unmask.benchmarking.calls import Contender
from unmask.benchmarking.timing import Comparison
from unmask.sampling import Sampler
from unmask.tasks import make_task

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm")
ATTENTION = "scaled_dot_product"


class Products(TorchDispatchMode):
    """Collects the matrix products and attentions that run under it: one call of each shape, and how often it came."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[object, tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = {}
        self.times: dict[object, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if name in PRODUCTS or ATTENTION in name:
            shapes = tuple((a.shape, a.stride()) if isinstance(a, Tensor) else a for a in (*args, *kwargs.values()))
            self.calls.setdefault((name, shapes), (func, args, kwargs))
            self.times[name, shapes] = self.times.get((name, shapes), 0) + 1
        return func(*args, **kwargs)

    @torch.no_grad()
    def repeat(self) -> None:
        """The same products and attentions as often, on the tensors collected."""
        for key, (func, args, kwargs) in self.calls.items():
            for _ in range(self.times[key]):
                func(*args, **kwargs)


def comparison(sampler: Sampler, batch: int) -> Comparison:
    """A generation, its model's forwards alone, and their products alone."""
    prompts = [problem.prompt for problem in make_task("hops").problems(batch, 0)]
    counts: dict[str, dict[str, float]] = {}
    forwards: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def see(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        forwards.append((tuple(a.clone() if isinstance(a, Tensor) else a for a in args), kwargs))

    def generate() -> None:
        result = sampler.generate(prompts, seed=0)
        counts["unmask"] = {"tokens": int(result.filled.sum()), "forwards": int(result.steps.max())}

    @torch.no_grad()
    def model_alone() -> None:
        for args, kwargs in forwards:
            sampler.model(*args, **kwargs)

    hook = sampler.model.register_forward_pre_hook(see, with_kwargs=True)
    generate()
    hook.remove()
    with Products() as products:
        model_alone()
    block = sampler.config.block_length
    return Comparison(
        "generation",
        f"batch {batch}, {f'blocks of {block}' if block else 'full diffusion'}, L = {sampler.config.max_new_tokens}",
        {
            "unmask": Contender(generate),
            "model alone": Contender(model_alone, part=True),
            "products alone": Contender(products.repeat, part=True),
        },
        lambda got, want: None,  # nothing else does the whole work
        reference="unmask",
        floor="products alone",
        counts=counts,
    )


def comparisons(device: torch.device, quick: bool = False) -> Iterator[Comparison]:
    """Batches of 1, 16 and 64 with the packaged model and policy."""
    sampler = Sampler.from_pretrained("tiny", device=device)
    for batch in (1, 16) if quick else (1, 16, 64):
        yield comparison(sampler, batch)
