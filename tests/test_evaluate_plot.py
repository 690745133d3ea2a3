"""evaluate.py plot against curves that are known, brute force and plain numpy; its pictures by what their axes hold."""

import argparse
import itertools
import json
import math

import matplotlib.figure
import matplotlib.image
import numpy as np
import pytest

import evaluate

STEPS = [0, 16, 32, 48, 64]  # evaluated; a run has 64 steps of 8 pairs, 2 epochs of 256


def write_run(folder, loss="is_dpo", beta=0.05, seed=0, log_eps=1.0, curve=None, lr=1e-4, settings="aaaa",
              protocol="n 256", header=(), **flags):
    """A run with golden points on `curve` (d -> win rate in %), at d = 0, 0.5, 1, 1.5, 2 (plus 0.01 seed after step 0)."""
    folder.mkdir(parents=True)
    args = dict(loss=loss, beta=beta, lr=lr, seed=seed, log_eps=log_eps, batch_size=8, epochs=2) | flags
    lines = [dict(script="train_pref", args=args, data="f00d", pairs=256, steps=64) | dict(header)]
    for step in range(1, 65):
        lines.append({"step": step, "epoch": step / 32, "ratio/chosen": -0.1 * step - seed, "ratio/rejected": -0.2 * step + seed,
                      "weights/mean": 1 / step, "weights/ess": 4.0 + seed if step > 58 else 1.0, "weights/capped": 0.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    curve = curve or (lambda d: 50 + 10 * d)
    points = []
    for k, step in enumerate(STEPS):
        d = 0.5 * k + 0.01 * seed * (k > 0)
        points.append(dict(checkpoint=f"step_{step:06d}", step=step, epoch=step / 32, win_rate=curve(d) / 100, win_rate_se=0.02,
                           kl=d * d, sqrt_kl=d, sqrt_kl_se=0.01, reward=d - seed, length=20 + d, prompts=256, settings=settings,
                           protocol=protocol))
    write_golden(folder, points)
    return folder


def write_golden(folder, points):
    (folder / "golden.jsonl").write_text("".join(json.dumps(point) + "\n" for point in points))


def golden_points(folder):
    return [json.loads(line) for line in (folder / "golden.jsonl").read_text().splitlines()]


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def run_plot(runs, out, log_eps=1.0):
    evaluate.plot(argparse.Namespace(runs=[str(run) for run in runs], out=str(out), log_eps=log_eps))


def checkpoint_means(runs):
    return evaluate.average(runs, lambda run: run["points"], ["epoch", "win_rate", "sqrt_kl"], ["step"])


def fitted(*folders):
    """The row of figure 3 of runs of one setting, or None, and its axes."""
    runs = [evaluate.read_run(folder) for folder in folders]
    rows, figure = evaluate.draw_curves(runs, checkpoint_means(runs))
    assert len(rows) <= 1 and len(figure.axes) == 1
    return (rows.to_dict("records") or [None])[0], figure.axes[0]


def drawn_curves(ax):
    """The fitted curves in axes: lines without markers of 61 points."""
    return [line.get_xydata() for line in ax.get_lines() if len(line.get_xydata()) == 61]


def bands(ax):
    return [patch for patch in ax.collections if type(patch).__name__ == "FillBetweenPolyCollection"]


def stars(ax):
    lines = (line for line in ax.get_lines() if line.get_marker() == "*")
    return [tuple(line.get_xydata()[0]) for line in lines if len(line.get_xydata())]


def log_curve(start, a, b):
    return lambda d: start + (d * (a - b * math.log(d)) if d else 0)


# ----------------------------------------------------------------------------------------------------- the curve and its peak
def one_seed(d, win_rates, start, grid=(1.0,)):
    return evaluate.fit_curve([np.stack([d, win_rates], -1)], start, np.array(grid))


def test_fit_recovers_a_known_curve():
    d = np.array([0.3, 0.7, 1.1, 1.9, 2.5])
    a, b, start = 21.0, 8.5, 47.0
    win_rates = start + d * (a - b * np.array([math.log(x) for x in d]))
    found, curve, _ = one_seed(d, win_rates, start, [1e-9, 0.5, 2.0])
    np.testing.assert_allclose(found, [a, b], rtol=1e-12)
    np.testing.assert_allclose(curve, [start + x * (a - b * math.log(x)) for x in (1e-9, 0.5, 2.0)], rtol=1e-12)
    assert curve[0] == pytest.approx(start, abs=1e-6)


def test_fit_is_least_squares():
    """The normal equations, written out; and no point of a fine grid around it is better."""
    rng = np.random.default_rng(3)
    d, start = rng.uniform(0.2, 3, 20), 51.0
    win_rates = start + d * (20 - 9 * np.log(d)) + 2 * rng.normal(size=20)
    x, y, gain = d, -d * np.log(d), win_rates - start
    determinant = x @ x * (y @ y) - (x @ y) ** 2
    a = (gain @ x * (y @ y) - gain @ y * (x @ y)) / determinant
    b = (gain @ y * (x @ x) - gain @ x * (x @ y)) / determinant
    np.testing.assert_allclose(one_seed(d, win_rates, start)[0], [a, b], rtol=1e-9)
    loss = lambda a, b: np.sum((gain - a * x - b * y) ** 2)
    grid = [(loss(a + i, b + j), i, j) for i in np.linspace(-1, 1, 41) for j in np.linspace(-1, 1, 41)]
    assert min(grid)[1:] == pytest.approx((0, 0), abs=1e-9)


def test_bootstrap_is_every_draw_in_its_proportion():
    """For three seeds the 27 ordered draws can be listed; the percentiles of 1,000 random ones are near theirs, and
    repeatable."""
    rng, grid = np.random.default_rng(1), np.linspace(1e-9, 2, 9)
    seeds = []
    for k in range(6):
        d = rng.uniform(0.3, 2, 6)
        seeds.append(np.stack([d, 50 + d * (20 + 3 * k - 9 * np.log(d)) + rng.normal(size=6)], -1))
    first, second = (evaluate.fit_curve(seeds, 50.0, grid) for _ in range(2))
    np.testing.assert_array_equal(first[2], second[2])
    seeds = seeds[:3]
    _, _, band = evaluate.fit_curve(seeds, 50.0, grid)
    curves = []
    for picked in itertools.product(range(3), repeat=3):
        d, win_rates = np.concatenate([seeds[k] for k in picked]).T
        terms = np.stack([d, -d * np.log(d)], -1)
        a, b = np.linalg.solve(terms.T @ terms, terms.T @ (win_rates - 50))
        curves.append(50 + np.array([x * (a - b * math.log(x)) for x in grid]))
    curves = np.repeat(curves, 1000, axis=0)
    np.testing.assert_allclose(band, np.percentile(curves, [2.5, 97.5], axis=0), atol=0.3)
    np.testing.assert_allclose(band[:, 0], 50, atol=1e-6)
    assert band[1, -1] - band[0, -1] > 2


# --------------------------------------------------------------------------------------------------------- the rows, from files
def test_curve_rows(tmp_path):
    """Two seeds on one log curve with WR_sft 50 and 52: the fit starts at 51 and its peak and curve follow from that."""
    curve = log_curve(51, 20, 12)
    folders = [write_run(tmp_path / f"{seed}", seed=seed, curve=curve) for seed in (0, 1)]
    for folder, start in zip(folders, (50, 52)):
        points = golden_points(folder)
        points[0] |= dict(win_rate=start / 100, sqrt_kl=1e-4 * (start == 52))  # rounding: still the reference
        write_golden(folder, points)
    row, ax = fitted(*folders)
    assert (row["start"], row["n"], row["loss"], row["log_eps"]) == (pytest.approx(51), 2, "is_dpo", 1.0)
    assert (row["a"], row["b"]) == (pytest.approx(20), pytest.approx(12))
    assert row["peak_sqrt_kl"] == pytest.approx(math.exp(20 / 12 - 1)) and row["inside"]
    assert row["peak_win_rate"] == pytest.approx(curve(row["peak_sqrt_kl"]))
    (line,), (band,) = drawn_curves(ax), bands(ax)
    assert line[0, 0] == pytest.approx(0, abs=1e-6) and line[-1, 0] == 2.01  # the farthest checkpoint
    np.testing.assert_allclose(line[:, 1], [curve(d) for d in line[:, 0]])
    np.testing.assert_allclose([y - curve(d) for d, y in band.get_paths()[0].vertices], 0, atol=1e-9)  # both are on it
    assert stars(ax) == [(row["peak_sqrt_kl"], row["peak_win_rate"])]


@pytest.mark.parametrize("a, b, inside",
                         [(20, 12, True), (5, 30, False), (40, 12, False), (30, 10, False), (-3, 4, False)])
def test_peak_is_the_maximum(tmp_path, a, b, inside):
    """The best of a fine grid; the data are at 0.5 to 2."""
    row, ax = fitted(write_run(tmp_path / "run", curve=log_curve(50, a, b)))
    grid = np.linspace(1e-6, 20, 2_000_001)
    values = 50 + grid * (a - b * np.log(grid))
    assert (row["peak_sqrt_kl"], row["peak_win_rate"]) == pytest.approx((grid[values.argmax()], values.max()), abs=2e-5)
    assert row["inside"] is inside and len(stars(ax)) == inside


@pytest.mark.parametrize("a, b", [(5.0, -3.0), (10.0, 1e-3)])  # rising for ever; until d = exp(9999)
def test_no_peak(tmp_path, a, b):
    row, ax = fitted(write_run(tmp_path / "run", curve=log_curve(51, a, b)))
    assert math.isnan(row["peak_sqrt_kl"]) and math.isnan(row["peak_win_rate"]) and row["inside"] is False
    assert len(drawn_curves(ax)) == 1 and not stars(ax)


def test_figure_3_without_a_fit(tmp_path):
    """Too few checkpoints, or a policy that never left the reference: the means remain, and the picture."""
    folder = write_run(tmp_path / "run")
    for points in (golden_points(folder)[:3], [dict(p, sqrt_kl=0.0) for p in golden_points(folder)]):
        write_golden(folder, points)
        row, ax = fitted(folder)
        assert row is None and len(ax.containers[0].lines[0].get_xydata()) == len(points)


def test_means_and_standard_errors(tmp_path):
    """Figure 4 over three seeds, one of which lacks the last checkpoint, against numpy."""
    noise = np.random.default_rng(0).normal(size=(3, 5))
    folders = [write_run(tmp_path / f"{seed}", seed=seed) for seed in range(3)]
    for seed, folder in enumerate(folders):
        points = [dict(p, win_rate=0.6 + 0.05 * noise[seed, k]) for k, p in enumerate(golden_points(folder))]
        write_golden(folder, points[: 4 if seed == 2 else 5])
    rows = checkpoint_means([evaluate.read_run(folder) for folder in folders]).to_dict("records")
    assert [(row["step"], row["n"]) for row in rows] == [(0, 3), (16, 3), (32, 3), (48, 3), (64, 2)]
    for k, row in enumerate(rows):
        values = 60 + 5 * noise[: row["n"], k]
        assert row["win_rate"] == pytest.approx(values.mean())
        variance = ((values - values.mean()) ** 2).sum() / (row["n"] - 1)
        assert row["win_rate_se"] == pytest.approx(math.sqrt(variance / row["n"]))
        assert row["epoch"] == row["step"] / 32
    # Of one seed: over the prompts, as golden wrote it
    one = checkpoint_means([evaluate.read_run(folders[0])]).to_dict("records")
    assert all((row["n"], row["win_rate_se"], row["sqrt_kl_se"]) == (1, 2.0, 0.01) for row in one)


def test_figure_6_rows(tmp_path, capsys):
    """64 steps in bins of 4; a step that was not finite (null) makes a gap, which is said, and each seed counts once."""
    folders = [write_run(tmp_path / f"{seed}", seed=seed) for seed in (0, 1)]
    lines = (folders[0] / "metrics.jsonl").read_text().replace('"ratio/chosen": -0.1,', '"ratio/chosen": null,')
    (folders[0] / "metrics.jsonl").write_text(lines)
    run_plot(folders, tmp_path / "figs")
    assert f"{folders[0]}: 1 values of figure 6 are null" in capsys.readouterr().out
    rows = rows_of(tmp_path / "figs" / "figure6.jsonl")
    assert [row["first_step"] for row in rows] == list(range(1, 65, 4))
    for row in rows:
        of_bin = np.arange(row["first_step"], row["first_step"] + 4)
        values = np.array([-0.1 * of_bin.mean(), -0.1 * of_bin.mean() - 1])
        if of_bin[0] == 1:
            assert row["ratio/chosen"] is None and row["ratio/chosen_se"] is None and row["ratio/rejected"] is not None
            continue
        assert row["ratio/chosen"] == pytest.approx(values.mean())
        assert row["ratio/chosen_se"] == pytest.approx(values.std(ddof=1) / math.sqrt(2))
        assert row["ratio/rejected"] == pytest.approx(-0.2 * of_bin.mean() + 0.5)
        assert row["weights/mean"] == pytest.approx((1 / of_bin).mean())
        assert (row["epoch"], row["n"]) == (pytest.approx(of_bin.mean() / 32), 2)


def test_run_numbers(tmp_path):
    """Peak, drop and effective sample share: steps 59 to 64 have 4 of 8, but for the last, of 3 of 3 pairs."""
    folder = write_run(tmp_path / "run", curve=lambda d: {0: 50, 0.5: 62, 1: 71, 1.5: 71, 2: 64.5}[d])
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    lines[-1] = json.dumps(json.loads(lines[-1]) | {"weights/ess": 3.0, "pairs": 3})
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    numbers = evaluate.run_numbers(evaluate.read_run(folder))
    expected = dict(peak_win_rate=71, peak_sqrt_kl=1, final_win_rate=64.5, final_win_rate_se=2, final_sqrt_kl=2,
                    drop=6.5, final_length=22, ess_share=4 / 8)
    assert {name: numbers[name] for name in expected} == pytest.approx(expected)
    losing = evaluate.run_numbers(evaluate.read_run(write_run(tmp_path / "losing", curve=lambda d: 50 - d)))
    assert (losing["peak_win_rate"], losing["peak_sqrt_kl"], losing["drop"]) == pytest.approx((50, 0, 2))


@pytest.mark.parametrize("pairs, batch_size, logged, share", [
    (4, 16, False, 1.0),  # a run of fewer pairs than a step could hold: each step has all 4, and all count
    (20, 8, False, 0.75),  # three steps an epoch, of 8, 8 and 4 pairs: (4/8 + 4/4) / 2, the median of the last two
    (20, 8, True, 0.5)])  # what the log says goes before: 8 pairs in each
def test_ess_share_is_of_the_pairs_of_the_step(tmp_path, pairs, batch_size, logged, share):
    folder = write_run(tmp_path / "run", header=dict(pairs=pairs, steps=24), batch_size=batch_size)
    header, *lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][:25]
    lines = [line | {"weights/ess": 4.0} | (dict(pairs=8) if logged else {}) for line in lines]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [header, *lines]))
    write_golden(folder, [point | dict(step=min(point["step"], 24)) for point in golden_points(folder)])
    assert evaluate.run_numbers(evaluate.read_run(folder))["ess_share"] == pytest.approx(share)


