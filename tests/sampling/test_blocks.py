"""Decoding models whose tokens see no later block: upstream's generations, exact caches, rows that do not interact."""

from __future__ import annotations

import json
from functools import cache as cached
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from unmask import Sampler, load_model
from unmask.models import Transformer
from unmask.models.transformer import TransformerConfig
from unmask.ops.unmask_ import REVISED
from unmask.policies import Policy, PolicyConfig
from unmask.sampling.blocks import BlockPlan
from unmask.sampling.result import GenerationResult
from unmask.tasks import make_task

GOLDEN = Path(__file__).parents[1] / "golden"
CACHES = ("none", "exact")
MASK, EOS = 36, 35


def golden(name: str) -> dict[str, Any]:
    return dict(json.loads((GOLDEN / name / "golden_generate.json").read_text()))


@cached
def loaded(name: str, eos: int | None = None, **overrides: Any) -> Transformer:
    model = load_model(GOLDEN / name, eos_token_id=eos, **overrides)
    assert isinstance(model, Transformer)
    return model


def complete(model: Any, policy: str, prompt: list[int], **settings: Any) -> tuple[list[int], int]:
    """The completion and its denoising forwards; block lengths other than the checkpoint's only warn."""
    result = Sampler(model, policy=policy).generate([prompt], **settings)
    return result.completions[0].tolist(), int(result.steps[0])


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", ["sdar-tiny", "sdar-moe-tiny"])
def test_sdar_generates_as_upstream(name: str, cache: str) -> None:
    """Every run. With as many steps as tokens, SDAR's dynamic rule is ours of a threshold."""
    data, model = golden(name), loaded(name)
    for run in data["runs"]:
        prompt, wanted, steps = run["prompt"], run["sequence"][len(run["prompt"]) :], run["denoising_steps"]
        dynamic = run["remasking_strategy"] == "low_confidence_dynamic"
        rule = "sequential" if run["remasking_strategy"] == "sequential" else "block-steps"
        policy = f"{rule}:{steps}" + (f",{run['confidence_threshold']}" if dynamic else "")
        if dynamic and steps == run["block_length"]:
            policy = f"threshold:{run['confidence_threshold']}"
        settings = {"max_new_tokens": run["gen_length"], "block_length": run["block_length"], "cache": cache}
        end = next((i for i, token in enumerate(wanted) if token in (run["stop"] or ())), run["gen_length"])
        out, taken = complete(model, policy, prompt, stop_at_eos=False, **settings)
        assert out[: end + 1] == wanted[: end + 1][: run["gen_length"]]
        if run["stop"] is None:
            assert taken == run["denoise_forwards"]


