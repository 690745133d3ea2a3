"""The truth as judge of runs on the toy task, beside the golden reward model.

    python toy/truth.py OUT RUN...                                   for `evaluate.py plot OUT/*`
    python toy/truth.py OUT RUN... --rows results/study_golden.jsonl   and the rows and tables of the study
    python toy/truth.py --pictures results/study_golden.jsonl        figures 3 to 6 of the study, from its rows

writes OUT/<parent of RUN>-<RUN>/ for each run: its metrics.jsonl, and a golden.jsonl in which win_rate and reward are
the truth's (toy/make.py) of the very completions that `evaluate.py golden --keep_samples` judged by the reward model; a
completion and a reference of equal truth share a point, as rewards do.

A row of study_golden.jsonl is a checkpoint: the run (`method`, `beta`, `lr`, `seed`), `step`, the golden model's
measures as in golden.jsonl, `truth_win_rate` and `truth` (points) with their standard errors over prompts; `ess` (share
of the step's pairs) and `weight` are means over the steps since the checkpoint before.
"""

import argparse
import json
import shutil
import statistics
from pathlib import Path

import make
from study import cell, table

STEPS_AN_EPOCH = 64  # of the toy's 2,048 pairs
MEASURES = ("win_rate", "kl", "sqrt_kl", "reward", "length", "ended")


def judge(path):
    """Samples of a checkpoint, with references -> win rate and mean truth (points), with their standard errors over
    prompts."""
    shares, truths = [], []
    for row in make.read_lines(path):
        said = zip(row["completions"], row["stops"])
        ours = [make.truth(row["prompt"], text, stop is not None) for text, stop in said]
        theirs = [make.truth(row["prompt"], text) for text in row["references"]]
        shares.append(statistics.mean((a > b) + 0.5 * (a == b) for a in ours for b in theirs))
        truths.append(statistics.mean(ours))
    error = lambda values: statistics.stdev(values) / len(values) ** 0.5
    return dict(judge="truth", win_rate=statistics.mean(shares), win_rate_se=error(shares), reward=statistics.mean(truths),
                reward_se=error(truths))


def samples_of(run, row):
    """The samples from which a row of golden.jsonl was made: those of its own settings."""
    return run / "golden_samples" / row["settings"] / f"{row['checkpoint']}.jsonl"


def rows_with_samples(run):
    """The rows of RUN/golden.jsonl whose samples were kept; says which were not."""
    rows = make.read_lines(run / "golden.jsonl")
    kept = [row for row in rows if samples_of(run, row).exists()]
    for row in rows:
        if row not in kept:
            print(f"{run}: no samples of {row['checkpoint']} under settings {row['settings']}: left out; the same"
                  " `evaluate.py golden` with --keep_samples writes them")
    if not kept:
        raise SystemExit(f"{run}: no samples of any row of golden.jsonl: run `evaluate.py golden --keep_samples`")
    return kept


def study_rows(run, golden, verdicts):
    """The rows of a run, the reference policy's first, from what the golden model (`golden`, a row a checkpoint) and
    the truth (`verdicts`, a dict each) say."""
    header, *steps = make.read_lines(run / "metrics.jsonl")
    args, before = header["args"], 0
    method = args["loss"] if args["log_eps"] == 1 else f"{args['loss']}, log_eps {args['log_eps']:g}"
    for row, truth in zip(golden, verdicts):
        of = dict(method=method, beta=args["beta"], lr=args["lr"], seed=args["seed"], step=row["step"])
        of |= {name: row[name] for measure in MEASURES for name in (measure, f"{measure}_se")}
        of |= dict(truth_win_rate=truth["win_rate"], truth_win_rate_se=truth["win_rate_se"], truth=truth["reward"],
                   truth_se=truth["reward_se"])
        if since := steps[before : row["step"]]:
            ess = [step["weights/ess"] or 0 for step in since]  # null: all weights of a step vanished
            of |= dict(ess=statistics.mean(ess) / args["batch_size"],
                       weight=statistics.mean(step["weights/mean"] for step in since))
        before = row["step"]
        yield of


def report(rows):
    """The tables, as Markdown: every method at its end, and its difference from dpo by seed."""
    text = ("Made by `toy/truth.py` from study_golden.jsonl (`toy/study.sh`). Means over 3 seeds ± half the 95% t"
            " interval, which is 4.3 standard errors; win rates in %, differences of runs of one seed in points. Peak:"
            " the highest of a run's checkpoints and the reference, by the same prompts. ESS share: mean over the last"
            " 18 steps.\n")
    paths = {}  # (beta, lr): {method: {seed: rows}}
    for row in rows:
        of_method = paths.setdefault((row["beta"], row["lr"]), {}).setdefault(row["method"], {})
        of_method.setdefault(row["seed"], []).append(row)
    final = lambda path, name="win_rate": 100 * path[-1][name]
    peak = lambda path: max(100 * row["win_rate"] for row in path)
    for (beta, lr), methods in sorted(paths.items(), key=lambda item: item[0][::-1]):
        ends, differences = [], []
        for method, runs in methods.items():
            runs = [runs[seed] for seed in sorted(runs)]
            ends.append([method, str(len(runs)), cell([final(path) for path in runs]), cell([*map(peak, runs)]),
                         cell([peak(path) - final(path) for path in runs]),
                         cell([path[-1]["sqrt_kl"] for path in runs], 2),
                         cell([path[-1]["length"] for path in runs]), cell([path[-1]["ess"] for path in runs], 2),
                         cell([final(path, "truth_win_rate") for path in runs])])
            if method != "dpo":
                pairs = [(methods[method][seed], methods["dpo"][seed]) for seed in sorted(methods[method])]
                by = {name: [final(a, name) - final(b, name) for a, b in pairs]
                      for name in ("win_rate", "truth_win_rate")}
                differences.append([f"{method} - dpo", cell(by["win_rate"]), str(sum(d > 0 for d in by["win_rate"])),
                                    cell(by["truth_win_rate"]), str(sum(d > 0 for d in by["truth_win_rate"]))])
        header = ["method", "seeds", "golden: final win rate", "peak", "drop", "sqrt KL", "length (tokens)",
                  "ESS share", "truth: final win rate"]
        text += f"\n### beta {beta:g}, learning rate {lr:g}\n\n{table(header, ends)}\n"
        text += table(["difference", "golden: final", "seeds above 0", "truth: final", "seeds above 0"], differences)
    return text