def test_an_ess_that_is_null_is_said(tmp_path, capsys):
    """It does not count as a step of no effective samples, nor vanish unseen; a run of nothing else has none."""
    folder = write_run(tmp_path / "run")
    header, *lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for n_null, share in ((2, 4 / 8), (6, math.nan)):
        some = lines[: 64 - n_null] + [line | {"weights/ess": None} for line in lines[64 - n_null :]]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [header, *some]))
        numbers = evaluate.run_numbers(evaluate.read_run(folder))
        assert numbers["ess_share"] == pytest.approx(share, nan_ok=True)
        assert f"{folder}: {n_null} of the last 6 steps have no weights/ess" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------- the whole command
@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """3 seeds of is_dpo, dpo and is_ipo at beta 0.05, one of dpo at 0.1, and ablations of is_dpo over log_eps: folder,
    runs, {name: figure that was saved}."""
    folder = tmp_path_factory.mktemp("plot")
    runs = [write_run(folder / f"{loss}{seed}", loss, seed=seed, curve=log_curve(50 + (not k) * 0.1 * seed, 20 - k, 12))
            for k, loss in enumerate(("is_dpo", "dpo", "is_ipo")) for seed in range(3)]
    runs.append(write_run(folder / "single", "dpo", beta=0.1))
    runs += [write_run(folder / f"eps{value}-{beta}", log_eps=value, beta=beta, curve=log_curve(50, 18, 12))
             for value, beta in ((0.0, 0.05), (4.0, 0.05), (math.inf, 0.05), (0.5, 0.2), (4.0, 0.2))]
    figures, save = {}, matplotlib.figure.Figure.savefig

    def savefig(figure, path, **how):
        figures[path.name.split(".")[1]] = figure
        save(figure, path, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matplotlib.figure.Figure, "savefig", savefig)
        run_plot(runs, folder / "figs")
    return folder, runs, figures


