"""Figures 1, 2 and 6 and Theorem 1 of IS-DAA where everything can be summed exactly: a bandit of 4 actions, a plane of Gaussians.

    mu = E_{y1, y2} [ w delta^2 / 2 ],    delta = log pi(y1)/ref(y1) - log pi(y2)/ref(y2)                        (Eq. 7, 9)

is the regularizer inside DPO and IPO. Drawn from pi, its gradient is twice that of KL(pi || ref); drawn from ref it is another
vector, unless w = pi(y1) pi(y2) / (ref(y1) ref(y2)), held constant in the gradient (Eq. 11, 12). "Mitigating Reward
Over-optimization in Direct Alignment Algorithms with Importance Sampling", NeurIPS 2025, sections 2.3, 3 and 4.3. The losses and
weights are those of train_pref.py, to the letter.

    python bandit.py --out out/bandit        # CPU, under a minute: bandit.json, figure1, figure2, figure6 (.png, .svg), tables

Units: log-probs, log-ratios and KL in nats; beta in units of the reward; everything in float64.  w, l: index of chosen, rejected.
"""

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F


# ---------------------------------------------------------------------------------------------------------- the losses
# As in train_pref.py, line by line: four vectors of log-probs (B,) in nats -> losses (B,), one a pair. The figures 1 and 2
# need importance_weights and ipo_loss at beta = inf, which is delta^2; section 4.3 trains with all of them.


# --- shared: losses (bandit, train_pref) ---
def dpo_loss(pc, pr, rc, rr, *, beta, label_smoothing=0.0):
    """-log sigmoid(beta delta): Rafailov et al. 2023, Eq. 7. `label_smoothing` eps is the chance that a label is flipped:
    -(1 - eps) log sigmoid(beta delta) - eps log sigmoid(-beta delta) (cDPO, Mitchell 2023)."""
    logits = beta * ((pc - rc) - (pr - rr))
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def ipo_loss(pc, pr, rc, rr, *, beta, chosen_lengths=None, rejected_lengths=None):
    """(delta - 1/(2 beta))^2: Azar et al. 2024, Eq. 17. With lengths each rho is averaged over its response's tokens, as TRL
    does. The paper's f(x) = (x - 1)^2 at x = beta' delta is this curve at beta = beta'/2, times beta'^2: the same optimum."""
    rho_w, rho_l = pc - rc, pr - rr
    if chosen_lengths is not None:
        rho_w, rho_l = rho_w / chosen_lengths, rho_l / rejected_lengths
    return (rho_w - rho_l - 1 / (2 * beta)) ** 2


def importance_weights(pc, pr, rc, rr, *, log_eps):
    """w = exp(min(rho_w + rho_l, 2 log_eps)) (B,), detached: the paper's Eq. 13 with its two misprints mended (README, Errata).
    Each response's log-ratio may spend log_eps nats, the pair twice that; inf switches the cap off."""
    return ((pc - rc) + (pr - rr)).detach().clamp(max=2 * log_eps).exp()


def rpo_loss(pc, pr, rc, rr, *, beta, eta, chosen_lengths=None):
    """dpo - beta eta log pi(y_w): Liu et al. 2024 (RPO), summed log-prob as its authors run it; with lengths its token mean."""
    nll = -pc if chosen_lengths is None else -pc / chosen_lengths
    return dpo_loss(pc, pr, rc, rr, beta=beta) + beta * eta * nll


def chi_po_logits(pc, pr, rc, rr, *, beta):
    """beta (phi(rho_w) - phi(rho_l)) with chi-PO's chi-squared plus KL link phi(rho) = exp(clip(rho, -88, 20)) + rho, as published.
    Like terms are subtracted first: beside exp(20) a float32 does not hold rho."""
    rho_w, rho_l = pc - rc, pr - rr
    return beta * ((rho_w.clamp(-88, 20).exp() - rho_l.clamp(-88, 20).exp()) + (rho_w - rho_l))


def chi_po_loss(pc, pr, rc, rr, *, beta, r_max):
    """-log sigmoid(clip(beta (phi(rho_w) - phi(rho_l)), -2 R, 2 R)): Huang et al. 2025, Algorithm 1, as published. A pair at
    the clip has no gradient: `chi/clipped` counts them."""
    return -F.logsigmoid(chi_po_logits(pc, pr, rc, rr, beta=beta).clamp(-2 * r_max, 2 * r_max))


def length_dpo_loss(pc, pr, rc, rr, *, beta, alpha, chosen_lengths, rejected_lengths):
    """-log sigmoid(beta delta + alpha (|y_w| - |y_l|)): Park et al. 2024. Plus: a longer winner needs less reward margin."""
    logits = beta * ((pc - rc) - (pr - rr)) + alpha * (chosen_lengths - rejected_lengths)
    return -F.logsigmoid(logits)
