"""bandit.py against oracles written out again: numpy loops over the pairs, finite differences, quadrature;
and against train_pref.py."""

import inspect
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch

import bandit
import train_pref

ROOT = Path(__file__).resolve().parent.parent
REF, REWARD = np.array([0.5, 0.1, 0.1, 0.3]), np.array([0.5, 1.0, 0.0, 0.0])
COSINES = {0.05: -0.0475, 0.1: -0.0394, 0.2: 0.0647, 0.5: 0.6003, 1.0: 0.9064}
ALL_LOSSES = ("dpo_loss", "ipo_loss", "importance_weights", "rpo_loss", "chi_po_logits", "chi_po_loss",
              "length_dpo_loss")


# ---------------------------------------------------------------------------------------------------------- the oracles
def softmax(theta):
    e = np.exp(theta - np.max(theta))
    return e / e.sum()


def oracle_kl_gradient(theta, h=1e-5):
    """Central differences of KL(softmax(theta) || REF)."""
    kl = lambda t: sum(p * math.log(p / q) for p, q in zip(softmax(t), REF))
    return np.array([(kl(theta + h * e) - kl(theta - h * e)) / (2 * h) for e in np.eye(4)])


def oracle_mu_gradient(theta, weight):
    """sum_{a, b} ref_a ref_b w(a, b) grad (delta^2 / 2), in a double loop; grad of log pi_a - log pi_b is e_a - e_b."""
    pi, gradient = softmax(theta), np.zeros(4)
    for a in range(4):
        for b in range(4):
            delta = math.log(pi[a] / REF[a]) - math.log(pi[b] / REF[b])
            gradient += REF[a] * REF[b] * weight(pi[a] / REF[a], pi[b] / REF[b]) * delta * (np.eye(4)[a] - np.eye(4)[b])
    return gradient


ORACLE_WEIGHTS = {
    "none": lambda a, b: 1.0,
    "is": lambda a, b: a * b,
    "log_eps=2": lambda a, b: min(a * b, math.exp(4)),
    "log_eps=1": lambda a, b: min(a * b, math.exp(2)),
    "log_eps=0": lambda a, b: min(a * b, 1.0),
    "misprint": lambda a, b: a / b,
}


def cosine(a, b):
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def labelled(probs):
    """P(w, l) of two draws from probs, labelled by Bradley-Terry: a 4 x 4 table."""
    table = np.zeros((4, 4))
    for a in range(4):
        for b in range(4):
            first_wins = 1 / (1 + math.exp(REWARD[b] - REWARD[a]))
            table[a, b] += probs[a] * probs[b] * first_wins
            table[b, a] += probs[a] * probs[b] * (1 - first_wins)
    return table


def dpo_table(pi, beta):
    rho = np.log(pi / REF)
    return np.logaddexp(0, -beta * (rho[:, None] - rho[None]))


# ------------------------------------------------------------------------------------------------------------ figure 2
@pytest.fixture(scope="module")
def rows():
    return {row["beta"]: row for row in bandit.figure_2(0)}


@pytest.mark.parametrize("beta", COSINES)
def test_figure_2_hits_the_figures(rows, beta):
    row = rows[beta]
    assert row["cosine"]["none"] == pytest.approx(COSINES[beta], abs=1e-4)
    assert row["cosine"]["is"] == pytest.approx(1, abs=1e-12)
    assert row["factor"] == pytest.approx(2, abs=1e-10)
    assert abs(row["cosine"]["misprint"] - row["cosine"]["is"]) > 0.05
    assert abs(row["cosine"]["misprint"] - row["cosine"]["none"]) > 0.02


@pytest.mark.parametrize("beta", COSINES)
@pytest.mark.parametrize("weight", bandit.WEIGHTS)
def test_gradients_are_the_loops(rows, beta, weight):
    theta = np.log(REF) + REWARD / beta
    gradient = oracle_mu_gradient(theta, ORACLE_WEIGHTS[weight])
    mine = bandit.PAIR_PROBS @ bandit.pair_gradients(bandit.optimum(beta), weight)
    np.testing.assert_allclose(mine.numpy(), gradient, rtol=1e-9, atol=1e-13)
    kl = oracle_kl_gradient(theta)
    np.testing.assert_allclose(bandit.kl_gradient(bandit.optimum(beta)).numpy(), kl, atol=1e-9)
    assert rows[beta]["cosine"][weight] == pytest.approx(cosine(kl, gradient), abs=1e-4)


