"""Preference training with importance-sampled direct alignment: IS-DPO, IS-IPO and the losses they are compared with.

DPO-style training on a fixed set of pairs drifts away from the policy that wrote them, and then its regularizer no
longer holds: the policy over-optimizes. IS-DAA multiplies each pair's loss by the (clipped, detached) importance ratio,

    w = min( pi(y_w|x) pi(y_l|x) / (ref(y_w|x) ref(y_l|x)),  exp(2 log_eps) ),        L = E[ w * L_DAA ],

which makes the loss an estimate of the on-policy one ("Mitigating Reward Over-optimization in Direct Alignment
Algorithms with Importance Sampling", NeurIPS 2025, Eq. 11 and 13). The prompt of a pair is computed once.

    python train_pref.py                                                     # CPU: the embedded toy task, IS-DPO
    python train_pref.py --loss dpo --model DIR_OR_HUB_ID --data pairs.jsonl # 1 GPU
    torchrun --nproc_per_node=4 train_pref.py --preset tldr --loss is_dpo    # 4 GPUs, DDP; --shard past one's memory
    torchrun --nnodes=2 --nproc_per_node=4 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train_pref.py --shard ...

Units: log-probs and log-ratios in nats, summed over response tokens (EOS included, prompt excluded); lengths in tokens;
batch sizes in pairs; a step is an optimizer step.  pi: policy, ref: reference, y_w: chosen, y_l: rejected.
"""

import argparse
import bisect
import ctypes
import fcntl
import functools
import gzip
import hashlib
import importlib
import itertools
import json
import math
import os
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zlib
from array import array
from concurrent.futures import ThreadPoolExecutor
from datetime import date, timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from huggingface_hub import save_torch_state_dict, snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Subset
from tqdm import tqdm

from kernels.logprob import linear_sequence_logps


# ---------------------------------------------------------------------------------------------------------- the losses
# Every loss takes four vectors of log-probs (B,), float32, in nats, and returns losses (B,), one a pair, not averaged:
# policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps (here pc, pr, rc, rr), and where it
# says so the response lengths (B,) in tokens. With rho = log pi - log ref of a response, delta = rho_w - rho_l.


# --- shared: losses (bandit, train_pref) ---
def dpo_loss(pc, pr, rc, rr, *, beta, label_smoothing=0.0):
    """-log sigmoid(beta delta): Rafailov et al. 2023, Eq. 7. `label_smoothing` eps is the chance of a flipped label:
    -(1 - eps) log sigmoid(beta delta) - eps log sigmoid(-beta delta) (cDPO, Mitchell 2023)."""
    logits = beta * ((pc - rc) - (pr - rr))
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def ipo_loss(pc, pr, rc, rr, *, beta, chosen_lengths=None, rejected_lengths=None):
    """(delta - 1/(2 beta))^2: Azar et al. 2024, Eq. 17. With lengths each rho is averaged over its response's tokens,
    as TRL does. The paper's f(x) = (x - 1)^2 at x = beta' delta is this curve at beta = beta'/2, times beta'^2."""
    rho_w, rho_l = pc - rc, pr - rr
    if chosen_lengths is not None:
        rho_w, rho_l = rho_w / chosen_lengths, rho_l / rejected_lengths
    return (rho_w - rho_l - 1 / (2 * beta)) ** 2


def importance_weights(pc, pr, rc, rr, *, log_eps):
    """w = exp(min(rho_w + rho_l, 2 log_eps)) (B,), detached: the paper's Eq. 13 with its misprints mended (README).
    Each response's log-ratio may spend log_eps nats, the pair twice that; inf switches the cap off."""
    return ((pc - rc) + (pr - rr)).detach().clamp(max=2 * log_eps).exp()


def rpo_loss(pc, pr, rc, rr, *, beta, eta, chosen_lengths=None):
    """dpo - beta eta log pi(y_w): Liu et al. 2024 (RPO), summed log-prob as its authors run it; with lengths its token
    mean."""
    nll = -pc if chosen_lengths is None else -pc / chosen_lengths
    return dpo_loss(pc, pr, rc, rr, beta=beta) + beta * eta * nll


def chi_po_logits(pc, pr, rc, rr, *, beta):
    """beta (phi(rho_w) - phi(rho_l)), chi-PO's chi-squared plus KL link phi(rho) = exp(clip(rho, -88, 20)) + rho, as
    published. Like terms are subtracted first: beside exp(20) a float32 does not hold rho."""
    rho_w, rho_l = pc - rc, pr - rr
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


# The flags that each loss reads besides --beta; any other one set for it is refused.
LOSS_FLAGS = {
    "dpo": {"label_smoothing"},
    "ipo": {"length_average"},
    "is_dpo": {"label_smoothing", "log_eps", "ess_target"},
    "is_ipo": {"length_average", "log_eps", "ess_target"},
    "rpo": {"eta", "length_average"},
    "chi_po": {"r_max"},
    "length_dpo": {"alpha"},
}


def ess_power(log_weights, *, ess_target, log_eps):
    """-> the largest a in [0, 1] with (sum w^a)^2 / sum w^2a >= ess_target n, for the capped weights w of n pairs, of
    which log_weights (n,) are rho_w + rho_l in nats. The left side, the effective sample size, falls from a = 0 on."""
    log_weights = log_weights.double().cpu().clamp(max=2 * log_eps)

    def minus_share(k):
        weights = (k / 2**40 * (log_weights - log_weights.max())).exp()
        return -(weights.sum() ** 2 / (weights**2).sum()).item() / len(weights)

    return (bisect.bisect(range(2**40 + 1), -ess_target, key=minus_share) - 1) / 2**40


def preference_loss(args, pc, pr, rc, rr, chosen_lengths, rejected_lengths, power=1.0):
    """-> losses (B,) before weighting, weights (B,), for `--loss`. The weights are ones where the loss has none; for
    `power` see ess_power."""
    logps = (pc, pr, rc, rr)
    lengths = dict(chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths)
    weights = torch.ones_like(pc)
    if args.loss in ("is_dpo", "is_ipo"):
        weights = importance_weights(*logps, log_eps=args.log_eps) ** power
    if args.loss in ("dpo", "is_dpo"):
        losses = dpo_loss(*logps, beta=args.beta, label_smoothing=args.label_smoothing)
    elif args.loss in ("ipo", "is_ipo"):
        losses = ipo_loss(*logps, beta=args.beta, **(lengths if args.length_average else {}))
    elif args.loss == "rpo":
        average = dict(chosen_lengths=chosen_lengths) if args.length_average else {}
        losses = rpo_loss(*logps, beta=args.beta, eta=args.eta, **average)
    elif args.loss == "chi_po":
        losses = chi_po_loss(*logps, beta=args.beta, r_max=args.r_max)
    else:
        losses = length_dpo_loss(*logps, beta=args.beta, alpha=args.alpha, **lengths)
    return losses, weights


@torch.no_grad()
def preference_metrics(args, logps, ref_logps, lengths):
    """Everything the log says of one batch, from logps, ref_logps (B, 2) in nats and lengths (B, 2) in tokens; columns
    are chosen, rejected. Names are TRL's where TRL has one; results/README.md defines each."""
    (pc, pr), (rc, rr) = logps.unbind(1), ref_logps.unbind(1)
    rho_w, rho_l = pc - rc, pr - rr
    log_weights, power = rho_w + rho_l, 1.0
    if args.ess_target:
        power = ess_power(log_weights, ess_target=args.ess_target, log_eps=args.log_eps)
    losses, weights = preference_loss(args, pc, pr, rc, rr, *lengths.unbind(1), power)
    p10, p50, p90 = torch.quantile(log_weights, log_weights.new_tensor([0.1, 0.5, 0.9]))
    metrics = {
        "loss": (weights * losses).mean(),
        "loss/unweighted": losses.mean(),
        "rewards/chosen": args.beta * rho_w.mean(),
        "rewards/rejected": args.beta * rho_l.mean(),
        "rewards/margins": args.beta * (rho_w - rho_l).mean(),
        "rewards/accuracies": (rho_w > rho_l).float().mean(),
        "logps/chosen": pc.mean(),
        "logps/rejected": pr.mean(),
        "ratio/chosen": rho_w.mean(),
        "ratio/rejected": rho_l.mean(),
        "weights/mean": weights.mean(),
        "weights/ess": weights.sum() ** 2 / (weights**2).sum(),
        "weights/capped": (log_weights >= 2 * args.log_eps).float().mean(),
        "weights/power": torch.tensor(power),
        "weights/log_p10": p10,
        "weights/log_p50": p50,
        "weights/log_p90": p90,
    }
    if args.loss == "chi_po":
        logits = chi_po_logits(pc, pr, rc, rr, beta=args.beta)
        metrics["chi/clipped"] = (logits.abs() >= 2 * args.r_max).float().mean()
    return {name: value.item() for name, value in metrics.items()}


# ----------------------------------------------------------------------------------------------------------- the flags
HERE = Path(__file__).resolve().parent
PAPER = dict(model="out/sft-tldr+hh/final", max_length=640, max_prompt_length=512, batch_size=64, micro_batch_size=4,
             lr=1e-6, warmup_steps=100, beta=0.05, save_every=200, eval_every=200, keep_state=1)  # Appendix C
PRESETS = {
    "toy": dict(model=f"{HERE}/toy/sft", data=f"{HERE}/toy/truth_pairs.jsonl.gz", epochs=2, max_length=128,
                eval_data=f"{HERE}/toy/truth_pairs_eval.jsonl.gz", max_prompt_length=96, batch_size=32, lr=2e-4,
                micro_batch_size=8, warmup_steps=30, beta=0.01, save_every=32, eval_every=32, threads=1),
    "paper": dict(PAPER, eval_data="", epochs=1),
    "tldr": dict(PAPER, data="tldr", eval_data="tldr", epochs=2),
    "hh": dict(PAPER, data="hh", eval_data="hh", epochs=1, checkpoint_activations=True),
    "ultrafeedback": dict(PAPER, data="ultrafeedback", eval_data="ultrafeedback", epochs=1, checkpoint_activations=True,
                          model="meta-llama/Llama-3.2-3B-Instruct"),
}
# Hub datasets that a name stands for: id, train split, held-out split, the columns read (a prompt may be implicit).
RECIPES = {
    "tldr": ("trl-lib/tldr-preference", "train", "validation[:1024]", ("prompt", "chosen", "rejected")),
    "hh": ("Anthropic/hh-rlhf", "train", "test[:1024]", ("chosen", "rejected")),
    "ultrafeedback": ("HuggingFaceH4/ultrafeedback_binarized", "train_prefs", "test_prefs[:1024]",
                      ("chosen", "rejected")),  # the prompt is their first message
}


