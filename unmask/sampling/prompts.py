"""Prompts in all accepted forms, encoded to one left-padded batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor


class Tokenizer(Protocol):
    """What the sampler needs of a tokenizer."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...


class ChatTokenizer:
    """A tokenizer that encodes a text as a user's message in its chat template, followed by the answer's start.

    All else is the tokenizer's own. A Sampler with this in place of the tokenizer gets prompts as messages;
    :func:`with_chat_template` decides. The system prompt also goes before messages that begin with none.
    """

    def __init__(self, tokenizer: Any, system_prompt: str | None = None) -> None:
        """Raises ValueError for a tokenizer without a chat template."""
        check_chat_template(tokenizer)
        self.tokenizer, self.system_prompt = tokenizer, system_prompt

    def messages(self, prompt: str | Messages) -> Messages:
        """``prompt``, a text being the user's message, after the system prompt if there is one."""
        said: Messages = getattr(prompt, "messages", [{"role": "user", "content": prompt}])
        messages = said if isinstance(prompt, str) else prompt
        if self.system_prompt is None or messages[0].get("role") == "system":
            return messages
        return [{"role": "system", "content": self.system_prompt}, *messages]

    def encode(self, text: str) -> list[int]:
        """Ids of the whole prompt. Raises ValueError if the template refuses it (some accept no system prompt)."""
        return chat_ids(self, self.messages(text))

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The tokenizer's own."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens))

    def __getattr__(self, name: str) -> Any:
        if name == "tokenizer":  # not set yet, as when unpickled
            raise AttributeError(name)
        return getattr(self.tokenizer, name)


def check_chat_template(tokenizer: Any) -> None:
    """Raise ValueError for a tokenizer without a chat template, or none at all."""
    if not getattr(tokenizer, "chat_template", None):
        what = "there is no tokenizer, and so" if tokenizer is None else f"the {type(tokenizer).__name__} has"
        raise ValueError(
            f"{what} no chat template, which messages and chat_template=True need: the model may not be made for "
            "instructions"
        )


def chat_ids(tokenizer: Any, messages: Messages) -> list[int]:
    """Ids of ``messages`` in the tokenizer's chat template, followed by the answer's start.

    Raises ValueError if there is no template or it refuses them.
    """
    check_chat_template(tokenizer)
    if isinstance(tokenizer, ChatTokenizer):
        messages = tokenizer.messages(messages)
    return list(templated(tokenizer, messages, add_generation_prompt=True, tokenize=True, return_dict=False))


def templated(tokenizer: Any, messages: Messages, **how: Any) -> Any:
    """``messages`` in the chat template; ValueError with the template's words if it refuses them."""
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, **how)
    except TemplateError as error:
        raise ValueError(f"the tokenizer's chat template refuses {messages!r}: {error}") from None


