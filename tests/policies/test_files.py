"""Policy checkpoints: both formats, round trips, and an error for everything that can be wrong with one."""

from __future__ import annotations

import json
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from unmask.policies import SetPolicy, files
from unmask.policies.calibration import Curve
from unmask.policies.config import PolicyConfig, SetPolicyConfig
from unmask.policies.files import CheckpointError
from unmask.policies.learned import Policy

GOLDEN = Path(__file__).parent.parent / "golden"


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A checkpoint of ours."""
    torch.manual_seed(0)
    Policy(PolicyConfig(hidden_size=32, ffn_size=48, alpha_conditioned=True)).save_pretrained(tmp_path / "own")
    return tmp_path / "own"


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A copy of a checkpoint in the published format, to be damaged."""
    shutil.copytree(GOLDEN / "policy-ref-top8", tmp_path / "published")
    return tmp_path / "published"


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def set_config(folder: Path, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    "config",
    [
        PolicyConfig(),
        PolicyConfig(
            num_confidences=3, hidden_size=48, num_heads=3, ffn_size=40, min_frequency=1.0, max_frequency=50.0
        ),
        PolicyConfig(alpha_conditioned=True, context="block", zero_time=True),
    ],
)
def test_round_trip(config: PolicyConfig, tmp_path: Path) -> None:
    torch.manual_seed(1)
    policy = Policy(config)
    policy.save_pretrained(tmp_path / "new" / "folder")
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == ["config.json", "model.safetensors"]
    state = torch.get_rng_state()
    again = Policy.from_pretrained(tmp_path / "new" / "folder")
    assert torch.equal(torch.get_rng_state(), state)
    assert again.config == config
    assert not again.training
    ours, theirs = policy.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_saving_over_an_older_checkpoint_and_from_bfloat16(own: Path) -> None:
    policy = Policy(PolicyConfig(hidden_size=16, num_heads=1, ffn_size=16)).bfloat16()
    policy.save_pretrained(own)
    again = Policy.from_pretrained(own)
    assert again.config == policy.config
    assert again.output_proj.weight.dtype == torch.float32
    assert torch.equal(again.output_proj.weight, policy.output_proj.weight.float())


def test_published_format_reads_sizes_from_the_tensors() -> None:
    for name, k in (("policy-ref", 1), ("policy-ref-top8", 8)):
        config, tensors = files.load(GOLDEN / name)
        assert config == PolicyConfig(num_confidences=k)
        assert not any("inv_freq" in name or "base_policy" in name for name in tensors)


def test_published_format_saved_in_ours(tmp_path: Path) -> None:
    policy = Policy.from_pretrained(GOLDEN / "policy-ref")
    policy.save_pretrained(tmp_path)
    assert "base_policy" not in str(list(load_file(tmp_path / "model.safetensors")))
    assert torch.equal(Policy.from_pretrained(tmp_path).packed_weights().packed, policy.packed_weights().packed)


def test_published_format_with_other_heads_and_without_the_buffer(published: Path) -> None:
    rewrite(published, lambda t: t.pop("base_policy.transformer_blocks.0.inv_freq"))
    assert files.load(published)[0].num_heads == 2
    set_config(published, num_heads=4)
    assert files.load(published)[0].num_heads == 4


def test_published_format_in_half_precision(published: Path) -> None:
    rewrite(published, lambda t: t.update({name: value.bfloat16() for name, value in t.items()}))
    _, tensors = files.load(published)
    assert all(t.dtype == torch.float32 for t in tensors.values())


