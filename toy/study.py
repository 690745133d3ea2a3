"""The truth-labelled study: do importance weights help where the judge that labels the pairs is right?

    python toy/study.py run [--out out/study] [--parts rates] [--seeds 10 11]    train and judge; stopped, it goes on
    python toy/study.py report              results/study_truth.md and its pictures, from the rows that are there

`run` may be started more than once: a run that another process has begun is left to it.

The paper takes its golden reward model for the truth: it labels the pairs, and it judges. The toy's generator knows the
truth (`truth` in toy/make.py), so here it does both. A seed has its own posts, writers, reference policy, pairs
(toy/make.py --truth_only), order of training and held-out prompts. Every method takes 128 steps of 32 pairs by the
trainer's toy preset; "online" is online DPO,

    E_x E_{y, y' ~ pi(.|x)} [ -log sigmoid(beta (rho_w - rho_l)) ],    rho = log pi - log ref,

the paper's Eq. 10, of which IS-DPO is an estimate from the reference's pairs: at each step two samples of the policy as
it stands for each of the step's prompts, labelled by the truth, ties left out. It asks the judge during training, as no
offline loss may. "wpo" weights a pair by what the policy itself would say, without the reference (Zhou et al. 2024):
the product of both responses' exp(mean over tokens of log pi(y_t) - log sum_v pi(v)^2), detached, at most 1, as TRL's
`use_weighting` had it first (TRL 1.16 leaves the bound out).

What was decided, and when. First, before any run: seeds 10 to 19; dpo, is_dpo, chi_po, online; beta 0.01; learning
rates 4e-4 (chosen for DPO, see toy/study.sh) and three times that; then, with seeds 10 to 12, the other losses, other
caps, and beta 0.1. Later, with those rows known, and that DPO at 1e-4 did well on other seeds, but before any run of
it, the rate study: does what is seen at 4e-4 survive where the rate is tuned for each method, and how wide is the range
that works?

    rates   dpo and is_dpo at 1e-4, 2e-4, 4e-4, 8e-4, 1.2e-3, dpo also at 5e-5, seeds 10 to 19
    rivals  chi_po and online at the five rates, seeds 10 to 19
    long    dpo, is_dpo, chi_po at 1e-4 and 4e-4 on posts of ten to thirteen facts, seeds 10 to 14
    wpo     WPO at the five rates, seeds 10 to 14
    steps   dpo and is_dpo for 512 steps at 1e-4 and 4e-4, seeds 10 to 14

in this order; and what is told of it: the final win rate by rate; a method at its own best rate, where the rate for a
seed is the one of the highest mean final win rate of the *other* seeds on the prompts that choose; the mean over the
five rates; and the rates at which a method gains: where the 95% t interval of its final win rate minus the reference's,
by seed, is above 0.

Checkpoints after every 26 steps (of 512: every 104) and at the end. Judged on 2,048 held-out prompts (long posts: 512):
win rate of one completion (temperature 0.7, top-p 0.95) against two of the reference (temperature 1: what the pairs
are), ties half, by the truth; KL(pi || ref) from samples at temperature 1 for the first 512 of them (256), the exact KL
of each step summed. 512 more prompts (256) choose: the best checkpoint of a run, and the rate of a method. All policies
of a seed are judged with the same random numbers.

A row of results/study_truth.jsonl (long posts: study_long.jsonl) is a checkpoint: the run (`method`, `beta`, `lr`,
`seed`), `step`, and the measures, with standard errors over prompts (`_se`); `choice` is the win rate on the prompts
that choose; `ess` (share of the step's pairs) and `weight` are means over the steps since the checkpoint before.
"""

import argparse
import contextlib
import fcntl
import functools
import gzip
import json
import random
import shutil
import subprocess
import sys
import time
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
LONG_ROWS = REPO / "results" / "study_long.jsonl"
METHODS = {  # flags of train_pref.py; those without are trained below
    "dpo": "--loss dpo",
    "is_dpo": "--loss is_dpo",
    "chi_po": "--loss chi_po",
    "wpo": "",
    "online": "",
    "ipo": "--loss ipo",
    "is_ipo": "--loss is_ipo",
    "rpo": "--loss rpo",
    "length_dpo": "--loss length_dpo",
    "is_dpo, log_eps 0": "--loss is_dpo --log_eps 0",
    "is_dpo, log_eps inf": "--loss is_dpo --log_eps inf",
    "dpo, 512 steps": "--loss dpo --epochs 8",
    "is_dpo, 512 steps": "--loss is_dpo --epochs 8",
}
SEEDS, HALF_THE_SEEDS, FEW_SEEDS = range(10, 20), range(10, 15), range(10, 13)
RATES, FIRST_RATES, TWO_RATES = (1e-4, 2e-4, 4e-4, 8e-4, 1.2e-3), (4e-4, 1.2e-3), (1e-4, 4e-4)


