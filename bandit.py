"""The argument of IS-DAA where everything can be summed exactly: a bandit of 4 actions, and Gaussians on a plane.

Figures 1, 2 and 6 and Theorem 1 of "Mitigating Reward Over-optimization in Direct Alignment Algorithms with Importance
Sampling" (NeurIPS 2025; sections 2.3, 3 and 4.3), with the losses and weights of train_pref.py, to the letter.

    python bandit.py --out out/bandit     # 15 s on a CPU: tables; bandit.json; figure1, figure2, figure6 (.png, .svg)

Inside DPO and IPO works a regularizer on pairs of responses,

    mu = E_{y1, y2} [ w delta^2 / 2 ],    delta = log pi(y1)/ref(y1) - log pi(y2)/ref(y2)                    (Eq. 7, 9)

For pairs drawn from pi its gradient is twice that of KL(pi || ref). For pairs drawn from ref it is another vector,
unless w = pi(y1) pi(y2) / (ref(y1) ref(y2)), held constant in the gradient: Theorem 1 (Eq. 11, 12). Its premise is that
ref wrote both responses and covers pi. For pairs that others wrote (HH, UltraFeedback) the weight is a heuristic.

Errata: where the paper, its proofs and its released code disagree, these scripts do what stands first.

    Eq. 11      w is the product of both ratios, as in Theorem 1, Eq. 13 and the code. The text inverts that of y_l.
    Eq. 13      The clip is min(w, cap). Printed: max.
    the cap     2 log_eps for the pair, log_eps = 1.0: the code's clamp(max=2 * eps). Printed: "log eps = 1.0".
    Theorem 1   The weighted gradient is twice the KL's. Printed: "equals".
    Eq. 14      -pi(S)^2 times what is printed; S: the responses that the data can hold (`missing_support`).
    App. C      KL: the mean of log r + 1/r - 1 over y ~ pi, r = pi/ref. Printed: log r + r - 1; gives KL + chi-squared.
    IPO         (delta - 1/(2 beta))^2. Printed: (x - 1)^2 at x = beta' delta, which is beta'^2 times it at beta'/2.
    IS-DPO      w times the dpo loss. In the release's cli/train_is_dpo.py that line is commented out: it trains IS-IPO.

Taken from the release (github.com/mail-research/AIS-Sampling4DAAs), for Appendix C does not say it: 512 prompt tokens,
AdamW's epsilon 1e-5, no weight decay, the cosine's floor of 10%, eta 0.005, alpha 0.01. Not taken: its scripts
(scripts/train_IS/train_*.sh) give --batch_size x --gradient_accumulation_steps of 32 x 4 (dpo), 16 x 8 (is_dpo), 32 x 2
(rpo) and 16 x 4 (length_dpo), and 150, 50, 100 and 150 steps of warm-up, where Appendix C has 64 and 100 for all; they
clip gradients at 10, these scripts at 1.

Units: log-probs, log-ratios and KL in nats; beta in units of the reward; float64. w, l: index of chosen, rejected.
"""

import argparse
import json
import math
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal


# Four vectors of log-probs (B,) -> losses (B,), one a pair. ipo_loss at beta = inf is delta^2.
# --- shared: losses (bandit, train_pref) ---
def dpo_loss(pc, pr, rc, rr, *, beta, label_smoothing=0.0):
    """-log sigmoid(beta delta): Rafailov et al. 2023, Eq. 7. `label_smoothing` eps is the chance of a flipped label:
    -(1 - eps) log sigmoid(beta delta) - eps log sigmoid(-beta delta) (cDPO, Mitchell 2023)."""
    logits = beta * ((pc - rc) - (pr - rr))
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def ipo_loss(pc, pr, rc, rr, *, beta, chosen_lengths=None, rejected_lengths=None):
    """(delta - 1/(2 beta))^2: Azar et al. 2024, Eq. 17. With lengths each rho is averaged over its response's tokens,
    as TRL does. The paper's f(x) = (x - 1)^2 at x = beta' delta is this curve at beta = beta'/2, times beta'^2."""
    rho_w = pc - rc
    rho_l = pr - rr
    if chosen_lengths is not None:
        rho_w = rho_w / chosen_lengths
        rho_l = rho_l / rejected_lengths
    return (rho_w - rho_l - 1 / (2 * beta)) ** 2


