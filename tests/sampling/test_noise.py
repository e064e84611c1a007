"""DiffusionGemma: upstream's generations step for step, any policy in its steps, and what it refuses."""

from __future__ import annotations

import copy
import functools
import json
import re
import shlex
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from unmask import Policy, PolicyConfig, Sampler, SamplerConfig, load_model, ops
from unmask.cli import main
from unmask.evaluation.evaluate import decode_problems
from unmask.integrations.transformers import generate
from unmask.models.diffusion_gemma import DiffusionGemma
from unmask.models.tokenizer import WordTokenizer
from unmask.policies import make_policy
from unmask.policies.base import Decision, Observation, UnmaskingPolicy
from unmask.tasks import Problem

transformers = pytest.importorskip("transformers", minversion="5.11")

FOLDER = Path(__file__).parent.parent / "golden" / "diffusion-gemma-tiny"
RUNS = json.loads((FOLDER / "golden_generate.json").read_text())["runs"]
CANVAS = 16
PROMPTS = [RUNS[0]["prompt"], RUNS[4]["prompt"], RUNS[12]["prompt"]]  # 3, 16 and 21 tokens


class Spy(UnmaskingPolicy):
    """Decides as another policy and keeps what it saw and said, before the step changes it."""

    def __init__(self, name: str | UnmaskingPolicy) -> None:
        self.inner = make_policy(name) if isinstance(name, str) else name
        self.num_confidences, self.needs = self.inner.num_confidences, self.inner.needs
        self.seen: list[dict[str, Any]] = []
        self.said: list[Tensor] = []

    def decide(self, observation: Observation) -> Decision:
        self.seen.append({k: v.clone() if isinstance(v, Tensor) else v for k, v in vars(observation).items()})
        decision = self.inner.decide(observation)
        self.said.append(decision.select if decision.logits is None else decision.logits)
        return decision


@functools.cache
def loaded() -> Any:
    return load_model(FOLDER)


def sampler_for(policy: str | UnmaskingPolicy | None = None, eos: Any = None, **settings: Any) -> Sampler:
    """A Sampler of the tiny model with fields of its generation config changed."""
    own = copy.copy(loaded().model)  # shares the weights
    own.generation_config = copy.deepcopy(own.generation_config)
    model = DiffusionGemma(own, None if eos is None else tuple(eos) if isinstance(eos, list) else (eos,))
    for name, value in settings.items():
        assert hasattr(model.generation_config, name)
        setattr(model.generation_config, name, value)
    return Sampler(model, policy=policy)


def noted_steps(model: Any) -> list[tuple[Tensor, Any]]:
    """The canvas before each of the model's denoising steps, and its result."""
    steps: list[tuple[Tensor, Any]] = []
    denoise = model.model._denoising_step

    def noting(**arguments: Any) -> Any:
        before = arguments["current_canvas"].clone()
        steps.append((before, denoise(**arguments)))
        return steps[-1][1]

    model.model._denoising_step = noting
    return steps


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run['torch_seed']}-{len(run['steps'])}")
def test_reproduces_upstream_step_by_step(run: dict[str, Any]) -> None:
    settings = dict(run["settings"])
    spy = Spy(f"entropy-bound:{settings.pop('sampler_config', 0.5)}")
    length = settings.pop("max_new_tokens", 32)
    sampler = sampler_for(spy, settings.pop("eos_token_id", None), **settings)
    steps = noted_steps(sampler.model)
    out = sampler.generate([run["prompt"]], seed=run["torch_seed"], max_new_tokens=length)
    assert len(steps) == len(spy.said) == len(run["steps"])
    for (before, result), seen, accepted, expected in zip(steps, spy.seen, spy.said, run["steps"], strict=True):
        assert before[0].tolist() == expected["canvas"]
        assert seen["candidates"][0].tolist() == expected["sampled"]
        assert accepted[0].int().tolist() == expected["accepted"]
        assert result[0][0].tolist() == expected["next"]
        assert result[1][0].tolist() == expected["argmax"]
        assert float(seen["entropy"].mean()) == pytest.approx(expected["mean_entropy"], abs=1e-4)  # CPUs round
    # `finished` is one tensor for a canvas, changed in place: the last step of each canvas tells it.
    assert steps[-1][1][3].item() == run["steps"][-1]["finished"]
    sequence = run["sequence"] + [0] * (len(run["prompt"]) + length - len(run["sequence"]))
    assert out.sequences[0].tolist() == sequence
    assert out.forwards is not None
    assert out.steps.item() == out.forwards.item() == run["decoder_forwards"]
    assert out.tokens_per_forward.item() == pytest.approx(run["tokens_per_forward"], abs=1e-6)
    assert out.finished.all()