def parse_args(argv=None):
    parser = Parser(description="Preference training: IS-DPO, IS-IPO, DPO, IPO, RPO, chi-PO, length-DPO.")
    add = parser.add_argument_group("the loss").add_argument
    add("--loss", choices=list(LOSS_FLAGS), default="is_dpo", help="README has the table")
    add("--beta", type=float, help="KL strength, > 0: smaller lets the policy move further")
    add("--log_eps", type=float, default=1.0, help="is_*: nats each response's log-ratio may spend before the weight is"
        " capped, twice that for the pair; inf: no cap")
    add("--ess_target", type=float, default=0.0, help="is_*: least effective sample size of a step, as a share of its"
        " pairs, kept by a power <= 1 of the weights; costs a forward more a step; 0: off")
    add("--eta", type=float, default=0.005, help="rpo: weight of the chosen log-prob, times beta")
    add("--alpha", type=float, default=0.01, help="length_dpo: reward a token of length difference")
    add("--r_max", type=float, default=10.0, help="chi_po: R, the logits are clipped to +-2R")
    add("--label_smoothing", type=float, default=0.0, help="dpo, is_dpo: chance of a flipped label, below 0.5; 0: off")
    add("--length_average", action="store_true", help="ipo, is_ipo, rpo: token means instead of sums")
    add("--ref", help="reference policy: directory or Hub id (None: the --model given)")
    add("--shared_prompt", action=argparse.BooleanOptionalAction, default=True, help="compute a pair's prompt once;"
        " --no-shared_prompt runs two plain rows: the same result at up to twice the cost")
    add("--kernel", choices=["auto", "triton", "torch"], default="auto", help="log-prob kernel; auto: triton on a GPU")
    common_flags(parser)
    args = parse_with_preset(parser, PRESETS, argv, positive={"beta", "r_max"}, signed={"alpha", "log_eps"})
    for flag, fits, range_ in (("ess_target", args.ess_target < 1, "in [0, 1)"),
                               ("label_smoothing", args.label_smoothing < 0.5, "in [0, 0.5)"),
                               ("alpha", math.isfinite(args.alpha), "finite"),
                               ("log_eps", args.log_eps > -math.inf, "a number or inf")):
        if not fits:
            parser.error(f"--{flag} {getattr(args, flag)}: must be {range_}")
    for flag in sorted(set().union(*LOSS_FLAGS.values()) - LOSS_FLAGS[args.loss]):
        if getattr(args, flag) != parser.get_default(flag):
            parser.error(f"--{flag} {getattr(args, flag)} is not read by --loss {args.loss}: leave it out")
    args.out = args.out or f"out/{args.preset}-{args.loss}-beta{args.beta:g}-seed{args.seed}"
    return args


