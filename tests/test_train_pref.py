"""train_pref.py end to end: its batches and forward against transformers, and whole runs - ranks, resuming, signals, damage,
wrong flags - through its command line (runs.py starts it). What torchrun itself does is tested with torchrun.
"""

import ast
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import load_rows
from safetensors import safe_open
from safetensors.torch import load_file

import train_pref as tp
from plumbing.checkpoint import model_fingerprint
from plumbing.data import read_jsonl
from runs import Result, finish, launch, spoil

ROOT = Path(tp.__file__).resolve().parent
SOURCE = Path(tp.__file__).read_text()
pytestmark = pytest.mark.usefixtures("process_group")  # without which no weights are loaded


# ------------------------------------------------------------------------------------------------------- running it
@pytest.fixture
def cli(run_script):
    """-> run(*argv, world=1, call=, action=, on_rank=) -> Result of train_pref.py; cli.start does not wait for the end."""
    return run_script("train_pref")


def write_pairs(path, n, seed=0):
    """n pairs of text; lengths differ from row to row by a factor of five."""
    rng = np.random.default_rng(seed)
    text = lambda low, high: "".join(rng.choice(list("abcdefgh .,"), rng.integers(low, high)))
    rows = [dict(prompt=text(3, 24) + ":", chosen="A" + text(1, 14), rejected="B" + text(1, 14)) for _ in range(n)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def model_dir(tiny_llama, tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("model") / "tiny", seed=3)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl", 20)


def flags(model_dir, data, out, *more, **values):
    """The command line of a small run; `values` go over the defaults below."""
    defaults = dict(model=model_dir, data=data, eval_data="", out=out, loss="is_dpo", beta=0.1, epochs=2, batch_size=4,
                    micro_batch_size=3, lr=1e-3, warmup_steps=2, max_length=48, max_prompt_length=28, save_every=0, eval_every=0,
                    keep_state=0, precision="fp32")
    values = defaults | values
    return [*(word for name, value in values.items() for word in (f"--{name}", value)), *more]


def metrics_of(out):
    """The metric lines (strict JSON: no NaN), without the header and without clock and memory."""
    def strict(constant):
        raise AssertionError(f"{constant} in {out}/metrics.jsonl")

    lines = [json.loads(line, parse_constant=strict) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("tokens_per_s", "step_s", "mem_gb")} for line in lines[1:]]


def assert_same_files(a, b):
    """Two directories hold the same files with the same bytes."""
    names = lambda root: sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())
    assert names(a) == names(b)
    assert [name for name in names(a) if (a / name).read_bytes() != (b / name).read_bytes()] == []


def largest_difference(a, b):
    """Over the tensors of two safetensors files: the largest |a - b| / |a|."""
    a, b = load_file(a), load_file(b)
    assert a.keys() == b.keys()
    return max(((a[name] - b[name]).norm() / a[name].norm()).item() for name in a)


# ------------------------------------------------------------------------------------- the forward, in this process
LLAMA3_ROPE = dict(rope_type="llama3", rope_theta=500.0, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=16)
SHAPES = {
    "grouped": dict(),
    "tied": dict(tie_word_embeddings=True, num_key_value_heads=4),
    "llama3": dict(rope_parameters=LLAMA3_ROPE, num_key_value_heads=1, head_dim=12, attention_bias=True, mlp_bias=True),
}


def load(directory, dtype=torch.float32):
    model = tp.load_weights(tp.build_model(lambda: tp.Llama(tp.read_config(directory), "torch"), "cpu", "fp32"), directory)
    model.model.dtype = dtype
    return model.to(dtype)


def pairs_of(data, directory, max_length, max_prompt_length):
    limits = tp.load_tokenizer(directory), tp.read_config(directory).vocab_size, max_length, max_prompt_length
    return list(load_rows(tp, data, *limits)[0])


@pytest.fixture(scope="module", params=[*SHAPES, "stories260K"])
def case(request, tiny_llama, tmp_path_factory):
    """-> model directory, pairs: random shapes with random text, or a trained model with real posts and summaries."""
    tmp = tmp_path_factory.mktemp(request.param)
    if request.param in SHAPES:
        directory, data = tiny_llama(tmp / "model", seed=5, **SHAPES[request.param]), write_pairs(tmp / "pairs.jsonl", 16)
    else:
        directory, shared = request.getfixturevalue("stories"), request.getfixturevalue("shared")
        rows = [row for _, row in zip(range(6), read_jsonl(shared / "data" / "tldr_pref.jsonl.gz"))]
        data = tmp / "pairs.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for _, row in rows))
    pairs = pairs_of(data, directory, 224, 96)
    assert len(pairs) >= 6
    return directory, pairs


@pytest.fixture
def doubles():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def summed_gradients(model, pairs, ref_logps, monkeypatch, **values):
    """-> logps (B, 2) and the gradients that train_step hands to the optimizer, by name."""
    args = tp.parse_args([str(x) for x in flags("m", "d", "o", *values.pop("more", ()), **values)])
    grads = {}

    def take(model, optimizer, grad_clip, finite):
        grads.update({name: param.grad.clone() for name, param in model.named_parameters()})
        model.zero_grad()
        return 0.0, bool(finite)

    monkeypatch.setattr(tp, "clip_and_step", take)
    logps, _, finite = tp.train_step(model, None, pairs, ref_logps, args)
    assert finite
    return logps, grads


