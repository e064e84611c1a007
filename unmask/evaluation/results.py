"""Evaluations as rows: CSV files, Markdown tables, and curves."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from unmask.config import check_known, described
from unmask.evaluation.evaluate import Evaluation
from unmask.evaluation.metrics import aup, mean
from unmask.files import write_atomically
from unmask.policies.card import code, table

FORMATS = {"accuracy": ".4f", "accuracy_se": ".4f", "nfe": ".3f", "nfe_se": ".3f", "tpf": ".3f", "tpf_se": ".3f"}

JSON = ("measures", "solved")
ROWS = TypeAdapter(list[Evaluation])


def write_csv(path: Path, evaluations: Sequence[Evaluation]) -> None:
    """Write all rows, replacing the file atomically; ``measures`` and ``solved`` are JSON."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [f.name for f in fields(Evaluation)])
    writer.writeheader()
    for evaluation in evaluations:
        row = asdict(evaluation)
        for name, form in FORMATS.items():
            row[name] = format(row[name], form)
        row["seconds"] = f"{evaluation.seconds:.3f}"
        row["measures"] = json.dumps({k: round(v, 4) for k, v in evaluation.measures.items()})
        row["solved"] = json.dumps(evaluation.solved)
        writer.writerow(row)
    write_atomically(path, lambda partial: partial.write_bytes(text.getvalue().encode()))


def read_csv(path: Path) -> list[Evaluation]:
    """Rows written by :func:`write_csv`; ValueError names a file that holds something else."""
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        try:
            check_known(reader.fieldnames or [], (f.name for f in fields(Evaluation)), "columns")
            rows = [{str(k): json.loads(v) if k in JSON else v for k, v in row.items() if v} for row in reader]
            return ROWS.validate_python(rows)
        except ValidationError as error:
            number, name, *_ = error.errors()[0]["loc"]
            wrong = described(str(name), [e for e in error.errors() if e["loc"][:2] == (number, name)])
            raise ValueError(f"{path}: not rows of evaluations: row {int(number) + 1}: {wrong}") from None
        except (ValueError, RecursionError, csv.Error) as error:
            raise ValueError(f"{path}:{reader.line_num}: not rows of evaluations: {error}") from error


def markdown(evaluations: Sequence[Evaluation], pass_at: Sequence[int] = ()) -> str:
    """A Markdown table, one row per evaluation, with columns of pass@k for every k in ``pass_at``."""
    measures = list(dict.fromkeys(name for e in evaluations for name in e.measures))
    alphas = any(e.alpha is not None for e in evaluations)
    unfinished = any(e.unfinished for e in evaluations)
    forwards = any(e.forwards is not None and abs(e.forwards - e.nfe) > 1e-3 for e in evaluations)
    header = ["policy", *(["alpha"] if alphas else []), "blocks", "accuracy", *(f"pass@{k}" for k in pass_at), "NFE"]
    header += [*(["all forwards"] if forwards else []), "TPF", *(["unfinished"] if unfinished else []), *measures]
    rows = [
        [
            code(e.policy) + ("" if e.policy_scale == 1 else f" x {e.policy_scale:g}"),
            *(["" if e.alpha is None else f"{e.alpha:g}"] if alphas else []),
            e.regime,
            f"{e.accuracy:.3f} ± {e.accuracy_se:.3f}",
            *("{:.3f} ± {:.3f}".format(*e.pass_at(k)) for k in pass_at),
            f"{e.nfe:.2f} ± {e.nfe_se:.2f}",
            *(["" if e.forwards is None else f"{e.forwards:.2f}"] if forwards else []),
            f"{e.tpf:.2f} ± {e.tpf_se:.2f}",
            *(["" if e.unfinished is None else f"{e.unfinished:.3f}"] if unfinished else []),
            *(f"{e.measures[name]:.2f}" if name in e.measures else "" for name in measures),
        ]
        for e in evaluations
    ]
    return table(header, rows)


def curves(evaluations: Sequence[Evaluation]) -> dict[tuple[str, str], list[Evaluation]]:
    """Rows by (family, regime), in their order."""
    grouped: dict[tuple[str, str], list[Evaluation]] = {}
    for e in evaluations:
        grouped.setdefault((e.family, e.regime), []).append(e)
    return grouped


def over_templates(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """The mean of each setting over its prompt templates, in the order of the first rows.

    Templates ask the same problems, so their errors are not independent: standard errors are averaged, too, which is
    right if the errors of the templates are equal and too large otherwise.
    """
    grouped: dict[tuple[Any, ...], list[Evaluation]] = {}
    for e in evaluations:
        key = (e.model, e.task, e.policy, e.policy_sha256, e.alpha, e.policy_scale, e.actions, e.regime, e.seed)
        grouped.setdefault((*key, e.length, e.samples, e.settings), []).append(e)
    return [averaged(rows) for rows in grouped.values()]


def averaged(rows: Sequence[Evaluation]) -> Evaluation:
    """The first of ``rows`` with the means of all; ``measures`` of those that have them."""
    means: dict[str, Any] = {name: mean([getattr(e, name) for e in rows]) for name in (*FORMATS, "seconds")}
    names = list(dict.fromkeys(name for e in rows for name in e.measures))
    for name in ("forwards", "tokens_per_second"):
        known = [value for e in rows if (value := getattr(e, name)) is not None]
        means[name] = mean(known) if len(known) == len(rows) else None
    solved = Counter[str]()
    for e in rows:
        solved.update(e.solved)
    return replace(
        rows[0],
        **means,
        measures={name: mean([e.measures[name] for e in rows if name in e.measures]) for name in names},
        solved=dict(solved),
        unfinished=mean([e.unfinished or 0.0 for e in rows]),
        template="mean",
        outcomes="",
    )


def over_seeds(evaluations: Sequence[Evaluation]) -> list[tuple[float, float]]:
    """(TPF, accuracy in percent) of every setting, the mean over rows that differ only in their problems."""
    grouped: dict[tuple[Any, ...], list[Evaluation]] = {}
    for e in evaluations:
        grouped.setdefault((e.policy, e.policy_sha256, e.alpha, e.policy_scale, e.actions, e.settings), []).append(e)
    return [(mean([e.tpf for e in rows]), 100 * mean([e.accuracy for e in rows])) for rows in grouped.values()]


def aup_table(evaluations: Sequence[Evaluation]) -> str:
    """AUP of every family in every regime, best first, as Markdown; weighted by the best accuracy among all rows."""
    best = max((100 * e.accuracy for e in evaluations), default=0.0)
    if best <= 0:
        return ""
    rows = []
    for (name, regime), group in curves(evaluations).items():
        points = over_seeds(group)
        rows.append((aup(points, best), name, regime, len(points)))
    cells = [[code(name), regime, str(count), f"{value:.1f}"] for value, name, regime, count in sorted(rows)[::-1]]
    return table(["policies", "blocks", "points", "AUP"], cells)