def importance_weights(pc, pr, rc, rr, *, log_eps):
    """w = exp(min(rho_w + rho_l, 2 log_eps)) (B,), detached: the paper's Eq. 13, its misprints mended (listed in
    bandit.py). Each response's log-ratio may spend log_eps nats, the pair twice that; inf switches the cap off. rc and
    rr are the log-probs of whoever wrote the pair: the reference's, where nothing else is known."""
    return ((pc - rc) + (pr - rr)).detach().clamp(max=2 * log_eps).exp()


def rpo_loss(pc, pr, rc, rr, *, beta, eta, chosen_lengths=None):
    """dpo - beta eta log pi(y_w): Liu et al. 2024 (RPO), summed log-prob as its authors run it; with lengths its token
    mean."""
    nll = -pc
    if chosen_lengths is not None:
        nll = nll / chosen_lengths
    return dpo_loss(pc, pr, rc, rr, beta=beta) + beta * eta * nll


def chi_po_logits(pc, pr, rc, rr, *, beta):
    """beta (phi(rho_w) - phi(rho_l)), chi-PO's chi-squared plus KL link phi(rho) = exp(clip(rho, -88, 20)) + rho, as
    published. Like terms are subtracted first: beside exp(20) a float32 does not hold rho."""
    rho_w = pc - rc
    rho_l = pr - rr
    return beta * ((rho_w.clamp(-88, 20).exp() - rho_l.clamp(-88, 20).exp()) + (rho_w - rho_l))


def chi_po_loss(pc, pr, rc, rr, *, beta, r_max):
    """-log sigmoid(clip(beta (phi(rho_w) - phi(rho_l)), -2 R, 2 R)): Huang et al. 2025, Algorithm 1, as published. A
    pair at the clip has no gradient: `chi/clipped` counts them."""
    return -F.logsigmoid(chi_po_logits(pc, pr, rc, rr, beta=beta).clamp(-2 * r_max, 2 * r_max))


def length_dpo_loss(pc, pr, rc, rr, *, beta, alpha, chosen_lengths, rejected_lengths):
    """-log sigmoid(beta delta + alpha (|y_w| - |y_l|)): Park et al. 2024. A longer winner needs less reward margin."""
    logits = beta * ((pc - rc) - (pr - rr)) + alpha * (chosen_lengths - rejected_lengths)
    return -F.logsigmoid(logits)
# --- end shared: losses ---


# ------------------------------------------------------------------------------------ the bandit: section 3.2, figure 2
REF = torch.tensor([0.5, 0.1, 0.1, 0.3], dtype=torch.float64)
REWARD = torch.tensor([0.5, 1.0, 0.0, 0.0], dtype=torch.float64)
W, L = torch.cartesian_prod(torch.arange(4), torch.arange(4)).unbind(1)  # the 16 ordered pairs of actions
PAIR_PROBS = REF[W] * REF[L]  # (16,): two independent draws from ref
WEIGHTS = {  # pair_logps -> w
    "none": lambda *logps: 1.0,
    "is": partial(importance_weights, log_eps=math.inf),  # Theorem 1's
    **{f"log_eps={cap}": partial(importance_weights, log_eps=cap) for cap in (2, 1, 0)},
    "misprint": lambda pc, pr, rc, rr: importance_weights(pc, rr, rc, pr, log_eps=math.inf),  # y_l's ratio upside down
}
BETAS = [0.05, 0.1, 0.2, 0.5, 1.0]  # units of reward; below 0.03 float64 does not resolve the gradients at pi*
PATH_MARKS = [0, 1, 3, 10, 30, 100, 300, 1000, 3000, 10000]  # steps of gradient descent in the table