def planned(methods, lrs, seeds, beta=0.01):
    """Runs: (method, beta, learning rate, seed)."""
    return [(method, beta, lr, seed) for seed in seeds for lr in lrs for method in methods]


PARTS = {
    "rates": planned(["dpo", "is_dpo"], RATES, SEEDS) + planned(["dpo"], [5e-5], SEEDS),
    "rivals": planned(["chi_po", "online"], RATES, SEEDS),
    "long": planned(["dpo", "is_dpo", "chi_po"], TWO_RATES, HALF_THE_SEEDS),
    "wpo": planned(["wpo"], RATES, HALF_THE_SEEDS),
    "steps": planned(["dpo, 512 steps", "is_dpo, 512 steps"], TWO_RATES, HALF_THE_SEEDS),
    "losses": planned(list(METHODS)[5:11], FIRST_RATES, FEW_SEEDS),
    "beta": planned(["dpo", "is_dpo", "chi_po", "online"], FIRST_RATES, FEW_SEEDS, beta=0.1),
}
STEPS, BATCH, WARMUP, EVERY = 128, 32, 30, 26  # steps, pairs a step, steps of warm-up, steps between checkpoints
JUDGED, CHOOSING, KL = 2048, 512, 512  # held-out prompts: reported, to choose by, and those of the first with a KL
LONG_JUDGED, LONG_CHOOSING, LONG_KL = 512, 256, 256  # of long posts, each of which costs more
CPU, EOS, MAX_NEW_TOKENS = torch.device("cpu"), make.WORDS.index("</s>"), 64


# ---------------------------------------------------------------------------------------------------- the toy of a seed
@functools.lru_cache(2)
def load_toy(out, seed, long=False):
    """The toy of a seed, made if it is not there, with held-out posts that are in none of its files and the scores
    (n, 2) of the reference's completions of them."""
    directory = out / f"{'long' if long else 'toy'}{seed}"
    with locked(directory.with_suffix(".lock"), wait=True):
        if not (directory / "truth_pairs_eval.jsonl.gz").exists():
            command = [sys.executable, REPO / "toy" / "make.py", "--seed", str(seed), "--to", directory, "--truth_only"]
            subprocess.run(command + ["--long"] * long, check=True, stdout=subprocess.DEVNULL)
    ref, tokenizer, _ = ev.load_model(str(directory / "sft"), ev.CausalLM, "fp32", CPU)
    toy = SimpleNamespace(directory=directory, long=long, ref=ref, tokenizer=tokenizer)
    toy.judged, toy.choosing, toy.kl, toy.max_new_tokens = JUDGED, CHOOSING, KL, MAX_NEW_TOKENS
    if long:
        toy.judged, toy.choosing, toy.kl = LONG_JUDGED, LONG_CHOOSING, LONG_KL
        toy.max_new_tokens = make.LONG_COMPLETION
    toy.prompts = held_out_posts(directory, toy.judged + toy.choosing, seed, make.LONG_FACTS if long else make.FACTS)
    toy.ids = prompt_ids(tokenizer, toy.prompts)
    toy.references = score(toy, toy.prompts, draw(toy, ref, toy.ids, 2, 1.0, 1.0, "references"))
    return toy


def held_out_posts(directory, n, seed, facts):
    """n posts that are in none of the files of a toy; facts: the numbers of facts that a post may have."""
    rng, posts = random.Random(f"study {seed}"), []
    used = {json.loads(line)["prompt"] for path in directory.glob("*.jsonl.gz") for line in gzip.open(path)}
    while len(posts) < n:
        prompt, _ = make.make_post(rng, facts)
        if prompt not in used:
            used.add(prompt)
            posts.append(prompt)
    return posts


@contextlib.contextmanager
def locked(path, wait=False):
    """Hold a lock file; gives whether it is held: without `wait` it is not where another process holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def prompt_ids(tokenizer, texts):
    """Ids of prompts, with the BOS that they begin with in training."""
    return [[tokenizer.bos_token_id, *ids] for ids in ev.encode(tokenizer, texts)]


def draw(toy, policy, ids, k, temperature, top_p, seed):
    """k completions of each prompt -> ids [n][k]."""
    said = []
    for start in range(0, len(ids), 512):
        part = ids[start : start + 512]
        uniform = torch.stack([ev.uniform_numbers(prompt, k, toy.max_new_tokens, seed) for prompt in part])
        said += ev.generate(policy, part, uniform, temperature, top_p, [EOS])
    return said


def score(toy, prompts, said):
    """The truth of completions (ids [n][k]) of prompts (texts) -> points (n, k), float64."""
    texts = [[ev.completion_text(y, [EOS], toy.tokenizer) for y in ys] for ys in said]
    points = [[make.truth(prompt, text, stop is not None) for text, stop, _ in ys]
              for prompt, ys in zip(prompts, texts)]
    return torch.tensor(points, dtype=torch.float64)


def judge(policy, toy):
    """What a policy is worth, on the held-out prompts of its toy -> the measures of a row."""
    said = draw(toy, policy, toy.ids, 1, 0.7, 0.95, "win rate")
    points = score(toy, toy.prompts, said)
    shares = ev.win_shares(points, toy.references)
    drawn = draw(toy, policy, toy.ids[: toy.kl], 1, 1.0, 1.0, "KL")
    measures = dict(win_rate=shares[: toy.judged], truth=points[: toy.judged, 0],
                    kl=ev.divergences(policy, toy.ref, toy.ids[: toy.kl], drawn)[:, 0],
                    length=torch.tensor([float(len(ys[0])) for ys in said[: toy.judged]]))
    row = {}
    for name, values in measures.items():
        row[name], row[f"{name}_se"] = ev.mean_and_error(values)
    row["sqrt_kl"] = max(row["kl"], 0.0) ** 0.5
    row["sqrt_kl_se"] = row["kl_se"] / (2 * row["sqrt_kl"]) if row["sqrt_kl"] else 0.0  # to first order
    return row | dict(choice=shares[toy.judged :].mean().item())


# --------------------------------------------------------------------------------------------------------- the training
def checkpoint_steps(method):
    """The steps after which a method's run is judged."""
    times = 4 if method.endswith("512 steps") else 1
    return [*range(times * EVERY, times * STEPS, times * EVERY), times * STEPS]


