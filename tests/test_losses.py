"""The losses of train_pref.py against formulas written out again in numpy, against TRL's own code, in limits, and Theorem 1.

The numpy oracles below are written from the papers' formulas, in float64. They see the same (already rounded) inputs as the
code under test, so what is compared is the arithmetic on them.
"""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import load_rows

import train_pref as tp

LOG_2 = math.log(2)


# --------------------------------------------------------------------------------------------------------- the oracle
def minus_log_sigmoid(x):
    return np.logaddexp(0.0, -x)


def oracle_weight(pc, pr, rc, rr, log_eps):
    """The paper's Eq. 13 with the released code's cap on the pair: the product of both ratios, at most exp(2 log_eps)."""
    return np.minimum(np.exp((pc + pr) - (rc + rr)), np.exp(2 * log_eps))


def oracle_dpo(pc, pr, rc, rr, beta, eps=0.0):
    z = beta * ((pc - pr) - (rc - rr))
    return (1 - eps) * minus_log_sigmoid(z) + eps * minus_log_sigmoid(-z)


def oracle_ipo(pc, pr, rc, rr, beta, lw=1.0, ll=1.0):
    return ((pc - rc) / lw - (pr - rr) / ll - 0.5 / beta) ** 2


def oracle_rpo(pc, pr, rc, rr, beta, eta, lw=1.0):
    return oracle_dpo(pc, pr, rc, rr, beta) - beta * eta * pc / lw


def phi(rho):
    return np.exp(np.minimum(np.maximum(rho, -88.0), 20.0)) + rho


def oracle_chi_po(pc, pr, rc, rr, beta, r_max):
    link = lambda rho: np.exp(np.minimum(np.maximum(rho, -88.0), 20.0))
    z = beta * (link(pc - rc) - link(pr - rr) + (pc - pr) - (rc - rr))  # beside exp(20) rho would lose nine digits
    return minus_log_sigmoid(np.minimum(np.maximum(z, -2 * r_max), 2 * r_max))


def oracle_length_dpo(pc, pr, rc, rr, beta, alpha, lw, ll):
    return minus_log_sigmoid(beta * ((pc - pr) - (rc - rr)) + alpha * lw - alpha * ll)


# Flags of a case -> its loss without the weight, as a function of the four log-probs and the two lengths.
CASES = {
    "--loss dpo --beta 0.1": lambda a, lw, ll: oracle_dpo(*a, 0.1),
    "--loss dpo --beta 0.05 --label_smoothing 0.2": lambda a, lw, ll: oracle_dpo(*a, 0.05, 0.2),
    "--loss ipo --beta 0.1": lambda a, lw, ll: oracle_ipo(*a, 0.1),
    "--loss ipo --beta 0.01 --length_average": lambda a, lw, ll: oracle_ipo(*a, 0.01, lw, ll),
    "--loss is_dpo --beta 0.1": lambda a, lw, ll: oracle_dpo(*a, 0.1),
    "--loss is_dpo --beta 0.1 --log_eps 0.25 --label_smoothing 0.1": lambda a, lw, ll: oracle_dpo(*a, 0.1, 0.1),
    "--loss is_dpo --beta 0.1 --log_eps inf": lambda a, lw, ll: oracle_dpo(*a, 0.1),
    "--loss is_ipo --beta 0.05": lambda a, lw, ll: oracle_ipo(*a, 0.05),
    "--loss is_ipo --beta 0.05 --log_eps inf": lambda a, lw, ll: oracle_ipo(*a, 0.05),
    "--loss is_ipo --beta 0.05 --log_eps 2 --length_average": lambda a, lw, ll: oracle_ipo(*a, 0.05, lw, ll),
    "--loss rpo --beta 0.1": lambda a, lw, ll: oracle_rpo(*a, 0.1, 0.005),
    "--loss rpo --beta 0.1 --eta 0.5 --length_average": lambda a, lw, ll: oracle_rpo(*a, 0.1, 0.5, lw),
    "--loss chi_po --beta 0.05": lambda a, lw, ll: oracle_chi_po(*a, 0.05, 10.0),
    "--loss chi_po --beta 0.1 --r_max 1.5": lambda a, lw, ll: oracle_chi_po(*a, 0.1, 1.5),
    "--loss length_dpo --beta 0.1": lambda a, lw, ll: oracle_length_dpo(*a, 0.1, 0.01, lw, ll),
    "--loss length_dpo --beta 0.1 --alpha 0.05": lambda a, lw, ll: oracle_length_dpo(*a, 0.1, 0.05, lw, ll),
}