def optimum(beta):
    """Logits (4,) of pi* ~ ref exp(r / beta), the policy that maximises E r - beta KL (Eq. 4)."""
    return REF.log() + REWARD / beta


def pair_logps(logps):
    """logps (..., 4) of the actions -> the four arguments of every loss, each (..., 16)."""
    ref = REF.log().expand_as(logps)
    return logps[..., W], logps[..., L], ref[..., W], ref[..., L]


def pair_gradients(theta, weight):
    """Gradients (16, 4) in the logits theta (4,) of the pairs' w delta^2 / 2: `PAIR_PROBS @` them is that of mu, exact,
    `shares @` them that of a data set."""
    terms = lambda logps: WEIGHTS[weight](*logps) * ipo_loss(*logps, beta=math.inf) / 2
    return torch.autograd.functional.jacobian(lambda t: terms(pair_logps(t.log_softmax(-1))), theta)


def kl_gradient(theta):
    """Gradient (4,) in theta of KL(pi || ref)."""
    kl = lambda logps: (logps.exp() * (logps - REF.log())).sum()
    return torch.autograd.functional.jacobian(lambda t: kl(t.log_softmax(-1)), theta)


def mu_cosine(theta, weight):
    """cos(grad KL, grad mu) in logit space, exact."""
    return F.cosine_similarity(kl_gradient(theta), PAIR_PROBS @ pair_gradients(theta, weight), dim=-1, eps=1e-30).item()


def zero_crossing(low=0.05, high=1.0):
    """The beta at which the unweighted cosine at pi* changes its sign, by bisection."""
    while high - low > 1e-12:
        middle = (low + high) / 2
        low, high = (middle, high) if mu_cosine(optimum(middle), "none") < 0 else (low, middle)
    return low


def data_sets(probs, n_pairs, sets, seed):
    """Shares (sets, 16) of the ordered pairs in `sets` data sets of `n_pairs` drawn from probs (16,)."""
    draws = torch.multinomial(probs, sets * n_pairs, True, generator=torch.Generator().manual_seed(seed))
    return F.one_hot(draws.view(sets, n_pairs), 16).sum(1).double() / n_pairs


def figure_2(seed, betas=BETAS, n_pairs=1000, sets=200):
    """Cosines at pi*, exact for every weight; the factor between the weighted gradient and the KL's; and the cosines of
    `sets` offline data sets of `n_pairs` pairs from ref: mean, standard deviation, 10th and 90th percentile."""
    shares, rows = data_sets(PAIR_PROBS, n_pairs, sets, seed), []
    for beta in betas:
        theta = optimum(beta)
        kl, sampled = kl_gradient(theta), {}
        factor = (PAIR_PROBS @ pair_gradients(theta, "is")).norm() / kl.norm()
        for weight in ("none", "is", "log_eps=1"):
            cosines = F.cosine_similarity(shares @ pair_gradients(theta, weight), kl[None], dim=-1, eps=1e-30)
            p10, p90 = torch.quantile(cosines, torch.tensor([0.1, 0.9], dtype=torch.float64)).tolist()
            sampled[weight] = dict(mean=cosines.mean().item(), sd=cosines.std().item(), p10=p10, p90=p90)
        exact = {weight: mu_cosine(theta, weight) for weight in WEIGHTS}
        rows.append(dict(beta=beta, cosine=exact, monte_carlo=sampled, factor=factor.item()))
    return rows


def learned(marks, betas=BETAS, natural=False):
    """Minimise KL(pi_theta || pi*) from ref, for all betas at once, by gradient descent at rate 1 or, `natural`, with
    the gradient over the Fisher matrix, at rate 1/2: the distance to pi* halves a step. -> rows at the marks."""
    target = torch.stack([optimum(beta).log_softmax(-1) for beta in betas])  # (betas, 4)
    theta, rows = REF.log().repeat(len(betas), 1), []
    for step in range(max(marks) + 1):
        logps = theta.log_softmax(-1)
        gap = logps - target
        kl = (logps.exp() * gap).sum(-1, keepdim=True)
        if step in marks:
            cosines = [mu_cosine(t, "none") if step else 1.0 for t in theta]  # at ref both gradients are 0; limit: 1
            rows.append(dict(step=step, cosine=cosines, kl_to_optimum=kl[:, 0].tolist()))
        theta = theta - (gap / 2 if natural else logps.exp() * (gap - kl))
    return rows


