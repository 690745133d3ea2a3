"""Every figure of the study's tables, computed again from its rows by other code: numpy, nothing of toy/study.py.

Run by `python -m pytest tests/test_study.py`: on made-up rows, and on the rows and tables that are committed; seconds.
"""

import importlib.util
import json
import math
import random
import re
from pathlib import Path

import numpy as np
import pytest

REPO = Path(__file__).resolve().parent.parent
RESULTS = REPO / "results"

spec = importlib.util.spec_from_file_location("toy_study", REPO / "toy" / "study.py")
study = importlib.util.module_from_spec(spec)
spec.loader.exec_module(study)

FIVE_RATES = (1e-4, 2e-4, 4e-4, 8e-4, 1.2e-3)
T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # by number of seeds


# ------------------------------------------------------------------------------------------------- the other code
class Rows:
    """The rows as columns of numpy."""

    def __init__(self, rows):
        self.rows = rows
        self.column = {name: np.array([row.get(name, np.nan) for row in rows], dtype=float)
                       for name in ("lr", "beta", "seed", "step", "win_rate", "sqrt_kl", "ess")}
        self.method = np.array([row["method"] for row in rows])
        self.reference = {int(row["seed"]): row for row in rows if row["method"] == "reference"}

    def at(self, method, lr, beta=0.01):
        same = (self.method == method) & np.isclose(self.column["lr"], lr) & np.isclose(self.column["beta"], beta)
        return np.flatnonzero(same)

    def seeds(self, method, lr, beta=0.01):
        return sorted({int(seed) for seed in self.column["seed"][self.at(method, lr, beta)]})

    def rates(self, method, beta=0.01):
        same = (self.method == method) & np.isclose(self.column["beta"], beta)
        return sorted(set(self.column["lr"][same]))

    def path(self, method, lr, seed, beta=0.01):
        """The rows of a run, by step, the reference first."""
        mine = [i for i in self.at(method, lr, beta) if self.column["seed"][i] == seed]
        return [self.reference[seed], *(self.rows[i] for i in sorted(mine, key=lambda i: self.column["step"][i]))]

    def ends(self, method, lr, name="win_rate", beta=0.01):
        """{seed: a measure of the last row}; win rates in %."""
        scale = 100 if name in ("win_rate", "choice") else 1
        found = {seed: self.path(method, lr, seed, beta)[-1].get(name) for seed in self.seeds(method, lr, beta)}
        return {seed: scale * value for seed, value in found.items() if value is not None}

    def bests(self, method, lr, name="win_rate", beta=0.01):
        found = {}
        for seed in self.seeds(method, lr, beta):
            path = self.path(method, lr, seed, beta)
            row = path[int(np.argmax([one["choice"] for one in path]))]
            found[seed] = (100 if name == "win_rate" else 1) * row[name]
        return found


def interval(values):
    """-> mean, half the 95% t interval (None of one)."""
    values = np.array([*values], dtype=float)
    n = len(values)
    if n == 0:
        return None
    return values.mean(), T[n] * math.sqrt(((values - values.mean()) ** 2).sum() / (n - 1) / n) if n > 1 else None


def minus(ours, theirs):
    return [ours[seed] - theirs[seed] for seed in sorted(set(ours) & set(theirs))]


def tuned(rows, method, rates, beta):
    """{seed: the rate that the other seeds choose}"""
    seeds = sorted(set.intersection(*(set(rows.seeds(method, lr, beta)) for lr in rates)))
    choices = np.array([[rows.ends(method, lr, "choice", beta)[seed] for lr in rates] for seed in seeds])
    if len(seeds) < 2:
        return {}
    means_of_others = (choices.sum(0) - choices) / (len(seeds) - 1)
    return {seed: rates[k] for seed, k in zip(seeds, means_of_others.argmax(1))}


