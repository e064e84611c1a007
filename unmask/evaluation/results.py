"""Evaluations as rows: CSV files and Markdown tables."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from unmask.evaluation.evaluate import Evaluation

FORMATS = {"accuracy": ".4f", "accuracy_se": ".4f", "nfe": ".3f", "nfe_se": ".3f", "tpf": ".3f", "tpf_se": ".3f"}


def write_csv(path: Path, evaluations: Sequence[Evaluation]) -> None:
    """Write all rows, replacing the file at once; ``measures`` is one JSON column."""
    partial = path.with_suffix(path.suffix + ".partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Evaluation)])
        writer.writeheader()
        for evaluation in evaluations:
            row = asdict(evaluation)
            for name, form in FORMATS.items():
                row[name] = format(row[name], form)
            row["seconds"] = f"{evaluation.seconds:.1f}"
            row["measures"] = json.dumps({k: round(v, 4) for k, v in evaluation.measures.items()})
            writer.writerow(row)
    partial.replace(path)


def read_csv(path: Path) -> list[Evaluation]:
    """Rows written by :func:`write_csv`."""
    kinds: dict[str, Callable[[str], Any]] = dict.fromkeys(("block_length", "length", "problems", "seed"), int)
    kinds |= {"measures": json.loads}
    kinds |= dict.fromkeys((*FORMATS, "seconds"), float)
    with path.open(newline="", encoding="utf-8") as file:
        return [Evaluation(**{k: kinds.get(k, str)(v) for k, v in row.items()}) for row in csv.DictReader(file)]


def markdown(evaluations: Sequence[Evaluation]) -> str:
    """A Markdown table, one row per evaluation."""
    measures = list(dict.fromkeys(name for e in evaluations for name in e.measures))
    header = ["policy", "blocks", "accuracy", "NFE", "TPF", *measures]
    lines = [" | ".join(header), " | ".join("---" for _ in header)]
    for e in evaluations:
        cells = [
            f"`{e.policy}`",
            e.regime,
            f"{e.accuracy:.3f} ± {e.accuracy_se:.3f}",
            f"{e.nfe:.2f} ± {e.nfe_se:.2f}",
            f"{e.tpf:.2f} ± {e.tpf_se:.2f}",
            *(f"{e.measures[name]:.2f}" if name in e.measures else "" for name in measures),
        ]
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)
