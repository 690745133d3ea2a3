"""The truth-labelled study: do importance weights help where the judge that labels the pairs is right?

    python toy/study.py run [--out out/study] [--seeds 10 11]    train and judge; stopped, it goes on with the next run
    python toy/study.py report              results/study_truth.md and .png, from the rows that are there

The paper takes its golden reward model for the truth: it labels the pairs, and it judges. The toy's generator knows the
truth (`truth` in toy/make.py), so here it does both. A seed has its own posts, writers, reference policy, pairs
(toy/make.py --truth_only), order of training and held-out prompts. Every method takes 128 steps of 32 pairs by the
trainer's toy preset; "online" is online DPO,

    E_x E_{y, y' ~ pi(.|x)} [ -log sigmoid(beta (rho_w - rho_l)) ],    rho = log pi - log ref,

the paper's Eq. 10, of which IS-DPO is an estimate from the reference's pairs: at each step two samples of the policy as
it stands for each of the step's prompts, labelled by the truth, ties left out. It asks the judge during training, as no
offline loss may.

Decided before the first of these runs: seeds 10 to 19; dpo, is_dpo, is_dpo with --ess_target 0.5, chi_po, online; beta
0.01; learning rates 4e-4 (chosen for DPO, see toy/study.sh) and three times that; then, with seeds 10 to 12, the other
losses, other caps, and beta 0.1. Checkpoints after every 26 steps and at the end. Judged on 2,048 held-out prompts: win
rate of one completion (temperature 0.7, top-p 0.95) against two of the reference (temperature 1: what the pairs are),
ties half, by the truth; KL(pi || ref) from samples at temperature 1 for the first 512 of them, the exact KL of each
step summed. 512 more prompts choose: the best checkpoint of a run, and the better rate of a method. All policies of a
seed are judged with the same random numbers.

A row of results/study_truth.jsonl is a checkpoint: the run (`method`, `beta`, `lr`, `seed`), `step`, and the measures,
with standard errors over prompts (`_se`); `choice` is the win rate on the 512; `ess` (share of the step's pairs),
`weight`, `power` (--ess_target) are means over the steps since the checkpoint before.
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


# ---------------------------------------------------------------------------------------------------- the toy of a seed
@functools.cache
def load_toy(directory, seed):
    """The toy of a seed, made if it is not there, with held-out posts that are in none of its files and the scores
    (n, 2) of the reference's completions of them."""
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
    toy.ids = prompt_ids(tokenizer, held_out)
    toy.references = score(toy, held_out, draw(ref, toy.ids, 2, 1.0, 1.0, "references"))
    return toy


def prompt_ids(tokenizer, texts):
    """Ids of prompts, with the BOS that they begin with in training."""
    return [[tokenizer.bos_token_id, *ids] for ids in ev.encode(tokenizer, texts)]


def draw(policy, ids, k, temperature, top_p, seed):
    """k completions of each prompt -> ids [n][k]."""
    said = []
    for start in range(0, len(ids), 512):
        part = ids[start : start + 512]
        uniform = torch.stack([ev.uniform_numbers(prompt, k, MAX_NEW_TOKENS, seed) for prompt in part])
        said += ev.generate(policy, part, uniform, temperature, top_p, [EOS])
    return said


def score(toy, prompts, said):
    """The truth of completions (ids [n][k]) of prompts (texts) -> points (n, k), float64."""
    texts = [[ev.completion_text(y, [EOS], toy.tokenizer) for y in ys] for ys in said]
    points = [[make.truth(prompt, text, stop is not None) for text, stop, _ in ys] for prompt, ys in zip(prompts, texts)]
    return torch.tensor(points, dtype=torch.float64)


def judge(policy, toy):
    """What a policy is worth, on the held-out prompts of its toy -> the measures of a row."""
    said = draw(policy, toy.ids, 1, 0.7, 0.95, "win rate")
    points = score(toy, toy.prompts, said)
    shares = ev.win_shares(points, toy.references)
    drawn = draw(policy, toy.ids[:KL], 1, 1.0, 1.0, "KL")
    measures = dict(win_rate=shares[:JUDGED], truth=points[:JUDGED, 0],
                    kl=ev.divergences(policy, toy.ref, toy.ids[:KL], drawn)[:, 0],
                    length=torch.tensor([float(len(ys[0])) for ys in said[:JUDGED]]))
    row = {}
    for name, values in measures.items():
        row[name], row[f"{name}_se"] = ev.mean_and_error(values)
    row["sqrt_kl"] = max(row["kl"], 0.0) ** 0.5
    row["sqrt_kl_se"] = row["kl_se"] / (2 * row["sqrt_kl"]) if row["sqrt_kl"] else 0.0  # to first order
    return row | dict(choice=shares[JUDGED:].mean().item())


