# Sourced by demo.sh and test.sh: a virtual environment in .venv with unmask installed in it.
# UNMASK_VENV chooses another folder; PYTHON another interpreter (3.10 or newer).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${UNMASK_VENV:-.venv}
extras=${1:-}
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
python="$venv/bin/python"
# A pinned torch: an open-ended requirement would fetch gigabytes of the newest CUDA packages.
"$python" -c "import torch" 2>/dev/null || "$python" -m pip install --quiet "torch==${UNMASK_TORCH:-2.13.0}"
"$python" -m pip install --quiet ".$extras"
