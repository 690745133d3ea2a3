#!/usr/bin/env bash
# The paper's controlled experiment on the toy task, whole: five hours on 2 CPU cores. Stopped, it goes on.
#
#     toy/study.sh [OUT=out/study] [JOBS=2]
#
# First the truth-labelled study (toy/study.py): ten seeds of 2 minutes for the toy and 40 s a run, 4 core hours; and
# its long posts, 7 minutes and 1 a run, one more. Then the golden-model-labelled one, 100 minutes on 2 cores beside
# other work: what happens when the judge is wrong.
#
# There three seeds, each with its own posts, writers, reference policy, golden reward model, pairs and training
# (toy/make.py --seed). The learning rate is found by a rule that looks at DPO alone: of LRS, the one at which DPO at
# beta 0.01 reaches the highest golden win rate anywhere in its run, mean over seeds; then three times that rate too.
# Rows and pictures go to results.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${1:-out/study} JOBS=${2:-2}
export OMP_NUM_THREADS=1
SEEDS="0 1 2" LRS="5e-5 1e-4 2e-4 4e-4 8e-4"
LOSSES="dpo ipo is_dpo is_ipo rpo chi_po length_dpo" BETAS="0.01 0.05 0.1"
LOG_EPS="0 0.5 2 4 inf"  # besides 1, which is is_dpo itself

train() {  # seed, name, flags: a run of 128 steps with 6 checkpoints
    python train_pref.py --preset toy --model "$OUT/toy$1/sft" --data "$OUT/toy$1/pairs.jsonl.gz" --eval_data '' \
        --seed "$1" --save_every 22 --out "$OUT/runs$1/$2" "${@:3}" > "$OUT/$1-$2.log"
}
golden() {  # seed, runs
    python evaluate.py golden --preset toy --rm "$OUT/toy$1/rm" --ref "$OUT/toy$1/sft" \
        --data "$OUT/toy$1/pairs_eval.jsonl.gz" --keep_samples "${@:2}" >> "$OUT/golden$1.log"
}
export -f train golden
export OUT

seq "$JOBS" | xargs -P "$JOBS" -I{} python toy/study.py run --out "$OUT"  # as many processes: they share the runs
python toy/study.py report

mkdir -p "$OUT" $(printf "$OUT/runs%s " $SEEDS)
for seed in $SEEDS; do
    [ -e "$OUT/toy$seed/pairs_eval.jsonl.gz" ] || echo "--seed $seed --to $OUT/toy$seed > $OUT/toy$seed.log"
done | xargs -P "$JOBS" -I{} bash -c 'python toy/make.py {}'

# The learning rate
for seed in $SEEDS; do for lr in $LRS; do
    name=dpo-beta0.01-lr$lr
    echo "train $seed $name --loss dpo --beta 0.01 --lr $lr && golden $seed $OUT/runs$seed/$name"
done; done | xargs -P "$JOBS" -I{} bash -c '{}'
python - "$OUT" "$SEEDS" "$LRS" > results/study_golden_lr.jsonl <<'EOF'
import json, statistics, sys
out, seeds, lrs = sys.argv[1], sys.argv[2].split(), sys.argv[3].split()
for lr in lrs:
    files = [f"{out}/runs{seed}/dpo-beta0.01-lr{lr}/golden.jsonl" for seed in seeds]
    peaks = [max(json.loads(line)["win_rate"] for line in open(file)) for file in files]
    print(json.dumps(dict(lr=lr, dpo_peak_win_rate=statistics.mean(peaks), by_seed=peaks)))
EOF
LR=$(python -c 'import json
rows = map(json.loads, open("results/study_golden_lr.jsonl"))
print(max(rows, key=lambda row: row["dpo_peak_win_rate"])["lr"])')
LR3=$(python -c "print(f'{3 * $LR:g}')")
echo "learning rates $LR and $LR3"

# The runs: every loss and beta at both rates, and at the first the ablation of the cap
for seed in $SEEDS; do for lr in $LR $LR3; do for beta in $BETAS; do
    for loss in $LOSSES; do echo "$seed $loss-beta$beta-lr$lr --loss $loss --beta $beta --lr $lr"; done
    if [ "$beta $lr" = "0.01 $LR" ]; then for cap in $LOG_EPS; do
        echo "$seed is_dpo-beta$beta-lr$lr-log_eps$cap --loss is_dpo --beta $beta --lr $lr --log_eps $cap"
    done; fi
done; done; done > "$OUT/runs.txt"
xargs -P "$JOBS" -a "$OUT/runs.txt" -I{} bash -c 'train {}'
for seed in $SEEDS; do
    awk -v seed="$seed" -v out="$OUT" '$1 == seed {print out "/runs" seed "/" $2}' "$OUT/runs.txt" |
        xargs -n 12 echo "golden $seed"
done | xargs -P "$JOBS" -I{} bash -c '{}'

# Rows and tables of both judges; pictures at the first rate. Figure 6 is of the training logs: its rows stand beside.
python toy/truth.py "$OUT/truth" $(awk -v out="$OUT" '{print out "/runs" $1 "/" $2}' "$OUT/runs.txt") \
    --rows results/study_golden.jsonl
python evaluate.py plot "$OUT"/runs?/*-lr"$LR"{,-log_eps*} --out "$OUT/figures"
cp "$OUT/figures/figure6.jsonl" results/study_figure6.jsonl
python toy/truth.py --pictures results/study_golden.jsonl