# ----------------------------------------------------------------------------------------------------------- Theorem 1
def labelled_probs(probs):
    """(16,) of ordered pairs (w, l): two draws from probs (4,), labelled by Bradley-Terry on REWARD (Eq. 1)."""
    return 2 * probs[W] * probs[L] * (REWARD[W] - REWARD[L]).sigmoid()


def objectives(theta, data, beta):
    """The online DPO objective (Eq. 10) and its estimate, the IS-DPO objective (Eq. 11) on pairs from data (4,)."""
    logps = pair_logps(theta.log_softmax(-1))
    losses = dpo_loss(*logps, beta=beta)
    seen = (data[W] > 0) & (data[L] > 0)
    pc, pr, rc, rr = (x[seen] for x in (*logps[:2], data.log()[W], data.log()[L]))
    weights = importance_weights(pc, pr, rc, rr, log_eps=math.inf)
    online, estimate = labelled_probs(theta.softmax(-1)) @ losses, labelled_probs(data)[seen] @ (weights * losses[seen])
    return online.item(), estimate.item()


def theorem_1(seed, betas=BETAS, policies=100):
    """Largest relative deviations over random policies of full support: of the estimate from the online objective, on
    data from ref, and of the weighted gradient from twice the KL gradient (Eq. 12)."""
    generator = torch.Generator().manual_seed(seed)
    objective = gradient = 0.0
    for _ in range(policies):
        theta = 2 * torch.randn(4, generator=generator, dtype=torch.float64)
        for beta in betas:
            online, estimate = objectives(theta, REF, beta)
            objective = max(objective, abs(estimate / online - 1))
        kl = kl_gradient(theta)
        gradient = max(gradient, ((PAIR_PROBS @ pair_gradients(theta, "is") / 2 - kl).norm() / kl.norm()).item())
    return dict(policies=policies, objective=objective, gradient=gradient)


def missing_support(theta, missing, beta):
    """Theorem 1 without its premise: no pair holds the action `missing`, S are the others. Estimate and gradient are
    pi(S)^2, `seen_mass`, times those of pi restricted to S (Eq. 15; Eq. 14 lacks it), and vanish as pi leaves S."""
    data = REF * (torch.arange(4) != missing)
    online, estimate = objectives(theta, data / data.sum(), beta)
    seen_mass = (1 - theta.softmax(-1)[missing]).item() ** 2
    return dict(missing=missing, online=online, estimate=estimate, bias=estimate - online, seen_mass=seen_mass)


# --------------------------------------------------------------- section 4.3, figure 6: the action that nobody sampled
TRAIN_BETA = 0.1
TRAIN_MARKS = [0, 3, 10, 30, 100, 300, 1000]  # steps
LOSSES = {"dpo": dpo_loss, "is_dpo": dpo_loss, "ipo": ipo_loss, "is_ipo": ipo_loss, "rpo": partial(rpo_loss, eta=0.005),
          "chi_po": partial(chi_po_loss, r_max=10.0),
          "length_dpo": partial(length_dpo_loss, alpha=0.01, chosen_lengths=1.0, rejected_lengths=1.0)}


def bandit_loss(loss, logps):
    """Losses of pairs with the defaults of train_pref.py; every response is one token long."""
    losses = LOSSES[loss](*logps, beta=TRAIN_BETA)
    return importance_weights(*logps, log_eps=1.0) * losses if loss.startswith("is_") else losses