def test_our_rule_accepts_what_upstream_accepts() -> None:
    (run,) = [run for run in RUNS if run["trace_logits"]]
    logits, policy = load_file(FOLDER / "golden.safetensors")["trace_logits"], make_policy("entropy-bound:0.5")
    everything = torch.ones(1, CANVAS, dtype=torch.bool)
    for step, expected in zip(logits, run["steps"], strict=True):
        stats = ops.topk_confidence(step[None], 1, entropy=True)
        parts = (everything, everything, stats.confidence, stats.sample, stats.sample_confidence, torch.zeros(1).long())
        decision = policy.decide(Observation(*parts, CANVAS, CANVAS, entropy=stats.entropy))
        assert decision.select is not None
        assert decision.select[0].int().tolist() == expected["accepted"]


@pytest.mark.parametrize(("stops", "length", "seed"), [([319], 48, 1), ([225, 62, 67], CANVAS, 4)])
def test_a_batch_is_transformers_own(stops: list[int], length: int, seed: int) -> None:
    """Rows of different lengths and numbers of steps, against `generate` of transformers."""
    sampler = sampler_for("entropy-bound:0.5", eos=stops, confidence_threshold=1.3, stability_threshold=0)
    longest = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in PROMPTS])
    attention = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in PROMPTS])
    torch.manual_seed(seed)
    own = sampler.model.model.generate(ids, attention_mask=attention, eos_token_id=stops, max_new_tokens=length)
    out = sampler.generate(PROMPTS, seed=seed, max_new_tokens=length)
    assert torch.equal(out.sequences, own.sequences)
    assert torch.allclose(out.tokens_per_forward, own.tokens_per_forward)
    assert len(set(out.steps.tolist())) > 1
    assert (out.filled < length).any() == (length == CANVAS), "one of the cases stops early"
    arguments = {"attention_mask": attention, "eos_token_id": stops, "max_new_tokens": length}
    same = generate(sampler.model.model, ids, policy="entropy-bound:0.5", seed=seed, **arguments)
    assert torch.equal(same, out.sequences[:, : same.shape[1]])
    assert torch.equal(sampler.generate(ids, attention, seed=seed, max_new_tokens=length).sequences, out.sequences)


def test_rows_decoded_alone_are_seeded_by_their_number() -> None:
    sampler = sampler_for(max_denoising_steps=4)
    out = sampler.generate(PROMPTS, seed=7, max_batch_size=1, max_new_tokens=24)
    assert out.completions.shape == (3, 24)
    for i, prompt in enumerate(PROMPTS):
        alone = sampler.generate([prompt], seed=7 + i, max_new_tokens=24)
        assert torch.equal(out.completions[i], alone.completions[0])
        assert out.steps[i] == alone.steps[0]
    assert sampler.generate([], seed=1).steps.shape == (0,)


