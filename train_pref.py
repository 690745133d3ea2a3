"""Preference training with importance-sampled direct alignment: IS-DPO, IS-IPO and the losses they are compared with.

DPO-style training on a fixed set of pairs drifts away from the policy that wrote them, and then its regularizer no longer
holds: the policy over-optimizes. IS-DAA multiplies each pair's loss by the (clipped, detached) importance ratio of the pair,

    w = min( pi(y_w|x) pi(y_l|x) / (ref(y_w|x) ref(y_l|x)),  exp(2 log_eps) ),        L = E[ w * L_DAA ],

which makes the loss an estimate of the on-policy one ("Mitigating Reward Over-optimization in Direct Alignment Algorithms
with Importance Sampling", NeurIPS 2025, Eq. 11 and 13). The losses stand first; the prompt of a pair is computed once.

    python train_pref.py                                                     # CPU: the embedded toy task, IS-DPO
    python train_pref.py --loss dpo --model DIR_OR_HUB_ID --data pairs.jsonl # 1 GPU
    torchrun --nproc_per_node=4 train_pref.py --preset tldr --loss is_dpo    # 4 GPUs, DDP; --shard past one GPU's memory
    torchrun --nnodes=2 --nproc_per_node=4 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train_pref.py --shard ...

Units: log-probs and log-ratios in nats, summed over response tokens (EOS included, prompt excluded); lengths in tokens;
batch sizes in pairs; a step is an optimizer step.  pi: policy, ref: reference, y_w: chosen, y_l: rejected.
"""

import argparse
import bisect
import contextlib
import errno
import gzip
import hashlib
import importlib
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import zlib
from array import array
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from huggingface_hub import save_torch_state_dict, snapshot_download
from jinja2 import TemplateError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from kernels.logprob import linear_sequence_logps


# ---------------------------------------------------------------------------------------------------------- the losses
# Every loss takes four vectors of log-probs (B,), float32, in nats, and returns losses (B,), one a pair, not yet averaged:
# policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps (here pc, pr, rc, rr), and where it says
# so the response lengths (B,) in tokens. With rho = log pi - log ref of a response, delta = rho_w - rho_l.


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
    """-> the largest a in [0, 1] with (sum w^a)^2 / sum w^2a >= ess_target n, for the capped weights w of n pairs, of which
    log_weights (n,) are rho_w + rho_l in nats. The left side, the effective sample size, is n at a = 0 and falls as a grows."""
    log_weights = log_weights.double().cpu().clamp(max=2 * log_eps)

    def minus_share(k):
        weights = (k / 2**40 * (log_weights - log_weights.max())).exp()
        return -(weights.sum() ** 2 / (weights**2).sum()).item() / len(weights)

    return (bisect.bisect(range(2**40 + 1), -ess_target, key=minus_share) - 1) / 2**40


def preference_loss(args, pc, pr, rc, rr, chosen_lengths, rejected_lengths, power=1.0):
    """-> losses (B,), weights (B,) for `--loss`. The weights are ones where the loss has none; `power`: see ess_power."""
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
        losses = rpo_loss(*logps, beta=args.beta, eta=args.eta, chosen_lengths=chosen_lengths if args.length_average else None)
    elif args.loss == "chi_po":
        losses = chi_po_loss(*logps, beta=args.beta, r_max=args.r_max)
    elif args.loss == "length_dpo":
        losses = length_dpo_loss(*logps, beta=args.beta, alpha=args.alpha, **lengths)
    else:
        raise ValueError(f"unknown loss {args.loss!r}: one of {', '.join(LOSS_FLAGS)}")
    return weights * losses, weights


@torch.no_grad()
def preference_metrics(args, logps, ref_logps, lengths):
    """Everything the log says of one batch, from logps, ref_logps (B, 2) in nats and lengths (B, 2) in tokens; columns are
    chosen, rejected. Names are TRL's where TRL has one; README, Metrics, defines each."""
    (pc, pr), (rc, rr) = logps.unbind(1), ref_logps.unbind(1)
    rho_w, rho_l = pc - rc, pr - rr
    log_weights = rho_w + rho_l
    power = ess_power(log_weights, ess_target=args.ess_target, log_eps=args.log_eps) if args.ess_target else 1.0
    losses, weights = preference_loss(args, pc, pr, rc, rr, *lengths.unbind(1), power)
    p10, p50, p90 = torch.quantile(log_weights, log_weights.new_tensor([0.1, 0.5, 0.9])).tolist()
    metrics = {
        "loss": losses.mean(),
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
    }
    metrics = {name: value.item() for name, value in metrics.items()}
    metrics |= {"weights/power": power, "weights/log_p10": p10, "weights/log_p50": p50, "weights/log_p90": p90}
    if args.loss == "chi_po":
        logits = chi_po_logits(pc, pr, rc, rr, beta=args.beta)
        metrics["chi/clipped"] = (logits.abs() >= 2 * args.r_max).float().mean().item()
    return metrics


# ----------------------------------------------------------------------------------------------------------- the flags
HERE = Path(__file__).resolve().parent
PAPER = dict(model="out/sft-tldr+hh/final", max_length=640, max_prompt_length=512, batch_size=64, micro_batch_size=4, lr=1e-6,
             warmup_steps=100, beta=0.05, save_every=200, eval_every=200)  # Appendix C
PRESETS = {
    "toy": dict(model=f"{HERE}/toy/sft", data=f"{HERE}/toy/pairs.jsonl.gz", eval_data=f"{HERE}/toy/pairs_eval.jsonl.gz",
                epochs=2, max_length=128, max_prompt_length=96, batch_size=32, micro_batch_size=8, lr=2e-4, warmup_steps=30,
                beta=0.01, save_every=32, eval_every=32),
    "paper": dict(PAPER, data=None, eval_data="", epochs=1),
    "tldr": dict(PAPER, data="tldr", eval_data="tldr", epochs=2),
    "hh": dict(PAPER, data="hh", eval_data="hh", epochs=1),
    "ultrafeedback": dict(PAPER, model="meta-llama/Llama-3.2-3B-Instruct", data="ultrafeedback", eval_data="ultrafeedback",
                          epochs=1),
}
# Hub datasets that a name stands for: id, train split, held-out split, and how a row becomes {prompt, chosen, rejected}.
RECIPES = {
    "tldr": ("trl-lib/tldr-preference", "train", "validation[:1024]", lambda row: row),
    "hh": ("Anthropic/hh-rlhf", "train", "test[:1024]", lambda row: row),  # implicit prompt
    "ultrafeedback": ("HuggingFaceH4/ultrafeedback_binarized", "train_prefs", "test_prefs[:1024]",
                      lambda row: {key: row[key] for key in ("chosen", "rejected")}),  # the prompt is their first message
}


def parse_args(argv=None):
    parser = Parser(description="Preference training: IS-DPO, IS-IPO, DPO, IPO, RPO, chi-PO, length-DPO.", allow_abbrev=False)
    common_flags(parser, PRESETS)
    add = parser.add_argument
    add("--loss", choices=list(LOSS_FLAGS), default="is_dpo", help="the loss; README has the table (default: %(default)s)")
    add("--kernel", choices=["auto", "triton", "torch"], default="auto", help="log-prob kernel; auto: triton on a GPU")
    add("--ref", default=None, help="reference policy: directory or Hub id (default: the --model given)")
    add("--beta", type=number(above=0), help="KL strength, > 0: smaller lets the policy move further")
    add("--log_eps", type=number(infinite=True), default=1.0, help="is_*: nats each response's"
        " log-ratio may spend before the weight is capped, twice that for the pair; inf: no cap (default: %(default)s)")
    add("--ess_target", type=number(least=0, below=1), default=0.0, help="is_*: least effective sample size of a step, as a share"
        " of its pairs, kept by a power <= 1 of the weights; costs a forward more a step; 0: off (default: %(default)s)")
    add("--eta", type=number(least=0), default=0.005, help="rpo: weight of the chosen log-prob, times beta (default:"
        " %(default)s)")
    add("--alpha", type=number(), default=0.01, help="length_dpo: reward a token of length difference (default: %(default)s)")
    add("--r_max", type=number(above=0), default=10.0, help="chi_po: R, the logits are clipped to +-2R (default: %(default)s)")
    add("--label_smoothing", type=number(least=0, below=0.5), default=0.0, help="dpo, is_dpo: chance of a flipped"
        " label, in [0, 0.5); 0: off")
    add("--length_average", action="store_true", help="ipo, is_ipo, rpo: token means instead of sums (default: sums)")
    add("--shared_prompt", action=argparse.BooleanOptionalAction, default=True, help="compute a pair's prompt once;"
        " --no-shared_prompt runs two plain rows, with the same result at up to twice the cost (default: shared)")
    args = parse_with_preset(parser, PRESETS, argv)
    for flag in set().union(*LOSS_FLAGS.values()) - LOSS_FLAGS[args.loss]:
        if getattr(args, flag) != parser.get_default(flag):
            parser.error(f"--{flag} {getattr(args, flag)} is not read by --loss {args.loss}: leave it out")
    args.out = args.out or f"out/{args.preset}-{args.loss}-beta{args.beta:g}-seed{args.seed}"
    return args


