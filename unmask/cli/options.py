"""Options that several commands share."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal

from unmask.cli.parsing import Flag, options_of
from unmask.config import Config
from unmask.sampling.config import SamplerConfig
from unmask.training.config_files import parse_value
from unmask.training.progress import QUIET, clock

if TYPE_CHECKING:
    from unmask.sampling.sampler import Sampler


class Loading(Config):
    """The language model."""

    model: str = "little"
    """Packaged name, local folder or hub id."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, ..."""
    device_map: str | None = None
    """Split the model over devices: auto, balanced, ..., or {"": 0, "layers.31": "cpu"}; in place of --device."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """None: that of the weights."""
    quantization: Literal["int8", "int8-dynamic", "int4"] | None = None
    """Weights of the layers in few bits, through torchao; int8-dynamic, the fastest on a CPU, rounds tokens too."""
    trust_remote_code: Flag = False
    """Allow model code from the hub to run."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer. None: that beside the model."""

    def sampler(self, policy: str | None, overrides: Mapping[str, Any]) -> Sampler:
        """A Sampler for this model, its config with ``overrides``."""
        SamplerConfig().updated(overrides)  # what is wrong with them comes before the model
        import torch

        from unmask.sampling.sampler import Sampler

        sampler = Sampler.from_pretrained(
            self.model,
            policy=policy,
            device=self.device,
            dtype=getattr(torch, self.dtype) if self.dtype else None,
            trust_remote_code=self.trust_remote_code,
            revision=self.revision,
            tokenizer=self.tokenizer,
            device_map=None if self.device_map is None else parse_value(self.device_map),
            quantization=self.quantization,
        )
        sampler.config = sampler.config.updated(overrides)
        return sampler


class Prompting(Config):
    """How text prompts reach the model."""

    chat_template: bool | None = None
    """Put prompts as a user's messages in the tokenizer's chat template. None: where it has one and they are words."""
    system_prompt: str | None = None
    """Message before the user's, in the chat template."""


NAMES = [f.name for f in fields(SamplerConfig) if f.name != "record"]
DOC = "How the buffer is filled. What is left out is as the policy was trained or the model suggests, else the default."
if TYPE_CHECKING:

    class Decoding(Config): ...

    class EvaluatedDecoding(Config): ...
else:
    Decoding = options_of(SamplerConfig, DOC, NAMES)
    EvaluatedDecoding = options_of(
        SamplerConfig, DOC, [n for n in NAMES if n not in ("block_length", "num_return_sequences")]
    )
    """Of evaluations, whose regimes are block lengths, and which have samples of their own."""


def progress_bar(disable: bool = False) -> Any:
    """The progress of a command that takes long, on standard error: a task's name, a bar, how many of how many, the
    time left. Where standard error is no terminal, a line a minute says how far it is."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    class Shown(Progress):
        began = said = time.monotonic()

        def advance(self, task_id: Any, advance: float = 1) -> None:
            super().advance(task_id, advance)
            self.say()

        def update(self, task_id: Any, **values: Any) -> None:
            super().update(task_id, **values)
            self.say()

        def say(self) -> None:
            if self.disable or self.console.is_terminal or time.monotonic() - self.said < QUIET:
                return
            self.said = time.monotonic()
            parts = [f"{one.description} {one.completed:.0f}/{one.total:.0f}" for one in self.tasks if one.total]
            print(f"{'; '.join(parts)} after {clock(self.said - self.began)}", file=sys.stderr, flush=True)

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Shown(*columns, console=Console(stderr=True), transient=True, disable=disable)