@pytest.mark.gpu
def test_micro_batches_do_not_wait_for_the_gpu(tiny_llama, tmp_path, process_group, monkeypatch):
    """The host runs ahead until the gradient norm is asked for: no copy to the GPU and no value read makes it wait."""
    directory, data = tiny_llama(tmp_path / "model"), write_pairs(tmp_path / "pairs.jsonl", 8)
    pairs = pairs_of(data, directory, 224, 96)
    args = tp.parse_args([str(x) for x in flags("m", "d", "o", micro_batch_size=2)])
    model = tp.build_model(lambda: tp.Llama(tp.read_config(directory)), process_group, "fp32")
    tp.load_weights(model, directory)
    step = lambda: tp.train_step(model, None, pairs, torch.zeros(8, 2), args)
    monkeypatch.setattr(tp, "clip_and_step", lambda *_: (0.0, True))
    step()  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def gradient_difference(a, b):
    return max(((a[name] - b[name]).norm() / a[name].norm()).item() for name in a)


def spread_refs(model, pairs, dtype):
    """Reference log-probs some tenths of a nat beside the policy's: the weights and slopes of the pairs differ."""
    with torch.no_grad():
        logps = model(**tp.collate_pairs(pairs, True, "cpu"))[0].view(-1, 2)
    return logps + torch.randn(logps.shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def test_shared_prompt_equals_plain_rows(case, process_group, monkeypatch):
    directory, pairs = case
    model = load(directory)
    with torch.no_grad():
        shared, plain = (model(**tp.collate_pairs(pairs, form, "cpu")) for form in (True, False))
    torch.testing.assert_close(shared[1], plain[1], rtol=1e-5, atol=1e-5)  # a token
    torch.testing.assert_close(shared[0], plain[0], rtol=1e-5, atol=1e-5)
    ref = spread_refs(model, pairs, torch.float32)
    forms = "--shared_prompt", "--no-shared_prompt"
    a, b = (summed_gradients(model, pairs, ref, monkeypatch, more=[form])[1] for form in forms)
    assert gradient_difference(a, b) < 1e-4


def test_shared_prompt_equals_plain_rows_in_float64(case, process_group, monkeypatch, doubles):
    directory, pairs = case
    model = load(directory, torch.float64)
    ref = spread_refs(model, pairs, torch.float64)
    forms = "--shared_prompt", "--no-shared_prompt"
    (logps, a), (plain, b) = (summed_gradients(model, pairs, ref, monkeypatch, more=[form]) for form in forms)
    assert logps.dtype == torch.float64
    torch.testing.assert_close(logps, plain, rtol=1e-12, atol=0)
    assert gradient_difference(a, b) < 1e-12


def test_log_probs_equal_transformers(case):
    """Prompt + response, one at a time and without padding, through transformers' own model."""
    from transformers import AutoModelForCausalLM

    directory, pairs = case
    theirs, model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32), load(directory)
    with torch.no_grad():
        logps, token_logps = model(**tp.collate_pairs(pairs, True, "cpu"))
        expected = []
        for pair in pairs:
            for response in (pair.chosen, pair.rejected):
                ids = torch.tensor([[*pair.prompt, *response]])
                every = theirs(ids).logits[0, :-1].double().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
                expected.append(every[len(pair.prompt) - 1 :])
    torch.testing.assert_close(token_logps.double(), torch.cat(expected), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logps.double(), torch.stack([x.sum() for x in expected]), rtol=1e-5, atol=1e-5)


def test_pairs_alone_permuted_and_in_micro_batches(case, process_group, monkeypatch):
    """Neither padding nor neighbours nor the order nor the micro-batch changes log-probs or the summed gradient. float32."""
    directory, pairs = case
    # Sums of some 64 nats: of 400, one bit in float32 is 3e-5 nats, and the gradient goes with their exponential.
    pairs = [tp.Pair(p.prompt, p.chosen[: 12 - k % 6], p.rejected[:9]) for k, p in enumerate(pairs)]
    assert len({sum(map(len, pair)) for pair in pairs}) > 3
    model = load(directory)
    ref = spread_refs(model, pairs, torch.float32)
    logps, grads = summed_gradients(model, pairs, ref, monkeypatch, micro_batch_size=16)
    with torch.no_grad():
        alone = torch.stack([model(**tp.collate_pairs([pair], True, "cpu"))[0] for pair in pairs])
    torch.testing.assert_close(logps, alone, rtol=1e-5, atol=1e-5)
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(1))
    permuted_logps, permuted = summed_gradients(model, [pairs[i] for i in order], ref[order], monkeypatch, micro_batch_size=3)
    torch.testing.assert_close(permuted_logps, logps[order], rtol=1e-5, atol=1e-5)
    one_logps, one = summed_gradients(model, pairs, ref, monkeypatch, micro_batch_size=1)
    torch.testing.assert_close(one_logps, logps, rtol=1e-5, atol=1e-5)
    assert gradient_difference(grads, permuted) < 1e-5
    assert gradient_difference(grads, one) < 1e-5


def test_micro_batches_in_float64(case, process_group, monkeypatch, doubles):
    directory, pairs = case
    model = load(directory, torch.float64)
    ref = spread_refs(model, pairs, torch.float64)
    logps, grads = summed_gradients(model, pairs, ref, monkeypatch, micro_batch_size=16)
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(1))
    for micro in (1, 3):
        other_logps, other = summed_gradients(model, [pairs[i] for i in order], ref[order], monkeypatch, micro_batch_size=micro)
        torch.testing.assert_close(other_logps, logps[order], rtol=1e-12, atol=0)
        assert gradient_difference(grads, other) < 1e-12