# --- end shared: losses ---


# ---------------------------------------------------------------------------------------------- the bandit: section 3.2
REF = torch.tensor([0.5, 0.1, 0.1, 0.3], dtype=torch.float64)
REWARD = torch.tensor([0.5, 1.0, 0.0, 0.0], dtype=torch.float64)
W, L = torch.cartesian_prod(torch.arange(4), torch.arange(4)).unbind(1)  # the 16 ordered pairs of actions
PAIR_PROBS = REF[W] * REF[L]  # (16,): two independent draws from ref
# Weight -> its log_eps. "none": offline as it is; "is": Theorem 1's; "misprint": the text below Eq. 11, y_l's ratio upside down.
WEIGHTS = {"none": None, "is": math.inf, "log_eps=2": 2.0, "log_eps=1": 1.0, "log_eps=0": 0.0, "misprint": math.inf}
TRAIN_BETA = 0.1  # of section 4.3
LOSSES = ("dpo", "is_dpo", "ipo", "is_ipo", "rpo", "chi_po", "length_dpo")
PATH_MARKS = [0, 1, 3, 10, 30, 100, 300, 1000, 3000, 10000]  # steps shown of gradient descent (figure 2)
TRAIN_MARKS = [0, 3, 10, 30, 100, 300, 1000]  # and of section 4.3


def optimum(beta):
    """Logits (4,) of pi* ~ ref exp(r / beta), the policy that maximises E r - beta KL (Eq. 4)."""
    return REF.log() + REWARD / beta


def pair_logps(logps):
    """logps (..., 4) of the actions -> the four arguments of every loss, each (..., 16)."""
    ref = REF.log().expand_as(logps)
    return logps[..., W], logps[..., L], ref[..., W], ref[..., L]


def weighted_squares(theta, weight):
    """w delta^2 / 2 of the 16 pairs, a function of the logits theta (4,): the terms of mu."""
    pc, pr, rc, rr = pair_logps(theta.log_softmax(-1))
    squares = ipo_loss(pc, pr, rc, rr, beta=math.inf) / 2
    if weight == "none":
        return squares
    if weight == "misprint":  # exchanging pi and ref of y_l turns its ratio upside down
        return importance_weights(pc, rr, rc, pr, log_eps=math.inf) * squares
    return importance_weights(pc, pr, rc, rr, log_eps=WEIGHTS[weight]) * squares


def pair_gradients(theta, weight):
    """Gradients (16, 4) of the pairs' terms: `PAIR_PROBS @` it is the exact gradient of mu, `shares @` it that of a data set."""
    return torch.autograd.functional.jacobian(lambda t: weighted_squares(t, weight), theta)


def kl_gradient(theta):
    """Gradient (4,) in theta of KL(pi || ref)."""
    theta = theta.detach().requires_grad_()
    logps = theta.log_softmax(-1)
    return torch.autograd.grad((logps.exp() * (logps - REF.log())).sum(), theta)[0]


def mu_cosine(theta, weight):
    """cos(grad KL, grad mu) in logit space, exact."""
    return F.cosine_similarity(kl_gradient(theta), PAIR_PROBS @ pair_gradients(theta, weight), dim=-1, eps=1e-30).item()


def zero_crossing(low=0.05, high=1.0):
    """The beta at which the unweighted cosine at pi* changes its sign, by bisection."""
    while high - low > 1e-12:
        middle = (low + high) / 2
        low, high = (middle, high) if mu_cosine(optimum(middle), "none") < 0 else (low, middle)
    return low