# ------------------------------------------------------------------------------------------- batches, reference, a step
def collate_pairs(pairs, shared_prompt, device):
    """Pairs -> the arguments of Llama.forward; sequences come out as chosen, rejected of each pair in turn. The last
    prompt token predicts the first token of both responses."""
    rows, places = pair_rows(pairs, shared_prompt)
    predict, targets, cu_seqlens = [], [], [0]  # predict: (row, column) of the token before each target
    for k, (row, start, response) in enumerate(places):
        columns = [len(pairs[k // 2].prompt) - 1, *range(start, start + len(response) - 1)]
        predict += [(row, column) for column in columns]
        targets += response
        cu_seqlens.append(len(targets))
    return batch_tensors(rows, predict, device, targets=targets, cu_seqlens=cu_seqlens)


@torch.no_grad()
def all_logps(policy, pairs, args, rank, world, device, desc=None):
    """Summed log-probs of every pair (P, 2) in nats, float32, on every rank: chosen, rejected. The training's path."""
    logps = torch.zeros(len(pairs), 2, device=device)
    rounds = deal([sum(map(len, pair)) for pair in pairs], args.micro_batch_size, world)
    for micro in tqdm(rounds, desc=desc, disable=rank > 0 or not sys.stderr.isatty(), leave=False):
        picked = micro[rank] or [0]  # an idle rank computes pair 0, so that sharded collectives match
        result = policy(**collate_pairs([pairs[i] for i in picked], args.shared_prompt, device))[0].view(-1, 2)
        if micro[rank]:
            logps[to_device(picked, device)] = result
    dist.all_reduce(logps)  # each pair was written by one rank: a sum with zeros is exact
    return logps.cpu()


def reference_logps(path, key, index, compute):
    """The reference's log-probs (P, 2): chosen, rejected, of the data rows `index` (P,). Computed once, by the path
    that training takes, and read from their file ever after. Raises UserError: of something else, or damaged."""
    if not on_rank_0(path.exists):
        logps = compute()
        bad = (~logps.isfinite().all(1)).nonzero().flatten().tolist()
        if bad:
            raise UserError(f"the reference gives data row {index[bad[0]].item()} the log-probs"
                            f" {logps[bad[0]].tolist()}: its weights are broken")
        chosen, rejected = logps.T.contiguous()
        tensors = dict(chosen=chosen, rejected=rejected.clone(), index=index.clone())
        on_rank_0(lambda: write_tensors(path, tensors, key))
    tensors, _ = read_tensors(path, key)
    if not torch.equal(tensors["index"], index):
        raise UserError(f"{path} is of other data rows than this run's: delete it, or give another --out")
    return torch.stack([tensors["chosen"], tensors["rejected"]], 1)


def train_step(policy, optimizer, pairs, ref_logps, args, rank, world, device):
    """One optimizer step on a batch of pairs (all ranks hold the whole batch) and its ref_logps (B, 2).
    -> logps (B, 2) of the whole batch before the step, lengths (B, 2) in tokens, global gradient norm before clipping,
    and whether the update was finite and applied."""
    B = len(pairs)
    logps, ref_logps = torch.zeros(B, 2, device=device), to_device(ref_logps, device)
    lengths = to_device([[float(len(p.chosen)), float(len(p.rejected))] for p in pairs], device)
    rounds, power = deal([sum(map(len, pair)) for pair in pairs], args.micro_batch_size, world), 1.0
    if args.ess_target:  # the log-ratios of the whole step first, by the same micro-batches: a forward more, and exact
        log_weights = (all_logps(policy, pairs, args, rank, world, device) - ref_logps.cpu()).sum(1)
        power = ess_power(log_weights, ess_target=args.ess_target, log_eps=args.log_eps)
    for k, micro in enumerate(rounds):
        picked = micro[rank] or [0]  # an idle rank computes pair 0, times 0, so that collectives match
        # DDP sums the ranks' gradients once, with the last micro-batch; FSDP2 each time, as it keeps only its shard.
        policy.require_backward_grad_sync = k == len(rounds) - 1
        batch = collate_pairs([pairs[i] for i in picked], args.shared_prompt, device)
        index = to_device(picked, device)
        micro_logps = policy(**batch)[0].view(-1, 2)
        columns = (*micro_logps.unbind(1), *ref_logps[index].unbind(1), *lengths[index].unbind(1))
        losses, weights = preference_loss(args, *columns, power)
        loss = (weights * losses).sum() * (world / B)  # DDP and FSDP2 average over ranks: the sum / B remains
        (loss if micro[rank] else 0.0 * loss).backward()
        if micro[rank]:
            logps[index] = micro_logps.detach()
    dist.all_reduce(logps)  # each pair was written by one rank: a sum with zeros is exact
    grad_norm, applied = clip_and_step(policy, optimizer, args.grad_clip, logps.isfinite().all())
    return logps, lengths, grad_norm, applied


# ------------------------------------------------------------------------------------------------------------- the run
def main():
    args = parse_args()
    rank, world, device = start(args.seed, args.timeout, args.threads)
    out, model_dir = Path(args.out), find_model(args.model)
    ref_dir = find_model(args.ref) if args.ref else model_dir

    # A new run, or one to go on with
    header = on_rank_0(lambda: run_header("train_pref", args, world, device, dict(model=model_dir, ref=ref_dir)))
    resumed = on_rank_0(lambda: checkpoint_to_resume(out, header))
    if resumed == out / "final":
        say(f"{resumed} exists: this run is complete. To train on: another --out, --model {resumed} --ref {ref_dir}")
        return 0
    on_rank_0(lambda: open_tracker(args.track, out, header["args"]))
    begin_dir = resumed or model_dir

    # Data
    tokenizer, config, ref_config = load_tokenizer(model_dir), read_config(begin_dir), read_config(ref_dir)
    vocab_size = min(config.vocab_size, ref_config.vocab_size)
    if args.max_length > config.max_position_embeddings:
        say(f"warning: --max_length {args.max_length}, but {model_dir} has {config.max_position_embeddings} positions")
    limits = (tokenizer, vocab_size, args.max_length, args.max_prompt_length)
    pairs = load_rows(out / "data.safetensors", header, Pair, split_pair, args.data, False, RECIPES, *limits)
    eval_path = out / "data_eval.safetensors"
    eval_pairs = load_rows(eval_path, header, Pair, split_pair, args.eval_data, True, RECIPES, *limits)
    steps_per_epoch = math.ceil(len(pairs) / args.batch_size)
    total = min(args.epochs * steps_per_epoch, args.max_steps or math.inf)
    cap = f"{2 * args.log_eps:g}" if args.loss in ("is_dpo", "is_ipo") else "none"
    header |= dict(pairs=len(pairs), steps=total, weight_cap_nats=cap)

    # Reference log-probs, computed once, by the path that training takes; --max_steps may end before all pairs are seen
    @functools.cache
    def load(directory):
        how = (device, args.precision, args.shard, args.compile, args.checkpoint_activations)
        return load_weights(build(lambda: Llama(read_config(directory), args.kernel), *how), directory)

    def reference(path, of_pairs, index):
        key = f"{header['ref']}-{header['data']}-{args.precision}"
        of = (of_pairs, args, rank, world, device, "reference log-probs")
        return reference_logps(path, key, index, lambda: all_logps(load(ref_dir), *of))

    reached = sorted(epoch_order(len(pairs), args.seed, 0)[: total * args.batch_size])
    ref_logps = torch.full((len(pairs), 2), math.nan)
    ref_logps[reached] = reference(out / "ref_logps.safetensors", Subset(pairs, reached), pairs.index[reached])
    if eval_pairs:
        eval_ref_logps = reference(out / "ref_logps_eval.safetensors", eval_pairs, eval_pairs.index)
        eval_lengths = torch.tensor([[float(len(p.chosen)), float(len(p.rejected))] for p in eval_pairs])

    # Policy and optimizer
    if begin_dir != ref_dir:
        load.cache_clear()  # one model in memory at a time
    policy = load(begin_dir)
    files = model_files(begin_dir, tokenizer)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, eps=1e-5, weight_decay=0.0, fused=True)  # Appendix C
    state = dict(step=0, updates=0, num_tokens=0, skipped=0, skipped_in_a_row=0, spread="")
    if resumed:
        state = load_trainer(resumed, policy, optimizer)
        say(f"resumed from {resumed}{state['spread']}")
    first = collate_pairs([pairs[0]], args.shared_prompt, device)
    model = policy
    if world > 1 and not args.shard:
        model = data_parallel(policy, lambda model: model(**first)[0].sum())
    say(f"{args.loss}: {sum(p.numel() for p in policy.parameters()) / 1e6:.2f}M parameters, {len(pairs)} pairs, {total}"
        f" steps of {args.batch_size}, beta {args.beta:g}, weight cap {cap} nats, {world} x {header['device']},"
        f" {args.precision} -> {out}")
    if args.warmup_steps >= total:
        say(f"--warmup_steps {args.warmup_steps} would not end within {total} steps: {total // 10} instead")

    metrics_file = open_metrics(out / "metrics.jsonl", header, resumed) if rank == 0 else None
    began, faint, signals = time.perf_counter(), 0, []
    catch_signals(signals)
    bar = tqdm(total=total, initial=state["step"], disable=rank > 0 or not sys.stderr.isatty(), unit="step")
    for step in range(state["step"] + 1, total + 1):
        step_began = time.perf_counter()
        epoch, k = divmod(step - 1, steps_per_epoch)
        picked = epoch_order(len(pairs), args.seed, epoch)[k * args.batch_size : (k + 1) * args.batch_size]
        batch = [pairs[i] for i in picked]
        lr = learning_rate(step, total, args.warmup_steps, args.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        ref = ref_logps[picked]
        logps, lengths, grad_norm, applied = train_step(model, optimizer, batch, ref, args, rank, world, device)

        # Log
        step_s = time.perf_counter() - step_began
        n_tokens = sum(2 * len(p.prompt) + len(p.chosen) + len(p.rejected) for p in batch)  # as TRL counts
        if step == 1 and ref_dir == model_dir:  # the policy is the reference still: what differs is rounding
            spread = (logps.cpu() - ref).abs().max().item()
            state["spread"] = f"; before step 1 |log pi - log ref| was at most {spread:.1e} nats: rounding"
            say(state["spread"].removeprefix("; "))
        state |= dict(step=step, updates=state["updates"] + applied, num_tokens=state["num_tokens"] + n_tokens,
                      skipped=state["skipped"] + (not applied),
                      skipped_in_a_row=0 if applied else state["skipped_in_a_row"] + 1)
        metrics = preference_metrics(args, logps, ref.to(device), lengths)
        metrics |= {"grad_norm": grad_norm, "learning_rate": lr, "epoch": step / steps_per_epoch,
                    "num_tokens": state["num_tokens"], "skipped": state["skipped"], "tokens_per_s": n_tokens / step_s,
                    "step_s": step_s, "mem_gb": peak_memory_gb()}
        if args.eval_every and eval_pairs and (step % args.eval_every == 0 or step == total):
            eval_logps = all_logps(policy, eval_pairs, args, rank, world, device, "evaluation")
            evaluated = preference_metrics(args, eval_logps, eval_ref_logps, eval_lengths)
            metrics |= {f"eval_{name}": value for name, value in evaluated.items()}
        if rank == 0:
            write_metrics(metrics_file, step, metrics)
            if args.track != "none":
                sys.modules[args.track].log(metrics, step=step)
            if step % args.log_every == 0 or step == total or not applied:
                say(step_line(step, total, metrics, applied))
            bar.update()
        faint = faint + 1 if metrics["weights/mean"] < 0.01 or metrics["weights/ess"] < 0.02 * len(batch) else 0
        if faint == 10:
            say("warning: for 10 steps the mean weight was under 0.01 or the ESS under 2% of the pairs: the policy has"
                " left the pairs behind and learns next to nothing from them; lower --lr or raise --beta")

        # Save, stop
        signum = torch.tensor(signals[0][0] if signals else 0, device=device)
        dist.all_reduce(signum, op=dist.ReduceOp.MAX)  # that any rank was sent
        signum, diverged = signum.item(), state["skipped_in_a_row"] == 10
        if signum or diverged or (args.save_every and step % args.save_every == 0):
            state["skipped_in_a_row"] %= 10  # whoever goes on after a divergence has ten more
            save_checkpoint(out / f"step_{step:06d}", policy, tokenizer, files, args.save_dtype, optimizer, state)
            on_rank_0(lambda: prune(out, args.keep, args.keep_state))
        if diverged:
            raise UserError(f"10 steps in a row had a loss or gradient that is not finite, up to step {step}: lower"
                            f" --lr, or look at the data; {out}/step_{step:06d} holds the last good step's weights")
        if signum:
            say(f"stopped by signal {signum} after step {step}; the same command goes on from there")
            return 128 + signum

    bar.close()
    save_checkpoint(out / "final", policy, tokenizer, files, args.save_dtype)
    say(f"done: {total} steps in {time.perf_counter() - began:.0f} s; policy in {out}/final")
    evaluate, where = (shlex.quote(str(path)) for path in (HERE / "evaluate.py", out.resolve()))
    judge = f"--rm REWARD_MODEL --ref {shlex.quote(str(ref_dir.resolve()))} --data HELD_OUT"
    judge = "--preset toy" if args.preset == "toy" else judge
    say(f"next: python {evaluate} golden {judge} {where} && python {evaluate} plot {where} --out {where}/figs")
    return 0


def step_line(step, total, m, applied):
    """What the screen says of a step."""
    accuracy = f"{m['rewards/accuracies']:.2f}" if step > 1 else "-"  # before step 1 it is that of rounding
    line = (f"step {step}/{total} | loss {m['loss']:.4f} | unweighted {m['loss/unweighted']:.4f}"
            f" | acc {accuracy} | margin {m['rewards/margins']:+.4f}"
            f" | weight {m['weights/mean']:.3f} | ess {m['weights/ess']:.1f} | norm {m['grad_norm']:.3f}"
            f" | lr {m['learning_rate']:.2e} | {1e3 * m['step_s']:.0f} ms | {m['tokens_per_s']:.0f} tok/s")
    if "eval_loss" in m:
        line += f" || held out: loss {m['eval_loss']:.4f} acc {m['eval_rewards/accuracies']:.3f}"
    return line if applied else line + " | NOT FINITE: skipped"


# ================================================================================= Shared by the scripts: read it once
# --- shared: run (train_sft, train_rm, train_pref, evaluate) ---
class UserError(ValueError):
    """A mistake its user can mend: said once, in one line, without a traceback. Exit code 1, a wrong flag's 2."""

    code = 1


class Parser(argparse.ArgumentParser):
    """argparse, but a wrong flag is said by one rank, once."""

    def __init__(self, **kwargs):
        super().__init__(**dict(usage="python %(prog)s [flags]", allow_abbrev=False) | kwargs)

    def error(self, message):
        wrong = UserError(f"{message} (--help lists the flags)")
        wrong.code = 2
        raise wrong


def check_ranges(parser, args, positive, signed=()):
    """Numbers must be finite and at least 0; those of the flags `positive` above 0; `signed` ones are not looked at."""
    for flag, value in vars(args).items():
        most = 2**63 if type(value) is int else math.inf
        unfit = type(value) in (int, float) and flag not in signed and not 0 <= value < most
        if unfit or flag in positive and value == 0:
            parser.error(f"--{flag} {value}: must be {'above' if flag in positive else 'at least'} 0 and finite")


def say(line):
    """Print on rank 0, above the progress bar. A screen that is gone (| head, a closed terminal) stops nothing."""
    try:
        if int(os.environ.get("RANK", 0)) == 0:
            tqdm.write(line)
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def guard(main):
    """Run main and turn a user's mistake into one line. Ranks above 0 let rank 0 speak first: torchrun ends them when
    it exits; if rank 0 saw nothing wrong, they speak for themselves."""
    code = None
    try:
        code = main()  # returns, and does not raise, its code: what a traceback keeps alive hangs at exit, now and then
    except (UserError, OSError, SafetensorError) as error:
        time.sleep(5 if int(os.environ.get("RANK", 0)) else 0)
        print("error:", " ".join(str(error).split()), file=sys.stderr, flush=True)
        get_error_handler().record_exception(error)  # torchrun's last lines repeat it
        os._exit(getattr(error, "code", 1))  # no clean-up that would wait for other ranks
    except KeyboardInterrupt:  # before training there is nothing to save
        os._exit(130)
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)


def start(seed, timeout, threads):
    """Join the process group -> rank, world, device. Without torchrun it is a group of one."""
    if "TORCHELASTIC_RUN_ID" in os.environ:  # PR_SET_PDEATHSIG: a worker whose torchrun was killed must not train on
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    torch.set_num_threads(threads or torch.get_num_threads())
    torch.manual_seed(seed)
    # cuDNN's attention can give NaN gradients under a mask (pytorch issue 196678) and plans anew for every shape.
    torch.backends.cuda.enable_cudnn_sdp(False)
    local_rank, cuda = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.is_available()
    if cuda and local_rank >= torch.cuda.device_count():
        raise UserError(f"local rank {local_rank}, but {torch.cuda.device_count()} GPUs: lower --nproc_per_node")
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(seconds=timeout), **alone)
    return dist.get_rank(), dist.get_world_size(), device


def on_rank_0(function):
    """Run it on rank 0 and give its result, or what it says is wrong, to every rank."""
    box = [None]
    if dist.get_rank() == 0:
        try:
            box = [function()]
        except (UserError, OSError, SafetensorError) as error:
            box = [UserError(str(error))]
    dist.broadcast_object_list(box)
    if isinstance(box[0], UserError):
        raise box[0]
    return box[0]


HELD = {}  # files whose locks last as long as the process, however it ends


def lock(path):
    """Keep other processes from writing `path`, a file or a directory. Raises UserError saying who does already."""
    if path in HELD:
        return
    file = open(path / ".lock" if path.is_dir() else path.with_name(f".{path.name}.lock"), "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise UserError(f"{path} is being written by {file.read()}: wait for it, or choose another --out") from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    HELD[path] = file
# --- end shared: run ---


# --- shared: flags (train_sft, train_rm, train_pref) ---
def common_flags(parser):
    """The flags every trainer has. An example is a pair or a demonstration."""
    add = parser.add_argument_group("what to train on").add_argument
    add("--preset", help="a set of defaults; a flag given wins (toy, or paper if --model or --data is given)")
    add("--model", help="start: model directory, Hub id or, in train_sft.py, a config.json: random weights (preset)")
    add("--data", help="training data: .jsonl, .json, .csv, .parquet, recipe name or Hub id; a+b pools two (preset)")
    add("--eval_data", help="held-out data, likewise; '' for none (preset)")
    add("--max_length", type=int, help="tokens of prompt + response at most (preset)")
    add("--max_prompt_length", type=int, help="tokens of the prompt, which keeps its end, at most (preset)")
    add = parser.add_argument_group("the run").add_argument
    add("--out", help="run directory; run again with it to resume (named after the flags, in out/)")
    add("--seed", type=int, default=0, help="seed of the data order and of random weights (0)")
    add("--epochs", type=int, help="passes over the data (preset)")
    add("--max_steps", type=int, default=0, help="stop after this many optimizer steps; 0: no limit")
    add("--batch_size", type=int, help="examples per optimizer step, over all ranks (preset)")
    add("--lr", type=float, help="peak learning rate; cosine to a tenth of it (preset)")
    add("--warmup_steps", type=int, help="optimizer steps of linear warm-up; 0: none (preset)")
    add("--grad_clip", type=float, default=1.0, help="largest global gradient norm; 0: no clipping (1.0)")
    add("--save_every", type=int, help="optimizer steps between checkpoints; 0: only on a signal (preset)")
    add("--keep", type=int, default=0, help="newest checkpoints kept; 0: all")
    add("--keep_state", type=int, default=0, help="newest checkpoints that keep optimizer state; 0: all (preset)")
    add("--save_dtype", choices=["fp32", "bf16"], default="fp32", help="of saved models; what resumes is fp32")
    add("--eval_every", type=int, help="optimizer steps between evaluations on --eval_data; 0: never (preset)")
    add("--log_every", type=int, default=1, help="steps between lines on screen; metrics.jsonl has all (preset)")
    add("--track", choices=["none", "wandb", "trackio"], default="none", help="a dashboard besides metrics.jsonl")
    add = parser.add_argument_group("the hardware").add_argument
    add("--micro_batch_size", type=int, help="rows per rank per forward; lower it when memory runs out (preset)")
    add("--precision", choices=["bf16", "fp32"], default="bf16" if torch.cuda.is_available() else "fp32",
        help="of the products (bf16 on a GPU); weights, optimizer state, log-probs and rewards are float32 always")
    add("--compile", action="store_true", help="torch.compile the layers: the first steps take minutes")
    add("--shard", action=argparse.BooleanOptionalAction, help="FSDP2: weights, gradients and optimizer state divided"
        " by the ranks; --no-shard: DDP (preset)")
    add("--checkpoint_activations", action=argparse.BooleanOptionalAction, help="recompute layers in backward: less"
        " memory (preset)")
    add("--threads", type=int, default=0, help="CPU threads a rank; 0: torch's own choice (preset)")
    add("--timeout", type=int, default=1800, help="seconds after which a rank that hangs ends the run (1800)")


def parse_with_preset(parser, presets, argv, positive=(), signed=()):
    """Parse twice: the first pass finds the preset, whose values are the defaults of the second. A model or data of
    one's own begins from the paper's recipe: the toy's learning rate and lengths would spoil it unnoticed."""
    for name, values in presets.items():
        parser.add_argument_group(f"--preset {name}", ", ".join(f"{flag} {value}" for flag, value in values.items()))
    given = parser.parse_known_args(argv)[0]
    preset = ("paper" if given.model or given.data else "toy") if given.preset is None else given.preset
    if preset not in presets:
        parser.error(f"--preset {preset}: one of {', '.join(presets)}")
    parser.set_defaults(**presets[preset] | dict(preset=preset))
    args = parser.parse_args(argv)
    if not args.model or not args.data:
        parser.error("--model and --data must be given: a directory, file, recipe or Hub id, or another --preset")
    counts = {"epochs", "batch_size", "micro_batch_size", "max_length", "max_prompt_length", "log_every", "timeout"}
    check_ranges(parser, args, counts | {*positive}, signed)
    if args.max_prompt_length >= args.max_length:
        parser.error(f"--max_prompt_length {args.max_prompt_length} leaves no room in --max_length {args.max_length}")
    return args
# --- end shared: flags ---


# --- shared: log (train_sft, train_rm, train_pref) ---
def catch_signals(caught):
    """After SIGTERM, SIGINT, SIGUSR1 or SIGHUP, put into the list `caught` with its time, the step ends and all ranks
    save. A second one exits at once, unless within a second: torchrun passes a Ctrl-C on to workers that had it."""
    def handle(signum, frame):
        caught.append((signum, time.monotonic()))
        if caught[-1][1] - caught[0][1] > 1:
            os._exit(128 + signum)

    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:  # nohup means: go on
            signal.signal(signum, handle)


def run_header(script, args, world, device, models):
    """What a run must say of itself, the first line of metrics.jsonl, with fingerprints of its models {role: directory}
    and of its data, as cut (a Hub dataset is known by its name)."""
    commit = subprocess.run(["git", "-C", HERE, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    parts = dict.fromkeys([args.data, args.eval_data, *args.data.split("+"), *args.eval_data.split("+")])
    data = [file_sha256(part) if Path(part).is_file() else part for part in parts]
    data = json.dumps([data, args.max_length, args.max_prompt_length, str(TODAY)])
    once = {directory: fingerprint(directory) for directory in {*models.values()}}  # a reference is mostly the model
    prints = dict(chat_date=str(TODAY)) | {role: once[directory] for role, directory in models.items()}
    prints["data"] = hashlib.sha256(data.encode()).hexdigest()[:16]
    versions = dict(torch=torch.__version__, python=sys.version.split()[0])
    return dict(script=script, args=vars(args), commit=commit, versions=versions, device=name, world=world) | prints


def open_tracker(kind, out, args):
    """Begin a run on the dashboard asked for, before any work is done. wandb and trackio have one interface."""
    if kind != "none":
        try:
            importlib.import_module(kind).init(project="is-daa", name=out.name, config=args)
        except Exception as error:  # not installed, no key, no network: classes of their own
            raise UserError(f"--track {kind}: {error}; it needs `pip install {kind}` and its key") from None


def open_metrics(path, header, resumed):
    """metrics.jsonl, ready for the lines after those of the checkpoint `resumed`: later ones will be written again, the
    same. Line 0 is the header, line k step k."""
    lines = [json.dumps(header)]
    if resumed:
        step = int(resumed.name.removeprefix("step_"))
        lines = path.read_text().split("\n")[: step + 1]
        if not lines[-1].startswith(f'{{"step": {step},'):
            raise UserError(f"{path} does not hold steps 1 to {step}, a line each: restore it, or choose another --out")
    write_aside(path, lambda aside: aside.write_text("\n".join(lines) + "\n"))
    return path.open("a", buffering=1)


def write_metrics(file, step, metrics):
    """One JSON line. JSON has no NaN: what is not finite is null."""
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
    try:
        file.write(json.dumps({"step": step} | clean) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {file.name}: {error}") from None


def peak_memory_gb():
    """Of the GPU's allocator, or resident on CPU (ru_maxrss is in KiB on Linux)."""
    on_cpu = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else on_cpu) / 1e9
# --- end shared: log ---


# --- shared: data (train_sft, train_rm, train_pref, evaluate) ---
class SkipRow(Exception):
    """This data row cannot be used; the message is the kind it is counted under."""


def count(kinds, kind, where):
    """One more of a kind; the place of the first is kept."""
    kinds.setdefault(str(kind), [0, where])[0] += 1


def counted(kinds):
    return ", ".join(f"{n} {kind} (first {where})" for kind, (n, where) in kinds.items()) or "none"


def read_rows(source, held_out, recipes):
    """Yield (where, row) of JSON, .csv or .parquet files, recipes' names, Hub ids or directories; `a+b` pools."""
    for part in [source] if Path(source).exists() else source.split("+"):
        if part.endswith((".jsonl", ".json", ".gz")):
            yield from read_jsonl(Path(part))
            continue
        name, train, test, columns = recipes.get(part, (part, "train", "test", None))
        kind = Path(part).suffix.removeprefix(".")
        try:
            load_dataset = importlib.import_module("datasets").load_dataset
            if kind in ("csv", "parquet"):
                rows = load_dataset(kind, data_files=part, split="train")
            else:
                rows = load_dataset(name, split=test if held_out else train)
            rows = rows.select_columns(list(columns)) if columns else rows
        except Exception as error:  # not installed, not there: `datasets` has classes of its own
            raise UserError(f"{part}: no JSON file or recipe ({', '.join(recipes)}), and `datasets` (pip install"
                            f" datasets) cannot read it: {error}") from None
        yield from ((f"{part}[{number}]", row) for number, row in enumerate(rows))


def read_jsonl(path):
    """Yield ("file:line", object) of a file of JSON lines or of one JSON array. Lines end at line feeds only: U+2028
    may stand inside a string. By hand, not by `datasets`: it names no line, and refuses a file for one row."""
    number = 0
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            first = file.readline().strip()
            file.seek(0)
            for number, line in enumerate([file.read()] if first[:1] == b"[" and first[-1:] != b"]" else file, 1):
                if line.strip():
                    rows = json.loads(line)
                    is_array = isinstance(rows, list) and any(isinstance(row, dict) for row in rows)
                    for row in rows if is_array else [rows]:
                        yield f"{path}:{number}", row if isinstance(row, dict) else {}
    except (ValueError, RecursionError) as error:  # json.JSONDecodeError, UnicodeDecodeError
        raise UserError(f"{path}:{number}: not JSON: {error}") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: broken after line {number}: {error}") from None
# --- end shared: data ---


# --- shared: tokenizer (train_sft, train_rm, train_pref, evaluate) ---
TODAY = date(2024, 7, 26)  # for templates that write it (Llama 3.2's own default): a run is the same on any day


def load_tokenizer(directory):
    """The tokenizer of a model directory: AutoTokenizer, or for a directory with nothing but Meta's tokenizer.model
    (tiktoken's format) the same ids through transformers' converter, whose split pattern is Llama 3's."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    names = ["begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1",
             "finetune_right_pad_id", "step_id", "start_header_id", "end_header_id", "eom_id", "eot_id", "python_tag",
             "image", *(f"reserved_special_token_{k}" for k in range(2, 246))]  # 256 in all
    bos, eos, *_ = special = [f"<|{name}|>" for name in names]
    meta = directory / "tokenizer.model"
    os.environ["TIKTOKEN_CACHE_DIR"] = ""  # its cache goes by path: it would miss that another file stands there now
    try:
        if meta.exists() and not list(directory.glob("tokenizer*.json")):
            backend = TikTokenConverter(str(meta), extra_special_tokens=special).converted()
            bos_id = backend.token_to_id(bos)
            backend.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, bos_id)])
            tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos)
        else:
            tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a broken file leads to; `tokenizers` itself raises no other class
        raise UserError(f"{directory}: no tokenizer that transformers can load (a SentencePiece model needs its"
                        f" tokenizer.json): {error}") from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"{directory}: the tokenizer has no EOS token; set eos_token in tokenizer_config.json")
    return tokenizer


def encode(tokenizer, texts, vocab_size):
    """Texts -> lists of ids, without BOS and EOS. Special tokens written in the text are parsed, as everywhere in
    transformers: prompts come already rendered. Raises UserError for an id that the model does not have."""
    ids = tokenizer([*texts, ""], add_special_tokens=False, verbose=False)["input_ids"][: len(texts)]
    largest = max(tokenizer.eos_token_id, tokenizer.bos_token_id or 0, *map(max, filter(None, ids)), 0)
    if largest >= vocab_size:
        raise UserError(f"token id {largest} is outside the model's vocabulary of {vocab_size}: the tokenizer belongs"
                        " to another model")
    return ids


def encode_after(tokenizer, befores, texts, vocab_size):
    """Ids that texts have after what stands before them: SentencePiece begins a text on its own with a space. Where the
    two merge across their border: after a line break; where that merges too, on its own."""
    befores = [before[-64:] for before in befores]  # its last words decide, at a fraction of a long prompt's cost
    heads = encode(tokenizer, befores, vocab_size)
    found = encode(tokenizer, [before + text for before, text in zip(befores, texts)], vocab_size)
    for k, (head, ids) in enumerate(zip(heads, found)):
        for before in ("\n", ""):
            if ids[: len(head)] != head:
                head, ids = encode(tokenizer, [before, before + texts[k]], vocab_size)
        found[k] = ids[len(head) :]
    return found


def stop_ids(tokenizer):
    """The ids that may end a response: special tokens that neither begin a text nor stand for padding or unknowns."""
    special = {k for k, token in tokenizer.added_tokens_decoder.items() if token.special}
    return special - {tokenizer.bos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id} | {tokenizer.eos_token_id}


def cut_prompt(ids, tokenizer, limit):
    """One BOS, if the tokenizer has one, then the prompt's end, at most `limit` ids -> ids, how many were cut."""
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = ids[1:] if bos and ids[:1] == bos else ids  # a chat template may have written it
    excess = max(0, len(bos) + len(ids) - limit)
    return bos + ids[excess:], excess


def end_response(ids, tokenizer, stops):
    """A response ends with the stop that the template or the sampler put there; EOS where there is none."""
    ids = ids if ids and ids[-1] in stops else ids + [tokenizer.eos_token_id]
    if len(ids) == 1:
        raise SkipRow("empty response")
    return ids


def apply_template(tokenizer, messages, tools, **kwargs):
    """Messages as the text that the chat template gives. Raises SkipRow; UserError if there is no template."""
    if tokenizer.chat_template is None:
        raise UserError("the data is conversational, but the tokenizer has no chat template: use an instruct model's"
                        " tokenizer, or data with text prompts")
    try:
        kwargs["tools"] = (json.loads(tools or "null") if isinstance(tools, str) else tools) or None
        template = re.sub(r"""strftime_now\((["'])(.*?)\1\)""", lambda call: repr(TODAY.strftime(call[2])),
                          tokenizer.get_chat_template(tools=kwargs["tools"]))
        return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **kwargs)
    except Exception as error:  # a template is a program: it may raise anything
        raise SkipRow(f"refused by the chat template ({' '.join(str(error).split())[:80]})") from None


def render_chat(tokenizer, prompt, response, tools=None):
    """Lists of {role, content} -> prompt text, response text by the tokenizer's chat template, up to the stop that
    ends the turn. Raises SkipRow; UserError if there is no template."""
    messages = prompt + response
    if not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages) or not all(
            isinstance(m.get("content"), str) or m.get("tool_calls") for m in messages):
        raise SkipRow("wrong types")
    if not prompt or not response or response[0]["role"] != "assistant":
        raise SkipRow("prompt mismatch")
    if not any((m.get("content") or "").strip() or m.get("tool_calls") for m in response):
        raise SkipRow("empty response")
    prompt_text = apply_template(tokenizer, prompt, tools, add_generation_prompt=True)
    text = apply_template(tokenizer, messages, tools)
    if not text.startswith(prompt_text):
        raise SkipRow("chat template does not continue the prompt")
    stops = tuple(tokenizer.convert_ids_to_tokens(sorted(stop_ids(tokenizer))))
    text = text[len(prompt_text) :]
    return prompt_text, text.rstrip() if text.rstrip().endswith(stops) else text


def template_stop(tokenizer):
    """The id that ends an assistant's turn in the chat template; EOS where there is no template or it writes none."""
    try:
        _, text = render_chat(tokenizer, [dict(role="user", content="a")], [dict(role="assistant", content="b")])
    except (SkipRow, UserError):
        return tokenizer.eos_token_id
    return end_response(tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer, stop_ids(tokenizer))[-1]
# --- end shared: tokenizer ---


# --- shared: rows (train_sft, train_rm, train_pref) ---
class TokenRows:
    """Data rows as token ids, memory-mapped: rows[i] is a `kind` (Pair, Example) of lists of ids, a prompt and what
    follows it; index (P,) is the data row of each."""

    def __init__(self, kind, path):
        self.kind, file = kind, open_safetensors(path)
        self.ids, self.index, self.offsets = (file.get_tensor(name) for name in ("ids", "index", "offsets"))

    def __len__(self):
        return len(self.index)

    def __getitem__(self, i):
        bounds = self.offsets[i].tolist()  # raises IndexError, which ends a `for`
        return self.kind(*(self.ids[a:b].tolist() for a, b in zip(bounds, bounds[1:])))


def load_rows(path, header, kind, split, source, held_out, recipes, *limits):
    """Read, tokenize and cut data, once a run: rank 0 does it and writes `path`, all ranks map that file, and so does a
    run that resumes. For split and limits see token_rows. -> TokenRows. The report of skipped rows, by kind with the
    place of the first, is said each time. No source: no rows. Raises UserError where nothing is left."""
    if not source:
        return []
    noun = f"{kind.__name__.lower()}s"
    key = f"{path.stem}-{noun}-{header['model']}-{header['data']}"

    def make():
        if path.exists():
            try:
                return read_tensors(path, key)[1]
            except UserError as error:
                say(f"{error}; made again")
        kinds, index, offsets, n = dict(skipped={}, cut={}), array("q"), array("q"), 0
        rows = enumerate(tqdm(read_rows(source, held_out, recipes), "tokenizing", disable=not sys.stderr.isatty()))
        with tempfile.TemporaryFile(dir=path.parent) as ids:  # a million rows are more than memory should hold
            while batch := list(itertools.islice(rows, 1000)):
                for number, parts in token_rows(batch, kinds, split, *limits):
                    bounds = itertools.accumulate(map(len, parts), initial=offsets[-1] if offsets else 0)
                    offsets.extend(bounds)
                    index.append(number)
                    array("i", itertools.chain(*parts)).tofile(ids)
                n = batch[-1][0] + 1
            told = "; ".join(f"{what}: {counted(found)}" for what, found in kinds.items())
            report = f"{source}: {len(index)} {noun} of {n} rows; {told}"
            if not index:
                raise UserError(f"no usable {noun} in {report}")
            ids.flush()
            tensors = dict(ids=torch.as_tensor(np.memmap(ids, np.int32, "r+")), index=torch.tensor(index),
                           offsets=torch.tensor(offsets).view(len(index), -1))
            write_tensors(path, tensors, key, report)
        return report

    say(on_rank_0(make))
    return TokenRows(kind, path)


def token_rows(batch, kinds, split, tokenizer, vocab_size, max_length, max_prompt_length):
    """A batch of (number, (where, row)), tokenized together: tokenizers use all cores. split(row, tokenizer) -> prompt
    text or None, response texts. Yields (number, [prompt ids, response ids, ..]); the prompt keeps its end, a response
    that does not fit loses its own. What is skipped and cut is counted in `kinds`."""
    kept, stops = [], stop_ids(tokenizer)
    for number, (where, row) in batch:
        try:
            prompt, responses = split(row, tokenizer)
            "".join([prompt or "", *responses]).encode()
            kept.append((number, where, prompt, responses))
        except SkipRow as kind:
            count(kinds["skipped"], kind, where)
        except UnicodeEncodeError:  # half of a surrogate pair: JSON can hold it, no tokenizer takes it
            count(kinds["skipped"], "broken Unicode", where)
    prompts = encode(tokenizer, [prompt or "" for _, _, prompt, _ in kept], vocab_size)
    pairs = [(prompt or "", response) for _, _, prompt, responses in kept for response in responses]
    after = iter(encode_after(tokenizer, *map(list, zip(*pairs)), vocab_size) if pairs else [])
    for (number, where, prompt, responses), ids in zip(kept, prompts):
        responses = [next(after) for _ in responses]
        ids, excess = cut_prompt(ids, tokenizer, max_prompt_length)
        if prompt is None and responses[0][:1] == ids:  # plain text: its first token is given, be it BOS or not
            responses = [responses[0][1:]]
        try:
            if not ids and prompt is not None:
                raise SkipRow("empty prompt")
            whole = [end_response(response, tokenizer, stops) for response in responses]
            cut = [response[: max_length - len(ids)] for response in whole]
            if not all(cut):
                raise SkipRow("no room for a response")
            if len(cut) == 2 and cut[0] == cut[1]:
                raise SkipRow("identical once cut")
        except SkipRow as kind:
            count(kinds["skipped"], kind, where)
            continue
        for what in ["prompt"] * bool(excess) + ["response"] * sum(a != b for a, b in zip(whole, cut)):
            count(kinds["cut"], what, where)
        yield number, [ids, *cut]
# --- end shared: rows ---


# --- shared: pairs (train_rm, train_pref) ---
class Pair(NamedTuple):
    """Token ids. The prompt begins with BOS if the tokenizer has one; a response that was not cut ends with a stop."""

    prompt: list
    chosen: list
    rejected: list


def split_pair(row, tokenizer):
    """A data row -> prompt, [chosen, rejected] as texts. Raises SkipRow(kind). Prompts may be implicit: HH's strings
    share all up to the last common "\\n\\nAssistant:", conversations share their first messages."""
    prompt, chosen, rejected = row.get("prompt"), row.get("chosen"), row.get("rejected")
    keys = f"keys: {[*row]}"[:80]
    if not {"chosen", "rejected"} <= row.keys():
        raise SkipRow(f"no chosen and rejected, {keys}")
    if chosen and chosen == rejected:
        raise SkipRow("identical responses")
    if isinstance(chosen, list) and isinstance(rejected, list):
        if not isinstance(prompt, list):
            common = sum(itertools.takewhile(bool, (a == b for a, b in zip(chosen, rejected))))
            prompt, chosen, rejected = chosen[:common], chosen[common:], rejected[common:]
        renders = [render_chat(tokenizer, prompt, response, row.get("tools")) for response in (chosen, rejected)]
        return renders[0][0], [response for _, response in renders]
    if not isinstance(chosen, str) or not isinstance(rejected, str) or not isinstance(row.get("prompt", ""), str):
        raise SkipRow("wrong types")
    if prompt is None:
        marker = "\n\nAssistant:"
        cut = os.path.commonprefix([chosen, rejected]).rfind(marker) + len(marker)
        if cut < len(marker) or marker in chosen[cut:] or marker in rejected[cut:]:
            raise SkipRow("prompt mismatch" if marker in chosen else f"no prompt, {keys}")
        prompt, chosen, rejected = chosen[:cut], chosen[cut:], rejected[cut:]
    if not chosen.strip() or not rejected.strip():
        raise SkipRow("empty response")
    return prompt, [chosen, rejected]


def pair_rows(pairs, shared_prompt):
    """Pairs -> rows, each (ids, positions, segments), and where the responses are in them: (row, first column,
    response) of chosen and rejected of each pair in turn.

    Shared: one row [prompt | chosen | rejected] a pair; the positions of both responses continue the prompt's. Plain:
    two rows [prompt | response]. Segments say who may see whom: 0 the prompt, 1 and 2 the responses."""
    rows, places = [], []
    for pair in pairs:
        P = len(pair.prompt)
        for segment, response in ((1, pair.chosen), (2, pair.rejected)):
            if segment == 1 or not shared_prompt:
                rows.append((list(pair.prompt), list(range(P)), [0] * P))
            ids, positions, segments = rows[-1]
            places.append((len(rows) - 1, len(ids), response))
            ids += response
            positions += range(P, P + len(response))
            segments += [segment] * len(response)
    return rows, places
# --- end shared: pairs ---


# --- shared: batches (train_sft, train_rm, train_pref, evaluate) ---
PLAIN_PROMPT = 256  # columns, see batch_tensors


def to_device(values, device):
    """A list of numbers or a tensor, there. To a GPU from pinned memory: the host need not wait until it is idle."""
    tensor = torch.as_tensor(values)
    return (tensor.pin_memory() if torch.device(device).type == "cuda" else tensor).to(device, non_blocking=True)


def batch_tensors(rows, predict, device, **lists):
    """Pad rows of (ids, positions, segments) to (B, T), segment -1; flatten the (row, column) that predict to (N,).
    `prompt`: as many of the first columns are prompt (segment 0) in every row; 0 if few: one attention is as fast."""
    T = max(len(ids) for ids, _, _ in rows)
    for k, (name, value) in enumerate([("ids", 0), ("positions", 0), ("segments", -1)]):
        lists[name] = [row[k] + [value] * (T - len(row[k])) for row in rows]
    lists["predict"] = [b * T + t for b, t in predict]
    prompt = min(segments.count(0) for _, _, segments in rows)
    tensors = {name: to_device(values, device) for name, values in lists.items()}
    return tensors | dict(prompt=prompt if prompt >= PLAIN_PROMPT else 0)


def deal(lengths, micro_batch_size, world):
    """Deal a step's examples, whose token counts are `lengths`, to micro-batches -> rounds[k][rank] = [example].

    Longest first, neighbours together: little padding, and the ranks of a round work for about the same time. Every
    rank has the same number of rounds (collectives must match); a micro-batch may be empty when examples run out."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    n_groups = world * math.ceil(len(order) / (micro_batch_size * world))
    bounds = [len(order) * g // n_groups for g in range(n_groups + 1)]
    groups = [order[a:b] for a, b in zip(bounds, bounds[1:])]
    return [groups[k : k + world] for k in range(0, n_groups, world)]
# --- end shared: batches ---


# --- shared: step (train_sft, train_rm, train_pref) ---
@functools.lru_cache(maxsize=1)
def epoch_order(n, seed, epoch):
    """The order of n examples in an epoch: a pure function of (seed, epoch), whatever the hardware."""
    order = list(range(n))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


def learning_rate(step, total, warmup_steps, peak):
    """Linear warm-up to `peak` over warmup_steps, then a cosine to 10% of it at `total`; step counts from 1. A warm-up
    that would not end within the run is a tenth of it."""
    warmup_steps = warmup_steps if warmup_steps < total else total // 10
    if step <= warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / max(1, total - warmup_steps)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def data_parallel(model, forward):
    """The model in DDP. Its buckets are the gradients, zeros from the start: micro-batches would make a second set."""
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    (0.0 * forward(model)).backward()  # after its first it orders its buckets: before step 1, whether resumed or not
    model.zero_grad(set_to_none=False)
    return model


def clip_and_step(model, optimizer, grad_clip, finite):
    """Clip the global gradient norm and apply the update, on all ranks or on none: where a loss or gradient is not
    finite the weights stay as they were. -> the norm before clipping, whether the update was applied."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    applied = bool(finite & norm.isfinite())
    if applied:
        if grad_clip:
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), grad_clip, norm)
        optimizer.step()
    optimizer.zero_grad(set_to_none=not isinstance(model, DistributedDataParallel))
    return norm.item(), applied