PREFIX = "base_policy.transformer_blocks.0."
DAMAGE = {
    "missing tensor": (lambda t: t.pop(PREFIX + "q_proj.bias"), "missing tensors: transformer_blocks.0.q_proj.bias"),
    "no mask embedding": (lambda t: t.pop("base_policy.mask_embedding.weight"), "missing tensor base_policy.mask"),
    "extra tensor": (
        lambda t: t.update({"base_policy.extra.weight": torch.zeros(2)}), "unexpected tensors: extra.weight",
    ),
    "second block": (
        lambda t: t.update({"base_policy.transformer_blocks.1.norm1.weight": torch.zeros(2)}),
        "unexpected tensors: transformer_blocks.1.norm1.weight",
    ),
    "no prefix": (lambda t: t.update({"stray": torch.zeros(2)}), "without the prefix base_policy.: stray"),
    "shape": (
        lambda t: t.update({PREFIX + "k_proj.weight": torch.zeros(128, 64)}),
        r"transformer_blocks.0.k_proj.weight has shape \(128, 64\), expected \(128, 128\)",
    ),
    "one dimension": (
        lambda t: t.update({"base_policy.confidence_proj.weight": torch.zeros(128)}), "must have two dimensions",
    ),
    "nan": (lambda t: t[PREFIX + "norm2.weight"].fill_(float("nan")), "norm2.weight holds values that are not finite"),
    "integers": (
        lambda t: t.update({PREFIX + "norm2.weight": torch.ones(128, dtype=torch.int64)}), "is torch.int64, expected",
    ),
    "rotary base": (lambda t: t[PREFIX + "inv_freq"].mul_(1.01), "inv_freq is not that of a rotary embedding"),
    "rotary size": (lambda t: t.update({PREFIX + "inv_freq": torch.ones(16)}), "inv_freq has shape"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_published_checkpoints(damage: str, published: Path) -> None:
    change, message = DAMAGE[damage]
    rewrite(published, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        Policy.from_pretrained(published)
    assert str(published / "model.safetensors") in str(caught.value)


def test_damaged_own_checkpoints(own: Path) -> None:
    rewrite(own, lambda t: (t.pop("alpha_mlp.2.bias"), t.update(strange=torch.zeros(1))))
    with pytest.raises(CheckpointError, match=r"missing tensors: alpha_mlp.2.bias; unexpected tensors: strange"):
        Policy.from_pretrained(own)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"depth": 3}, r"unknown PolicyConfig fields \['depth'\]"),
        ({"hidden_size": 24}, "has shape"),
        ({"hidden_size": "wide"}, "hidden_size must be an integer, got 'wide'"),
        ({"context": "all"}, "context must be"),
        ({"format_version": 2}, "format_version must be 1, got 2"),
        ({"model_type": "bert"}, "model_type must be 'unmask-policy', got 'bert'"),
        ({"max_period": "long"}, r"config.json: "),
    ],
)
def test_wrong_own_configurations(values: dict, message: str, own: Path) -> None:
    set_config(own, **values)
    with pytest.raises(CheckpointError, match=message):
        Policy.from_pretrained(own)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"depth": 3}, r"unknown PolicyConfig fields \['depth'\]"),
        ({"hidden_size": 64}, r"hidden_size 64 \(tensors: 128\)"),
        ({"num_heads": 8}, "state num_heads in config.json"),
        ({"num_heads": 3}, "multiple of 2"),
    ],
)
def test_wrong_published_configurations(values: dict, message: str, published: Path) -> None:
    set_config(published, **values)
    with pytest.raises(CheckpointError, match=message):
        Policy.from_pretrained(published)


@pytest.mark.parametrize("keep", [0, 5, 200, 0.5, -1])
def test_truncated_weights(keep: float, own: Path) -> None:
    path = own / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if 0 < keep < 1 else keep])
    with pytest.raises(CheckpointError, match=r"model.safetensors: not a complete safetensors file"):
        Policy.from_pretrained(own)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "\xff\xfe"])
def test_configurations_that_are_not_json_objects(text: str, own: Path) -> None:
    (own / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Policy.from_pretrained(own)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_files(name: str, own: Path) -> None:
    (own / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name}: missing"):
        Policy.from_pretrained(own)


def test_names_that_lead_nowhere(tmp_path: Path) -> None:
    for name in ("no-such-policy", str(tmp_path / "nothing"), "./a/b/c", "..", ""):
        with pytest.raises(FileNotFoundError):
            Policy.from_pretrained(name)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        files.load(tmp_path / "nothing")


def fake_hub(monkeypatch: pytest.MonkeyPatch, **functions) -> None:
    module = types.ModuleType("huggingface_hub")
    for name, function in functions.items():
        setattr(module, name, function)
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)