def train_offline(toy, method, beta, lr, seed, out):
    """A run of train_pref.py; yields (step, policy, what its log says) of each checkpoint."""
    steps = checkpoint_steps(method)
    command = [sys.executable, REPO / "train_pref.py", "--preset", "toy", *METHODS[method].split(), "--beta", beta,
               "--lr", lr, "--seed", seed, "--model", toy.directory / "sft", "--eval_data", "",
               "--data", toy.directory / "truth_pairs.jsonl.gz", "--micro_batch_size", BATCH, "--save_every", steps[0],
               "--out", out]
    if toy.long:
        command += ["--max_length", make.LONG_POSITIONS, "--max_prompt_length", make.LONG_PROMPT]
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
    log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()[1:]]
    before = 0
    for step in steps:
        mean = lambda name: float(np.mean([line[name] for line in log[before:step]]))
        checkpoint = out / ("final" if step == steps[-1] else f"step_{step:06d}")
        weights = dict(ess=mean("weights/ess") / BATCH, weight=mean("weights/mean"))
        yield step, ev.load_model(str(checkpoint), ev.CausalLM, "fp32", CPU)[0], weights
        before = step
    shutil.rmtree(out)


def response_logps(model, prompts, responses):
    """Of two responses (ids) of each prompt (ids): log-probs summed (B, 2), nats; and, detached, the mean over tokens
    of log pi(y_t) - log sum_v pi(v)^2 (B, 2), which makes WPO's weights."""
    rows, places = ev.response_rows(prompts, responses)
    predict = [(row, start + t - 1 if t else len(prompts[row]) - 1) for row, start, y in places for t in range(len(y))]
    batch = ev.batch_tensors(rows, predict, CPU, targets=[token for *_, y in places for token in y])
    hidden = model.model(batch["ids"], batch["positions"], batch["segments"]).flatten(0, 1)[batch["predict"]]
    logps = model.logits(hidden).log_softmax(-1)
    token_logps = logps.gather(1, batch["targets"][:, None])[:, 0]
    aligned = (token_logps - (2 * logps).logsumexp(-1)).detach()
    lengths = [len(y) for *_, y in places]
    sums = torch.stack([part.sum() for part in token_logps.split(lengths)])
    means = torch.stack([part.mean() for part in aligned.split(lengths)])
    return sums.view(-1, 2), means.view(-1, 2)


def online_pairs(toy, policy, texts, ids, seed):
    """Two samples of the policy for each prompt (texts, ids), the better by the truth first, ties left out -> ids of
    prompts and pairs."""
    said = draw(toy, policy, ids, 2, 1.0, 1.0, seed)
    points = score(toy, texts, said).tolist()
    prompts = [prompt for prompt, (a, b) in zip(ids, points) if a != b]
    return prompts, [ys if a > b else ys[::-1] for ys, (a, b) in zip(said, points) if a != b]