def figure_2(betas, seed, n_pairs=1000, sets=200):
    """Cosines at pi*, exact for every weight; the factor between the weighted gradient and the KL's; and what `sets` offline data
    sets of `n_pairs` pairs from ref give: mean, standard deviation, 10th and 90th percentile of the cosine over the sets."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.multinomial(PAIR_PROBS, sets * n_pairs, True, generator=generator).view(sets, n_pairs)
    shares = F.one_hot(draws, 16).sum(1).double() / n_pairs  # (sets, 16)
    rows = []
    for beta in betas:
        theta = optimum(beta)
        kl, row = kl_gradient(theta), {"beta": beta, "cosine": {}, "monte_carlo": {}}
        for weight in WEIGHTS:
            row["cosine"][weight] = mu_cosine(theta, weight)
        row["factor"] = ((PAIR_PROBS @ pair_gradients(theta, "is")).norm() / kl.norm()).item()
        for weight in ("none", "is", "log_eps=1"):
            cosines = F.cosine_similarity(shares @ pair_gradients(theta, weight), kl[None], dim=-1, eps=1e-30)
            p10, p90 = torch.quantile(cosines, torch.tensor([0.1, 0.9], dtype=torch.float64)).tolist()
            row["monte_carlo"][weight] = dict(mean=cosines.mean().item(), sd=cosines.std().item(), p10=p10, p90=p90)
        rows.append(row)
    return rows


def learned(betas, marks, natural=False):
    """Minimise KL(pi_theta || pi*) from ref, for all betas at once, by gradient descent at rate 1 or, `natural`, with
    the gradient over the Fisher matrix, at rate 1/2: then the distance to the optimum halves a step. -> rows at the marks."""
    target = torch.stack([optimum(beta).log_softmax(-1) for beta in betas])  # (betas, 4)
    theta, rows = REF.log().repeat(len(betas), 1), []
    for step in range(max(marks) + 1):
        logps = theta.log_softmax(-1)
        gap = logps - target
        kl = (logps.exp() * gap).sum(-1, keepdim=True)
        if step in marks:
            cosines = [mu_cosine(t, "none") if step else 1.0 for t in theta]  # at ref both gradients are 0; the limit is 1
            rows.append(dict(step=step, cosine=cosines, kl_to_optimum=kl[:, 0].tolist()))
        theta = theta - (gap / 2 if natural else logps.exp() * (gap - kl))
    return rows


# ----------------------------------------------------------------------------------------------------------- Theorem 1
def labelled_probs(probs):
    """(16,) of ordered pairs (w, l): two draws from probs (4,), labelled by Bradley-Terry on REWARD (Eq. 1)."""
    return 2 * probs[W] * probs[L] * (REWARD[W] - REWARD[L]).sigmoid()


def theorem_1(betas, seed, policies=100):
    """Largest relative deviations over random policies of full support: of the IS-DPO objective (Eq. 11) from the online one
    (Eq. 10), and of the weighted gradient from twice the KL gradient (Eq. 12 says "equals"; the factor is 2)."""
    generator = torch.Generator().manual_seed(seed)
    objective = gradient = 0.0
    for _ in range(policies):
        theta = 2 * torch.randn(4, generator=generator, dtype=torch.float64)
        logps = pair_logps(theta.log_softmax(-1))
        weights = importance_weights(*logps, log_eps=math.inf)
        for beta in betas:
            losses = dpo_loss(*logps, beta=beta)
            online, offline = labelled_probs(theta.softmax(-1)) @ losses, labelled_probs(REF) @ (weights * losses)
            objective = max(objective, abs(offline / online - 1).item())
        twice_kl = 2 * kl_gradient(theta)
        gradient = max(gradient, ((PAIR_PROBS @ pair_gradients(theta, "is") - twice_kl).norm() / twice_kl.norm()).item())
    return dict(policies=policies, objective=objective, gradient=gradient)


def missing_support(theta, missing, beta):
    """Theorem 1 without its assumption: the data come from d, ref restricted to the actions S other than `missing`, so importance
    sampling gives the sum over S x S only. -> online objective, its estimate, the bias, and pi(S)^2, the factor that Eq. 14
    leaves out: estimate and gradient are pi(S)^2 times those of pi restricted to S, and vanish as pi leaves S."""
    policy = theta.softmax(-1)
    d = REF.index_fill(0, torch.tensor([missing]), 0.0) / (1 - REF[missing])
    seen = (W != missing) & (L != missing)
    logps = pair_logps(theta.log_softmax(-1))
    weights = torch.zeros(16, dtype=torch.float64)
    weights[seen] = importance_weights(*(x[seen] for x in logps[:2]), d.log()[W[seen]], d.log()[L[seen]], log_eps=math.inf)
    losses = dpo_loss(*logps, beta=beta)
    online, estimate = (labelled_probs(policy) @ losses).item(), (labelled_probs(d) @ (weights * losses)).item()
    seen_mass = (1 - policy[missing]).item() ** 2
    return dict(missing=missing, online=online, estimate=estimate, bias=estimate - online, seen_mass=seen_mass)


# --------------------------------------------------------------------------------- section 4.3: the action nobody sampled
def bandit_loss(loss, logps):
    """Losses of pairs at TRAIN_BETA, with the defaults of train_pref.py; every response is one token long."""
    one = torch.ones_like(logps[0])
    if loss in ("is_dpo", "is_ipo"):
        return importance_weights(*logps, log_eps=1.0) * bandit_loss(loss[3:], logps)
    return {
        "dpo": lambda: dpo_loss(*logps, beta=TRAIN_BETA),
        "ipo": lambda: ipo_loss(*logps, beta=TRAIN_BETA),
        "rpo": lambda: rpo_loss(*logps, beta=TRAIN_BETA, eta=0.005),
        "chi_po": lambda: chi_po_loss(*logps, beta=TRAIN_BETA, r_max=10.0),
        "length_dpo": lambda: length_dpo_loss(*logps, beta=TRAIN_BETA, alpha=0.01, chosen_lengths=one, rejected_lengths=one),
    }[loss]()


def labelled_sample(missing, n_pairs, runs, seed):
    """Shares (runs, 16) of the labelled pairs in `runs` samples of `n_pairs`, given that no draw is the action `missing`."""
    generator = torch.Generator().manual_seed(seed)
    probs = labelled_probs(REF.index_fill(0, torch.tensor([missing]), 0.0))
    draws = torch.multinomial(probs, runs * n_pairs, True, generator=generator).view(runs, n_pairs)
    return F.one_hot(draws, 16).sum(1).double() / n_pairs


def train_bandit(loss, features, shares, marks):
    """Gradient descent on the samples' mean loss, from ref, for policies ref exp(features theta) with features (runs, 4, D).
    -> policies (marks, runs, 4). The rates give dpo and ipo the same first step, 1/4 a pair."""
    theta = torch.zeros(len(features), features.shape[2], dtype=torch.float64, requires_grad=True)
    rate, policies = (TRAIN_BETA / 4 if loss.endswith("ipo") else 0.5 / TRAIN_BETA), []
    for step in range(max(marks) + 1):
        logps = (REF.log() + (features @ theta[..., None])[..., 0]).log_softmax(-1)
        if step in marks:
            policies.append(logps.detach().exp())
        objective = (shares * bandit_loss(loss, pair_logps(logps))).sum()  # over independent runs
        theta = (theta - rate * torch.autograd.grad(objective, theta)[0]).detach().requires_grad_()
    return torch.stack(policies)


def section_4_3(seed, marks=TRAIN_MARKS, missing=2, n_pairs=10, runs=200):
    """Mass on an action that the samples lack, by kind of policy and loss, at the marks (steps): its mean over the samples, the
    shares of runs in which it is over 0.9 and over what ref gives it; KL to ref; and figure 6's ratio, the mean pi/ref of the
    sampled responses. `tabular`: a logit an action. `shared`: 2 parameters on random Gaussian features couple the actions."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(runs, 4, 2, generator=generator, dtype=torch.float64)
    features = torch.cat([torch.eye(4, dtype=torch.float64).repeat(runs, 1, 1), F.pad(shared, (0, 2))])  # both kinds at once
    shares, rows = labelled_sample(missing, n_pairs, runs, seed).repeat(2, 1), []
    for loss in LOSSES:
        policies = train_bandit(loss, features, shares, marks)
        ratios = policies / REF
        values = dict(mass=policies[..., missing], above_09=(policies[..., missing] > 0.9).double(),
                      risen=(policies[..., missing] > REF[missing]).double(),
                      ratio=(shares * (ratios[..., W] + ratios[..., L]) / 2).sum(-1),
                      kl=(policies * ratios.clamp(min=1e-300).log()).sum(-1))
        for kind, part in (("tabular", slice(0, runs)), ("shared", slice(runs, 2 * runs))):
            rows.append(dict(policy=kind, loss=loss, **{key: value[:, part].mean(1).tolist() for key, value in values.items()}))
    return sorted(rows, key=lambda row: row["policy"], reverse=True)