# --------------------------------------------------------------------------------------------------------- the training
def train_offline(toy, method, beta, lr, seed, out):
    """A run of train_pref.py; yields (step, policy, what its log says) of each checkpoint."""
    command = [sys.executable, REPO / "train_pref.py", "--preset", "toy", *METHODS[method].split(), "--beta", beta,
               "--lr", lr, "--seed", seed, "--model", toy.directory / "sft", "--eval_data", "",
               "--data", toy.directory / "truth_pairs.jsonl.gz", "--micro_batch_size", BATCH, "--save_every", EVERY,
               "--out", out]
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
    log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()[1:]]
    before = 0
    for step in [*range(EVERY, STEPS, EVERY), STEPS]:
        mean = lambda name: float(np.mean([line[name] for line in log[before:step]]))
        checkpoint = out / ("final" if step == STEPS else f"step_{step:06d}")
        weights = dict(ess=mean("weights/ess") / BATCH, weight=mean("weights/mean"), power=mean("weights/power"))
        yield step, ev.load_model(str(checkpoint), ev.CausalLM, "fp32", CPU)[0], weights
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
    ids = prompt_ids(toy.tokenizer, texts)
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
            logps = response_logps(policy, prompts, pairs)
            dpo_loss(*logps.unbind(1), *ref_logps.unbind(1), beta=beta).mean().backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.param_groups[0]["lr"] = learning_rate(step, STEPS, WARMUP, lr)
            optimizer.step()
            optimizer.zero_grad()
        if step % EVERY == 0 or step == STEPS:
            yield step, policy, {}


def run(out, seeds):
    if not torch.distributed.is_initialized():
        ev.init_distributed(0, 60, 1)
    done = {(row["method"], row["beta"], row["lr"], row["seed"]) for row in read_rows()}
    references = [("reference", None, None, seed) for seed in seeds]
    for method, beta, lr, seed in references + [planned for planned in PLAN if planned[3] in seeds]:
        if (method, beta, lr, seed) in done:
            continue
        toy = load_toy(out / f"toy{seed}", seed)
        if method == "reference":
            trained = [(0, toy.ref, {})]
        elif method == "online":
            trained = train_online(toy, beta, lr, seed)
        else:
            directory = out / "runs" / f"{method}-beta{beta}-lr{lr}-seed{seed}"
            trained = train_offline(toy, method, beta, lr, seed, directory)
        about = dict(method=method, beta=beta, lr=lr, seed=seed)
        rows = [about | dict(step=step) | judge(policy, toy) | log for step, policy, log in trained]
        with ROWS.open("ab") as file:  # a run's rows at once: half a run is made again
            file.write(make.json_lines(rows))
        print(about, f"win rate {100 * rows[-1]['win_rate']:.1f}% sqrt KL {rows[-1]['sqrt_kl']:.2f}", flush=True)


def read_rows():
    return make.read_lines(ROWS) if ROWS.exists() else []


# ----------------------------------------------------------------------------------------------------------- the report
# Student's t, 97.5%, by degrees of freedom from 1
T_975 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131]
COLOURS = dict(zip(MAIN, ("#b04000", "#0060a0", "#3a7d34", "#7a3b8f", "black")))
DISTANCES = (0.5, 0.75, 1.0, 1.5)  # sqrt KL at which win rates are compared


def mean_and_half_width(values):
    """Mean over seeds and half the width of its 95% t interval (NaN of one seed)."""
    n = len(values)
    return float(np.mean(values)), T_975[n - 2] * float(np.std(values, ddof=1)) / n**0.5 if n > 1 else float("nan")


def cell(values, digits=1):
    if not values:
        return "-"
    mean, half_width = mean_and_half_width(values)
    return f"{mean:.{digits}f}" + (f" ± {half_width:.{digits}f}" if len(values) > 1 else "")


def win_rate_at(path, distance):
    """The win rate (%) where the path of a run, a list of rows from the reference on, first comes to this sqrt KL,
    between two checkpoints on a line; None if it never does."""
    for a, b in zip(path, path[1:]):
        if a["sqrt_kl"] <= distance < b["sqrt_kl"]:
            share = (distance - a["sqrt_kl"]) / (b["sqrt_kl"] - a["sqrt_kl"])
            return 100 * (a["win_rate"] + share * (b["win_rate"] - a["win_rate"]))
    return None


def read_paths(rows):
    """{(method, beta, lr): {seed: its rows from the reference on}}"""
    paths, start = {}, {row["seed"]: row for row in rows if row["method"] == "reference"}
    for row in rows:
        if row["method"] != "reference":
            runs = paths.setdefault((row["method"], row["beta"], row["lr"]), {})
            runs.setdefault(row["seed"], [start[row["seed"]]]).append(row)
    return paths


def final(path):
    return 100 * path[-1]["win_rate"]


def best(path):
    """The checkpoint, or the reference, of the highest win rate on the prompts to choose by."""
    return max(path, key=lambda row: row["choice"])


def table(header, lines):
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *lines]) + "\n"


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