def train_here(toy, method, beta, lr, seed):
    """Online DPO, the paper's Eq. 10, and WPO; yields (step, policy, its log) of each checkpoint."""
    policy = ev.load_model(str(toy.directory / "sft"), ev.CausalLM, "fp32", CPU)[0]
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, eps=1e-5, weight_decay=0.0)
    data = [json.loads(line) for line in gzip.open(toy.directory / "truth_pairs.jsonl.gz")]
    texts = [row["prompt"] for row in data]
    ids = prompt_ids(toy.tokenizer, texts)
    sides = [ev.encode(toy.tokenizer, [row[side] for row in data]) for side in ("chosen", "rejected")]
    data_pairs = [[[*chosen, EOS], [*rejected, EOS]] for chosen, rejected in zip(*sides)]
    esses, means = [], []
    for step in range(1, STEPS + 1):
        epoch, k = divmod(step - 1, len(texts) // BATCH)
        picked = epoch_order(len(texts), seed, epoch)[k * BATCH : (k + 1) * BATCH]
        prompts, pairs = [ids[i] for i in picked], [data_pairs[i] for i in picked]
        if method == "online":
            prompts, pairs = online_pairs(toy, policy, [texts[i] for i in picked], prompts, f"online {seed} {step}")
        if pairs:
            with torch.no_grad():
                ref_logps, _ = response_logps(toy.ref, prompts, pairs)
            logps, aligned = response_logps(policy, prompts, pairs)
            losses = dpo_loss(*logps.unbind(1), *ref_logps.unbind(1), beta=beta)
            if method == "wpo":
                weights = aligned.sum(1).exp().clamp(max=1)
                losses = weights * losses
                esses.append((weights.sum() ** 2 / (weights**2).sum()).item() / BATCH)
                means.append(weights.mean().item())
            losses.mean().backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.param_groups[0]["lr"] = learning_rate(step, STEPS, WARMUP, lr)
            optimizer.step()
            optimizer.zero_grad()
        if step in checkpoint_steps(method):
            yield step, policy, dict(ess=float(np.mean(esses)), weight=float(np.mean(means))) if esses else {}
            esses, means = [], []


def run(out, parts, seeds):
    if not torch.distributed.is_initialized():
        ev.init_distributed(0, 60, 1)
    for part in parts:
        rows_file, long = (LONG_ROWS, True) if part == "long" else (ROWS, False)
        part_seeds = sorted({seed for *_, seed in PARTS[part]})
        for one in planned(["reference"], [None], part_seeds, beta=None) + PARTS[part]:
            name = "-".join(map(str, one)) + "-long" * long
            with locked(out / "locks" / name) as ours:
                if ours and one[-1] in seeds and one not in done_runs(rows_file):
                    train_and_judge(*one, load_toy(out, one[-1], long), out / "runs" / name, rows_file)


def done_runs(rows_file):
    return {(row["method"], row["beta"], row["lr"], row["seed"]) for row in read_rows(rows_file)}


def train_and_judge(method, beta, lr, seed, toy, directory, rows_file):
    """One run, its rows added to the file."""
    if method == "reference":
        trained = [(0, toy.ref, {})]
    elif METHODS[method]:
        trained = train_offline(toy, method, beta, lr, seed, directory)
    else:
        trained = train_here(toy, method, beta, lr, seed)
    about, began = dict(method=method, beta=beta, lr=lr, seed=seed), time.perf_counter()
    rows = [about | dict(step=step) | judge(policy, toy) | log for step, policy, log in trained]
    with rows_file.open("ab", buffering=0) as file:  # a run's rows in one write: half a run is made again
        file.write(make.json_lines(rows))
    print(about, f"win rate {100 * rows[-1]['win_rate']:.1f}% sqrt KL {rows[-1]['sqrt_kl']:.2f}",
          f"{time.perf_counter() - began:.0f} s", flush=True)


def read_rows(rows_file):
    return make.read_lines(rows_file) if rows_file.exists() else []


# ----------------------------------------------------------------------------------------------------------- the report
# Student's t, 97.5%, by degrees of freedom from 1
T_975 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131]
LOOKS = {"dpo": ("#b04000", "s"), "is_dpo": ("#0060a0", "o"), "wpo": ("#c2417c", "p"), "chi_po": ("#7a3b8f", "D"),
         "online": ("black", "h")}  # colour and marker, in every picture
OTHERS = list(METHODS)[5:11]  # that ran at FIRST_RATES alone
COMPARISONS = [("is_dpo", "dpo"), ("chi_po", "dpo"), ("wpo", "dpo"), ("online", "dpo"), ("is_dpo", "chi_po"),
               ("is_dpo", "wpo"), ("online", "is_dpo")]
BANDS = "mean over seeds; bands: its 95% t interval"
LEAST_SEEDS = 3  # of fewer an interval is wider than the picture
DISTANCES = (0.5, 0.75, 1.0, 1.5)  # sqrt KL at which win rates are compared
BRACKETED = 4e-4  # the one rate of it: at higher ones the first checkpoint is past most of them


def mean_and_half_width(values):
    """Mean over seeds and half the width of its 95% t interval (NaN of one seed)."""
    n = len(values)
    return float(np.mean(values)), T_975[n - 2] * float(np.std(values, ddof=1)) / n**0.5 if n > 1 else float("nan")


def cell(values, digits=1):
    if not values:
        return "-"
    mean, half_width = mean_and_half_width(values)
    return f"{mean:.{digits}f}" + (f" ± {half_width:.{digits}f}" if len(values) > 1 else "")


def table(header, lines):
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *lines]) + "\n"