# --------------------------------------------------------------------------------------------- the plane: figure 1
MODES = torch.tensor([[-2.0, 0.0], [2.0, 0.0]], dtype=torch.float64)  # ref: half and half
SD = 0.6
STARTS = [(1.5, 0.5, 0.6), (1.0, 1.0, 1.0), (0.0, 0.0, 1.0)]  # mean x, mean y, sd; the first is figure 1's
RUNS = {"on-policy": None, "off-policy": None, "off-policy, IS": math.inf, "off-policy, IS, log_eps=1": 1.0}
GRID = torch.stack(torch.meshgrid(torch.arange(-16, 16.01, 0.08, dtype=torch.float64),
                                  torch.arange(-6, 6.01, 0.08, dtype=torch.float64), indexing="ij"), -1)  # the integrals' points
AREA = 0.08**2


def ref_logps(y):
    """Log-density (...) of the mixture at y (..., 2)."""
    return torch.logsumexp(-((y[..., None, :] - MODES) ** 2).sum(-1) / (2 * SD**2), -1) - math.log(4 * math.pi * SD**2)


def gaussian_logps(theta, y):
    """Log-density at y of the policy theta (..., 5) = mean, log a, log b, c: y = mean + (a e1, c e1 + b e2), e normal."""
    x, y, a, b, c = *(y - theta[..., :2]).unbind(-1), *theta[..., 2:].unbind(-1)
    e1 = x / a.exp()
    e2 = (y - c * e1) / b.exp()
    return -(e1**2 + e2**2) / 2 - a - b - math.log(2 * math.pi)


