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
import functools
import math
import os
import random
import shlex
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Subset
from tqdm import tqdm

from kernels.logprob import linear_sequence_logps
from plumbing.checkpoint import find_model, load_trainer, load_weights, model_files, save_checkpoint
from plumbing.data import (RowTexts, SkipRow, assistant_stop_id, check_same_vocabulary, is_verbatim, lacking, load_rows,
                           load_tokenizer, read_behaviour, render_chat, wrong_types)
from plumbing.process import (UserError, catch_signals, init_distributed, on_rank_0, print_rank0, read_json,
                              read_tensors, run_main, write_tensors)
from plumbing.run import (Parser, StepLog, announce_schedule, checkpoint_to_resume, common_flags, count_step, interval,
                          is_due, model_card, open_tracker, parse_with_preset, run_header, save_or_stop, step_metrics)


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


# The flags that each loss reads besides --beta; any other one set for it is refused.
LOSS_FLAGS = {
    "dpo": {"label_smoothing"},
    "ipo": {"length_average"},
    "is_dpo": {"label_smoothing", "log_eps"},
    "is_ipo": {"length_average", "log_eps"},
    "rpo": {"eta", "length_average"},
    "chi_po": {"r_max"},
    "length_dpo": {"alpha"},
}
WEIGHTED = ("is_dpo", "is_ipo")


def preference_loss(args, pc, pr, rc, rr, chosen_lengths, rejected_lengths, behaviour_logps=None):
    """-> losses (B,) before weighting, weights (B,), for `--loss`. The weights are ones where the loss has none. The
    loss is measured from the reference; the weight from behaviour_logps (B, 2; chosen, rejected), the log-probs of
    whoever sampled the pair, if they are given."""
    logps = (pc, pr, rc, rr)
    lengths = dict(chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths)
    if args.loss in WEIGHTED:
        bc, br = (rc, rr) if behaviour_logps is None else behaviour_logps.unbind(1)
        weights = importance_weights(pc, pr, bc, br, log_eps=args.log_eps)
    else:
        weights = torch.ones_like(pc)
    if args.loss in ("dpo", "is_dpo"):
        losses = dpo_loss(*logps, beta=args.beta, label_smoothing=args.label_smoothing)
    elif args.loss in ("ipo", "is_ipo"):
        averaged = lengths if args.length_average else {}
        losses = ipo_loss(*logps, beta=args.beta, **averaged)
    elif args.loss == "rpo":
        averaged = dict(chosen_lengths=chosen_lengths) if args.length_average else {}
        losses = rpo_loss(*logps, beta=args.beta, eta=args.eta, **averaged)
    elif args.loss == "chi_po":
        losses = chi_po_loss(*logps, beta=args.beta, r_max=args.r_max)
    else:
        losses = length_dpo_loss(*logps, beta=args.beta, alpha=args.alpha, **lengths)
    return losses, weights


def effective_sample_size(log_weights):
    """(sum w)^2 / sum w^2 of weights given by their logs (B,), nats, -> a number of pairs between 1 and B. The largest
    weight is divided out first: n equal weights give n, however small they are."""
    weights = (log_weights - log_weights.max()).exp()
    return weights.sum() ** 2 / (weights**2).sum()


@torch.no_grad()
def preference_metrics(args, logps, ref_logps, lengths, behaviour_logps=None):
    """Everything the log says of one batch, from logps, ref_logps and behaviour_logps (ref_logps, if not given) (B, 2)
    in nats and lengths (B, 2) in tokens; columns are chosen, rejected. Names are TRL's where TRL has one;
    results/README.md defines each."""
    if behaviour_logps is None:
        behaviour_logps = ref_logps
    pc, pr = logps.unbind(1)
    rc, rr = ref_logps.unbind(1)
    chosen_lengths, rejected_lengths = lengths.unbind(1)
    bc, br = behaviour_logps.unbind(1)
    losses, weights = preference_loss(args, pc, pr, rc, rr, chosen_lengths, rejected_lengths, behaviour_logps)
    # Rewards and ratios are from the reference, the weight from whoever wrote the pair.
    rho_w = pc - rc
    rho_l = pr - rr
    log_ratios = (pc - bc) + (pr - br)  # of the pair: the log of its weight before the cap, whatever the loss
    log_weights = log_ratios.clamp(max=2 * args.log_eps) if args.loss in WEIGHTED else torch.zeros_like(log_ratios)
    p10, p50, p90 = torch.quantile(log_ratios, log_ratios.new_tensor([0.1, 0.5, 0.9]))
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
        "weights/ess": effective_sample_size(log_weights),
        "weights/capped": (log_ratios >= 2 * args.log_eps).float().mean(),
        "weights/log_p10": p10,
        "weights/log_p50": p50,
        "weights/log_p90": p90,
    }
    if args.loss == "chi_po":
        logits = chi_po_logits(pc, pr, rc, rr, beta=args.beta)
        metrics["chi/clipped"] = (logits.abs() >= 2 * args.r_max).float().mean()
    return {name: value.item() for name, value in metrics.items()}


