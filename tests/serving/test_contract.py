"""What SGLang expects of an algorithm: progress, masks only, done one forward late; how it is found and configured."""

from __future__ import annotations

import logging
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine import Engine
from fresh_process import run_python
from serving_helpers import learned, make_algorithm, tiny
from sglang_modules import importable_sglang
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from unmask import Policy, PolicyConfig
from unmask.serving.sglang import REGISTRY, AfterImport, register

BLOCK, VOCAB, MASK = 8, 30, 29

POLICIES: list[dict[str, Any]] = [
    {"policy": "threshold:1"},
    {"policy": "threshold:0.1", "temperature": 1.0},
    {"policy": "factor:0"},
    {"policy": "entropy-bound:0"},
    {"policy": "entropy-threshold:0"},
    {"policy": "klass:0.2,0.5"},
    {"policy": "random:2", "max_new_tokens": 16},
    {"policy": "margin:16", "max_new_tokens": 16},
    {"policy": "learned", "actions": "bernoulli-argmax", "policy_scale": 0.01, "max_new_tokens": 16},
    {"policy": "learned", "actions": "greedy", "max_new_tokens": 16},
    {"policy": "learned", "actions": "dpls", "max_new_tokens": 16},
]


def named(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """``settings`` with "learned" replaced by a policy saved in ``folder``."""
    if settings["policy"] != "learned":
        return settings
    learned(folder)
    return settings | {"policy": str(folder)}


def make_batch(tokens: Tensor, names: str = "abcdefghijklmnop", end: int = BLOCK, **more: Any) -> SimpleNamespace:
    rows = tokens.shape[0]
    values = {
        "batch_size": rows,
        "input_ids": tokens.flatten(),
        "rids": list(names[:rows]),
        "seq_lens_cpu": torch.full((rows,), end),
        "dllm_prompt_mask": None,
    }
    return SimpleNamespace(**(values | more))


@pytest.mark.parametrize("settings", POLICIES, ids=lambda s: s["policy"])
def test_every_step_unmasks_at_least_one_and_only_masks(sglang: str, tmp_path: Path, settings: dict[str, Any]) -> None:
    algorithm = make_algorithm(named(settings, tmp_path), fdfo=True, mask=MASK)
    tokens = torch.randint(0, MASK, (6, BLOCK))
    masked = torch.rand(6, BLOCK) < 0.7
    masked[0], masked[1] = True, False  # a fresh block, and one that is full already
    tokens[masked] = MASK
    batch = make_batch(tokens)
    states = algorithm.init_step_state(batch)
    for _ in range(BLOCK + 1):
        before = tokens.clone()
        logits = torch.randn(6 * BLOCK, VOCAB) * 2
        logits[:, MASK] = 50.0  # the mask token must never be chosen
        done = algorithm.step(batch, logits, states)
        left = before == MASK
        assert done == (~left.any(dim=1)).tolist()
        assert torch.equal(tokens[~left], before[~left])
        assert ((tokens != MASK) & left).any(dim=1).tolist() == left.any(dim=1).tolist()
        if all(done):
            break
    assert all(done)
    assert batch.input_ids.data_ptr() == tokens.data_ptr()


def test_done_one_forward_after_the_block_has_filled(sglang: str) -> None:
    algorithm = make_algorithm({"policy": "threshold:0.9"}, fdfo=True, mask=MASK)
    batch = make_batch(torch.full((1, BLOCK), MASK))
    states = algorithm.init_step_state(batch)
    certain = torch.zeros(BLOCK, VOCAB)
    certain[torch.arange(BLOCK), torch.arange(BLOCK)] = 30.0
    assert algorithm.step(batch, certain, states) == [False]
    assert batch.input_ids.tolist() == list(range(BLOCK))
    assert algorithm.step(batch, torch.zeros(BLOCK, VOCAB), states) == [True]
    assert batch.input_ids.tolist() == list(range(BLOCK))
    assert states[0].total == 1  # the forward that only fills the cache is no step


def test_mask_tokens_of_a_prompt_are_left_alone(sglang: str, fdfo: bool) -> None:
    """SGLang then says which positions are the prompt's."""
    prompt = [5, 2, 6, 7, 8, 2, 9, 4, 3, 2, 6]
    assert tiny().mask_token_id == 2
    engine = Engine(make_algorithm({"policy": "threshold:0.9"}, fdfo), tiny())
    served = engine.run([prompt], 13)[0]  # the engine asserts that blocks come back with their prompt as it was
    assert 2 not in served.completion
    assert len(served.completion) == 13
    tokens = torch.full((1, BLOCK), 2)
    batch = make_batch(tokens, dllm_prompt_mask=torch.arange(BLOCK)[None] < 5)
    algorithm = engine.algorithm
    assert algorithm.step(batch, torch.randn(BLOCK, VOCAB), algorithm.init_step_state(batch)) == [False]
    assert tokens[0, :5].tolist() == [2] * 5
    assert (tokens[0, 5:] != 2).any()


def test_blocks_of_a_request_have_draws_of_their_own(sglang: str, tmp_path: Path) -> None:
    Policy(PolicyConfig(hidden_size=16, ffn_size=16, context="block", zero_time=True)).save_pretrained(tmp_path)
    algorithm = make_algorithm({"policy": str(tmp_path), "policy_scale": 4.0}, fdfo=True, mask=MASK)
    patterns = []
    for end in (BLOCK, 2 * BLOCK):
        tokens = torch.full((16, BLOCK), MASK)
        batch = make_batch(tokens, end=end)
        algorithm.step(batch, torch.zeros(16 * BLOCK, VOCAB), algorithm.init_step_state(batch))
        patterns.append(tokens != MASK)
    agree = (patterns[0] == patterns[1]).float().mean()
    assert 0.3 < agree < 0.7  # about one half for independent draws of probability one half


class OpCount(TorchDispatchMode):
    """Counts the operations that reach torch's dispatcher, and those that wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.ops = self.waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops += 1
        self.waits += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("settings", POLICIES, ids=lambda s: s["policy"])
def test_no_tensor_work_and_no_wait_per_row(
    sglang: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    """A step takes the same number of operations for 2 rows and for 12, in an old batch and in a new one."""
    reads: list[int] = []
    tolist = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda tensor: reads.append(tensor.numel()) or tolist(tensor))
    algorithm = make_algorithm(named(settings, tmp_path), fdfo=True, mask=MASK)

    def joined(rows: int) -> tuple[int, int]:
        veterans = make_batch(torch.full((rows // 2, BLOCK), MASK))
        states = algorithm.init_step_state(veterans)
        algorithm.step(veterans, torch.randn(rows // 2 * BLOCK, VOCAB), states)
        batch = make_batch(torch.full((rows, BLOCK), MASK))
        states = states + algorithm.init_step_state(batch)[rows // 2 :]
        logits = torch.randn(rows * BLOCK, VOCAB)
        # New rows of a remembering policy start from zeros, one operation each: once per block, not per step.
        algorithm.step(batch, logits, states)
        reads.clear()
        with OpCount() as counted:
            algorithm.step(batch, logits, states)
            algorithm.step(batch, logits, states[::-1])
        assert reads == [rows, rows]  # the answer, which the host has to wait for: once a step
        return counted.ops, counted.waits

    joined(2)  # whatever is prepared once
    few, many = joined(2), joined(12)
    assert few == many
    assert few[1] == 0


def test_undefined_logits_end_the_block_loudly_and_leave_other_rows_alone(
    sglang: str, caplog: pytest.LogCaptureFixture
) -> None:
    algorithm = make_algorithm({"policy": "threshold:0.9"}, fdfo=True, mask=MASK)
    batch = make_batch(torch.full((2, BLOCK), MASK))
    logits = torch.randn(2 * BLOCK, VOCAB)
    logits[:BLOCK, 3] = float("nan")
    states = algorithm.init_step_state(batch)
    with caplog.at_level(logging.ERROR):
        assert algorithm.step(batch, logits, states) == [True, False]
    assert "request a: the model's logits are undefined" in caplog.text
    assert batch.input_ids[:BLOCK].tolist() == [MASK] * BLOCK
    assert (batch.input_ids[BLOCK:] != MASK).any()
    assert [s.total for s in states] == [0, 1]


def test_steps_are_counted_over_the_blocks_of_a_request(sglang: str, fdfo: bool) -> None:
    algorithm = make_algorithm({"policy": "confidence:24", "max_new_tokens": 24}, fdfo)
    Engine(algorithm, tiny()).run([[5, 6, 7], [5] * 9], 20)
    latest = algorithm.block_step.progress._latest
    assert {name: (s.end, s.before, s.steps) for name, s in latest.items()} == {"0": (24, 13, 8), "1": (32, 15, 8)}


@pytest.mark.parametrize("policy", ["klass:0.6,0.5", "confidence:12", "learned"])
def test_in_inference_mode(sglang: str, fdfo: bool, tmp_path: Path, policy: str) -> None:
    """As SGLang's scheduler runs it, with an algorithm that was made outside of it."""
    settings = named({"policy": policy, "max_new_tokens": 24}, tmp_path)
    prompts = [[5, 6, 7], [5] * 9, [6, 7]]
    served = []
    for inference in (False, True):
        algorithm = make_algorithm(settings, fdfo)
        with torch.inference_mode(inference):
            served.append([r.completion for r in Engine(algorithm, tiny(), capacity=2).run(prompts, 20)])
    assert served[0] == served[1]


def test_an_empty_batch_is_no_problem(sglang: str) -> None:
    algorithm = make_algorithm({}, fdfo=True, mask=MASK)
    assert algorithm.step(make_batch(torch.zeros((0, BLOCK), dtype=torch.int64)), torch.zeros(0, VOCAB), []) == []


def test_a_forward_batch_of_another_sglang_is_refused(sglang: str) -> None:
    batch = make_batch(torch.full((2, BLOCK), MASK), rids=None)
    with pytest.raises(RuntimeError, match=r"rids and seq_lens_cpu of its 2 requests, as SGLang 0.5.23 makes them"):
        make_algorithm({}, fdfo=True, mask=MASK).init_step_state(batch)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"treshold": 0.9},
            ValueError,
            r"unknown keys of the algorithm config \['treshold'\]; known are policy, max_new_tokens",
        ),
        ({"policy": "treshold:0.9"}, ValueError, "unknown policy 'treshold:0.9'. Did you mean threshold:0.9"),
        ({"policy": "threshold:2"}, ValueError, "LAMBDA must be a number from 0 to 1, got 2.0"),
        ({"policy": 0.9}, TypeError, "policy: expected a str, got float"),
        ({"policy": "no/such/folder"}, FileNotFoundError, "no/such/folder"),
        ({"temperature": -1}, ValueError, "algorithm config: temperature must be at least 0, got -1"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1, got 0"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"actions": "greedy"}, ValueError, "actions means nothing to the policy 'threshold:0.9'"),
        ({"policy": "confidence:8"}, ValueError, "counts steps for the whole buffer: .* must set max_new_tokens"),
        (
            {"policy": "confidence:8", "max_new_tokens": 24},
            ValueError,
            "must be a multiple of the 3 blocks that max_new_tokens=24 has, got 8",
        ),
        ({"policy": "tiny-blocks", "max_new_tokens": 24}, ValueError, "policy 'tiny-blocks' has context=\"full\""),
        ({"policy": "learned"}, ValueError, "reads the time, steps taken / max_new_tokens: .* must set max_new_tokens"),
        ({"policy": "learned", "max_new_tokens": 24, "alpha": 1.0}, ValueError, "alpha=1.0 was given, but policy"),
        (
            {"policy": "learned", "max_new_tokens": 24, "actions": "bernoulli"},
            ValueError,
            "may unmask nothing in a step",
        ),
    ],
)
def test_bad_configurations_are_refused(
    sglang: str, tmp_path: Path, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    if "policy" in settings:
        settings = named(settings, tmp_path)
    with pytest.raises(error, match=message):
        make_algorithm(settings, fdfo=True, mask=MASK)


def test_a_policy_that_ignores_the_time_needs_no_length(sglang: str, tmp_path: Path) -> None:
    Policy(PolicyConfig(hidden_size=16, ffn_size=16, context="block", zero_time=True)).save_pretrained(tmp_path)
    make_algorithm({"policy": str(tmp_path)}, fdfo=True, mask=MASK)


def test_other_blocks_than_in_training_are_warned_of(
    sglang: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = named({"policy": "learned", "max_new_tokens": 32}, tmp_path)
    make_algorithm(settings, fdfo=True, mask=MASK)
    assert "trained on blocks" not in caplog.text
    make_algorithm(settings, fdfo=True, block=4, mask=MASK)
    assert "was trained on blocks of 8 tokens and will decode blocks of 4" in caplog.text


def server_args(config: Path | None) -> SimpleNamespace:
    return SimpleNamespace(
        dllm_algorithm="Unmask",
        dllm_algorithm_config=None if config is None else str(config),
        dllm_fdfo=True,
        max_running_requests=4,
        model_path="model",
        revision=None,
    )


def test_the_configuration_file_is_sglangs(sglang: str, tmp_path: Path) -> None:
    from sglang.srt.dllm.algorithm import get_algorithm_cls
    from sglang.srt.dllm.algorithm.base import DllmAlgorithm

    file = tmp_path / "unmask.yaml"
    file.write_text("policy: entropy-bound:0.1\nblock_size: 16\nmax_new_tokens: 64\nseed: 3\n")
    get_algorithm_cls("Unmask").configure_server_args(server_args(file))
    algorithm = DllmAlgorithm.from_server_args(server_args(file))
    step = algorithm.block_step
    assert (algorithm.block_size, algorithm.mask_id, algorithm.fdfo) == (16, 156895, True)
    assert (step.policy.spec, step.seed, step.config.sampling.max_new_tokens) == ("entropy-bound:0.1", 3, 64)
    plain = DllmAlgorithm.from_server_args(server_args(None)).block_step
    assert (plain.policy.spec, plain.block_length) == ("threshold:0.9", 32)


def test_a_bad_file_stops_the_launch(sglang: str, tmp_path: Path) -> None:
    from sglang.srt.dllm.algorithm import get_algorithm_cls

    file = tmp_path / "unmask.yaml"
    file.write_text("policy: confidence:8\n")
    with pytest.raises(ValueError, match="must set max_new_tokens"):
        get_algorithm_cls("Unmask").configure_server_args(server_args(file))


def test_registered_after_the_registry_was_imported(sglang: str) -> None:
    import sglang.srt.dllm.algorithm as registry

    del registry.algo_name_to_cls["Unmask"]
    register()
    assert registry.algo_name_to_cls["Unmask"].__name__ == "Unmask"


def test_registering_imports_nothing_and_leaves_no_trace() -> None:
    with importable_sglang("stub"):
        register()
        register()
        assert REGISTRY not in sys.modules
        assert sum(isinstance(finder, AfterImport) for finder in sys.meta_path) == 1
        import sglang.srt.dllm.algorithm as registry

        assert list(registry.algo_name_to_cls) == ["Unmask"]
        assert not any(isinstance(finder, AfterImport) for finder in sys.meta_path)
        assert registry.__spec__.loader is registry.__loader__
        assert type(registry.__loader__).__name__ == "SourceFileLoader"


def test_the_plugin_is_light() -> None:
    run = run_python(
        "from unmask.serving.sglang import register\nregister()\nimport sys\nprint('torch' in sys.modules)"
    )
    assert run.stdout.strip() == "False", run.stderr


def declared() -> EntryPoint:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    ((name, value),) = project["entry-points"]["sglang.srt.plugins"].items()
    return EntryPoint(name, value, "sglang.srt.plugins")


def test_the_entry_point_names_the_plugin() -> None:
    assert declared().load() is register


def test_sglang_loads_the_plugin(sglang: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if sglang == "stub":
        pytest.skip("needs SGLang's own loader of plugins")
    import sglang.srt.plugins as plugins

    monkeypatch.setattr(plugins, "entry_points", lambda group: [e for e in [declared()] if e.group == group])
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, AfterImport)]
    plugins.load_plugins()
    from sglang.srt.dllm.algorithm import get_algorithm_cls

    assert get_algorithm_cls("Unmask").__name__ == "Unmask"
    assert get_algorithm_cls("LowConfidence").__name__ == "LowConfidence"


def test_threshold_agrees_with_sglangs_own(sglang: str) -> None:
    if sglang == "stub":
        pytest.skip("needs SGLang's LowConfidence")
    from sglang.srt.dllm.algorithm import get_algorithm
    from sglang.srt.dllm.config import DllmConfig

    theirs = get_algorithm(DllmConfig("LowConfidence", {"threshold": 0.6}, BLOCK, MASK, 16, True))
    ours = make_algorithm({"policy": "threshold:0.6"}, fdfo=True, mask=MASK)
    batches = [make_batch(torch.full((16, BLOCK), MASK)) for _ in range(2)]
    states = ours.init_step_state(batches[0])
    for _ in range(BLOCK + 1):
        logits = torch.randn(16 * BLOCK, VOCAB) * 4
        logits[:, MASK] = -50.0
        done = ours.step(batches[0], logits, states)
        assert done == theirs.step(batches[1], logits, [None] * 16)
        assert torch.equal(batches[0].input_ids, batches[1].input_ids)
    assert all(done)
