"""``python -m unmask.lm_eval``: lm-evaluation-harness's own command line, which then knows ``--model unmask``."""

from __future__ import annotations

import sys


def main() -> int:
    """Register the model and hand over; 2 if lm-evaluation-harness is not installed."""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        print(
            f'python -m unmask.lm_eval needs lm-evaluation-harness ({error}): pip install "unmask[lm-eval]"',
            file=sys.stderr,
        )
        return 2
    import unmask.lm_eval.model  # noqa: F401  (registers the model)

    cli_evaluate()
    return 0


if __name__ == "__main__":
    sys.exit(main())