@pytest.mark.parametrize("cache", CACHES)
def test_llada2_generates_as_upstream(cache: str) -> None:
    """Every run. Without ``eos_early_stop`` upstream finishes the block; where we stop before, we save forwards."""
    for run in golden("llada2-tiny")["runs"]:
        model, early = loaded("llada2-tiny", run["eos_id"]), run["eos_early_stop"]
        settings = {"max_new_tokens": run["gen_length"], "block_length": run["block_length"], "cache": cache}
        steps = min(run["steps"], run["gen_length"] // run.get("minimal_topk", 1))
        policy = f"block-steps:{steps},{run['threshold']}"
        out, taken = complete(model, policy, run["prompt"], stop_at_eos=early, **settings)
        assert out[: len(run["output"])] == run["output"]
        if run["eos_id"] not in run["output"] and not early:
            assert taken == run["forwards"]
        elif early:  # an end of sequence behind the completion's end may stop the row, too
            assert run["forwards"] - 1 <= taken <= run["forwards"] or run["eos_id"] in run["output"]
            assert taken <= run["forwards"]


@pytest.mark.parametrize("cache", CACHES)
def test_llada21_edits_as_upstream(cache: str) -> None:
    """Every run: tokens, denoising forwards, and all forwards but those of blocks that nothing may edit."""
    data, spared = golden("llada21-tiny"), 0
    for run in data["runs"]:
        model = loaded("llada21-tiny", run["eos_id"])
        policy = f"threshold:{run['threshold']},{run['num_to_transfer']}"
        policy += f",edit={run['editing_threshold']},post={run['max_post_steps']}"
        settings = {"max_new_tokens": run["gen_length"], "block_length": run["block_length"], "cache": cache}
        early = run["eos_early_stop"]
        result = Sampler(model, policy=policy).generate([run["prompt"]], stop_at_eos=early, **settings)
        assert result.completions[0, : len(run["output"])].tolist() == run["output"]
        states = [state for block in run["blocks"] for state in block["states"][:-1]]
        assert int(result.steps[0]) == sum(data["mask_token_id"] in state for state in states)
        assert result.forwards is not None
        if run["editing_threshold"] < 1:
            assert int(result.forwards[0]) == run["forwards"]
        else:
            assert int(result.forwards[0]) == int(result.steps[0]) < run["forwards"]
            spared += 1
    assert spared > 3


@pytest.mark.parametrize("cache", CACHES)
def test_fast_dllm_generates_as_upstream(cache: str) -> None:
    for run in golden("fastdllm2-tiny")["runs"]:
        prompt, block = run["prompt"], run["block_size"]
        model = loaded("fastdllm2-tiny", run["stop_token"])
        room = len(prompt) // block * block + run["max_new_tokens"] - len(prompt)  # blocks count from the prompt's last
        settings = {"max_new_tokens": room, "block_length": block, "sub_block_length": run["small_block_size"]}
        out, steps = complete(model, f"threshold:{float(run['threshold'])}", prompt, cache=cache, **settings)
        wanted = run["sequence"][len(prompt) :][:room]  # without the seed of a block that is not decoded
        assert out[: len(wanted)] == wanted
        assert steps == run["denoise_forwards"]


@pytest.mark.parametrize("cache", CACHES)
def test_nemotron_generates_as_upstream(cache: str) -> None:
    """Upstream's count has one more forward per block, which rewrites its keys and gives the next seed."""
    for run in golden("nemotron-tiny")["runs"]:
        model = loaded("nemotron-tiny", run["eos_token_id"], causal_context=run["causal_context"])
        settings = {"max_new_tokens": run["max_new_tokens"], "block_length": run["block_length"], "cache": cache}
        policy = f"threshold:{1.0 if run['threshold'] is None else run['threshold']}"
        out, steps = complete(model, policy, run["prompt"], **settings)
        wanted = run["sequence"][len(run["prompt"]) :]
        assert out[: len(wanted)] == wanted
        assert steps == run["nfe"] - -(-len(wanted) // run["block_length"])


KINDS: dict[str, dict[str, Any]] = {
    "block-causal": {},
    "seeded": {"logits_shift": 1, "seeded": True},
    "causal-prefix": {"attention": "causal-prefix", "seeded": True},
    "bidirectional-prefix": {"attention": "bidirectional-prefix"},
}


@pytest.fixture(params=list(KINDS))
def model(request: pytest.FixtureRequest) -> Transformer:
    torch.manual_seed(0)
    sizes = {"vocab_size": 37, "hidden_size": 32, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "block_length": 4}
    rest = {"intermediate_size": 48, "mask_token_id": MASK, "eos_token_id": EOS, "max_position_embeddings": 256}
    kind = {"attention": "block-causal", "qk_norm": True, **KINDS[request.param]}
    net = Transformer(TransformerConfig(**{**sizes, **rest, **kind}))
    for p in net.parameters():
        p.data.normal_(0, 0.3) if p.ndim > 1 else p.data.uniform_(0.5, 1.5)
    return net.requires_grad_(False).eval()


def prompts(lengths: tuple[int, ...] = (7, 1, 16, 4, 9, 12, 3, 8)) -> list[list[int]]:
    """Prompts that end inside blocks, at their ends, and within the first."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, EOS, (n,), generator=generator).tolist() for n in lengths]


def random_policy(**config: Any) -> Policy:
    policy = Policy(PolicyConfig(**config)).requires_grad_(False)
    for p in policy.parameters():
        p += 0.1 * torch.randn_like(p)
    return policy


def same(a: GenerationResult, b: GenerationResult) -> bool:
    return torch.equal(a.completions, b.completions) and torch.equal(a.steps, b.steps)


@pytest.mark.parametrize(("block_length", "temperature"), [(4, 0.8), (8, 0.0)])
@pytest.mark.parametrize(
    "policy",
    ["threshold:0.3", "entropy-bound:1.5,hold-eos", "random:5", "klass:0.3,0.1", "threshold:0.3,edit=0.2,post=3"],
)
def test_cached_equals_uncached_alone_and_in_any_batch(
    model: Transformer, policy: str, block_length: int, temperature: float
) -> None:
    """Also when rows join and leave, when each is computed by itself, and when the host reads a step late."""
    sampler = Sampler(model, policy=policy)
    settings = {"max_new_tokens": 19, "block_length": block_length, "temperature": temperature, "seed": 5}
    plain = sampler.generate(prompts(), cache="none", **settings)
    assert not (plain.completions == MASK).any()
    assert plain.forwards is not None
    if "edit" in policy:
        assert (plain.forwards > plain.steps).any()
    elif not model.seeded:  # storing a block costs no forward
        assert torch.equal(plain.forwards, plain.steps)
    else:  # one more for each block that the prompt does not open
        assert (plain.forwards > plain.steps).any()
    assert plain.completions.shape == (8, 19)
    assert plain.sequences.shape == (8, 16 + 19)
    for how in ({}, {"max_batch_size": 3}, {"deterministic": True}, {"cache": "none", "deterministic": True}):
        assert same(sampler.generate(prompts(), **settings, **how), plain), how
    state = sampler.prepare(prompts(), None, sampler.settled(settings))
    for row, prompt in enumerate(prompts()):
        config = sampler.settled(settings)
        alone = sampler.prepare([prompt], None, config, sequence=state.sequence[row : row + 1])
        assert same(sampler.result(alone, config, sampler.steps(alone, config)), part(plain, row))


@pytest.mark.parametrize("context", ["block", "full"])
@pytest.mark.parametrize("actions", ["greedy", "bernoulli-argmax", "dpls"])
def test_learned_policies(model: Transformer, actions: str, context: Any) -> None:
    """What the other prompts need of the buffer does not matter to one that sees all of it."""
    torch.manual_seed(3)
    sampler = Sampler(model, policy=random_policy(context=context, num_confidences=3))
    given = prompts((1, 7, 16, 4, 9, 12, 3, 8))
    settings = {"max_new_tokens": 19, "block_length": 4, "actions": actions, "seed": 5}
    plain = sampler.generate(given, cache="none", **settings)
    assert not (plain.completions == MASK).any()
    for how in ({}, {"max_batch_size": 3}):
        assert same(sampler.generate(given, **settings, **how), plain), how
    assert same(sampler.generate(given[:1], **settings), part(plain, 0))


def test_recordings_replay_learned_policies(model: Transformer) -> None:
    """From a recording the policy computes the logits that it acted on, also in a row's first, shorter block."""
    torch.manual_seed(3)
    policy = Policy(PolicyConfig(context="block", num_confidences=3))
    settings = {"max_new_tokens": 19, "block_length": 4, "actions": "greedy", "record": True}
    t = Sampler(model, policy=policy).generate(prompts(), **settings).trajectory
    assert t is not None
    assert t.phase is not None
    row, step = t.active.nonzero(as_tuple=True)
    seen = (t.mask[row, step], t.confidence[row, step], t.time[step], None, t.allowed[row, step], 4, t.phase[row])
    logits = policy(*seen).masked_fill(~t.allowed[row, step], -torch.inf)
    best = torch.nn.functional.one_hot(logits.argmax(1), logits.shape[1]).bool()
    greedy = torch.where((logits > 0).any(1, keepdim=True), logits > 0, best)
    assert torch.isfinite(logits[t.allowed[row, step]]).all()
    assert torch.equal(greedy, t.actions[row, step])


def test_the_packaged_block_model_solves_its_task() -> None:
    """Cached, in one batch; the same alone."""
    sampler, task = Sampler.from_pretrained("tiny-blocks", policy="threshold:0.9"), make_task("hops")
    problems = task.problems(64, 5)
    result = sampler.generate([problem.prompt for problem in problems])
    assert sampler.model.attention == "block-causal"
    assert sum(task.grade(p, text) for p, text in zip(problems, result.texts or [], strict=True)) >= 0.9 * 64
    assert result.forwards is not None
    assert torch.equal(result.forwards, result.steps)
    assert result.steps.float().mean() < 9
    assert sampler.generate(problems[3].prompt).texts == result.texts[3:4]


def part(result: GenerationResult, row: int) -> GenerationResult:
    one = slice(row, row + 1)
    return GenerationResult(
        result.sequences[one], result.completions[one], result.steps[one], result.finished[one], result.filled[one]
    )


@pytest.mark.parametrize("size", [None, 3])
def test_a_host_that_reads_late_changes_nothing(
    model: Transformer, size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = Sampler(model, policy="threshold:0.3")
    settings = {"max_new_tokens": 19, "block_length": 4, "max_batch_size": size}
    plain = sampler.generate(prompts(), **settings)
    create = BlockPlan.__init__
    monkeypatch.setattr(BlockPlan, "__init__", lambda self, model, config, _: create(self, model, config, True))
    assert same(sampler.generate(prompts(), **settings), plain)


def test_a_forward_computes_the_active_block_and_what_is_not_stored(
    model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One prompt of 9 tokens: two blocks are prefilled without logits, and each block is stored once."""
    calls: list[tuple[int, bool]] = []
    run = Transformer.forward_window

    def spy(self: Transformer, ids: Tensor, attention: Tensor | None, window: Any, outputs: Any, horizon: Any) -> Any:
        calls.append((int((window.computed < ids.shape[1]).sum()), outputs is not None))
        return run(self, ids, attention, window, outputs, horizon)

    monkeypatch.setattr(Transformer, "forward_window", spy)
    result = Sampler(model, policy="threshold:1.0").generate(prompts((9,)), max_new_tokens=8, block_length=4)
    sizes = [size for size, with_logits in calls if with_logits]
    prefill = [size for size, with_logits in calls if not with_logits]
    if model.attention == "block-causal":
        assert prefill == [8]
        assert int(result.steps[0]) == (11 if not model.seeded else 9)  # three blocks hold 11 new tokens
        assert sizes == ([4] * 3 + [8] + [4] * 3 + [8] + [4] * 3 if not model.seeded else [4] * 11)
    elif model.seeded:
        assert (prefill, int(result.steps[0]), sizes) == ([5], 6, [4] * 8)
    else:
        assert (prefill, int(result.steps[0]), sizes) == ([9], 8, [4] * 4 + [8] + [4] * 3)


def test_infill_of_blocks_that_skip(model: Transformer) -> None:
    ids = torch.tensor([prompts((26,))[0], prompts((26, 26))[1]])
    ids[0, [2, 13, 14]], ids[1, 20:24] = MASK, MASK
    sampler = Sampler(model, policy="threshold:0.3")
    if model.seeded:
        with pytest.raises(ValueError, match="infill is not possible"):
            sampler.infill(ids, block_length=4)
        return
    exact, plain = (sampler.infill(ids, block_length=4, cache=cache) for cache in ("exact", "none"))
    assert same(exact, plain)
    assert torch.equal(exact.completions[ids != MASK], ids[ids != MASK])


def test_the_surplus_of_the_last_block_is_decoded_and_cut(model: Transformer) -> None:
    sampler = Sampler(model, policy="threshold:0.3")
    whole = sampler.generate(prompts((6,)), max_new_tokens=10 if model.attention == "block-causal" else 12)
    cut = sampler.generate(prompts((6,)), max_new_tokens=9)
    assert torch.equal(cut.completions[0], whole.completions[0, :9])
    assert int(cut.steps[0]) == int(whole.steps[0])


@pytest.mark.parametrize("scope", ["block", "all"])
@pytest.mark.parametrize("name", ["sdar-tiny", "llada-tiny"])
def test_a_stream_shows_revisions_and_sends_only_what_is_settled(name: str, scope: str) -> None:
    model = loaded(name)
    sampler = Sampler(model, policy=f"threshold:0.1,edit=0.05,post=4,scope={scope}")
    settings = {"max_new_tokens": 27, "block_length": 8, "stop_at_eos": False}
    if scope == "all" and model.attention != "bidirectional":
        with pytest.raises(ValueError, match="scope=all"):
            sampler.generate([[1, 2, 3]], **settings)
        return
    prompt = [5, 9, 2, 7, 11]
    result = sampler.generate([prompt], **settings)
    buffer, revisions = [model.mask_token_id] * 27, 0
    for event in sampler.stream([prompt], **settings):
        now = event.completions[0].tolist()
        different = {i for i in range(27) if now[i] != buffer[i]}
        assert different == set(event.positions[0]) | set(event.revised[0])
        assert all(buffer[i] == model.mask_token_id for i in event.positions[0])
        assert all(buffer[i] != model.mask_token_id for i in event.revised[0])
        buffer, revisions = now, revisions + len(event.revised[0])
    assert buffer == result.completions[0].tolist()
    assert event.finished == [True]
    assert revisions > 3
    trajectory = sampler.generate([prompt], record=True, **settings).trajectory
    assert trajectory is not None
    assert int((trajectory.rank == REVISED).sum()) == revisions
    assert int(trajectory.actions.sum()) == 27
    assert result.forwards is not None
    assert int(trajectory.active.sum()) == int(result.forwards[0]) > int(result.steps[0])

    class Text:
        sent: list[int] = []

        def put(self, value: Tensor) -> None:
            self.sent = self.sent + value.flatten().tolist()

        def end(self) -> None:
            pass

    text = Text()
    sampler.generate([prompt], streamer=text, **settings)
    assert text.sent == prompt + buffer[: next((i + 1 for i, t in enumerate(buffer) if t in model.stop_ids), 27)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cache": "prefix"}, 'cache="prefix" is for bidirectional models'),
        ({"block_length": None}, "block_length=None is one block for all"),
        ({"block_length": 8, "sub_block_length": 3}, "sub_block_length must divide block_length=8, got 3"),
        ({"max_new_tokens": 300}, "exceeds the model's context of 256"),
    ],
)
def test_bad_settings_are_named(model: Transformer, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampler(model, policy="threshold:0.3").generate([[1, 2]], **settings)


def test_another_block_length_than_the_checkpoints_warns() -> None:
    sampler = Sampler(loaded("sdar-tiny"), policy="threshold:0.9")
    assert sampler.config.block_length == 4
    with pytest.warns(UserWarning, match="block_length=8, but the checkpoint was trained on blocks of 4"):
        sampler.generate([[1, 2]], max_new_tokens=4, block_length=8)


@pytest.mark.parametrize("settings", [{"cache": "exact"}, {"sub_block_length": 4}])
def test_settings_of_block_models_are_refused_elsewhere(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(settings))}.* is for models whose tokens see no later block"):
        Sampler.from_pretrained("tiny").generate("cEaCfBeG:a=", **settings)
