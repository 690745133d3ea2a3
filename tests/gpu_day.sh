#!/usr/bin/env bash
# Everything worth knowing of a GPU in 25 minutes, on a machine without a network, most telling first; rows go into results/.
#   bash tests/gpu_day.sh [FOLDER WITH WHEELS]      on a GPU
#   DRY=1 bash tests/gpu_day.sh                     the same commands at tiny sizes, on a CPU, into a folder of its own
# Each part has a limit and the next begins whatever became of it; what failed is listed at the end.
set -uo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
dry=${DRY:-}
rows=$([ -n "$dry" ] && mktemp -d || echo results)
[ -n "${1:-}" ] && pip install -q --no-index --find-links "$1" -r requirements.txt -r tests/requirements.txt
failed=()
part() {  # part SECONDS NAME COMMAND..
    local limit=$1 name=$2 began=$SECONDS
    shift 2
    echo "== $name: $*"
    timeout -k 10 "$limit" "$@" || failed+=("$name ($?)")
    echo "== $name took $((SECONDS - began)) s"
}

part 240 "tests" python -m pytest -q -m gpu --timeout 120 ${dry:+--collect-only}
part 60 "attention" python tests/gpu_step.py --attention --out "$rows/gpu_attention.jsonl"
if [ -n "$dry" ]; then shapes=(tiny) more=(--pairs 4 --steps 2); else shapes=(1b 3b) more=(--pairs 16 --steps 6); fi
for shape in "${shapes[@]}"; do
    for how in "--ddp" "--ddp --checkpoint_activations" "--shard" "--ddp --lengths max" \
               "--ddp --lengths uf --checkpoint_activations" "--compile"; do
        [ -n "$dry" ] && [ "$how" = --compile ] && continue
        # shellcheck disable=SC2086
        part 120 "step $shape $how" python tests/gpu_step.py --shape "$shape" $how "${more[@]}" --out "$rows/gpu_steps.jsonl"
    done
done
if [ -n "$dry" ]; then sizes=(--shapes 64,256,64 --runs 1 --no-compile); else sizes=(); fi
part 300 "kernel" python kernels/bench.py "${sizes[@]}" --out "$rows/bench_logprob_gpu.jsonl"
if [ -n "$dry" ]; then shapes=(toy) more=(--pairs 2 --runs 1 --scale 0.2); else shapes=(1b 3b) more=(--pairs 16 --runs 3); fi
for shape in "${shapes[@]}"; do
    part 240 "step beside TRL $shape" python tests/bench_step.py --shape "$shape" --data synthetic "${more[@]}" \
        --out "$rows/bench_step_gpu.jsonl"
done
out=$(mktemp -d)
part 120 "toy" python train_pref.py --out "$out/toy" ${dry:+--max_steps 3}
part 120 "golden" python evaluate.py golden --preset toy ${dry:+--n 8} "$out/toy"
cp "$out/toy/metrics.jsonl" "$rows/gpu_toy.jsonl"
cat "$out/toy/golden.jsonl" >> "$rows/gpu_toy.jsonl"
echo "rows in $rows; $SECONDS s; failed: ${failed[*]:-none}"
