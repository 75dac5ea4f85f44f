#!/usr/bin/env bash
# Sets everything up in .venv and runs the main job: PTP on SmolLM2-135M, two ranks under ZeRO-3, on the demo data.
# Arguments go to scripts/train.py, e.g. `bash scripts/quickstart.sh --perturbation pgd`.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup_env.sh
export PATH="$PWD/.venv/bin:$PATH"
exec deepspeed --hostfile hostfiles/local scripts/train.py --ds_config ds_configs/zero3.json "$@"