# --- end shared: step ---


# --- shared: llama (train_sft, train_rm, train_pref, evaluate) ---
def read_config(directory):
    """config.json of either dialect -> transformers' LlamaConfig, which checks types and fills in defaults. Raises
    UserError, naming it, for whatever the forward below does not compute and what no default can stand for."""
    from transformers import AutoConfig

    path, raw = directory / "config.json", read_json(directory / "config.json")
    try:
        c = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # `transformers` raises KeyError, OSError, ValueError and classes of its own
        raise UserError(f"{path}: {error}") from None
    rope = getattr(c, "rope_parameters", None) or {}
    for key, value, known in (("model_type", c.model_type, ["llama"]), ("hidden_act", c.hidden_act, ["silu"]),
                              ("rope_type", rope.get("rope_type"), ["default", "llama3"]),
                              ("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0), [1.0]),
                              ("quantization_config", getattr(c, "quantization_config", None), [None])):
        if value not in known:
            raise UserError(f"{path}: {key} is {value!r:.100}; known: {', '.join(map(repr, known))}")
    sizes = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    scaling = ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
    scaling = scaling if rope["rope_type"] == "llama3" else []
    given = raw | (raw.get("rope_scaling") or {}) | (raw.get("rope_parameters") or {})
    for key in (*sizes, *scaling, "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta"):
        value = rope[key] if key in rope else getattr(c, key, None)
        if key in (*sizes, *scaling) and key not in given:
            raise UserError(f"{path}: {key} is missing")
        if type(value) not in (int, float) or not 0 < value < 1e12:
            raise UserError(f"{path}: {key} is {value!r:.100}: must be a number above 0, and no absurd one")
    if c.num_attention_heads % c.num_key_value_heads or c.head_dim % 2:
        raise UserError(f"{path}: {c.num_attention_heads} heads, {c.num_key_value_heads} key-value heads, head_dim"
                        f" {c.head_dim}: key-value heads must divide the heads, and head_dim must be even")
    return c


def rope_frequencies(config):
    """Radians per position of each pair of dimensions (head_dim/2,), float32. llama3 (Llama 3.1) divides the low
    frequencies by `factor`, keeps the high ones, and goes linearly from one to the other between."""
    rope, dim = config.rope_parameters, config.head_dim
    freqs = 1.0 / rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)
    if rope["rope_type"] == "llama3":
        turns = rope["original_max_position_embeddings"] * freqs / (2 * math.pi)  # over the original context
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        freqs = keep * freqs + (1 - keep) * freqs / rope["factor"]
    return freqs


