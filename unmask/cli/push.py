"""``unmask push``: a learned policy to the Hugging Face hub, with its model card."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from unmask.cli import say
from unmask.cli.parsing import Command, Flag


class Push(Command):
    """Upload a learned policy to the Hugging Face hub, with a model card that shows its configuration, its training and
    its results. Log in first (`hf auth login`).

    How it was trained, and on which model, is read from training.json, which `unmask train` writes beside a policy.

    examples:
      unmask evaluate --model tiny --task hops --policies mine=runs/quickstart/policy --regimes full --output rows.csv
      unmask push runs/quickstart/policy user/name --results rows.csv --dry-run
    """

    folder: Positional[Path]
    """Folder of the policy."""
    repo_id: Positional[str]
    """USER/NAME, the repository on the hub, made if it is not there."""
    base_model: str | None = None
    """Hub id or packaged name of the model it was trained on. None: that of training.json, unless a local folder."""
    results: Path | None = None
    """Rows of `unmask evaluate --output`."""
    training: str | None = None
    """Its training configuration, a packaged name or YAML file, where there is no training.json."""
    license: str = "apache-2.0"
    """Identifier of the hub."""
    datasets: tuple[str, ...] = ()
    """Hub ids of what it was trained on."""
    private: Flag = False
    """Make the repository private."""
    dry_run: Flag = False
    """Write README.md into the folder, upload nothing."""

    def run(self) -> int:
        from unmask.evaluation.results import read_csv
        from unmask.policies.registry import load_policy
        from unmask.training.record import told

        if not self.folder.is_dir():
            raise FileNotFoundError(f"no folder {self.folder}")
        policy = load_policy(self.folder)
        training, base_model = told(self.folder, self.training, self.base_model)
        details: dict[str, Any] = {"base_model": base_model, "training": training, "license": self.license}
        details["datasets"] = self.datasets
        if self.results:
            details["results"] = [asdict(row) for row in read_csv(self.results)]
        if self.dry_run:
            path = self.folder / "README.md"
            path.write_text(policy.card(self.repo_id, **details), encoding="utf-8")
            say(f"wrote {path}; without --dry-run it is uploaded to {self.repo_id} with the policy")
            return 0
        try:
            say(policy.push_to_hub(self.repo_id, private=self.private, **details))
        except Exception as error:
            raise ConnectionError(f"{self.repo_id} was not uploaded: {error}") from error
        return 0