def trouble_with_weights(args, metrics, n_pairs):
    """-> what a step's importance weights leave undone, with its remedy, or "" where they are at work."""
    if metrics["weights/mean"] < 0.01 or metrics["weights/ess"] < 0.02 * n_pairs:
        return ("the mean weight was under 0.01 or the ESS under 2% of the pairs: the policy has left the pairs behind"
                " and learns next to nothing from them; lower --lr or raise --beta")
    if args.loss in WEIGHTED and metrics["weights/capped"] > 0.5:
        return ("over half of the pairs had their weight at the cap: the policy makes both responses likelier than the"
                " reference does, the weight is a constant, and `loss` rises while `unweighted` does not; the pairs are"
                " no samples of this reference: train it on them first (train_sft.py), or sample pairs from it")
    return ""


# ----------------------------------------------------------------------------------------------------------- the flags
HERE = Path(__file__).resolve().parent
# Appendix C of the paper; the 512 prompt tokens are its released code's.
PAPER = dict(model="out/sft-tldr+hh/final", max_length=640, max_prompt_length=512, batch_size=64, micro_batch_size=4,
             lr=1e-6, warmup_steps=100, beta=0.05, keep_state=1)
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
MADE_BY = {PAPER["model"]: "torchrun --nproc_per_node=4 train_sft.py --preset tldr+hh"}
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
    if args.label_smoothing >= 0.5:
        parser.error(f"--label_smoothing {args.label_smoothing}: must be in [0, 0.5)")
    if not math.isfinite(args.alpha):
        parser.error(f"--alpha {args.alpha}: must be finite")
    if not args.log_eps > -math.inf:  # NaN neither
        parser.error(f"--log_eps {args.log_eps}: must be a number or inf")
    all_loss_flags = set().union(*LOSS_FLAGS.values())
    for flag in sorted(all_loss_flags - LOSS_FLAGS[args.loss]):
        if getattr(args, flag) != parser.get_default(flag):
            parser.error(f"--{flag} {getattr(args, flag)} is not read by --loss {args.loss}: leave it out")
    args.out = args.out or f"out/{args.preset}-{args.loss}-beta{args.beta:g}-seed{args.seed}"
    return args