def read_paths(rows):
    """{(method, beta, lr): {seed: its rows from the reference on}}"""
    paths, start = {}, {row["seed"]: row for row in rows if row["method"] == "reference"}
    for row in rows:
        if row["method"] != "reference":
            runs = paths.setdefault((row["method"], row["beta"], row["lr"]), {})
            runs.setdefault(row["seed"], [start[row["seed"]]]).append(row)
    return {key: dict(sorted(runs.items())) for key, runs in sorted(paths.items(), key=lambda item: item[0][1:])}


def final(path):
    return 100 * path[-1]["win_rate"]


def gain(path):
    return 100 * (path[-1]["win_rate"] - path[0]["win_rate"])


def best(path):
    """The checkpoint, or the reference, of the highest win rate on the prompts to choose by."""
    return max(path, key=lambda row: row["choice"])


def win_rate_at(path, distance):
    """The win rate (%) where the path of a run, a list of rows from the reference on, first comes to this sqrt KL,
    between two checkpoints on a line; None if it never does."""
    for a, b in zip(path, path[1:]):
        if a["sqrt_kl"] <= distance < b["sqrt_kl"]:
            share = (distance - a["sqrt_kl"]) / (b["sqrt_kl"] - a["sqrt_kl"])
            return 100 * (a["win_rate"] + share * (b["win_rate"] - a["win_rate"]))
    return None


def by_seed(ours, theirs):
    """[(ours, theirs)] of each seed that both have."""
    return [(ours[seed], theirs[seed]) for seed in ours if seed in theirs]


def differences(ours, theirs, value=final):
    """value(ours) - value(theirs) of each seed that both have; ours, theirs: {seed: path}."""
    return [value(a) - value(b) for a, b in by_seed(ours, theirs)]


def with_count(values):
    """A cell of differences, with the number of seeds above 0."""
    return f"{cell(values)} ({sum(value > 0 for value in values)}/{len(values)})" if values else "-"


# ------------------------------------------------------------------------------------------------- tables of all rates
def rates_of(paths, method, beta=0.01):
    return sorted(lr for name, its_beta, lr in paths if (name, its_beta) == (method, beta))


def well_known_rates(paths, method):
    return [lr for lr in rates_of(paths, method) if len(paths[method, 0.01, lr]) >= LEAST_SEEDS]


def by_rate_table(paths, methods, value):
    """value(runs), a cell, of each method and learning rate."""
    rates = sorted({lr for method in methods for lr in rates_of(paths, method)})
    lines = [[method, *(value(paths.get((method, 0.01, lr), {})) for lr in rates)] for method in methods]
    return table(["method", *(f"{lr:g}" for lr in rates)], lines)


def comparisons_table(paths):
    lines = []
    for ours, theirs in COMPARISONS:
        runs = [(paths.get((ours, 0.01, lr), {}), paths.get((theirs, 0.01, lr), {})) for lr in RATES]
        if any(by_seed(a, b) for a, b in runs):
            lines.append([f"{ours} - {theirs}", *(with_count(differences(a, b)) for a, b in runs)])
    return table(["difference", *(f"{lr:g}" for lr in RATES)], lines)


def seeds_at_all(paths, method, rates, beta=0.01):
    """The seeds that a method ran at all these rates with."""
    return sorted(set.intersection(*(set(paths.get((method, beta, lr), {})) for lr in rates)))


def range_table(paths, methods):
    """How wide the range of rates is at which a method gains; its mean over the five rates, and that minus dpo's. Of
    rates with enough seeds."""
    lines, means = [], {}
    for method in methods:
        seeds = seeds_at_all(paths, method, RATES)
        means[method] = {seed: np.mean([final(paths[method, 0.01, lr][seed]) for lr in RATES]) for seed in seeds}
        gains = {lr: mean_and_half_width([*map(gain, paths[method, 0.01, lr].values())])
                 for lr in RATES if lr in well_known_rates(paths, method)}
        wins = [lr for lr, (mean, half_width) in gains.items() if mean - half_width > 0]
        lowest = min((final_mean(paths, method, lr), lr) for lr in gains) if gains else None
        to_dpo = [a - b for a, b in by_seed(means[method], means.get("dpo", {}))]
        lines.append([method, f"{len(wins)} of {len(gains)}", ", ".join(f"{lr:g}" for lr in wins) or "-",
                      f"{lowest[0]:.1f} ({lowest[1]:g})" if lowest else "-",
                      *((cell([*means[method].values()]), with_count(to_dpo) if method != "dpo" else "-")
                        if len(seeds) >= LEAST_SEEDS else ("-", "-"))])
    header = ["method", "rates that gain", "which", "lowest mean (rate)", "mean over the five rates", "minus dpo's"]
    return table(header, lines)


def final_mean(paths, method, lr):
    return float(np.mean([*map(final, paths[method, 0.01, lr].values())]))