def end_of_turn(tokenizer: Any) -> int | None:
    """The special token by which the chat template ends an answer, such as <|im_end|>; None if there is none."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        said = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "goodbye"}]
        _, _, behind = str(templated(tokenizer, said, tokenize=False)).rpartition("goodbye")
    except ValueError:
        return None
    plain = tokenizer.tokenizer if isinstance(tokenizer, ChatTokenizer) else tokenizer
    known = getattr(plain, "added_tokens_decoder", {})
    return next((i for i in plain.encode(behind, add_special_tokens=False) if i in known and known[i].special), None)


def with_chat_template(
    tokenizer: Any, chat_template: bool | None, system_prompt: str | None = None, instructions: bool = True
) -> Any:
    """``tokenizer``, as a :class:`ChatTokenizer` if ``chat_template`` is True, else as it is.

    ``chat_template`` None: True if the tokenizer has a template and the prompts are ``instructions``. Raises
    ValueError if a template is asked for and there is none, or for a ``system_prompt`` without a template in use.
    """
    plain = tokenizer.tokenizer if isinstance(tokenizer, ChatTokenizer) else tokenizer
    if chat_template is None:
        chat_template = instructions and bool(getattr(plain, "chat_template", None))
    if chat_template:
        return ChatTokenizer(plain, system_prompt)
    if system_prompt is not None:
        raise ValueError(f"system_prompt={system_prompt!r} was given, but no chat template is in use to put it in")
    return plain


def describe_prompts(tokenizer: Any) -> str:
    """How ``tokenizer`` encodes prompts, for result rows; "" without a chat template."""
    if not isinstance(tokenizer, ChatTokenizer):
        return ""
    system = "" if tokenizer.system_prompt is None else f" system_prompt={tokenizer.system_prompt!r}"
    return f"chat_template=True{system}"


Messages = Sequence[Mapping[str, Any]]
"""A conversation: ``{"role": ..., "content": ...}`` for each message."""
Prompts = str | Messages | Sequence[int] | Sequence[str | Messages | Sequence[int]] | Tensor | Mapping[str, Any]


def encode_prompts(
    prompts: Prompts, attention_mask: Tensor | None, tokenizer: Tokenizer | None, pad_token_id: int
) -> tuple[Tensor, Tensor | None]:
    """Prompt ids (B, P) int64 on the CPU or where they came from, and attention (B, P) bool, None if nothing is padded.

    A mapping is what a tokenizer returns; its padding may be on either side. Raises TypeError or ValueError naming what
    is wrong with ``prompts`` or ``attention_mask``.
    """
    if isinstance(prompts, Tensor):
        return check_tensor_prompts(prompts, attention_mask, pad_token_id, "prompts")
    if attention_mask is not None:
        raise ValueError("attention_mask goes with tensor prompts; all others are padded here")
    if isinstance(prompts, Mapping):
        prompts = unpadded_rows(prompts)
    elif isinstance(prompts, str) or are_messages(prompts) or are_ids(prompts):
        prompts = [prompts]
    if not isinstance(prompts, Iterable) or isinstance(prompts, Set):  # a set has no order
        raise TypeError(
            "prompts must be a string, messages, token ids, a list of these, a tokenizer's output or an int64 "
            f"tensor (B, P), got {type(prompts).__name__}"
        )
    rows = [encode_one(i, prompt, tokenizer) for i, prompt in enumerate(prompts)]
    length = max((len(row) for row in rows), default=0)
    ids = torch.full((len(rows), length), pad_token_id, dtype=torch.int64)
    attention = torch.zeros((len(rows), length), dtype=torch.bool)
    for i, row in enumerate(rows):
        if row:
            ids[i, length - len(row) :] = torch.tensor(row, dtype=torch.int64)
            attention[i, length - len(row) :] = True
    return ids, None if bool(attention.all()) else attention


def unpadded_rows(encoding: Mapping[str, Any]) -> list[list[int]]:
    """The ids of each row of a tokenizer's output, without its padding."""
    columns = {name: as_lists(column) for name, column in encoding.items()}
    if "input_ids" not in columns or not columns.keys() <= {"input_ids", "attention_mask", "token_type_ids"}:
        raise TypeError(
            "prompts: a mapping must be a tokenizer's output, input_ids and perhaps attention_mask, got the keys "
            f"{list(columns)}; a message goes into a list"
        )
    ids, masks, types = (columns.get(name) for name in ("input_ids", "attention_mask", "token_type_ids"))
    if not ids or not isinstance(ids[0], list):
        ids, masks, types = [ids or []], masks and [masks], types and [types]
    masks = masks or [[1] * len(row) for row in ids]
    if [*map(len, masks)] != [*map(len, ids)] or any(m not in (sorted(m), sorted(m)[::-1]) for m in masks):
        raise ValueError("attention_mask must have a row per row of input_ids, zeros then ones or ones then zeros")
    if strange := [m for row in masks for m in row if m not in (0, 1)]:
        raise ValueError(f"attention_mask must be zeros and ones, got {strange[0]}")
    if any(map(any, types or ())):
        raise ValueError("token_type_ids must be 0: a prompt is one segment")
    return [[token for token, real in zip(*rows, strict=True) if real] for rows in zip(ids, masks, strict=True)]