def oracle(flags, logps, lw, ll):
    """-> losses before the weight, weights (B,), float64."""
    logps = [np.asarray(x, np.float64) for x in logps]
    args = tp.parse_args(flags.split())
    weights = oracle_weight(*logps, args.log_eps) if args.loss.startswith("is_") else np.ones_like(logps[0])
    return CASES[flags](logps, np.asarray(lw, np.float64), np.asarray(ll, np.float64)), weights


def make_logps(n, dtype, seed=0, largest=60.0):
    """Realistic: references of -20 to -400 nats, log-ratios of either sign from 1e-6 to `largest` nats, log-uniform."""
    rng = np.random.default_rng(seed)
    rc, rr = -rng.uniform(20, 400, (2, n))
    rho_w, rho_l = 10 ** rng.uniform(-6, math.log10(largest), (2, n)) * rng.choice([-1, 1], (2, n))
    logps = [torch.tensor(x, dtype=dtype) for x in (rc + rho_w, rr + rho_l, rc, rr)]
    lengths = [torch.tensor(rng.integers(1, 128, n), dtype=dtype) for _ in range(2)]
    return logps, lengths


# ---------------------------------------------------------------------------------------------- values and gradients
def test_cases_cover_every_loss():
    assert {flags.split()[1] for flags in CASES} == set(tp.LOSS_FLAGS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("flags", CASES)
def test_values(flags, dtype):
    # exp of a log-ratio of 60 + 60 nats leaves float32: without a cap, as much as float32 holds
    largest = 40.0 if "inf" in flags and dtype == torch.float32 else 60.0
    logps, (lw, ll) = make_logps(500, dtype, largest=largest)
    losses, weights = tp.preference_loss(tp.parse_args(flags.split()), *logps, lw, ll)
    base, expected_weights = oracle(flags, logps, lw, ll)
    assert not weights.requires_grad
    assert losses.dtype == weights.dtype == dtype and losses.shape == weights.shape == (500,)
    # float32: the log-ratios keep the rounding of a subtraction near 60 (4e-6 nats), and exp makes that relative
    rtol, atol = (1e-12, 1e-12) if dtype == torch.float64 else (2e-5, 1e-6)
    np.testing.assert_allclose(weights.numpy(), expected_weights, rtol=rtol, atol=0)
    if "chi_po" in flags:  # differences of exponentials up to exp(20)
        rtol = 1e-9 if dtype == torch.float64 else 1e-3
    np.testing.assert_allclose((weights * losses).numpy(), expected_weights * base, rtol=rtol, atol=atol)


@pytest.mark.parametrize("flags", CASES)
def test_gradients(flags):
    """Autograd against central differences of the numpy oracle, the weight held fixed: it is detached."""
    logps, (lw, ll) = make_logps(100, torch.float64, seed=1, largest=4.0)
    logps = [x.requires_grad_() for x in logps]
    losses, weights = tp.preference_loss(tp.parse_args(flags.split()), *logps, lw, ll)
    grads = torch.autograd.grad((weights * losses).sum(), logps)
    values = [x.detach().numpy() for x in logps]
    _, weights = oracle(flags, values, lw, ll)
    step = 1e-4
    for k, grad in enumerate(grads):
        up, down = ([v + s * step * (j == k) for j, v in enumerate(values)] for s in (1, -1))
        slope = weights * (oracle(flags, up, lw, ll)[0] - oracle(flags, down, lw, ll)[0]) / (2 * step)
        np.testing.assert_allclose(grad.numpy(), slope, rtol=2e-6, atol=2e-8)


@pytest.mark.parametrize("flags", [flags for flags in CASES if "is_" not in flags])
def test_gradcheck(flags):
    logps, lengths = make_logps(20, torch.float64, seed=2, largest=4.0)
    args = tp.parse_args(flags.split())
    assert torch.autograd.gradcheck(lambda *x: tp.preference_loss(args, *x, *lengths)[0], [x.requires_grad_() for x in logps])


@pytest.mark.parametrize("base", ["dpo", "ipo"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_weighted_gradient_is_weight_times_gradient(base, dtype):
    logps, lengths = make_logps(200, dtype, seed=3)
    logps = [x.requires_grad_() for x in logps]
    grads = {}
    for loss in (base, f"is_{base}"):
        losses, weights = tp.preference_loss(tp.parse_args(["--loss", loss]), *logps, *lengths)
        grads[loss] = torch.autograd.grad((weights * losses).sum(), logps)
    assert weights.std() > 0 and not weights.requires_grad
    for plain, weighted in zip(grads[base], grads[f"is_{base}"]):
        torch.testing.assert_close(weighted, weights * plain, rtol=1e-6, atol=0)


def test_formulas_by_hand():
    """Numbers worked out on paper: rho_w = 2, rho_l = -1, delta = 3, beta = 0.1; lengths 4 and 2."""
    pc, pr, rc, rr = (torch.tensor([x], dtype=torch.float64) for x in (-10.0, -21.0, -12.0, -20.0))
    lw, ll = (torch.tensor([x], dtype=torch.float64) for x in (4.0, 2.0))

    def value(flags):
        losses, weights = tp.preference_loss(tp.parse_args(["--beta", "0.1", *flags.split()]), pc, pr, rc, rr, lw, ll)
        return (weights * losses).item()

    dpo = math.log(1 + math.exp(-0.3))
    assert value("--loss dpo") == pytest.approx(dpo, rel=1e-12)
    assert value("--loss dpo --label_smoothing 0.25") == pytest.approx(dpo + 0.25 * 0.3, rel=1e-12)  # -log s(-z) = -log s(z) + z
    assert value("--loss ipo") == pytest.approx((3 - 5) ** 2, rel=1e-12)
    assert value("--loss ipo --length_average") == pytest.approx((0.5 + 0.5 - 5) ** 2, rel=1e-12)
    assert value("--loss is_dpo") == pytest.approx(math.e * dpo, rel=1e-12)  # rho_w + rho_l = 1, under the cap of 2
    assert value("--loss is_ipo --log_eps 0.25") == pytest.approx(math.exp(0.5) * 4, rel=1e-12)
    assert value("--loss rpo") == pytest.approx(dpo + 0.1 * 0.005 * 10, rel=1e-12)
    assert value("--loss rpo --length_average") == pytest.approx(dpo + 0.1 * 0.005 * 2.5, rel=1e-12)
    logit = 0.1 * (math.exp(2) + 2 - math.exp(-1) + 1)
    assert value("--loss chi_po") == pytest.approx(math.log(1 + math.exp(-logit)), rel=1e-12)
    assert value("--loss length_dpo") == pytest.approx(math.log(1 + math.exp(-0.3 - 0.01 * 2)), rel=1e-12)


def test_chi_po_keeps_the_log_ratio_beside_a_large_exponential():
    """Where both log-ratios pass 20 the exponentials cancel and what is left is beta delta, also in float32."""
    pc, pr, zero = torch.tensor([40.0]), torch.tensor([30.0]), torch.zeros(1)
    loss = tp.chi_po_loss(pc, pr, zero, zero, beta=0.05, r_max=10.0).item()
    assert loss == pytest.approx(float(minus_log_sigmoid(0.05 * 10)), rel=1e-6)


def test_no_overflow_at_extreme_log_ratios():
    """A pair that is thousands of nats off still has a finite loss, weight and gradient: only ever the cap or 0."""
    rho = torch.tensor([5e3, -5e3, 5e3, -5e3])
    ref = torch.full((4,), -100.0)
    logps = [(ref + rho).requires_grad_(), (ref - rho.roll(1)).requires_grad_(), ref, ref]
    lengths = torch.ones(4), torch.ones(4)
    for loss in tp.LOSS_FLAGS:
        losses, weights = tp.preference_loss(tp.parse_args(["--loss", loss]), *logps, *lengths)
        grads = torch.autograd.grad((weights * losses).sum(), logps[:2])
        assert all(x.isfinite().all() for x in (losses, weights, *grads)), loss


# ---------------------------------------------------------------------------------------------------------------- TRL
@pytest.fixture(scope="module")
def trl_setup(tiny_llama, tmp_path_factory):
    """A real TRL DPOTrainer on a tiny random Llama, its reference another one, and six pairs of text."""
    pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    tmp = tmp_path_factory.mktemp("trl")
    policy_dir, ref_dir = tiny_llama(tmp / "policy", seed=1), tiny_llama(tmp / "ref", seed=1)
    ref = AutoModelForCausalLM.from_pretrained(ref_dir)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():  # near the policy: log-ratios of some nats, as in training
        for param in ref.parameters():
            param.add_(0.02 * torch.randn(param.shape, generator=generator))
    ref.save_pretrained(ref_dir)
    rows = [dict(prompt="abc " * n + "tl;dr:", chosen=" yes" * (7 - n), rejected=" no" * n + "!") for n in range(1, 7)]
    config = DPOConfig(output_dir=str(tmp / "out"), per_device_train_batch_size=6, beta=0.1, bf16=False, report_to=[],
                       use_cpu=True, gradient_checkpointing=False, disable_dropout=True)
    trainer = DPOTrainer(model=AutoModelForCausalLM.from_pretrained(policy_dir), ref_model=ref, args=config,
                         train_dataset=Dataset.from_list(rows), processing_class=AutoTokenizer.from_pretrained(policy_dir))
    return SimpleNamespace(trainer=trainer, rows=rows, policy_dir=policy_dir, ref_dir=ref_dir, tmp=tmp)


def trl_loss(trainer, types, weights, beta, label_smoothing, logps, lengths):
    """The loss that TRL's own code gives for these log-probs: its forward is replaced by one that returns them, spread over
    as many tokens as `lengths` says (after a prompt of one token), and nothing else of the trainer is."""
    (pc, pr, rc, rr), (lw, ll) = logps, lengths
    lengths = torch.cat([lw, ll]).long()
    mask = torch.arange(int(lengths.max()) + 1)[None] <= lengths[:, None]
    completion_mask = mask.long()
    completion_mask[:, 0] = 0
    per_token = torch.cat([pc, pr])[:, None] * completion_mask[:, 1:] / lengths[:, None].to(pc.dtype)
    zeros = torch.zeros_like(per_token)
    outputs = SimpleNamespace(log_probs=per_token, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    inputs = dict(input_ids=completion_mask, attention_mask=mask.long(), completion_mask=completion_mask, ref_chosen_logps=rc,
                  ref_rejected_logps=rr)
    settings = dict(loss_types=types, loss_weights=weights, beta=beta, label_smoothing=label_smoothing, precompute_ref_logps=True)
    before = {name: getattr(trainer, name) for name in settings}
    vars(trainer).update(settings)
    try:
        return trainer._compute_loss(lambda **kwargs: outputs, inputs, False)
    finally:
        vars(trainer).update(before)


def test_a_weight_at_the_cap_counts_as_capped():
    """log_eps 0 caps the weight at 1, which is where it stands before the first step."""
    args, logps = tp.parse_args(["--log_eps", "0"]), make_logps(8, torch.float32, seed=1)[0][0]
    logps, lengths = torch.stack([logps, logps - 1], 1), torch.ones(8, 2)
    assert tp.preference_metrics(args, logps, logps, lengths)["weights/capped"] == 1


def ours(flags, logps, lengths):
    losses, weights = tp.preference_loss(tp.parse_args(flags.split()), *logps, *lengths)
    return weights * losses


@pytest.mark.parametrize("beta", [0.01, 0.1, 0.5])
def test_trl_formulas(trl_setup, beta):
    logps, lengths = make_logps(64, torch.float64, seed=4)
    for kind, flags in (("sigmoid", "--loss dpo"), ("ipo", "--loss ipo --length_average")):  # TRL's ipo averages over tokens
        expected = trl_loss(trl_setup.trainer, [kind], [1.0], beta, 0.0, logps, lengths)
        torch.testing.assert_close(ours(f"{flags} --beta {beta}", logps, lengths).mean(), expected, rtol=1e-10, atol=0)


def test_trl_label_smoothing(trl_setup):
    """TRL has cDPO's formula in 'aot' (whose sorting does nothing to a batch of one pair). Its 'robust' is another loss: with
    A = -log s(z), B = -log s(-z) and e the smoothing, cDPO is (1-e) A + e B, robust ((1-e) A - e B) / (1 - 2e)."""
    logps, lengths = make_logps(40, torch.float64, seed=5)
    beta, e = 0.05, 0.2
    cdpo = ours(f"--loss dpo --beta {beta} --label_smoothing {e}", logps, lengths)
    clean = ours(f"--loss dpo --beta {beta}", logps, lengths)
    for i in range(40):
        one, one_lengths = [x[i : i + 1] for x in logps], [x[i : i + 1] for x in lengths]
        aot, robust = (trl_loss(trl_setup.trainer, [kind], [1.0], beta, e, one, one_lengths) for kind in ("aot", "robust"))
        torch.testing.assert_close(cdpo[i], aot, rtol=1e-10, atol=0)
        # so that cDPO + (1 - 2e) robust = 2 (1-e) A
        torch.testing.assert_close(cdpo[i] + (1 - 2 * e) * robust, 2 * (1 - e) * clean[i], rtol=1e-10, atol=1e-12)


def test_trl_rpo(trl_setup):
    """TRL writes RPO as sigmoid + c * sft, the SFT part averaged over all tokens of the batch. Ours averages each response
    (or sums it), so the formulas meet where a batch holds one pair: c = beta eta there."""
    logps, lengths = make_logps(20, torch.float64, seed=6)
    beta, eta = 0.1, 0.7
    losses = ours(f"--loss rpo --beta {beta} --eta {eta} --length_average", logps, lengths)
    for i in range(20):
        one, one_lengths = [x[i : i + 1] for x in logps], [x[i : i + 1] for x in lengths]
        expected = trl_loss(trl_setup.trainer, ["sigmoid", "sft"], [1.0, beta * eta], beta, 0.0, one, one_lengths)
        torch.testing.assert_close(losses[i], expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("shared_prompt", [True, False], ids=["shared", "plain"])
@pytest.mark.parametrize("trl_type, flags", [("sigmoid", "--loss dpo"), ("ipo", "--loss ipo --length_average")])
def test_trl_end_to_end(trl_setup, trl_type, flags, shared_prompt, process_group):
    """The same text, policy and reference through TRL's tokenization, collator, forward and loss, and through ours: equal ids,
    loss and gradient of every parameter. float32."""
    trainer, setup = trl_setup.trainer, trl_setup
    args = tp.parse_args([*flags.split(), "--beta", "0.1"])
    # TRL
    examples = [trainer.train_dataset[i] for i in range(len(setup.rows))]
    trainer.loss_types, trainer.loss_weights = [trl_type], [1.0]
    trainer.model.zero_grad()
    trl = trainer.compute_loss(trainer.model, trainer.data_collator(examples))
    trl.backward()
    # Ours
    data = setup.tmp / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in setup.rows))
    tokenizer = tp.load_tokenizer(setup.policy_dir)
    rows, _ = load_rows(tp, data, tokenizer, 272, 128, 96)
    assert rows.index.tolist() == list(range(6))
    pairs = list(rows)
    for pair, example in zip(pairs, examples):
        assert list(pair) == [list(example[f"{part}_ids"]) for part in ("prompt", "chosen", "rejected")]
    policy, ref = (tp.load_weights(tp.build_model(lambda: tp.Llama(tp.read_config(d), "torch"), "cpu", "fp32"), d)
                   for d in (setup.policy_dir, setup.ref_dir))
    batch = tp.collate_pairs(pairs, shared_prompt, "cpu")
    logps = policy(**batch)[0].view(-1, 2)
    with torch.no_grad():
        ref_logps = ref(**batch)[0].view(-1, 2)
    lengths = torch.tensor([[len(p.chosen), len(p.rejected)] for p in pairs], dtype=torch.float32)
    loss = tp.preference_loss(args, *logps.unbind(1), *ref_logps.unbind(1), *lengths.unbind(1))[0].mean()
    loss.backward()
    assert (logps - ref_logps).abs().mean() > 0.1 and abs(loss.item() - LOG_2) > 1e-3  # there is something to compare
    assert loss.item() == pytest.approx(trl.item(), rel=1e-5)
    theirs = dict(trainer.model.named_parameters())
    assert theirs.keys() == dict(policy.named_parameters()).keys()
    for name, param in policy.named_parameters():
        difference = (param.grad - theirs[name].grad).norm() / theirs[name].grad.norm()
        assert difference < 1e-4, (name, difference)


# ------------------------------------------------------------------------------------------------------------- limits
def at_reference(dtype, n=50):
    (_, _, rc, rr), lengths = make_logps(n, dtype, seed=7)
    return [rc.clone(), rr.clone(), rc, rr], lengths


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_policy_equal_to_reference(dtype):
    logps, lengths = at_reference(dtype)
    log_2 = torch.tensor(2.0, dtype=dtype).log()
    ulp = torch.finfo(dtype).eps
    for flags in ("--loss dpo", "--loss dpo --label_smoothing 0.3", "--loss is_dpo", "--loss is_dpo --log_eps inf",
                  "--loss chi_po"):
        losses, weights = tp.preference_loss(tp.parse_args(flags.split()), *logps, *lengths)
        assert (weights == 1).all()
        assert ((losses - log_2).abs() <= ulp).all(), flags
    for loss in ("ipo", "is_ipo"):
        losses, weights = tp.preference_loss(tp.parse_args(["--loss", loss, "--beta", "0.1"]), *logps, *lengths)
        assert (weights == 1).all() and torch.allclose(losses, torch.tensor(25.0, dtype=dtype))


@pytest.mark.parametrize("base", ["dpo", "ipo"])
def test_weights_forced_to_one(base):
    """Where rho_w = -rho_l the product of the ratios is 1: the weighted loss is the plain one. (Dyadic numbers: exact.)"""
    rho = torch.arange(-32, 33) / 4.0
    rc, rr = torch.full_like(rho, -64.0), torch.full_like(rho, -128.0)
    args = rc + rho, rr - rho, rc, rr
    lengths = torch.ones_like(rho), torch.ones_like(rho)
    plain = tp.preference_loss(tp.parse_args(["--loss", base]), *args, *lengths)[0]
    losses, weights = tp.preference_loss(tp.parse_args(["--loss", f"is_{base}"]), *args, *lengths)
    assert (weights == 1).all() and torch.equal(plain, weights * losses)


@pytest.mark.parametrize("log_eps", [0.0, 0.5, 1.0, 3.0])
def test_cap(log_eps):
    logps, _ = make_logps(2000, torch.float64, seed=8)
    weights = tp.importance_weights(*logps, log_eps=log_eps)
    uncapped = tp.importance_weights(*logps, log_eps=math.inf)
    cap = math.exp(2 * log_eps)
    assert weights.max().item() == pytest.approx(cap, rel=1e-14) and (weights <= cap * (1 + 1e-15)).all()
    under = uncapped < cap
    assert under.any() and not under.all() and torch.equal(weights[under], uncapped[under])
    np.testing.assert_allclose(weights[~under].numpy(), cap, rtol=1e-14)
    if log_eps == 1.0:
        assert weights.max().item() == pytest.approx(math.e**2, rel=1e-14)


def test_cap_is_of_the_pair():
    """One response may spend what the other saves: the cap is on the sum of the log-ratios, 2 log_eps, not on each."""
    def weight(*rho):
        return tp.importance_weights(*(torch.tensor([float(x)]) for x in (*rho, 0, 0)), log_eps=1.0).item()

    assert weight(5, -4) == pytest.approx(math.e, rel=1e-6)
    assert weight(1.5, 0.25) == pytest.approx(math.exp(1.75), rel=1e-6)
    assert weight(1.5, 1.5) == weight(40, 40) == pytest.approx(math.exp(2), rel=1e-6)


def test_a_rejected_response_that_became_likelier_raises_the_weight():
    rc = rr = pc = torch.full((3,), -50.0)
    pr = torch.tensor([-51.0, -50.0, -49.5])
    weights = tp.importance_weights(pc, pr, rc, rr, log_eps=1.0)
    torch.testing.assert_close(weights, torch.tensor([math.exp(-1), 1.0, math.exp(0.5)]))


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0])
def test_ipo_in_the_papers_form(beta):
    """f(x) = (x - 1)^2 at x = beta' delta is ipo at beta = beta'/2, times beta'^2."""
    logps, _ = make_logps(100, torch.float64, seed=9)
    pc, pr, rc, rr = logps
    x = beta * ((pc - rc) - (pr - rr))
    torch.testing.assert_close((x - 1) ** 2, beta**2 * tp.ipo_loss(*logps, beta=beta / 2), rtol=1e-9, atol=1e-12)


def test_ipo_has_its_optimum_at_half_over_beta():
    pc = torch.tensor([5.0], requires_grad=True)
    zero = torch.zeros(1)
    tp.ipo_loss(pc, zero, zero, zero, beta=0.1).backward()
    assert pc.grad.item() == 0


def test_chi_po_at_the_clip():
    """Beyond the clip: no gradient, and chi/clipped counts the pair; within it: a gradient."""
    beta, r_max = 0.1, 2.0  # clip at |phi_w - phi_l| = 40
    rho_w = torch.tensor([0.0, 1.0, 3.0, 4.0, -60.0, 10.0], dtype=torch.float64)
    beyond = torch.tensor([False, False, False, True, True, True])
    assert ((phi(rho_w.numpy()) - 1) * beta > 2 * r_max).tolist() == [False, False, False, True, False, True]
    pc, zero = rho_w.clone().requires_grad_(), torch.zeros(6, dtype=torch.float64)
    losses = tp.chi_po_loss(pc, zero, zero, zero, beta=beta, r_max=r_max)
    losses.sum().backward()
    assert torch.equal(pc.grad == 0, beyond)
    np.testing.assert_allclose(losses[beyond].detach(), minus_log_sigmoid(np.array([4.0, -4.0, 4.0])), rtol=1e-12)
    args = tp.parse_args(f"--loss chi_po --beta {beta} --r_max {r_max}".split())
    logps = torch.stack([rho_w, zero], 1)
    metrics = tp.preference_metrics(args, logps, torch.zeros_like(logps), torch.ones(6, 2))
    assert metrics["chi/clipped"] == pytest.approx(0.5)


def test_length_dpo_sign():
    """At equal reward margins a longer winner has the smaller loss: it needs less margin."""
    zero, ll = torch.zeros(3), torch.full((3,), 50.0)
    losses = tp.length_dpo_loss(zero, zero, zero, zero, beta=0.1, alpha=0.01, chosen_lengths=torch.tensor([20.0, 50.0, 80.0]),
                                rejected_lengths=ll)
    assert losses[0] > losses[1] > losses[2]
    assert losses[1].item() == pytest.approx(LOG_2, abs=1e-7)


def test_unknown_loss():
    with pytest.raises(tp.UserError, match="simpo.*is_dpo") as caught:
        tp.parse_args(["--loss", "simpo"])
    assert caught.value.code == 2


# ------------------------------------------------------------------------------------------------------------ metrics
@pytest.mark.parametrize("flags", ["--loss dpo", "--loss is_dpo --log_eps 0.5", "--loss is_ipo --log_eps inf", "--loss chi_po"])
def test_metrics(flags):
    (pc, pr, rc, rr), lengths = make_logps(101, torch.float64, seed=10, largest=20.0)
    rc[:5] = rr[:5] = -32.0
    pc[:5] = pr[:5] = -31.875  # exact ties of the rewards, which count as wrong
    args = tp.parse_args([*flags.split(), "--beta", "0.1"])
    got = tp.preference_metrics(args, torch.stack([pc, pr], 1), torch.stack([rc, rr], 1), torch.stack(lengths, 1))
    pc, pr, rc, rr = (x.numpy() for x in (pc, pr, rc, rr))
    rho_w, rho_l = pc - rc, pr - rr
    total = rho_w + rho_l
    cap = 2 * args.log_eps
    weighted = args.loss.startswith("is_")
    weights = np.exp(np.minimum(total, cap)) if weighted else np.ones(101)
    logps = pc, pr, rc, rr
    base = {"dpo": lambda: oracle_dpo(*logps, 0.1), "is_dpo": lambda: oracle_dpo(*logps, 0.1),
            "is_ipo": lambda: oracle_ipo(*logps, 0.1), "chi_po": lambda: oracle_chi_po(*logps, 0.1, 10.0)}[args.loss]()
    expected = {
        "loss": np.mean(weights * base),
        "loss/unweighted": np.mean(base),
        "rewards/chosen": np.mean(0.1 * rho_w),
        "rewards/rejected": np.mean(0.1 * rho_l),
        "rewards/margins": np.mean(0.1 * rho_w) - np.mean(0.1 * rho_l),
        "rewards/accuracies": np.mean([w > l for w, l in zip(rho_w, rho_l)]),
        "logps/chosen": np.mean(pc),
        "logps/rejected": np.mean(pr),
        "ratio/chosen": np.mean(rho_w),
        "ratio/rejected": np.mean(rho_l),
        "weights/mean": np.mean(weights),
        "weights/ess": np.sum(weights) ** 2 / np.sum(weights**2),
        "weights/capped": np.mean(total >= cap),
        "weights/log_p10": np.percentile(total, 10),
        "weights/log_p50": np.percentile(total, 50),
        "weights/log_p90": np.percentile(total, 90),
    }
    if args.loss == "chi_po":
        expected["chi/clipped"] = np.mean(np.abs(0.1 * (phi(rho_w) - phi(rho_l))) >= 20)
    assert got.keys() == expected.keys()
    assert expected["rewards/accuracies"] <= 96 / 101 and (not weighted or expected["weights/ess"] < 100)
    for name in expected:
        assert type(got[name]) is float
        assert got[name] == pytest.approx(expected[name], rel=1e-6, abs=1e-12), name  # accuracies are float32
    if args.log_eps == 0.5:
        assert 0 < got["weights/capped"] < 1 and got["weights/log_p90"] > cap  # percentiles are of the weights before the cap


def test_effective_sample_size():
    """Equal weights: the batch; one pair with all the weight: 1."""
    args = tp.parse_args("--loss is_dpo --log_eps inf".split())

    def ess(rho):
        logps = torch.tensor(rho)[:, None].expand(-1, 2)
        return tp.preference_metrics(args, logps, torch.zeros(4, 2), torch.ones(4, 2))["weights/ess"]

    assert ess([0.7] * 4) == pytest.approx(4, rel=1e-6)
    assert ess([20.0, 0.0, 0.0, 0.0]) == pytest.approx(1, rel=1e-6)
    assert ess([-200.0] * 4) == pytest.approx(4, rel=1e-6)  # each weight is exp(-400): 0 in float32, and in float64 its square
    assert ess([-200.0, -200.0, -900.0, -900.0]) == pytest.approx(2, rel=1e-6)


def test_trouble_with_weights():
    """Vanished weights, and weights at the cap in over half of the pairs, each with its own words; none where they are at work."""
    args = tp.parse_args("--loss is_dpo".split())

    def trouble(rho, loss="is_dpo"):
        args.loss = loss
        logps = torch.tensor(rho)[:, None].expand(-1, 2)
        metrics = tp.preference_metrics(args, logps, torch.zeros(len(rho), 2), torch.ones(len(rho), 2))
        return tp.trouble_with_weights(args, metrics, len(rho))

    assert "left the pairs behind" in trouble([-3.0] * 8)  # exp(-6) = 0.0025
    assert "left the pairs behind" in trouble([-300.0] * 8)
    assert trouble([-1.0] * 8) == "" and trouble([0.0] * 8) == ""
    assert "at the cap" in trouble([1.5] * 5 + [0.0] * 3)
    assert trouble([1.5] * 4 + [0.0] * 4) == ""
    assert trouble([1.5] * 8, loss="dpo") == ""  # it has no weights to cap


# -------------------------------------------------------------------------------------------------- who wrote the pair
@pytest.mark.parametrize("base", ["dpo", "ipo"])
def test_the_samplers_log_probs_give_the_on_policy_loss(base):
    """Pairs of a bandit drawn by a colder policy than the reference, all 16 enumerated: weighted from what drew them, the mean loss
    is that of pairs drawn by the policy; weighted from the reference it is another number."""
    generator = torch.Generator().manual_seed(4)
    draw = lambda: torch.randn(4, generator=generator, dtype=torch.float64)
    ref = draw().log_softmax(0)
    policy = (ref + draw()).log_softmax(0)
    cold = (ref / 0.5).log_softmax(0)
    w, l = torch.cartesian_prod(torch.arange(4), torch.arange(4)).unbind(1)
    logps = policy[w], policy[l], ref[w], ref[l]
    one = torch.ones(16, dtype=torch.float64)
    args = tp.parse_args(["--loss", f"is_{base}", "--log_eps", "inf", "--beta", "0.5"])
    drawn = (cold[w] + cold[l]).exp()
    on_policy = ((policy[w] + policy[l]).exp() * tp.preference_loss(tp.parse_args(["--loss", base, "--beta", "0.5"]), *logps, one, one)[0]).sum()
    losses, weights = tp.preference_loss(args, *logps, one, one, torch.stack([cold[w], cold[l]], 1))
    assert (drawn * weights).sum().item() == pytest.approx(1, abs=1e-12)
    assert (drawn * weights * losses).sum().item() == pytest.approx(on_policy.item(), rel=1e-12)
    losses, weights = tp.preference_loss(args, *logps, one, one)
    assert abs((drawn * weights * losses).sum().item() / on_policy.item() - 1) > 0.05


# ---------------------------------------------------------------------------------------------------------- Theorem 1
# The paper's bandit (Section 3.2): a softmax policy over four actions, here at the optimum pi* ~ ref exp(r / beta).
REF = torch.tensor([0.5, 0.1, 0.1, 0.3], dtype=torch.float64)
REWARD = torch.tensor([0.5, 1.0, 0.0, 0.0], dtype=torch.float64)
COSINES = {0.05: -0.0475, 0.1: -0.0394, 0.2: 0.0647, 0.5: 0.6003, 1.0: 0.9064}  # of grad KL and grad mu, unweighted


def bandit_gradients(theta, weighted):
    """Exact sums over the 16 pairs drawn from ref -> grad of KL(pi || ref), of E[w delta^2 / 2]. ipo at beta = inf is delta^2."""
    log_pi, log_ref = theta.log_softmax(0), REF.log()
    grad_kl = torch.autograd.grad((log_pi.exp() * (log_pi - log_ref)).sum(), theta, retain_graph=True)[0]
    w, l = torch.cartesian_prod(torch.arange(4), torch.arange(4)).unbind(1)
    logps = log_pi[w], log_pi[l], log_ref[w], log_ref[l]
    losses = tp.ipo_loss(*logps, beta=math.inf) / 2
    if weighted:
        losses = tp.importance_weights(*logps, log_eps=math.inf) * losses
    return grad_kl, torch.autograd.grad((REF[w] * REF[l] * losses).sum(), theta)[0]


@pytest.mark.parametrize("beta", COSINES)
def test_theorem_1(beta):
    theta = (REF.log() + REWARD / beta).requires_grad_()
    grad_kl, grad_weighted = bandit_gradients(theta, weighted=True)
    assert torch.cosine_similarity(grad_kl, grad_weighted, dim=0).item() == pytest.approx(1, abs=1e-12)
    assert (grad_weighted.norm() / grad_kl.norm()).item() == pytest.approx(2, abs=1e-11)
    grad_kl, grad_plain = bandit_gradients(theta, weighted=False)
    assert torch.cosine_similarity(grad_kl, grad_plain, dim=0).item() == pytest.approx(COSINES[beta], abs=5e-5)


def test_theorem_1_at_random_policies():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        theta = (2 * torch.randn(4, generator=generator, dtype=torch.float64)).requires_grad_()
        grad_kl, grad_weighted = bandit_gradients(theta, weighted=True)
        torch.testing.assert_close(grad_weighted, 2 * grad_kl, rtol=1e-11, atol=1e-13)