def test_gradients_are_of_the_weighted_square_with_the_weight_held():
    """Finite differences of E[w delta^2 / 2] with w frozen at theta: what `detached` means."""
    theta = np.array([0.3, -1.2, 0.8, 0.1])
    frozen = softmax(theta)

    def mu(t, names):
        pi = softmax(t)
        square = lambda a, b: (math.log(pi[a] / REF[a]) - math.log(pi[b] / REF[b])) ** 2 / 2
        w = ORACLE_WEIGHTS[names]
        held = lambda a, b: REF[a] * REF[b] * w(frozen[a] / REF[a], frozen[b] / REF[b])
        return sum(held(a, b) * square(a, b) for a in range(4) for b in range(4))

    for weight in bandit.WEIGHTS:
        difference = [(mu(theta + 1e-5 * e, weight) - mu(theta - 1e-5 * e, weight)) / 2e-5 for e in np.eye(4)]
        mine = bandit.PAIR_PROBS @ bandit.pair_gradients(torch.tensor(theta), weight)
        np.testing.assert_allclose(mine.numpy(), difference, atol=1e-8)


def test_zero_crossing():
    """Below 0.15201 the unweighted cosine is negative, above it positive: by the oracle's dot product, of its sign."""
    def dot(beta):
        pi = softmax(np.log(REF) + REWARD / beta)
        rho = np.log(pi / REF)
        return float(pi * (rho - pi @ rho) @ oracle_mu_gradient(np.log(REF) + REWARD / beta, ORACLE_WEIGHTS["none"]))

    crossing = bandit.zero_crossing()
    assert crossing == pytest.approx(0.152009, abs=1e-6)
    assert dot(crossing - 1e-6) < 0 < dot(crossing + 1e-6)
    assert all(dot(beta) < 0 for beta in np.linspace(0.03, 0.1519, 50))
    assert all(dot(beta) > 0 for beta in np.linspace(0.1521, 2, 50))


def test_caps_above_zero_do_not_bind_at_the_optimum():
    """As the table shows: pair weights of different actions stay below exp(2) at every beta."""
    worst = 0.0
    for beta in np.geomspace(0.03, 100, 500):
        ratio = softmax(np.log(REF) + REWARD / beta) / REF
        worst = max(worst, max(ratio[a] * ratio[b] for a in range(4) for b in range(4) if a != b))
    assert 1 < worst < math.exp(2)


def test_precision_holds_over_the_range_of_betas():
    for beta in (0.03, 0.05, 0.07, 5.0, 100.0):
        theta = bandit.optimum(beta)
        assert bandit.mu_cosine(theta, "is") == pytest.approx(1, abs=1e-12)
        factor = (bandit.PAIR_PROBS @ bandit.pair_gradients(theta, "is")).norm() / bandit.kl_gradient(theta).norm()
        assert factor.item() == pytest.approx(2, abs=1e-9)


def test_monte_carlo_surrounds_the_exact_line(rows):
    again = {row["beta"]: row for row in bandit.figure_2(0, [0.2, 1.0])}
    other = {row["beta"]: row for row in bandit.figure_2(1, [0.2, 1.0])}
    for beta in (0.2, 1.0):
        assert again[beta]["monte_carlo"] == rows[beta]["monte_carlo"] != other[beta]["monte_carlo"]
    for beta, row in rows.items():
        sampled = row["monte_carlo"]["none"]
        assert sampled["mean"] == pytest.approx(row["cosine"]["none"], abs=4 * sampled["sd"] / math.sqrt(200) + 2e-3)
        assert 0.005 < sampled["sd"] < 0.1 and sampled["p10"] < row["cosine"]["none"] < sampled["p90"]
        assert row["monte_carlo"]["is"]["mean"] > 0.99
    sampled = rows[0.2]["monte_carlo"]["none"]  # close to normal
    assert (sampled["p90"] - sampled["p10"]) / sampled["sd"] == pytest.approx(2 * 1.2816, rel=0.15)
    small = bandit.figure_2(0, [0.2], n_pairs=100)[0]["monte_carlo"]["none"]["sd"]
    assert 2 < small / rows[0.2]["monte_carlo"]["none"]["sd"] < 5  # sqrt(10) = 3.2