def as_lists(value: Any) -> Any:
    """Tensors and arrays, also in a list, as Python's lists and numbers."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return [as_lists(one) for one in value] if isinstance(value, (list, tuple)) else value


def are_messages(prompt: Any) -> TypeGuard[Messages]:
    """Whether ``prompt`` is a conversation: a list of messages, which :func:`check_messages` checks."""
    is_list = isinstance(prompt, Sequence) and not isinstance(prompt, str) and len(prompt) > 0
    return is_list and all(isinstance(m, Mapping) for m in prompt)


def are_ids(prompt: Any) -> TypeGuard[Sequence[int]]:
    """Whether ``prompt`` is the token ids of one prompt."""
    listed = isinstance(prompt, (list, tuple, range)) and len(prompt) > 0
    return listed and all(hasattr(i, "__index__") and not isinstance(i, (bool, Tensor)) for i in prompt)


def check_messages(where: str, messages: Messages) -> None:
    """TypeError naming ``where`` they are, unless each has a role and a content."""
    for message in messages:
        if not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise TypeError(f"{where} must be messages with texts as role and content, got {message!r}")


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of ``text``; a BOS that the text already begins with, as in chat templates, is not doubled."""
    ids = list(tokenizer.encode(text))
    bos = getattr(tokenizer, "bos_token_id", None)
    return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids


def encode_one(index: int, prompt: Any, tokenizer: Tokenizer | None) -> list[int]:
    if isinstance(prompt, str):
        if tokenizer is None:
            raise TypeError(f"prompts[{index}] is a string, but the Sampler has no tokenizer; give one, or token ids")
        return text_ids(tokenizer, prompt)
    if are_messages(prompt):
        check_messages(f"prompts[{index}]", prompt)
        return chat_ids(tokenizer, prompt)
    ids = as_lists(prompt)
    if isinstance(ids, (list, tuple, range)) and all(hasattr(i, "__index__") and not isinstance(i, bool) for i in ids):
        ids = [int(i) for i in ids]
        if beyond := [i for i in ids if not -(2**63) <= i < 2**63]:
            raise ValueError(f"prompts[{index}] has {beyond[0]}, which is no token id")
        return ids
    raise TypeError(f"prompts[{index}] must be a string, messages or a list of token ids, got {type(prompt).__name__}")


def check_tensor_prompts(
    prompts: Tensor, attention_mask: Tensor | None, pad_token_id: int, name: str
) -> tuple[Tensor, Tensor | None]:
    """Ids (B, P) and attention as from :func:`encode_prompts`; errors call the ids ``name``."""
    if prompts.dtype != torch.int64 or prompts.ndim != 2:
        raise TypeError(f"{name} must be int64 of shape (B, P), got {prompts.dtype} {tuple(prompts.shape)}")
    if attention_mask is None:
        return prompts, None
    if not isinstance(attention_mask, Tensor):
        raise TypeError(f"attention_mask must be a tensor of shape (B, P), got {type(attention_mask).__name__}")
    if attention_mask.shape != prompts.shape:
        raise ValueError(
            f"attention_mask must have the shape of {name} {tuple(prompts.shape)}, got {tuple(attention_mask.shape)}"
        )
    attention = attention_mask.bool()
    if bool((attention != attention_mask).any()):
        raise ValueError("attention_mask must hold zeros and ones only, or be bool")
    if bool((attention[:, 1:] < attention[:, :-1]).any()):
        raise ValueError("attention_mask must be left-padded: zeros, then ones; a row has a one before a zero")
    if bool(attention.all()):
        return prompts, None
    # Ids under padding (-100, say) are never read, but they must be valid for the embedding.
    return prompts.masked_fill(~attention.to(prompts.device), pad_token_id), attention


def check_ids(name: str, ids: Tensor, attention: Tensor | None, vocab_size: int, mask_token_id: int | None) -> None:
    """Refuse ids outside the vocabulary and, unless ``mask_token_id`` is None, mask tokens in a prompt."""
    bad = (ids < 0) | (ids >= vocab_size)
    masked = torch.zeros_like(bad) if mask_token_id is None else ids == mask_token_id
    if attention is not None:  # padding is never read
        bad, masked = bad & attention, masked & attention
    if bool(bad.any()):
        row, column = bad.nonzero()[0].tolist()
        raise ValueError(
            f"{name}[{row}, {column}] is {int(ids[row, column])}, outside the vocabulary of {vocab_size} tokens"
        )
    if bool(masked.any()):
        row, column = masked.nonzero()[0].tolist()
        raise ValueError(
            f"{name}[{row}, {column}] is the mask token {mask_token_id}: a prompt has nothing to fill; "
            "use Sampler.infill for text with holes"
        )
