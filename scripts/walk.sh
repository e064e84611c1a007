#!/usr/bin/env bash
# Type what README and docs/chat.md tell newcomers to, in a temporary folder, and print every command with what it says.
# The packaged model answers; in the chat a stand-in with a chat template does, and so with noise. docs/walk.md is its
# output:
#   bash scripts/walk.sh > docs/walk.md
# UNMASK_VENV: another folder than .venv with unmask and its extra "models" installed.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$(cd "$root" && cd "${UNMASK_VENV:-.venv}" && pwd)
export PATH="$venv/bin:$PATH" HF_HUB_OFFLINE=1 COLUMNS=110 PYTHONWARNINGS=ignore
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

walk() { # a command line
  printf '\n```console\n$ %s\n' "$1"
  local status=0
  bash -o pipefail -c "$1" 2>&1 | sed -e "s#$folder#.#g; s#$root/##g" -e 's/[[:space:]]*$//' || status=$?
  [ $status = 0 ] || echo "[exit status $status]"
  printf '```\n'
}

cat <<'TEXT'
# A walk through the first commands

`bash scripts/walk.sh > docs/walk.md` wrote this page: each command, and what it said. Times are those of one core.
TEXT
walk 'unmask generate "Name animals that begin with l, f, h."'
walk 'unmask generate "Reverse the line: Tom, Ann, Eve." --policy threshold:0.7 --json'
walk 'unmask models little'
walk 'unmask policies threshold:0.9,hold-eos'
printf '\nPolicies against each other, and the page that plays two of them:\n'
walk 'unmask evaluate --problems 20 --policies threshold:0.5 threshold:0.9 top-k:1 --regimes 8 --output rows.csv 2>/dev/null'
walk 'unmask trace "Name animals that begin with l, f, h." --policy threshold:0 --policy top-k:1 --output order.html'
walk 'grep -o "<title>.*</title>" order.html'
printf '\nA chat. The stand-in has random weights, the chat template is real:\n'
walk 'python -m unmask.testing llada stand-in'
walk 'unmask models stand-in'
walk "printf '%s\n' 'What is 12 * 13?' '/policy top-k:4' '/length 8' 'And twice that?' '/polcy x' | unmask chat stand-in --max-new-tokens 16 --block-length 8"
printf '\nMistakes are named:\n'
walk 'unmask generate "Reverse the line: Tom." --policy thresold:0.9'
walk 'unmask generate --max-new-token 16'