def rotate(x, cos, sin):
    """Rotary embedding of x (B, H, T, head_dim): dimension j turns with j + head_dim/2, as Hugging Face orders them."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Linear(nn.Linear):
    """In the dtype of its input: the float32 master weight is cast where it is used (FSDP2 has cast it already)."""

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension; in the dtype of its input, likewise."""

    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.H, self.K, self.head_dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.q_proj = Linear(c.hidden_size, self.H * c.head_dim, bias=c.attention_bias)
        self.k_proj = Linear(c.hidden_size, self.K * c.head_dim, bias=c.attention_bias)
        self.v_proj = Linear(c.hidden_size, self.K * c.head_dim, bias=c.attention_bias)
        self.o_proj = Linear(self.H * c.head_dim, c.hidden_size, bias=c.attention_bias)

    def project(self, x, cos, sin):
        """-> queries (B, H, T, head_dim), keys and values (B, K, T, head_dim)."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (proj(x).unflatten(2, (-1, self.head_dim)).transpose(1, 2) for proj in projections)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def forward(self, x, cos, sin, mask, prompt=0):
        q, k, v = self.project(x, cos, sin)
        k, v = (t.repeat_interleave(self.H // self.K, dim=1) for t in (k, v))  # each kv head serves H/K query heads
        out = F.scaled_dot_product_attention(q[:, :, prompt:], k, v, attn_mask=mask)  # (B, H, T - prompt, head_dim)
        if prompt:  # without a mask: at 4,000 tokens twice as fast, and no T x T numbers
            q, k, v = (t[:, :, :prompt] for t in (q, k, v))
            out = torch.cat((F.scaled_dot_product_attention(q, k, v, is_causal=True), out), dim=2)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.self_attn, self.mlp = Attention(c), MLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x, cos, sin, mask, prompt=0):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, prompt)
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaModel(nn.Module):
    """The body: ids, positions, segments (B, T) -> hidden states (B, T, D). Module names are the checkpoint's. The
    first `prompt` columns are prompt in all rows."""

    def __init__(self, c):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.frequencies = rope_frequencies(c)
        self.dtype, self.checkpoint_activations = torch.float32, False

    def angles(self, positions):
        """-> cos, sin (B, 1, T, head_dim/2) of the rotary embedding."""
        self.frequencies = self.frequencies.to(positions.device)
        angles = positions[:, None, :, None] * self.frequencies
        return angles.cos().to(self.dtype), angles.sin().to(self.dtype)

    def forward(self, ids, positions, segments, prompt=0):
        x, (cos, sin) = self.embed_tokens(ids).to(self.dtype), self.angles(positions)
        # A query sees a key that is not later and is in its own segment or in the prompt (0). Padding sees padding.
        query, key = segments[:, None, prompt:, None], segments[:, None, None, :]
        seen = ((query == key) | ((key == 0) & (query > 0))).tril(prompt)
        # Added to the scores, (B, 1, T - prompt, T); of booleans each layer would make its own, and of rows that are no
        # multiple of 16 long a GPU's kernels a copy.
        T = segments.shape[1]
        mask = x.new_zeros(len(ids), 1, T - prompt, -(-T // 16) * 16)[..., :T].masked_fill_(~seen, -math.inf)
        for layer in self.layers:
            if self.checkpoint_activations and self.training:
                x = checkpoint(layer, x, cos, sin, mask, prompt, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, cos, sin, mask, prompt)
        return self.norm(x)


def build(make, device, precision, shard=False, compile_layers=False, checkpoint_activations=False):
    """make() -> a module whose `model` is the body, with float32 weights allocated but not yet filled: whole on each
    rank, or with `shard` FSDP2's share of it."""
    with torch.device("meta"):
        model = make()
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}[precision]
    model.model.dtype, model.model.checkpoint_activations = dtype, checkpoint_activations
    if compile_layers:
        say("compiling the layers with the first steps: minutes")
        for layer in model.model.layers:
            layer.compile(dynamic=True)
    if shard:  # bf16 products; float32 gradients and their sums
        mixed = dict(reduce_dtype=torch.float32, cast_forward_inputs=False)
        for layer in model.model.layers:
            fully_shard(layer, mp_policy=MixedPrecisionPolicy(dtype, **mixed), reshard_after_forward=True)
        # The rest is gathered in float32: a token's gradients, and a tied embedding's two, meet before the reduce.
        fully_shard(model, mp_policy=MixedPrecisionPolicy(**mixed), reshard_after_forward=True)
    return model.to_empty(device=device)