# ------------------------------------------------------------------------------------------------- reading the tables
def tables(text):
    """{heading: (header, lines)}; a second table under a heading is "... again", those of long posts begin "long "."""
    found, part, heading = {}, "", ""
    for block in re.split(r"\n\n|\n(?=#)", text):
        lines = block.strip().splitlines()
        if lines and lines[0].startswith("## "):
            part = lines[0]
        if lines and lines[0].startswith("#"):
            heading, lines = lines[0].lstrip("# "), lines[1:]
        if lines and lines[0].startswith("|"):
            cells = [[cell.strip() for cell in line.strip().strip("|").split(" | ")] for line in lines]
            name = f"long {heading}" if part.startswith("## Long") else heading
            name += " again" * (name in found)
            assert name not in found
            found[name] = cells[0], cells[2:]
    return found


def agrees(cell, values, count=None):
    """A cell `mean ± half`, with `(above 0/all)` or `(all)` after it, against the values that it stands for."""
    if not len([*values]):
        assert cell in ("-", "- (0)"), cell
        return
    found = re.fullmatch(r"(-?[\d.]+)(?: ± ([\d.]+))?(?: \((\d+)(?:/(\d+))?\))?", cell)
    assert found, cell
    mean, half = interval(values)
    digits = len(found[1].split(".")[1])
    close = dict(abs=0.5001 * 10**-digits)
    assert float(found[1]) == pytest.approx(mean, **close), (cell, values)
    assert (found[2] is None) == (half is None)
    assert half is None or float(found[2]) == pytest.approx(half, rel=2e-4, **close), (cell, values)
    assert (found[3] is None) == (count is None), cell
    if count == "above":
        assert (int(found[3]), int(found[4])) == (sum(value > 0 for value in values), len(values)), cell
    elif count == "all":
        assert int(found[3]) == len(values), cell


def crossing(path, distance):
    """The win rate (%) between the two checkpoints where sqrt KL first comes to a distance from below."""
    x, y = [np.array([row[name] for row in path]) for name in ("sqrt_kl", "win_rate")]
    between = np.flatnonzero((x[:-1] <= distance) & (distance < x[1:]))
    if len(between) == 0:
        return None
    k = between[0]
    return 100 * np.interp(distance, x[k : k + 2], y[k : k + 2])


def check_rate_tables(found, rows, prefix=""):
    """The sections of one beta and rate; gives how many tables that were."""
    done = 0
    for name in [name for name in found if re.match(f"{prefix}beta .* learning rate [^ ]+$", name)]:
        beta, lr = map(float, re.search("beta (.*), learning rate (.*)", name).groups())
        _, lines = found[name]
        for method, n, *cells in lines:
            ends = lambda measure: [*rows.ends(method, lr, measure, beta).values()]
            bests = lambda measure: [*rows.bests(method, lr, measure, beta).values()]
            assert int(n) == len(ends("win_rate"))
            of = [ends("win_rate"), ends("sqrt_kl"), ends("truth"), ends("length"), bests("win_rate"), bests("sqrt_kl"),
                  ends("ess")]
            assert len(cells) == len(of)
            for cell, values in zip(cells, of):
                agrees(cell, values)
        assert {line[0] for line in lines} == {m for m in map(str, set(rows.method)) if rows.seeds(m, lr, beta)}
        done += 1
        if f"{name} again" not in found:  # one method alone
            assert len(lines) == 1
            continue
        header, lines = found[f"{name} again"]
        distances = [float(title.removeprefix("at sqrt KL ")) for title in header[5:]]
        for pair, n, end, above, best, *cells in lines:
            ours, theirs = pair.split(" - ")
            ends = minus(rows.ends(ours, lr, beta=beta), rows.ends(theirs, lr, beta=beta))
            assert int(n) == len(ends) and int(above) == sum(end > 0 for end in ends)
            agrees(end, ends)
            agrees(best, minus(rows.bests(ours, lr, beta=beta), rows.bests(theirs, lr, beta=beta)))
            for cell, distance in zip(cells, distances, strict=True):
                places = [[crossing(rows.path(method, lr, seed, beta), distance) for method in (ours, theirs)]
                          for seed in sorted({*rows.seeds(ours, lr, beta)} & {*rows.seeds(theirs, lr, beta)})]
                agrees(cell, [a - b for a, b in places if a is not None and b is not None], "all")
        done += 1
    return done


