"""Policies by name: ``threshold:0.9``, or the folder, packaged name or hub id of a learned one; options may follow."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unmask.policies import dependence as dependence  # registers its rules
from unmask.policies import files
from unmask.policies.base import UnmaskingPolicy, Wrapper
from unmask.policies.heuristics import HEURISTICS as HEURISTICS
from unmask.policies.heuristics import Heuristic
from unmask.policies.options import USAGE, split_options, with_options
from unmask.policies.schedules import BlockSteps as BlockSteps  # which registers the rules of that module

if TYPE_CHECKING:
    from unmask.policies.pretrained import Pretrained

EDITING = {"llada2.1": "0.95,0.9,16", "diffusers": "0.7,0.5,16", "sglang": "0.5,0,16"}
"""Presets of "edit:M2T,T2T[,POST]": the numbers of LLaDA2.1's own code, of diffusers and of SGLang."""


def as_policy(policy: object) -> UnmaskingPolicy:
    """An :class:`UnmaskingPolicy` as it is, a name by :func:`make_policy`, any other object :class:`Adapted`.

    Raises TypeError for an object without a method ``decide``.
    """
    if isinstance(policy, UnmaskingPolicy):
        return policy
    if isinstance(policy, str):
        return make_policy(policy)
    if isinstance(policy, type) or not callable(getattr(policy, "decide", None)):
        raise TypeError(f"policy must be a name or an object with the policy interface, got {policy!r}")
    return Adapted(policy)


class Adapted(Wrapper):
    """Wraps an object that has ``decide`` and perhaps other parts of the interface, but does not derive from it."""

    decoding, bare = UnmaskingPolicy.decoding, UnmaskingPolicy.bare
    condition, captured_state = UnmaskingPolicy.condition, UnmaskingPolicy.captured_state

    def attach(self, model: Any) -> None:
        """Tells the object the model, if it asks for it."""
        if hasattr(self.inner, "attach"):
            self.inner.attach(model)

    @property
    def spec(self) -> str:
        return str(getattr(self.inner, "spec", type(self.inner).__name__))


def make_policy(spec: str) -> UnmaskingPolicy:
    """The policy that ``spec`` names.

    ``spec`` is a heuristic with its numbers, such as "threshold:0.9" or "klass:0.9,0.01" (see ``HEURISTICS``), or a
    learned policy: a local folder, a packaged name, or a hub id ("user/name"). Either may be followed by options:
    "threshold:0.9,hold-eos,window=8", see :mod:`unmask.policies.options`. "edit:M2T,T2T[,POST]" is
    "threshold:M2T,edit=T2T,post=POST", and ``EDITING`` has names for some of these numbers. Raises ValueError for an
    unknown name or wrong numbers, and the errors of :func:`load_policy`.
    """
    if not isinstance(spec, str):
        raise TypeError(f"policy: expected a str, got {type(spec).__name__}")
    base, options = split_options(written_out(spec))
    return with_options(bare_policy(base), options)


def written_out(spec: str) -> str:
    """A name that begins with "edit:" as the threshold with options that it stands for; others as they are."""
    name, _, rest = spec.partition(":")
    if name != "edit":
        return spec
    preset, comma, options = rest.partition(",")
    text = EDITING[preset] + comma + options if preset in EDITING else rest
    found = re.fullmatch(r"([^,=]+),([^,=]+)(?:,([\d.]+))?((?:,[^\d.].*)?)", text)
    if found is None:
        presets = " or ".join(f"edit:{name}" for name in EDITING)
        raise ValueError(f"policy {spec!r}: write edit:M2T,T2T[,POST], for instance edit:0.95,0.9, or {presets}")
    m2t, t2t, post, others = found.groups()
    return f"threshold:{m2t},edit={t2t}" + (f",post={post}" if post else "") + others


def bare_policy(spec: str) -> UnmaskingPolicy:
    """:func:`make_policy` for a name without options."""
    name, colon, numbers = spec.partition(":")
    if name in HEURISTICS:
        return HEURISTICS[name](*_parse(HEURISTICS[name], spec, numbers))
    is_place = os.sep in spec or "/" in spec or Path(spec).expanduser().is_dir()
    if not spec or (colon and not is_place):
        raise ValueError(_unknown(spec, name))
    try:
        return load_policy(spec)
    except FileNotFoundError:
        if is_place:
            raise
        raise ValueError(_unknown(spec, name)) from None


def load_policy(name: str | os.PathLike[str], device: str = "cpu", revision: str | None = None) -> Pretrained:
    """A learned policy of whatever kind; see :meth:`unmask.policies.pretrained.Pretrained.from_pretrained`."""
    from unmask.policies.learned import Policy
    from unmask.policies.set_policy import SetPolicy

    folder = files.resolve(name, revision)
    kind = SetPolicy if files.model_type(folder) == SetPolicy.model_type else Policy
    policy = kind.from_pretrained(folder, device)
    policy.source = os.fspath(name)
    return policy


def _parse(rule: type[Heuristic], spec: str, numbers: str) -> list[float]:
    values = []
    for text in numbers.split(",") if numbers else []:
        try:
            values.append(float(text))
        except ValueError:
            meant = _meant(text.strip(), USAGE.split(", "))
            hint = f"is no option.{meant}" if meant else "is not a number."
            raise ValueError(
                f"policy {spec!r}: {text!r} {hint} Write {rule.usage()}, for instance {rule.example()}, and any of "
                f"{USAGE} behind it"
            ) from None
    return values


def _meant(word: str, known: Iterable[str]) -> str:
    """The question whether the nearest of ``known`` was meant; "" if none is near."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {HEURISTICS[close[0]].example() if close[0] in HEURISTICS else close[0]}?" if close else ""


def _unknown(spec: str, name: str) -> str:
    _, _, option = spec.partition(",")
    hint = _meant(option, USAGE.split(", ")) if option else _meant(name, [*HEURISTICS, *files.packaged_policies()])
    known = ", ".join([*(rule.usage() for rule in HEURISTICS.values()), "edit:M2T,T2T[,POST]"])
    return (
        f"unknown policy {spec!r}.{hint} Known are {known}, and the folder, packaged name or hub id (user/name) of a "
        f"learned policy. Options follow a comma: {USAGE}."
    )
