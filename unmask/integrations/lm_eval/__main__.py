"""``python -m unmask.integrations.lm_eval``: the harness's own command line, which then knows ``--model unmask``."""

from __future__ import annotations

import sys


def main() -> None:
    """Register the model and hand over. Exits with a message if lm-evaluation-harness is not installed."""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        sys.exit(f'lm-evaluation-harness could not be imported ({error}): pip install "unmask[lm-eval]"')
    import unmask.integrations.lm_eval.model  # noqa: F401  (registers the model)
    from unmask.evaluation.processes import leave

    cli_evaluate()
    leave()


if __name__ == "__main__":
    main()