def test_pictures(drawn):
    folder, _, _ = drawn
    for k in (3, 4, 5, 6):
        image = matplotlib.image.imread(folder / "figs" / f"figure{k}.png")
        assert min(image.shape[:2]) > 500 and image[..., :3].std() > 0.02


def test_rows_are_what_is_drawn(drawn):
    """The markers, lines and bars in the axes that were saved are the numbers of the rows."""
    folder, _, figures = drawn
    training = ["ratio/chosen", "ratio/rejected", "weights/mean"]
    for name, ys, n in (("figure4", ["win_rate", "sqrt_kl"], 5), ("figure6", training, 16)):
        rows = rows_of(folder / "figs" / f"{name}.jsonl")
        for ax, y in zip(figures[name].axes[::2], ys):  # a column for beta 0.05, one for 0.1
            assert [container.get_label() for container in ax.containers] == ["dpo", "is_dpo", "is_ipo"]
            for container in ax.containers:
                loss = container.get_label()
                mine = [row for row in rows if (row["loss"], row["beta"]) == (loss, 0.05)]
                line, _, (bars,) = container.lines
                assert len(mine) == n and line.get_color() == evaluate.LOOKS[loss][0]
                assert line.get_fillstyle() == ("none" if loss == "dpo" else "full")
                assert line.get_linewidth() == (0.8 if loss == "is_ipo" else 1.8)
                np.testing.assert_allclose(line.get_xydata(), [(row["epoch"], row[y]) for row in mine], rtol=1e-12)
                for (low, high), row in zip(bars.get_segments(), mine):
                    assert high[1] - low[1] == pytest.approx(2 * row[f"{y}_se"], abs=1e-9)