def test_what_a_policy_sees() -> None:
    spy = Spy("entropy-bound:0.5")
    spy.needs, spy.num_confidences = frozenset({"entropy", "logits"}), 2
    sampler = sampler_for(spy, eos=[225, 62, 67], stability_threshold=0, confidence_threshold=1.3)
    out = sampler.generate(PROMPTS, seed=2, max_new_tokens=48)
    steps, finished_rows = torch.zeros(3, dtype=torch.int64), 0
    for seen in spy.seen:
        running = seen["allowed"].any(dim=1)
        assert running.any(), "rows that have stopped do not keep the others waiting"
        assert torch.equal(seen["allowed"], running[:, None].expand(3, CANVAS))
        assert seen["mask"].all()
        assert (seen["length"], seen["block_length"], seen["horizon"]) == (CANVAS, CANVAS, 48)
        p = seen["logits"].softmax(dim=-1)
        chosen = p.gather(2, seen["candidates"][..., None]).squeeze(2)
        torch.testing.assert_close(seen["token_confidence"], chosen, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(seen["confidence"], p.topk(2).values, atol=1e-5, rtol=1e-4)
        assert torch.equal((seen["steps"] + seen["draw_step"])[running], steps[running])
        steps += running
        finished_rows += int((~running).sum())
    assert torch.equal(steps, out.steps)
    assert finished_rows > 0
    assert sum(bool((seen["steps"] == 0).all()) for seen in spy.seen) == 3, "steps begin anew in each canvas"


@pytest.mark.parametrize("actions", ["greedy", "bernoulli", "bernoulli-argmax", "dpls"])
def test_a_learned_policys_actions(actions: str) -> None:
    """Its logits become actions as everywhere: "greedy" accepts the positive ones, else the highest."""
    torch.manual_seed(1)
    policy = Policy(PolicyConfig(trained_block_length=8))  # which does not matter on canvases
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    spy = Spy(policy)
    sampler = sampler_for(spy, max_denoising_steps=6)
    assert sampler_for(policy).config.block_length == CANVAS
    steps = noted_steps(sampler.model)
    out = sampler.generate(PROMPTS[:2], seed=3, actions=actions, max_new_tokens=16)
    kept = [result[0] == seen["candidates"] for (_, result), seen in zip(steps, spy.seen, strict=True)]
    if actions == "greedy":
        for logits, same in zip(spy.said, kept, strict=True):
            best = torch.arange(CANVAS) == logits.argmax(dim=1, keepdim=True)
            assert same[(logits > 0) | best].all()
    shares = torch.stack(kept).float().mean(dim=(1, 2))
    assert (shares > 0).all() if actions != "bernoulli" else shares.max() > 0
    again = sampler.generate(PROMPTS[:2], seed=3, actions=actions, max_new_tokens=16)
    assert torch.equal(out.sequences, again.sequences)


@pytest.mark.parametrize(
    "policy", ["threshold:0.3", "factor:2", "entropy-threshold:1.2", "klass:0.3,0.5", "threshold:0.3,window=4"]
)
def test_rules_accept_in_place_of_upstreams(policy: str) -> None:
    spy = Spy(policy)
    out = sampler_for(spy, max_denoising_steps=8).generate(PROMPTS, seed=2)
    assert out.completions.shape == (3, 32)
    assert (out.completions >= 0).all()
    shares = torch.stack(spy.said).float().mean(dim=(1, 2))
    assert 0 < shares.mean() < 1
    if "window" in policy:
        assert not any(said[:, 4:].any() for said in spy.said)
    elif policy.startswith("threshold"):
        for seen, said in zip(spy.seen, spy.said, strict=True):
            above = (seen["token_confidence"] > 0.3) & seen["allowed"]
            assert torch.equal(said & above, above)


def test_stream_is_live_and_keeps_random_numbers_apart() -> None:
    sampler = sampler_for(eos=[47], max_denoising_steps=6)
    steps = noted_steps(sampler.model)
    want = sampler.generate(PROMPTS[:2], seed=3)
    torch.manual_seed(11)
    numbers = [torch.rand(1).item() for _ in range(100)]
    steps.clear()
    torch.manual_seed(11)
    drawn, last = [], None
    for count, event in enumerate(sampler.stream(PROMPTS[:2], seed=3), 1):
        assert len(steps) == count, "a step is shown before the next one is computed"
        drawn.append(torch.rand(1).item())
        shown, canvas = event.completions, (count > 6) * CANVAS
        assert (shown[event.rows, canvas : canvas + CANVAS] >= 0).all()
        for row, positions, tokens in zip(event.rows, event.positions, event.tokens, strict=True):
            assert tokens == shown[row, positions].tolist()
        last = event
    assert last is not None
    assert torch.equal(last.completions, want.completions)
    assert drawn == numbers[: len(drawn)]
    assert len(drawn) == len(steps) > 6


def test_a_stream_may_be_left_and_errors_come_out() -> None:
    sampler = sampler_for()
    steps = noted_steps(sampler.model)
    events = sampler.stream(PROMPTS, seed=3)
    next(events)
    events.close()
    assert len(steps) == 1

    class Broken(Spy):
        def decide(self, observation: Observation) -> Decision:
            if len(self.seen) == 2:
                raise RuntimeError("no decision")
            return super().decide(observation)

    with pytest.raises(RuntimeError, match="no decision"):
        sampler_for(Broken("threshold:0.5")).generate(PROMPTS)


def test_a_streamer_gets_canvases_and_drafts() -> None:
    text: list[list[int]] = []
    drafts: list[list[int]] = []
    ended: list[bool] = []
    listener = SimpleNamespace(
        put=lambda value: text.append(value.flatten().tolist()),
        put_draft=lambda value: drafts.append(value.flatten().tolist()),
        end=lambda: ended.append(True),
    )
    sampler = sampler_for(max_denoising_steps=6)
    out = sampler.generate([PROMPTS[1]], seed=3, streamer=listener, max_new_tokens=24)
    prompt, *parts = text
    assert prompt == PROMPTS[1]
    assert [len(part) for part in parts] == [CANVAS, 8]
    assert [token for part in parts for token in part] == out.completions[0].tolist()
    assert len(drafts) == out.steps.item() - 2, "none for a step that ends a canvas"
    assert {len(draft) for draft in drafts} == {CANVAS, 8}
    assert all(min(draft) >= 0 for draft in drafts)
    assert ended == [True]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a tokenizer that has a chat template."""
    folder = tmp_path_factory.mktemp("gemma")
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copy(FOLDER / name, folder)
    WordTokenizer.of_texts(f"w{i}" for i in range(317)).save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    template = "{% for m in messages %}w1 {{ m.content }} w2{% endfor %}"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    return folder


def test_from_pretrained_with_its_chat_template(checkpoint: Path) -> None:
    sampler = Sampler.from_pretrained(str(checkpoint), chat_template=True)
    assert sampler.policy.spec == "entropy-bound:0.5"
    assert (sampler.config.max_new_tokens, sampler.config.block_length) == (32, CANVAS)
    out = sampler.generate(["w5 w6", "w7"], seed=1)
    assert out.sequences[0, :4].tolist() == sampler.tokenizer.tokenizer.encode("w1 w5 w6 w2")
    assert out.texts == [sampler.tokenizer.decode(row) for row in out.completions.tolist()]


def test_commands(checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["generate", "w5 w6", "--model", str(checkpoint), "--seed", "1", "--policy", "threshold:0.5"]
    assert main([*command, "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["finished"]
    assert row["completion"].startswith("w") or row["completion"] == ""
    assert row["tokens_per_forward"] == pytest.approx(32 / row["steps"], rel=0.5)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main([*command, "--delay", "0", "--no-chat-template"]) == 0
    assert "tokens per forward" in capsys.readouterr().out
    assert main([*command, "--cache", "prefix"]) != 0
    assert "always caches" in capsys.readouterr().err


def test_the_page(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The documentation's Python runs, and its command, on the tiny model."""
    page = (Path(__file__).parents[2] / "docs" / "diffusion-gemma.md").read_text(encoding="utf-8")
    python, command = (re.findall(rf"^```{kind}\n(.*?)^```", page, re.DOTALL | re.M) for kind in ("python", "bash"))
    hub = "google/diffusiongemma-26B-A4B-it"
    for text in python:
        small = text.replace(hub, str(checkpoint)).replace('"cuda"', '"cpu"').replace("Why is the sky blue?", "w5 w6")
        exec(compile(small.replace("max_new_tokens=512", "max_new_tokens=32"), "page", "exec"), {})
    assert "tokens per forward" in capsys.readouterr().out
    words = shlex.split(command[-1].replace(hub, str(checkpoint)).replace("cuda", "cpu").replace("\\\n", ""))
    assert words.pop(0) == "unmask"
    assert main(["w5" if "?" in word else "32" if word == "512" else word for word in words]) == 0


def test_evaluation_counts_rows(checkpoint: Path) -> None:
    sampler, told = Sampler.from_pretrained(str(checkpoint)), []
    problems = [Problem(prompt=f"w{i} w5", answer="w1") for i in range(3)]
    config = sampler.settled({"seed": 1, "max_batch_size": 2})
    out = decode_problems(sampler, problems, config, on_finished=told.append)
    prompts = [p.prompt for p in problems]
    assert torch.equal(out.sequences, sampler.generate(prompts, seed=1, max_batch_size=2).sequences)
    assert told == sorted(told)
    assert (told[0], 2 in told, told[-1]) == (0, True, 3)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"temperature": 0.5}, "temperature=0.5 does not apply to DiffusionGemma.*generation_config"),
    ({"max_steps": 4}, "max_steps=4 does not apply"),
    ({"record": True}, "record=True does not apply"),
    ({"deterministic": True}, "deterministic=True does not apply"),
    ({"sub_block_length": 4}, "sub_block_length=4 does not apply"),
    ({"cache_refresh": 2}, "cache_refresh=2 does not apply"),
    ({"cache": "none"}, 'cache="none" does not apply'),
    ({"cache": "dual"}, 'cache="dual" does not apply'),
    ({"block_length": 32}, "canvas_length=16, got 32"),
    ({"cuda_graphs": True}, "cuda_graphs=True is not possible"),
    ({"max_new_tokens": 300}, "exceeds the model's context of 256"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=lambda value: str(value)[:24])