def test_gradient_is_the_mean_over_pairs_of_the_loss(case, process_group, monkeypatch, doubles):
    """What train_step hands to the optimizer, against autograd through mean(w * loss) of plain rows, each pair by itself."""
    directory, pairs = case
    model = load(directory, torch.float64)
    ref = spread_refs(model, pairs, torch.float64)
    _, grads = summed_gradients(model, pairs, ref, monkeypatch, micro_batch_size=3, loss="is_dpo")
    total = 0.0
    for pair, (rc, rr) in zip(pairs, ref):
        pc, pr = model(**tp.collate_pairs([pair], False, "cpu"))[0]
        weight = ((pc - rc) + (pr - rr)).detach().clamp(max=2.0).exp()
        total = total - weight * F.logsigmoid(0.1 * ((pc - rc) - (pr - rr))) / len(pairs)
    expected = dict(zip((name for name, _ in model.named_parameters()), torch.autograd.grad(total, list(model.parameters()))))
    assert gradient_difference(expected, grads) < 1e-12


def test_a_step_weighted_from_the_sampler(case, process_group, monkeypatch, doubles):
    """The weight's denominator is the sampler's, the loss's the reference's; each pair by itself, in float64."""
    directory, pairs = case
    model = load(directory, torch.float64)
    ref = spread_refs(model, pairs, torch.float64)
    sampler = ref + torch.linspace(-0.7, 0.4, ref.numel(), dtype=torch.float64).view_as(ref)
    step = tp.train_step
    monkeypatch.setattr(tp, "train_step", lambda *how: step(*how, behaviour_logps=sampler))
    logps, grads = summed_gradients(model, pairs, ref, monkeypatch, micro_batch_size=3, loss="is_dpo")
    total = 0.0
    for pair, (rc, rr), (bc, br) in zip(pairs, ref, sampler):
        pc, pr = model(**tp.collate_pairs([pair], False, "cpu"))[0]
        weight = ((pc - bc) + (pr - br)).detach().clamp(max=2.0).exp()
        total = total - weight * F.logsigmoid(0.1 * ((pc - rc) - (pr - rr))) / len(pairs)
    expected = dict(zip((name for name, _ in model.named_parameters()), torch.autograd.grad(total, list(model.parameters()))))
    assert gradient_difference(expected, grads) < 1e-12
    args = tp.parse_args([str(x) for x in flags("m", "d", "o", loss="is_dpo")])
    metrics = tp.preference_metrics(args, logps, ref, tp.pair_lengths(pairs), sampler)
    assert metrics["loss"] == pytest.approx(total.item(), rel=1e-9)
    assert metrics["weights/log_p50"] == pytest.approx((logps - sampler).sum(1).quantile(0.5).item(), rel=1e-9)


