#!/usr/bin/env bash
# Sets everything up in .venv and runs the main job: PTP on SmolLM2-135M, two ranks under ZeRO-3, on the demo data. On a
# machine with a single GPU it is one rank.
# Arguments go to scripts/train.py, e.g. `bash scripts/quickstart.sh --perturbation pgd`.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup_env.sh
export PATH="$PWD/.venv/bin:$PATH"
ranks=2
if command -v nvidia-smi >/dev/null 2>&1 && [ "$(python -c 'import torch; print(torch.cuda.device_count())')" = 1 ]; then
    ranks=1
fi
exec deepspeed --hostfile hostfiles/local --num_gpus "$ranks" scripts/train.py --ds_config ds_configs/zero3.json "$@"