def train_bandit(loss, features, shares, marks):
    """Gradient descent on data sets' mean loss, from ref, for policies ref exp(features theta), features (runs, 4, D).
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
    """By kind of policy and loss, at the marks: mean mass on an action that the data lack; share of runs in which it is
    over 0.9, and over what ref gives it; figure 6's ratio, the mean pi/ref of the data's responses; KL to ref.
    `tabular`: a logit an action. `shared`: 2 parameters on random features couple the actions."""
    shared = torch.randn(runs, 4, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    features = torch.cat([torch.eye(4, dtype=torch.float64).repeat(runs, 1, 1), F.pad(shared, (0, 2))])  # both at once
    probs, rows = labelled_probs(REF * (torch.arange(4) != missing)), []
    shares = data_sets(probs, n_pairs, runs, seed).repeat(2, 1)
    for loss in LOSSES:
        policies = train_bandit(loss, features, shares, marks)
        mass, ratios = policies[..., missing], policies / REF
        values = dict(mass=mass, above_09=(mass > 0.9).double(), risen=(mass > REF[missing]).double(),
                      ratio=(shares * (ratios[..., W] + ratios[..., L]) / 2).sum(-1),
                      kl=(policies * ratios.clamp(min=1e-300).log()).sum(-1))
        for kind, part in (("tabular", slice(0, runs)), ("shared", slice(runs, None))):
            means = {key: value[:, part].mean(1).tolist() for key, value in values.items()}
            rows.append(dict(policy=kind, loss=loss, **means))
    return sorted(rows, key=lambda row: row["policy"], reverse=True)


# ------------------------------------------------------------------------------------------------- the plane: figure 1
MODES = torch.tensor([[-2.0, 0.0], [2.0, 0.0]], dtype=torch.float64)
SD = 0.6
EYE = torch.eye(2, dtype=torch.float64)
REF_PLANE = MixtureSameFamily(Categorical(EYE.sum(0)), MultivariateNormal(MODES, SD**2 * EYE))  # half and half
STARTS = [(1.5, 0.5, 0.6), (1.0, 1.0, 1.0), (0.0, 0.0, 1.0)]  # mean x, mean y, sd; the first is figure 1's
RUNS = {"on-policy": "none", "off-policy": "none", "off-policy, IS": "is", "off-policy, IS, log_eps=1": "log_eps=1"}
STEP = 0.08  # of the points of integrals, GRID (401, 151, 2)
AXES = [torch.arange(-end, end + 0.01, STEP, dtype=torch.float64) for end in (16, 6)]
GRID = torch.stack(torch.meshgrid(*AXES, indexing="ij"), -1)


def gaussian(theta):
    """The policy theta (..., 5) = mean, log a, log b, c: y = mean + (a e1, c e1 + b e2), e standard normal."""
    a, b, c = theta[..., 2].exp(), theta[..., 3].exp(), theta[..., 4]
    lower = torch.stack([a, torch.zeros_like(a), c, b], -1).unflatten(-1, (2, 2))
    return MultivariateNormal(theta[..., :2], scale_tril=lower, validate_args=False)


def minimise_squares(run, seed, replicas=3, steps=400, n_pairs=512, lr=0.05):
    """Minimise E[w delta^2 / 2] by Adam on fresh pairs, from the policy or from ref, all starts and replicas at once.
    -> theta (starts, replicas, 5). The second moment's 0.95: the first gradients are huge, Adam must forget them."""
    generator = torch.Generator().manual_seed(seed)
    theta = torch.tensor([[x, y, math.log(sd), math.log(sd), 0.0] for x, y, sd in STARTS], dtype=torch.float64)
    theta = theta[:, None].repeat(1, replicas, 1).requires_grad_()
    optimizer = torch.optim.Adam([theta], lr=lr, betas=(0.9, 0.95))
    for step in range(steps):
        policy = gaussian(theta)
        noise = torch.randn(2, n_pairs, 1, replicas, 2, generator=generator, dtype=torch.float64)
        if run == "on-policy":
            draws = (policy.loc + (policy.scale_tril @ noise[..., None])[..., 0]).detach()
        else:
            draws = MODES[torch.randint(2, noise.shape[:-1], generator=generator)] + SD * noise
        logps = *policy.log_prob(draws), *REF_PLANE.log_prob(draws).expand(2, n_pairs, *theta.shape[:2])
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        optimizer.zero_grad()
        losses = WEIGHTS[RUNS[run]](*logps) * ipo_loss(*logps, beta=math.inf) / 2
        losses.mean(0).sum().backward()
        optimizer.step()
    return theta.detach()


