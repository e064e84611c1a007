"""``unmask push``: a learned policy to the Hugging Face hub, with its model card."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

DESCRIPTION = """Upload a learned policy to the Hugging Face hub, with a model card that shows its configuration, its
training and its results. Log in first (`hf auth login`)."""
EXAMPLES = """examples:
  unmask evaluate --policies mine=runs/quickstart/policy threshold:0.9 --regimes full --output rows.csv
  unmask push runs/quickstart/policy user/name --base-model tiny --results rows.csv --training quickstart --dry-run"""


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
    parser.add_argument("--base-model", help="hub id or packaged name of the model it was trained on")
    parser.add_argument("--results", type=Path, metavar="CSV", help="rows of `unmask evaluate --output`")
    parser.add_argument("--training", metavar="CONFIG", help="its training configuration: a packaged name or YAML file")
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
    details: dict[str, Any] = {
        "base_model": args.base_model,
        "license": args.license,
        "datasets": args.datasets,
    }
    if args.results:
        from unmask.evaluation.results import read_csv

        details["results"] = [asdict(row) for row in read_csv(args.results)]
    if args.training:
        from unmask.training.config import OBSERVATIONAL, TrainerConfig

        training = TrainerConfig.from_yaml(args.training).to_dict()
        details["training"] = {name: value for name, value in training.items() if name not in OBSERVATIONAL}
    if args.dry_run:
        path = Path(args.folder, "README.md")
        path.write_text(policy.card(args.repo_id, **details), encoding="utf-8")
        print(f"wrote {path}; without --dry-run it is uploaded to {args.repo_id} with the policy")
    else:
        print(policy.push_to_hub(args.repo_id, private=args.private, **details))
    return 0
