#!/usr/bin/env bash
# Sets everything up in .venv, then runs lint, types and tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup_env.sh
export PATH="$PWD/.venv/bin:$PATH" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
if [ "$#" -eq 0 ]; then
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # two workers: more threads would wait for each other
    ruff check .
    ruff format --check .
    mypy
    lint-imports --no-logo
    # the longest files stand first (tests/conftest.py); by their numbers of tests they would come last
    set -- -n 2 --dist loadfile --no-loadscope-reorder -m "not gpu and not slow"
fi
python -m pytest "$@"