# --------------------------------------------------------------------------------------------------- figure 2, learned
def test_learned_path():
    """The figures of the note under the table, against plain gradient descent in numpy."""
    path = bandit.learned([0, 10, 1000], [0.05, 0.5])
    target = np.log(softmax(np.log(REF) + REWARD / 0.05))
    theta = np.log(REF)
    for _ in range(1000):
        pi = softmax(theta)
        gap = np.log(pi) - target
        theta = theta - pi * (gap - pi @ gap)
    pi = softmax(theta)
    kl = pi @ (np.log(pi) - target)
    assert path[-1]["kl_to_optimum"][0] == pytest.approx(kl, rel=1e-6) == pytest.approx(5e-4, abs=5e-5)
    rho = np.log(pi / REF)
    expected = cosine(pi * (rho - pi @ rho), oracle_mu_gradient(theta, ORACLE_WEIGHTS["none"]))
    assert path[-1]["cosine"][0] == pytest.approx(expected, abs=1e-6) == pytest.approx(0.8422, abs=1e-4)
    assert pi[2] == pytest.approx(3e-5, abs=5e-6) and math.exp(target[2]) == pytest.approx(2e-9, abs=1e-10)
    assert path[-1]["cosine"][1] == pytest.approx(COSINES[0.5], abs=1e-4)  # where it converges, it is the optimum's
    assert path[0]["step"] == 0 and path[0]["cosine"] == [1.0, 1.0]


def test_learned_starts_at_one_and_natural_gradient_arrives():
    near_ref = torch.tensor(np.log(REF) + 1e-5 * REWARD)
    assert bandit.mu_cosine(near_ref, "none") == pytest.approx(1, abs=1e-4)  # the limit that is shown at step 0
    last = bandit.learned([0, 60], natural=True)[-1]
    assert last["cosine"] == pytest.approx(list(COSINES.values()), abs=1e-4)
    assert max(last["kl_to_optimum"]) < 1e-12


# ----------------------------------------------------------------------------------------------------------- Theorem 1
def test_theorem_1():
    found = bandit.theorem_1(0, [0.01, 0.1, 1.0, 10.0], policies=20)
    assert found["objective"] < 1e-12 and found["gradient"] < 1e-10
    assert found != bandit.theorem_1(1, [0.01, 0.1, 1.0, 10.0], policies=20)  # other policies round otherwise


def test_theorem_1_by_loops():
    """The two objectives are equal, and equal to what the loops give: not both wrong in the same way."""
    for seed, beta in ((0, 0.1), (1, 2.0)):
        theta = np.random.default_rng(seed).normal(size=4)
        pi = softmax(theta)
        logps = bandit.pair_logps(torch.tensor(theta).log_softmax(-1))
        weights = bandit.importance_weights(*logps, log_eps=math.inf)
        offline = bandit.labelled_probs(bandit.REF) @ (weights * bandit.dpo_loss(*logps, beta=beta))
        assert offline.item() == pytest.approx((labelled(pi) * dpo_table(pi, beta)).sum(), rel=1e-12)
        weights = bandit.importance_weights(*logps, log_eps=0.0)
        capped = bandit.labelled_probs(bandit.REF) @ (weights * bandit.dpo_loss(*logps, beta=beta))
        assert capped < offline * (1 - 1e-3)  # the cap costs the equality
    assert bandit.labelled_probs(bandit.REF).numpy() == pytest.approx(labelled(REF).reshape(-1), rel=1e-14)


@pytest.mark.parametrize("missing", range(4))
def test_missing_support(missing):
    beta, pi = 0.2, softmax(np.log(REF) + REWARD / 0.2)
    terms = labelled(pi) * dpo_table(pi, beta)
    others = [a for a in range(4) if a != missing]
    seen = terms[np.ix_(others, others)].sum()
    found = bandit.missing_support(bandit.optimum(beta), missing, beta)
    assert found["online"] == pytest.approx(terms.sum(), rel=1e-12)
    assert found["estimate"] == pytest.approx(seen, rel=1e-12)
    assert found["bias"] == pytest.approx(seen - terms.sum(), abs=1e-14) and found["bias"] < -0.005
    restricted = np.where(np.arange(4) == missing, 0, pi) / pi[others].sum()  # Eq. 15, and the factor that Eq. 14 lacks
    eq_14 = (labelled(restricted) * dpo_table(pi, beta)).sum()
    assert found["estimate"] == pytest.approx(found["seen_mass"] * eq_14, rel=1e-12)
    assert found["seen_mass"] == pytest.approx(pi[others].sum() ** 2, rel=1e-12)