def tuned(paths, method, beta, rates):
    """{seed: (rate, path)}: every seed at the rate of the highest mean final win rate of the *other* seeds on the
    prompts to choose by."""
    seeds, chosen = seeds_at_all(paths, method, rates, beta), {}
    for seed in seeds if len(seeds) > 1 else []:
        others = [other for other in seeds if other != seed]
        lr = max(rates, key=lambda lr: np.mean([paths[method, beta, lr][other][-1]["choice"] for other in others]))
        chosen[seed] = lr, paths[method, beta, lr][seed]
    return chosen


def tuned_table(paths, methods, beta):
    """Each method at its own best rate, and its differences, by seed, from dpo and is_dpo at theirs."""
    lines, chosen = [], {}
    for method in [method for method in methods if len(rates_of(paths, method, beta)) > 1]:
        of_seeds = tuned(paths, method, beta, rates_of(paths, method, beta))
        if len(of_seeds) < LEAST_SEEDS:
            continue
        rates = [lr for lr, _ in of_seeds.values()]
        chosen[method] = runs = {seed: path for seed, (_, path) in of_seeds.items()}
        times = ", ".join(f"{lr:g}: {rates.count(lr)}" for lr in sorted(set(rates)))
        lines.append([method, times, cell([*map(final, runs.values())]),
                      cell([path[-1]["sqrt_kl"] for path in runs.values()], 2),
                      cell([100 * best(path)["win_rate"] for path in runs.values()]),
                      *(with_count(differences(runs, chosen.get(other, {}))) if other != method else "-"
                        for other in ("dpo", "is_dpo"))])
    return table(["method", "rate: seeds", "final win rate", "sqrt KL", "best checkpoint: win rate", "minus dpo",
                  "minus is_dpo"], lines)


def steps_table(paths):
    """dpo and is_dpo for 128 steps and for four times as many."""
    lines = []
    for method in ("dpo", "is_dpo"):
        for lr in TWO_RATES:
            longer = paths.get((f"{method}, 512 steps", 0.01, lr), {})
            short = {seed: path for seed, path in paths.get((method, 0.01, lr), {}).items() if seed in longer}
            to_dpo = differences(longer, paths.get(("dpo, 512 steps", 0.01, lr), {})) if method != "dpo" else []
            lines.append([method, f"{lr:g}", cell([*map(final, short.values())]), cell([*map(final, longer.values())]),
                          with_count(differences(longer, short)),
                          *(cell([path[-1]["sqrt_kl"] for path in runs.values()], 2) for runs in (short, longer)),
                          cell([100 * best(path)["win_rate"] for path in longer.values()]), with_count(to_dpo)])
    return table(["method", "rate", "128 steps: final", "512 steps: final", "512 - 128", "128 steps: sqrt KL",
                  "512 steps: sqrt KL", "512 steps: best checkpoint", "512 steps: minus dpo"], lines)


# ------------------------------------------------------------------------------------------------ tables of one rate
def ends_table(here):
    """The last and the best checkpoint of each method; here: {method: {seed: path}} of a beta and learning rate."""
    lines = []
    for method, runs in here.items():
        ends, chosen = [path[-1] for path in runs.values()], [best(path) for path in runs.values()]
        ess = [row["ess"] for row in ends if "ess" in row]
        lines.append([method, str(len(runs)), cell([final(path) for path in runs.values()]),
                      cell([row["sqrt_kl"] for row in ends], 2), cell([row["truth"] for row in ends], 2),
                      cell([row["length"] for row in ends]), cell([100 * row["win_rate"] for row in chosen]),
                      cell([row["sqrt_kl"] for row in chosen], 2), cell(ess, 2)])
    return table(["method", "seeds", "final win rate", "sqrt KL", "truth (points)", "length (tokens)",
                  "best checkpoint: win rate", "sqrt KL", "ESS share at the end"], lines)


def differences_table(here, distances):
    """Each method minus dpo and minus chi_po, by seed, in points; at these sqrt KL too."""
    lines = []
    for method, other in [(method, other) for other in ("dpo", "chi_po") for method in here if method != other]:
        pairs = by_seed(here[method], here.get(other, {}))
        if not pairs or (method, other) == ("dpo", "chi_po"):  # that one stands there with the other sign
            continue
        at = [[(win_rate_at(a, d), win_rate_at(b, d)) for a, b in pairs] for d in distances]
        at = [[a - b for a, b in both if a is not None and b is not None] for both in at]
        ends = [final(a) - final(b) for a, b in pairs]
        lines.append([f"{method} - {other}", str(len(pairs)), cell(ends), str(sum(end > 0 for end in ends)),
                      cell([100 * (best(a)["win_rate"] - best(b)["win_rate"]) for a, b in pairs]),
                      *(f"{cell(values)} ({len(values)})" for values in at)])
    header = ["difference", "seeds", "final", "seeds above 0", "best checkpoint"]
    return table(header + [f"at sqrt KL {d:g}" for d in distances], lines)


def over_training_table(paths, name, scale, digits):
    """A measure after each checkpoint, of long posts."""
    lines, steps = [], checkpoint_steps("dpo")
    for (method, _, lr), runs in paths.items():
        at = [[scale * row[name] for path in runs.values() for row in path if row["step"] == step] for step in steps]
        lines.append([method, f"{lr:g}", *(cell(values, digits) for values in at)])
    return table(["method", "rate", *(f"step {step}" for step in steps)], lines)