# --- shared: parser (train_sft, train_rm, train_pref, evaluate) ---
class Parser(argparse.ArgumentParser):
    """argparse, but a wrong flag is a UserError, so that one rank says it once."""

    def error(self, message):
        raise WrongFlag(f"{message} (--help lists the flags)")


def number(kind=float, least=-math.inf, above=-math.inf, below=math.inf, infinite=False):
    """A flag's type: int or float within these bounds. NaN never is; infinity is with `infinite` alone."""

    def convert(text):
        value = kind(text)
        if not (least <= value and above < value < below or infinite and value == math.inf):
            bounds = [("at least", least), ("above", above), ("below", below)]
            bounds = [f"{word} {bound:,}" for word, bound in bounds if math.isfinite(bound)]
            bounds += ["a number or inf" if infinite else "finite"] if below == math.inf else []
            raise argparse.ArgumentTypeError(f"{text}: must be {' and '.join(bounds)}")
        return value

    convert.__name__ = kind.__name__  # argparse names it where the text is no number
    return convert


count = number(int, least=0, below=2**31)
positive_int = number(int, least=1, below=2**31)
# --- end shared: parser ---


# --- shared: flags (train_sft, train_rm, train_pref) ---
def common_flags(parser, presets):
    """The flags every trainer has. An example is a pair or a demonstration; defaults marked 'preset' come from --preset."""
    add = parser.add_argument
    add("--preset", choices=list(presets), help="set of defaults; a flag given wins (default: toy; paper if --model or --data is"
        " given)")
    add("--model", help="start: model directory, Hub id (or, in train_sft.py, a config.json: random weights) (preset)")
    add("--data", help="training data: .jsonl[.gz], recipe name or Hub id; a+b pools two (preset)")
    add("--eval_data", help="held-out data, likewise; '' for none (preset)")
    add("--out", default=None, help="run directory; run again with it to resume (default: named after the flags, in out/)")
    add("--seed", type=number(int, least=0, below=2**63), default=0, help="seed of the data order and of random weights (default:"
        " %(default)s)")
    add("--epochs", type=positive_int, help="passes over the data (preset)")
    add("--max_steps", type=count, default=0, help="stop after this many optimizer steps; 0: no limit (default: %(default)s)")
    add("--batch_size", type=positive_int, help="examples per optimizer step, over all ranks (preset)")
    add("--micro_batch_size", type=positive_int, help="rows per rank per forward; lower it when memory runs out (preset)")
    add("--lr", type=number(least=0), help="peak learning rate; cosine to 10%% of it (preset)")
    add("--warmup_steps", type=count, help="optimizer steps of linear warm-up; 0: none (preset)")
    add("--weight_decay", type=number(least=0), default=0.0, help="AdamW weight decay; 0: off (default: %(default)s)")
    add("--adam_eps", type=number(above=0), default=1e-5, help="AdamW epsilon, > 0 (default: %(default)s, the authors')")
    add("--grad_clip", type=number(least=0), default=1.0, help="largest global gradient norm; 0: no clipping (default:"
        " %(default)s)")
    add("--max_length", type=positive_int, help="tokens of prompt + response at most (preset)")
    add("--max_prompt_length", type=positive_int, help="tokens of the prompt at most, below --max_length (preset)")
    add("--truncation", choices=["keep_end", "keep_start", "drop"], default="keep_end", help="a prompt that is too long"
        " keeps its end, keeps its start, or is left out (default: %(default)s)")
    add("--precision", choices=["bf16", "fp32"], default="bf16" if torch.cuda.is_available() else "fp32",
        help="of the products; weights, optimizer state, log-probs and rewards are float32 always (default here: %(default)s)")
    add("--compile", action="store_true", help="torch.compile the decoder layers (default: off)")
    add("--shard", action=argparse.BooleanOptionalAction, default=False, help="FSDP2: weights, gradients and optimizer state"
        " divided by the ranks; --no-shard: DDP (preset, or DDP)")
    add("--checkpoint_activations", action="store_true", help="recompute layers in backward: less memory (default: off)")
    add("--save_every", type=count, help="optimizer steps between checkpoints; 0: only on a signal (preset)")
    add("--eval_every", type=count, help="optimizer steps between evaluations on --eval_data; 0: never (preset)")
    add("--keep", type=count, default=0, help="newest checkpoints kept; 0: all (default: %(default)s)")
    add("--track", choices=["none", "tensorboard", "wandb", "trackio"], default="none", help="a dashboard besides the JSON lines")
    add("--resume", choices=["auto", "never"], default="auto", help="never: refuse an --out that is not empty")
    add("--timeout", type=positive_int, default=1800, help="seconds after which a rank that hangs ends the run (default: %(default)s)")


def parse_with_preset(parser, presets, argv):
    """Parse twice: the first pass finds the preset, whose dict then stands for the defaults of the second. A model or data of
    one's own begins from the paper's recipe: the toy's learning rate and lengths would spoil it unnoticed."""
    given = parser.parse_known_args(argv)[0]
    preset = given.preset or ("paper" if given.model or given.data else "toy")
    parser.set_defaults(**presets[preset])
    parser.set_defaults(preset=preset)
    args = parser.parse_args(argv)
    if not args.model:
        parser.error("--model is empty: give a model directory or Hub id, or leave it out")
    if not args.data:
        parser.error("--data is missing: give a file, recipe or Hub id, or another --preset")
    if args.max_prompt_length >= args.max_length:
        parser.error(f"--max_prompt_length {args.max_prompt_length} leaves no room in --max_length {args.max_length}")
    return args
# --- end shared: flags ---


# --- shared: pairs (train_rm, train_pref) ---
def split_pair(row, tokenizer):
    """A data row -> prompt, chosen, rejected texts. Raises SkipRow(kind). Prompts may be implicit: HH's strings share all up
    to the last common "\\n\\nAssistant:", conversations share their first messages."""
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if isinstance(chosen, list) and isinstance(rejected, list):
        if chosen == rejected:
            raise SkipRow("identical responses")
        prompt = row.get("prompt")
        if not isinstance(prompt, list):
            common = 0
            while common < min(len(chosen), len(rejected)) and chosen[common] == rejected[common]:
                common += 1
            prompt, chosen, rejected = chosen[:common], chosen[common:], rejected[common:]
        prompt_text, chosen = render_chat(tokenizer, prompt, chosen)
        return prompt_text, chosen, render_chat(tokenizer, prompt, rejected)[1]
    if not (isinstance(chosen, str) and isinstance(rejected, str)):
        raise SkipRow("wrong types")
    if "prompt" not in row:
        marker = "\n\nAssistant:"
        cut = os.path.commonprefix([chosen, rejected]).rfind(marker) + len(marker)
        if cut < len(marker) or marker in chosen[cut:] or marker in rejected[cut:]:
            raise SkipRow("prompt mismatch")
        return chosen[:cut], chosen[cut:], rejected[cut:]
    if not isinstance(row["prompt"], str):
        raise SkipRow("wrong types")
    return row["prompt"], chosen, rejected


@dataclass
class Pair:
    """Token ids. The prompt begins with BOS if the tokenizer has one; a response that was not cut ends with EOS."""

    prompt: array
    chosen: array
    rejected: array

    @property
    def n_tokens(self):
        """Tokens of the shared-prompt row: what the pair costs."""
        return len(self.prompt) + len(self.chosen) + len(self.rejected)


def load_pairs(source, held_out, tokenizer, vocab_size, max_length, max_prompt_length, truncation):
    """Read, tokenize and cut preference data -> pairs, index (the data row of each pair), report (str).
    Raises UserError where nothing is left or a token id is outside the model's vocabulary."""
    report, kept, texts = Report(source), [], []
    for number, (where, row) in enumerate(read_rows(source, held_out, RECIPES)):
        with report.row(where):
            prompt, chosen, rejected = split_pair(row, tokenizer)
            if not chosen.strip() or not rejected.strip():
                raise SkipRow("empty response")
            if chosen == rejected:
                raise SkipRow("identical responses")
            (prompt + chosen + rejected).encode()  # raises on broken Unicode
            kept.append((number, where))
            texts += [prompt, chosen, rejected]
    ids = encode(tokenizer, texts, vocab_size)
    pairs, index = [], []
    for k, (number, where) in enumerate(kept):
        with report.row(where, count=False):
            prompt = cut_prompt(ids[3 * k], tokenizer, max_prompt_length, truncation, report)
            chosen, rejected = (cut_response(r, tokenizer, max_length - len(prompt), report) for r in ids[3 * k + 1 : 3 * k + 3])
            if chosen == rejected:
                raise SkipRow("identical once cut")
            pairs.append(Pair(prompt, chosen, rejected))
            index.append(number)
    return pairs, torch.tensor(index), report.finish(len(pairs), "pairs")