def test_figure_3(drawn):
    folder, _, figures = drawn
    fits, ax = rows_of(folder / "figs" / "figure3.jsonl")[:3], figures["figure3"].axes[0]
    assert [fit["loss"] for fit in fits] == ["dpo", "is_dpo", "is_ipo"] and len(drawn_curves(ax)) == 3
    for fit, line in zip(fits, drawn_curves(ax)):
        expected = [fit["start"] + d * (fit["a"] - fit["b"] * math.log(d)) for d in line[:, 0]]
        np.testing.assert_allclose(line[:, 1], expected, rtol=1e-12)
    peaks = [(fit["peak_sqrt_kl"], fit["peak_win_rate"]) for fit in fits if fit["inside"]]
    assert len(peaks) > 1
    np.testing.assert_allclose(stars(ax), peaks, rtol=1e-12)
    assert len(bands(ax)) == 2  # not is_ipo
    (legend,) = figures["figure3"].legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == ["dpo", "is_dpo", "is_ipo", "peak of a fitted curve"]


def test_figure_5_over_the_caps(drawn):
    """Two panels with caps of their own: each marker stands over the label of its own cap."""
    folder, _, figures = drawn
    rows, axes = rows_of(folder / "figs" / "figure5.jsonl"), figures["figure5"].axes
    figures["figure5"].canvas.draw()
    for k, y in enumerate(("peak_win_rate", "final_win_rate", "final_sqrt_kl")):
        for beta, ax, bottom in zip((0.05, 0.2), axes[2 * k :], axes[-2:]):
            (container,) = ax.containers
            caps = dict(zip(bottom.get_xticks(), (float(label.get_text()) for label in bottom.get_xticklabels())))
            found = {caps[x]: value for x, value in container.lines[0].get_xydata()}
            assert found == {float(row["log_eps"]): pytest.approx(row[y]) for row in rows if row["beta"] == beta}
    assert [row["log_eps"] for row in rows] == [0.0, 1.0, 4.0, "inf", 0.5, 4.0]
    assert rows[0]["final_win_rate"] < rows[0]["peak_win_rate"]


