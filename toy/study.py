"""The truth-labelled study: do importance weights help where the judge that labels the pairs is right?

    python toy/study.py run [--out out/study] [--seeds 10 11 ...]    train and judge; stopped, it goes on with the next run
    python toy/study.py report                                       results/study_truth.md and .png from the rows that are there

The paper takes its golden reward model for the truth: it labels the pairs, and it judges. The toy's generator knows the truth
(`truth` in toy/make.py), so here it does both. A seed has its own posts, writers, reference policy, pairs (toy/make.py --truth_only),
order of training and held-out prompts. Every method takes 128 steps of 32 pairs with the trainer's toy preset; "online" is online DPO,

    E_x E_{y, y' ~ pi(.|x)} [ -log sigmoid(beta (rho_w - rho_l)) ],    rho = log pi - log ref,

the paper's Eq. 10, of which IS-DPO is an estimate from the reference's pairs: at each step two samples of the policy as it stands for
each of the step's prompts, labelled by the truth, ties left out. It asks the judge during training, as no offline loss may.

Decided before the first of these runs: seeds 10 to 19; dpo, is_dpo, is_dpo with --ess_target 0.5, chi_po, online; beta 0.01; learning
rates 4e-4 (chosen for DPO, see toy/study.sh) and three times that; then, with seeds 10 to 12, the other losses, other caps, and beta
0.1. Checkpoints after every 26 steps and at the end. Judged on 2,048 held-out prompts: win rate of one completion (temperature 0.7,
top-p 0.95) against two of the reference (temperature 1: what the pairs are made of), ties half, by the truth; KL(pi || ref) from
samples at temperature 1 for the first 512 of them, the exact KL of each step summed. 512 more prompts choose: the best checkpoint
of a run, and the better rate of a method. All policies of a seed are judged with the same random numbers.

A row of results/study_truth.jsonl is a checkpoint: the run (`method`, beta, lr, seed), `step`, and the measures, with standard
errors over prompts (`_se`); `choice` is the win rate on the 512; `ess` (share of the step's pairs), `weight`, `power` (--ess_target)
are means over the steps since the checkpoint before.
"""

import argparse
import functools
import gzip
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO), str(REPO / "toy")]
import evaluate as ev  # noqa: E402
import make  # noqa: E402
from train_pref import dpo_loss, epoch_order, learning_rate  # noqa: E402

ROWS = REPO / "results" / "study_truth.jsonl"
METHODS = {  # flags of train_pref.py; online DPO is below
    "dpo": "--loss dpo",
    "is_dpo": "--loss is_dpo",
    "is_dpo, ess_target 0.5": "--loss is_dpo --ess_target 0.5",
    "chi_po": "--loss chi_po",
    "online": "",
    "ipo": "--loss ipo",
    "is_ipo": "--loss is_ipo",
    "rpo": "--loss rpo",
    "length_dpo": "--loss length_dpo",
    "is_dpo, log_eps 0": "--loss is_dpo --log_eps 0",
    "is_dpo, log_eps inf": "--loss is_dpo --log_eps inf",
}
MAIN, OTHERS, CAPS = list(METHODS)[:5], list(METHODS)[5:9], list(METHODS)[9:]
SEEDS, FEW_SEEDS, LRS = range(10, 20), range(10, 13), (4e-4, 1.2e-3)
PLAN = [(method, 0.01, lr, seed) for lr in LRS for seed in SEEDS for method in MAIN]
PLAN += [(method, 0.01, lr, seed) for seed in FEW_SEEDS for lr in LRS for method in OTHERS + CAPS]
PLAN += [(method, 0.1, lr, seed) for seed in FEW_SEEDS for lr in LRS for method in MAIN]
STEPS, BATCH, WARMUP, EVERY = 128, 32, 30, 26  # steps, pairs a step, steps of warm-up, steps between checkpoints
JUDGED, CHOOSING, KL = 2048, 512, 512  # held-out prompts: reported, to choose by, and those of the first with a KL
CPU, EOS, MAX_NEW_TOKENS = torch.device("cpu"), make.WORDS.index("</s>"), 64