# --- end shared: llama ---


# --- shared: policy (train_sft, train_pref) ---
class Llama(nn.Module):
    """A causal language model. Its forward returns log-probs, not logits: (N, V) never stands in memory at once, and a
    sharded head is gathered while it is used. A tied head is the embedding itself, as in the checkpoint."""

    def __init__(self, c, kernel="auto"):
        super().__init__()
        self.model = LlamaModel(c)
        self.lm_head = None if c.tie_word_embeddings else Linear(c.hidden_size, c.vocab_size, bias=False)
        self.kernel = kernel

    def forward(self, ids, positions, segments, predict, targets, cu_seqlens, prompt=0):
        """-> logps (S,), the sums over each sequence's targets, and token_logps (N,): nats, float32. predict (N,)
        indexes the flattened (B, T) that predict targets (N,); sequence s is cu_seqlens[s] : cu_seqlens[s + 1]."""
        hidden = self.model(ids, positions, segments, prompt).flatten(0, 1)[predict]
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        return linear_sequence_logps(hidden, head.weight, targets, cu_seqlens, kernel=self.kernel)
# --- end shared: policy ---


# --- shared: load (train_sft, train_rm, train_pref, evaluate) ---
def find_model(name):
    """A model directory (of a config.json its own), or a Hub id's snapshot: safetensors and JSON, never pickles."""
    path = Path(name).parent if Path(name).name == "config.json" else Path(name)
    if path.is_dir():
        return path
    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json", "tokenizer.model", "*.jinja"]))
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: no such model directory, and not on the Hub: {error}") from None