def test_table(drawn):
    folder, _, _ = drawn
    table = rows_of(folder / "figs" / "table1.jsonl")
    assert [(row["beta"], row["loss"], row["log_eps"], row["n"]) for row in table] == [
        (0.05, "dpo", None, 3), (0.05, "is_dpo", 0.0, 1), (0.05, "is_dpo", 1.0, 3), (0.05, "is_dpo", 4.0, 1),
        (0.05, "is_dpo", "inf", 1), (0.05, "is_ipo", 1.0, 3), (0.1, "dpo", None, 1), (0.2, "is_dpo", 0.5, 1),
        (0.2, "is_dpo", 4.0, 1)]
    final = [log_curve(50 + 0.1 * seed, 20, 12)(2 + 0.01 * seed) for seed in range(3)]
    mean, se = np.mean(final), np.std(final, ddof=1) / math.sqrt(3)
    row = next(row for row in table if row["n"] == 3 and row["loss"] == "is_dpo")
    assert (row["final_win_rate"], row["final_win_rate_se"]) == pytest.approx((mean, se))
    assert (row["final_length"], row["ess_share"]) == pytest.approx((22.01, 5 / 8))
    lines = (folder / "figs" / "table1.md").read_text().splitlines()
    line = next(line for line in lines if line.startswith("| is_dpo | 0.05 | 0.0001 | 1.0 | 3 |"))
    assert f"| {mean:.2f} ± {se:.2f} |" in line
    assert {line.count("|") for line in lines if line.startswith("| is_dpo |")} == {lines[0].count("|")}
    assert any(line.startswith("| is_dpo | 0.05 | 0.0001 | inf | 1 |") for line in lines)
    single = next(line for line in lines if line.startswith("| dpo | 0.1 | 0.0001 | - | 1 | "))
    assert "| 70.00 ± 2.00 | 2.00 ± 0.01 | 0.00 | 0.50 |" in single  # over prompts, where that is known