# ------------------------------------------------------------------------------------------------------------ the toy of a seed
@functools.cache
def load_toy(directory, seed):
    """The toy of a seed, made if it is not there, with held-out posts that are in none of its files and the scores (n, 2) of the
    reference's completions of them."""
    if not (directory / "truth_pairs_eval.jsonl.gz").exists():
        command = [sys.executable, REPO / "toy" / "make.py", "--seed", str(seed), "--to", directory, "--truth_only"]
        subprocess.run(command, check=True)
    ref, tokenizer, _ = ev.load_model(str(directory / "sft"), ev.CausalLM, "fp32", CPU)
    rng, held_out = random.Random(f"study {seed}"), []
    used = {json.loads(line)["prompt"] for path in directory.glob("*.jsonl.gz") for line in gzip.open(path)}
    while len(held_out) < JUDGED + CHOOSING:
        prompt, _ = make.make_post(rng)
        if prompt not in used:
            used.add(prompt)
            held_out.append(prompt)
    toy = SimpleNamespace(directory=directory, ref=ref, tokenizer=tokenizer, prompts=held_out)
    toy.ids = ev.encode(tokenizer, held_out, len(make.WORDS))
    toy.references = score(toy, held_out, draw(ref, toy.ids, 2, 1.0, 1.0, "references"))
    return toy


def draw(policy, ids, k, temperature, top_p, seed):
    """k completions of each prompt -> ids [n][k]."""
    said = []
    for start in range(0, len(ids), 512):
        part = ids[start : start + 512]
        uniform = torch.stack([ev.uniform_numbers(prompt, k, MAX_NEW_TOKENS, seed) for prompt in part])
        said += ev.generate(policy, part, uniform, temperature, top_p, [EOS], CPU)
    return said


def score(toy, prompts, said):
    """The truth of completions (ids [n][k]) of prompts (texts) -> points (n, k), float64."""
    points = [[make.truth(prompt, *ev.completion_text(y, [EOS], toy.tokenizer)) for y in ys] for prompt, ys in zip(prompts, said)]
    return torch.tensor(points, dtype=torch.float64)


def judge(policy, toy):
    """What a policy is worth, on the held-out prompts of its toy -> the measures of a row."""
    said = draw(policy, toy.ids, 1, 0.7, 0.95, "win rate")
    points = score(toy, toy.prompts, said)
    shares = ev.win_shares(points, toy.references)
    drawn = draw(policy, toy.ids[:KL], 1, 1.0, 1.0, "KL")
    measures = dict(win_rate=shares[:JUDGED], truth=points[:JUDGED, 0], kl=ev.divergences(policy, toy.ref, toy.ids[:KL], drawn, CPU)[:, 0],
                    length=torch.tensor([float(len(ys[0])) for ys in said[:JUDGED]]))
    row = {}
    for name, values in measures.items():
        row[name], row[f"{name}_se"] = ev.mean_and_error(values)
    row["sqrt_kl"] = max(row["kl"], 0.0) ** 0.5
    row["sqrt_kl_se"] = row["kl_se"] / (2 * row["sqrt_kl"]) if row["sqrt_kl"] else 0.0  # to first order
    return row | dict(choice=shares[JUDGED:].mean().item())


# ------------------------------------------------------------------------------------------------------------------ the training
def train_offline(toy, method, beta, lr, seed, out):
    """A run of train_pref.py; yields (step, policy, what its log says) of each checkpoint."""
    command = [sys.executable, REPO / "train_pref.py", *METHODS[method].split(), "--preset", "toy", "--model", toy.directory / "sft",
               "--data", toy.directory / "truth_pairs.jsonl.gz", "--eval_data", "", "--beta", beta, "--lr", lr, "--seed", seed,
               "--micro_batch_size", BATCH, "--save_every", EVERY, "--out", out]
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
    log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()[1:]]
    before = 0
    for step in [*range(EVERY, STEPS, EVERY), STEPS]:
        mean = lambda name: float(np.mean([line[name] for line in log[before:step]]))
        policy = ev.load_model(str(out / ("final" if step == STEPS else f"step_{step:06d}")), ev.CausalLM, "fp32", CPU)[0]
        yield step, policy, dict(ess=mean("weights/ess") / BATCH, weight=mean("weights/mean"), power=mean("weights/power"))
        before = step
    shutil.rmtree(out)