# ------------------------------------------------------------------------------------------- batches, reference, a step
def collate_pairs(pairs, shared_prompt, device):
    """Pairs -> the arguments of Llama.forward; sequences come out as chosen, rejected of each pair in turn."""
    rows, places = pair_rows(pairs, shared_prompt)
    predict = []  # (row, column) of the token before each target
    targets = []
    cu_seqlens = [0]
    for k, (row, start, response) in enumerate(places):
        last_of_prompt = len(pairs[k // 2].prompt) - 1  # predicts the first token of both responses
        columns = [last_of_prompt, *range(start, start + len(response) - 1)]
        predict += [(row, column) for column in columns]
        targets += response
        cu_seqlens.append(len(targets))
    return batch_tensors(rows, predict, device, targets=targets, cu_seqlens=cu_seqlens)


def pair_lengths(pairs):
    """Tokens of each response -> (B, 2), float32: chosen, rejected."""
    return torch.tensor([[float(len(pair.chosen)), float(len(pair.rejected))] for pair in pairs])


@torch.no_grad()
def all_logps(policy, pairs, args, desc=None):
    """Summed log-probs of every pair (P, 2) in nats, float32, on every rank: chosen, rejected. The training's path."""
    rank = dist.get_rank()
    device = next(policy.parameters()).device
    logps = torch.zeros(len(pairs), 2, device=device)
    lengths = [sum(map(len, pair)) for pair in pairs]
    rounds = split_into_micro_batches(lengths, args.micro_batch_size, dist.get_world_size())
    for micro in tqdm(rounds, desc=desc, disable=rank > 0 or not sys.stderr.isatty(), leave=False):
        picked = micro[rank] or [0]  # an idle rank computes pair 0, so that sharded collectives match
        batch = collate_pairs([pairs[i] for i in picked], args.shared_prompt, device)
        result = policy(**batch)[0].view(-1, 2)
        if micro[rank]:
            logps[to_device(picked, device)] = result
    dist.all_reduce(logps)  # each pair was written by one rank: a sum with zeros is exact
    return logps.cpu()


def reference_logps(path, key, index, compute):
    """The reference's log-probs (P, 2): chosen, rejected, of the data rows `index` (P,). Computed once, by the path
    that training takes, and read from their file ever after. Raises UserError: of something else, or damaged."""
    if not on_rank_0(path.exists):
        logps = compute()
        broken = (~logps.isfinite().all(1)).nonzero().flatten().tolist()
        if broken:
            raise UserError(f"the reference gives data row {index[broken[0]].item()} the log-probs"
                            f" {logps[broken[0]].tolist()}: its weights are broken")
        chosen = logps[:, 0].contiguous()
        rejected = logps[:, 1].contiguous()
        tensors = dict(chosen=chosen, rejected=rejected, index=index.clone())
        on_rank_0(lambda: write_tensors(path, tensors, key))
    tensors, _ = read_tensors(path, key)
    if not torch.equal(tensors["index"], index):
        raise UserError(f"{path} is of other data rows than this run's: delete it, or give another --out")
    return torch.stack([tensors["chosen"], tensors["rejected"]], 1)


def behaviour_or_reference(behaviour_logps, ref_logps):
    """What a pair's weight is measured from (P, 2): the log-probs that its data row gives for whoever sampled it; where
    it gives none (NaN), the reference's, of which the paper's pairs are samples."""
    return torch.where(behaviour_logps.isnan(), ref_logps, behaviour_logps)


def train_step(policy, optimizer, pairs, ref_logps, args, behaviour_logps=None):
    """One optimizer step on a batch of pairs (all ranks hold the whole batch), its ref_logps (B, 2) and behaviour_logps
    (B, 2; the same, if not given). -> logps (B, 2) of the whole batch before the step, global gradient norm before
    clipping, and whether the update was finite and applied."""
    rank = dist.get_rank()
    world = dist.get_world_size()
    device = next(policy.parameters()).device
    B = len(pairs)
    logps = torch.zeros(B, 2, device=device)
    behaviour_logps = to_device(ref_logps if behaviour_logps is None else behaviour_logps, device)
    ref_logps = to_device(ref_logps, device)
    lengths = to_device(pair_lengths(pairs), device)
    rounds = split_into_micro_batches([sum(map(len, pair)) for pair in pairs], args.micro_batch_size, world)
    for k, micro in enumerate(rounds):
        picked = micro[rank] or [0]  # an idle rank computes pair 0, times 0, so that collectives match
        # DDP sums the ranks' gradients once, with the last micro-batch; FSDP2 each time, as it keeps only its shard.
        policy.require_backward_grad_sync = k == len(rounds) - 1
        batch = collate_pairs([pairs[i] for i in picked], args.shared_prompt, device)
        index = to_device(picked, device)
        micro_logps = policy(**batch)[0].view(-1, 2)
        pc, pr = micro_logps.unbind(1)
        rc, rr = ref_logps[index].unbind(1)
        chosen_lengths, rejected_lengths = lengths[index].unbind(1)
        losses, weights = preference_loss(args, pc, pr, rc, rr, chosen_lengths, rejected_lengths,
                                          behaviour_logps[index])
        loss = (weights * losses).sum() * (world / B)  # DDP and FSDP2 average over ranks: the sum / B remains
        if not micro[rank]:
            loss = 0.0 * loss
        loss.backward()
        if micro[rank]:
            logps[index] = micro_logps.detach()
    dist.all_reduce(logps)  # each pair was written by one rank: a sum with zeros is exact
    grad_norm, applied = clip_and_step(policy, optimizer, args.grad_clip, logps.isfinite().all())
    return logps, grad_norm, applied


# ------------------------------------------------------------------------------------------------------------- the run
def main():
    args = parse_args()
    _, world, device = init_distributed(args.seed, args.timeout, args.threads)
    out = Path(args.out)
    model_dir = find_model(args.model, MADE_BY.get(args.model))
    ref_dir = find_model(args.ref) if args.ref else model_dir

    # A new run, or one to go on with
    header = on_rank_0(lambda: run_header("train_pref", args, world, device, dict(model=model_dir, ref=ref_dir)))
    resumed = on_rank_0(lambda: checkpoint_to_resume(out, header))
    if resumed == out / "final":
        print_rank0(f"{resumed} exists: this run is complete. To train on: another --out, --model"
                    f" {shlex.quote(str(resumed))} --ref {shlex.quote(str(ref_dir))}")
        return 0
    on_rank_0(lambda: open_tracker(args.track, out, header["args"]))
    begin_dir = resumed or model_dir

    # Data
    config = read_config(begin_dir)
    ref_config = read_config(ref_dir)
    check_length(config, model_dir, args.max_length)
    tokenizer = load_tokenizer(model_dir, args.chat_template_kwargs)
    if args.ref:
        check_same_vocabulary(tokenizer, ref_dir)
    reading = dict(row_type=Pair, split=split_pair, recipes=RECIPES, tokenizer=tokenizer,
                   vocab_size=min(config.vocab_size, ref_config.vocab_size),
                   max_length=args.max_length, max_prompt_length=args.max_prompt_length)
    pairs = load_rows(out / "data.safetensors", header, source=args.data, held_out=False, **reading)
    eval_pairs = load_rows(out / "data_eval.safetensors", header, source=args.eval_data, held_out=True, **reading)
    steps_per_epoch = math.ceil(len(pairs) / args.batch_size)
    total = min(args.epochs * steps_per_epoch, args.max_steps or math.inf)
    cap = f"{2 * args.log_eps:g} nats" if args.loss in WEIGHTED else "none"
    header |= dict(pairs=len(pairs), steps=total)

    # Reference log-probs, computed once, by the path that training takes
    @functools.cache  # the policy mostly begins as the reference: then it is the model that computed these
    def load_policy(directory):
        policy = build_model(lambda: Llama(read_config(directory), args.kernel), device, args.precision,
                             shard=args.shard, compile_layers=args.compile,
                             checkpoint_activations=args.checkpoint_activations)
        return load_weights(policy, directory)

    def reference(name, of_pairs, index):
        key = f"{header['ref']}-{header['data']}-{args.precision}"
        compute = lambda: all_logps(load_policy(ref_dir), of_pairs, args, "reference log-probs")
        return reference_logps(out / name, key, index, compute)

    reached = sorted(epoch_order(len(pairs), args.seed, 0)[: total * args.batch_size])  # all, but for --max_steps
    ref_logps = torch.full((len(pairs), 2), math.nan)
    ref_logps[reached] = reference("ref_logps.safetensors", Subset(pairs, reached), pairs.index[reached])
    if eval_pairs:
        eval_ref_logps = reference("ref_logps_eval.safetensors", eval_pairs, eval_pairs.index)
        eval_behaviour_logps = behaviour_or_reference(eval_pairs.behaviour_logps, eval_ref_logps)
    behaviour_logps = behaviour_or_reference(pairs.behaviour_logps, ref_logps)

    # Policy and optimizer
    if begin_dir != ref_dir:
        load_policy.cache_clear()  # one model in memory at a time
    policy = load_policy(begin_dir)
    files = model_files(begin_dir, tokenizer, assistant_stop_id(tokenizer),
                        architectures=[architecture(config, "ForCausalLM")])
    # AdamW is the paper's; this epsilon and no weight decay are its released code's.
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, eps=1e-5, weight_decay=0.0, fused=True)
    state = dict(step=0, updates=0, num_tokens=0, skipped=0, skipped_in_a_row=0)
    if resumed:
        state = load_trainer(resumed, policy, optimizer)
        print_rank0(f"resumed from {resumed}")
    parallel_policy = policy  # what a step calls: under DDP its wrapper, sharded or alone itself
    if world > 1 and not args.shard:
        batch = collate_pairs([pairs[0]], args.shared_prompt, device)
        parallel_policy = data_parallel(policy, lambda model: model(**batch)[0].sum())
    size = sum(p.numel() for p in policy.parameters()) / 1e6
    print_rank0(f"{args.loss}: {size:.2f}M parameters, {len(pairs)} pairs, {total} steps of {args.batch_size}, beta"
                f" {args.beta:g}, weight cap {cap}, {world} x {header['device']}, {args.precision} -> {out}")
    announce_schedule(args, "pairs", len(pairs), total)

    def save(directory):
        save_checkpoint(directory, model=policy, tokenizer=tokenizer, files=files, run=header["run"],
                        optimizer=optimizer, state=state)

    log = StepLog(out / "metrics.jsonl", header, resumed, steps_done=state["step"], total=total,
                  log_every=args.log_every, track=args.track)
    signals = catch_signals()
    began = time.perf_counter()
    trouble = ""  # with the weights, and for how many steps
    steps_of_trouble = 0
    for step in range(state["step"] + 1, total + 1):
        # The step: which pairs, at which rate
        step_began = time.perf_counter()
        epoch, k = divmod(step - 1, steps_per_epoch)
        picked = epoch_order(len(pairs), args.seed, epoch)[k * args.batch_size : (k + 1) * args.batch_size]
        batch = [pairs[i] for i in picked]
        lr = learning_rate(step, total, args.warmup_steps, args.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        logps, grad_norm, applied = train_step(parallel_policy, optimizer, batch, ref_logps[picked], args,
                                               behaviour_logps=behaviour_logps[picked])

        # Log
        step_s = time.perf_counter() - step_began
        n_tokens = sum(2 * len(pair.prompt) + len(pair.chosen) + len(pair.rejected) for pair in batch)  # as TRL counts
        if step == 1 and ref_dir == model_dir:  # the policy is the reference still: what differs is rounding
            spread = (logps.cpu() - ref_logps[picked]).abs().max().item()
            print_rank0(f"before step 1 |log pi - log ref| was at most {spread:.1e} nats: rounding")
        count_step(state, applied=applied, n_tokens=n_tokens)
        metrics = {"pairs": len(batch)}
        metrics |= preference_metrics(args, logps.cpu(), ref_logps[picked], pair_lengths(batch),
                                      behaviour_logps=behaviour_logps[picked])
        metrics |= step_metrics(state, grad_norm=grad_norm, lr=lr, epoch=step / steps_per_epoch, n_tokens=n_tokens,
                                step_s=step_s)
        if eval_pairs and is_due(step, interval(args.eval_every, total), total):
            eval_logps = all_logps(policy, eval_pairs, args, "evaluation")
            evaluated = preference_metrics(args, eval_logps, eval_ref_logps, pair_lengths(eval_pairs),
                                           behaviour_logps=eval_behaviour_logps)
            metrics |= {f"eval_{name}": value for name, value in evaluated.items()}
        log.write(step, metrics, step_line(step, total, metrics), applied)
        last_trouble = trouble
        trouble = trouble_with_weights(args, metrics, len(batch))
        steps_of_trouble = steps_of_trouble + 1 if trouble == last_trouble else 1
        if trouble and steps_of_trouble == min(10, total):
            print_rank0(f"warning: for {steps_of_trouble} steps {trouble}")

        # Save, stop
        code = save_or_stop(out, state, signals, save, save_every=interval(args.save_every, total), keep=args.keep,
                            keep_state=args.keep_state)
        if code:
            return code

    log.close(state)
    files |= {"README.md": model_card(header, "AutoModelForCausalLM")}
    save_checkpoint(out / "final", model=policy, tokenizer=tokenizer, files=files, run=header["run"],
                    save_dtype=args.save_dtype)
    print_rank0(f"done: {total} steps in {time.perf_counter() - began:.0f} s; policy in {out}/final")
    print_rank0(f"next: {next_commands(args, out, ref_dir)}")
    return 0


def step_line(step, total, m):
    """What the screen says of a step, from its metrics m."""
    accuracy = f"{m['rewards/accuracies']:.2f}" if step > 1 else "-"  # before step 1 it is that of rounding
    line = (f"step {step}/{total} | loss {m['loss']:.4f} | unweighted {m['loss/unweighted']:.4f}"
            f" | acc {accuracy} | margin {m['rewards/margins']:+.4f}"
            f" | weight {m['weights/mean']:.3f} | ess {m['weights/ess']:.1f} | norm {m['grad_norm']:.3f}"
            f" | lr {m['learning_rate']:.2e} | {1e3 * m['step_s']:.0f} ms | {m['tokens_per_s']:.0f} tok/s")
    if "eval_loss" in m:
        line += f" || held out: loss {m['eval_loss']:.4f} acc {m['eval_rewards/accuracies']:.3f}"
    return line


def next_commands(args, out, ref_dir):
    """What to ask of the run that has ended: how far it went from the reference, and how often it wins."""
    evaluate = shlex.quote(str(HERE / "evaluate.py"))
    truth = shlex.quote(str(HERE / "toy" / "truth.py"))
    run = shlex.quote(str(out.resolve()))
    if args.preset == "toy":  # the truth labelled its pairs, and judges what the policy says
        return (f"python {evaluate} golden --preset toy --keep_samples {run} && python {truth} {run}/truth {run} &&"
                f" python {evaluate} plot {run}/truth/* --out {run}/figs")
    judge = f"--rm REWARD_MODEL --ref {shlex.quote(str(ref_dir.resolve()))} --data HELD_OUT"
    return f"python {evaluate} golden {judge} {run} && python {evaluate} plot {run} --out {run}/figs"


# ================================================================================= Shared by the scripts: read it once
# --- shared: pairs (train_rm, train_pref) ---
class Pair(NamedTuple):
    """Token ids. The prompt begins with BOS where the tokenizer (of texts) or the chat template writes one; a response
    that was not cut ends with a stop."""

    prompt: list
    chosen: list
    rejected: list


def split_pair(row, tokenizer):
    """A data row -> RowTexts of prompt, [chosen, rejected]. Raises SkipRow(kind). Prompts may be implicit: HH's strings
    share all up to the last common "\\n\\nAssistant:", conversations share their first messages."""
    prompt = row.get("prompt")
    chosen = row.get("chosen")
    rejected = row.get("rejected")
    columns = ("prompt", "chosen", "rejected", "chosen_logps", "rejected_logps")
    if not {"chosen", "rejected"} <= row.keys():
        raise lacking(row, "chosen and rejected")
    if chosen and chosen == rejected:
        raise SkipRow("identical responses")
    logps = (read_behaviour(row, "chosen_logps"), read_behaviour(row, "rejected_logps"))
    if isinstance(chosen, list) and isinstance(rejected, list):
        if not isinstance(prompt, list):
            n = common_length(chosen, rejected)
            prompt = chosen[:n]
            chosen = chosen[n:]
            rejected = rejected[n:]
        prompt_text, chosen_text = render_chat(tokenizer, prompt, chosen, row.get("tools"))
        _, rejected_text = render_chat(tokenizer, prompt, rejected, row.get("tools"))
        verbatim = (is_verbatim(chosen, chosen_text), is_verbatim(rejected, rejected_text))
        return RowTexts(prompt=prompt_text, responses=[chosen_text, rejected_text], rendered=True,
                        columns=(*columns, "tools"), behaviour_logps=logps, verbatim=verbatim)
    if not isinstance(chosen, str) or not isinstance(rejected, str) or not isinstance(prompt, str | None):
        raise wrong_types(row, columns[:3])
    if prompt is None:
        marker = "\n\nAssistant:"
        end = os.path.commonprefix([chosen, rejected]).rfind(marker) + len(marker)
        if end < len(marker) or marker in chosen[end:] or marker in rejected[end:]:
            raise SkipRow("prompt mismatch") if marker in chosen else lacking(row, "prompt")
        prompt = chosen[:end]
        chosen = chosen[end:]
        rejected = rejected[end:]
    if not chosen.strip() or not rejected.strip():
        raise SkipRow("empty response")
    return RowTexts(prompt=prompt, responses=[chosen, rejected], rendered=False, columns=columns, behaviour_logps=logps,
                    verbatim=(True, True))


def common_length(a, b):
    """How many first items two lists share."""
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n


def pair_rows(pairs, shared_prompt):
    """Pairs -> rows, each (ids, positions, segments), and where the responses are in them: (row, first column,
    response) of chosen and rejected of each pair in turn.

    Shared: one row [prompt | chosen | rejected] a pair; the positions of both responses continue the prompt's. Plain:
    two rows [prompt | response]. Segments are what attention_mask reads: 0 the prompt, 1 and 2 the responses."""
    rows = []
    places = []
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
PLAIN_PROMPT = 256  # columns of prompt from which on an attention of its own, without a mask, is faster


def to_device(values, device):
    """A list of numbers or a tensor, there. To a GPU from pinned memory: the host need not wait until it is idle."""
    tensor = torch.as_tensor(values)
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def batch_tensors(rows, predict, device, **lists):
    """Rows of (ids, positions, segments) -> {name: tensor on the device}: ids and positions (B, T), padded with 0;
    segments (B, T - P), padded with -1, of all but the first P columns, which are prompt (segment 0) in every row;
    `predict`, (row, column) of N places, as indices (N,) of the flattened (B, T); `lists` as they are."""
    T = max(len(ids) for ids, _, _ in rows)
    P = min(segments.count(0) for _, _, segments in rows)
    if P < PLAIN_PROMPT:
        P = 0
    lists |= dict(ids=[], positions=[], segments=[])
    for ids, positions, segments in rows:
        n_pad = T - len(ids)
        lists["ids"].append(ids + [0] * n_pad)
        lists["positions"].append(positions + [0] * n_pad)
        lists["segments"].append(segments[P:] + [-1] * n_pad)
    lists["predict"] = [b * T + t for b, t in predict]
    return {name: to_device(values, device) for name, values in lists.items()}


def split_into_micro_batches(lengths, micro_batch_size, world):
    """Deal a step's examples, whose token counts are `lengths`, to micro-batches -> rounds[k][rank] = [example].

    Longest first, neighbours together: little padding, and the ranks of a round work for about the same time. Every
    rank has the same number of rounds (collectives must match); a micro-batch may be empty when examples run out."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    n_groups = world * math.ceil(len(order) / (micro_batch_size * world))
    bounds = [len(order) * g // n_groups for g in range(n_groups + 1)]
    groups = [order[start:end] for start, end in zip(bounds, bounds[1:])]
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
    """Linear warm-up to `peak` over warmup_steps, then a cosine to 10% of it (as in the paper's released code) at
    `total`; step counts from 1. A warm-up that would not end within the run is a tenth of it; a run of one step takes
    the peak."""
    if warmup_steps >= total:
        warmup_steps = total // 10
    if total == 1:
        return peak
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
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    applied = bool(finite & norm.isfinite())
    if applied:
        if grad_clip:
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), grad_clip, norm)
        optimizer.step()
    optimizer.zero_grad(set_to_none=not isinstance(model, DistributedDataParallel))  # DDP's are views of its buckets
    return norm.item(), applied
# --- end shared: step ---


# --- shared: llama (train_sft, train_rm, train_pref, evaluate) ---
def read_config(directory):
    """config.json of either dialect -> transformers' LlamaConfig or its like, which checks types and fills in defaults.
    Raises UserError, naming it, for whatever the forward below does not compute and what no default can stand for."""
    from transformers import AutoConfig

    path = directory / "config.json"
    raw = read_json(path)
    try:
        c = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        c.head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads  # Qwen2's config has none
    except Exception as error:  # `transformers` raises KeyError, OSError, ValueError and classes of its own
        raise UserError(f"{path}: {error}") from None
    rope = getattr(c, "rope_parameters", None) or {}

    def must_be(key, value, known):
        if value not in known:
            raise UserError(f"{path}: {key} is {value!r:.100}; known: {', '.join(map(repr, known))}")

    must_be("model_type", c.model_type, ["llama", "mistral", "qwen2", "qwen3"])
    must_be("hidden_act", c.hidden_act, ["silu"])
    must_be("rope_type", rope.get("rope_type"), ["default", "llama3"])
    must_be("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0), [1.0])
    must_be("quantization_config", getattr(c, "quantization_config", None), [None])

    # A default of these may fit the tensors' shapes and compute something else.
    given = raw | (raw.get("rope_scaling") or {}) | (raw.get("rope_parameters") or {})
    no_default = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    if rope["rope_type"] == "llama3":
        no_default += ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
    for key in no_default:
        if key not in given:
            raise UserError(f"{path}: {key} is missing")
    for key in (*no_default, "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta"):
        value = rope[key] if key in rope else getattr(c, key, None)
        most = 1000 if key == "num_hidden_layers" else 1e12  # a million would be made for hours
        if type(value) not in (int, float) or not 0 < value < most:
            raise UserError(f"{path}: {key} is {value!r:.100}: must be a number above 0, and no absurd one")
    if c.num_attention_heads % c.num_key_value_heads or c.head_dim % 2:
        raise UserError(f"{path}: {c.num_attention_heads} heads, {c.num_key_value_heads} key-value heads, head_dim"
                        f" {c.head_dim}: key-value heads must divide the heads, and head_dim must be even")
    return c


def architecture(c, head):
    """The name that transformers gives this model with this head: LlamaForCausalLM, Qwen2ForSequenceClassification."""
    return c.model_type.capitalize() + head


def check_length(c, directory, length):
    """Sequences of `length` tokens must be seen whole: UserError for a sliding window that is shorter. A warning where
    the model has fewer positions."""
    window = getattr(c, "sliding_window", None)
    if window and window < length:
        raise UserError(f"{directory / 'config.json'}: sliding_window is {window}, and sequences have up to {length}"
                        " tokens: shorter ones (--max_length), or a model whose attention sees them whole")
    if length > c.max_position_embeddings:
        print_rank0(f"warning: up to {length} tokens, but {directory} has {c.max_position_embeddings} positions")


def rope_frequencies(config):
    """Radians per position of each pair of dimensions (head_dim/2,), float32. llama3 (Llama 3.1) divides the low
    frequencies by `factor`, keeps the high ones, and goes linearly from one to the other between."""
    rope = config.rope_parameters
    dim = config.head_dim
    freqs = 1.0 / rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)
    if rope["rope_type"] == "llama3":
        turns = rope["original_max_position_embeddings"] * freqs / (2 * math.pi)  # over the original context
        low = rope["low_freq_factor"]
        high = rope["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        freqs = keep * freqs + (1 - keep) * freqs / rope["factor"]
    return freqs


def attention_mask(query, key, dtype):
    """What each of the last Q of T columns may see, from the segments of the queries (B, Q) and of all columns (B, T)
    -> (B, 1, Q, T), 0 or -inf, to be added to the scores. A query sees a key that is not later and is in its own
    segment or in the prompt (0); padding (-1) sees padding."""
    B, Q = query.shape
    T = key.shape[1]
    query = query[:, None, :, None]
    key = key[:, None, None, :]
    seen = ((query == key) | ((key == 0) & (query > 0))).tril(T - Q)
    # Of booleans each layer would make its own numbers, and of rows that are no multiple of 16 long a GPU's kernels
    # a copy.
    padded_T = -(-T // 16) * 16
    mask = torch.zeros(B, 1, Q, padded_T, dtype=dtype, device=seen.device)[..., :T]
    return mask.masked_fill_(~seen, -math.inf)


def rotate(x, cos, sin):
    """Rotary embedding of x (B, H, T, head_dim): dimension j turns with j + head_dim/2, as Hugging Face orders them."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class CastLinear(nn.Linear):
    """In the dtype of its input: the float32 master weight is cast where it is used (FSDP2 has cast it already)."""

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension; in the dtype of its input, likewise."""

    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Grouped-query attention: each of the K key-value heads serves H/K query heads."""

    def __init__(self, c):
        super().__init__()
        self.H = c.num_attention_heads
        self.K = c.num_key_value_heads
        self.head_dim = c.head_dim
        bias = getattr(c, "attention_bias", False)
        qkv_bias = bias or c.model_type == "qwen2"  # its config does not say so
        self.q_proj = CastLinear(c.hidden_size, self.H * c.head_dim, bias=qkv_bias)
        self.k_proj = CastLinear(c.hidden_size, self.K * c.head_dim, bias=qkv_bias)
        self.v_proj = CastLinear(c.hidden_size, self.K * c.head_dim, bias=qkv_bias)
        self.o_proj = CastLinear(self.H * c.head_dim, c.hidden_size, bias=bias)
        self.normed = c.model_type == "qwen3"  # each head's queries and keys, before they turn
        if self.normed:
            self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps)
            self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps)

    def project(self, x, cos, sin):
        """-> queries (B, H, T, head_dim), keys and values (B, K, T, head_dim)."""
        q = self.q_proj(x).unflatten(2, (self.H, self.head_dim)).transpose(1, 2)
        k = self.k_proj(x).unflatten(2, (self.K, self.head_dim)).transpose(1, 2)
        v = self.v_proj(x).unflatten(2, (self.K, self.head_dim)).transpose(1, 2)
        if self.normed:
            q = self.q_norm(q)
            k = self.k_norm(k)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def forward(self, x, cos, sin, mask):
        """x (B, T, D); mask (B, 1, T - P, T) of all queries but the first P, which are prompt in every row."""
        q, k, v = self.project(x, cos, sin)
        k = k.repeat_interleave(self.H // self.K, dim=1)  # (B, H, T, head_dim), as q
        v = v.repeat_interleave(self.H // self.K, dim=1)
        P = x.shape[1] - mask.shape[2]
        out = F.scaled_dot_product_attention(q[:, :, P:], k, v, attn_mask=mask)  # (B, H, T - P, head_dim)
        if P:
            # Plain causal attention takes no mask: at 4,000 tokens twice as fast, and no T x T numbers.
            of_prompt = F.scaled_dot_product_attention(q[:, :, :P], k[:, :, :P], v[:, :, :P], is_causal=True)
            out = torch.cat((of_prompt, out), dim=2)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        bias = getattr(c, "mlp_bias", False)
        self.gate_proj = CastLinear(c.hidden_size, c.intermediate_size, bias=bias)
        self.up_proj = CastLinear(c.hidden_size, c.intermediate_size, bias=bias)
        self.down_proj = CastLinear(c.intermediate_size, c.hidden_size, bias=bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.self_attn = Attention(c)
        self.mlp = MLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x, cos, sin, mask):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaModel(nn.Module):
    """The body: ids, positions (B, T), segments (B, T - P) -> hidden states (B, T, D). The first P columns are prompt
    (segment 0) in every row. Module names are the checkpoint's."""

    def __init__(self, c):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.frequencies = rope_frequencies(c)  # no buffer: it is computed, not loaded, and stays float32
        self.dtype = torch.float32  # of the products; build_model sets it
        self.checkpoint_activations = False

    def angles(self, positions):
        """-> cos, sin (B, 1, T, head_dim/2) of the rotary embedding."""
        self.frequencies = self.frequencies.to(positions.device)
        angles = positions[:, None, :, None] * self.frequencies
        return angles.cos().to(self.dtype), angles.sin().to(self.dtype)

    def forward(self, ids, positions, segments):
        x = self.embed_tokens(ids).to(self.dtype)  # (B, T, D)
        cos, sin = self.angles(positions)
        P = ids.shape[1] - segments.shape[1]
        # One mask for all layers, (B, 1, T - P, T); the first P columns, left out of segments, are prompt: 0.
        mask = attention_mask(segments, F.pad(segments, (P, 0)), x.dtype)
        for layer in self.layers:
            if self.checkpoint_activations and self.training:
                x = checkpoint(layer, x, cos, sin, mask, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, cos, sin, mask)
        return self.norm(x)


def build_model(make, device, precision, shard=False, compile_layers=False, checkpoint_activations=False):
    """make() -> a module whose `model` is the body, with float32 weights allocated but not yet filled: whole on each
    rank, or with `shard` FSDP2's share of it."""
    with torch.device("meta"):
        model = make()
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}[precision]
    model.model.dtype = dtype
    model.model.checkpoint_activations = checkpoint_activations
    if compile_layers:
        print_rank0("compiling the layers with the first steps: minutes")
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
        self.lm_head = None if c.tie_word_embeddings else CastLinear(c.hidden_size, c.vocab_size, bias=False)
        self.kernel = kernel

    def forward(self, ids, positions, segments, predict, targets, cu_seqlens):
        """-> logps (S,), the sums over each sequence's targets, and token_logps (N,): nats, float32. predict (N,)
        indexes the flattened (B, T) that predict targets (N,); sequence s is cu_seqlens[s] : cu_seqlens[s + 1]."""
        hidden = self.model(ids, positions, segments).flatten(0, 1)[predict]
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        return linear_sequence_logps(hidden, head.weight, targets, cu_seqlens, kernel=self.kernel)
# --- end shared: policy ---


if __name__ == "__main__":
    run_main(main)
