"""``unmask push``: a learned policy to the Hugging Face hub, with its model card."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

DESCRIPTION = """Upload a learned policy to the Hugging Face hub, with a model card that shows its configuration, its
training and its results. Log in first (`hf auth login`).

How it was trained, and on which model, is read from training.json, which `unmask train` writes beside a policy."""
EXAMPLES = """examples:
  unmask evaluate --policies mine=runs/quickstart/policy threshold:0.9 --regimes full --output rows.csv
  unmask push runs/quickstart/policy user/name --results rows.csv --dry-run"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "push",
        help="upload a learned policy to the hub, with a model card",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", help="folder of the policy")
    parser.add_argument("repo_id", metavar="USER/NAME", help="repository on the hub, made if it is not there")
    parser.add_argument(
        "--base-model",
        help="hub id or packaged name of the model it was trained on (default: that of training.json, unless it is a "
        "local folder)",
    )
    parser.add_argument("--results", type=Path, metavar="CSV", help="rows of `unmask evaluate --output`")
    parser.add_argument(
        "--training",
        metavar="CONFIG",
        help="its training configuration, a packaged name or YAML file, where there is no training.json",
    )
    parser.add_argument("--license", default="apache-2.0", help="identifier of the hub (default: apache-2.0)")
    parser.add_argument("--datasets", nargs="+", default=[], metavar="ID", help="hub ids of what it was trained on")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument("--dry-run", action="store_true", help="write README.md into the folder, upload nothing")
    parser.add_argument("--debug", action="store_true", help="show a full traceback on errors")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from unmask.policies.learned import Policy

    if not Path(args.folder).is_dir():
        raise FileNotFoundError(f"no folder {args.folder}")
    policy = Policy.from_pretrained(args.folder)
    training, base_model = training_details(Path(args.folder), args.training, args.base_model)
    details: dict[str, Any] = {
        "base_model": base_model,
        "training": training,
        "license": args.license,
        "datasets": args.datasets,
    }
    if args.results:
        from unmask.evaluation.results import read_csv

        details["results"] = [asdict(row) for row in read_csv(args.results)]
    if args.dry_run:
        path = Path(args.folder, "README.md")
        path.write_text(policy.card(args.repo_id, **details), encoding="utf-8")
        print(f"wrote {path}; without --dry-run it is uploaded to {args.repo_id} with the policy")
    else:
        print(policy.push_to_hub(args.repo_id, private=args.private, **details))
    return 0


def training_details(
    folder: Path, given: str | None, base_model: str | None
) -> tuple[dict[str, Any] | None, str | None]:
    """How the policy was trained and on which model, for its card: what training.json says, else what was given.

    Raises:
        ValueError: what was given contradicts training.json.
    """
    from unmask.training.config import TrainerConfig
    from unmask.training.record import TRAINING_FILE, read_training

    config = None if given is None else settings(TrainerConfig.from_yaml(given).to_dict())
    record = read_training(folder)
    if record is None:
        return config, base_model
    place = folder / TRAINING_FILE
    training = settings(record["config"])
    if config is not None and (differing := [name for name in config if config[name] != training.get(name)]):
        raise ValueError(
            f"--training {given} is not how the policy was trained: {place} differs in {', '.join(differing)}; leave "
            "the option out"
        )
    replaced = record.get("replaced", [])
    if "model" not in replaced and is_public(training.get("model")):
        if base_model not in (None, training["model"]):
            raise ValueError(f"--base-model {base_model}: by {place} the policy was trained on {training['model']}")
        base_model = training["model"]
    else:  # a folder of this machine, or a model that only a program had
        training.pop("model", None)
    training = {name: value for name, value in training.items() if name not in replaced}
    training |= {
        name: record[name] for name in ("replaced", "iteration", "processes", "unmask", "commit") if record.get(name)
    }
    return training, base_model


def settings(config: dict[str, Any]) -> dict[str, Any]:
    """What of a configuration says how a policy was trained, not where it lay."""
    from unmask.training.config import OBSERVATIONAL

    plain = json.loads(json.dumps(config))
    return {name: value for name, value in plain.items() if name not in OBSERVATIONAL}


def is_public(model: Any) -> bool:
    """Whether others find ``model``: a packaged name, or what looks like a hub id and is no folder here."""
    from unmask.models.sources import packaged_models
    from unmask.policies.card import is_hub_id

    return isinstance(model, str) and (model in packaged_models() or (is_hub_id(model) and not Path(model).is_dir()))