def test_columns_of_the_sampler_in_a_run(cli, model_dir, tmp_path):
    """The first step's weight is exp(pi - sampler) where the row has the columns, and 1 where it has none: pi is the reference."""
    rows = [json.loads(line) for line in write_pairs(tmp_path / "plain.jsonl", 8).read_text().splitlines()]
    cli(*flags(model_dir, tmp_path / "plain.jsonl", tmp_path / "a", loss="is_dpo", max_steps=1, batch_size=8)).ok()
    held = load_file(tmp_path / "a" / "ref_logps.safetensors")
    shifts = np.linspace(0.1, 0.5, 8)
    for row, chosen, rejected, shift in zip(rows, held["chosen"].tolist(), held["rejected"].tolist(), shifts):
        if shift > 0.2:
            row |= dict(chosen_logps=chosen - shift, rejected_logps=rejected - 2 * shift)
    (tmp_path / "known.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = cli(*flags(model_dir, tmp_path / "known.jsonl", tmp_path / "b", loss="is_dpo", max_steps=1, batch_size=8)).ok().out
    weights = np.where(shifts > 0.2, np.exp(np.minimum(3 * shifts, 2.0)), 1.0)
    (plain,), (known,) = metrics_of(tmp_path / "a"), metrics_of(tmp_path / "b")
    assert plain["weights/mean"] == pytest.approx(1, abs=1e-4) and known["weights/mean"] == pytest.approx(weights.mean(), rel=1e-4)
    assert known["loss"] == pytest.approx(math.log(2) * weights.mean(), rel=1e-4) and known["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert "behaviour log-probs: 12 kept" in said


# --------------------------------------------------------------------------------------------- steps, in this process
def test_learning_rate():
    lr = [tp.learning_rate(step, 50, 10, 2.0) for step in range(1, 51)]
    assert lr[0] == pytest.approx(0.2) and lr[9] == max(lr) == 2.0 and lr[-1] == pytest.approx(0.2)  # a tenth of the peak
    assert lr[29] == pytest.approx(1.1)  # half way down: the mean of the peak and its tenth
    assert all(a < b for a, b in zip(lr[:9], lr[1:10])) and all(a > b for a, b in zip(lr[9:], lr[10:]))
    assert tp.learning_rate(1, 5, 0, 2.0) < 2.0 and tp.learning_rate(5, 5, 0, 2.0) == pytest.approx(0.2)
    short = [tp.learning_rate(step, 50, 100, 2.0) for step in range(1, 51)]  # would not end: a tenth of the run
    assert short == [tp.learning_rate(step, 50, 5, 2.0) for step in range(1, 51)] and short[4] == max(short) == 2.0


@pytest.mark.parametrize("bad", ["loss", "gradient", None])
def test_an_update_that_is_not_finite_is_not_applied(bad):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.ones(1, 3)).sum().backward()
    if bad == "gradient":
        model.weight.grad[0, 0] = math.inf
    norm, applied = tp.clip_and_step(model, optimizer, 1.0, torch.tensor(bad != "loss"))
    assert applied == (bad is None) and norm == pytest.approx(math.inf if bad == "gradient" else math.sqrt(8))
    same = [torch.equal(p, q) for p, q in zip(before, model.parameters())]
    assert same == ([False, False] if applied else [True, True])
    assert bool(optimizer.state) == applied and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("clip", [1.0, 0.0])
def test_clipping(clip):
    model = torch.nn.Linear(3, 2, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = model.weight.detach().clone()
    model.weight.grad = torch.full((2, 3), 4.0)
    norm, applied = tp.clip_and_step(model, optimizer, clip, torch.tensor(True))
    assert applied and norm == pytest.approx(4 * math.sqrt(6))
    assert (before - model.weight).norm().item() == pytest.approx(1.0 if clip else norm, rel=1e-5)


# ------------------------------------------------------------------------------------------------------------- whole runs
@pytest.mark.parametrize("loss", ["dpo", "is_dpo"])
def test_step_0(cli, model_dir, data, tmp_path, loss):
    out = tmp_path / "run"
    result = cli(*flags(model_dir, data, out, loss=loss, max_steps=2)).ok()
    first, second = metrics_of(out)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["weights/mean"] == pytest.approx(1, abs=1e-5) and first["weights/ess"] == pytest.approx(4, abs=1e-4)
    for name in ("rewards/margins", "ratio/chosen", "ratio/rejected", "weights/log_p90"):
        assert abs(first[name]) < 1e-4, name
    assert first["logps/chosen"] < -5 and abs(second["ratio/chosen"]) > 1e-3  # and then it moves
    cap = "weight cap 2 nats" if loss == "is_dpo" else "weight cap none"
    assert cap in result.out and "step 1/2 | loss 0.6931" in result.out


@pytest.mark.parametrize("more", [[], ["--shard"], ["--checkpoint_activations"], ["--no-shared_prompt"]], ids=lambda more: "".join(more))
def test_bf16(cli, model_dir, data, tmp_path, more):
    """bf16 products, float32 weights: the same start to bf16's rounding, float32 files, and a loss near float32's."""
    losses = {}
    for precision in ("fp32", "bf16"):
        cli(*flags(model_dir, data, tmp_path / precision, *more, precision=precision, max_steps=3, loss="dpo")).ok()
        losses[precision] = [line["loss"] for line in metrics_of(tmp_path / precision)]
    assert losses["bf16"][0] == pytest.approx(math.log(2), abs=0.02) and losses["bf16"] != losses["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.1)
    with safe_open(tmp_path / "bf16" / "final" / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F32"}


def test_loss_falls_on_a_repeated_batch(cli, model_dir, tmp_path):
    data, out = write_pairs(tmp_path / "four.jsonl", 4), tmp_path / "run"
    cli(*flags(model_dir, data, out, loss="dpo", epochs=20, lr=5e-3)).ok()
    lines = metrics_of(out)
    assert len(lines) == 20
    assert lines[-1]["loss"] < 0.3 < 0.69 < lines[0]["loss"]
    assert lines[-1]["rewards/margins"] > 1 and lines[-1]["rewards/accuracies"] == 1.0


def test_files_of_a_run(cli, model_dir, data, tmp_path):
    """What design promises of OUT/: loaded by transformers, reference log-probs in their format, keys of the log."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out, held_out = tmp_path / "run", write_pairs(tmp_path / "eval.jsonl", 7, seed=9)
    rows = data.read_text().splitlines()
    with_holes = tmp_path / "holes.jsonl"  # rows 1 and 3 cannot be used
    rows[1:1], rows[3:3] = ['{"prompt": "p", "chosen": "", "rejected": "x"}'], ['{"prompt": 3}']
    with_holes.write_text("\n".join(rows[:12]) + "\n")
    evaluated = dict(eval_data=held_out, eval_every=2)
    cli(*flags(model_dir, with_holes, out, loss="dpo", save_every=1, keep=1, max_steps=5, **evaluated)).ok()

    # --keep 1
    assert sorted(p.name for p in out.iterdir()) == [
        ".lock", "data.safetensors", "data_eval.safetensors", "final", "metrics.jsonl", "ref_logps.safetensors",
        "ref_logps_eval.safetensors", "step_000005"]
    header = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    # Reference log-probs
    with safe_open(out / "ref_logps.safetensors", "pt") as file:
        assert set(file.keys()) == {"chosen", "rejected", "index"}
        assert file.metadata()["key"] == f"{model_fingerprint(model_dir)}-{header['data']}-fp32"
        chosen, rejected, index = (file.get_tensor(name) for name in ("chosen", "rejected", "index"))
    assert chosen.dtype == rejected.dtype == torch.float32 and index.dtype == torch.int64
    assert index.tolist() == [0, 2, *range(4, 12)] and chosen.shape == rejected.shape == index.shape
    pairs = pairs_of(with_holes, model_dir, 48, 28)
    ref = load(model_dir)
    logps = lambda model, pairs: torch.stack([model(**tp.collate_pairs([pair], False, "cpu"))[0] for pair in pairs])
    with torch.no_grad():
        torch.testing.assert_close(torch.stack([chosen, rejected], 1), logps(ref, pairs), rtol=1e-5, atol=1e-5)

        # Evaluation, against a direct computation with the final policy, which transformers loads too
        policy = load(out / "final")
        eval_pairs = pairs_of(held_out, model_dir, 48, 28)
        rho = (logps(policy, eval_pairs) - logps(ref, eval_pairs)).double().numpy()
    lines = metrics_of(out)
    assert [line["step"] for line in lines if "eval_loss" in line] == [2, 4, 5]  # the last step too
    delta = rho[:, 0] - rho[:, 1]
    assert lines[-1]["eval_loss"] == pytest.approx(np.mean(np.logaddexp(0, -0.1 * delta)), abs=1e-5)
    assert lines[-1]["eval_rewards/accuracies"] == pytest.approx(np.mean(delta > 0))
    assert lines[-1]["eval_rewards/margins"] == pytest.approx(np.mean(0.1 * delta), abs=1e-5)
    assert lines[-1]["eval_weights/log_p50"] == pytest.approx(np.median(rho.sum(1)), abs=1e-4)
    assert abs(lines[-1]["eval_rewards/margins"]) > 1e-3
    theirs = AutoModelForCausalLM.from_pretrained(out / "final")
    ours = dict(policy.named_parameters())
    for name, param in theirs.named_parameters():
        assert torch.equal(param, ours[name])
    assert AutoTokenizer.from_pretrained(out / "final").eos_token_id == 257
    stops = theirs.generation_config.eos_token_id
    assert 257 in (stops if isinstance(stops, list) else [stops])

    # The log
    assert {"args", "commit", "versions", "device", "data"} <= header.keys() and header["args"]["loss"] == "dpo"
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert [line["epoch"] for line in lines] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3])
    promised = ("loss loss/unweighted rewards/chosen rewards/rejected rewards/margins rewards/accuracies logps/chosen logps/rejected grad_norm"
                " learning_rate epoch num_tokens ratio/chosen ratio/rejected weights/mean weights/ess weights/capped"
                " pairs weights/log_p10 weights/log_p50 weights/log_p90").split()
    assert all(line.keys() >= set(promised) and all(line[name] is not None for name in promised) for line in lines)
    tokens = sum(2 * len(p.prompt) + len(p.chosen) + len(p.rejected) for p in pairs)
    assert lines[2]["num_tokens"] == tokens  # after one epoch
    manifest = json.loads((out / "step_000005" / "manifest.json").read_text())
    files = {str(p.relative_to(out / "step_000005")) for p in (out / "step_000005").rglob("*") if p.is_file()}
    assert set(manifest) == files - {"manifest.json"} | {"run", "step"} and (out / "final" / "trainer").exists() is False
    assert (out / "final" / "model.safetensors").read_bytes() == (out / "step_000005" / "model.safetensors").read_bytes()


# -------------------------------------------------------------------------------------------------------------- ranks
@pytest.fixture(scope="module")
def lone_run(context, model_dir, tmp_path_factory):
    """34 pairs in steps of 8: the fifth step has two pairs, fewer than four ranks. One rank, micro-batches of 8, no sharding."""
    tmp = tmp_path_factory.mktemp("lone")
    data, out = write_pairs(tmp / "pairs.jsonl", 34, seed=4), tmp / "run"
    argv = flags(model_dir, data, out, epochs=1, batch_size=8, micro_batch_size=8)
    finish(launch(context, "train_pref", tmp / "log", argv)).ok()
    return data, out


@pytest.mark.parametrize("micro", [1, 3, 8])
@pytest.mark.parametrize("form", ["ddp", "shard"])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks(cli, lone_run, model_dir, tmp_path, world, form, micro):
    data, alone = lone_run
    out = tmp_path / "run"
    more = ["--shard"] if form == "shard" else []
    cli(*flags(model_dir, data, out, *more, epochs=1, batch_size=8, micro_batch_size=micro), world=world).ok()
    moved = largest_difference(model_dir / "model.safetensors", alone / "final" / "model.safetensors")
    assert moved > 1e-3
    assert largest_difference(alone / "final" / "model.safetensors", out / "final" / "model.safetensors") < 1e-5
    a, b = (load_file(run / "ref_logps.safetensors") for run in (alone, out))
    torch.testing.assert_close(a["chosen"], b["chosen"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(a["rejected"], b["rejected"], rtol=1e-5, atol=1e-5)
    assert torch.equal(a["index"], b["index"])
    for x, y in zip(metrics_of(alone), metrics_of(out), strict=True):
        assert x == pytest.approx(y, rel=1e-3, abs=1e-4)  # averages of the whole batch, not of rank 0's part


# ------------------------------------------------------------------------------------------------------------- resuming
# 20 pairs in steps of 4, 8 steps: steps 3, 4, 6 and 7 end in the middle of an epoch.
STEPS = dict(max_steps=8, save_every=2)


@pytest.fixture(scope="module")
def straight(context, model_dir, data, tmp_path_factory):
    """-> make(name) -> the run without interruption, made once; the name is its ranks and flags: "1", "2 --shard"."""
    made = {}

    def make(name):
        if name not in made:
            tmp = tmp_path_factory.mktemp("straight")
            argv = flags(model_dir, data, tmp / "run", *name.split()[1:], **STEPS)
            finish(launch(context, "train_pref", tmp / "log", argv, world=int(name[0]))).ok()
            made[name] = tmp / "run"
        return made[name]

    return make


@pytest.mark.parametrize("name", ["1", "1 --shard", "2", "2 --shard"])
def test_resume_is_exact(cli, straight, model_dir, data, tmp_path, name):
    """Stopped by signals at step 3 (SIGTERM, sent to the last rank alone) and at step 6 (SIGUSR1), each time resumed."""
    expected, out = straight(name), tmp_path / "run"
    world, more = int(name[0]), name.split()[1:]
    argv = flags(model_dir, data, out, *more, **STEPS)
    result = cli(*argv, world=world, call=3, action=signal.SIGTERM, on_rank=world - 1)
    assert result.code == 143 and "Traceback" not in result.err and "stopped by signal 15 after step 3" in result.out
    assert [p.name for p in sorted(out.glob("step_*"))] == ["step_000002", "step_000003"] and len(metrics_of(out)) == 3
    result = cli(*argv, world=world, call=3, action=signal.SIGUSR1)
    assert result.code == 128 + signal.SIGUSR1 and f"resumed from {out}/step_000003" in result.out
    assert cli(*argv, world=world).ok().out.count(f"resumed from {out}/step_000006") == 1
    for directory in ("step_000002", "step_000004", "step_000006", "step_000008", "final"):
        assert_same_files(expected / directory, out / directory)
    assert metrics_of(out) == metrics_of(expected)
    assert (out / "ref_logps.safetensors").read_bytes() == (expected / "ref_logps.safetensors").read_bytes()


def test_resume_from_an_earlier_checkpoint(cli, straight, model_dir, data, tmp_path):
    """Later checkpoints and final lost, a half-written checkpoint and a metric line cut in two left over: the same run again,
    from step 4 and then from step 2. The micro-batch may change the last bits, so it stays."""
    expected, out = straight("1"), tmp_path / "run"
    shutil.copytree(expected, out)
    header = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    for last in (4, 2):
        for directory in (out / "final", *(p for p in out.glob("step_*") if int(p.name[5:]) > last)):
            shutil.rmtree(directory)
        leftover = out / f".step_{last + 2:06d}.tmp"
        (leftover / "trainer").mkdir(parents=True)
        (leftover / "model.safetensors").write_bytes(b"half")
        with (out / "metrics.jsonl").open("a") as file:
            file.write('{"step": 9, "lo')
        assert f"resumed from {out}/step_{last:06d}" in cli(*flags(model_dir, data, out, **STEPS)).ok().out
        for directory in ("step_000002", "step_000004", "step_000006", "step_000008", "final"):
            assert_same_files(expected / directory, out / directory)
        assert metrics_of(out) == metrics_of(expected) and [p.name for p in out.glob(".*")] == [".lock"]
        assert json.loads((out / "metrics.jsonl").read_text().splitlines()[0]) == header


@pytest.mark.parametrize("first, then", [("1", "2"), ("2 --shard", "1"), ("1", "2 --shard")])
def test_resume_on_another_number_of_ranks(cli, straight, model_dir, data, tmp_path, first, then):
    out = tmp_path / "run"
    for name, code, action in ((first, 143, signal.SIGTERM), (then, 0, None)):
        argv = flags(model_dir, data, out, *name.split()[1:], **STEPS)
        assert cli(*argv, world=int(name[0]), call=3, action=action).code == code
    assert largest_difference(straight("1") / "final" / "model.safetensors", out / "final" / "model.safetensors") < 1e-6
    for name in ("exp_avg", "exp_avg_sq"):
        trainers = (run / "step_000008" / "trainer" / name / "model.safetensors" for run in (straight("1"), out))
        assert largest_difference(*trainers) < 1e-4


def test_signals_from_outside(cli, model_dir, data, tmp_path):
    """A long run is sent SIGINT from another process: exit code 130 and a checkpoint of the step that the log ends with."""
    for signum, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        out = tmp_path / f"run{signum}"
        started = cli.start(*flags(model_dir, data, out, epochs=10000))
        deadline = time.monotonic() + 60
        while not (out / "metrics.jsonl").exists() or len((out / "metrics.jsonl").read_text().splitlines()) < 4:
            assert time.monotonic() < deadline and started[0][0].is_alive()
            time.sleep(0.02)
        os.kill(started[0][0].pid, signum)
        result = finish(started)
        assert result.code == code and "Traceback" not in result.err, result.err
        last = metrics_of(out)[-1]["step"]
        assert [p.name for p in out.glob("step_*")] == [f"step_{last:06d}"]


# ------------------------------------------------------------------------------------------------------- refused, in one line
def test_second_run_in_the_same_directory(cli, straight, model_dir, data, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(straight("1"), out)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name != ".lock"}
    argv = flags(model_dir, data, out, **STEPS)
    assert "this run is complete" in cli(*argv).ok().out
    to_the_machine = "--micro_batch_size", 1, "--keep", 2, "--shard"  # flags that may differ
    assert "this run is complete" in cli(*argv, *to_the_machine).ok().out
    cli(*argv, "--beta", 0.2, "--lr", 2e-3, "--loss", "dpo").refused(
        "beta was 0.1, is 0.2", "loss was 'is_dpo', is 'dpo'", "lr was 0.001, is 0.002", out)
    cli(*argv, "--data", write_pairs(tmp_path / "other.jsonl", 20, seed=1)).refused("data fingerprint", "other.jsonl")
    copy = tmp_path / "same_name.jsonl"
    copy.write_text(data.read_text())
    shutil.rmtree(out / "final")
    first = flags(model_dir, copy, tmp_path / "changed", max_steps=1)
    cli(*first).ok()
    copy.write_text(data.read_text().replace("A", "C"))  # the same path, other text
    cli(*first).refused("data fingerprint", tmp_path / "changed")
    shutil.copytree(straight("1") / "final", out / "final")
    assert {p: p.read_bytes() for p in before} == before  # nothing was touched


def test_out_that_is_no_run(cli, model_dir, data, tmp_path):
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "chapter1.txt").write_text("words")
    cli(*flags(model_dir, data, out)).refused(out, "no run")
    assert [p.name for p in out.iterdir()] == ["chapter1.txt"]
    (out / "metrics.jsonl").write_text("not ours\n")
    cli(*flags(model_dir, data, out)).refused(out, "no run")


def test_a_run_killed_before_its_first_step(cli, model_dir, data, tmp_path):
    """Killed after the reference log-probs were written, or while they were: the same command begins again."""
    out = tmp_path / "run"
    argv = flags(model_dir, data, out, max_steps=1)
    cli(*argv).ok()
    shutil.rmtree(out / "final")
    header = (out / "metrics.jsonl").read_text().splitlines()[0]
    (out / "metrics.jsonl").write_text(header + "\n")  # as a kill at that moment leaves it
    cli(*argv).ok()
    shutil.rmtree(out)
    out.mkdir()
    (out / ".metrics.jsonl.tmp").write_bytes(b"half")
    cli(*argv).ok()
    assert sorted(p.name for p in out.iterdir()) == [".lock", "data.safetensors", "final", "metrics.jsonl",
                                                     "ref_logps.safetensors"]


@pytest.mark.parametrize("name, harm", [
    ("model.safetensors", "flip"), ("model.safetensors", "truncate"), ("trainer/exp_avg/model.safetensors", "delete"),
    ("trainer/state.json", "truncate"), ("config.json", "truncate"), ("manifest.json", "truncate"), ("manifest.json", "delete")])
def test_damaged_checkpoint(cli, straight, model_dir, data, tmp_path, name, harm):
    out = tmp_path / "run"
    shutil.copytree(straight("1"), out)
    shutil.rmtree(out / "final")
    path = out / "step_000008" / name
    content = bytearray(path.read_bytes())
    if harm == "delete":
        path.unlink()
    elif harm == "truncate":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    cli(*flags(model_dir, data, out, **STEPS)).refused(path)


def test_damaged_reference_log_probs(cli, straight, model_dir, data, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(straight("1"), out)
    shutil.rmtree(out / "final")
    path = out / "ref_logps.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    cli(*flags(model_dir, data, out, **STEPS)).refused(path)


@pytest.mark.parametrize("words, said", [
    ("--learning_rate 1", "--learning_rate"), ("--loss dpo --log_eps 2", "--log_eps 2.0 is not read by --loss dpo"),
    ("--loss is_dpo --eta 1", "--eta 1.0 is not read by --loss is_dpo"), ("--loss dpo --length_average", "--length_average"),
    ("--beta 0", "--beta 0.0: must be above 0"), ("--beta -1", "--beta -1.0"), ("--beta nan", "--beta nan"), ("--beta x", "--beta"),
    ("--loss simpo", "simpo"), ("--loss dpo --label_smoothing 0.5", "--label_smoothing 0.5"), ("--batch_size 0", "--batch_size"),
    ("--max_length 64 --max_prompt_length 64", "--max_prompt_length 64"), ("--preset trl", "--preset"), ("--bet 0.1", "--bet")])
def test_wrong_flags(words, said):
    with pytest.raises(tp.UserError) as caught:
        tp.parse_args(words.split())
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_help_and_wrong_flags_on_the_command_line(cli, model_dir, data, tmp_path):
    cli("--bet", 0.1).refused("--bet", code=2)
    cli(*flags(tmp_path / "nowhere", data, tmp_path / "a")).refused(tmp_path / "nowhere")
    cli(*flags(model_dir, tmp_path / "nothing.jsonl", tmp_path / "b")).refused(tmp_path / "nothing.jsonl")
    result = cli("--help")
    assert "Traceback" not in result.err and result.code == 0 and "--log_eps" in result.out


# ------------------------------------------------------------------------------------------------------------------ NaN
def test_a_run_that_diverges_stops(cli, model_dir, data, tmp_path):
    """lr 1e30: one update, then nothing is finite any more. Ten steps are skipped, weights stay finite, and it says so."""
    out = tmp_path / "run"
    result = cli(*flags(model_dir, data, out, lr=1e30, warmup_steps=0, epochs=10, save_every=1))
    result.refused("10 steps in a row", "not finite", out)
    lines = metrics_of(out)  # and strict JSON
    assert [line["skipped"] for line in lines] == [max(0, line["step"] - 1) for line in lines] and len(lines) == 11
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and lines[5]["loss"] is None
    assert result.out.count("NOT FINITE: skipped") == 10
    states = []
    for checkpoint in sorted(out.glob("step_*")):
        assert all(tensor.isfinite().all() for tensor in load_file(checkpoint / "model.safetensors").values())
        states.append((checkpoint / "model.safetensors").read_bytes())
        assert json.loads((checkpoint / "trainer" / "state.json").read_text())["updates"] == 1
    assert len(states) == 11 and len(set(states)) == 1  # the weights are those of the one good update
    assert not (out / "final").exists()


@pytest.mark.parametrize("more", [[], ["--shard"]], ids=["ddp", "shard"])
def test_all_ranks_skip_together(cli, model_dir, data, tmp_path, more):
    """The loss is NaN on rank 1 only, in step 2 only: both skip that update, nobody hangs, and the run goes on."""
    out = tmp_path / "run"
    result = cli(*flags(model_dir, data, out, *more, max_steps=4, save_every=1), world=2, call=2, action=spoil, on_rank=1).ok()
    lines = metrics_of(out)
    assert [line["skipped"] for line in lines] == [0, 1, 1, 1] and lines[1]["grad_norm"] is None
    assert result.out.count("NOT FINITE: skipped") == 1
    weights = [(out / f"step_00000{k}" / "model.safetensors").read_bytes() for k in (1, 2, 3, 4)]
    assert weights[0] == weights[1] and len(set(weights)) == 3
    assert all(tensor.isfinite().all() for tensor in load_file(out / "final" / "model.safetensors").values())


# ------------------------------------------------------------------------------------------------------ as users start it
def python(*argv, cwd, **env):
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | dict(CUDA_VISIBLE_DEVICES="") | env
    done = subprocess.run([sys.executable, *map(str, argv)], cwd=cwd, env=env, capture_output=True, text=True, timeout=120)
    return Result(done.returncode, done.stdout, done.stderr)


def test_made_to_be_copied(model_dir, data, tmp_path):
    """train_pref.py with plumbing/ and kernels/logprob.py, in another directory, started by torchrun from a third one. (One file:
    test_one_file.py.)"""
    home, elsewhere = tmp_path / "copy", tmp_path / "elsewhere"
    (home / "kernels").mkdir(parents=True)
    elsewhere.mkdir()
    shutil.copy(ROOT / "train_pref.py", home)
    shutil.copytree(ROOT / "plumbing", home / "plumbing")
    shutil.copy(ROOT / "kernels" / "logprob.py", home / "kernels")
    result = python("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", home / "train_pref.py",
                    *flags(model_dir, data, "out/run", max_steps=2), cwd=elsewhere).ok()
    assert (elsewhere / "out" / "run" / "final" / "model.safetensors").exists()
    assert result.out.count("step 2/2") == 1 and "2 x cpu" in result.out


@pytest.mark.parametrize("world_started", [False, True], ids=["flags", "refused out"])
def test_two_ranks_say_an_error_once(model_dir, data, tmp_path, world_started):
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "chapter1.txt").write_text("words")
    argv = flags(model_dir, data, out, *([] if world_started else ["--loss", "dpo", "--log_eps", "3"]))
    torchrun = "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"
    result = python(*torchrun, ROOT / "train_pref.py", *argv, cwd=tmp_path)
    assert result.code == 1
    assert len(re.findall(r"(?m)^error: ", result.err)) == 1, result.err
    assert ("holds no run" if world_started else "--log_eps 3.0 is not read by --loss dpo") in result.err


# ----------------------------------------------------------------------------------------------------- the source itself
def test_loss_section_needs_torch_only():
    """From its rule line to the next one the section of the losses can be copied out: it runs with torch and F alone."""
    rules = re.split(r"(?m)^# -{20,} ?(.*)\n", SOURCE)
    (section,) = [body for title, body in zip(rules[1::2], rules[2::2]) if title == "the losses"]
    namespace = dict(torch=torch, F=F)
    exec(section, namespace)
    args = tp.parse_args(["--loss", "is_dpo"])
    logps = [torch.tensor([x, x - 1]) for x in (-10.0, -12.0, -11.0, -11.5)]
    lengths = torch.ones(2), torch.ones(2)
    for name in namespace["LOSS_FLAGS"]:
        args.loss = name
        assert torch.equal(namespace["preference_loss"](args, *logps, *lengths)[0], tp.preference_loss(args, *logps, *lengths)[0])
    pc, pr, rc, rr = logps
    pairs = torch.stack([pc, pr], 1), torch.stack([rc, rr], 1), torch.ones(2, 2)
    assert namespace["preference_metrics"](args, *pairs) == tp.preference_metrics(args, *pairs)


def test_no_dead_flags():
    """Every attribute of the parsed flags is read, as args.name or header["args"]["name"], where the work is done and not only
    where flags are checked."""
    tree = ast.parse(SOURCE)
    checks = "parse_args", "parse_with_preset", "common_flags"
    tree.body = [node for node in tree.body if getattr(node, "name", "") not in checks]
    read = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
            and isinstance(node.value, ast.Name) and node.value.id == "args"}
    read |= set(re.findall(r'\["args"\]\["(\w+)"\]', SOURCE))
    defined = set(vars(tp.parse_args([])))
    assert not defined - read
    assert read <= defined


def test_help_texts_and_presets(monkeypatch):
    made = []
    init = tp.Parser.__init__
    monkeypatch.setattr(tp.Parser, "__init__", lambda self, *a, **k: (made.append(self), init(self, *a, **k))[1])
    tp.parse_args([])
    (parser,) = made
    texts = [action.help for action in parser._actions]
    assert all(texts) and len(set(texts)) == len(texts) > 30
    for preset, values in tp.PRESETS.items():  # sets flags that exist, and leaves none without a value but what is off
        args = tp.parse_args(["--preset", preset, *(["--data", "mine.jsonl"] if preset == "paper" else [])])
        assert all(getattr(args, flag) == value for flag, value in values.items() if preset != "paper" or flag != "data")
        assert {flag for flag, value in vars(args).items() if value is None} <= {
            "ref", "shard", "checkpoint_activations", "chat_template_kwargs", "save_every", "eval_every"}
        assert f"--preset {preset}" in parser.format_help()
    assert tp.parse_args("--preset tldr --beta 0.3".split()).beta == 0.3  # a flag given wins
    mine = tp.parse_args("--model mine --data mine.jsonl".split())  # never the toy's rate and lengths unasked
    assert (mine.preset, mine.lr, mine.max_length, mine.beta, mine.eval_data) == ("paper", 1e-6, 640, 0.05, "")
    assert tp.parse_args("--preset toy --data mine.jsonl".split()).lr == tp.parse_args([]).lr == 2e-4
    with pytest.raises(tp.UserError, match="--data must be given"):
        tp.parse_args(["--model", "mine"])
    assert {flag for flags in tp.LOSS_FLAGS.values() for flag in flags} <= set(vars(tp.parse_args([])))