def test_settings_that_do_not_apply(settings: dict[str, Any], message: str) -> None:
    sampler = sampler_for()
    with pytest.raises(ValueError, match=message):
        sampler.generate(PROMPTS, **settings)
    with pytest.raises(ValueError, match=message):
        sampler.stream(PROMPTS, **settings)


def test_what_needs_masks_is_refused() -> None:
    sampler = sampler_for()
    with pytest.raises(ValueError, match="infill is not possible"):
        sampler.infill(torch.tensor([PROMPTS[0]]))
    for policy in ("confidence:8", "random:8", "block-steps:4,0.9", "threshold:0.9,edit=0.9,post=16"):
        with pytest.raises(ValueError, match=f"policy {policy} counts or edits filled masks"):
            sampler_for(policy).generate(PROMPTS)
    with pytest.raises(ValueError, match="at least one token"):
        sampler.generate([[]])
    with pytest.raises(ValueError, match="can only generate"):
        sampler.model(torch.tensor([PROMPTS[0]]))
    with pytest.raises(ValueError, match="canvas_length=16"):
        Sampler(sampler.model, config=SamplerConfig(block_length=32)).generate(PROMPTS)


def test_an_older_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", ModuleType("transformers"))
    with pytest.raises(ImportError, match=r"'diffusion_gemma' needs transformers >= 5\.11: pip install"):
        load_model(FOLDER)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"mask_token_id": 3}, "mask_token_id=3 was given, but diffusion_gemma has no mask token"),
        ({"block_length": 8}, "block_length=8 is not the canvas_length=16"),
        ({"logits_shift": 1}, "logits_shift is for remote code"),
        ({"causal_context": False}, "causal_context is for model_type"),
    ],
)
def test_overrides_that_do_not_apply(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_model(FOLDER, **overrides)
    assert load_model(FOLDER, block_length=CANVAS, eos_token_id=[5, 6]).stop_ids == (5, 6)