def test_the_table_in_latex(drawn):
    """The cells of table1.md, each row as long as the head, in a tabular of as many columns."""
    folder, _, _ = drawn
    markdown = [line.strip("| ").split(" | ") for line in (folder / "figs" / "table1.md").read_text().splitlines() if line.startswith("|")]
    latex = (folder / "figs" / "table1.tex").read_text().splitlines()
    rows = [line.removesuffix(r" \\").replace(r"\_", "_").replace(r"$\pm$", "±").split(" & ") for line in latex if "&" in line]
    assert rows == [markdown[0], *markdown[2:]] and len(rows) > 5
    assert latex[0] == r"\begin{tabular}{l" + "r" * (len(rows[0]) - 1) + "}" and latex[-1] == r"\end{tabular}"


def test_who_judges_stands_in_the_pictures():
    """On the axis and in the table's note; runs that two judges judged belong in no one picture."""
    import pandas as pd

    rows = pd.DataFrame([dict(beta=0.1, lr=1e-4, loss="dpo", epoch=1.0, win_rate=50.0, win_rate_se=1.0)])
    figure = evaluate.draw(rows, "epoch", ["win_rate"], "truth")
    assert figure.axes[0].get_ylabel() == "win rate by the truth (%)"
    runs = [dict.fromkeys([*evaluate.SETTING, *evaluate.COMMON, *evaluate.OF_SETTING, "golden settings", "data"], 1) | more for more in
            (dict(name="a", seed=0, loss="dpo", judge="truth"), dict(name="b", seed=0, loss="is_dpo", judge="golden model"))]
    with pytest.raises(evaluate.UserError, match="judge 'truth' and 'golden model'"):
        evaluate.check_comparable(runs)


def test_the_same_runs_give_the_same_bytes(drawn):
    folder, runs, _ = drawn
    run_plot(reversed(runs), folder / "again")
    names = sorted(path.name for path in (folder / "figs").iterdir())
    pictures = [f"figure{k}.{end}" for k in (3, 4, 5, 6) for end in ("png", "jsonl")]
    assert set(names) - {".figs.lock", ".lock"} == {*pictures, "table1.jsonl", "table1.md", "table1.tex"}
    for name in [*pictures, "table1.jsonl", "table1.md", "table1.tex"]:
        assert (folder / "again" / name).read_bytes() == (folder / "figs" / name).read_bytes(), name


def test_log_eps_chooses_and_says_what_it_leaves_out(drawn, tmp_path, capsys):
    _, runs, _ = drawn
    ablation = [runs[0], *runs[-5:-2]]
    run_plot([*ablation, runs[3]], tmp_path, log_eps=math.inf)
    assert "figures 3, 4, 6: 2 of 5 runs, those without a log_eps or of inf" in capsys.readouterr().out
    assert {row["log_eps"] for row in rows_of(tmp_path / "figure4.jsonl")} == {"inf", None}
    assert len({row["log_eps"] for row in rows_of(tmp_path / "figure5.jsonl")}) == 4
    with pytest.raises(evaluate.UserError, match="no run has log_eps 7, .*choose another --log_eps"):
        run_plot(ablation, tmp_path / "none", log_eps=7.0)


def test_what_is_not_drawn_does_not_linger(drawn, tmp_path, capsys):
    _, runs, _ = drawn
    run_plot([runs[0], runs[-3]], tmp_path / "figs")
    assert "figure3, figure4, figure5, figure6, table1.md and table1.tex of 2 runs" in capsys.readouterr().out
    assert (tmp_path / "figs" / "figure5.png").exists()
    run_plot(runs[:2], tmp_path / "figs")
    assert "figure3, figure4, figure6, table1.md and table1.tex of 2 runs" in capsys.readouterr().out
    assert not list((tmp_path / "figs").glob("figure5*")) and (tmp_path / "figs" / "figure4.png").exists()