def gaussian_draws(theta, noise):
    """Draws (..., 2) of the policy theta (..., 5) from standard normal noise (..., 2)."""
    a, b, c = theta[..., 2:].unbind(-1)
    return theta[..., :2] + torch.stack([a.exp() * noise[..., 0], c * noise[..., 0] + b.exp() * noise[..., 1]], -1)


def minimise_squares(run, seed, replicas=3, steps=400, n_pairs=512, lr=0.05):
    """Minimise E[w delta^2 / 2] by Adam on fresh pairs, from the policy or from ref, for every start and replica at once.
    -> theta (starts, replicas, 5). The second moment's 0.95: the first gradients are huge, Adam must forget them."""
    generator = torch.Generator().manual_seed(seed)
    theta = torch.tensor([[x, y, math.log(sd), math.log(sd), 0.0] for x, y, sd in STARTS], dtype=torch.float64)
    theta = theta[:, None].repeat(1, replicas, 1).requires_grad_()
    optimizer = torch.optim.Adam([theta], lr=lr, betas=(0.9, 0.95))
    for step in range(steps):
        noise = torch.randn(2, n_pairs, 1, replicas, 2, generator=generator, dtype=torch.float64)
        if run == "on-policy":
            draws = gaussian_draws(theta.detach(), noise)
        else:
            draws = MODES[torch.randint(2, noise.shape[:-1], generator=generator)] + SD * noise
        (pc, pr), (rc, rr) = gaussian_logps(theta, draws), ref_logps(draws).expand(2, n_pairs, *theta.shape[:2])
        losses = ipo_loss(pc, pr, rc, rr, beta=math.inf) / 2
        if RUNS[run] is not None:
            losses = importance_weights(pc, pr, rc, rr, log_eps=RUNS[run]) * losses
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        optimizer.zero_grad()
        losses.mean(0).sum().backward()
        optimizer.step()
    return theta.detach()


def describe(theta):
    """Of theta (5,): mean, covariance, KL(policy || ref), the share of its mass over 3 SD from both modes; integrals on GRID."""
    logps, ref = gaussian_logps(theta, GRID), ref_logps(GRID)
    mass = logps.exp() * AREA
    far = ((GRID[..., None, :] - MODES) ** 2).sum(-1).amin(-1).sqrt() > 3 * SD
    a, b, c = theta[2].exp().item(), theta[3].exp().item(), theta[4].item()
    return dict(mean=theta[:2].tolist(), covariance=[[a * a, a * c], [a * c, b * b + c * c]], theta=theta.tolist(),
                kl=(mass * (logps - ref)).sum().item(), far=mass[far].sum().item())


def off_policy_optimum():
    """theta of the unweighted off-policy minimum, without a run: log pi is linear in the monomials up to degree 2, and mu is the
    variance of log pi - log ref under ref, so this is least squares: one minimum, whatever the start."""
    points, logps = GRID.reshape(-1, 2), ref_logps(GRID).reshape(-1)
    x, y = points.unbind(-1)
    monomials = torch.stack([torch.ones_like(x), x, y, x * x, x * y, y * y], -1)
    weighted = monomials * logps.exp()[:, None]
    _, g1, g2, h1, h12, h2 = torch.linalg.solve(monomials.T @ weighted, weighted.T @ logps)
    covariance = torch.stack([torch.stack([-2 * h1, -h12]), torch.stack([-h12, -2 * h2])]).inverse()
    a = covariance[0, 0].sqrt()
    c = covariance[0, 1] / a
    return torch.cat([covariance @ torch.stack([g1, g2]), torch.stack([a.log(), (covariance[1, 1] - c * c).log() / 2, c])])


def figure_1(seed):
    """-> a row for every start, run and replica (the same start on other draws), and one for the off-policy optimum."""
    rows = []
    for run in RUNS:
        for start, replicas in zip(STARTS, minimise_squares(run, seed)):
            rows += [dict(start=start, run=run, replica=k, **describe(theta)) for k, theta in enumerate(replicas)]
    return rows + [dict(start=None, run="off-policy, optimum", replica=None, **describe(off_policy_optimum()))]