def report(rows, long_rows):
    """The tables, as Markdown."""
    paths, reference = read_paths(rows), [100 * row["win_rate"] for row in rows if row["method"] == "reference"]
    main = [method for method in LOOKS if rates_of(paths, method)]
    text = ("Made by `toy/study.py report` from study_truth.jsonl and study_long.jsonl; what was decided beforehand:"
            " toy/study.py. Means over seeds ± half the 95% t interval. Win rates in % by the truth; the reference's is"
            f" {cell(reference)} ({len(reference)} seeds). Differences: of runs of one seed, in points; in brackets the"
            " seeds above 0 of all. Best checkpoint: of a run, the reference among them, by 512 other prompts. ESS"
            " share: mean over the last 24 steps.\n\n## The rate study: beta 0.01, ten seeds (wpo: five)\n")
    cells = lambda value, digits=1: lambda runs: cell([*map(value, runs.values())], digits)
    text += "\n### Final win rate by learning rate\n\nIn brackets: seeds.\n\n"
    text += by_rate_table(paths, main, lambda runs: f"{cell([*map(final, runs.values())])} ({len(runs)})")
    text += f"\n### Final win rate minus the reference's\n\n{by_rate_table(paths, main, cells(gain))}"
    text += "\n### sqrt KL at the end\n\n" + by_rate_table(paths, main, cells(lambda path: path[-1]["sqrt_kl"], 2))
    text += f"\n### Differences of final win rates, at the same rate\n\n{comparisons_table(paths)}"
    text += ("\n### How wide the range of rates is\n\nA rate gains if the interval of the final win rate minus the"
             f" reference's is above 0. Rates of fewer than {LEAST_SEEDS} seeds are left out.\n\n")
    text += range_table(paths, main)
    text += ("\n### Each method at its own best rate\n\nThe rate of a seed: the one of the highest mean final win"
             f" rate of the other seeds, on 512 other prompts. Methods with fewer than {LEAST_SEEDS} seeds at all their"
             f" rates are left out.\n\n{tuned_table(paths, main, 0.01)}")
    if rates_of(paths, "dpo, 512 steps"):
        text += f"\n### Four times the steps\n\n{steps_table(paths)}"
    if long_rows:
        long_paths = read_paths(long_rows)
        long_reference = [row for row in long_rows if row["method"] == "reference"]
        text += ("\n## Long posts: ten to thirteen facts\n\nThe reference's win rate is"
                 f" {cell([100 * row['win_rate'] for row in long_reference])}, its truth"
                 f" {cell([row['truth'] for row in long_reference], 2)} points, its length"
                 f" {cell([row['length'] for row in long_reference])} tokens ({len(long_reference)} seeds).\n")
        text += rate_sections(long_paths, "###", ())
        for title, *how in (("Win rate", "win_rate", 100, 1), ("sqrt KL", "sqrt_kl", 1, 2),
                            ("ESS share of the steps since the checkpoint before", "ess", 1, 2)):
            text += f"\n### {title}, over training\n\n{over_training_table(long_paths, *how)}"
    text += f"\n## Rate by rate\n{rate_sections(paths, '###', DISTANCES)}"
    text += f"\n### Other losses and caps at their own better rate, beta 0.01\n\n{tuned_table(paths, OTHERS, 0.01)}"
    text += f"\n### Each method at its own better rate, beta 0.1\n\n{tuned_table(paths, METHODS, 0.1)}"
    return text


def rate_sections(paths, level, distances):
    text = ""
    for beta, lr in dict.fromkeys((beta, lr) for _, beta, lr in paths):
        here = {method: paths[method, beta, lr] for method in METHODS if (method, beta, lr) in paths}
        text += f"\n{level} beta {beta:g}, learning rate {lr:g}\n\n{ends_table(here)}"
        if len(here) > 1:
            text += "\n" + differences_table(here, distances if lr == BRACKETED else ())
    return text


# ------------------------------------------------------------------------------------------------------- the pictures
WIN_RATE, SQRT_KL, ESS = "win rate by the truth (%)", "√KL(π || ref) (√nats)", "ESS, share of a step's pairs"


def label(method, numbers_of_seeds):
    low, high = min(numbers_of_seeds), max(numbers_of_seeds)
    return f"{method} ({low if low == high else f'{low}-{high}'} seeds)"


def new_figure(panels, size):
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, panels)
    for ax in axes:
        ax.grid(alpha=0.3)
    return figure, axes


def draw_line(ax, x, columns, method, **look):
    """A method's means over seeds, with the band of their 95% t intervals; columns: a list of values an x."""
    colour, marker = LOOKS[method]
    mean, half_width = np.array([mean_and_half_width(values) for values in columns]).T
    name = label(method, [*map(len, columns)])
    ax.plot(x, mean, color=colour, **dict(marker=marker, markersize=5, label=name) | look)
    ax.fill_between(x, mean - half_width, mean + half_width, color=colour, alpha=0.13, linewidth=0)