def differences_table(here):
    """Each method minus dpo and minus chi_po, by seed, in points."""
    lines = []
    for method, other in [(method, other) for other in ("dpo", "chi_po") for method in here if method != other]:
        pairs = [(here[method][seed], here[other][seed]) for seed in sorted({*here[method]} & {*here.get(other, {})})]
        if not pairs or (method, other) == ("dpo", "chi_po"):  # that one stands there with the other sign
            continue
        at = [[(win_rate_at(a, d), win_rate_at(b, d)) for a, b in pairs] for d in DISTANCES]
        at = [[a - b for a, b in both if a is not None and b is not None] for both in at]
        ends = [final(a) - final(b) for a, b in pairs]
        lines.append([f"{method} - {other}", str(len(pairs)), cell(ends), str(sum(end > 0 for end in ends)),
                      cell([100 * (best(a)["win_rate"] - best(b)["win_rate"]) for a, b in pairs]),
                      *(f"{cell(values)} ({len(values)})" for values in at)])
    header = ["difference", "seeds", "final", "seeds above 0", "best checkpoint"]
    return table(header + [f"at sqrt KL {d:g}" for d in DISTANCES], lines)


def rates_table(paths, beta):
    """Each method that ran at all learning rates, at the one at which it ends highest on the prompts to choose by."""
    lines = []
    for method in METHODS:
        rates = {lr: list(paths[method, beta, lr].values()) for lr in LRS if (method, beta, lr) in paths}
        if len(rates) == len(LRS):
            lr = max(rates, key=lambda lr: np.mean([path[-1]["choice"] for path in rates[lr]]))
            lines.append([method, f"{lr:g}", str(len(rates[lr])), cell([final(path) for path in rates[lr]]),
                          cell([path[-1]["sqrt_kl"] for path in rates[lr]], 2),
                          cell([100 * best(path)["win_rate"] for path in rates[lr]])])
    return table(["method", "learning rate", "seeds", "final win rate", "sqrt KL", "best checkpoint: win rate"], lines)


def report(rows):
    """The tables, as Markdown."""
    paths, reference = read_paths(rows), [100 * row["win_rate"] for row in rows if row["method"] == "reference"]
    text = ("Made by `toy/study.py report` from study_truth.jsonl. Means over seeds ± half the 95% t interval. Win"
            f" rates in % by the truth; the reference's is {cell(reference)} ({len(reference)} seeds). Best checkpoint:"
            " of a run, the reference among them, by 512 other prompts. Differences: of runs of one seed, in points;"
            " at a sqrt KL: of the seeds, their number in brackets, in which both come to it. ESS share: mean over the"
            " last 24 steps.\n")
    for beta, lr in dict.fromkeys((beta, lr) for _, beta, lr in paths):
        here = {method: paths[method, beta, lr] for method in METHODS if (method, beta, lr) in paths}
        text += f"\n### beta {beta:g}, learning rate {lr:g}\n\n{ends_table(here)}\n{differences_table(here)}"
    for beta in dict.fromkeys(beta for _, beta, lr in paths if lr == LRS[-1]):
        text += f"\n### beta {beta:g}, each method at the rate at which it ends higher on the 512 prompts\n\n"
        text += rates_table(paths, beta)
    return text


def draw_picture(rows, beta, lr):
    """Win rate and sqrt KL over training, the main methods, mean and 95% t band."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    axes, paths = figure.subplots(1, 2), read_paths(rows)
    panels = [("win_rate", 100, "win rate by the truth (%)"), ("sqrt_kl", 1, r"$\sqrt{KL}$ ($\sqrt{nats}$)")]
    for ax, (name, scale, label) in zip(axes, panels):
        for method, colour in COLOURS.items():
            columns = list(zip(*paths.get((method, beta, lr), {}).values()))  # the rows of all seeds at a step
            if columns:
                values = [[scale * row[name] for row in column] for column in columns]
                mean, half_width = np.array([mean_and_half_width(of_step) for of_step in values]).T
                steps = [column[0]["step"] for column in columns]
                ax.plot(steps, mean, "o-", color=colour, markersize=4, label=f"{method} ({len(columns[0])} seeds)")
                ax.fill_between(steps, mean - half_width, mean + half_width, color=colour, alpha=0.15, linewidth=0)
        ax.set_xlabel("step")
        ax.set_ylabel(label)
        ax.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(COLOURS), fontsize=9)
    return figure


def main():
    parser = argparse.ArgumentParser(description="the truth-labelled study on the toy task")
    parser.add_argument("command", choices=["run", "report"])
    parser.add_argument("--out", type=Path, default=Path("out/study"), help="toys and runs (default: out/study)")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="of these alone (default: all)")
    args = parser.parse_args()
    if args.command == "run":
        run(args.out, args.seeds)
    else:
        ROWS.with_suffix(".md").write_text(report(read_rows()))
        draw_picture(read_rows(), PLAN[0][1], PLAN[0][2]).savefig(ROWS.with_suffix(".png"), dpi=150)


if __name__ == "__main__":
    main()