def check_tuned(lines, rows, beta):
    at = {}
    for method, times, end, distance, best, to_dpo, to_is_dpo in lines:
        rates = rows.rates(method, beta)
        chosen = tuned(rows, method, rates, beta)
        assert len(chosen) > 2
        pick = lambda of, name: {seed: of(method, lr, name, beta)[seed] for seed, lr in chosen.items()}
        at[method] = pick(rows.ends, "win_rate")
        counts = {lr: [*chosen.values()].count(lr) for lr in rates}
        assert times == ", ".join(f"{lr:g}: {counts[lr]}" for lr in rates if counts[lr])
        agrees(end, at[method].values())
        agrees(distance, pick(rows.ends, "sqrt_kl").values())
        agrees(best, pick(rows.bests, "win_rate").values())
        for cell, other in ((to_dpo, "dpo"), (to_is_dpo, "is_dpo")):
            values = minus(at[method], at.get(other, {})) if other != method else []
            agrees(cell, values, "above" if values else None)


def check_tables(text, rows, long_rows):
    rows, found, done = Rows(rows), tables(text), 0
    reference = [100 * row["win_rate"] for row in rows.reference.values()]
    agrees(re.search(r"the reference's is ([\d.]+(?: ± [\d.]+)?)", text)[1], reference)

    gains = lambda method, lr: [end - 100 * rows.reference[seed]["win_rate"]
                                for seed, end in rows.ends(method, lr).items()]
    for heading, values in {"Final win rate by learning rate": lambda *of: [*rows.ends(*of).values()],
                            "Final win rate minus the reference's": gains,
                            "sqrt KL at the end": lambda *of: [*rows.ends(*of, "sqrt_kl").values()]}.items():
        header, lines = found[heading]
        for method, *cells in lines:
            for cell, lr in zip(cells, header[1:], strict=True):
                agrees(cell, values(method, float(lr)), "all" if heading.endswith("by learning rate") else None)
        done += 1

    header, lines = found["Differences of final win rates, at the same rate"]
    for pair, *cells in lines:
        ours, theirs = pair.split(" - ")
        for cell, lr in zip(cells, map(float, header[1:]), strict=True):
            values = minus(rows.ends(ours, lr), rows.ends(theirs, lr))
            agrees(cell, values, "above" if values else None)

    means = {}
    for method, many, which, lowest, mean, to_dpo in found["How wide the range of rates is"][1]:
        ran = [lr for lr in FIVE_RATES if len(rows.seeds(method, lr)) > 2]
        intervals = {lr: interval(gains(method, lr)) for lr in ran}
        wins = [lr for lr, (mean, half) in intervals.items() if mean > half]
        assert many == f"{len(wins)} of {len(ran)}" and which == (", ".join(f"{lr:g}" for lr in wins) or "-")
        lows = {lr: np.mean([*rows.ends(method, lr).values()]) for lr in ran}
        worst = min(lows, key=lows.get, default=None)
        assert lowest == (f"{lows[worst]:.1f} ({worst:g})" if lows else "-")
        seeds = set.intersection(*(set(rows.seeds(method, lr)) for lr in FIVE_RATES))
        means[method] = {seed: np.mean([rows.ends(method, lr)[seed] for lr in FIVE_RATES]) for seed in seeds}
        agrees(mean, means[method].values() if len(seeds) > 2 else [])
        values = minus(means[method], means["dpo"]) if method != "dpo" and len(seeds) > 2 else []
        agrees(to_dpo, values, "above" if values else None)

    for heading, beta in (("Each method at its own best rate", 0.01),
                          ("Each method at its own better rate, beta 0.1", 0.1),
                          ("Other losses and caps at their own better rate, beta 0.01", 0.01)):
        check_tuned(found[heading][1], rows, beta)

    for method, lr, short, longer, difference, *cells in found.get("Four times the steps", ([], []))[1]:
        lr, name = float(lr), f"{method}, 512 steps"
        more = rows.ends(name, lr)
        few = {seed: end for seed, end in rows.ends(method, lr).items() if seed in more}
        agrees(short, few.values())
        agrees(longer, more.values())
        agrees(difference, minus(more, few), "above" if more else None)
        agrees(cells[0], [value for seed, value in rows.ends(method, lr, "sqrt_kl").items() if seed in more])
        agrees(cells[1], rows.ends(name, lr, "sqrt_kl").values())
        agrees(cells[2], rows.bests(name, lr).values())
        values = minus(more, rows.ends("dpo, 512 steps", lr)) if method != "dpo" else []
        agrees(cells[3], values, "above" if values else None)
    done += 1 + 1 + 3 + ("Four times the steps" in found) + check_rate_tables(found, rows)

    if long_rows:
        rows = Rows(long_rows)
        said = re.search(r"win rate is ([^,]*), its truth ([^,]*) points, its length ([^,]*) tokens", text).groups()
        for cell, name, scale in zip(said, ("win_rate", "truth", "length"), (100, 1, 1)):
            agrees(cell, [scale * row[name] for row in rows.reference.values()])
        done += check_rate_tables(found, rows, "long ")
        for heading, name, scale in (("Win rate", "win_rate", 100), ("sqrt KL", "sqrt_kl", 1),
                                     ("ESS share of the steps since the checkpoint before", "ess", 1)):
            header, lines = found[f"long {heading}, over training"]
            for method, lr, *cells in lines:
                for cell, step in zip(cells, header[2:], strict=True):
                    at = [i for i in rows.at(method, float(lr)) if f"step {int(rows.column['step'][i])}" == step]
                    agrees(cell, scale * rows.column[name][at])
            done += 1
    assert done == len(found)  # no table is left out


