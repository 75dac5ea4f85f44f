#!/usr/bin/env bash
# Everything that only a CUDA GPU shows, in one command and without network: the tests marked gpu and those of the
# kernels, compiled; kernels and attention against their alternatives; the step benchmark in bf16; training runs of
# SmolLM2-135M, in bf16 and fp32; and one step of an 8B-shaped random Llama under ZeRO-3 on one rank.
# Writes gpu_check.json and a table into $OUT (default: gpu_check/). PYTHON names an interpreter that has everything.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
[ -x "$python" ] || python=$(command -v "$python" || command -v python3)
out=${OUT:-gpu_check}
mkdir -p "$out"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "error: no CUDA GPU is visible to torch in $python; run this on a machine with one." >&2
    exit 2
fi
failed=0
run() { # name, command...: runs it, keeps its output and exit code
    local name=$1
    shift
    echo "== $name"
    "$@" 2>&1 | tee "$out/$name.log"
    local code=${PIPESTATUS[0]}
    echo "$name $code" >>"$out/exit_codes.txt"
    [ "$code" -eq 0 ] || failed=1
}
rm -f "$out/exit_codes.txt"
run tests "$python" -m pytest -q -m gpu
run kernel_tests "$python" -m pytest -q tests/kernels/test_{choice,noise,perturb_step,pack_embed,dual_divergence}.py
run kernels "$python" scripts/bench/bench_kernels.py --json "$out/kernels.json"
run attention "$python" scripts/bench/bench_attention.py --json "$out/attention.json"
run bench "$python" scripts/bench/bench_step.py --rows 16 64 --prompt_lengths 20 100 --pairs 10 --activations --json "$out/bench.json"
rm -rf "$out/train"
run train "$python" scripts/train.py --max_steps 200 --eval_every 50 --batch_size 16 --output_dir "$out/train"
run precision "$python" scripts/bench/compare_precision.py --seeds 0 1 2 --json "$out/precision.json"
run llama8b "$python" scripts/bench/bench_large.py --shape 8b --rows 256 --json "$out/llama8b.json"
"$python" scripts/bench/gpu_report.py "$out" || failed=1
exit "$failed"
