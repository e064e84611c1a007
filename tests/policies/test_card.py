"""Model cards: valid metadata, the rows that were given, and a snippet that runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from unmask import Policy, PolicyConfig, Sampler
from unmask.policies.card import policy_card

hub = pytest.importorskip("huggingface_hub")

ROW: dict[str, Any] = {
    "task": "hops", "policy": "mine", "block_length": 24, "length": 24, "accuracy": 0.75, "accuracy_se": 0.013,
    "nfe": 6.5, "nfe_se": 0.25, "tpf": 2.0, "tpf_se": 0.125, "alpha": None, "policy_scale": 1.0, "model": "tiny",
}  # fmt: skip


def snippet(card: str) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    return str(code)


def test_metadata_is_what_the_hub_reads() -> None:
    text = policy_card(
        PolicyConfig(), "user/name", "GSAI-ML/LLaDA-8B-Instruct", datasets=["openai/gsm8k"], license="mit"
    )
    data = hub.ModelCard(text).data.to_dict()
    assert data["library_name"] == "unmask"
    assert data["base_model"] == "GSAI-ML/LLaDA-8B-Instruct"
    assert data["license"] == "mit"
    assert data["pipeline_tag"] == "text-generation"
    assert data["datasets"] == ["openai/gsm8k"]
    assert {"unmask", "arxiv:2512.09106"} <= set(data["tags"])
    compile(snippet(text), "snippet", "exec")
    assert "apply_chat_template" in snippet(text)
    # The hub knows no packaged models, and would refuse the name.
    packaged = hub.ModelCard(policy_card(PolicyConfig(), "user/name", "tiny")).data.to_dict()
    assert "base_model" not in packaged
    assert "datasets" not in packaged


@pytest.mark.parametrize("name", ["tiny", "tiny-blocks"])
def test_the_snippet_runs_on_the_packaged_model(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = Policy.from_pretrained(name)
    policy.save_pretrained(tmp_path / "user" / "name", policy.card("user/name", base_model="tiny"))
    assert sorted(p.name for p in (tmp_path / "user" / "name").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    card = (tmp_path / "user" / "name" / "README.md").read_text()
    monkeypatch.chdir(tmp_path)  # there, user/name is a folder
    torch.manual_seed(3)
    exec(snippet(card), {})
    torch.manual_seed(3)
    expected = Sampler.from_pretrained("tiny", policy=name).generate("cEaCfBeGgD:a=")
    assert capsys.readouterr().out == f"{expected.texts[0]} {int(expected.steps[0])}\n"  # type: ignore[index]


def test_the_snippet_without_a_base_model_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Policy(PolicyConfig(hidden_size=16, num_heads=1)).save_pretrained(tmp_path / "user" / "name")
    monkeypatch.chdir(tmp_path)
    exec(snippet(policy_card(PolicyConfig(), "user/name")), {})
    assert "hidden_size=16" in capsys.readouterr().out


def test_what_the_policy_is() -> None:
    config = PolicyConfig(trained_block_length=8, context="block", num_confidences=4)
    text = policy_card(config, "user/name", "tiny", training={"alpha": 3.0, "iterations": 90})
    assert "| block length | 8 |" in text
    assert "| context | the active block |" in text
    assert "| alpha | 3.0, fixed in training |" in text
    assert "| confidences per position | 4 |" in text
    assert '"iterations": 90' in text
    assert "trained for blocks of 8 tokens" in text
    full = policy_card(PolicyConfig(trained_block_length=0, alpha_conditioned=True, default_alpha=2.0), "user/name")
    assert "| block length | full diffusion |" in full
    assert "| alpha | an input, 2 by default |" in full
    assert "## Training" not in full
    assert "## Results" not in full


def test_results_are_one_line_per_row() -> None:
    rows = [ROW, {**ROW, "policy": "threshold:0.9", "block_length": 8, "alpha": 2.0, "policy_scale": 1.5}]
    text = policy_card(PolicyConfig(), "user/name", "tiny", results=rows)
    assert "| task | policy | alpha | blocks | accuracy | NFE | TPF |" in text
    assert "| hops | `mine` |  | full | 0.750 ± 0.013 | 6.50 ± 0.25 | 2.00 ± 0.12 |" in text
    assert "| hops | `threshold:0.9` x 1.5 | 2 | 8 |" in text
    plain = policy_card(PolicyConfig(), "user/name", "tiny", results=[{k: v for k, v in ROW.items() if "_se" not in k}])
    assert "| hops | `mine` | full | 0.750 | 6.50 | 2.00 |" in plain


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"repo_id": "name"}, "repo_id must be \"user/name\", got 'name'"),
        ({"base_model": "/home/me/model"}, r"base_model must be a hub id .* got '/home/me/model'"),
        ({"base_model": "tinny"}, r"packaged model \(little.* got 'tinny'"),
        ({"results": [ROW, {"task": "hops"}]}, r"results\[1\] has no policy, block_length, length, accuracy, nfe, tpf"),
    ],
)
def test_bad_details_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        policy_card(PolicyConfig(), **{"repo_id": "user/name", **arguments})


def test_a_local_folder_is_no_base_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="base_model must be a hub id .* got 'runs/mine'"):
        policy_card(PolicyConfig(), "user/name", "runs/mine")


def test_labels_are_escaped_and_local_places_cut() -> None:
    rows = [{**ROW, "policy": name, "task": "a`|b"} for name in ("x|y\n# z", "`q`", "/home/me/runs/mine", "user/name")]
    training = {"task_options": {"path": "/home/me/gsm8k.jsonl"}, "expert": ["threshold:0.9", "../mine"], "alpha": 1.0}
    card = policy_card(PolicyConfig(), "user/name", results=rows, training=training)
    table = [line for line in card.splitlines() if line.startswith("| `` a`")]
    assert [line.split(" | ")[1] for line in table] == ["`x\\|y # z`", "`` `q` ``", "`mine`", "`user/name`"]
    assert all(line.startswith("| `` a`\\|b `` | ") for line in table)
    assert "/home" not in card
    assert '"path": "gsm8k.jsonl"' in card
    assert '"mine"' in card
