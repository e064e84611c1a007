"""A decoder split over several devices, or with layers left on the disk, through accelerate's hooks."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch

from unmask.models.transformer import Transformer

DISK = "disk"
STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")
"""accelerate's strategies; "auto" is "balanced"."""

DeviceMap = str | int | torch.device | Mapping[str, str | int | torch.device]
"""One of :data:`STRATEGIES`, a device, or part of the model -> device; "disk" reads weights whenever they are used."""

Placement = dict[str, torch.device | str]
"""Every part of a decoder -> its device, or "disk"."""

CheckedDevice = Callable[[Any], torch.device]


def with_parts(device_map: DeviceMap | None) -> str | Mapping[str, Any] | None:
    """``device_map`` with a device of its own as that of the whole model."""
    if isinstance(device_map, str) and device_map not in STRATEGIES:
        with suppress(RuntimeError):  # no device; :func:`place` says what is known
            device_map = torch.device(device_map)
    if isinstance(device_map, (int, torch.device)):
        return {"": device_map}
    if not isinstance(device_map, (str, Mapping, type(None))):
        raise TypeError(f"device_map must be a strategy, a device or a mapping of parts to devices, got {device_map!r}")
    return device_map


def parts(model: Transformer) -> list[str]:
    """The parts that are placed as a whole."""
    return ["embed", "rotary", *(f"layers.{i}" for i in range(len(model.layers))), "final_norm", "lm_head"]


def place(
    model: Transformer, device_map: str | Mapping[str, Any], dtype: torch.dtype, checked_device: CheckedDevice
) -> Placement:
    """Where each part of ``model`` (on the meta device) goes.

    A key of a mapping stands for all parts below it ("" is everything, "layers" all layers); the longest match
    decides. Raises ValueError naming an unknown key, a part without a device, or an unknown strategy.
    """
    if isinstance(device_map, str):
        device_map = strategic(model, device_map, dtype)
    known = parts(model)
    for key in device_map:
        if key not in ("", "layers", *known):
            raise ValueError(
                f"device_map names {key!r}, which is no part of the model; parts are '', embed, layers, layers.0 to "
                f"layers.{len(model.layers) - 1}, final_norm and lm_head"
            )
    devices = {key: DISK if value == DISK else indexed(checked_device(value)) for key, value in device_map.items()}
    placed: Placement = {}
    for name in known:
        match = next(
            (key for key in (name, "layers" if name.startswith("layers.") else "", "") if key in devices), None
        )
        if match is None and name != "rotary":
            raise ValueError(f"device_map {dict(device_map)!r} says nothing about {name!r}")
        placed[name] = DISK if match is None else devices[match]
    if model.config.tie_embeddings:
        placed["lm_head"] = placed["embed"]
    placed["rotary"] = input_device(placed)  # computed from positions, so it is where the inputs are
    return placed


def indexed(device: torch.device) -> torch.device:
    """The device with its index, as tensors have it: "cuda" becomes "cuda:0"."""
    return torch.empty(0, device=device).device


def strategic(model: Transformer, strategy: str, dtype: torch.dtype) -> dict[str, Any]:
    """A device map that fills the devices of this machine, then the CPU's memory, then the disk."""
    if strategy not in STRATEGIES:
        raise ValueError(f"device_map must be a mapping or one of {', '.join(STRATEGIES)}, got {strategy!r}")
    accelerate = imported_accelerate()
    whole = {"no_split_module_classes": ["Block"], "dtype": dtype}
    if strategy == "sequential":
        memory = accelerate.utils.get_max_memory()
    else:
        memory = accelerate.utils.get_balanced_memory(model, low_zero=strategy == "balanced_low_0", **whole)
    return dict(accelerate.infer_auto_device_map(model, max_memory=memory, **whole))


def input_device(placed: Placement) -> torch.device:
    """The device of token ids and logits: the first that is not the CPU, else the CPU."""
    devices = [d for d in placed.values() if isinstance(d, torch.device)]
    return next((d for d in devices if d.type != "cpu"), torch.device("cpu"))


def dispatch(model: Transformer, placed: Placement, on_disk: Mapping[str, torch.Tensor]) -> None:
    """Attach hooks that move inputs and offloaded weights to the device where a part is computed.

    Parts on the disk are computed on the input device, and so are parts on the CPU if there are other devices.
    ``on_disk`` reads the parameters that were not loaded. A model computed on several devices supports no cache. A
    model on a single device gets no hooks.
    """
    if len(set(placed.values())) == 1:
        return
    main = input_device(placed)
    accelerate = imported_accelerate()
    devices = {name: device if device == DISK else str(device) for name, device in placed.items()}
    offloaded = ChainMap({n: p for n, p in model.state_dict().items() if p.device.type == "cpu"}, on_disk)  # type: ignore[arg-type]
    accelerate.dispatch_model(model, devices, main_device=str(main), state_dict=offloaded, offload_index={})
    computed = {main if d == DISK or (d.type == "cpu" and main.type != "cpu") else d for d in placed.values()}  # type: ignore[union-attr]
    model.supports_cache = len(computed) == 1
    model.input_device = main


def imported_accelerate() -> Any:
    """The library; ImportError says how to install it."""
    try:
        import accelerate
        import accelerate.utils
    except ImportError:
        raise ImportError('device_map needs accelerate: pip install "unmask[train]" or accelerate') from None
    return accelerate