def pair_rows(pairs, shared_prompt):
    """Pairs -> rows, each (tokens, positions, segments), and where the responses are in them: (row, first column, response) of
    chosen and rejected of each pair in turn.

    Shared: one row [prompt | chosen | rejected] a pair; the positions of both responses continue the prompt's. Plain: two rows
    [prompt | response]. Segments say who may see whom: 0 the prompt, 1 and 2 the responses."""
    rows, places = [], []
    for pair in pairs:
        P = len(pair.prompt)
        for segment, response in ((1, pair.chosen), (2, pair.rejected)):
            if segment == 1 or not shared_prompt:
                rows.append((list(pair.prompt), list(range(P)), [0] * P))
            tokens, positions, segments = rows[-1]
            places.append((len(rows) - 1, len(tokens), response))
            tokens += response
            positions += range(P, P + len(response))
            segments += [segment] * len(response)
    return rows, places
# --- end shared: pairs ---


def collate_pairs(pairs, shared_prompt, device):
    """Pairs -> the arguments of Llama.forward; sequences come out as chosen, rejected of each pair in turn. The last prompt token
    predicts the first token of both responses."""
    rows, places = pair_rows(pairs, shared_prompt)
    predict, targets, cu_seqlens = [], [], [0]  # predict: (row, column) of the token before each target
    for k, (row, start, response) in enumerate(places):
        predict += [(row, len(pairs[k // 2].prompt) - 1), *((row, t) for t in range(start, start + len(response) - 1))]
        targets += response
        cu_seqlens.append(len(targets))
    return batch_tensors(rows, predict, device, targets=targets, cu_seqlens=cu_seqlens)


# --- shared: batches (train_sft, train_rm, train_pref, evaluate) ---
PLAIN_PROMPT = 256  # columns, see batch_tensors


def to_device(values, device):
    """A list of numbers or a tensor, there. To a GPU from pinned memory: then the host need not wait until it is idle."""
    tensor = torch.as_tensor(values)
    return (tensor.pin_memory() if torch.device(device).type == "cuda" else tensor).to(device, non_blocking=True)


def batch_tensors(rows, predict, device, **lists):
    """Pad rows of (tokens, positions, segments) to (B, T), segment -1; flatten the (row, column) that predict to (N,). `prompt`: as
    many of the first columns are prompt (segment 0) in every row; 0 if they are few, where one call of attention is as fast as two."""
    T = max(len(tokens) for tokens, _, _ in rows)
    pad = lambda k, value: [row[k] + [value] * (T - len(row[k])) for row in rows]
    lists |= dict(ids=pad(0, 0), positions=pad(1, 0), segments=pad(2, -1), predict=[b * T + t for b, t in predict])
    prompt = min(segments.count(0) for _, _, segments in rows)
    return {name: to_device(values, device) for name, values in lists.items()} | dict(prompt=prompt if prompt >= PLAIN_PROMPT else 0)


def deal(lengths, micro_batch_size, world):
    """Deal a step's examples, whose token counts are `lengths`, to rounds of micro-batches -> rounds[k][rank] = [example].

    Longest first, neighbours together: little padding, and the ranks of a round work for about the same time. Every rank has
    the same number of rounds (collectives must match); a micro-batch may be empty when examples run out."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    n_rounds = math.ceil(len(order) / (micro_batch_size * world))
    n_groups = n_rounds * world
    bounds = [len(order) * g // n_groups for g in range(n_groups + 1)]
    groups = [order[a:b] for a, b in zip(bounds, bounds[1:])]
    return [groups[k * world : (k + 1) * world] for k in range(n_rounds)]
# --- end shared: batches ---


# --- shared: step (train_sft, train_rm, train_pref) ---
def epoch_order(n, seed, epoch):
    """The order of n examples in an epoch: a pure function of (seed, epoch), whatever the hardware."""
    order = list(range(n))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


def learning_rate(step, total, warmup_steps, peak):
    """Linear warm-up to `peak` over warmup_steps, then a cosine to 10% of it at `total`; step counts from 1."""
    if step <= warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / max(1, total - warmup_steps)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def clip_and_step(model, optimizer, grad_clip, finite):
    """Clip the global gradient norm and apply the update, on all ranks or on none: where a loss or gradient is not finite the
    weights stay as they were. -> the norm before clipping, whether the update was applied."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    applied = bool(finite & norm.isfinite())
    if applied:
        if grad_clip:
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), grad_clip, norm)
        optimizer.step()
    optimizer.zero_grad()
    return norm.item(), applied
# --- end shared: step ---


@torch.no_grad()
def all_logps(policy, pairs, args, rank, world, device, desc):
    """Summed log-probs of every pair (P, 2) in nats, float32, on every rank: chosen, rejected. The path is the training's."""
    logps = torch.zeros(len(pairs), 2, device=device)
    rounds = deal([pair.n_tokens for pair in pairs], args.micro_batch_size, world)
    for micro in tqdm(rounds, desc=desc, disable=rank > 0 or not sys.stderr.isatty(), leave=False):
        picked = micro[rank] or [0]  # an idle rank computes pair 0, so that sharded collectives match
        result = policy(**collate_pairs([pairs[i] for i in picked], args.shared_prompt, device))[0].view(-1, 2)
        if micro[rank]:
            logps[picked] = result
    dist.all_reduce(logps)  # each pair was written by one rank: a sum with zeros is exact
    return logps.cpu()


def write_ref_logps(path, logps, index, fingerprint):
    """chosen (P,), rejected (P,) float32 and index (P,) int64, the data row of each pair; fingerprint in the metadata."""
    bad = (~logps.isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        raise UserError(f"the reference gives data row {index[bad[0]].item()} the log-probs {logps[bad[0]].tolist()}: its weights"
                        " are broken")
    chosen, rejected = logps.unbind(1)
    tensors = {"chosen": chosen.contiguous(), "rejected": rejected.contiguous(), "index": index}
    write_aside(path, lambda aside: save_file(tensors, aside, metadata={"fingerprint": fingerprint}))


def read_ref_logps(path, fingerprint):
    """-> (P, 2): chosen, rejected. Raises UserError if another model, tokenizer, data or precision made the file."""
    with open_safetensors(path) as file:
        found = (file.metadata() or {}).get("fingerprint")
        if found != fingerprint:
            raise UserError(f"{path} is of another model, tokenizer, data or precision ({found}, now {fingerprint}): give another"
                            " --out, or delete that file")
        return torch.stack([file.get_tensor("chosen"), file.get_tensor("rejected")], 1)


def train_step(policy, optimizer, pairs, ref_logps, args, rank, world, device):
    """One optimizer step on a batch of pairs (all ranks hold the whole batch) and its ref_logps (B, 2).
    -> logps (B, 2) of the whole batch before the step, lengths (B, 2) in tokens, global gradient norm before clipping, and
    whether the update was finite and applied."""
    B = len(pairs)
    logps = torch.zeros(B, 2, device=device)
    ref_logps = to_device(ref_logps, device)
    lengths = to_device([[float(len(p.chosen)), float(len(p.rejected))] for p in pairs], device)
    rounds = deal([pair.n_tokens for pair in pairs], args.micro_batch_size, world)
    power = 1.0
    if args.ess_target:  # of the whole step, so the log-probs of all micro-batches and ranks first: a third more work, and exact
        log_weights = (all_logps(policy, pairs, args, rank, world, device, "weights") - ref_logps.cpu()).sum(1)
        power = ess_power(log_weights, ess_target=args.ess_target, log_eps=args.log_eps)
    for k, micro in enumerate(rounds):
        picked = micro[rank] or [0]
        last = k == len(rounds) - 1
        # DDP sums the ranks' gradients once, with the last micro-batch; FSDP2 each time, as it keeps only its own shard.
        hold = policy.no_sync() if isinstance(policy, DistributedDataParallel) and not last else contextlib.nullcontext()
        with hold:
            batch, index = collate_pairs([pairs[i] for i in picked], args.shared_prompt, device), to_device(picked, device)
            micro_logps = policy(**batch)[0].view(-1, 2)
            losses, _ = preference_loss(args, *micro_logps.unbind(1), *ref_logps[index].unbind(1), *lengths[index].unbind(1), power)
            loss = losses.sum() * (world / B)  # DDP and FSDP2 average over ranks: the sum over pairs / B remains
            (loss if micro[rank] else 0.0 * loss).backward()
        if micro[rank]:
            logps[index] = micro_logps.detach()
    dist.all_reduce(logps)  # each pair was written by one rank: a sum with zeros is exact
    grad_norm, applied = clip_and_step(policy, optimizer, args.grad_clip, logps.isfinite().all())
    return logps, lengths, grad_norm, applied


# --- shared: run (train_sft, train_rm, train_pref, evaluate) ---
class UserError(ValueError):
    """A mistake its user can mend: said once, in one line, without a traceback."""


class WrongFlag(UserError):
    """A mistake on the command line: exit code 2, as argparse has it."""


# What a disk or a path may answer: the user's to mend. Any other OSError is a mistake of ours and keeps its traceback.
USER_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR,
               errno.EISDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG}


def guard(main):
    """Run main and turn a user's mistake into one line and exit code 1 (2: a wrong flag). Ranks above 0 let rank 0 speak first:
    torchrun ends them when it exits; if rank 0 saw nothing wrong, they speak for themselves."""
    code = None
    try:
        code = main()  # returns, and does not raise, its exit code: what a traceback keeps alive hangs at exit, now and then
    except (UserError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in USER_ERRNOS:
            raise
        time.sleep(5 if int(os.environ.get("RANK", 0)) else 0)
        print("error:", " ".join(str(error).split()), file=sys.stderr, flush=True)
        os._exit(2 if isinstance(error, WrongFlag) else 1)  # no clean-up that would wait for other ranks
    except KeyboardInterrupt:  # before training there is nothing to save
        os._exit(130)
    dist.destroy_process_group()
    sys.exit(code)


def start(seed, timeout):
    """Join the process group -> rank, world, device. Without torchrun it is a group of one: collectives need no `if`."""
    local_rank, cuda = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.is_available()
    if cuda and local_rank >= torch.cuda.device_count():
        raise UserError(f"local rank {local_rank}, but {torch.cuda.device_count()} GPUs: lower --nproc_per_node")
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(seconds=timeout), **alone)
    torch.manual_seed(seed)
    sys.stdout.reconfigure(line_buffering=True)  # a log file shows each step as it ends
    return dist.get_rank(), dist.get_world_size(), device


def on_rank_0(function):
    """Run it on rank 0 and give its result, or what it says is wrong, to every rank."""
    box = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = function()
        except (UserError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in USER_ERRNOS:
                raise
            box[1] = str(error)
    dist.broadcast_object_list(box)
    if box[1] is not None:
        raise UserError(box[1])
    return box[0]
# --- end shared: run ---


# --- shared: log (train_sft, train_rm, train_pref) ---
class Stop:
    """After SIGTERM, SIGINT or SIGUSR1 the step ends, all ranks save and exit with 128 + the signal. A second one exits at
    once, unless it comes within a second: torchrun passes a Ctrl-C on to workers that already had it."""

    def __init__(self):
        self.signum, self.at = 0, 0.0
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(signum, self.handle)

    def handle(self, signum, frame):
        if self.signum and time.monotonic() - self.at > 1:
            os._exit(128 + signum)
        if not self.signum:
            self.signum, self.at = signum, time.monotonic()

    def agreed(self, device):
        """The signal that any rank was sent, or 0: the same on every rank."""
        signum = torch.tensor(self.signum, device=device)
        dist.all_reduce(signum, op=dist.ReduceOp.MAX)
        return signum.item()


def run_header(script, args, world, device, **more):
    """What a run must say of itself: the first line of metrics.jsonl."""
    commit = subprocess.run(["git", "-C", str(HERE), "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    versions = {package: importlib.import_module(package).__version__ for package in ("torch", "transformers", "safetensors")}
    return dict(script=script, args=vars(args), commit=commit or None, versions=versions, device=name, world=world, **more)


def open_metrics(path, header, resumed):
    """metrics.jsonl, ready for the lines after those of the checkpoint `resumed`, or with the header alone. Later lines go (they
    will be written again, the same), and a line that a kill cut in two."""
    kept = [json.dumps(header)]
    if resumed:
        lines, step = path.read_text().split("\n")[:-1], int(resumed.name.removeprefix("step_"))
        try:
            kept = lines[:1] + [line for line in lines[1:] if json.loads(line)["step"] <= step]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path} has a line that is no metric line: it was changed; restore it or delete that line") from None
    write_aside(path, lambda aside: aside.write_text("\n".join(kept) + "\n"))
    return path.open("a")


def write_metrics(file, metrics):
    """One JSON line. JSON has no NaN: what is not finite is written as null."""
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
    try:
        file.write(json.dumps(clean) + "\n")
        file.flush()
    except OSError as error:
        raise UserError(f"cannot write {file.name}: {error}; the last checkpoint is intact") from None


def make_tracker(kind, out, args):
    """-> log(metrics, step) for the dashboard asked for, which is imported only then."""
    if kind == "none":
        return lambda metrics, step: None
    try:
        if kind == "tensorboard":
            writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter(out / "tensorboard")
            return lambda metrics, step: [writer.add_scalar(name, value, step) for name, value in metrics.items()]
        module = importlib.import_module(kind)  # wandb and trackio have one interface
    except ImportError as error:
        raise UserError(f"--track {kind}: {error}; pip install {kind}") from None
    module.init(project="is-daa", name=out.name, config=vars(args))
    return lambda metrics, step: module.log(metrics, step=step)


def memory_gb(device):
    """Peak memory of this process: of the GPU's allocator, or resident on CPU. In GB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # ru_maxrss is in KiB on Linux
# --- end shared: log ---


# --- shared: data (train_sft, train_rm, train_pref, evaluate) ---
class SkipRow(Exception):
    """This data row cannot be used; the message is the kind it is counted under."""


class Report:
    """Counts rows that were skipped or cut, by kind, with the place of the first of each."""

    def __init__(self, source):
        self.source, self.rows, self.skipped, self.cuts, self.where = source, 0, {}, {}, None

    @contextlib.contextmanager
    def row(self, where, count=True):
        self.rows += count
        self.where = where
        try:
            yield
        except SkipRow as skip:
            self.note(self.skipped, str(skip))
        except UnicodeEncodeError:  # half of a surrogate pair: JSON can hold it, no tokenizer takes it
            self.note(self.skipped, "broken Unicode")

    def cut(self, kind):
        self.note(self.cuts, kind)

    def note(self, counts, kind):
        n, first = counts.get(kind, (0, self.where))
        counts[kind] = (n + 1, first)

    def finish(self, kept, noun):
        """The report as text. Raises UserError if nothing was kept."""
        say = lambda counts: ", ".join(f"{n} {kind} (first {first})" for kind, (n, first) in counts.items()) or "none"
        text = f"{self.source}: {kept} {noun} of {self.rows} rows; skipped: {say(self.skipped)}; cut: {say(self.cuts)}"
        if not kept:
            raise UserError(f"no usable {noun} in {text}")
        return text


def read_rows(source, held_out, recipes):
    """Yield (where, row) of a .jsonl or .jsonl.gz file, a recipe's name, a Hub dataset's id or directory; `a+b` pools parts."""
    for part in [source] if Path(source).exists() else source.split("+"):
        if part in recipes or not (Path(part).is_file() or part.endswith((".jsonl", ".gz", ".json"))):
            name, train, test, convert = recipes.get(part, (part, "train", "test", lambda row: row))
            try:
                rows = importlib.import_module("datasets").load_dataset(name, split=test if held_out else train)
            except ImportError:
                raise UserError(f"{part}: reading from the Hub needs `pip install datasets`") from None
            except Exception as error:  # `datasets` has classes of its own for what it cannot read
                raise UserError(f"{part}: no such file, recipe ({', '.join(recipes)}) or readable Hub dataset: {error}") from None
            yield from ((f"{part}[{n}]", convert(row)) for n, row in enumerate(rows))
        else:
            yield from read_jsonl(Path(part))


def read_jsonl(path):
    """Yield ("file:line", object) of a JSON-lines file. Lines end at "\\n" only: U+2028 may stand inside a string."""
    number = 0
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    row = json.loads(line, object_pairs_hook=distinct_keys)
                    yield f"{path}:{number}", row if isinstance(row, dict) else {}
    except ValueError as error:  # json.JSONDecodeError, UnicodeDecodeError
        raise UserError(f"{path}:{number}: not JSON: {error}") from None
    except RecursionError:
        raise UserError(f"{path}:{number}: nested too deeply") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: broken after line {number}: {error}") from None
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: a directory, not a file") from None


def distinct_keys(pairs):
    """A JSON object of which no value is lost: json itself would keep the last of two."""
    if len(row := dict(pairs)) < len(pairs):
        raise ValueError("a key stands twice in one object")
    return row


def ids_sha256(rows):
    """Fingerprint of a list of id arrays: of the data as the model sees it, tokenizer and cuts included."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(len(row).to_bytes(8, "little") + row.tobytes())
    return digest.hexdigest()
# --- end shared: data ---


# --- shared: tokenizer (train_sft, train_rm, train_pref, evaluate) ---
LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                  r"|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA3_SPECIAL = ["begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1",
                  "finetune_right_pad_id", "step_id", "start_header_id", "end_header_id", "eom_id", "eot_id", "python_tag",
                  "image", *(f"reserved_special_token_{k}" for k in range(2, 246))]  # 256 in all


def load_tokenizer(directory):
    """The tokenizer of a model directory: AutoTokenizer, or for a directory with nothing but Meta's tokenizer.model (tiktoken's
    format) the same ids through transformers' converter. Raises UserError if there is none or it has no EOS."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter
    from tokenizers.processors import TemplateProcessing

    directory = Path(directory)
    if (directory / "tokenizer.model").exists() and not list(directory.glob("tokenizer*.json")):
        names = [f"<|{name}|>" for name in LLAMA3_SPECIAL]
        converter = TikTokenConverter(str(directory / "tokenizer.model"), LLAMA3_PATTERN, extra_special_tokens=names)
        os.environ["TIKTOKEN_CACHE_DIR"] = ""  # its cache goes by path: it would miss that another file stands there now
        try:
            backend = converter.converted()
            backend.post_processor = TemplateProcessing(single=f"{names[0]} $A", special_tokens=[(names[0], backend.token_to_id(names[0]))])
        except ValueError as error:
            raise UserError(f"{directory}/tokenizer.model is not tiktoken's format ({error}); a SentencePiece model needs its"
                            " tokenizer.json beside it") from None
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=names[0], eos_token=names[1])
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # whatever a broken file leads to; `tokenizers` itself raises no other class
            raise UserError(f"{directory}: no tokenizer that transformers can load: {error}") from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"{directory}: the tokenizer has no EOS token; set eos_token in tokenizer_config.json")
    return tokenizer


def encode(tokenizer, texts, vocab_size):
    """Texts -> arrays of ids, without BOS and EOS. Special tokens written in the text are parsed, as everywhere in transformers:
    prompts come already rendered. Raises UserError for an id that the model does not have."""
    ids = []
    for k in range(0, len(texts), 1000):  # arrays: 4 bytes a token, where a list takes 36
        rows = tokenizer(texts[k : k + 1000], add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        ids += (array("i", row) for row in rows)
    largest = max([tokenizer.eos_token_id, tokenizer.bos_token_id or 0, *(max(row, default=0) for row in ids)])
    if largest >= vocab_size:
        raise UserError(f"token id {largest} is outside the model's vocabulary of {vocab_size}: the tokenizer belongs to another"
                        " model")
    return ids


def cut_prompt(ids, tokenizer, limit, truncation, report):
    """One BOS, if the tokenizer has one, then at most `limit` tokens in all. Raises SkipRow."""
    bos = array("i", [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id])
    if bos and ids[:1] == bos:  # a chat template may have written it
        ids = ids[1:]
    room = limit - len(bos)
    if len(ids) > room:
        if truncation == "drop":
            raise SkipRow("prompt too long")
        report.cut("prompt")
        ids = ids[len(ids) - room :] if truncation == "keep_end" else ids[:room]
    if not bos + ids:
        raise SkipRow("empty prompt")
    return bos + ids


def cut_response(ids, tokenizer, room, report):
    """One EOS at the end; if it does not fit in `room` tokens the response loses its end and gets no EOS. Raises SkipRow."""
    eos = array("i", [tokenizer.eos_token_id])
    ids = ids if ids[-1:] == eos else ids + eos
    if room < 1:
        raise SkipRow("no room for a response")
    if len(ids) == 1:
        raise SkipRow("empty response")
    if len(ids) > room:
        report.cut("response")
    return ids[:room]


def render_chat(tokenizer, prompt, response):
    """Lists of {role, content} -> prompt text, response text by the tokenizer's chat template. Raises SkipRow; UserError if
    there is no template. The response ends before its EOS, which cut_response writes."""
    if tokenizer.chat_template is None:
        raise UserError("the data is conversational, but the tokenizer has no chat template: use an instruct model's tokenizer"
                        " or data with text prompts")
    messages = prompt + response
    if not all(isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages):
        raise SkipRow("wrong types")
    if not prompt or not response or response[0]["role"] != "assistant":
        raise SkipRow("prompt mismatch")
    if not any(message["content"].strip() for message in response):
        raise SkipRow("empty response")
    try:
        prompt_text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except TemplateError:  # many demand that user and assistant alternate
        raise SkipRow("refused by the chat template") from None
    if not text.startswith(prompt_text):
        raise SkipRow("chat template does not continue the prompt")
    text, eos = text[len(prompt_text) :], tokenizer.eos_token
    return prompt_text, text.rstrip().removesuffix(eos) if text.rstrip().endswith(eos) else text
# --- end shared: tokenizer ---


# --- shared: llama (train_sft, train_rm, train_pref, evaluate) ---
@dataclass
class LlamaConfig:
    """The shape of a Llama, read from config.json; names are transformers'."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    initializer_range: float
    rope: dict  # rope_type, rope_theta and, for llama3, its four parameters
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool


def read_json(path):
    """The object in a JSON file of somebody else's. Raises UserError where there is none."""
    try:
        raw = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: not a JSON object")
    return raw


def read_config(path):
    """config.json (old dialect: rope_theta, rope_scaling; transformers 5: rope_parameters) -> LlamaConfig.
    Raises UserError, naming it, for whatever this forward does not compute."""
    path = Path(path)
    path = path / "config.json" if path.is_dir() else path
    raw = read_json(path)
    if (generation := path.with_name("generation_config.json")).exists():
        read_json(generation)  # the first checkpoint needs it: said now if it is broken
    rope = [raw.get("rope_scaling") or {}, raw.get("rope_parameters") or {}]
    if not all(isinstance(part, dict) for part in rope):
        raise UserError(f"{path}: rope_scaling or rope_parameters is {rope!r:.100}: not an object")
    rope = dict(rope_theta=raw.get("rope_theta", 10000.0)) | rope[0] | rope[1]
    rope["rope_type"] = rope.get("rope_type", rope.pop("type", "default"))
    raw["partial_rotary_factor"] = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
    for key, value, known in (("model_type", raw.get("model_type"), ("llama",)), ("hidden_act", raw.get("hidden_act", "silu"), ("silu",)),
                              ("rope_type", rope["rope_type"], ("default", "llama3")),
                              ("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0), (1.0,)),
                              ("quantization_config", raw.get("quantization_config"), (None,))):
        if value not in known:
            raise UserError(f"{path}: {key} is {value!r:.100}; known: {', '.join(map(repr, known))}")
    needed = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    scaling = ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
    missing = [k for k in needed if k not in raw] + [k for k in scaling if rope["rope_type"] == "llama3" and k not in rope]
    if missing:
        raise UserError(f"{path}: {', '.join(missing)} missing")
    limits = dict.fromkeys([*needed, "head_dim", "num_key_value_heads"], 2**24) | dict(num_hidden_layers=1000)
    for key, most in limits.items():
        if (key in needed or raw.get(key)) and not (type(raw[key]) is int and 0 < raw[key] <= most):
            raise UserError(f"{path}: {key} is {raw[key]!r:.100}: must be a whole number from 1 to {most:,}")
    numbers = {key: raw[key] for key in ("rms_norm_eps", "initializer_range") if key in raw}
    for key, value in (numbers | {key: rope[key] for key in ("rope_theta", *scaling) if key in rope}).items():
        if type(value) not in (int, float) or not 0 < value < 1e12:
            raise UserError(f"{path}: {key} is {value!r:.100}: must be a number above 0")
    for key in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
        if type(raw.get(key, False)) is not bool:
            raise UserError(f"{path}: {key} is {raw[key]!r:.100}: must be true or false")
    if rope["rope_type"] == "llama3" and not rope["low_freq_factor"] < rope["high_freq_factor"]:
        raise UserError(f"{path}: low_freq_factor {rope['low_freq_factor']} must be below high_freq_factor"
                        f" {rope['high_freq_factor']}")
    heads = raw["num_attention_heads"]
    head_dim, kv_heads = raw.get("head_dim") or raw["hidden_size"] // heads, raw.get("num_key_value_heads") or heads
    if raw["hidden_size"] % heads or heads % kv_heads or head_dim % 2:
        raise UserError(f"{path}: hidden_size {raw['hidden_size']}, {heads} heads of head_dim {head_dim}, {kv_heads} key-value heads:"
                        " heads must divide hidden_size, key-value heads the heads, and head_dim must be even")
    return LlamaConfig(**{k: raw[k] for k in needed}, num_key_value_heads=kv_heads, head_dim=head_dim,
                       rms_norm_eps=raw.get("rms_norm_eps", 1e-6), initializer_range=raw.get("initializer_range", 0.02), rope=rope,
                       tie_word_embeddings=raw.get("tie_word_embeddings", False),
                       attention_bias=raw.get("attention_bias", False), mlp_bias=raw.get("mlp_bias", False))


def rope_frequencies(config):
    """Radians per position of each pair of dimensions (head_dim/2,), float32. llama3 (Llama 3.1) divides the low frequencies by
    `factor`, keeps the high ones, and goes linearly from one to the other between."""
    rope, dim = config.rope, config.head_dim
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
    """In the dtype of its input: the float32 master weight is cast where it is used (under FSDP2 it comes already cast)."""

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.H, self.K, self.head_dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.q_proj = Linear(c.hidden_size, self.H * c.head_dim, bias=c.attention_bias)
        self.k_proj = Linear(c.hidden_size, self.K * c.head_dim, bias=c.attention_bias)
        self.v_proj = Linear(c.hidden_size, self.K * c.head_dim, bias=c.attention_bias)
        self.o_proj = Linear(self.H * c.head_dim, c.hidden_size, bias=c.attention_bias)

    def forward(self, x, cos, sin, mask, prompt=0, cached=None):
        B, T, _ = x.shape
        q, k, v = (proj(x).view(B, T, -1, self.head_dim).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cached is None:
            k, v = (t.repeat_interleave(self.H // self.K, dim=1) for t in (k, v))  # each kv head serves H/K query heads
            out = F.scaled_dot_product_attention(q[:, :, prompt:], k, v, attn_mask=mask)  # (B, H, T - prompt, head_dim)
            if prompt:  # without a mask: at 4,000 tokens twice as fast, and no T x T numbers
                q, k, v = (t[:, :, :prompt] for t in (q, k, v))
                out = torch.cat((F.scaled_dot_product_attention(q, k, v, is_causal=True), out), dim=2)
        else:  # generation: keys and values (B, K, L, head_dim) of all tokens so far, with room for these T at the end
            keys, values = cached
            keys[:, :, -T:], values[:, :, -T:] = k, v
            q = q.reshape(B, self.K, -1, self.head_dim)  # the H/K heads of a kv head as more queries: nothing is copied
            out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask.repeat(1, 1, self.H // self.K, 1))
            out = out.view(B, self.H, T, -1)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))


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

    def forward(self, x, cos, sin, mask, prompt=0, cached=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, prompt, cached)
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaModel(nn.Module):
    """The body: ids, positions, segments (B, T) -> hidden states (B, T, D). Module names are the checkpoint's. The first `prompt`
    columns are prompt in all rows. `cache` holds the tokens before these (evaluate.py): cache.extend(segments) -> segments (B, L)
    of all tokens, one (keys, values) a layer."""

    def __init__(self, c):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.frequencies = rope_frequencies(c)
        self.dtype, self.checkpoint_activations = torch.float32, False

    def forward(self, ids, positions, segments, prompt=0, cache=None):
        x = self.embed_tokens(ids).to(self.dtype)
        self.frequencies = self.frequencies.to(x.device)
        angles = positions[:, None, :, None] * self.frequencies  # (B, 1, T, head_dim/2)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        # A query sees a key that is not later and is in its own segment or in the prompt (0). Padding (-1) sees padding.
        key_segments, cached = (segments, [None] * len(self.layers)) if cache is None else cache.extend(segments)
        query, key = segments[:, None, prompt:, None], key_segments[:, None, None, :]
        seen = ((query == key) | ((key == 0) & (query > 0))).tril(key.shape[3] - query.shape[2])  # (B, 1, T - prompt, L); no cache: L = T
        mask = torch.where(seen, x.new_zeros(()), -math.inf)  # added to the scores; of booleans each layer would make its own
        for layer, keys_values in zip(self.layers, cached):
            if self.checkpoint_activations and self.training:
                x = checkpoint(layer, x, cos, sin, mask, prompt, use_reentrant=False)
            else:
                x = layer(x, cos, sin, mask, prompt, keys_values)
        return self.norm(x)


def memory_bytes(device):
    """All the memory of a GPU, or of the machine."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def build(make, device, precision, shard, compile_layers, checkpoint_activations):
    """make() -> a module whose `model` is the body, with float32 weights allocated but not yet filled: whole on each rank, or
    with `shard` FSDP2's share of it."""
    with torch.device("meta"):
        model = make()
    need, have = 4 * sum(param.numel() for param in model.parameters()), memory_bytes(device)
    if need > have * (dist.get_world_size() if shard else 1):
        raise UserError(f"the model of this config.json needs {need / 1e9:,.0f} GB for its weights in float32; {device} has"
                        f" {have / 1e9:,.0f} GB")
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}[precision]
    model.model.dtype, model.model.checkpoint_activations = dtype, checkpoint_activations
    if compile_layers:
        for layer in model.model.layers:
            layer.compile(dynamic=True)
    if shard:  # bf16 products; float32 gradients and their sums
        mixed = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for module in (*model.model.layers, model):  # also the root: a forward without backward must leave no whole weights
            fully_shard(module, mp_policy=mixed, reshard_after_forward=True)
    return model.to_empty(device=device)
# --- end shared: llama ---


# --- shared: policy (train_sft, train_pref) ---
class Llama(nn.Module):
    """A causal language model. Its forward returns log-probs, not logits: (N, V) never stands in memory at once, and a sharded
    head is gathered while it is used. A tied head is the embedding itself, as in the checkpoint."""

    def __init__(self, c, kernel="auto"):
        super().__init__()
        self.model = LlamaModel(c)
        self.lm_head = None if c.tie_word_embeddings else Linear(c.hidden_size, c.vocab_size, bias=False)
        self.kernel = kernel

    def forward(self, ids, positions, segments, predict, targets, cu_seqlens, prompt=0):
        """-> logps (S,), the sums over each sequence's targets, and token_logps (N,): nats, float32. predict (N,) indexes the
        flattened (B, T) positions that predict targets (N,); sequence s is cu_seqlens[s] : cu_seqlens[s + 1] (S + 1,)."""
        hidden = self.model(ids, positions, segments, prompt).flatten(0, 1)[predict]
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        return linear_sequence_logps(hidden, head.weight, targets, cu_seqlens, kernel=self.kernel)


def build_llama(config, device, kernel, precision, shard, compile_layers, checkpoint_activations):
    return build(lambda: Llama(config, kernel), device, precision, shard, compile_layers, checkpoint_activations)
# --- end shared: policy ---


# --- shared: load (train_sft, train_rm, train_pref, evaluate) ---
def find_model(name):
    """A model directory, or a Hub id's snapshot (safetensors and JSON only: pickled weights are never fetched)."""
    if Path(name).is_dir():
        return Path(name)
    if Path(name).exists() or len(Path(name).parts) > 2 or name.startswith((".", "/", "~")):
        raise UserError(f"{name}: no such model directory")
    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json", "tokenizer.model", "*.jinja"]))
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: no such directory, and not on the Hub: {error}") from None


def open_safetensors(path):
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a whole safetensors file: {error}") from None


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_sha256(directory):
    """Fingerprint of a model directory: its config and weights."""
    files = [directory / "config.json", *sorted(directory.glob("*.safetensors"))]
    return hashlib.sha256("".join(sha256(file) for file in files).encode()).hexdigest()


def verify(directory):
    """Check a checkpoint of ours against its manifest; a directory with neither that nor trainer/ is somebody else's. Raises
    UserError naming the first file that is damaged."""
    manifest, damaged = directory / "manifest.json", None
    if manifest.exists() or (directory / "trainer").exists():
        found = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
        try:
            digests = read_json(manifest)
            names = digests.keys() | {name for name in found if ".safetensors" in name}  # weights that somebody put there, too
            damaged = next((n for n in sorted(names) if n not in found or digests.get(n) != sha256(directory / n)), None)
        except UserError:
            damaged = manifest.name
    if damaged:
        raise UserError(f"{directory / damaged} is missing, new or not what was written: restore it, or delete {directory} and"
                        " go on from the checkpoint before")
    return directory


def share_like(param, tensor):
    """A whole tensor -> this rank's share of it, laid out like `param`."""
    tensor = tensor.to(param.device, param.dtype)
    return distribute_tensor(tensor, param.device_mesh, param.placements, src_data_rank=None) if isinstance(param, DTensor) else tensor


def open_weights(directory):
    """-> {tensor name: the open file that holds it}, of model.safetensors or of the files in this directory that its index names.
    Raises UserError where the two do not agree."""
    index, weight_map = directory / "model.safetensors.index.json", {}
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        names = weight_map.values() if isinstance(weight_map, dict) else ()
        plain = (isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name for name in names)
        if not names or not all(plain):
            raise UserError(f"{index}: weight_map must name .safetensors files in this directory")
    names = sorted(set(weight_map.values())) or ["model.safetensors"]
    if not (directory / names[0]).exists():
        raise UserError(f"{directory}: no {names[0]} (pickled weights, *.bin, are never read: convert them)")
    files = {name: open_safetensors(directory / name) for name in names}
    held = {name: set(file.keys()) for name, file in files.items()}
    for tensor, name in weight_map.items():
        if tensor not in held[name]:
            raise UserError(f"{directory / name}: lacks {tensor}, which the index says it holds: a file of another model")
    return {tensor: files[name] for name in names for tensor in held[name]}


@torch.no_grad()
def load_weights(model, directory, new=(), drop=()):
    """Fill every parameter from the directory's safetensors, one or sharded. Strict: raises UserError naming a missing, extra
    or misshapen tensor. For a change of head: parameters `new` are left as they are, tensors `drop` unread. Returns the model."""
    directory = verify(directory)
    files = open_weights(directory)
    params = {name: param for name, param in model.named_parameters() if name not in new}
    # Left out: rotary tables, which old exports hold and the config determines; the second copy of a tied head.
    extra = sorted(name for name in files.keys() - params.keys() - {*drop} if not name.endswith("rotary_emb.inv_freq"))
    if extra == ["lm_head.weight"]:
        if torch.equal(files[extra[0]].get_tensor(extra[0]), files["model.embed_tokens.weight"].get_tensor("model.embed_tokens.weight")):
            extra = []
    missing = sorted(params.keys() - files.keys())
    if missing or extra:
        raise UserError(f"{directory}: the weights do not fit config.json: missing {missing[:4]}, extra {extra[:4]}"
                        f" ({len(missing)} and {len(extra)} in all)")
    for name, param in params.items():
        shape, dtype = files[name].get_slice(name).get_shape(), files[name].get_slice(name).get_dtype()
        if shape != list(param.shape):
            raise UserError(f"{directory}: {name} has shape {shape}, config.json says {list(param.shape)}")
        if dtype not in ("F64", "F32", "F16", "BF16"):
            raise UserError(f"{directory}: {name} is {dtype}, not a float of 16 bits or more: the weights are quantized")
        param.copy_(share_like(param, files[name].get_tensor(name)))
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
    """write(temporary path), settle and rename: `path` is whole or as it was."""
    aside = path.with_name(f".{path.name}.tmp")
    try:
        write(aside)
        settle(aside)
        os.replace(aside, path)
        settle(path.parent)
    except (OSError, SafetensorError) as error:
        aside.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error}") from None
# --- end shared: load ---


# --- shared: save (train_sft, train_rm, train_pref) ---
def whole(tensor):
    """A parameter or optimizer tensor as the checkpoint holds it: unsharded (all ranks take part), on CPU on rank 0 alone."""
    tensor = tensor.detach()
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    # A copy: what was gathered from uneven shares is a view of a padded whole, which safetensors would refuse.
    return tensor.to("cpu", copy=True).contiguous() if dist.get_rank() == 0 else None


def save_checkpoint(directory, model, tokenizer, source, optimizer=None, state=None, head=None):
    """Write a model directory that transformers loads, with trainer/ if there is an optimizer; all ranks call it. `head`: what
    config.json says of a head that is no language model's. It is made aside, synced and renamed: `directory` is whole or absent.
    Raises UserError (disk full, say) with nothing half-written."""
    aside, failure = directory.with_name(f".{directory.name}.tmp"), None
    moments = {key: {name: optimizer.state[p].get(key) for name, p in model.named_parameters()}
               for key in ("exp_avg", "exp_avg_sq")} if optimizer is not None and optimizer.state else {}
    for part, tensors in {"weights": dict(model.named_parameters()), **moments}.items():
        tensors = {name: whole(tensor) for name, tensor in tensors.items()}  # all ranks, even after a failure
        if dist.get_rank() == 0 and failure is None:
            try:
                if part == "weights":
                    shutil.rmtree(aside, ignore_errors=True)
                    (aside / "trainer").mkdir(parents=True)
                    save_torch_state_dict(tensors, aside)
                    write_model_files(aside, tokenizer, source, head)
                else:
                    save_file(tensors, aside / "trainer" / f"{part}.safetensors")
            except (OSError, SafetensorError) as error:
                failure = error

    def finish():
        try:
            if failure is not None:
                raise failure
            if state is None:
                (aside / "trainer").rmdir()
            else:
                rng = {"cpu": torch.get_rng_state()} | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})
                save_file(rng, aside / "trainer" / "rng.safetensors")
                (aside / "trainer" / "state.json").write_text(json.dumps(state))
            publish(aside, directory)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(aside, ignore_errors=True)
            raise UserError(f"cannot write {directory}: {error}; earlier checkpoints are intact") from None

    on_rank_0(finish)


def write_model_files(directory, tokenizer, source, head=None):
    """config.json, the tokenizer and, for a language model, generation_config.json beside the weights, from the model at `source`."""
    config = json.loads((source / "config.json").read_text()) | (head or dict(architectures=["LlamaForCausalLM"])) | dict(dtype="float32")
    config.pop("torch_dtype", None)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    try:
        tokenizer.save_pretrained(directory)
    except Exception as error:  # of no narrower class: what `tokenizers` raises when the disk is full
        raise OSError(str(error)) from None
    if head:
        return
    generation = source / "generation_config.json"
    generation = json.loads(generation.read_text()) if generation.exists() else {"bos_token_id": tokenizer.bos_token_id}
    stops = generation.get("eos_token_id") or []
    stops = stops if isinstance(stops, list) else [stops]
    if tokenizer.eos_token_id not in stops:  # what training wrote at the end of each response must stop generation
        generation["eos_token_id"] = [*stops, tokenizer.eos_token_id]
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2))


