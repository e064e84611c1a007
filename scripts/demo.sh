#!/usr/bin/env bash
# Install into .venv and watch the packaged model fill its buffer. Arguments go to `unmask generate`.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" ""
exec "$venv/bin/unmask" generate "$@"