def describe(theta):
    """Of theta (5,): mean, covariance, KL(policy || ref), share of its mass over 3 SD from both modes; sums on GRID."""
    logps = gaussian(theta).log_prob(GRID)
    mass = logps.exp() * STEP**2
    kl = (mass * (logps - REF_PLANE.log_prob(GRID))).sum().item()
    far = mass[torch.cdist(GRID, MODES).amin(-1) > 3 * SD].sum().item()
    covariance = gaussian(theta).covariance_matrix.tolist()
    return dict(mean=theta[:2].tolist(), covariance=covariance, theta=theta.tolist(), kl=kl, far=far)


def off_policy_optimum():
    """theta of the unweighted off-policy minimum, without a run: log pi is linear in the monomials up to degree 2, and
    mu is the variance of log pi - log ref under ref, so this is least squares: one minimum, whatever the start."""
    x, y = GRID.reshape(-1, 2).unbind(-1)
    logps = REF_PLANE.log_prob(GRID).reshape(-1)
    monomials = torch.stack([torch.ones_like(x), x, y, x * x, x * y, y * y], -1)
    weighted = monomials * logps.exp()[:, None]
    _, g1, g2, h1, h12, h2 = torch.linalg.solve(monomials.T @ weighted, weighted.T @ logps)
    covariance = -torch.stack([2 * h1, h12, h12, 2 * h2]).view(2, 2).inverse()
    a, _, c, b = torch.linalg.cholesky(covariance).flatten()
    return torch.stack([*(covariance @ torch.stack([g1, g2])), a.log(), b.log(), c])


def figure_1(seed):
    """-> a row for every start, run and replica (the same start on other draws), and one for the off-policy optimum."""
    rows = [dict(start=start, run=run, replica=k, **describe(theta)) for run in RUNS
            for start, replicas in zip(STARTS, minimise_squares(run, seed)) for k, theta in enumerate(replicas)]
    return rows + [dict(start=None, run="off-policy, optimum", replica=None, **describe(off_policy_optimum()))]


# ------------------------------------------------------------------------------------------------- pictures and tables
# The same in evaluate.py.
LOOKS = {"dpo": ("#b04000", "s"), "is_dpo": ("#0060a0", "o"), "ipo": ("#d08a00", "v"), "is_ipo": ("#3a7d34", "^"),
         "chi_po": ("#7a3b8f", "D"), "rpo": ("#606060", "P"), "length_dpo": ("#8c6d46", "X"), "online": ("black", "h")}


def draw_figure_1(rows):
    """Top: the start of figure 1. Bottom: another one, from which the capped weights do not find a mode."""
    figure, axes = plt.subplots(2, 3, figsize=(10, 4.5), sharex=True, sharey=True, layout="constrained")
    for line, start in zip(axes, STARTS):
        for ax, run in zip(line, ("on-policy", "off-policy", "off-policy, IS, log_eps=1")):
            row = next(r for r in rows if r["start"] == start and r["run"] == run)
            density, logps = REF_PLANE.log_prob(GRID).exp(), gaussian(torch.tensor(row["theta"])).log_prob(GRID)
            ax.contourf(*AXES, density.T, [0.01, 0.05, 0.1, 0.2, 0.3], cmap="Greys", alpha=0.6, extend="max")
            levels = [logps.max().item() - sd**2 / 2 for sd in (3, 2, 1)]
            ax.contour(*AXES, logps.T, levels, colors=LOOKS["is_dpo"][0], linestyles=[":", "--", "-"])
            ax.plot(*start[:2], "x", color=LOOKS["dpo"][0], markersize=8)
            ax.set_title(f"{run}\nKL {row['kl']:.2f} nats, {100 * row['far']:.0f}% of the mass far off", fontsize=10)
            ax.set(xlim=(-6, 6), ylim=(-2.5, 2.5), aspect="equal")
        line[0].set_ylabel(f"start ({start[0]:g}, {start[1]:g}),\nsd {start[2]:g}")
    figure.supxlabel("policy at 1 (solid), 2 and 3 sd; cross: its mean at the start; grey: density of ref", fontsize=10)
    return figure


