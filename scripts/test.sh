#!/usr/bin/env bash
# Install into .venv with the test extras and run the tests on all cores, one thread each. Arguments go to pytest:
# with "-n 0" the tests run in one process.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" "[dev]"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$venv/bin/pytest" -n logical --dist loadfile "$@"
