"""Reward model training: the (golden) reward model that labels pairs and judges policies.

A Llama with a linear head on a response's last token, r(x, y), trained on pairs (y_w chosen, y_l rejected) by Bradley
and Terry:

    L = mean over the step's pairs of  -log sigmoid(r(x, y_w) - r(x, y_l)) + center (r(x, y_w) + r(x, y_l))^2,

where the second term is off by default. It starts from an SFT checkpoint, whose language model head gives way to a new
one, or goes on from a reward model. The IS-DAA paper's golden reward model (Appendix C: TL;DR and HH pooled) is
`--preset tldr+hh`.

    python train_rm.py                                                   # CPU: the embedded toy task
    python train_rm.py --model DIR_OR_HUB_ID --data pairs.jsonl          # 1 GPU
    torchrun --nproc_per_node=4 train_rm.py --preset tldr+hh             # 4 GPUs, 8B: the preset implies --shard
    torchrun --nnodes=2 --nproc_per_node=4 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train_rm.py ...

Units: rewards in nats of log-odds (no other zero or scale); lengths in tokens; batch sizes in pairs; a step is an
optimizer step.
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
from tqdm import tqdm

from plumbing.checkpoint import find_model, load_trainer, load_weights, model_files, save_checkpoint, shard_like
from plumbing.data import (RowTexts, SkipRow, assistant_stop_id, is_verbatim, lacking, load_rows, load_tokenizer,
                           read_behaviour, render_chat, stop_ids, wrong_types)
from plumbing.process import (UserError, catch_signals, init_distributed, on_rank_0, print_rank0, read_json, run_main,
                              to_json, write_text)
from plumbing.run import (Parser, StepLog, announce_schedule, checkpoint_to_resume, common_flags, count_step, interval,
                          is_due, model_card, open_tracker, parse_with_preset, run_header, save_or_stop, step_metrics)


# -------------------------------------------------------------------------------------- the loss and what is measured
def bradley_terry_loss(chosen, rejected, center=0.0):
    """-log sigmoid(r_w - r_l) + center (r_w + r_l)^2 of rewards (B,) -> losses (B,). A pair tells rewards apart but not
    from zero: `center` holds their mean there (Eisenstein et al. 2023; TRL's center_rewards_coefficient)."""
    return -F.logsigmoid(chosen - rejected) + center * (chosen + rejected) ** 2


@torch.no_grad()
def reward_metrics(rewards, center):
    """What the log says of the rewards (B, 2) of a batch: chosen, rejected. Names are TRL's."""
    chosen, rejected = rewards.unbind(1)
    metrics = {"loss": bradley_terry_loss(chosen, rejected, center), "rewards/chosen": chosen,
               "rewards/rejected": rejected, "rewards/margins": chosen - rejected,
               "rewards/accuracies": (chosen > rejected).float()}
    return {name: values.mean().item() for name, values in metrics.items()}


def calibration(rewards, n_bins=10):
    """Are pairs called with probability p called rightly in a share p of cases? -> the reliability table and expected
    calibration error of rewards (P, 2). p = sigmoid(|r_w - r_l|) is the model's confidence in the response it prefers,
    in [0.5, 1], and the bins are equally wide; a pair counts as right if r_w > r_l. The error is the mean over pairs of
    |confidence - accuracy| of their bin (Guo et al. 2017)."""
    margins = (rewards[:, 0] - rewards[:, 1]).double()
    confidence = margins.abs().sigmoid()
    right = (margins > 0).double()
    bins = (2 * n_bins * (confidence - 0.5)).long().clamp(max=n_bins - 1)  # 1.0 belongs to the last
    table = []
    error = 0.0
    for k in range(n_bins):
        inside = bins == k
        row = dict(low=0.5 + k / (2 * n_bins), high=0.5 + (k + 1) / (2 * n_bins), count=inside.sum().item(),
                   confidence=None, accuracy=None)
        if row["count"]:
            row["confidence"] = confidence[inside].mean().item()
            row["accuracy"] = right[inside].mean().item()
            error += row["count"] * abs(row["confidence"] - row["accuracy"])
        table.append(row)
    return dict(pairs=len(rewards), ece=error / len(rewards), bins=table)


HEAD = "ForSequenceClassification"  # of transformers' reward models


@torch.no_grad()
def load_reward_model(model, directory, seed):
    """Fill `model` from a reward model, or from a language model with a new head: normal, std 1/sqrt(D + 1) as in the
    paper's code, so that rewards begin with a spread of about 1. Strict but for the head. -> what became of it."""
    config = read_config(directory)
    if architecture(config, HEAD) in (config.architectures or []):
        load_weights(model, directory)
        return f"score.weight of {directory} kept"
    # Drawn whole on CPU: ranks, sharded or not, begin with the same.
    generator = torch.Generator().manual_seed(seed)
    score = model.score.weight
    std = (score.shape[1] + 1) ** -0.5
    score.copy_(shard_like(score, torch.empty(score.shape).normal_(std=std, generator=generator)))
    load_weights(model, directory, new=["score.weight"], drop=["lm_head.weight"])
    tied = " (tied: the embedding, which stays)" if config.tie_word_embeddings else ""
    return f"lm_head.weight{tied} of {directory} dropped, score.weight new with std {std:.4f}, seed {seed}"


def choose_pad(tokenizer):
    """The padding token that is saved with the model. transformers pools at the last token that is not pad_token_id, so
    it must never be what a response ends with: EOS, which many tokenizers pad with, or the template's stop. In turn:
    the tokenizer's own, Llama 3's, BOS (which begins prompts and ends nothing), another special token. Rows are to be
    padded on the right, where it changes no position."""
    special = [k for k, token in sorted(tokenizer.added_tokens_decoder.items(), reverse=True) if token.special]
    llama3 = tokenizer.get_vocab().get("<|finetune_right_pad_id|>")
    ids = [tokenizer.pad_token_id, llama3, tokenizer.bos_token_id, *special]
    taken = {None, tokenizer.unk_token_id} | stop_ids(tokenizer)
    pad = next((k for k in ids if k not in taken), None)
    if pad is None:
        raise UserError("the tokenizer has no special token besides EOS to pad with: set pad_token in"
                        " tokenizer_config.json")
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.convert_ids_to_tokens(pad), "right"
    return pad


# ----------------------------------------------------------------------------------------------------------- the flags
HERE = Path(__file__).resolve().parent
# Appendix C of the paper, with the policies' warm-up; the 512 prompt tokens are its released code's.
PAPER = dict(model="out/sft-8b/final", epochs=1, max_length=640, max_prompt_length=512, batch_size=128,
             micro_batch_size=4, lr=5e-6, warmup_steps=100, shard=True, keep_state=1)
PRESETS = {
    "toy": dict(model=f"{HERE}/toy/sft", data=f"{HERE}/toy/rm_pairs.jsonl.gz",
                eval_data=f"{HERE}/toy/rm_pairs_eval.jsonl.gz", epochs=2, max_length=128, max_prompt_length=96,
                batch_size=32, micro_batch_size=32, lr=2e-3, warmup_steps=30, save_every=448, eval_every=224,
                threads=1),
    "paper": dict(PAPER, eval_data="", shard=False),
    "tldr+hh": dict(PAPER, data="tldr+hh", eval_data="tldr+hh"),
    "tldr": dict(PAPER, data="tldr", eval_data="tldr"),
    "hh": dict(PAPER, data="hh", eval_data="hh"),
    "ultrafeedback": dict(PAPER, data="ultrafeedback", eval_data="ultrafeedback",
                          model="meta-llama/Llama-3.1-8B-Instruct"),
}
MADE_BY = {PAPER["model"]: "torchrun --nproc_per_node=4 train_sft.py --preset tldr+hh --model meta-llama/Llama-3.1-8B"
                           " --shard --out out/sft-8b"}
# Hub datasets that a name stands for: id, train split, held-out split, the columns read (a prompt may be implicit).
RECIPES = {
    "tldr": ("trl-lib/tldr-preference", "train", "validation[:1024]", ("prompt", "chosen", "rejected")),
    "hh": ("Anthropic/hh-rlhf", "train", "test[:1024]", ("chosen", "rejected")),
    "ultrafeedback": ("HuggingFaceH4/ultrafeedback_binarized", "train_prefs", "test_prefs[:1024]",
                      ("chosen", "rejected")),  # the prompt is their first message
}


def parse_args(argv=None):
    parser = Parser(description="Reward model training on preference pairs (Bradley-Terry).")
    add = parser.add_argument_group("the loss").add_argument
    add("--center", type=float, default=0.0, help="weight of (r_w + r_l)^2, which holds the mean reward at 0; 0: off")
    add("--shared_prompt", action=argparse.BooleanOptionalAction, default=True, help="compute a pair's prompt once;"
        " --no-shared_prompt runs two plain rows: the same result at up to twice the cost")
    common_flags(parser)
    args = parse_with_preset(parser, PRESETS, argv)
    args.out = args.out or f"out/rm-{args.preset}-seed{args.seed}"
    return args


# ---------------------------------------------------------------------------------------------------- batches and steps
def collate_responses(pairs, shared_prompt, device):
    """Pairs -> the arguments of RewardModel.forward; rewards come out as chosen, rejected of each pair in turn, each
    read at the response's last token by position: its stop, unless the response was cut."""
    rows, places = pair_rows(pairs, shared_prompt)
    last_tokens = [(row, start + len(response) - 1) for row, start, response in places]
    return batch_tensors(rows, last_tokens, device)


@torch.no_grad()
def all_rewards(reward_model, pairs, args, desc):
    """The rewards of every pair (P, 2), float32, on every rank: chosen, rejected."""
    rank = dist.get_rank()
    device = next(reward_model.parameters()).device
    rewards = torch.zeros(len(pairs), 2, device=device)
    lengths = [sum(map(len, pair)) for pair in pairs]
    rounds = split_into_micro_batches(lengths, args.micro_batch_size, dist.get_world_size())
    for micro in tqdm(rounds, desc=desc, disable=rank > 0 or not sys.stderr.isatty(), leave=False):
        picked = micro[rank] or [0]  # an idle rank computes pair 0, so that sharded collectives match
        batch = collate_responses([pairs[i] for i in picked], args.shared_prompt, device)
        result = reward_model(**batch).view(-1, 2)
        if micro[rank]:
            rewards[to_device(picked, device)] = result
    dist.all_reduce(rewards)  # each pair was written by one rank: a sum with zeros is exact
    return rewards.cpu()


def reward_step(reward_model, optimizer, pairs, args):
    """One optimizer step on a batch of pairs (all ranks hold the whole batch). -> rewards (B, 2) of the whole batch
    before the step, global gradient norm before clipping, and whether the update was finite and applied."""
    rank = dist.get_rank()
    world = dist.get_world_size()
    device = next(reward_model.parameters()).device
    B = len(pairs)
    rewards = torch.zeros(B, 2, device=device)
    rounds = split_into_micro_batches([sum(map(len, pair)) for pair in pairs], args.micro_batch_size, world)
    for k, micro in enumerate(rounds):
        picked = micro[rank] or [0]  # an idle rank computes pair 0, times 0, so that collectives match
        # DDP sums the ranks' gradients once, with the last micro-batch; FSDP2 each time, as it keeps only its shard.
        reward_model.require_backward_grad_sync = k == len(rounds) - 1
        batch = collate_responses([pairs[i] for i in picked], args.shared_prompt, device)
        micro_rewards = reward_model(**batch).view(-1, 2)
        chosen, rejected = micro_rewards.unbind(1)
        losses = bradley_terry_loss(chosen, rejected, args.center)
        loss = losses.sum() * (world / B)  # DDP and FSDP2 average over ranks: the sum over pairs / B remains
        if not micro[rank]:
            loss = 0.0 * loss
        loss.backward()
        if micro[rank]:
            rewards[to_device(picked, device)] = micro_rewards.detach()
    dist.all_reduce(rewards)
    grad_norm, applied = clip_and_step(reward_model, optimizer, args.grad_clip, rewards.isfinite().all())
    return rewards, grad_norm, applied


# ------------------------------------------------------------------------------------------------------------- the run
def main():
    args = parse_args()
    _, world, device = init_distributed(args.seed, args.timeout, args.threads)
    out = Path(args.out)
    model_dir = find_model(args.model, MADE_BY.get(args.model))

    # A new run, or one to go on with
    header = on_rank_0(lambda: run_header("train_rm", args, world, device, dict(model=model_dir)))
    resumed = on_rank_0(lambda: checkpoint_to_resume(out, header))
    if resumed == out / "final":
        print_rank0(f"{resumed} exists: this run is complete. To train on: another --out, --model"
                    f" {shlex.quote(str(resumed))}")
        return 0
    on_rank_0(lambda: open_tracker(args.track, out, header["args"]))

    # Data
    begin_dir = resumed or model_dir
    config = read_config(begin_dir)
    check_length(config, model_dir, args.max_length)
    tokenizer = load_tokenizer(model_dir, args.chat_template_kwargs)
    reading = dict(row_type=Pair, split=split_pair, recipes=RECIPES, tokenizer=tokenizer,
                   vocab_size=config.vocab_size, max_length=args.max_length, max_prompt_length=args.max_prompt_length)
    pairs = load_rows(out / "data.safetensors", header, source=args.data, held_out=False, **reading)
    eval_pairs = load_rows(out / "data_eval.safetensors", header, source=args.eval_data, held_out=True, **reading)
    steps_per_epoch = math.ceil(len(pairs) / args.batch_size)
    total = min(args.epochs * steps_per_epoch, args.max_steps or math.inf)
    header |= dict(pairs=len(pairs), steps=total)

    # Reward model and optimizer
    reward_model = build_model(lambda: RewardModel(config), device, args.precision, shard=args.shard,
                               compile_layers=args.compile, checkpoint_activations=args.checkpoint_activations)
    print_rank0(load_reward_model(reward_model, begin_dir, args.seed))
    files = model_files(begin_dir, tokenizer, assistant_stop_id(tokenizer), pad_token_id=choose_pad(tokenizer),
                        architectures=[architecture(config, HEAD)], id2label={"0": "reward"}, label2id={"reward": 0})
    del files["generation_config.json"]
    optimizer = torch.optim.AdamW(reward_model.parameters(), lr=args.lr, eps=1e-5, weight_decay=0.0, fused=True)
    state = dict(step=0, updates=0, num_tokens=0, skipped=0, skipped_in_a_row=0)
    if resumed:
        state = load_trainer(resumed, reward_model, optimizer)
        print_rank0(f"resumed from {resumed}")
    parallel_model = reward_model  # what a step calls: under DDP its wrapper, sharded or alone itself
    if world > 1 and not args.shard:
        batch = collate_responses([pairs[0]], args.shared_prompt, device)
        parallel_model = data_parallel(reward_model, lambda model: model(**batch).sum())
    size = sum(p.numel() for p in reward_model.parameters()) / 1e6
    print_rank0(f"reward model: {size:.2f}M parameters, {len(pairs)} pairs, {total} steps of {args.batch_size},"
                f" {world} x {header['device']}, {args.precision} -> {out}")
    announce_schedule(args, "pairs", len(pairs), total)

    def save(directory):
        save_checkpoint(directory, model=reward_model, tokenizer=tokenizer, files=files, run=header["run"],
                        optimizer=optimizer, state=state)

    log = StepLog(out / "metrics.jsonl", header, resumed, steps_done=state["step"], total=total,
                  log_every=args.log_every, track=args.track)
    signals = catch_signals()
    began = time.perf_counter()
    for step in range(state["step"] + 1, total + 1):
        step_began = time.perf_counter()
        epoch, k = divmod(step - 1, steps_per_epoch)
        picked = epoch_order(len(pairs), args.seed, epoch)[k * args.batch_size : (k + 1) * args.batch_size]
        batch = [pairs[i] for i in picked]
        lr = learning_rate(step, total, args.warmup_steps, args.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        rewards, grad_norm, applied = reward_step(parallel_model, optimizer, batch, args)

        # Log
        step_s = time.perf_counter() - step_began
        n_tokens = sum(2 * len(pair.prompt) + len(pair.chosen) + len(pair.rejected) for pair in batch)  # as TRL counts
        count_step(state, applied=applied, n_tokens=n_tokens)
        metrics = reward_metrics(rewards, args.center)
        metrics |= step_metrics(state, grad_norm=grad_norm, lr=lr, epoch=step / steps_per_epoch, n_tokens=n_tokens,
                                step_s=step_s)
        if eval_pairs and is_due(step, interval(args.eval_every, total), total):
            eval_rewards = all_rewards(reward_model, eval_pairs, args, "evaluation")
            table = dict(step=step) | calibration(eval_rewards)
            metrics |= {f"eval_{name}": value for name, value in reward_metrics(eval_rewards, args.center).items()}
            metrics["eval_ece"] = table["ece"]
            on_rank_0(lambda: write_text(out / "calibration.json", to_json(table, indent=2)))
        log.write(step, metrics, reward_line(step, total, metrics), applied)

        # Save, stop
        code = save_or_stop(out, state, signals, save, save_every=interval(args.save_every, total), keep=args.keep,
                            keep_state=args.keep_state)
        if code:
            return code

    log.close(state)
    files |= {"README.md": model_card(header, "AutoModelForSequenceClassification")}
    save_checkpoint(out / "final", model=reward_model, tokenizer=tokenizer, files=files, run=header["run"],
                    save_dtype=args.save_dtype)
    print_rank0(f"done: {total} steps in {time.perf_counter() - began:.0f} s; reward model in {out}/final")
    if (out / "calibration.json").exists():
        print_rank0(reliability(read_json(out / "calibration.json")))
    print_rank0(f"next: python {HERE}/evaluate.py label --rm {shlex.quote(str(out))}/final --samples SAMPLES"
                " --out pairs.jsonl")
    return 0


def reward_line(step, total, m):
    """What the screen says of a step."""
    line = (f"step {step}/{total} | loss {m['loss']:.4f} | acc {m['rewards/accuracies']:.2f}"
            f" | margin {m['rewards/margins']:+.4f} | norm {m['grad_norm']:.3f} | lr {m['learning_rate']:.2e}"
            f" | {1e3 * m['step_s']:.0f} ms | {m['tokens_per_s']:.0f} tok/s")
    if "eval_loss" in m:
        line += (f" || held out: loss {m['eval_loss']:.4f} acc {m['eval_rewards/accuracies']:.3f} margin"
                 f" {m['eval_rewards/margins']:+.3f} ece {m['eval_ece']:.3f}")
    return line


def reliability(table):
    """calibration.json for the screen."""
    lines = [f"held out, {table['pairs']} pairs: expected calibration error {table['ece']:.3f}",
             "confidence    pairs   mean  right"]
    for row in table["bins"]:
        means = f"{row['confidence']:.3f}  {row['accuracy']:.3f}" if row["count"] else "    -      -"
        lines.append(f"{row['low']:.2f} - {row['high']:.2f} {row['count']:6d}  {means}")
    return "\n".join(lines)


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


# --- shared: reward (train_rm, evaluate) ---
class RewardModel(nn.Module):
    """The body and a linear head: transformers' LlamaForSequenceClassification with one label."""

    def __init__(self, c):
        super().__init__()
        self.model = LlamaModel(c)
        self.score = CastLinear(c.hidden_size, 1, bias=False)

    def forward(self, ids, positions, segments, predict):
        """-> rewards (S, 1), float32. predict (S,) indexes the flattened (B, T): each response's last token."""
        hidden = self.model(ids, positions, segments).flatten(0, 1)[predict]
        return self.score(hidden.to(torch.promote_types(hidden.dtype, torch.float32)))
# --- end shared: reward ---


if __name__ == "__main__":
    run_main(main)