def draw_rates(rows):
    """Final win rate over the learning rate, and over sqrt KL: there with bars, as both have an interval. Of rates with
    enough seeds."""
    paths, reference = read_paths(rows), [100 * row["win_rate"] for row in rows if row["method"] == "reference"]
    figure, (left, right) = new_figure(2, (10, 4.4))
    shown = []  # sqrt KL: an interval may reach below 0, where a logarithmic axis does not
    for method, (colour, marker) in LOOKS.items():
        rates = well_known_rates(paths, method)
        runs = [[*paths[method, 0.01, lr].values()] for lr in rates]
        if not rates:
            continue
        ends = [[final(path) for path in of_rate] for of_rate in runs]
        draw_line(left, rates, ends, method)
        distances = [[path[-1]["sqrt_kl"] for path in of_rate] for of_rate in runs]
        (x, xerr), (y, yerr) = (np.array([*map(mean_and_half_width, columns)]).T for columns in (distances, ends))
        right.errorbar(x, y, yerr, xerr, color=colour, marker=marker, markersize=5, elinewidth=0.7, alpha=0.9)
        shown += [*x]
    for ax in (left, right):
        ax.axhline(np.mean(reference), color="grey", linestyle="--", linewidth=1, label="the reference policy")
        ax.set_ylabel(f"final {WIN_RATE}")
    left.set_xscale("log")
    left.set_xticks([5e-5, *RATES], [f"{lr:g}" for lr in (5e-5, *RATES)], fontsize=8)
    left.minorticks_off()
    left.set_xlabel("learning rate")
    right.set_xscale("log")
    right.set_xticks([0.5, 1, 2, 4, 8], ["0.5", "1", "2", "4", "8"], fontsize=8)
    right.set_xlim(0.8 * min(shown), 1.25 * max(shown))
    right.minorticks_off()
    right.set_xlabel(f"final {SQRT_KL}, a point a learning rate")
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=6, fontsize=8,
                  title=f"{BANDS} (right: bars)", title_fontsize=8)
    return figure


def draw_training(rows, beta, lr):
    """Win rate and sqrt KL over training."""
    paths = read_paths(rows)
    figure, axes = new_figure(2, (10, 4.2))
    for ax, (name, scale, y) in zip(axes, [("win_rate", 100, WIN_RATE), ("sqrt_kl", 1, SQRT_KL)]):
        for method in LOOKS:
            columns = [*zip(*paths.get((method, beta, lr), {}).values())]  # the rows of all seeds at a step
            if columns:
                values = [[scale * row[name] for row in column] for column in columns]
                draw_line(ax, [column[0]["step"] for column in columns], values, method)
        ax.set_xlabel("step")
        ax.set_ylabel(y)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=5, fontsize=8,
                  title=f"learning rate {lr:g}: {BANDS}", title_fontsize=8)
    return figure


def draw_long(rows):
    """Win rate, sqrt KL and ESS over training on long posts, at both rates."""
    paths = read_paths(rows)
    figure, axes = new_figure(3, (12, 4.2))
    for ax, (name, scale, y) in zip(axes, [("win_rate", 100, WIN_RATE), ("sqrt_kl", 1, SQRT_KL), ("ess", 1, ESS)]):
        for (method, _, lr), runs in paths.items():
            columns = [column for column in zip(*runs.values()) if name in column[0]]
            values = [[scale * row[name] for row in column] for column in columns]
            lined = dict(linestyle="--" if lr == min(TWO_RATES) else "-")
            draw_line(ax, [column[0]["step"] for column in columns], values, method,
                      label=label(f"{method}, rate {lr:g}", [*map(len, columns)]), **lined)
        ax.set_xlabel("step")
        ax.set_ylabel(y)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=8,
                  title=f"long posts: {BANDS}", title_fontsize=8)
    return figure


def main():
    parser = argparse.ArgumentParser(description="the truth-labelled study on the toy task")
    parser.add_argument("command", choices=["run", "report"])
    parser.add_argument("--out", type=Path, default=Path("out/study"), help="toys and runs (default: out/study)")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS),
                        help="of the plan (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="of these alone (default: all)")
    args = parser.parse_args()
    if args.command == "run":
        run(args.out, args.parts, args.seeds)
        return
    rows, long_rows = read_rows(ROWS), read_rows(LONG_ROWS)
    ROWS.with_suffix(".md").write_text(report(rows, long_rows))
    draw_training(rows, 0.01, 4e-4).savefig(ROWS.with_suffix(".png"), dpi=150)
    draw_rates(rows).savefig(ROWS.with_name("study_rates.png"), dpi=150)
    if long_rows:
        draw_long(long_rows).savefig(LONG_ROWS.with_suffix(".png"), dpi=150)


if __name__ == "__main__":
    main()