@pytest.mark.parametrize("missing", range(4))
def test_missing_support_has_eq_14s_gradient_times_pi_s_squared(missing):
    """Central differences of the estimate, its weights held, against pi(S)^2 times those of -E log sigmoid under the
    restricted pi, its draws held: what Eq. 14 would be with its sign and its factor."""
    beta, theta = 0.2, np.random.default_rng(missing).normal(size=4)
    others = np.array([a for a in range(4) if a != missing])
    pi, data = softmax(theta), np.where(np.arange(4) == missing, 0, REF)
    data /= data.sum()
    restricted = np.where(np.arange(4) == missing, 0, pi) / pi[others].sum()
    weights = np.divide(pi, data, out=np.zeros(4), where=data > 0)
    held = labelled(data) * weights[:, None] * weights
    for e in np.eye(4) * 1e-5:
        losses = dpo_table(softmax(theta + e), beta) - dpo_table(softmax(theta - e), beta)
        eq_14 = (labelled(restricted) * losses).sum()
        assert (held * losses).sum() == pytest.approx(pi[others].sum() ** 2 * eq_14, rel=1e-9, abs=1e-18)
    found = bandit.missing_support(torch.tensor(theta), missing, beta)
    assert found["estimate"] == pytest.approx((held * dpo_table(pi, beta)).sum(), rel=1e-12)


# --------------------------------------------------------------------------------------------------------- section 4.3
@pytest.mark.parametrize("name", ALL_LOSSES)
def test_losses_are_those_of_train_pref(name):
    assert inspect.getsource(getattr(bandit, name)) == inspect.getsource(getattr(train_pref, name))


@pytest.mark.parametrize("loss", bandit.LOSSES)
def test_bandit_loss_is_train_prefs_loss(loss):
    """What the trainer computes for --loss, with its own defaults, on random log-probs."""
    args = train_pref.parse_args(["--loss", loss, "--beta", str(bandit.TRAIN_BETA)])
    logps = [-3 * x for x in torch.rand(4, 1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)]
    one = torch.ones_like(logps[0])
    losses, weights = train_pref.preference_loss(args, *logps, one, one)
    torch.testing.assert_close(bandit.bandit_loss(loss, logps), weights * losses, rtol=1e-14, atol=0)
    assert loss[:3] != "is_" or 0.05 < (weights == math.exp(2)).double().mean() < 0.5  # cap in play, and not always


def samples(runs, seed):
    """What section_4_3 trains on: 10 labelled pairs a run, none with action 2."""
    return bandit.data_sets(bandit.labelled_probs(torch.tensor([0.5, 0.1, 0.0, 0.3])), 10, runs, seed)


def test_labelled_samples():
    shares = samples(4000, 0)
    assert shares.shape == (4000, 16) and torch.allclose(shares.sum(1), torch.ones(4000, dtype=torch.float64))
    assert torch.allclose(shares * 10, (shares * 10).round())
    expected = labelled(np.where(np.arange(4) == 2, 0, REF) / 0.9).reshape(-1)
    se = np.sqrt(expected * (1 - expected) / 40000)
    assert (np.abs(shares.mean(0).numpy() - expected) <= 5 * se).all()
    assert shares[:, (bandit.W == 2) | (bandit.L == 2)].sum() == 0


def oracle_descent(loss, features, shares, steps):
    """dpo and ipo by hand: delta's gradient in theta is features_w - features_l; d loss / d delta is
    -beta sigmoid(-beta delta) for dpo and 2 (delta - 1 / (2 beta)) for ipo."""
    theta, beta = np.zeros(features.shape[1]), bandit.TRAIN_BETA
    for _ in range(steps):
        pi = softmax(np.log(REF) + features @ theta)
        gradient = np.zeros_like(theta)
        for k, share in enumerate(shares):
            w, l = divmod(k, 4)
            rho_w, rho_l = math.log(pi[w] / REF[w]), math.log(pi[l] / REF[l])
            weight = math.exp(min(rho_w + rho_l, 2.0)) if loss.startswith("is_") else 1.0
            slope = -beta / (1 + math.exp(beta * (rho_w - rho_l)))
            if loss.endswith("ipo"):
                slope = 2 * (rho_w - rho_l - 1 / (2 * beta))
            gradient += share * weight * slope * (features[w] - features[l])
        theta = theta - (0.025 if loss.endswith("ipo") else 5.0) * gradient
    return softmax(np.log(REF) + features @ theta)


