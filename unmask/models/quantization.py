"""Weights in few bits, through torchao: ``load_model(..., quantization=...)``. Importing this needs torchao.

The matrices of the layers are quantised: projections of attention, of SwiGLUs and of experts. Embedding, LM head, norms
and routers keep their dtype, because they are a small part of the work and decide tokens, confidences and experts.
"""

from __future__ import annotations

import ctypes
import logging
import os
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Scheme = Literal["int8", "int8-dynamic", "int4"]

_level = logging.root.manager.disable
logging.disable(max(_level, logging.WARNING))  # torchao lists the libraries of other machines that it could not load
try:
    from torchao.prototype.quantization.int4 import Int4OpaqueTensor
    from torchao.quantization import Int8Tensor, PerRow
    from torchao.quantization.quantize_.workflows import Int4TilePackedTo4dTensor
    from torchao.utils import TorchAOBaseTensor, should_reduce_range
finally:
    logging.disable(_level)

FEW = 8
"""Rows up to which torch's product with int8 weights was faster than to convert the weights first, on a CPU."""
GROUPS = (128, 64, 32)
"""Inputs that share a scale and a zero point in int4; the first that divides their number."""


RELEASE = getattr(ctypes.CDLL(None), "malloc_trim", lambda keep: None) if os.name == "posix" else lambda keep: None
"""Gives freed memory back to the system, with glibc."""


class Int8OnCPU(Int8Tensor):
    """torchao's int8 weight, each row with a scale, which a few tokens are multiplied with as it is."""


@Int8OnCPU.implements_torch_function(F.linear)
def int8_linear(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    x, weight, *bias = args
    rows = x.flatten(0, -2)
    if len(rows) > FEW or weight.shape[0] % 16 or weight.shape[1] % 16:
        out: Tensor = Int8Tensor._TORCH_FN_TABLE[Int8Tensor][F.linear](func, types, args, kwargs)
        return out
    scale = weight.scale.flatten().to(x.dtype)
    product = torch.ops.aten._weight_int8pack_mm(rows.contiguous(), weight.qdata, scale)
    out = product.view(*x.shape[:-1], weight.shape[0])
    return out if not bias or bias[0] is None else out + bias[0]


class DynamicInt8(TorchAOBaseTensor):
    """An int8 weight in oneDNN's order, multiplied with tokens that are rounded to 8 bits, each with its own scale.

    The sums are exact integers, so that a token's result does not depend on the tokens beside it.
    """

    tensor_data_names = ["packed", "scale", "zeros"]
    tensor_attribute_names = ["shape", "dtype"]

    def __new__(cls, packed: Tensor, scale: Tensor, zeros: Tensor, shape: torch.Size, dtype: torch.dtype) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=packed.device)

    def __init__(self, packed: Tensor, scale: Tensor, zeros: Tensor, shape: torch.Size, dtype: torch.dtype) -> None:
        """``scale`` (out,) float32 and ``zeros`` (out,) int32 belong to the rows."""
        self.packed, self.scale, self.zeros = packed, scale, zeros

    def __deepcopy__(self, memo: Any) -> DynamicInt8:
        return self  # it never changes, and oneDNN's order cannot be copied

    @classmethod
    def of(cls, weight: Tensor) -> DynamicInt8:
        plain = Int8Tensor.from_hp(weight, PerRow())
        packed = torch.ops.onednn.qlinear_prepack(plain.qdata, [1, weight.shape[1]])
        zeros = torch.zeros(len(weight), dtype=torch.int32)
        return cls(packed, plain.scale.flatten().float(), zeros, weight.shape, weight.dtype)


@DynamicInt8.implements_torch_function(F.linear)
def dynamic_linear(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    x, weight, *bias = args
    rows = x.flatten(0, -2).float()
    scale = rows.abs().amax(dim=1, keepdim=True).clamp_min(1e-30) / 127
    bits = (rows / scale).round_().add_(128).to(torch.uint8)
    product = torch.ops.onednn.qlinear_pointwise(
        bits, 1.0, 128, weight.packed, weight.scale, weight.zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    out = product.mul_(scale).to(x.dtype).view(*x.shape[:-1], weight.shape[0])
    return out if not bias or bias[0] is None else out + bias[0]


class Quantizer:
    """Makes the parameters of one scheme on one device. Raises ValueError for what has no support."""

    def __init__(self, scheme: Scheme, device: torch.device, dtype: torch.dtype) -> None:
        self.scheme, self.device, self.dtype = scheme, device, dtype
        said = f"quantization={scheme!r}"
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"{said} is for the CPU and CUDA, got device {str(device)!r}")
        if dtype == torch.float64:
            raise ValueError(f"{said} computes in float32, bfloat16 or float16, got {dtype}")
        if scheme == "int8-dynamic" and (device.type != "cpu" or should_reduce_range(device)):
            raise ValueError(f"{said} is for CPUs with 8-bit dot products (VNNI), which {device} is not; use 'int8'")
        if scheme == "int4" and device.type == "cuda":
            capability = torch.cuda.get_device_capability(device)
            if dtype != torch.bfloat16 or capability < (8, 0):
                raise ValueError(
                    f"{said} on CUDA needs dtype=bfloat16 and compute capability 8.0, got {dtype} and {capability}"
                )

    def takes(self, name: str, like: Tensor) -> bool:
        """Whether the parameter called ``name`` is quantised."""
        return name.startswith("layers.") and like.ndim > 1 and ".router." not in name

    def matrix(self, name: str, weight: Tensor) -> nn.Parameter:
        """``weight`` (out, in), of the parameter ``name``, as a parameter that ``F.linear`` multiplies with."""
        weight = weight.to(self.device, self.dtype)
        if self.scheme != "int4":
            on_cpu = DynamicInt8.of if self.scheme == "int8-dynamic" else lambda w: Int8OnCPU.from_hp(w, PerRow())
            made = on_cpu(weight) if self.device.type == "cpu" else Int8Tensor.from_hp(weight, PerRow())
            return nn.Parameter(made, requires_grad=False)
        group = next((size for size in GROUPS if weight.shape[1] % size == 0), None)
        if group is None or len(weight) % 16:
            raise ValueError(
                f"quantization='int4' needs inputs in groups of {GROUPS[-1]} and outputs in groups of 16, but {name} "
                f"is {tuple(weight.shape)}; use 'int8'"
            )
        kind = Int4OpaqueTensor if self.device.type == "cpu" else Int4TilePackedTo4dTensor
        return nn.Parameter(kind.from_hp(weight, [1, group]), requires_grad=False)

    def matrices(self, name: str, value: Tensor) -> list[nn.Parameter]:
        """The same of one matrix (out, in), or of each in a stack (experts, out, in)."""
        made = [self.matrix(name, part) for part in (value if value.ndim == 3 else value[None])]
        RELEASE(0)  # what was made lies between what was rounded, in pieces too small for the next matrix
        return made