def draw_figure_2(rows, crossing):
    """Left: the cosine at the optimum over beta, exact lines and 10-90% of data sets. Right: along gradient descent."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True, layout="constrained")
    fine = torch.logspace(math.log10(BETAS[0]), math.log10(BETAS[-1]), 60, dtype=torch.float64).tolist()
    for weight, label, loss, style in (("is", "IS", "is_dpo", "-"), ("log_eps=0", "IS, log_eps 0", "is_dpo", ":"),
                                       ("misprint", "as misprinted", "rpo", "-."), ("none", "no weights", "dpo", "--")):
        color, marker = LOOKS[loss]
        left.plot(fine, [mu_cosine(optimum(beta), weight) for beta in fine], style, color=color, label=label)
        if weight in ("is", "none"):
            p10, mean, p90 = ([row["monte_carlo"][weight][key] for row in rows] for key in ("p10", "mean", "p90"))
            left.vlines(BETAS, p10, p90, color=color)
            left.plot(BETAS, mean, marker, color=color, fillstyle="none")
    left.axvline(crossing, color="grey", linewidth=0.6, label=f"$\\beta$ = {crossing:.4f}")
    left.set(xscale="log", xlabel="$\\beta$ (units of reward)", ylabel="cosine with the gradient of KL($\\pi$ || ref)",
             title="at the optimum $\\pi^*$ (bars: 10-90% of sets of 1,000 pairs)", ylim=(-0.2, 1.08))
    left.set_xticks(BETAS, BETAS)
    left.minorticks_off()
    path = learned({0} | {round(10 ** (k / 12)) for k in range(49)})
    for k, row in enumerate(rows):
        color = plt.cm.viridis(0.9 * k / len(rows))
        right.plot([p["step"] for p in path], [p["cosine"][k] for p in path], color=color)
        right.plot(3e4, row["cosine"]["none"], "osDv^"[k], color=color, fillstyle="none", label=f"$\\beta$ {BETAS[k]}")
    right.set_xscale("symlog", linthresh=1, linscale=0.3)
    right.set(xlabel="steps of gradient descent on KL($\\pi_\\theta$ || $\\pi^*$)",
              title="no weights, on the way (markers: at $\\pi^*$)")
    for ax in (left, right):
        ax.axhline(0, color="grey", linewidth=0.6)
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=5, columnspacing=1, fontsize=9, frameon=False)
    return figure


def draw_figure_6(rows):
    """The unsampled action's mass over steps, without and with shared parameters, and the mean ratio of figure 6."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 4.2), layout="constrained")
    titles = {"mass": "mass on the unsampled action", "ratio": "$\\pi$/ref of the sampled responses"}
    for ax, kind, key in zip(axes, ("tabular", "shared", "shared"), ("mass", "mass", "ratio")):
        for row in rows:
            if row["policy"] == kind and row["loss"] != "length_dpo":  # equal lengths: it is dpo
                color, marker = LOOKS[row["loss"]]
                style = ":" if row["loss"] in ("rpo", "chi_po") else "-"
                ax.plot(TRAIN_MARKS, row[key], style, color=color, marker=marker, label=row["loss"])
        ax.axhline(row[key][0], color="grey", linewidth=0.8)
        ax.set_xscale("symlog", linthresh=3, linscale=0.4)
        ax.set_xticks(TRAIN_MARKS, TRAIN_MARKS)
        ax.set(xlabel="gradient steps", title=f"{titles[key]}\n({kind} parameters)", xlim=(-0.5, 1500))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    return figure


