"""The algorithm for SGLang is found and configured as SGLang does it, and refuses what it cannot do."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fresh_process import run_python
from sglang_engine import BLOCK, MASK, VOCAB, batch_of, make_algorithm, named
from sglang_modules import VARIABLE, importable_sglang

from unmask.integrations.sglang import REGISTRY, RegistryFinder, register


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"policy": "threshold:0.9,hold-eos"}, ValueError, "holds back ends of sequence: set stop_ids"),
        ({"stop_ids": 3}, ValueError, "stop_ids: expected a list of ids of at least 0, got 3"),
        ({"policy": "dawn:0.9"}, ValueError, "reads the model's attention, which the engine does not give"),
        ({"treshold": 0.9}, ValueError, r"unknown keys.* \['treshold'\]; known .*are policy, max_new_tokens"),
        ({"policy": 0.9}, TypeError, "policy: expected a str, got float"),
        ({"temperature": -1}, ValueError, "algorithm config: .*temperature"),
        ({"top_p": 0.9}, ValueError, "algorithm config: top_p=0.9 says what is drawn from, but at temperature=0"),
        *(({name: 2}, ValueError, rf"\['{name}'\]") for name in ("repetition_penalty", "cfg_scale", "stop")),
        ({"actions": "greedy"}, ValueError, "policy 'threshold:0.9' has no use for actions"),
        (
            {"policy": "threshold:0.9,edit=0.9,scope=all"},
            ValueError,
            "blocks that the engine has finished, .* leave sc",
        ),
        ({"policy": "confidence:8"}, ValueError, "counts steps for the whole buffer: .* must set max_new_tokens"),
        ({"policy": "confidence:8", "max_new_tokens": 24}, ValueError, "a multiple of the 3 blocks of .*, got 8"),
        ({"policy": "tiny-blocks", "max_new_tokens": 24}, ValueError, "policy 'tiny-blocks' has context=\"full\""),
        ({"policy": "learned"}, ValueError, "reads the time, steps taken / max_new_tokens: .* must set max_new_tokens"),
        (
            {"policy": "learned", "max_new_tokens": 24, "alpha": 1.0},
            ValueError,
            "is not conditioned on alpha, got alpha=1.0",
        ),
        ({"policy": "learned", "max_new_tokens": 24, "actions": "bernoulli"}, ValueError, "may unmask nothing"),
    ],
)
def test_bad_configurations_are_refused(
    sglang: str, tmp_path: Path, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make_algorithm(named(settings, tmp_path))


def test_what_learned_policies_need_to_know(sglang: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = named({"policy": "learned", "max_new_tokens": 32}, tmp_path)
    make_algorithm(settings)
    assert "trained on blocks" not in caplog.text
    make_algorithm(settings, block=4)
    assert "was trained on blocks of 8 tokens and will decode blocks of 4" in caplog.text
    make_algorithm(named({"policy": "learned"}, tmp_path, zero_time=True))  # it needs no length


def test_the_configuration_file_is_sglangs(sglang: str, tmp_path: Path) -> None:
    from sglang.srt.dllm.algorithm import get_algorithm_cls
    from sglang.srt.dllm.algorithm.base import DllmAlgorithm

    file = tmp_path / "unmask.yaml"
    args = SimpleNamespace(
        dllm_algorithm="Unmask", dllm_algorithm_config=str(file), dllm_fdfo=True, max_running_requests=4,
        model_path="model", revision=None,
    )  # fmt: skip
    file.write_text("policy: entropy-bound:0.1\nblock_size: 16\nmax_new_tokens: 64\nseed: 3\n")
    get_algorithm_cls("Unmask").configure_server_args(args)
    assert args.sampling_defaults == "openai"
    algorithm = DllmAlgorithm.from_server_args(args)
    assert (algorithm.block_size, algorithm.mask_id, algorithm.fdfo) == (16, 156895, True)
    policy, sampling = algorithm.policy, algorithm.sampling
    assert (policy.spec, sampling.seed, sampling.max_new_tokens) == ("entropy-bound:0.1", 3, 64)
    file.write_text("policy: confidence:8\n")
    with pytest.raises(ValueError, match="must set max_new_tokens"):  # before the model is loaded
        get_algorithm_cls("Unmask").configure_server_args(args)
    args.dllm_algorithm_config = None
    plain = DllmAlgorithm.from_server_args(args)
    assert (plain.policy.spec, plain.block_size) == ("threshold:0.9", 32)


def declared() -> EntryPoint:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    ((name, value),) = project["entry-points"]["sglang.srt.plugins"].items()
    return EntryPoint(name, value, "sglang.srt.plugins")


def test_registering_imports_nothing_and_leaves_no_trace() -> None:
    assert declared().load() is register
    with importable_sglang("stub"):
        register()
        register()
        assert REGISTRY not in sys.modules
        assert sum(isinstance(finder, RegistryFinder) for finder in sys.meta_path) == 1
        import sglang.srt.dllm.algorithm as registry

        assert list(registry.algo_name_to_cls) == ["Unmask"]
        assert not any(isinstance(finder, RegistryFinder) for finder in sys.meta_path)
        registry.algo_name_to_cls.clear()
        register()  # after the registry was imported
        assert list(registry.algo_name_to_cls) == ["Unmask"]
    light = "from unmask.integrations.sglang import register\nregister()\nimport sys\nprint('torch' in sys.modules)"
    assert run_python(light).stdout.strip() == "False"


def test_sglang_loads_the_plugin_and_its_own_rules_agree(sglang: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if sglang == "stub":
        pytest.skip(f"needs the released package; see {VARIABLE}")
    import sglang.srt.plugins as plugins

    monkeypatch.setattr(plugins, "entry_points", lambda group: [e for e in [declared()] if e.group == group])
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, RegistryFinder)]
    plugins.load_plugins()
    from sglang.srt.dllm.algorithm import get_algorithm
    from sglang.srt.dllm.config import DllmConfig

    editing = {"threshold": 0.6, "edit_threshold": 0.6, "max_post_edit_steps": 3}
    for name, settings, policy in (
        ("LowConfidence", {"threshold": 0.6}, "threshold:0.6"),
        ("JointThreshold", editing, "threshold:0.6,edit=0.6,post=3"),
    ):
        theirs, ours = (
            get_algorithm(DllmConfig(name, settings, BLOCK, MASK, 16, True)),
            make_algorithm({"policy": policy}),
        )
        assert theirs.max_steps(BLOCK) == ours.max_steps(BLOCK)
        batches = [batch_of(16), batch_of(16)]
        both, done = [a.init_step_state(b) for a, b in zip((ours, theirs), batches, strict=True)], [False]
        logits = torch.randn(16 * BLOCK, VOCAB) * 4
        while not all(done):
            logits[::2] = torch.randn(8 * BLOCK, VOCAB) * 4  # half of them stay, so that some blocks end unchanged
            logits[:, MASK] = -50.0
            done = ours.step(batches[0], logits, both[0])
            assert done == theirs.step(batches[1], logits.clone(), both[1])
            assert torch.equal(batches[0].input_ids, batches[1].input_ids)
