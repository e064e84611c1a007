"""The model "unmask" of lm-evaluation-harness. Importing this module registers it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from tqdm import tqdm

from unmask.config import PositiveInt, checked
from unmask.evaluation.metrics import mean, standard_error
from unmask.evaluation.processes import gather, join
from unmask.integrations.lm_eval.likelihood import loglikelihoods
from unmask.integrations.transformers.arguments import sampler_settings
from unmask.models.loading import load_model, load_tokenizer
from unmask.sampling.config import SamplerConfig
from unmask.sampling.forward import model_attention
from unmask.sampling.prompts import text_ids
from unmask.sampling.sampler import Sampler

logger = logging.getLogger("lm_eval.models.unmask")  # the harness shows its own alone

BATCHES_PER_CALL = 4
"""Requests go to the Sampler by the length of their prompts, so many batches at a time: rows that finish make room
for further ones, and no prompt is padded much."""

OTHERWISE = {"temperature", "top_k", "top_p", "stop", "num_return_sequences"}
OTHERWISE |= {"record", "stop_at_eos", "max_batch_size"}
"""Fields of SamplerConfig that the harness says by other means, or has no use for."""

NO_ROLLING = """loglikelihood_rolling: a masked diffusion model has no left-to-right likelihood of a document, and its
bound over windows would not compare with the perplexities of autoregressive models; leave out tasks of output_type
loglikelihood_rolling"""


@register_model("unmask")
class UnmaskLM(TemplateLM):
    """A masked diffusion language model decoded by a policy.

    ``--model_args`` takes the parameters below and every field of SamplerConfig but those in ``OTHERWISE``:
    ``pretrained=tiny,policy=threshold:0.9,block_length=8``.
    """

    def __init__(
        self,
        pretrained: str,
        policy: str | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str | None = None,
        trust_remote_code: bool = False,
        revision: str | None = None,
        tokenizer: str | None = None,
        mc_num: int = 128,
        mc_batch_size: int | None = None,
        check_greedy: bool = True,
        **settings: Any,
    ) -> None:
        """Load the model, its tokenizer and the policy.

        Args:
            pretrained: packaged name, folder or hub id.
            policy: as in :class:`Sampler`; one with a comma in quotes: ``policy="klass:0.9,0.01"``.
            batch_size: rows decoded side by side; a number.
            device: None or a CUDA device that is not there, for which the harness asks by default: what there is.
            tokenizer: folder or hub id, if it is not beside the model.
            mc_num: forwards of a log-likelihood's estimate.
            mc_batch_size: of these, how many side by side; ``batch_size`` by default.
            check_greedy: also decode every continuation greedily, a forward per token, for the ``is_greedy`` that some
                tasks score; False reports it as False.
            **settings: fields of SamplerConfig; "full" or None as ``block_length`` is full diffusion. The seed is that
                of torch, which the harness sets by ``--seed``, unless given.

        Raises:
            ValueError, TypeError: a bad value or an unknown name, before anything is loaded where that can be told.
        """
        super().__init__()
        self.batch_size, self.mc_num = positive("batch_size", batch_size), positive("mc_num", mc_num)
        self.mc_batch_size = positive("mc_batch_size", self.batch_size if mc_batch_size is None else mc_batch_size)
        self.check_greedy = check_greedy
        if refused := sorted(OTHERWISE & settings.keys()):
            raise ValueError(
                f"model_args has no {', '.join(refused)}; temperature, top_k, top_p and until (for stop) are the "
                "task's, in --gen_kwargs, and a number as batch_size is how many rows are decoded side by side"
            )
        settings = {"seed": torch.initial_seed() % 2**63, **settings, "max_batch_size": self.batch_size}
        SamplerConfig().updated(settings)
        self._rank, self._world_size = join()
        if not torch.cuda.is_available() and (device or "cuda").startswith("cuda"):
            logger.warning("no CUDA device for device=%s: using the CPU", device)
            device = "cpu"
        model = load_model(pretrained, device or "cuda", dtype, trust_remote_code, revision)
        self.tokenizer = load_tokenizer(tokenizer or pretrained, trust_remote_code, None if tokenizer else revision)
        self.sampler = Sampler(model, self.tokenizer, policy)
        # The length of a buffer is the request's; the one here is for requests that do not say.
        self.sampler.config = self.sampler.config.updated(settings)
        self._tokenizer_name, self._device = str(tokenizer or pretrained), model.device
        self.costs: dict[int, list[tuple[float, ...]]] = {self._rank: []}
        """Steps, tokens per forward and, if known, forwards of every generation, by the process that made it."""

    @property
    def tokenizer_name(self) -> str:
        """Part of the name under which the harness caches requests."""
        return self._tokenizer_name.replace("/", "__")

    @property
    def eot_token_id(self) -> int:
        eos = self.sampler.model.eos_token_id
        return self.sampler.padding_id if eos is None else eos

    @property
    def prefix_token_id(self) -> int:
        """What stands for an empty context."""
        bos = getattr(self.tokenizer, "bos_token_id", None)
        return self.eot_token_id if bos is None else int(bos)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_kwargs: Any) -> list[int]:
        """Ids of ``string``; one that begins with the tokenizer's BOS, as chat templates write it, gets no second."""
        if add_special_tokens is None or not hasattr(self.tokenizer, "all_special_ids"):
            return text_ids(self.tokenizer, string)
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """``chat_history`` as text; ValueError if the tokenizer has no template."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise ValueError(f"--apply_chat_template: the tokenizer of {self._tokenizer_name} has no chat template")
        how = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        return str(self.tokenizer.apply_chat_template(chat_history, tokenize=False, **how))

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The completion of each request's context, which ends before its first stop string.

        A request's draws are keyed by its document's number, whatever is decoded beside it.
        """
        if not requests:
            return []
        wanted = [self.request_settings(r.args[1]) for r in requests]
        whole = [self.tok_encode(r.args[0]) for r in requests]
        prompts = [self.cut(ids, settings["max_new_tokens"]) for ids, settings in zip(whole, wanted, strict=True)]
        if count := sum(a != b for a, b in zip(whole, prompts, strict=True)):
            logger.warning("%d of %d prompts were cut from the left to fit the model", count, len(prompts))
        sequences, extra = sequence_numbers(requests)
        texts: list[str] = [""] * len(requests)
        with tqdm(total=len(requests), desc="Unmasking", disable=disable_tqdm) as progress:
            for indices in self.chunks(prompts, wanted):
                config = self.sampler.settled(wanted[indices[0]])
                keys = torch.tensor([sequences[i] for i in indices])
                state = self.sampler.prepare([prompts[i] for i in indices], None, config, keys)
                result = self.sampler.result(state, config, self.sampler.steps(state, config))
                columns = (result.steps, result.tokens_per_forward, result.forwards)
                rows = list(zip(*(column.tolist() for column in columns if column is not None), strict=True))
                self.costs[self._rank] += [rows[n] for n, i in enumerate(indices) if not extra[i]]
                for i, text in zip(indices, result.texts or [], strict=True):
                    texts[i] = text
                    self.cache_hook.add_partial("generate_until", requests[i].args, texts[i])
                progress.update(len(indices))
        info = self.get_model_info()
        logger.info(
            "unmask: {generations} generations by {policy}, blocks of {block_length}: NFE {nfe:.2f} ± {nfe_se:.2f}, "
            "TPF {tpf:.2f} ± {tpf_se:.2f}".format(**info)
        )
        return texts

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The numbers of all processes, (count,) for one of each."""
        return torch.cat([value.cpu().reshape(-1) for value in gather(tensor)])

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """The objects of all processes on process ``dst``, None on the others; what they spent comes along."""
        objects, costs = zip(*gather((obj, self.costs[self._rank])), strict=True)
        self.costs |= dict(enumerate(costs))
        return list(objects) if self._rank == dst else None

    def barrier(self) -> None:
        """Nothing: processes wait where results are gathered, and one without requests does not come here."""

    def request_settings(self, gen_kwargs: dict[str, Any]) -> dict[str, Any]:
        """Fields of SamplerConfig that a request asks for; ValueError for what has no meaning here."""
        default = self.sampler.config.max_new_tokens
        given: dict[str, Any] = dict(normalize_gen_kwargs(gen_kwargs, default_max_gen_toks=default))
        until, length = given.pop("until"), given.pop("max_gen_toks")
        if not given["do_sample"]:
            given |= {"temperature": None, "top_k": None, "top_p": None}
        stops = tuple(text for text in until if text)
        return {**sampler_settings({**given, "max_new_tokens": length}), "stop": stops}

    def cut(self, context: list[int], behind: int) -> list[int]:
        """``context`` without what, on its left, leaves no room for ``behind`` more tokens; ValueError if it is all."""
        limit = self.sampler.model.max_length
        if limit is None:
            return context
        if behind >= limit:
            raise ValueError(f"{behind} tokens behind the prompt do not fit the model's context of {limit}")
        return context[max(0, len(context) + behind - limit) :]

    def chunks(self, prompts: Sequence[Sequence[int]], settings: Sequence[dict[str, Any]]) -> Iterator[list[int]]:
        """Indices of requests with equal settings, the longest prompts first, some batches at a time."""

        def key(i: int) -> str:
            return repr(sorted(settings[i].items()))

        order = sorted(range(len(prompts)), key=lambda i: (key(i), -len(prompts[i])))
        size = BATCHES_PER_CALL * self.batch_size
        for _, group in groupby(order, key):
            indices = list(group)
            yield from (indices[start : start + size] for start in range(0, len(indices), size))

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_kwargs: Any
    ) -> list[tuple[float, bool]]:
        results: list[tuple[float, bool]] = []
        model, size, seed = self.sampler.model, BATCHES_PER_CALL * self.batch_size, self.sampler.config.seed or 0
        blocks = self.blocks()
        with tqdm(total=len(requests), desc="Estimating likelihoods", disable=disable_tqdm) as progress:
            for start in range(0, len(requests), size):
                chunk = requests[start : start + size]
                pairs = [(self.cut(context, len(continuation)), continuation) for _, context, continuation in chunk]
                how = (self.sampler.padding_id, self.mc_num, self.mc_batch_size, seed, blocks)
                values = loglikelihoods(model, pairs, *how)
                greedy = self.is_greedy(pairs) if self.check_greedy else [False] * len(pairs)
                found = list(zip(values, greedy, strict=True))
                for (strings, _, _), answer in zip(chunk, found, strict=True):
                    self.cache_hook.add_partial("loglikelihood", strings, answer)
                results += found
                progress.update(len(chunk))
        return results

    def blocks(self) -> int | None:
        """Tokens per block of a block-causal model, None for a bidirectional one; ValueError without likelihoods."""
        model = self.sampler.model
        if model_attention(model) == "bidirectional":
            return None
        if model_attention(model) != "block-causal" or getattr(model, "seeded", False):
            raise ValueError(
                "loglikelihood: estimated for bidirectional and block-causal models, but blocks of this one, "
                f"{model_attention(model)}, begin with what the block before predicts, or where the prompt ends; leave "
                "out tasks of output_type loglikelihood and multiple_choice"
            )
        self.sampler.check_config(self.sampler.config)
        return self.sampler.config.block_length

    def is_greedy(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[bool]:
        """Whether decoding each context one token at a time, the most probable first, gives the continuation."""
        found = [True] * len(pairs)  # an empty continuation is what anything decodes to
        for length in {len(continuation) for _, continuation in pairs} - {0}:
            indices = [i for i, (_, continuation) in enumerate(pairs) if len(continuation) == length]
            config = SamplerConfig(max_new_tokens=length, block_length=self.blocks(), stop_at_eos=False, seed=0)
            sampler = Sampler(self.sampler.model, None, "threshold:1", config)
            result = sampler.generate([pairs[i][0] for i in indices], max_batch_size=self.batch_size)
            for i, completion in zip(indices, result.completions.tolist(), strict=True):
                found[i] = completion == pairs[i][1]
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError(NO_ROLLING)

    def get_model_info(self) -> dict[str, Any]:
        """What the harness adds to the "config" of its results: what was decoded so far, and at what cost."""
        info: dict[str, Any] = {
            "policy": self.sampler.policy.spec,
            "block_length": self.sampler.config.block_length or "full",
            "generations": sum(map(len, self.costs.values())),
        }
        columns = zip(*(row for rows in self.costs.values() for row in rows), strict=True)
        for name, values in zip(("nfe", "tpf", "forwards"), columns, strict=False):
            info |= {name: mean(values), f"{name}_se": standard_error(values)}
        return info


def positive(name: str, value: Any) -> int:
    """A number from the command line; ValueError for what is none, such as "auto"."""
    return int(checked(name, int(value) if str(value).isdecimal() else value, PositiveInt))


def sequence_numbers(requests: Sequence[Any]) -> tuple[list[int], list[bool]]:
    """What keys each request's draws: its document's number, apart for repeats of it, whichever requests there are; and
    whether it is one too many, by which the harness gives all processes the same number."""
    seen: Counter[tuple[int, str]] = Counter()
    times: Counter[int] = Counter()
    numbers, extra = [], []
    for request in requests:
        key = (request.doc_id or 0, request.args[0])
        numbers.append(key[0] + (seen[key] << 24))  # the generator reads 32 bits
        extra.append(times[id(request)] >= (getattr(request, "repeats", None) or 1))
        seen[key] += 1
        times[id(request)] += 1
    return numbers, extra
