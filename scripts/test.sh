#!/usr/bin/env bash
# Sets everything up in .venv, then runs lint, types and tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup_env.sh
export PATH="$PWD/.venv/bin:$PATH" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
if [ "$#" -eq 0 ]; then
    ruff check .
    ruff format --check .
    mypy
    set -- -n 2 --dist loadfile -m "not gpu and not slow"
fi
python -m pytest "$@"