def table(title, rows):
    """Print dicts of texts and numbers as columns under the title and their keys."""
    lines = [list(rows[0]), *([f"{x:.4g}" if isinstance(x, float) else str(x) for x in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    print(f"\n{title}")
    for line in lines:
        print("  " + "  ".join(cell.rjust(width) for cell, width in zip(line, widths)))


def report(result):
    """What a person reads on the screen."""
    table("Figure 2: cos(grad KL, grad mu) at pi*, exact; |grad mu_is| / |grad KL|; no weights on sets of 1,000 pairs",
          [{"beta": row["beta"], **row["cosine"], "factor": row["factor"], "mean": row["monte_carlo"]["none"]["mean"],
            "sd": row["monte_carlo"]["none"]["sd"]} for row in result["figure_2"]])
    print(f"  Without weights it is negative below beta = {result['zero_crossing']:.5f}.")
    table("Learned: the unweighted cosine over steps of gradient descent on KL(pi || pi*); last: natural, converged",
          [{"step": row["step"], **{f"beta {beta:g}": cosine for beta, cosine in zip(BETAS, row["cosine"])}}
           for row in (*result["learned"], result["learned_natural"][-1])])
    print("  Why 0.84 at beta 0.05 after 1,000 steps, not -0.05: pi* has a2 at 2e-09, descent at 3e-05. KL's gradient\n"
          "  in a logit is in proportion to the action's mass and no longer sees a2; mu's, in proportion to ref, does.")
    table("Theorem 1: largest relative deviations over random policies and betas", [result["theorem_1"]])
    table("Theorem 1 where data lack an action, pi = pi* at beta 0.2; seen_mass: pi(S)^2", result["missing_support"])
    table("Section 4.3: mass on the unsampled action a2 over steps, 200 samples of 10 pairs, beta 0.1; at the end: in\n"
          "how many runs it is over 0.9, over ref's 0.1; mean pi/ref of the sampled responses; KL to ref",
          [{"policy": row["policy"], "loss": row["loss"], **{f"step {s}": m for s, m in zip(TRAIN_MARKS, row["mass"])},
            **{key: row[key][-1] for key in ("above_09", "risen", "ratio", "kl")}} for row in result["section_4_3"]])
    table("Figure 1: three runs (other draws) from each start (x, y, sd); far: mass over 3 sd from both modes",
          [dict(start=row["start"], run=row["run"], x=row["mean"][0], y=row["mean"][1], var_x=row["covariance"][0][0],
                var_y=row["covariance"][1][1], kl=row["kl"], far=row["far"]) for row in result["figure_1"]])


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Figures 1, 2 and 6 and Theorem 1, exactly.", allow_abbrev=False)
    parser.add_argument("--out", type=Path, default="out/bandit", help="a directory (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampled parts (default: %(default)s)")
    return parser.parse_args(argv)


def main():
    args = parse_args()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"error: --out {args.out}: {error.strerror}")
    result = dict(seed=args.seed, betas=BETAS, figure_2=figure_2(args.seed), zero_crossing=zero_crossing(),
                  learned=learned(PATH_MARKS), learned_natural=learned([0, 60], natural=True),
                  theorem_1=theorem_1(args.seed),
                  missing_support=[missing_support(optimum(0.2), missing, 0.2) for missing in range(4)],
                  section_4_3=section_4_3(args.seed), figure_1=figure_1(args.seed))
    report(result)
    (args.out / "bandit.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    plt.switch_backend("agg")
    for number, figure in ((1, draw_figure_1(result["figure_1"])), (6, draw_figure_6(result["section_4_3"])),
                           (2, draw_figure_2(result["figure_2"], result["zero_crossing"]))):
        for kind in ("png", "svg"):
            figure.savefig(args.out / f"figure{number}.{kind}", dpi=150)
    print(f"\ndone: {args.out}/bandit.json, figure1, figure2, figure6 (.png, .svg)")


if __name__ == "__main__":
    main()