def read_json(path):
    """The object in a JSON file. Raises UserError where there is none."""
    try:
        return {**json.loads(path.read_text())}
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: no JSON object that can be read: {error}") from None


def open_safetensors(path):
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: no whole safetensors file (pickled weights are never read): {error}") from None


def file_sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_sha256s(directory, *patterns):
    """{name in the directory: sha256} but for the manifest; in threads, as hashing lets go of Python's lock."""
    paths = sorted({path for pattern in patterns for path in directory.glob(pattern) if path.is_file()})
    with ThreadPoolExecutor() as pool:
        digests = zip(paths, pool.map(file_sha256, paths))
        return {str(path.relative_to(directory)): digest for path, digest in digests if path.name != "manifest.json"}


def fingerprint(directory):
    """Of a model directory: its weights, config and tokenizer."""
    digests = file_sha256s(directory, "*.safetensors", "*.json", "*.jinja", "*.model")
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:16]


def verify(directory, ours=False):
    """Check a checkpoint of ours against its manifest; with neither that nor trainer/ it may be somebody else's.
    UserError names the first of weights and trainer/ that is not what was written; an edited text is warned of."""
    state = (directory / "trainer").exists()  # older checkpoints may have let go of it, see --keep_state
    if not ours and not state and not (directory / "manifest.json").exists():
        return
    written, found = read_json(directory / "manifest.json"), file_sha256s(directory, "**/*")
    for name in sorted(written.keys() | found.keys()):
        expected = name in written and (state or not name.startswith("trainer/"))
        strict = name.endswith(".safetensors") or name.startswith("trainer/")
        if written.get(name) != found.get(name) and (expected or strict and name in found):
            if strict or name not in found:
                raise UserError(f"{directory / name} is missing, new or not what was written: restore it, or delete"
                                f" {directory} and go on from the checkpoint before")
            say(f"warning: {directory / name} was edited; it is used as it is")


def share_like(param, tensor):
    """A whole tensor -> this rank's share of it, laid out like `param`."""
    tensor = tensor.to(param.device, param.dtype)
    if isinstance(param, DTensor):
        return distribute_tensor(tensor, param.device_mesh, param.placements, src_data_rank=None)
    return tensor


def open_weights(directory):
    """-> {tensor name: the open file that holds it}, of model.safetensors or of the files that its index names."""
    index = directory / "model.safetensors.index.json"
    weight_map = read_json(index).get("weight_map") if index.exists() else {"": "model.safetensors"}
    names = {*map(str, weight_map.values())} if isinstance(weight_map, dict) else set()
    if not names or any(Path(name).name != name or not name.endswith(".safetensors") for name in names):
        raise UserError(f"{index}: no weight_map to safetensors files beside it")
    files = [open_safetensors(directory / name) for name in sorted(names)]
    return {tensor: file for file in files for tensor in file.keys()}