def publish(aside, directory):
    """Write the manifest, settle every file and directory, then rename: the name appears when all of it is on disk."""
    files = sorted(path for path in aside.rglob("*") if path.is_file())
    manifest = aside / "manifest.json"
    manifest.write_text(json.dumps({str(path.relative_to(aside)): sha256(path) for path in files}, indent=2))
    for path in [*files, manifest, *(p for p in aside.rglob("*") if p.is_dir()), aside]:
        settle(path)
    os.rename(aside, directory)
    settle(directory.parent)


# Flags that fit a run to its machine or say what it keeps; every other flag must be the same when a run resumes.
FREE_FLAGS = {"resume", "keep", "track", "timeout", "micro_batch_size", "shard", "checkpoint_activations", "compile", "out"}


def checkpoints(out):
    """The checkpoints of a run, oldest first. Other names (step_000500.bak) are not ours."""
    return sorted((path for path in out.glob("step_*") if path.name[5:].isdecimal()), key=lambda path: int(path.name[5:]))


def checkpoint_to_resume(out, header):
    """-> out/final if the run is complete, its newest checkpoint, or None to begin. `header` is the line that this run would
    begin metrics.jsonl with. Raises UserError where `out` holds something else or another run."""
    out.mkdir(parents=True, exist_ok=True)
    if all(path.name.startswith(".") for path in out.iterdir()):  # nothing, or what a kill left of the very first file
        return None
    if header["args"]["resume"] == "never":
        raise UserError(f"--resume never, and {out} is not empty: choose another --out")
    try:
        found = json.loads((out / "metrics.jsonl").read_text().split("\n")[0])
        then, now = ({"script": h["script"], "data fingerprint": h["data"]} | h["args"] for h in (found, header))
    except (OSError, ValueError, KeyError):
        raise UserError(f"{out} is not empty and holds no run (no metrics.jsonl): choose another --out") from None
    differ = [f"{k} was {then.get(k)!r}, is {now.get(k)!r}" for k in sorted({*then, *now} - FREE_FLAGS) if then.get(k) != now.get(k)]
    if differ:
        raise UserError(f"{out} holds another run: {'; '.join(differ)}. Choose another --out")
    for leftover in (*out.glob(".step_*"), out / ".final.tmp"):  # of a kill: half a checkpoint written, or half of one deleted
        shutil.rmtree(leftover, ignore_errors=True)
    if (out / "final").exists():
        return out / "final"
    steps = checkpoints(out)
    return verify(steps[-1]) if steps else None