@pytest.mark.parametrize("loss", ["dpo", "is_dpo", "ipo", "is_ipo"])
def test_training_is_gradient_descent(loss):
    features = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    shares = samples(3, 0)
    policies = bandit.train_bandit(loss, features, shares, [0, 20])
    assert torch.allclose(policies[0], bandit.REF.expand(3, 4))
    for run in range(3):
        expected = oracle_descent(loss, features[run].numpy(), shares[run].numpy(), 20)
        np.testing.assert_allclose(policies[1, run].numpy(), expected, rtol=1e-9)


def test_section_4_3_columns():
    """Two runs, tabular is_dpo, by loops from the policies."""
    rows = bandit.section_4_3(5, marks=[0, 30], runs=2)
    row = next(r for r in rows if (r["policy"], r["loss"]) == ("tabular", "is_dpo"))
    shares = samples(2, 5)
    policies = bandit.train_bandit("is_dpo", torch.eye(4, dtype=torch.float64).repeat(2, 1, 1), shares, [30])[0].numpy()
    ratios, kls = [], []
    for pi, share in zip(policies, shares.numpy()):
        ratios.append(sum(s * (pi[k // 4] / REF[k // 4] + pi[k % 4] / REF[k % 4]) / 2 for k, s in enumerate(share)))
        kls.append(sum(p * math.log(p / q) for p, q in zip(pi, REF)))
    assert row["mass"][1] == pytest.approx(policies[:, 2].mean()) and row["risen"][1] == (policies[:, 2] > 0.1).mean()
    assert row["ratio"][1] == pytest.approx(np.mean(ratios)) and row["kl"][1] == pytest.approx(np.mean(kls))


@pytest.mark.parametrize("loss", bandit.LOSSES)
def test_what_moves_the_unsampled_logit(loss):
    """Nothing, for the losses of delta; for rpo and chi_po, which see log pi itself, something."""
    theta = torch.tensor([0.2, -0.5, 1.0, 0.3], dtype=torch.float64, requires_grad=True)
    shares = samples(1, 0)[0]
    objective = (shares * bandit.bandit_loss(loss, bandit.pair_logps(theta.log_softmax(-1)))).sum()
    gradient = torch.autograd.grad(objective, theta)[0]
    assert gradient[[0, 1, 3]].abs().max() > 1e-3
    assert (abs(gradient[2]) > 1e-6) if loss in ("rpo", "chi_po") else abs(gradient[2]) < 1e-15


def test_section_4_3_says_what_the_readme_says():
    rows = {(row["policy"], row["loss"]): row for row in bandit.section_4_3(0, marks=[0, 100, 300], runs=100)}
    assert len(rows) == 14
    for kind in ("tabular", "shared"):
        for loss in bandit.LOSSES:
            start = [rows[kind, loss][key][0] for key in ("mass", "ratio", "kl")]
            assert start == pytest.approx([0.1, 1, 0], abs=1e-12)
        assert rows[kind, "length_dpo"]["mass"] == pytest.approx(rows[kind, "dpo"]["mass"])  # equal lengths: it is dpo
    mass = {key: row["mass"] for key, row in rows.items()}
    assert mass["tabular", "dpo"][-1] < mass["tabular", "is_dpo"][-1] < 0.06  # down for both: the paper does not hold
    assert mass["shared", "dpo"][-1] > mass["shared", "is_dpo"][-1] + 0.02 > 0.12  # up for both, less with IS
    assert mass["shared", "is_dpo"][-1] > mass["shared", "is_dpo"][1] + 1e-3  # and not at a stop
    assert rows["shared", "dpo"]["above_09"][-1] >= rows["shared", "is_dpo"]["above_09"][-1] + 0.05
    assert 0.1 < rows["shared", "dpo"]["risen"][-1] < 0.6


# ------------------------------------------------------------------------------------------------------------ figure 1
def numpy_ref(points):
    bump = lambda mean: np.exp(-((points - mean) ** 2).sum(-1) / (2 * 0.36)) / (2 * math.pi * 0.36)
    return (bump([-2.0, 0.0]) + bump([2.0, 0.0])) / 2


def test_densities():
    rng = np.random.default_rng(0)
    points = rng.normal(size=(50, 2)) * 2
    np.testing.assert_allclose(bandit.REF_PLANE.log_prob(torch.tensor(points)).exp(), numpy_ref(points), rtol=1e-12)
    theta = torch.tensor([0.7, -0.2, 0.3, -0.4, 0.5], dtype=torch.float64)
    lower = np.array([[math.exp(0.3), 0], [0.5, math.exp(-0.4)]])
    covariance, shifted = lower @ lower.T, points - np.array([0.7, -0.2])
    expected = np.exp(-np.einsum("ni,ij,nj->n", shifted, np.linalg.inv(covariance), shifted) / 2)
    expected /= 2 * math.pi * math.sqrt(np.linalg.det(covariance))
    np.testing.assert_allclose(bandit.gaussian(theta).log_prob(torch.tensor(points)).exp(), expected, rtol=1e-12)
    np.testing.assert_allclose(bandit.describe(theta)["covariance"], covariance, rtol=1e-12)
    np.testing.assert_allclose(bandit.gaussian(theta).scale_tril, lower, rtol=1e-15)


def test_describe_against_draws():
    theta = torch.tensor([0.7, -0.2, 0.3, -0.4, 0.5], dtype=torch.float64)
    found, e = bandit.describe(theta), np.random.default_rng(0).normal(size=(400_000, 2))
    points = np.stack([0.7 + math.exp(0.3) * e[:, 0], -0.2 + 0.5 * e[:, 0] + math.exp(-0.4) * e[:, 1]], -1)
    logs = bandit.gaussian(theta).log_prob(torch.tensor(points)).numpy() - np.log(numpy_ref(points))
    assert found["kl"] == pytest.approx(logs.mean(), abs=5 * logs.std() / math.sqrt(len(logs)))
    far = (np.minimum(np.hypot(points[:, 0] - 2, points[:, 1]), np.hypot(points[:, 0] + 2, points[:, 1])) > 1.8).mean()
    assert found["far"] == pytest.approx(far, abs=5e-3)


def test_off_policy_optimum_is_a_minimum():
    """Var of log pi - log ref under ref, by Gauss-Hermite quadrature: no small step from the optimum lowers it."""
    x, w = np.polynomial.hermite_e.hermegauss(60)
    weights = np.concatenate([np.outer(w, w).reshape(-1)] * 2)
    weights /= weights.sum()
    grid = 0.6 * np.stack(np.meshgrid(x, x, indexing="ij"), -1).reshape(-1, 2)
    points = np.concatenate([grid + [2, 0], grid - [2, 0]])

    def mu(theta):
        delta = bandit.gaussian(torch.tensor(theta)).log_prob(torch.tensor(points)).numpy() - np.log(numpy_ref(points))
        return weights @ delta**2 - (weights @ delta) ** 2

    optimum = bandit.off_policy_optimum().numpy()
    assert optimum == pytest.approx([0, 0, math.log(2.8703), math.log(0.6), 0], abs=1e-4)
    for k in range(5):
        for step in (-0.02, 0.02):
            assert mu(optimum + step * np.eye(5)[k]) > mu(optimum) + 1e-6


@pytest.mark.parametrize("run, density", [("on-policy", "pi"), ("off-policy", "ref"), ("off-policy, IS", "pi")])
def test_one_step_of_the_plane_follows_the_expected_gradient(run, density):
    """One step on many draws goes where the quadrature over ref or pi (on-policy, and by weights) says. Adam's first
    step is lr times the sign, so signs are compared, of the components that are not small."""
    start = torch.tensor([1.5, 0.5, math.log(0.6), math.log(0.6), 0.0], dtype=torch.float64, requires_grad=True)
    theta = bandit.minimise_squares(run, 0, replicas=1, steps=1, n_pairs=100_000, lr=1e-3)[0, 0]
    logps = bandit.gaussian(start).log_prob(bandit.GRID).reshape(-1)
    ref = bandit.REF_PLANE.log_prob(bandit.GRID).reshape(-1)
    draws = (ref if density == "ref" else logps.detach()).exp() * bandit.STEP**2
    delta = logps - ref
    expected = torch.autograd.grad(draws @ delta**2 - (draws @ delta) ** 2, start)[0]
    large = expected.abs() > 0.1 * expected.abs().max()
    assert large.sum() >= 2
    torch.testing.assert_close((theta - start.detach())[large], -1e-3 * expected.sign()[large], rtol=1e-3, atol=0)


def test_figure_1():
    """On-policy and IS end on a mode; off-policy between them, at the least-squares optimum; and the start matters."""
    rows = {(row["run"], row["start"], row["replica"]): row for row in bandit.figure_1(0)}
    assert len(rows) == 4 * 3 * 3 + 1
    near, middle, off = bandit.STARTS[0], bandit.STARTS[2], rows["off-policy, optimum", None, None]
    for k in range(3):
        for run in ("on-policy", "off-policy, IS", "off-policy, IS, log_eps=1"):
            row = rows[run, near, k]
            assert row["mean"] == pytest.approx([2, 0], abs=0.02) and row["far"] < 0.02
            assert row["kl"] == pytest.approx(0.692, abs=2e-3)
            assert np.allclose(row["covariance"], 0.36 * np.eye(2), atol=0.02)
        for start in bandit.STARTS:
            row = rows["off-policy", start, k]
            assert np.hypot(*row["mean"]) < 0.1 and row["kl"] > 2 and row["far"] == pytest.approx(off["far"], abs=0.03)
        assert rows["on-policy", middle, k]["kl"] == pytest.approx(1.139, abs=0.01)
        assert rows["off-policy, IS, log_eps=1", bandit.STARTS[1], k]["kl"] > 2


# ---------------------------------------------------------------------------------------------------------- the command
def run(*argv):
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "bandit.py", *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=100)


def test_command(tmp_path):
    out = tmp_path / "deep" / "out"
    done = run("--out", out, "--seed", 3)
    assert done.returncode == 0 and not done.stderr, done.stderr
    pictures = [f"figure{k}.{kind}" for k in (1, 2, 6) for kind in ("png", "svg")]
    assert sorted(path.name for path in out.iterdir()) == sorted(["bandit.json", *pictures])
    result = json.loads((out / "bandit.json").read_text())
    assert result["betas"] == list(COSINES) and result["seed"] == 3
    assert result["figure_2"] == bandit.figure_2(3)
    assert result["learned"] == bandit.learned(bandit.PATH_MARKS)
    assert result["learned_natural"] == bandit.learned([0, 60], natural=True)
    assert result["theorem_1"] == bandit.theorem_1(3)
    assert result["missing_support"] == [bandit.missing_support(bandit.optimum(0.2), k, 0.2) for k in range(4)]
    assert result["zero_crossing"] == bandit.zero_crossing()
    assert {row["loss"] for row in result["section_4_3"]} == set(bandit.LOSSES)
    tables = [table.splitlines() for table in done.stdout.strip().split("\n\n")]
    for beta, row in zip(COSINES, tables[0][-6:-1]):
        assert [float(x) for x in row.split()[:3]] == pytest.approx([beta, COSINES[beta], 1], abs=1e-4)
    titles = ["Figure 2", "Learned", "Theorem 1", "Theorem 1", "Section 4.3", "Figure 1", "done"]
    assert all(table[0].startswith(title) for table, title in zip(tables, titles, strict=True))
    assert max(len(line) for line in done.stdout.splitlines()) <= 132
    for k in (1, 2, 6):
        image = matplotlib.image.imread(out / f"figure{k}.png")
        assert image.shape[1] >= 1000 and 0.01 < (image[..., :3].min(-1) < 0.9).mean() < 0.6  # something is drawn on it


@pytest.mark.parametrize("argv, word", [
    (["--seed", "1.5"], "--seed"),
    (["--see", "1"], "--see"),
    (["--steps", "1"], "--steps"),
])
def test_bad_flags_are_refused(argv, word, capsys):
    with pytest.raises(SystemExit) as stopped:
        bandit.parse_args(argv)
    assert stopped.value.code == 2 and word in capsys.readouterr().err.splitlines()[-1]


def test_an_out_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    done = run("--out", tmp_path / "file" / "out")
    assert done.returncode == 1 and done.stderr.startswith("error: --out") and len(done.stderr.splitlines()) == 1
