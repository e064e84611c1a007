"""The algorithm for SGLang decodes as the Sampler does, keeps SGLang's contract."""

from __future__ import annotations

import json
import logging
from collections import Counter
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang_engine import BLOCK, MASK, VOCAB, Engine, Request, batch_of, learned, make_algorithm, named, tiny

from unmask import Sampler, SamplerConfig, load_model, load_tokenizer
from unmask.integrations.sglang.requests import BatchMemory, BlockState, Progress
from unmask.tasks import Hops

TOTAL = 40


@pytest.fixture(params=[True, False], ids=["fdfo", "sync"])
def fdfo(request: pytest.FixtureRequest) -> bool:
    """Both of SGLang's modes."""
    return request.param


@cache
def prompts() -> list[list[int]]:
    """Of whole blocks and of parts of one."""
    tokenizer = load_tokenizer("tiny")
    problems = Hops().problems(6, seed=7)
    return [tokenizer.encode(p.prompt)[-n:] for p, n in zip(problems, [3, 16, 8, 11, 17, 1], strict=True)]


def serve(settings: dict[str, Any], fdfo: bool, total: int = TOTAL, **engine: Any) -> list[Request]:
    requests = [Request(str(i), p[: total - 1], total) for i, p in enumerate(prompts())]
    Engine(make_algorithm(settings, fdfo, mask=tiny().mask_token_id), tiny(), **engine).run(requests)
    return requests


def nfe(request: Request) -> int:
    """Forwards that saw masks of this request."""
    return sum(tiny().mask_token_id in block for _, block in request.seen)


DRAWN = {"policy": "learned", "actions": "bernoulli-argmax", "policy_temperature": 1.5}
RULES = (
    *("threshold:0.9", "factor:1", "entropy-bound:0.1", "entropy-threshold:0.45", "margin:20", "confidence:20"),
    *("threshold:1", "entropy-bound:0"),  # one position in every step
)
EQUAL: list[tuple[dict[str, Any], dict[str, Any]]] = [
    *(({"policy": rule}, {}) for rule in RULES),
    ({"policy": "klass:0.2,0.5"}, {}),
    ({"policy": "threshold:0.5,hold-eos,window=4", "stop_ids": [tiny().eos_token_id]}, {}),
    ({"policy": "confidence:20,spacing=2,decay=0.1"}, {}),
    ({"policy": "threshold:0.5", "temperature": 0.8}, {}),
    ({"policy": "random:20", "temperature": 0.8}, {}),
    ({"policy": "threshold:0.5", "temperature": 0.8, "top_k": 3, "top_p": 0.7}, {}),
    ({"policy": "random:20,edit=0.1,post=2", "temperature": 0.8}, {}),  # every forward keys the draws
    (DRAWN, {}),
    (DRAWN | {"temperature": 0.5}, {"num_confidences": 3}),
    (DRAWN | {"alpha": 30.0}, {"alpha_conditioned": True}),
    (DRAWN | {"policy_scale": 0.01}, {}),  # draws nothing as a rule, and then takes one
    (DRAWN | {"actions": "greedy"}, {}),
    (DRAWN | {"actions": "dpls", "max_new_tokens": BLOCK}, {}),  # STOP's draw is keyed by where a buffer begins
]


@pytest.mark.parametrize(("settings", "config"), EQUAL)
def test_completions_forwards_and_draws_are_the_samplers(
    sglang: str, fdfo: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], config: Any
) -> None:
    """``Sampler.infill`` counts blocks and positions from the start of the sequence, as SGLang does."""
    monkeypatch.setattr(BlockState, "key", property(lambda state: int(state.request)))  # as Sampler keys a row
    settings = {"seed": 5, "max_new_tokens": TOTAL, **settings}
    total = settings["max_new_tokens"]
    policy = learned(**config) if settings["policy"] == "learned" else settings["policy"]
    decoding = {name: value for name, value in settings.items() if name not in ("policy", "max_new_tokens", "stop_ids")}
    sampler = Sampler(tiny(), None, policy, SamplerConfig(block_length=BLOCK, deterministic=True, **decoding))
    rows = [p[: total - 1] + [tiny().mask_token_id] * (total - len(p[: total - 1])) for p in prompts()]
    expected = sampler.infill(torch.tensor(rows))
    served = serve(named(settings, tmp_path, **config), fdfo, total)
    assert [r.tokens[:total] for r in served] == expected.sequences.tolist()
    assert [nfe(r) for r in served] == expected.steps.tolist()
    assert expected.steps.max() > total / BLOCK  # not just one forward a block