# ------------------------------------------------------------------------------------------------------------ the tests
def test_the_committed_tables_are_of_the_committed_rows():
    rows = {name: [json.loads(line) for line in (RESULTS / f"study_{name}.jsonl").read_text().splitlines()]
            for name in ("truth", "long") if (RESULTS / f"study_{name}.jsonl").exists()}
    check_tables((RESULTS / "study_truth.md").read_text(), rows["truth"], rows.get("long", []))


def made_up_rows(plan, steps, seed):
    """Rows of runs that wander at random."""
    rng, rows = random.Random(seed), []
    measures = lambda: dict(win_rate=rng.uniform(0.3, 0.9), choice=rng.uniform(0.3, 0.9), sqrt_kl=rng.uniform(0, 2),
                            truth=rng.uniform(-1, 2), length=rng.uniform(10, 20))
    for number in sorted({number for *_, number in plan}):
        rows.append(dict(method="reference", beta=None, lr=None, seed=number, step=0, **measures()) | dict(sqrt_kl=0.0))
    for method, beta, lr, number in plan:
        for step in steps:
            row = dict(method=method, beta=beta, lr=lr, seed=number, step=step, **measures())
            rows.append(row if method == "online" else row | dict(ess=rng.random()))
    return rows


@pytest.mark.parametrize("whole", [True, False])
def test_tables_of_made_up_rows(whole):
    """The whole plan, and one that is half run: what is not there is a dash."""
    plan = [run for part, runs in study.PARTS.items() if part != "long" for run in runs]
    plan = [*dict.fromkeys(plan)]
    if not whole:  # one seed of the lowest rates, two of the next, four of the others, and no wpo
        seeds = lambda lr: 11 if lr < 2e-4 else 12 if lr < 4e-4 else 14
        plan = [run for run in plan if run[3] < seeds(run[2]) and run[0] != "wpo"]
    random.Random(1).shuffle(plan)  # several processes write the rows in no order
    rows = made_up_rows(plan, (26, 52, 128), 2)
    long_rows = made_up_rows(study.PARTS["long"], (26, 52, 78, 104, 128), 3) if whole else []
    check_tables(study.report(rows, long_rows), rows, long_rows)