def response_logps(model, prompts, responses):
    """Summed log-probs of two responses (ids) of each prompt (ids) -> (B, 2), nats."""
    rows, places = ev.response_rows(prompts, responses)
    predict = [(row, start + t - 1 if t else len(prompts[row]) - 1) for row, start, y in places for t in range(len(y))]
    batch = ev.batch_tensors(rows, predict, CPU, targets=[token for *_, y in places for token in y])
    hidden = model.model(batch["ids"], batch["positions"], batch["segments"]).flatten(0, 1)[batch["predict"]]
    token_logps = model.logits(hidden).log_softmax(-1).gather(1, batch["targets"][:, None])[:, 0]
    return torch.stack([part.sum() for part in token_logps.split([len(y) for *_, y in places])]).view(-1, 2)


def train_online(toy, beta, lr, seed):
    """Online DPO, the paper's Eq. 10; yields (step, policy, {}) of each checkpoint."""
    policy = ev.load_model(str(toy.directory / "sft"), ev.CausalLM, "fp32", CPU)[0]
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, eps=1e-5, weight_decay=0.0)
    texts = [json.loads(line)["prompt"] for line in gzip.open(toy.directory / "truth_pairs.jsonl.gz")]
    ids = ev.encode(toy.tokenizer, texts, len(make.WORDS))
    for step in range(1, STEPS + 1):
        epoch, k = divmod(step - 1, len(texts) // BATCH)
        picked = epoch_order(len(texts), seed, epoch)[k * BATCH : (k + 1) * BATCH]
        said = draw(policy, [ids[i] for i in picked], 2, 1.0, 1.0, f"online {seed} {step}")
        points = score(toy, [texts[i] for i in picked], said).tolist()
        prompts = [ids[i] for i, (a, b) in zip(picked, points) if a != b]
        pairs = [ys if a > b else ys[::-1] for ys, (a, b) in zip(said, points) if a != b]
        if pairs:
            with torch.no_grad():
                ref_logps = response_logps(toy.ref, prompts, pairs)
            dpo_loss(*response_logps(policy, prompts, pairs).unbind(1), *ref_logps.unbind(1), beta=beta).mean().backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.param_groups[0]["lr"] = learning_rate(step, STEPS, WARMUP, lr)
            optimizer.step()
            optimizer.zero_grad()
        if step % EVERY == 0 or step == STEPS:
            yield step, policy, {}


def run(out, seeds):
    torch.set_num_threads(1)  # small models are fastest so
    done = {(row["method"], row["beta"], row["lr"], row["seed"]) for row in read_rows()}
    for method, beta, lr, seed in [("reference", None, None, seed) for seed in seeds] + [one for one in PLAN if one[3] in seeds]:
        if (method, beta, lr, seed) in done:
            continue
        toy = load_toy(out / f"toy{seed}", seed)
        if method == "reference":
            trained = [(0, toy.ref, {})]
        elif method == "online":
            trained = train_online(toy, beta, lr, seed)
        else:
            trained = train_offline(toy, method, beta, lr, seed, out / "runs" / f"{method}-beta{beta}-lr{lr}-seed{seed}")
        about = dict(method=method, beta=beta, lr=lr, seed=seed)
        rows = [about | dict(step=step) | judge(policy, toy) | log for step, policy, log in trained]
        with ROWS.open("ab") as file:  # a run's rows at once: half a run is made again
            file.write(make.json_lines(rows))
        print(about, f"win rate {100 * rows[-1]['win_rate']:.1f}% sqrt KL {rows[-1]['sqrt_kl']:.2f}", flush=True)


def read_rows():
    return make.read_lines(ROWS) if ROWS.exists() else []


def main():
    parser = argparse.ArgumentParser(description="the truth-labelled study on the toy task")
    parser.add_argument("command", choices=["run", "report"])
    parser.add_argument("--out", type=Path, default=Path("out/study"), help="toys and runs (default: out/study)")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="of these alone (default: all)")
    args = parser.parse_args()
    if args.command == "run":
        run(args.out, args.seeds)


if __name__ == "__main__":
    main()
