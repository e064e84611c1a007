"""Means, standard errors, rows and tables."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from unmask import Policy, PolicyConfig, Sampler, SamplerConfig
from unmask.evaluation.evaluate import Evaluation, average_measures, evaluate, weights_digest
from unmask.evaluation.metrics import aup, mean, standard_error
from unmask.evaluation.results import aup_table, markdown, over_templates, read_csv, write_csv
from unmask.evaluation.sweep import FURTHER, Job, further, measure, variants
from unmask.policies import make_policy
from unmask.tasks import Hops, make_task

ROW = Evaluation(
    model="tiny",
    task="sums",
    policy="threshold:0.9",
    block_length=8,
    length=32,
    actions="bernoulli-argmax",
    problems=4,
    seed=0,
    accuracy=0.75,
    accuracy_se=0.25,
    nfe=5.5,
    nfe_se=0.5,
    tpf=2.0,
    tpf_se=0.125,
    seconds=1.5,
    measures={"reasons": 0.5},
)


def test_standard_error_by_hand() -> None:
    assert mean([1.0, 2.0, 6.0]) == 3.0
    # squared deviations 4 + 1 + 9 = 14; variance 14 / 2 = 7; over n = 3
    assert standard_error([1.0, 2.0, 6.0]) == pytest.approx(math.sqrt(7 / 3))
    assert math.isnan(standard_error([1.0]))
    assert math.isnan(mean([]))


def test_measures_average_over_the_problems_that_have_them() -> None:
    assert average_measures([{"a": 1.0}, {"a": 0.0, "b": 4.0}, {}]) == {"a": 0.5, "b": 4.0}


def test_rows_survive_a_csv_file(tmp_path: Path) -> None:
    dial = dataclasses.replace(ROW, policy="dial", learned=True, alpha=0.12345678, policy_scale=2.0, commit="abc")
    write_csv(tmp_path / "rows.csv", [ROW, dial])
    assert read_csv(tmp_path / "rows.csv") == [ROW, dial]
    assert [p.name for p in tmp_path.iterdir()] == ["rows.csv"]


def test_markdown_table() -> None:
    lines = markdown([ROW]).splitlines()
    assert lines[0] == "| policy | blocks | accuracy | NFE | TPF | reasons |"
    assert lines[2] == "| `threshold:0.9` | 8 | 0.750 ± 0.250 | 5.50 ± 0.50 | 2.00 ± 0.12 | 0.50 |"
    assert ROW.regime == "8"
    table = markdown([dataclasses.replace(ROW, policy="dial", alpha=3.0, policy_scale=0.5), ROW]).splitlines()
    assert table[0].startswith("| policy | alpha | blocks |")
    assert table[2].startswith("| `dial` x 0.5 | 3 | 8 |")
    assert table[3].startswith("| `threshold:0.9` |  | 8 |")


def test_forwards_that_only_revise_are_told_apart() -> None:
    rows = [dataclasses.replace(ROW, forwards=7.25), dataclasses.replace(ROW, forwards=None)]
    lines = markdown(rows).splitlines()
    assert lines[0] == "| policy | blocks | accuracy | NFE | all forwards | TPF | reasons |"
    assert "| 5.50 ± 0.50 | 7.25 | 2.00 ± 0.12 |" in lines[2]
    assert "| 5.50 ± 0.50 |  | 2.00 ± 0.12 |" in lines[3]
    sampler = Sampler.from_pretrained("tiny", "threshold:0.6,edit=0.6", config=SamplerConfig(24, 8, seed=0))
    row, result = evaluate(sampler, "hops", 5), sampler.generate([p.prompt for p in Hops().problems(5, 0)])
    assert result.forwards is not None
    assert row.forwards == pytest.approx(result.forwards.double().mean().item())
    assert row.forwards > row.nfe == result.steps.double().mean()
    assert "all forwards" not in markdown([dataclasses.replace(row, forwards=row.nfe)])


def test_aup_by_hand() -> None:
    assert aup([(2.0, 80.0)]) == pytest.approx(160.0)
    # W(72) = exp(-3 * 0.1); the point at 70 lies more than 5 below the first and goes.
    expected = 1.0 * 76 + (2.0 - 1.0) * (72 * math.exp(-0.3) + 76 * math.exp(-0.15)) / 2
    assert aup([(2.0, 72.0), (1.0, 76.0), (3.0, 70.0)], best=80.0) == pytest.approx(expected)
    with pytest.raises(ValueError, match="at least one point"):
        aup([])
    with pytest.raises(ValueError, match="best must be positive"):
        aup([(1.0, 0.0)])


def test_aup_table_ranks_families() -> None:
    better = dataclasses.replace(ROW, policy="dial:3", tpf=3.0)
    lines = aup_table([ROW, better]).splitlines()
    assert lines[2:] == ["| `dial` | 8 | 1 | 225.0 |", "| `threshold` | 8 | 1 | 150.0 |"]
    families = [dataclasses.replace(ROW, policy=name).family for name in ("tiny,hold-eos", "klass:0.9,0.01,window=4")]
    assert families == ["tiny,hold-eos", "klass,window=4"]


def test_sets_of_problems_are_averaged_before_the_area() -> None:
    rows = [dataclasses.replace(ROW, seed=seed, accuracy=0.7 + 0.1 * seed, tpf=2.0 + seed) for seed in (0, 1)]
    # one point: TPF 2.5, accuracy 75, weighed by the best row's 80 or not, as the first point of a curve is
    assert aup_table(rows).splitlines()[2:] == ["| `threshold` | 8 | 1 | 187.5 |"]
    assert "| 2 |" in aup_table([rows[0], dataclasses.replace(rows[1], alpha=2.0)])


def test_other_csv_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="not rows of evaluations"):
        read_csv(tmp_path / "rows.csv")
    (tmp_path / "notes.txt").write_text("notes of mine\n")
    with pytest.raises(ValueError, match=r"not rows of evaluations: unknown columns \['notes of mine'\]"):
        read_csv(tmp_path / "notes.txt")


@pytest.mark.parametrize(
    ("cell", "wrong", "message"),
    [
        (",5.500,", ",many,", "nfe must be a valid number"),
        (",5.500,", ",-5,", "nfe must be at least 0, got '-5'"),
        (",0.7500,", ",2,", "accuracy must be at most 1, got '2'"),
        (",0.7500,", ",nan,", "accuracy must be"),
        (",0.2500,", ",-1,", "accuracy_se must be at least 0, or nan, got '-1'"),
        (",8,32,", ",0,32,", "block_length must be at least 1"),
        ("{}", "[1]", "solved must be a mapping"),
        ("{}", "[" * 100_000, "recursion"),
    ],
)
def test_damaged_rows_are_refused(tmp_path: Path, cell: str, wrong: str, message: str) -> None:
    path = tmp_path / "rows.csv"
    write_csv(path, [ROW, ROW])
    head, _, last = path.read_text().strip().rpartition("\n")
    assert cell in last
    path.write_text(f"{head}\n{last.replace(cell, wrong)}\n")
    with pytest.raises(ValueError, match=f"rows.csv(:3)?: not rows of evaluations: .*{message}"):
        read_csv(path)


def test_two_evaluations_share_a_file(tmp_path: Path) -> None:
    """Rows that another one writes meanwhile are kept, and not measured again."""
    path, sampler = tmp_path / "rows.csv", Sampler.from_pretrained("tiny", policy="threshold:0.5")
    jobs = [Job(sampler, Hops(), 2, seed, {}) for seed in range(3)]
    one, other = measure(jobs, path), measure(jobs[::-1], path)
    assert next(one).seed == 0
    assert next(other).seed == 2
    assert next(one).seed == 1
    assert [row.seed for row in read_csv(path)] == [0, 2, 1]
    before = path.read_bytes()
    assert next(one).seed == 2
    assert [row.seed for row in other] == [1, 0]
    assert path.read_bytes() == before


def test_completions_are_kept_once(tmp_path: Path) -> None:
    path, sampler = tmp_path / "all.jsonl", Sampler.from_pretrained("tiny", policy="threshold:0.5")
    evaluate(sampler, Hops(), 2, 0, completions=path)
    once = path.read_text()
    assert once.count("\n") == 2
    path.write_text(once + '{"model": "ti')  # stopped before the row was written, in the midst of a line
    evaluate(sampler, Hops(), 2, 0, completions=path)
    assert path.read_text() == once
    evaluate(sampler, Hops(), 2, 1, completions=path)
    assert path.read_text().startswith(once)
    assert path.read_text().count("\n") == 4


def test_files_have_the_umasks_mode(tmp_path: Path) -> None:
    Policy(PolicyConfig()).save_pretrained(tmp_path)
    (tmp_path / "plain").touch()
    assert {path.stat().st_mode for path in tmp_path.iterdir()} == {(tmp_path / "plain").stat().st_mode}


def test_pass_at_k_by_hand() -> None:
    row = dataclasses.replace(ROW, samples=4, solved={"0": 1, "2": 1, "4": 2})
    # c = 2 of n = 4: 1 - C(2, 2) / C(4, 2) = 5/6; in order 0, 5/6, 1, 1
    value, error = row.pass_at(2)
    assert value == pytest.approx((5 / 6 + 2) / 4)
    squares = value**2 + (5 / 6 - value) ** 2 + 2 * (1 - value) ** 2
    assert error == pytest.approx(math.sqrt(squares / 3 / 4))
    assert row.pass_at(4)[0] == 0.75
    with pytest.raises(ValueError, match="k must be between 1 and the 4 samples, got 5"):
        row.pass_at(5)
    lines = markdown([row], pass_at=[2]).splitlines()
    assert lines[0] == "| policy | blocks | accuracy | pass@2 | NFE | TPF | reasons |"
    assert f"| 0.750 ± 0.250 | {value:.3f} ± {error:.3f} | 5.50 ± 0.50 |" in lines[2]


def test_rows_of_samples_survive_a_csv_file_and_old_rows_are_read(tmp_path: Path) -> None:
    row = dataclasses.replace(
        ROW, samples=4, solved={"0": 1, "3": 3}, policy_sha256="00e10", unfinished=0.5, forwards=6.5
    )
    write_csv(tmp_path / "rows.csv", [row])
    assert read_csv(tmp_path / "rows.csv") == [row]
    lines = [line.split(",") for line in (tmp_path / "rows.csv").read_text().splitlines()]
    new = lines[0].index("samples")
    old = dataclasses.replace(row, samples=1, solved={}, policy_sha256="", unfinished=None, forwards=None)
    (tmp_path / "old.csv").write_text("\n".join(",".join(line[:new]) for line in lines))
    assert read_csv(tmp_path / "old.csv") == [old]


def test_standard_errors_are_over_problems() -> None:
    """Four samples of a problem are no four problems."""
    sampler = Sampler.from_pretrained("tiny", "threshold:0.6", config=SamplerConfig(24, 8, temperature=3.0))
    row = evaluate(sampler, Hops(), 5, samples=4)
    assert row.problems == 5
    assert sum(row.solved.values()) == 5
    result = sampler.generate([p.prompt for p in Hops().problems(5, 0) for _ in range(4)], seed=0)
    means = result.steps.view(5, 4).double().mean(dim=1)
    assert row.nfe == pytest.approx(means.mean().item())
    assert row.nfe_se == pytest.approx((means.std() / 5**0.5).item())
    assert result.texts is not None
    assert any(len(set(result.texts[i : i + 4])) > 1 for i in range(0, 20, 4)), "draws of their own"


def test_completions_are_kept_even_if_grading_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = Sampler.from_pretrained("tiny", "threshold:0.6", config=SamplerConfig(24, 8, max_batch_size=2))
    finished: list[int] = []
    path = tmp_path / "all.jsonl"
    row = evaluate(sampler, Hops(), 5, completions=path, on_finished=finished.append)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    problems = Hops().problems(5, 0)
    assert [line["prompt"] for line in lines] == [p.prompt for p in problems]
    assert [Hops().grade(p, line["completion"]) for p, line in zip(problems, lines, strict=True)].count(1.0) == round(
        5 * row.accuracy
    )
    assert mean([line["nfe"] for line in lines]) == pytest.approx(row.nfe)
    assert finished == sorted(finished)
    assert finished[-1] == 5

    monkeypatch.setattr(Hops, "grade", None)
    with pytest.raises(TypeError):
        evaluate(sampler, Hops(), 2, completions=path)
    assert len(path.read_text().splitlines()) == 7


def test_tokens_per_second_and_what_stayed_masked() -> None:
    sampler = Sampler.from_pretrained("tiny", "threshold:0.9", config=SamplerConfig(24, 24, max_steps=3))
    row = evaluate(sampler, Hops(), 4)
    result = sampler.generate([p.prompt for p in Hops().problems(4, 0)], seed=0)
    assert row.tokens_per_second == pytest.approx(int(result.filled.sum()) / row.seconds, abs=0.051)
    assert row.unfinished == 1 - result.finished.double().mean().item() > 0


def test_a_policy_that_draws_may_be_sampled_at_temperature_0() -> None:
    sampler = Sampler.from_pretrained("tiny", "random:8", config=SamplerConfig(24, 24))
    assert evaluate(sampler, Hops(), 2, samples=2).samples == 2
    with pytest.raises(ValueError, match="would be the same"):
        evaluate(Sampler.from_pretrained("tiny", "threshold:0.9"), Hops(), 2, samples=2)


def test_a_digest_knows_a_policy_by_its_weights(tmp_path: Path) -> None:
    policy = Policy(PolicyConfig(hidden_size=16, num_heads=2, ffn_size=16))
    digest = weights_digest(policy)
    policy.save_pretrained(tmp_path)
    assert weights_digest(Policy.from_pretrained(tmp_path)) == digest
    with torch.no_grad():
        policy.output_proj.bias += 1e-3
    assert weights_digest(policy) != digest
    assert weights_digest(make_policy("threshold:0.9")) == ""


def test_grades_must_be_as_many_as_completions(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = Sampler.from_pretrained("tiny", "threshold:0.6", config=SamplerConfig(24, 8))
    monkeypatch.setattr(Hops, "grade_all", lambda self, problems, completions: [1.0])
    with pytest.raises(ValueError, match="hops: grade_all returned 1 grades for 2 completions"):
        evaluate(sampler, Hops(), 2)


def test_what_cannot_be_evaluated_is_refused_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = Sampler.from_pretrained("tiny", policy="threshold:0.9", config=SamplerConfig(max_new_tokens=24))
    monkeypatch.setattr(Sampler, "steps", lambda *_: pytest.fail("decoded"))
    with pytest.raises(RuntimeError, match="grading humaneval runs programs"):
        evaluate(sampler, "humaneval", 1)
    with pytest.raises(ValueError, match="num_return_sequences must be 1 in an evaluation, which has samples, got 2"):
        evaluate(sampler, "hops", 2, num_return_sequences=2, temperature=1.0)
    (tmp_path / "c.jsonl").write_text("no json\n{}\n")
    with pytest.raises(ValueError, match="c.jsonl"):
        evaluate(sampler, "hops", 2, completions=str(tmp_path / "c.jsonl"))
    for seconds in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="timeout must be positive"):
            make_task("humaneval", allow_execution=True, allow_unsandboxed=True, timeout=seconds).check_gradable()


def test_settings_of_decoding_are_known_to_rows() -> None:
    """Each is in a column or in the text of settings, or does not change results."""
    columns = {"max_new_tokens", "block_length", "actions", "alpha", "policy_scale"}
    same = {"num_return_sequences", "record", "max_batch_size", "cuda_graphs"}
    named = {field.name for field in dataclasses.fields(SamplerConfig)}
    assert named == columns | same | (set(FURTHER) & named)
    assert named - {"record", "cuda_graphs"} >= set(FURTHER) & named
    assert further(SamplerConfig(), {"stop_at_eos": False, "revision": "main"}) == "stop_at_eos=False revision=main"


def test_means_over_templates_are_of_all_columns() -> None:
    rows = [
        dataclasses.replace(ROW, template=name, nfe=n, forwards=n, tokens_per_second=10 * n, length=length)
        for name, n, length in (("a", 4.0, 32), ("b", 6.0, 32), ("b", 8.0, 64))
    ]
    found = [(row.length, row.nfe, row.forwards, row.tokens_per_second) for row in over_templates(rows)]
    assert found == [(32, 5.0, 5.0, 50.0), (64, 8.0, 8.0, 80.0)]


def test_a_target_is_asked_at_every_alpha_and_scale() -> None:
    shifted, dialled = make_policy("tiny"), make_policy("little")
    assert [v["target_nfe"] for v in variants(dialled, [0.1, 1.0], [1.0], {}, [5.0, 6.0])] == [5.0, 6.0]
    found = [
        (v["alpha"], v.get("policy_scale", 1), v["target_nfe"]) for v in variants(shifted, [0, 20], [1, 2], {}, [6])
    ]
    assert found == [(0, 1, 6), (0, 2, 6), (20, 1, 6), (20, 2, 6)]


def test_a_block_longer_than_the_buffer_is_full_diffusion() -> None:
    assert dataclasses.replace(ROW, block_length=40).regime == "full"
