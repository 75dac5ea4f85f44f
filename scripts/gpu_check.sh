#!/usr/bin/env bash
# Everything that only a CUDA GPU shows, in one command and without network: bench/gpu_check.py says what and how.
#
#     bash scripts/gpu_check.sh --minutes 13       # the parts that fit, the most telling ones first
#     bash scripts/gpu_check.sh step_8b profile    # these parts
#     bash scripts/gpu_check.sh --dry              # every part on a tiny random model, on the CPU
#
# Writes gpu_check.json and a table into $OUT (default: gpu_check/). PYTHON names an interpreter that has everything.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
[ -x "$python" ] || python=$(command -v "$python" || command -v python3)
export PYTHON=$python
exec "$python" scripts/bench/gpu_check.py "$@"