# ------------------------------------------------------------------------------------------------------------ pictures
STYLES = ["-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3))]  # told apart without colour
COLOURS = ["black", "#0060a0", "#b04000", "#3a7d34", "#7a3b8f", "#606060"]
MARKERS = "osDv^x"


def look(k):
    return dict(color=COLOURS[k % 6], linestyle=STYLES[k % 6], marker=MARKERS[k % 6], markersize=4, linewidth=1.4)


def draw_figure_1(rows):
    """Top: the start of figure 1. Bottom: another one, from which the capped weights do not find a mode."""
    figure, axes = plt.subplots(2, 3, figsize=(10, 4.5), sharex=True, sharey=True, layout="constrained")
    x, y, density = GRID[..., 0].numpy(), GRID[..., 1].numpy(), ref_logps(GRID).exp().numpy()
    angle = torch.linspace(0, 2 * math.pi, 200, dtype=torch.float64)
    for line, start in zip(axes, STARTS):
        for ax, run in zip(line, ("on-policy", "off-policy", "off-policy, IS, log_eps=1")):
            row = next(r for r in rows if r["start"] == start and r["run"] == run)
            ax.contourf(x, y, density, levels=[0.01, 0.05, 0.1, 0.2, 0.3], cmap="Greys", alpha=0.6, extend="max")
            (m1, m2), (_, _, a, b, c) = row["mean"], row["theta"]
            for k, style in enumerate(("-", "--", ":"), 1):
                e1, e2 = k * angle.cos(), k * angle.sin()
                ax.plot(m1 + math.exp(a) * e1, m2 + c * e1 + math.exp(b) * e2, color="#0060a0", ls=style, label=f"policy, {k} sd")
            ax.plot(*start[:2], "x", color="#b04000", markersize=8, label="its mean at the start")
            ax.plot([], [], "s", color="grey", label="density of ref")
            ax.set_title(f"{run}\nKL {row['kl']:.2f} nats, {100 * row['far']:.0f}% of the mass far off", fontsize=10)
            ax.set(xlim=(-6, 6), ylim=(-2.5, 2.5), aspect="equal")
        line[0].set_ylabel(f"start ({start[0]:g}, {start[1]:g}), sd {start[2]:g}\n$y_2$")
    for ax in axes[1]:
        ax.set_xlabel("$y_1$")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=9, frameon=False)
    return figure


def draw_figure_2(rows, path, crossing):
    """Left: the cosine at the optimum over beta, exact lines and 10-90% of data sets. Right: along gradient descent."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.8), sharey=True, layout="constrained")
    betas = [row["beta"] for row in rows]
    fine = torch.logspace(math.log10(min(0.05, *betas)), math.log10(max(1.0, *betas)), 60, dtype=torch.float64).tolist()
    labels = {"is": "IS weights, uncapped or log_eps 1, 2", "none": "no weights",
              "log_eps=0": "IS weights, log_eps 0", "misprint": "weights as misprinted"}
    for k, (weight, label) in enumerate(labels.items()):
        left.plot(fine, [mu_cosine(optimum(beta), weight) for beta in fine], label=label, **look(k) | dict(marker=""))
    for k, weight in enumerate(("is", "none")):
        mean, p10, p90 = ([row["monte_carlo"][weight][key] for row in rows] for key in ("mean", "p10", "p90"))
        spread = [[max(0.0, m - p) for m, p in zip(mean, p10)], [max(0.0, p - m) for m, p in zip(mean, p90)]]
        left.errorbar(betas, mean, spread, color=COLOURS[k], fmt=MARKERS[k], capsize=3, fillstyle="none",
                      label=f"{'no' if weight == 'none' else 'IS'} weights, 1,000 pairs: 10-90%")
    left.axvline(crossing, color="grey", linewidth=0.6)
    left.text(crossing * 1.04, -0.16, f"0 at $\\beta$ = {crossing:.4f}", fontsize=8)
    left.set(xscale="log", xlabel="$\\beta$ (units of reward)", ylim=(-0.2, 1.08),
             ylabel="cosine with the gradient of KL($\\pi$ || ref)", title="at the optimum $\\pi^*$")
    left.set_xticks(betas, [f"{beta:g}" for beta in betas])
    left.set_xticks([], minor=True)
    for k, row in enumerate(rows):
        right.plot([p["step"] for p in path], [p["cosine"][k] for p in path], label=f"$\\beta$ = {row['beta']:g}", **look(k))
        right.plot(4 * path[-1]["step"], row["cosine"]["none"], **look(k) | dict(fillstyle="none", markersize=8))
    right.set_xscale("symlog", linthresh=1)
    right.set(xlabel="steps of gradient descent on KL($\\pi_\\theta$ || $\\pi^*$)",
              title="no weights, on the way (open markers: at $\\pi^*$)")
    for ax in (left, right):
        ax.axhline(0, color="grey", linewidth=0.6)
        ax.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)
    return figure


def draw_figure_6(rows):
    """The unsampled action's mass over steps, for policies with and without shared parameters, and the mean ratio of figure 6."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.9), layout="constrained")
    panels = [("tabular", "mass", "a logit for each action"), ("shared", "mass", "shared parameters"),
              ("shared", "ratio", "shared parameters")]
    for ax, (kind, what, title) in zip(axes, panels):
        for k, row in enumerate(r for r in rows if r["policy"] == kind and r["loss"] != "length_dpo"):
            ax.plot(TRAIN_MARKS, row[what], label=row["loss"], **look(k))
        ax.set_xscale("symlog", linthresh=1)
        ax.set(xlabel="gradient steps", title=title, ylabel="mean mass on the unsampled action")
        ax.axhline(row[what][0], color="grey", linewidth=0.8)
    axes[0].set_ylim(0, None)
    axes[1].set_ylim(0, None)
    axes[2].set_ylabel("mean ratio $\\pi$/ref of the sampled responses")
    axes[0].legend(fontsize=8)
    return figure