def runs_to_draw(rows, lr, judge, prefix):
    """What evaluate.py draws of runs at a rate, from rows of the study; the judge's win rates have this prefix."""
    of_runs = {}
    for row in rows:
        if row["lr"] == lr:
            of_runs.setdefault((row["method"], row["beta"], row["seed"]), []).append(row)
    for (method, beta, seed), path in of_runs.items():
        loss, _, cap = method.partition(", log_eps ")
        points = [dict(step=row["step"], epoch=row["step"] / STEPS_AN_EPOCH, sqrt_kl=row["sqrt_kl"],
                       sqrt_kl_se=row["sqrt_kl_se"], win_rate=100 * row[f"{prefix}win_rate"],
                       win_rate_se=100 * row[f"{prefix}win_rate_se"]) for row in path]
        log_eps = float(cap or 1) if loss.startswith("is_") else None
        yield dict(loss=loss, beta=beta, lr=lr, seed=seed, log_eps=log_eps, points=points, judge=judge)


ENDS = ["peak_win_rate", "final_win_rate", "final_sqrt_kl"]


def ends(run):
    """What figure 5 shows of a run."""
    values = dict(peak_win_rate=max(point["win_rate"] for point in run["points"]))
    return [values | {f"final_{name}": run["points"][-1][name] for name in ("win_rate", "sqrt_kl")}]


def draw_study(path):
    """The pictures beside the rows: figures 3 to 5 of the first rate, 4 also by the truth, and 6 of the training logs,
    whose means are in study_figure6.jsonl."""
    import evaluate as ev
    import pandas as pd

    rows = make.read_lines(path)
    lr = min(row["lr"] for row in rows)
    by_golden = [*runs_to_draw(rows, lr, "golden model", "")]
    shown, shown_truth = ([run for run in runs if run["log_eps"] in (None, 1)]
                          for runs in (by_golden, runs_to_draw(rows, lr, "truth", "truth_")))
    means = lambda runs: ev.average(runs, lambda run: run["points"], ["epoch", "win_rate", "sqrt_kl"], ["step"])
    caps = ev.average([run for run in by_golden if run["loss"] == "is_dpo" and run["beta"] == 0.01], ends, ENDS)
    caps = caps.assign(place=range(len(caps)))
    bins = pd.read_json(path.with_name("study_figure6.jsonl"), lines=True)
    figures = {"figure3": ev.draw_curves(shown, means(shown))[1],
               "figure4": ev.draw(means(shown), "epoch", ["win_rate", "sqrt_kl"], "golden model"),
               "figure5": ev.draw(caps, "place", ENDS, "golden model", ticks=[*caps["log_eps"]]),
               "figure6": ev.draw(bins, "epoch", ev.TRAINING, None),
               "truth_figure4": ev.draw(means(shown_truth), "epoch", ["win_rate", "sqrt_kl"], "truth")}
    for name, figure in figures.items():
        ev.add_legend(figure, ev.BARS + (ev.FITS + ev.BANDS if name == "figure3" else ""))
        figure.savefig(path.with_name(f"study_{name}.png"), dpi=150)


def main():
    parser = argparse.ArgumentParser(description="the truth's verdicts on runs on the toy task")
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("runs", type=Path, nargs="*")
    parser.add_argument("--rows", type=Path, help="rows of all runs, and tables beside them (.md)")
    parser.add_argument("--pictures", type=Path, help="draw these rows of the study, beside them")
    args = parser.parse_args()
    if args.pictures:
        draw_study(args.pictures)
        return
    if not args.runs:
        parser.error("want OUT and RUN...")
    rows = []
    for run in args.runs:
        to = args.out / f"{run.parent.name}-{run.name}"
        to.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(run / "metrics.jsonl", to / "metrics.jsonl")
        golden = rows_with_samples(run)
        verdicts = [judge(samples_of(run, row)) for row in golden]
        (to / "golden.jsonl").write_bytes(make.json_lines([row | truth for row, truth in zip(golden, verdicts)]))
        for row, truth in zip(golden, verdicts):
            print(f"{run} {row['checkpoint']}: win rate by the truth {100 * truth['win_rate']:.1f} +-"
                  f" {100 * truth['win_rate_se']:.1f} %, sqrt KL {row['sqrt_kl']:.2f}")
        rows += study_rows(run, golden, verdicts) if args.rows else []
    if args.rows:
        args.rows.write_text("".join(json.dumps(row) + "\n" for row in rows))
        args.rows.with_suffix(".md").write_text(report(rows))


if __name__ == "__main__":
    main()