def test_a_run_that_is_not_evaluated_to_its_end_is_named(tmp_path, capsys):
    folder = write_run(tmp_path / "run")
    write_golden(folder, golden_points(folder)[:4])
    evaluate.read_run(folder)
    assert f"{folder}: evaluated up to step 48 of 64" in capsys.readouterr().out


def test_another_folder_is_left_alone(drawn, tmp_path):
    _, runs, _ = drawn
    (tmp_path / "figure5.png").write_text("a user's own")
    with pytest.raises(evaluate.UserError, match="is not empty, and `plot` did not make it"):
        run_plot(runs[:1], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["figure5.png"]
    assert (tmp_path / "figure5.png").read_text() == "a user's own"


# ---------------------------------------------------------------------------------------------------------------- what is refused
def test_a_line_cut_by_a_kill_is_left_out(tmp_path):
    folder = write_run(tmp_path / "run")
    for name in ("metrics.jsonl", "golden.jsonl"):
        (folder / name).write_bytes((folder / name).read_bytes()[:-20])
    run = evaluate.read_run(folder)
    assert [point["step"] for point in run["points"]] == STEPS[:-1] and len(run["steps"]) == 63
    (folder / "golden.jsonl").write_bytes((folder / "golden.jsonl").read_bytes() + b"\n")  # now the line is whole, and not JSON
    with pytest.raises(evaluate.UserError, match=r"golden\.jsonl:5: not JSON"):
        evaluate.read_run(folder)


def test_the_last_settings_hold(tmp_path):
    folder = write_run(tmp_path / "run", settings="old")
    points = golden_points(folder)
    again = [dict(p, settings="new", win_rate=0.7) for p in points]
    points.append(dict(points[-1], step=80))
    write_golden(folder, points + again[::-1] + [dict(again[2], win_rate=0.9)])
    run = evaluate.read_run(folder)
    assert [round(p["win_rate"]) for p in run["points"]] == [70, 70, 90, 70, 70] and [p["step"] for p in run["points"]] == STEPS


def test_the_complete_settings_hold(tmp_path):
    """A later evaluation that has not come to the run's end, or of the reference alone, does not stand for the run."""
    folder = write_run(tmp_path / "run")
    points = golden_points(folder)
    other = [dict(point, settings="other", win_rate=0.9) for point in points]
    for later in (other[:1], other[:3], other[1:]):
        write_golden(folder, points + later)
        run = evaluate.read_run(folder)
        assert run["golden settings"] == "aaaa" and [p["win_rate"] for p in run["points"]] == [100 * p["win_rate"] for p in points]
    write_golden(folder, points + other)
    assert evaluate.read_run(folder)["golden settings"] == "other"
    write_golden(folder, points[:3] + other[:2])  # none is complete: the last that has the reference and another
    assert evaluate.read_run(folder)["golden settings"] == "other"


@pytest.mark.parametrize("damage, line", [
    (lambda lines: lines[:1] + lines[:0:-1], 2), (lambda lines: lines[:5] + lines[4:], 6), (lambda lines: lines[:5] + lines[6:], 6),
    (lambda lines: [*lines[:7], "garbage", *lines[7:]], 8), (lambda lines: [*lines[:7], "3", *lines[7:]], 8),
    (lambda lines: [*lines[:7], '{"step": 7}', *lines[8:]], 8), (lambda lines: [*lines[:7], "[" * 100000, *lines[8:]], 8),
    (lambda lines: [*lines[:7], lines[7].replace('"epoch": ', '"epoch": "x", "y": '), *lines[8:]], 8),
    (lambda lines: [lines[0].replace('"pairs"', '"p"'), *lines[1:]], 1), (lambda lines: [lines[0].replace('"lr"', '"l"'), *lines[1:]], 1)])
def test_metrics_that_are_damaged(tmp_path, damage, line):
    """Reversed, doubled, missing, no JSON, without fields: one line that names the file's."""
    folder = write_run(tmp_path / "run")
    lines = damage((folder / "metrics.jsonl").read_text().splitlines())
    (folder / "metrics.jsonl").write_text("".join(text + "\n" for text in lines))
    with pytest.raises(evaluate.UserError, match=rf"metrics\.jsonl:{line}: ") as error:
        evaluate.read_run(folder)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("bad", ["3", "{}", '{"settings": "aaaa", "step": 3}', '{"settings": 3}', "x"])
def test_golden_rows_that_are_damaged(tmp_path, bad):
    folder = write_run(tmp_path / "run")
    lines = (folder / "golden.jsonl").read_text().splitlines()
    (folder / "golden.jsonl").write_text("".join(text + "\n" for text in [*lines[:2], bad, *lines[2:]]))
    with pytest.raises(evaluate.UserError, match=r"golden\.jsonl:3: "):
        evaluate.read_run(folder)


def test_not_an_evaluated_run(tmp_path):
    with pytest.raises(evaluate.UserError, match=r"nowhere.metrics\.jsonl: no text that can be read"):
        evaluate.read_run(tmp_path / "nowhere")
    folder = write_run(tmp_path / "run")
    points, remedy = golden_points(folder), f"golden --rm REWARD_MODEL --ref REFERENCE --data PROMPTS {folder}"
    for some in (points[1:], points[:1]):
        write_golden(folder, some)
        with pytest.raises(evaluate.UserError, match=f"no line of step 0, the reference, or none after it: .*{remedy}"):
            evaluate.read_run(folder)
    for negative in (dict(sqrt_kl=-1.0), dict(sqrt_kl_se=-1), dict(win_rate_se=-0.1)):
        write_golden(folder, points[:2] + [points[2] | negative])
        with pytest.raises(evaluate.UserError, match=r"golden\.jsonl:3: .* not below 0"):
            evaluate.read_run(folder)
    write_golden(folder, points[:2] + [dict(points[2], sqrt_kl=math.nan, length=None)])
    with pytest.raises(evaluate.UserError, match=r"golden\.jsonl:3: .*'length': None.* must be numbers"):
        evaluate.read_run(folder)
    (folder / "golden.jsonl").unlink()
    with pytest.raises(evaluate.UserError, match=remedy):
        evaluate.read_run(folder)
    header = (folder / "metrics.jsonl").read_text().split("\n")[0]
    for text in ("", '{"step": 1}', '{"args": 3}', '["args"]', "7", header):
        (folder / "metrics.jsonl").write_text(text + "\n")
        with pytest.raises(evaluate.UserError, match=r"metrics\.jsonl:1: (no JSON|not the header)|no steps after the header"):
            evaluate.read_run(folder)


@pytest.mark.parametrize("change, says", [
    (dict(seed=0, loss="dpo", settings="bbbb"), "golden settings 'aaaa' and 'bbbb'"),
    (dict(settings="bbbb", header=dict(data="beef")), None),  # another seed may have another data set and reward model
    (dict(protocol="n 512"), "protocol 'n 256' and 'n 512'"),
    (dict(seed=0), "the same setting and seed"),
    (dict(epochs=1), "epochs 2 and 1"),
    (dict(seed=0, loss="dpo", header=dict(data="beef")), "data 'f00d' and 'beef'"),
    (dict(label_smoothing=0.1), "label_smoothing None and 0.1"),
    (dict(loss="rpo", eta=0.5), None),  # another loss may have other flags of its own
    (dict(seed=1, save_every=5), None),
])
def test_runs_that_are_not_comparable(tmp_path, change, says):
    first, second = write_run(tmp_path / "first"), write_run(tmp_path / "second", **{"seed": 1} | change)
    runs = [evaluate.read_run(first), evaluate.read_run(second)]
    if says is None:
        return evaluate.check_comparable(runs)
    with pytest.raises(evaluate.UserError, match=says) as caught:
        evaluate.check_comparable(runs)
    assert str(first) in str(caught.value) and str(second) in str(caught.value)


def test_figure_3_shows_curves_whole(tmp_path):
    """A curve goes as far as the farthest seed; the means of checkpoints, which the axis would else be cut to, do not."""
    folders = [write_run(tmp_path / f"{seed}", seed=seed) for seed in (0, 1)]
    write_golden(folders[1], [dict(point, sqrt_kl=3 * point["sqrt_kl"]) for point in golden_points(folders[1])])
    _, ax = fitted(*folders)
    (curve,) = drawn_curves(ax)
    assert curve[-1, 0] == pytest.approx(6.03) and max(ax.containers[0].lines[0].get_xdata()) < 5
    assert ax.get_xlim()[0] <= 0 and ax.get_xlim()[1] > 6.03
    assert ax.get_ylim()[0] < curve[:, 1].min() and ax.get_ylim()[1] > curve[:, 1].max()