def test_hub_ids_are_downloaded(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def snapshot_download(repo_id: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repo_id, revision, allow_patterns))
        return str(own)

    fake_hub(monkeypatch, snapshot_download=snapshot_download)
    assert Policy.from_pretrained("some.one/a-policy", revision="v1").config.hidden_size == 32
    assert asked == [("some.one/a-policy", "v1", ["config.json", "model.safetensors"])]


def test_hub_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(*_, **__) -> str:
        raise OSError("404 for you")

    fake_hub(monkeypatch, snapshot_download=snapshot_download)
    with pytest.raises(FileNotFoundError, match=r"'user/name': no such local folder, and not fetched.*404 for you"):
        Policy.from_pretrained("user/name")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="pip install huggingface_hub"):
        Policy.from_pretrained("user/name")
    with pytest.raises(ImportError, match="pip install huggingface_hub"):
        Policy().push_to_hub("user/name")


def test_push_to_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    calls = []

    class HfApi:
        def create_repo(self, repo_id: str, private: bool, exist_ok: bool) -> None:
            calls.append((repo_id, private, exist_ok))

        def upload_folder(self, repo_id: str, folder_path: str, commit_message: str) -> str:
            shutil.copytree(folder_path, tmp_path / "uploaded")
            return f"https://hub/{repo_id}/{commit_message}"

    card = hub.ModelCard
    fake_hub(monkeypatch, HfApi=HfApi, ModelCardData=hub.ModelCardData)
    policy = Policy(PolicyConfig(hidden_size=16, num_heads=1, ffn_size=16))
    with pytest.raises(ValueError, match="base_model must be a hub id"):
        policy.push_to_hub("user/name", base_model="not a model")
    assert calls == []
    place = policy.push_to_hub("user/name", private=True, commit_message="first", base_model="some/model")
    assert place == "https://hub/user/name/first"
    assert calls == [("user/name", True, True)]
    assert torch.equal(
        Policy.from_pretrained(tmp_path / "uploaded").packed_weights().packed, policy.packed_weights().packed
    )
    assert card.load(tmp_path / "uploaded" / "README.md").data.base_model == "some/model"


def test_a_packaged_name_wins_over_a_folder(tmp_path, monkeypatch):
    Policy(PolicyConfig(hidden_size=16, num_heads=2, ffn_size=16)).save_pretrained(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    assert Policy.from_pretrained("tiny").config.hidden_size == 64
    assert Policy.from_pretrained("./tiny").config.hidden_size == 16
    assert Policy.from_pretrained(Path("tiny")).config.hidden_size == 16


@pytest.mark.parametrize("config", [PolicyConfig(hidden_size=16, ffn_size=16), SetPolicyConfig(vocab_size=9)])
def test_the_mean_of_several(config: PolicyConfig | SetPolicyConfig) -> None:
    kind = Policy if isinstance(config, PolicyConfig) else SetPolicy
    curve = Curve(8, 0, 0.0, "", "", (0.1, 1.0), (4.0, 2.0))
    three = [kind(config.updated({"calibration": (curve,)})) for _ in range(3)]
    mean = kind.mean(three)
    for name, p in mean.named_parameters():
        each = torch.stack([one.get_parameter(name).detach() for one in three])
        assert torch.allclose(p, each.mean(0), atol=1e-6), name
    assert (mean.config, mean.source, mean.training) == (config, "", False)
    other = kind(config.updated({"hidden_size": 32}))
    for wrong in ([], [three[0], other]):
        with pytest.raises(ValueError, match="policies must be one or more of one shape"):
            kind.mean(wrong)
