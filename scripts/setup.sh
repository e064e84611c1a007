# Sourced by demo.sh and test.sh, with the extras to install (or ""): a virtual environment in .venv with unmask in it,
# editable, its compiled part in place. Run again it compiles what has changed since. Environment variables:
#   UNMASK_VENV   another folder     PYTHON   another interpreter (3.10 or newer)     UNMASK_TORCH   version of torch
# and those of setup.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras=$1
venv=${UNMASK_VENV:-.venv}
python="$venv/bin/python"
[ -x "$python" ] || "${PYTHON:-python3}" -m venv "$venv"
pip() { "$python" -m pip --disable-pip-version-check "$@"; }
if [ -n "${UNMASK_TORCH:-}" ] || ! "$python" -c "import torch" 2>/dev/null; then
  # A pinned torch: an open-ended requirement would fetch whatever is newest.
  torch="torch==${UNMASK_TORCH:-2.13.0}"
  # Without a GPU the CPU build, if its index can be reached: the usual one may come with gigabytes for CUDA.
  nvidia-smi >/dev/null 2>&1 || pip install --quiet --no-deps --retries 0 --timeout 10 \
    --index-url https://download.pytorch.org/whl/cpu "$torch" 2>/dev/null || true
  pip install --quiet "$torch"
fi
pip install --quiet "setuptools>=77" ninja
echo "Installing unmask into $venv; what has to be compiled takes a minute or more." >&2
pip install --quiet --no-build-isolation --editable ".$extras"