# ---------------------------------------------------------------------------------------------------- tables and files
NOTES = {
    "learned": """
  Why 0.84 at beta 0.05 after 1,000 steps, where the optimum has -0.05: KL(pi_theta || pi*) is down to 5e-04 nats, but pi* wants
  a2 at 2e-09 and gradient descent has it at 3e-05. The gradient of the KL in a logit is in proportion to the action's mass and no
  longer sees a2 and a3; that of the unweighted mu is in proportion to ref, sees their log-ratios, turns only as they arrive.""",
    "section_4_3": """
  Tabular: the statement that DPO raises the unsampled action does not hold. delta does not contain its logit, which stays where
  it was under dpo, ipo and their IS forms; its mass falls on average as the winners' logits rise, and IS only makes it fall less.
  Shared: it holds in part. The action rises in some runs only ("risen"); in those DPO often carries it past 0.9, IS-DPO seldom,
  for its weights vanish with the mass of the sampled responses. IS-DPO slows down; it does not stop.""",
    "figure_1": """
  Off-policy has one optimum, between the modes, whatever the start (its loss is least squares). On-policy depends on the start:
  from the middle it stays there. IS does as on-policy from a start near a mode; from further off it ends near the off-policy
  optimum if capped at log_eps 1, and depends on the draws if uncapped.""",
}


def report(result):
    """What a person reads on the screen."""
    row_of = lambda values, width: "".join(f"{value:{width}.4f}" for value in values)
    print("Figure 2: cos(grad KL, grad mu) at pi*, exact; |grad mu_IS| / |grad KL|; then 200 data sets of 1,000 pairs from ref")
    print("    beta     none       IS    cap 2    cap 1    cap 0 misprint       factor   none, mean +- sd     IS, mean +- sd")
    for row in result["figure_2"]:
        sets = "".join(f"{row['monte_carlo'][w]['mean']:9.4f} +- {row['monte_carlo'][w]['sd']:.4f}" for w in ("none", "is"))
        print(f"{row['beta']:8.4g}{row_of(row['cosine'].values(), 9)}{row['factor']:13.9f}{sets}")
    print(f"  Without weights it is negative below beta = {result['zero_crossing']:.5f}.")
    print("\nLearned: the unweighted cosine along gradient descent (rate 1) on KL(pi_theta || pi*), from ref")
    print("    step" + "".join(f"{f'beta {beta:g}':>12}" for beta in result["betas"]))
    for p in result["learned"]:
        print(f"{p['step']:8d}{row_of(p['cosine'], 12)}")
    p = result["learned_natural"][-1]
    print(f" natural{row_of(p['cosine'], 12)}   ({p['step']} natural gradient steps: converged){NOTES['learned']}")
    t = result["theorem_1"]
    print(f"\nTheorem 1: largest relative deviations over {t['policies']} random policies of full support and all betas")
    print(f"  IS-DPO objective from online DPO {t['objective']:.1e}; weighted gradient from 2 x grad KL {t['gradient']:.1e}")
    print("  Data that lack an action, pi = pi* at beta 0.2: importance sampling sums over the pairs it can hold, S x S")
    print("  missing   online estimate     bias  pi(S)^2")
    for m in result["missing_support"]:
        print(f"       a{m['missing']}{row_of((m[key] for key in ('online', 'estimate', 'bias', 'seen_mass')), 9)}")
    print("\nSection 4.3: mass on the unsampled action a2 over steps, 200 samples of 10 pairs without it, from ref, beta 0.1;")
    print("then, at the end: runs in which it is over 0.9, over ref's 0.1; mean pi/ref of the sampled responses; KL to ref")
    shown = TRAIN_MARKS[::2]
    print("  policy   loss      " + "".join(f"{f'step {step}':>10}" for step in shown) + "   > 0.9    risen   pi/ref       KL")
    for row in result["section_4_3"]:
        last = {key: row[key][-1] for key in ("above_09", "risen", "ratio", "kl")}
        print(f"  {row['policy']:8} {row['loss']:10}{row_of(row['mass'][::2], 10)}{last['above_09']:8.1%}{last['risen']:9.1%}"
              f"{last['ratio']:9.3f}{last['kl']:9.3f}")
    print(NOTES["section_4_3"].lstrip("\n"))
    print("\nFigure 1: three runs (other draws) from each start; far: mass over 3 sd from both modes")
    print("  start               run                          mean x, y  covariance xx, xy, yy      KL     far  KL of the others")
    for row in result["figure_1"]:
        if row["replica"]:  # the first stands for the three
            continue
        same = [r["kl"] for r in result["figure_1"] if (r["start"], r["run"]) == (row["start"], row["run"])]
        start = "any" if row["start"] is None else "({:g}, {:g}), sd {:g}".format(*row["start"])
        (xx, xy), (_, yy) = row["covariance"]
        values = "".join(f"{round(x, 3) + 0.0:7.3f}" for x in (*row["mean"], xx, xy, yy))  # + 0.0: no -0.000
        print(f"  {start:20}{row['run']:26}{values}{row['kl']:9.3f}{row['far']:8.1%}  {' '.join(f'{kl:.3f}' for kl in same[1:])}")
    print(NOTES["figure_1"].lstrip("\n"))


