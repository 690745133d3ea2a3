#!/usr/bin/env bash
# What is worth knowing of a GPU, on a machine without a network, in some ten minutes: cheapest and most telling first.
#   bash tests/gpu_day.sh                     on a GPU; rows go to results/, or to ROWS=FOLDER
#   DRY=1 bash tests/gpu_day.sh               the same commands at tiny sizes, on a GPU or without one
# Stopped, it goes on: parts that ended well stand in gpu_day.txt beside the rows and are left out. Each part has a limit
# and the next begins whatever became of it; what failed is named at the end, and the exit status says so.
set -uo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
dry=${DRY:-}
rows=${ROWS:-results}
[ -n "$dry" ] && rows=$(mktemp -d)
touch "$rows/gpu_day.txt"
liger=$(python -c "import torch; print('--liger' * torch.cuda.is_available())")  # needs a GPU
failed=()
part() {  # part SECONDS NAME COMMAND..
    local limit=$1 name=$2 began=$SECONDS
    shift 2
    grep -q "^$name: " "$rows/gpu_day.txt" && return
    echo "== $name: $*"
    if timeout -k 10 "$limit" "$@"; then
        echo "$name: $((SECONDS - began)) s" | tee -a "$rows/gpu_day.txt"
    else
        failed+=("$name ($?, $((SECONDS - began)) s)")
    fi
}

if [ -n "$dry" ]; then
    collect=(--collect-only)
    kernel=(--shapes 64,256,64 --runs 1 --no-compile)
    one=toy three=toy wide=2 narrow=1 beside=(--pairs 2 --runs 1 --scale 0.2)
    small=tiny large=tiny steps=(--pairs 4 --steps 2)
    few=(--n 8) short=(--max_steps 3)
else
    collect=(-n 6)
    kernel=(--shapes 4096,32000,2048 8192,128256,2048 8192,128256,3072)
    one=1b three=3b wide=16 narrow=4 beside=(--pairs 16 --runs 3)
    small=1b large=3b steps=(--pairs 16 --steps 5)
    few=() short=()
fi

part 200 "tests" python -m pytest -q -m gpu --timeout 120 "${collect[@]}"
part 60 "attention" python tests/gpu_step.py --attention --out "$rows/gpu_attention.jsonl"
part 200 "kernel" python kernels/bench.py "${kernel[@]}" --out "$rows/bench_logprob_gpu.jsonl"

beside() {  # beside NAME SHAPE OPTIONS..: a step of ours and of TRL
    local name=$1 shape=$2
    shift 2
    part 150 "$name" python tests/bench_step.py --shape "$shape" --data synthetic "${beside[@]}" "$@" \
        --out "$rows/bench_step_gpu.jsonl"
}
beside "1B beside TRL" "$one" --micro_batch_size "$wide" --contestants ours trl_default trl_shipped trl_best
beside "3B beside TRL at its best" "$three" --micro_batch_size "$narrow" --contestants ours trl_best $liger
beside "3B beside TRL as it comes" "$three" --micro_batch_size "$narrow" --contestants ours trl_shipped
beside "1B beside TRL with Liger" "$one" --micro_batch_size "$wide" --contestants ours trl_default trl_best $liger
part 120 "designs 3B" python tests/gpu_designs.py --shape "$large" --out "$rows/gpu_designs.jsonl"
part 120 "designs 1B" python tests/gpu_designs.py --shape "$small" --micro_batch_size 16 --out "$rows/gpu_designs.jsonl"

steps() {  # steps SHAPE OPTIONS..: steps of ours alone
    local shape=$1
    shift
    part 100 "steps $shape $*" python tests/gpu_step.py --shape "$shape" "${steps[@]}" "$@" --out "$rows/gpu_steps.jsonl"
}
for shape in "$large" "$small"; do
    steps "$shape" --ddp --lengths tldr max uf --activations kept checkpointed
    steps "$shape" --shard
done

out=$(mktemp -d)
part 100 "toy" python train_pref.py --out "$out/toy" "${short[@]}"
part 100 "golden" python evaluate.py golden --preset toy "${few[@]}" "$out/toy"
[ -d "$out/toy" ] && cat "$out"/toy/metrics.jsonl "$out"/toy/golden.jsonl > "$rows/gpu_toy.jsonl"
[ -n "$dry" ] || steps "$large" --compile
echo "rows in $rows; $SECONDS s; failed: ${failed[*]:-none}"
[ ${#failed[@]} = 0 ]