def test_the_time_is_steps_over_the_completions_length(sglang: str, fdfo: bool, tmp_path: Path) -> None:
    settings = named(DRAWN, tmp_path)
    short, long = ([nfe(r) for r in serve(settings | {"max_new_tokens": n}, fdfo)] for n in (TOTAL, 10 * TOTAL))
    assert short != long


@pytest.mark.parametrize(
    "policy", ["threshold:0.9", "confidence:15", "klass:0.6,0.5", "random:15", "random:15,edit=0.1,post=2", "learned"]
)
@pytest.mark.parametrize("mixed", [False, True], ids=["prompts-apart", "full-rows-among-others"])
def test_requests_that_join_and_leave_do_not_change_each_other(
    sglang: str, fdfo: bool, tmp_path: Path, policy: str, mixed: bool
) -> None:
    """Also in inference mode, as SGLang's scheduler runs it, with an algorithm that was made outside of it."""
    settings = named({"policy": policy, "max_new_tokens": TOTAL, "temperature": 0.7}, tmp_path)
    algorithm = make_algorithm(settings, fdfo, mask=tiny().mask_token_id)
    totals = [27, 24, 24, 35, 30, 2]

    def requests() -> list[Request]:
        return [Request(str(i), list(p), n) for i, (p, n) in enumerate(zip(prompts(), totals, strict=True))]

    crowded, alone = requests(), requests()
    with torch.inference_mode():
        Engine(algorithm, tiny(), capacity=3, mixed=mixed).run(crowded)
    for request in alone:
        Engine(make_algorithm(settings, fdfo, mask=tiny().mask_token_id), tiny()).run([request])
    assert [(r.tokens, nfe(r)) for r in crowded] == [(r.tokens, nfe(r)) for r in alone]
    assert len({nfe(r) for r in crowded}) > 2


def test_what_a_step_answers(sglang: str, caplog: pytest.LogCaptureFixture) -> None:
    """Undefined logits end the block, loudly; a full block was done before; others are, one forward after the last."""
    algorithm = make_algorithm({"policy": "threshold:0.9"})
    batch, logits = batch_of(3), torch.randn(3, BLOCK, VOCAB)
    logits[0, :, 3], logits[1, :, MASK] = float("nan"), 50.0  # the mask token must never be chosen
    full = torch.arange(BLOCK)
    tokens = batch.input_ids.view(3, BLOCK)
    tokens[2] = full
    states = algorithm.init_step_state(batch)
    for step in range(BLOCK + 1):
        with caplog.at_level(logging.ERROR):
            answer = algorithm.step(batch, logits.flatten(0, 1), states)
        left = int((tokens[1] == MASK).sum())
        assert answer == [True, step == BLOCK, True]
        assert left == max(0, BLOCK - 1 - step)
    assert "request a: the model's logits are undefined" in caplog.text
    assert tokens[0].tolist() == [MASK] * BLOCK
    assert tokens[2].tolist() == full.tolist()
    assert [state.steps for state in states] == [0, BLOCK, 0]


def test_what_a_step_answers_to_editing(sglang: str) -> None:
    """Nothing to change, then a spent budget, after which one forward stores; then a prompt, which nobody edits."""
    algorithm = make_algorithm({"policy": "threshold:0.5,edit=0.5,post=2"})
    batch = batch_of(3)
    tokens = batch.input_ids.view(3, BLOCK)
    tokens[2], tokens[:2, 0] = 7, 1  # and the first position of the others is a prompt's
    states = algorithm.init_step_state(batch)
    said = [(5, 5), (5, 6), (5, 7), (9, 8)]  # by each forward, in the first row and in the second
    for answer, kept, each in zip(
        ([False, False, True], [True, False, True], [True, False, True], [True, True, True]),
        ((5, 5), (5, 6), (5, 7), (5, 7)), said, strict=True,
    ):  # fmt: skip
        logits = torch.nn.functional.one_hot(torch.tensor([*each, 3]), VOCAB).float() * 20
        assert algorithm.step(batch, logits.repeat_interleave(BLOCK, dim=0), states) == answer
        assert tokens.tolist() == [[1] + [kept[0]] * 7, [1] + [kept[1]] * 7, [7] * 8]
    assert [(s.steps, s.forwards) for s in states] == [(1, 2), (1, 3), (0, 0)]
    assert algorithm.max_steps(BLOCK) == BLOCK + 3