@torch.no_grad()
def load_weights(model, directory, new=(), drop=()):
    """Fill every parameter from the directory's safetensors, one or sharded; all ranks call it. Strict: UserError names
    a missing, extra or misshapen tensor. For a change of head: parameters `new` are left as they are, tensors `drop`
    unread. Returns the model."""
    on_rank_0(lambda: verify(directory))
    master = directory / "trainer" / "weights"  # float32, where the model itself was saved in bf16
    files = open_weights(master if master.exists() else directory)
    params = {name: param for name, param in model.named_parameters() if name not in new}
    # Left out: rotary tables, which old exports hold and the config determines; the second copy of a tied head.
    extra = {name for name in files.keys() - params.keys() - {*drop} if not name.endswith("rotary_emb.inv_freq")}
    if extra == {"lm_head.weight"} and "model.embed_tokens.weight" in files:
        head, embedding = (files[name].get_tensor(name) for name in ("lm_head.weight", "model.embed_tokens.weight"))
        extra = set() if torch.equal(head, embedding) else extra
    missing = params.keys() - files.keys()
    if missing or extra:
        raise UserError(f"{directory}: the weights do not fit config.json: missing {sorted(missing)[:4]}, extra"
                        f" {sorted(extra)[:4]} ({len(missing)} and {len(extra)} in all)")
    for name, param in params.items():
        tensor = files[name].get_tensor(name)
        if tensor.shape != param.shape or tensor.dtype.itemsize < 2 or not tensor.dtype.is_floating_point:
            raise UserError(f"{directory}: {name} is {tensor.dtype} {list(tensor.shape)}; config.json says"
                            f" {list(param.shape)}, and quantized weights are not read")
        param.copy_(share_like(param, tensor))
    return model


def settle(path):
    """Permissions from the umask (safetensors writes 0600), and fsync."""
    if path.is_file():
        umask = os.umask(0)
        os.umask(umask)
        path.chmod(0o666 & ~umask)
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def write_aside(path, write):
    """write(temporary path), settle, rename: `path`, a file or directory, is whole or as it was. Raises UserError."""
    aside = path.with_name(f".{path.name}.tmp")
    try:
        write(aside)
        for written in (*aside.rglob("*"), aside):
            settle(written)
        os.replace(aside, path)
        settle(path.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True) if aside.is_dir() else aside.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error}; what was there before is intact") from None
# --- end shared: load ---


# --- shared: save (train_sft, train_rm, train_pref) ---
def tensors_sha256(tensors):
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].numpy())
    return digest.hexdigest()


def write_tensors(path, tensors, key, report=""):
    """A file of tensors that a run makes once, with what it was made of (`key`) and a checksum."""
    metadata = dict(key=key, report=report, sha256=tensors_sha256(tensors))
    write_aside(path, lambda aside: save_file(tensors, aside, metadata))


def read_tensors(path, key):
    """-> the tensors and the report of write_tensors. Raises UserError: damaged, or made of something else."""
    file = open_safetensors(path)
    metadata, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
    if metadata.get("key") != key or metadata.get("sha256") != tensors_sha256(tensors):
        raise UserError(f"{path} is damaged, or of another model, tokenizer, data or precision (it says"
                        f" {metadata.get('key')}, now {key}): delete it, or give another --out")
    return tensors, metadata["report"]


def model_files(directory, tokenizer, **changes):
    """What is saved beside the weights, {name: content}: config.json and generation_config.json, after the model's that
    training begins with. What training writes at the end of each response must stop generation."""
    config = read_json(directory / "config.json") | dict(architectures=["LlamaForCausalLM"]) | changes
    config.pop("torch_dtype", None)
    path = directory / "generation_config.json"
    generation = read_json(path) if path.exists() else dict(bos_token_id=tokenizer.bos_token_id)
    stops = generation.get("eos_token_id") or []
    stops = [*(stops if isinstance(stops, list) else [stops]), tokenizer.eos_token_id, template_stop(tokenizer)]
    return {"config.json": config, "generation_config.json": generation | dict(eos_token_id=[*dict.fromkeys(stops)])}


def save_checkpoint(directory, model, tokenizer, files, save_dtype, optimizer=None, state=None):
    """Write a model directory that transformers loads, with trainer/ if there is an optimizer; all ranks call it. It is
    made aside with a manifest, synced and renamed: `directory` is whole or absent. Raises UserError (a full disk)."""
    aside, params = directory.with_name(f".{directory.name}.tmp"), dict(model.named_parameters())
    trainer, dtype = aside / "trainer", torch.bfloat16 if save_dtype == "bf16" else torch.float32

    def save(folder, tensors, dtype=torch.float32):
        whole = {}
        for name, tensor in tensors.items():  # all ranks gather it, rank 0 keeps it
            tensor = tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()
            if dist.get_rank() == 0:  # a copy: uneven shares come as a view
                whole[name] = tensor.to("cpu", dtype, copy=True).contiguous()
        on_rank_0(lambda: (folder.mkdir(), save_torch_state_dict(whole, folder, max_shard_size="2GB"))[1])

    def finish(aside):
        if optimizer is not None:
            rng = dict(cpu=torch.get_rng_state())
            rng |= dict(cuda=torch.cuda.get_rng_state()) if torch.cuda.is_available() else {}
            save_file(rng, trainer / "rng.safetensors")
            (trainer / "state.json").write_text(json.dumps(state))
        files["config.json"]["dtype"] = str(dtype).removeprefix("torch.")
        for name, content in files.items():
            (aside / name).write_text(json.dumps(content, indent=2))
        try:
            tokenizer.save_pretrained(aside)
        except Exception as error:  # of no narrower class: what `tokenizers` raises when the disk is full
            raise OSError(str(error)) from None
        (aside / "manifest.json").write_text(json.dumps(file_sha256s(aside, "**/*"), indent=2))

    try:
        on_rank_0(lambda: shutil.rmtree(aside, ignore_errors=True))  # of a run that was killed
        save(aside, params, dtype)
        if optimizer is not None:
            on_rank_0(trainer.mkdir)
            if dtype != torch.float32:
                save(trainer / "weights", params)
            for key in ("exp_avg", "exp_avg_sq") if optimizer.state else ():
                save(trainer / key, {name: optimizer.state[param][key] for name, param in params.items()})
        on_rank_0(lambda: write_aside(directory, finish))
    except UserError as error:
        on_rank_0(lambda: shutil.rmtree(aside, ignore_errors=True))
        raise UserError(f"cannot write {directory}: {error}; earlier checkpoints are intact") from None


# Flags that fit a run to its machine or say what it keeps; every other flag must be the same when a run resumes.
FREE_FLAGS = {"keep", "keep_state", "save_dtype", "log_every", "track", "timeout", "threads", "micro_batch_size",
              "shard", "checkpoint_activations", "compile", "out"}


def checkpoints(out):
    """The checkpoints of a run, oldest first. Other names (step_000500.bak) are not ours."""
    paths = (path for path in out.glob("step_*") if path.name[5:].isdecimal())
    return sorted(paths, key=lambda path: int(path.name[5:]))


def checkpoint_to_resume(out, header):
    """-> out/final if the run is complete, its newest checkpoint, or None to begin. `header` is the line that this run
    would begin metrics.jsonl with. Raises UserError where `out` holds something else or another run."""
    out.mkdir(parents=True, exist_ok=True)
    metrics = out / "metrics.jsonl"
    empty = all(path.name.startswith(".") for path in out.iterdir())  # or a kill left half of the very first file
    if empty or metrics.exists():
        lock(out)
    if empty and not metrics.exists():
        write_aside(metrics, lambda aside: aside.write_text(json.dumps(header) + "\n"))
    try:
        lines = metrics.read_text().split("\n")
        found = json.loads(lines[0])
        prints = [{f"{key} fingerprint": h.get(key) for key in ("model", "ref", "data")} for h in (found, header)]
        then, now = (h["args"] | dict(script=h["script"]) | p for h, p in zip((found, header), prints))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{out} is not empty and holds no run (no metrics.jsonl with a header): choose another"
                        " --out") from None
    differ = [f"{key} was {then.get(key)!r}, is {now.get(key)!r}" for key in sorted({*then, *now} - FREE_FLAGS)
              if then.get(key) != now.get(key)]
    if differ and len(lines) > 2:  # before a first step nothing is lost: a wrong model or data may be mended
        raise UserError(f"{out} holds another run: {'; '.join(differ)}. Choose another --out (to train on: --model"
                        f" {out}/final)")
    for leftover in (*out.glob(".step_*"), out / ".final.tmp"):  # of a kill: half a checkpoint written or deleted
        shutil.rmtree(leftover, ignore_errors=True)
    if (out / "final").exists():
        verify(out / "final", ours=True)
        return out / "final"
    steps = checkpoints(out)
    if steps and not (steps[-1] / "trainer").exists():
        raise UserError(f"{steps[-1]} keeps no optimizer state (--keep_state): there is nothing to resume from")
    return steps[-1] if steps else None


@torch.no_grad()
def load_trainer(directory, model, optimizer):
    """Put back the optimizer and random state that save_checkpoint wrote; -> the state dict. Any number of ranks."""
    trainer = directory / "trainer"
    state = read_json(trainer / "state.json")
    for key in ("exp_avg", "exp_avg_sq") if state["updates"] else ():
        files = open_weights(trainer / key)
        for name, param in model.named_parameters():
            moment = torch.zeros_like(param).copy_(share_like(param, files[name].get_tensor(name)))
            updates = torch.tensor(float(state["updates"]), device=param.device)
            optimizer.state[param] |= {key: moment, "step": updates}
    rng = open_safetensors(trainer / "rng.safetensors")
    torch.set_rng_state(rng.get_tensor("cpu"))
    if torch.cuda.is_available() and "cuda" in rng.keys():
        torch.cuda.set_rng_state(rng.get_tensor("cuda"))
    return state


def prune(out, keep, keep_state):
    """Delete all but the newest `keep` checkpoints, and trainer/ of all but the newest `keep_state` (0: none), each
    renamed first so that none is half there."""
    steps = checkpoints(out)
    doomed = steps[:-keep] if keep else []
    doomed += [step / "trainer" for step in steps[:-keep_state]] if keep_state else []
    for directory in filter(Path.exists, doomed):
        aside = out / f".step_{'-'.join(directory.relative_to(out).parts)}.old"
        os.rename(directory, aside)
        shutil.rmtree(aside)
# --- end shared: save ---


if __name__ == "__main__":
    guard(main)