@torch.no_grad()
def load_trainer(directory, model, optimizer):
    """Put back the optimizer state and random state that save_checkpoint wrote; -> the state dict. Any number of ranks."""
    trainer = directory / "trainer"
    state = json.loads((trainer / "state.json").read_text())
    for key in ("exp_avg", "exp_avg_sq"):
        if (trainer / f"{key}.safetensors").exists():
            with open_safetensors(trainer / f"{key}.safetensors") as file:
                for name, param in model.named_parameters():
                    moment = torch.zeros_like(param).copy_(share_like(param, file.get_tensor(name)))
                    optimizer.state[param] |= {key: moment, "step": torch.tensor(float(state["updates"]), device=param.device)}
    with open_safetensors(trainer / "rng.safetensors") as file:
        torch.set_rng_state(file.get_tensor("cpu"))
        if torch.cuda.is_available() and "cuda" in file.keys():
            torch.cuda.set_rng_state(file.get_tensor("cuda"))
    return state


def prune(out, keep):
    """Delete all but the newest `keep` checkpoints (0: none is deleted), each renamed first so that none is half there."""
    for directory in checkpoints(out)[:-keep] if keep else []:
        doomed = directory.with_name(f".{directory.name}.old")
        os.rename(directory, doomed)
        shutil.rmtree(doomed)
