"""The truth as judge of runs on the toy task, in place of the golden reward model.

    python toy/truth.py OUT RUN...

writes OUT/<parent of RUN>-<RUN>/ for each run: its metrics.jsonl, and a golden.jsonl in which win_rate and reward are the truth's
(toy/make.py) of the very completions that `evaluate.py golden --keep_samples` judged by the reward model; a completion and a
reference of equal truth share a point, as rewards do. `evaluate.py plot OUT/*` then draws what really happened.
"""

import importlib.util
import shutil
import statistics
import sys
from pathlib import Path

spec = importlib.util.spec_from_file_location("toy_make", Path(__file__).with_name("make.py"))
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)


def judge(path):
    """Samples of a checkpoint, with references -> win rate and mean truth (points), with their standard errors over prompts."""
    shares, truths = [], []
    for row in make.read_lines(path):
        ours = [make.truth(row["prompt"], text, stop is not None) for text, stop in zip(row["completions"], row["stops"])]
        theirs = [make.truth(row["prompt"], text) for text in row["references"]]
        shares.append(statistics.mean((a > b) + 0.5 * (a == b) for a in ours for b in theirs))
        truths.append(statistics.mean(ours))
    error = lambda values: statistics.stdev(values) / len(values) ** 0.5
    return dict(win_rate=statistics.mean(shares), win_rate_se=error(shares), reward=statistics.mean(truths), reward_se=error(truths))


def main():
    out, *runs = map(Path, sys.argv[1:])
    for run in runs:
        to = out / f"{run.parent.name}-{run.name}"
        to.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(run / "metrics.jsonl", to / "metrics.jsonl")
        rows = [row | judge(run / "golden_samples" / f"{row['checkpoint']}.jsonl") for row in make.read_lines(run / "golden.jsonl")]
        (to / "golden.jsonl").write_bytes(make.json_lines(rows))


if __name__ == "__main__":
    main()