def test_a_wrong_figure_is_found():
    """What the checks are worth: each of many figures of the tables, one up in its last digit."""
    plan = [run for runs in study.PARTS.values() for run in runs if run[3] < 12]
    rows = made_up_rows([*dict.fromkeys(plan)], (26, 128), 4)
    text = study.report(rows, [])
    places = [found for found in re.finditer(r"(?<=[ (])-?\d+\.\d+(?= ±| \||\Z)|(?<=± )\d+\.\d+", text)]
    for place in random.Random(5).sample(places, 15):
        digits = len(place[0].split(".")[1])
        wrong = f"{float(place[0]) + 2 * 10**-digits:.{digits}f}"
        with pytest.raises(AssertionError):
            check_tables(text[: place.start()] + wrong + text[place.end() :], rows, [])


def test_pictures_are_drawn():
    """On a half-run plan: the rates, the training and the long posts; what a legend names is in the plot."""
    plan = [run for part in ("rates", "rivals") for run in study.PARTS[part] if run[3] < 13]
    rows = made_up_rows(plan, (26, 128), 6)
    rates, training = study.draw_rates(rows), study.draw_training(rows, 0.01, 4e-4)
    long_posts = study.draw_long(made_up_rows(study.PARTS["long"], (26, 128), 7))
    labels = [text.get_text() for text in rates.legends[0].get_texts()]
    methods = ("dpo", "is_dpo", "chi_po", "online")
    assert labels == [*(f"{method} (3 seeds)" for method in methods), "the reference policy"]
    for figure in (rates, training, long_posts):
        assert all(ax.get_xlabel() and ax.get_ylabel() for ax in figure.axes)
        assert figure.axes[0].get_ylabel().endswith("win rate by the truth (%)")
        assert "95% t interval" in figure.legends[0].get_title().get_text()
    ends = [row for row in rows if row["step"] == 128 and (row["method"], row["lr"]) == ("is_dpo", 1e-4)]
    line = next(line for line in rates.axes[0].lines if line.get_label().startswith("is_dpo"))
    assert line.get_ydata()[0] == pytest.approx(100 * np.mean([row["win_rate"] for row in ends]))


def test_the_golden_study_draws_its_rows(tmp_path, monkeypatch):
    """toy/truth.py --pictures: the points of figure 4, by each judge, and of figure 5 are means of the committed rows."""
    spec = importlib.util.spec_from_file_location("toy_truth", REPO / "toy" / "truth.py")
    truth = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(truth)
    for name in ("study_golden", "study_figure6"):
        (tmp_path / f"{name}.jsonl").write_bytes((RESULTS / f"{name}.jsonl").read_bytes())
    drawn = {}
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, path, **how: drawn.update({path.stem: self}))
    truth.draw_study(tmp_path / "study_golden.jsonl")
    rows = [json.loads(line) for line in (RESULTS / "study_golden.jsonl").open()]

    def mean(name, **which):
        return 100 * np.mean([row[name] for row in rows if all(row[key] == value for key, value in which.items())])

    def points(figure, ax, label):
        (bars,) = [container for container in figure.axes[ax].containers if container.get_label() == label]
        return bars.lines[0].get_xydata()

    steps = sorted({row["step"] for row in rows})
    for figure, judge, name in (("study_figure4", "golden model", "win_rate"), ("study_truth_figure4", "truth", "truth_win_rate")):
        assert judge in drawn[figure].axes[0].get_ylabel()
        for method in ("dpo", "is_dpo", "chi_po"):
            expected = [[step / 64, mean(name, method=method, beta=0.01, lr=4e-4, step=step)] for step in steps]
            np.testing.assert_allclose(points(drawn[figure], 0, method), expected, rtol=1e-12)
    methods = ["is_dpo, log_eps 0", "is_dpo, log_eps 0.5", "is_dpo", "is_dpo, log_eps 2", "is_dpo, log_eps 4", "is_dpo, log_eps inf"]
    expected = [[place, mean("win_rate", method=method, beta=0.01, lr=4e-4, step=steps[-1])] for place, method in enumerate(methods)]
    np.testing.assert_allclose(points(drawn["study_figure5"], 1, "is_dpo"), expected, rtol=1e-12)
    assert len(drawn) == 5