GOLDEN = Path(__file__).parents[1] / "golden" / "llada21-tiny"


def test_golden_edits_forward_by_forward(sglang: str, fdfo: bool) -> None:
    """LLaDA2.1's generations: what every forward saw, and one that only stores after each block's last change."""
    data, stored, golden = json.loads((GOLDEN / "golden_generate.json").read_text()), 0, cache(load_model)
    for run in data["runs"][:: 1 if fdfo else 5]:
        policy = f"threshold:{run['threshold']},{run['num_to_transfer']}"
        policy += f",edit={run['editing_threshold']},post={run['max_post_steps']}"
        length, prompt = run["block_length"], run["prompt"]
        model = golden(GOLDEN, block_length=length)
        request = Request("a", list(prompt), run["blocks"][-1]["start"] + length)
        algorithm = make_algorithm({"policy": policy}, fdfo, length, data["mask_token_id"])
        Engine(algorithm, model).run([request])
        expected = []
        for block in run["blocks"]:
            *before, last = block["states"]
            stored += before[-1] != last
            expected += [(block["start"], s) for s in (before if before[-1] == last else [*before, last])]
        assert [(start, seen) for start, seen in request.seen if start + length > len(prompt)] == expected
    assert 0 < stored < sum(len(run["blocks"]) for run in data["runs"])


def asking(own: dict[str, Any] | None = None, **params: Any) -> Any:
    """A request as SGLang has it when nothing but ``params`` was asked for, on a server of the settings ``own``."""
    none = ("json_schema", "regex", "ebnf", "structural_tag", "sampling_seed", "watermark", "logit_bias", "beam_width")
    flags = ("return_logprob", "return_hidden_states", "return_sampling_mask", "custom_logit_processor")
    zero = ("min_p", "frequency_penalty", "presence_penalty", "min_new_tokens")
    plain = {"temperature": 1.0, "top_p": 1.0, "top_k": 1 << 30, "repetition_penalty": 1.0, **dict.fromkeys(zero, 0)}
    return SimpleNamespace(
        sampling_params=SimpleNamespace(**{**plain, **dict.fromkeys(none), **params}),
        dllm_config=SimpleNamespace(algorithm_config=own or {}),
        **{name: params.get(name, False) for name in flags},
    )


@pytest.mark.parametrize(
    ("own", "params", "named"),
    [
        ({}, {}, None),
        ({}, {"top_k": 1}, None),  # temperature 0
        ({"temperature": 0.7}, {"temperature": 0.7}, None),
        ({"temperature": 0.7}, {"top_k": 1}, "temperature=0"),
        ({}, {"temperature": 0.7, "top_p": 0.9}, "top_p=0.9, temperature=0.7"),
        ({}, {"top_k": 5}, "top_k=5"),
        ({"temperature": 0.7, "top_k": 5, "top_p": 0.9}, {"top_k": 5, "top_p": 0.9}, None),
        ({"temperature": 0.7, "top_k": 5, "top_p": 0.9}, {"top_k": 6, "top_p": 0.8}, "top_p=0.8, top_k=6"),
        ({}, {"sampling_seed": 0, "logit_bias": {"5": 1.0}}, "sampling_seed=0, logit_bias={'5': 1.0}"),
        ({}, {"regex": "a*", "return_logprob": True}, "regex='a*', return_logprob=True"),
    ],
)
def test_requests_that_cannot_be_honoured_are_refused(
    sglang: str, own: dict[str, Any], params: dict[str, Any], named: str | None
) -> None:
    error = type(make_algorithm({})).validate_request(asking(own, **params))
    assert (error is None) if named is None else error.startswith(f"{named}: not possible, as the algorithm config")


