#!/usr/bin/env bash
# Everything that only a CUDA GPU shows, in one command and without network: the tests marked gpu and those of the
# kernels, compiled; kernels and attention against their alternatives; one step of an 8B-shaped random Llama under
# ZeRO-3 on one rank; and with SmolLM2-135M the step benchmark, a training run, and bf16 against fp32 over seeds.
#
#     bash scripts/gpu_check.sh                  # all parts
#     bash scripts/gpu_check.sh tests kernels    # these parts
#
# A part that runs for longer than LIMIT seconds (default 600) is ended and counts as failed. Writes gpu_check.json and
# a table into $OUT (default: gpu_check/). PYTHON names an interpreter that has everything.
set -uo pipefail
cd "$(dirname "$0")/.."
parts=(tests kernel_tests kernels attention llama8b bench train precision)
if [ "$#" -eq 0 ]; then set -- "${parts[@]}"; fi
for name in "$@"; do
    if [[ " ${parts[*]} " != *" $name "* ]]; then
        echo "error: '$name' is no part of this check; they are ${parts[*]}." >&2
        exit 2
    fi
done
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
    timeout -k 10 "${LIMIT:-600}" "$@" 2>&1 | tee "$out/$name.log"
    local code=${PIPESTATUS[0]}
    echo "$name $code" >>"$out/exit_codes.txt"
    [ "$code" -eq 0 ] || failed=1
}
part() { # what each part runs
    case $1 in
    tests) run tests "$python" -m pytest -q -m gpu ;;
    kernel_tests) run kernel_tests "$python" -m pytest -q tests/kernels/test_{choice,noise,perturb_step,pack_embed,dual_divergence}.py ;;
    kernels) run kernels "$python" scripts/bench/bench_kernels.py --json "$out/kernels.json" ;;
    attention) run attention "$python" scripts/bench/bench_attention.py --json "$out/attention.json" ;;
    llama8b) run llama8b "$python" scripts/bench/bench_large.py --shape 8b --rows 256 --json "$out/llama8b.json" ;;
    bench) run bench "$python" scripts/bench/bench_step.py --rows 16 64 --pairs 5 --activations --json "$out/bench.json" ;;
    train)
        rm -rf "$out/train"
        run train "$python" scripts/train.py --max_steps 200 --eval_every 50 --batch_size 16 --output_dir "$out/train"
        ;;
    precision) run precision "$python" scripts/bench/compare_precision.py --json "$out/precision.json" ;;
    esac
}
rm -f "$out/exit_codes.txt"
for name in "$@"; do part "$name"; done
"$python" scripts/bench/gpu_report.py "$out" || failed=1
exit "$failed"
