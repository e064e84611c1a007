#!/usr/bin/env bash
# Install into .venv with the test extras and run the tests. Arguments go to pytest.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" "[dev]"
exec "$venv/bin/pytest" "$@"
