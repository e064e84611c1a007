"""The study's script: its runs are valid configurations, and a small one goes from training to rows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from scripts_as_modules import load_script

import unmask
from unmask.evaluation.results import read_csv
from unmask.training import TrainerConfig
from unmask.training.config_files import parse_pairs

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "study.py"


@pytest.fixture(scope="module")
def study() -> ModuleType:
    return load_script(SCRIPT)


def test_every_run_is_a_valid_configuration(study: ModuleType) -> None:
    runs = {run.name: run for part in study.PARTS.values() for run in part}
    configs = {name: TrainerConfig.from_yaml(run.config, parse_pairs(run.settings)) for name, run in runs.items()}
    assert configs["full-0.3-0"].alpha == 0.3
    assert configs["full-0.3-0"].block_length is None
    assert configs["blocks-10-0"].block_length == 8
    assert configs["dial-blocks-2"].seed == 2
    assert configs["full-k8"].policy_config().num_confidences == 8
    assert configs["full-noexpert"].expert is None


@pytest.mark.slow
def test_a_part_from_training_to_rows(study: ModuleType, tmp_path: Path) -> None:
    """The expert part with a policy of one iteration in place of the real ones."""
    for name in ("full-3-0", "full-imitation", "full-noexpert"):
        unmask.Policy(unmask.PolicyConfig(hidden_size=16, ffn_size=16)).save_pretrained(tmp_path / name / "policy")
    options = ["--folder", str(tmp_path), "--results", str(tmp_path / "rows"), "--problems", "8", "--workers", "1"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "expert", *options], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = read_csv(tmp_path / "rows" / "expert.csv")
    assert [row.policy for row in rows] == ["expert steering", "imitation alone", "no expert"]
    assert all(row.learned and row.problems == 8 and row.regime == "full" for row in rows)