# --- end shared: save ---


# ------------------------------------------------------------------------------------------------------------- the run
def main():
    args = parse_args()
    rank, world, device = start(args.seed, args.timeout)
    say = tqdm.write if rank == 0 else lambda line: None
    out = Path(args.out)

    # Data
    model_dir = find_model(args.model)
    ref_dir = find_model(args.ref) if args.ref else model_dir
    tokenizer, vocab_size = load_tokenizer(model_dir), read_config(model_dir).vocab_size
    limits = (tokenizer, vocab_size, args.max_length, args.max_prompt_length, args.truncation)
    pairs, index, report = load_pairs(args.data, False, *limits)
    say(report)
    eval_pairs, eval_index = [], None
    if args.eval_data:
        eval_pairs, eval_index, report = load_pairs(args.eval_data, True, *limits)
        say(report)
    steps_per_epoch = math.ceil(len(pairs) / args.batch_size)
    total = min(args.epochs * steps_per_epoch, args.max_steps or math.inf)

    # A new run, or one to go on with
    cap = f"{2 * args.log_eps:g}" if args.loss in ("is_dpo", "is_ipo") else "none"
    data_print = ids_sha256(ids for pair in pairs + eval_pairs for ids in (pair.prompt, pair.chosen, pair.rejected))
    header = run_header("train_pref", args, world, device, data=data_print, pairs=len(pairs), steps=total, weight_cap_nats=cap)
    resumed = on_rank_0(lambda: checkpoint_to_resume(out, header))
    if resumed == out / "final":
        say(f"{resumed} exists: this run is complete. Give another --out to begin a new one.")
        return

    metrics_file = open_metrics(out / "metrics.jsonl", header, resumed) if rank == 0 else None

    # Reference log-probs, computed once, by the path that training takes, and read from their file ever after
    how = dict(device=device, kernel=args.kernel, precision=args.precision, shard=args.shard, compile_layers=args.compile,
               checkpoint_activations=args.checkpoint_activations)
    policy, begin_dir = None, resumed or model_dir
    reached = sorted(epoch_order(len(pairs), args.seed, 0)[: total * args.batch_size])  # --max_steps may end before the rest
    caches = [(out / "ref_logps.safetensors", [pairs[i] for i in reached], index[reached]),
              (out / "ref_logps_eval.safetensors", eval_pairs, eval_index)]
    fingerprint = on_rank_0(lambda: f"{weights_sha256(ref_dir)[:16]}-{data_print[:16]}-{args.precision}")
    for path, of_pairs, of_index in caches:
        if of_pairs and not on_rank_0(path.exists):
            policy = policy or load_weights(build_llama(read_config(ref_dir), **how), ref_dir)
            logps = all_logps(policy, of_pairs, args, rank, world, device, "reference log-probs")
            on_rank_0(lambda: write_ref_logps(path, logps, of_index, fingerprint))
    ref_logps = torch.full((len(pairs), 2), math.nan)
    ref_logps[reached] = read_ref_logps(caches[0][0], fingerprint)
    eval_ref_logps = read_ref_logps(caches[1][0], fingerprint) if eval_pairs else None

    # Policy and optimizer
    if policy is None or begin_dir != ref_dir:
        policy = load_weights(build_llama(read_config(begin_dir), **how), begin_dir)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, eps=args.adam_eps, weight_decay=args.weight_decay, fused=True)
    state = dict(step=0, updates=0, num_tokens=0, skipped=0, skipped_in_a_row=0)
    if resumed:
        state = load_trainer(resumed, policy, optimizer)
        say(f"resumed from {resumed}")
    # The sum over ranks comes once a step; the buckets are the gradients themselves, so DDP costs no memory.
    model = policy if args.shard or world == 1 else DistributedDataParallel(policy, gradient_as_bucket_view=True)
    track = make_tracker(args.track if rank == 0 else "none", out, args)
    say(f"{args.loss}: {sum(p.numel() for p in policy.parameters()) / 1e6:.2f}M parameters, {len(pairs)} pairs, {total} steps of"
        f" {args.batch_size}, beta {args.beta:g}, weight cap {cap} nats, {world} x {header['device']}, {args.precision} -> {out}")

    stop, began, order_epoch, order = Stop(), time.perf_counter(), None, None
    bar = tqdm(total=total, initial=state["step"], disable=rank > 0 or not sys.stderr.isatty(), unit="step")
    for step in range(state["step"] + 1, total + 1):
        step_began = time.perf_counter()
        epoch, k = divmod(step - 1, steps_per_epoch)
        if epoch != order_epoch:
            order_epoch, order = epoch, epoch_order(len(pairs), args.seed, epoch)
        picked = order[k * args.batch_size : (k + 1) * args.batch_size]
        lr = learning_rate(step, total, args.warmup_steps, args.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        batch = [pairs[i] for i in picked]
        logps, lengths, grad_norm, applied = train_step(model, optimizer, batch, ref_logps[picked], args, rank, world, device)

        step_s = time.perf_counter() - step_began
        n_tokens = sum(p.n_tokens + len(p.prompt) for p in batch)  # the prompt twice, as TRL counts
        if step == 1 and ref_dir == model_dir:  # the policy is the reference still: what differs is rounding (in bf16 not little)
            spread = (logps.cpu() - ref_logps[picked]).abs().max().item()
            say(f"before step 1 |log pi - log ref| is at most {spread:.1e} nats")
        state = dict(step=step, updates=state["updates"] + applied, num_tokens=state["num_tokens"] + n_tokens,
                     skipped=state["skipped"] + (not applied), skipped_in_a_row=0 if applied else state["skipped_in_a_row"] + 1)
        metrics = preference_metrics(args, logps, ref_logps[picked].to(device), lengths)
        metrics |= {"grad_norm": grad_norm, "learning_rate": lr, "epoch": step / steps_per_epoch, "num_tokens": state["num_tokens"],
                    "skipped": state["skipped"], "tokens_per_s": n_tokens / step_s, "step_s": step_s, "mem_gb": memory_gb(device)}
        if args.eval_every and eval_pairs and (step % args.eval_every == 0 or step == total):
            eval_logps = all_logps(policy, eval_pairs, args, rank, world, device, "evaluation")
            eval_lengths = torch.tensor([[len(p.chosen), len(p.rejected)] for p in eval_pairs], dtype=torch.float32)
            metrics |= {f"eval_{k}": v for k, v in preference_metrics(args, eval_logps, eval_ref_logps, eval_lengths).items()}
        if rank == 0:
            write_metrics(metrics_file, {"step": step} | metrics)
            track(metrics, step)
            say(step_line(step, total, metrics, applied))
            bar.update()

        signum, diverged = stop.agreed(device), state["skipped_in_a_row"] == 10
        if diverged:
            state["skipped_in_a_row"] = 0  # whoever goes on from here has ten more
        if signum or diverged or (args.save_every and step % args.save_every == 0):
            save_checkpoint(out / f"step_{step:06d}", policy, tokenizer, model_dir, optimizer, state)
            on_rank_0(lambda: prune(out, args.keep))
        if diverged:
            raise UserError(f"10 steps in a row had a loss or gradient that is not finite, up to step {step}: lower --lr, or look at"
                            f" the data; {out}/step_{step:06d} holds the weights of the last good step")
        if signum:
            say(f"stopped by signal {signum} after step {step}; the same command goes on from there")
            return 128 + signum

    bar.close()
    save_checkpoint(out / "final", policy, tokenizer, model_dir)
    if rank == 0:
        say(f"done: {total} steps in {time.perf_counter() - began:.0f} s; {summary(out / 'metrics.jsonl')}; policy in {out}/final")
        judges = "--preset toy" if args.preset == "toy" else f"--rm REWARD_MODEL --ref {args.ref or args.model} --data HELD_OUT"
        say(f"next: python evaluate.py golden {judges} {out} && python evaluate.py plot {out} --out {out}/figs")


def step_line(step, total, m, applied):
    """What the screen says of a step."""
    line = (f"step {step}/{total} | loss {m['loss']:.4f} | acc {m['rewards/accuracies']:.2f} | margin {m['rewards/margins']:+.4f}"
            f" | weight {m['weights/mean']:.3f} | ess {m['weights/ess']:.1f} | norm {m['grad_norm']:.3f} | lr {m['learning_rate']:.2e}"
            f" | {1e3 * m['step_s']:.0f} ms | {m['tokens_per_s']:.0f} tok/s")
    if "eval_loss" in m:
        line += f" || held out: loss {m['eval_loss']:.4f} acc {m['eval_rewards/accuracies']:.3f}"
    return line if applied else line + " | NOT FINITE: skipped"


def summary(path):
    """The run in one line: means over the first and the last tenth of its steps."""
    lines = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    tenth = max(1, len(lines) // 10)
    mean = lambda name, part: sum(line[name] or 0.0 for line in part) / len(part)
    text = (f"loss {mean('loss', lines[:tenth]):.4f} -> {mean('loss', lines[-tenth:]):.4f}, accuracy"
            f" {mean('rewards/accuracies', lines[-tenth:]):.3f}, mean weight {mean('weights/mean', lines[-tenth:]):.3f}")
    return text + (f", held-out accuracy {lines[-1]['eval_rewards/accuracies']:.3f}" if "eval_loss" in lines[-1] else "")


if __name__ == "__main__":
    guard(main)
