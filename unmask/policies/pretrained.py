"""What learned policies have in common: their files, their cards, and the way to the hub."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from typing_extensions import Self

from unmask.policies import files
from unmask.policies.base import UnmaskingPolicy
from unmask.policies.card import policy_card


class Pretrained(nn.Module, UnmaskingPolicy):
    """A policy with weights; it is made from its configuration."""

    config: Any
    config_type: ClassVar[type[Any]]
    model_type: ClassVar[str]
    """What the configuration file says."""
    learned = True
    source: str = ""
    """Where its weights are from, as it was asked for; "" for a fresh one and for one that is trained further."""

    @classmethod
    def from_pretrained(
        cls, name: str | os.PathLike[str], device: str | torch.device = "cpu", revision: str | None = None
    ) -> Self:
        """A policy from a local folder, a packaged name or a hub id, in our format or the published reference's.

        Raises FileNotFoundError for a missing policy or file, CheckpointError for one that is damaged or does not fit.
        """
        config, tensors = files.load(files.resolve(name, revision), cls)
        with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they are
            policy = cls(config)
        policy.load_state_dict(tensors)
        policy.source = os.fspath(name)
        return policy.to(device).eval()

    @classmethod
    def mean(cls, policies: Sequence[Self]) -> Self:
        """A policy with the mean of the weights of ``policies`` and the configuration of the first, without its curves.

        It is good for runs that began with the same weights (model soups, arXiv 2203.05482).
        Raises ValueError for none, or for weights of other names or shapes.
        """
        shapes = [{name: tuple(w.shape) for name, w in policy.state_dict().items()} for policy in policies]
        if not policies or any(shape != shapes[0] for shape in shapes):
            raise ValueError(f"policies must be one or more of one shape, got {list(policies)!r}")
        with torch.random.fork_rng(devices=[]):
            policy = cls(policies[0].config.updated({"calibration": ()}))
        each = [one.state_dict() for one in policies]
        means = {name: torch.stack([w[name].double() for w in each]).mean(0).to(each[0][name]) for name in each[0]}
        policy.load_state_dict(means)
        return policy.to(next(policies[0].parameters()).device).eval()

    @property
    def reads(self) -> str:
        """Its inputs, in words."""
        raise NotImplementedError

    @property
    def spec(self) -> str:
        return self.source or type(self).__name__

    def __repr__(self) -> str:
        count, place = sum(p.numel() for p in self.parameters()), f"from {self.source}" if self.source else "fresh"
        return f"{type(self).__name__} {place}: {count:,} parameters, reads {self.reads}; {self.config!r}"

    def save_pretrained(self, folder: str | os.PathLike[str], card: str | None = None) -> None:
        """Write ``config.json``, ``model.safetensors`` and, with ``card``, ``README.md`` to ``folder``."""
        files.save(folder, self)
        if card is not None:
            Path(folder, "README.md").write_text(card, encoding="utf-8")

    def card(self, repo_id: str, **details: Any) -> str:
        """A model card for the hub; ``details`` are those of :func:`unmask.policies.card.policy_card`."""
        return policy_card(self.config, repo_id, **details)

    def push_to_hub(
        self, repo_id: str, private: bool = False, commit_message: str = "Upload policy", **details: Any
    ) -> str:
        """Upload to the Hugging Face hub and return the commit's address.

        ``details`` are those of :meth:`card`. Raises ImportError without ``huggingface_hub``, ValueError for a detail
        that does not fit, before anything is uploaded.
        """
        try:
            from huggingface_hub import HfApi
        except ImportError as error:
            raise ImportError("push_to_hub needs huggingface_hub: `pip install huggingface_hub`") from error
        api, card = HfApi(), self.card(repo_id, **details)
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, card)
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message))