def replace_file(path, write):
    """write(temporary path), then rename: `path` is whole or as it was."""
    aside = path.with_name(f".{path.name}.tmp")
    write(aside)
    os.replace(aside, path)


def write_picture(figure, stem):
    """stem.png and stem.svg; the bytes depend on the figures only, not on the clock."""
    with plt.rc_context({"svg.hashsalt": stem.name}):
        replace_file(stem.with_suffix(".png"), lambda path: figure.savefig(path, format="png", dpi=150))
        replace_file(stem.with_suffix(".svg"), lambda path: figure.savefig(path, format="svg", metadata={"Date": None}))
    plt.close(figure)


def beta_value(text):
    value = float(text)
    if not 0.03 <= value <= 100:  # below, float64 no longer resolves the gradients at pi*: they shrink like exp(-1 / (2 beta))
        raise argparse.ArgumentTypeError(f"{text}: must be in [0.03, 100]")
    return value


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Figures 1, 2 and 6 and Theorem 1, exactly, on a bandit.", allow_abbrev=False)
    add = parser.add_argument
    add("--out", default="out/bandit", help="directory for bandit.json and the pictures (default: %(default)s)")
    add("--seed", type=int, default=0, help="seed of the sampled parts, >= 0; the exact ones have none (default: %(default)s)")
    add("--betas", type=beta_value, nargs="+", default=[0.05, 0.1, 0.2, 0.5, 1.0], metavar="BETA",
        help="KL strengths of figure 2 and Theorem 1, units of reward, in [0.03, 100] (default: 0.05 0.1 0.2 0.5 1)")
    args = parser.parse_args(argv)
    if args.seed < 0:
        parser.error(f"--seed {args.seed}: must be at least 0")
    args.betas = sorted(set(args.betas))
    return args


def main():
    args, began = parse_args(), time.perf_counter()
    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"error: --out {out}: {error.strerror}")
    result = dict(
        seed=args.seed,
        betas=args.betas,
        figure_2=figure_2(args.betas, args.seed),
        zero_crossing=zero_crossing(),
        learned=learned(args.betas, PATH_MARKS),
        learned_natural=learned(args.betas, [0, 60], natural=True),
        theorem_1=theorem_1(args.betas, args.seed),
        missing_support=[missing_support(optimum(0.2), missing, 0.2) for missing in range(4)],
        section_4_3=section_4_3(args.seed),
        figure_1=figure_1(args.seed),
    )
    report(result)
    replace_file(out / "bandit.json", lambda path: path.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n"))
    write_picture(draw_figure_1(result["figure_1"]), out / "figure1")
    write_picture(draw_figure_2(result["figure_2"], result["learned"], result["zero_crossing"]), out / "figure2")
    write_picture(draw_figure_6(result["section_4_3"]), out / "figure6")
    print(f"\ndone in {time.perf_counter() - began:.0f} s: {out}/bandit.json, figure1, figure2, figure6 (.png, .svg)")


if __name__ == "__main__":
    main()