def test_mask_tokens_of_a_prompt_are_left_alone(sglang: str, fdfo: bool) -> None:
    """SGLang then says which positions are the prompt's."""
    mask = tiny().mask_token_id
    request = Request("a", [5, mask, 6, 7, 8, mask, 9, 4, 3, mask, 6], 24)
    Engine(make_algorithm({"policy": "threshold:0.9"}, fdfo, mask=mask), tiny()).run([request])
    assert [i for i, token in enumerate(request.tokens) if token == mask] == [1, 5, 9]


@pytest.mark.parametrize(
    "policy", ["threshold:0.9,edit=0.1", "entropy-bound:0", "klass:0.2,0.5", "random:2", "learned"]
)
def test_no_tensor_work_and_no_wait_per_row(sglang: str, tmp_path: Path, policy: str) -> None:
    """A step takes the same operations for 2 rows and for 12, in an old batch and in one in a new order."""
    algorithm = make_algorithm(named({"policy": policy, "max_new_tokens": 16, "temperature": 1.0}, tmp_path))

    def operations(rows: int) -> Counter[str]:
        batch, logits = batch_of(rows), torch.randn(rows * BLOCK, VOCAB)
        states = algorithm.init_step_state(batch)
        algorithm.step(batch, logits, states)
        with torch.profiler.profile() as profile:
            algorithm.step(batch, logits, states)
            algorithm.step(batch, logits, states[::-1])
        views = ("aten::select", "aten::as_strided", "aten::unsqueeze")  # they cost the device nothing
        return Counter(event.name for event in profile.events() if event.name not in views)

    operations(2)  # whatever is prepared once
    few, many = operations(2), operations(12)
    assert few == many
    assert few["unmask::unmask_"] == 2
    assert few["aten::item"] == few["aten::nonzero"] == 0  # the host waits for the answer alone


def test_batches_without_requests_and_of_another_sglang(sglang: str) -> None:
    algorithm = make_algorithm({})
    assert algorithm.step(batch_of(0), torch.zeros(0, VOCAB), []) == []
    batch = batch_of(2)
    batch.rids = None
    with pytest.raises(RuntimeError, match=r"rids and seq_lens_cpu of its 2 requests, as SGLang 0.5.23 makes them"):
        algorithm.init_step_state(batch)


@pytest.mark.parametrize(
    ("steps", "asked", "before"),
    [
        ([("a", 16, 3)], ("a", 24), 3),  # the next block continues the count
        ([("a", 16, 3), ("a", 24, 2)], ("a", 32), 5),
        ([("a", 16, 3), ("a", 24, 2)], ("a", 24), 3),  # a block begun again counts from its start
        ([("a", 16, 3)], ("b", 24), 0),
        ([("a", 24, 3)], ("a", 16), 0),  # an id used again is another request
        ([("a", 24, 3)], ("a", 40), 0),
        ([("a", 8, 1), ("b", 8, 1), ("a", 8, 1), ("c", 8, 1)], ("b", 16), 0),  # not heard of for longest: forgotten
        ([("a", 8, 1), ("b", 8, 1), ("a", 8, 1), ("c", 8, 1)], ("a", 16), 1),
    ],
)
def test_steps_of_earlier_blocks(steps: list[tuple[str, int, int]], asked: tuple[str, int], before: int) -> None:
    progress = Progress(8, capacity=2)
    for request, end, count in steps:
        state = progress.enter(request, end)
        progress.enter(request, 8)  # entering changes nothing
        progress.advance(state, count, 2 * count)
    assert progress.enter(*asked) == BlockState(*asked, before=before, before_post=before)


def test_keys_and_memory_are_a_requests_own() -> None:
    assert BlockState("request-1", 8).key == BlockState("request-1", 99).key == 2651162329
    assert len({BlockState(str(i), 8).key for i in range(1000)}) == 1000
    memory, (a, b, c) = BatchMemory(), (BlockState(name, 8) for name in "abc")
    batch = memory.gather([a, b])
    batch |= {"x": torch.tensor([1.0, 2.0]), "note": "not a tensor"}  # type: ignore[dict-item]
    memory.scatter()
    assert memory.gather([a, b]) is batch
    batch["x"].add_(10)
    memory.scatter()
    assert memory.gather([c, b])["x"].tolist() == [0.0, 12.0]
    memory.scatter()
    assert memory.gather([b, a, c])["x"].tolist() == [12.0, 11.0, 0.0]
