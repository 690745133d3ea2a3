"""Evaluation: what a policy says, what a reward model makes of it, and whether training has over-optimized.

    python evaluate.py sample --model out/sft/final --data prompts.jsonl --out samples.jsonl  # completions of a policy
    python evaluate.py label  --rm out/rm/final --samples samples.jsonl --out pairs.jsonl     # golden preference set
    python evaluate.py golden --rm out/rm/final --ref out/sft/final --data held_out.jsonl RUN...    # RUN/golden.jsonl
    python evaluate.py bench  --suite mt_bench --model out/run/final --questions question.jsonl --out answers.jsonl
    python evaluate.py judge  --samples samples.jsonl --api URL --judge gpt-4o-mini --out verdicts.jsonl
    python evaluate.py plot   RUN... --out figs                                               # figures 3 to 6, Table 1

`torchrun --nproc_per_node=4 -- evaluate.py sample ...` divides the prompts among ranks; so do label, golden and bench
(without the `--` torchrun takes --n for an option of its own).
Everything is JSON lines, and every command goes on where it was stopped. The protocol is Appendix C and D of the IS-DAA
paper: win rate over all combinations of sampled completions (temperature 0.7, top-p 0.95) and reference responses, as
the golden reward model sees them; KL(policy || ref) of completions sampled at temperature 1 from all tokens, the only
ones whose KL it is.

Units: rewards in nats of log-odds; KL in nats a response; lengths in tokens (the stop counted); n in prompts, k in
completions a prompt. A response ends with its stop: the token, EOS or what the chat template ends a turn with, that the
policy said; samples keep it apart from the text (`stops`; null: cut at --max_new_tokens), and no judge sees it.

A conversation stays a list of messages in every file: policy, reward model and judge each read it in their own form.
What is not finite is refused, naming the model and the row. One bad checkpoint, run, sample, question, answer or
request is said with its place, the others go on, and the exit code is 1.
"""

import functools
import hashlib
import itertools
import json
import math
import random
import re
import shlex
import sys
import time
from array import array
from collections import namedtuple
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from plumbing.checkpoint import find_model, model_fingerprint, load_weights, verify_checkpoint
from plumbing.data import (SkipRow, apply_template, assistant_stop_id, begins_with_a_space, count_skip, describe_skips,
                           encode, encode_after, finish_prompt, lacking, load_tokenizer, read_jsonl, read_rows,
                           render_chat, require_known, stop_ids, text_begin, text_messages, wrong_types)
from plumbing.process import (UserError, file_sha256, init_distributed, lock_for_writing, make_directory, on_rank_0,
                              parse_json, print_rank0, read_json, read_text, run_main, to_json, write_atomically,
                              write_text)
from plumbing.rows import (append_rows, as_lines, complete_rows, read_own_rows, read_whole_lines, write_json,
                           write_lines, write_once)
from plumbing.run import Parser, check_ranges, json_object, open_tracker
from plumbing.server import ask_all


# --------------------------------------------------------------------------------------------------- the estimators
def win_shares(rewards, reference_rewards):
    """Share of the (completion, reference) combinations of each prompt that the completion wins, ties half -> (n,).
    rewards and reference_rewards: a vector a prompt. The win rate is their mean (Appendix D)."""
    shares = []
    for ours, theirs in zip(rewards, reference_rewards):
        wins = (ours[:, None] > theirs).double()
        ties = ours[:, None] == theirs
        shares.append((wins + 0.5 * ties).mean())
    return torch.stack(shares)


def mean_and_error(values):
    """Mean of (n,) values, one a prompt, and its standard error. A prompt's completions are averaged before: they are
    not independent, prompts are (the error clustered by prompt)."""
    n = len(values)
    error = (values.double().std() / n**0.5).item() if n > 1 else math.nan
    return values.mean().item(), error


def step_kl(policy_logits, ref_logits):
    """sum_v pi(v) (log pi(v) - log ref(v)) of each row of logits (N, V) -> (N,). Summed over the steps of a response
    drawn from pi it estimates KL(pi || ref) without bias, is never negative, and varies less than log pi(y) - log
    ref(y), which has the same mean (Rao-Blackwell; Amini et al. 2025). The paper's Appendix C prints log r + (r - 1), r
    = pi/ref: its mean is KL + chi^2."""
    policy = policy_logits.log_softmax(-1)
    ref = ref_logits.log_softmax(-1)
    return (policy.exp() * (policy - ref)).sum(-1)


# ------------------------------------------------------------------------------------------------------- generation
class CausalLM(nn.Module):
    """A language model that gives logits. Module names are the checkpoint's; a tied head is the embedding."""

    def __init__(self, c):
        super().__init__()
        self.config = c
        self.model = LlamaModel(c)
        self.lm_head = None if c.tie_word_embeddings else CastLinear(c.hidden_size, c.vocab_size, bias=False)

    def logits(self, hidden):
        """hidden (N, D) -> logits (N, V), float32 (fp64: float64): 16-bit ones would be rounded to 0.06 near 20."""
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        if hidden.is_cuda and hidden.dtype == torch.bfloat16:
            return torch.mm(hidden, head.weight.T, out_dtype=torch.float32)
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        return F.linear(hidden.to(dtype), head.weight.to(dtype))


class Cache:
    """What attention needs of B rows of tokens, of which the first `length` columns are filled: a tensor of keys and
    values (2, B, K, capacity, head_dim) a layer, and segments (B, capacity), -1 for padding."""

    def __init__(self, c, batch, capacity, dtype, device):
        shape = (2, batch, c.num_key_value_heads, capacity, c.head_dim)
        self.layers = [torch.empty(shape, dtype=dtype, device=device) for _ in range(c.num_hidden_layers)]
        self.segments = torch.empty(batch, capacity, dtype=torch.long, device=device)
        self.length = 0

    def keep(self, rows):
        """Drop all rows but those of the mask (B,)."""
        self.segments = self.segments[rows]
        self.layers = [layer[:, rows] for layer in self.layers]


def cached_forward(model, ids, positions, segments, cache):
    """LlamaModel.forward of tokens (B, T) that follow those in the cache, which takes them in -> hidden (B, T, D)."""
    start = cache.length
    end = start + ids.shape[1]
    segments = F.pad(segments, (ids.shape[1] - segments.shape[1], 0))  # the first columns may be prompt in every row
    cache.segments[:, start:end] = segments
    cache.length = end
    x = model.embed_tokens(ids).to(model.dtype)
    cos, sin = model.angles(positions)
    # The H/K heads of a key-value head are taken for more queries of it: keys and values are not copied for each head.
    group = model.layers[0].self_attn.H // model.layers[0].self_attn.K
    mask = attention_mask(segments, cache.segments[:, :end], x.dtype).repeat(1, 1, group, 1)
    for layer, (keys, values) in zip(model.layers, cache.layers):
        q, k, v = layer.self_attn.project(layer.input_layernorm(x), cos, sin)
        keys[:, :, start:end] = k
        values[:, :, start:end] = v
        grouped = q.reshape(len(q), keys.shape[1], -1, q.shape[3])  # (B, K, H/K * T, head_dim)
        out = F.scaled_dot_product_attention(grouped, keys[:, :, :end], values[:, :, :end], attn_mask=mask)
        x = x + layer.self_attn.o_proj(out.reshape(q.shape).transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.norm(x)


def uniform_numbers(prompt, k, n, seed):
    """(k, n) numbers in [0, 1), float64: a pure function of (seed, prompt, completion, token). So a completion does not
    depend on the other prompts, the batch or the ranks, and two policies are compared on the same draws."""
    digest = hashlib.sha256(array("i", prompt).tobytes()).hexdigest()
    rows = []
    for j in range(k):
        generator = random.Random(f"{seed}/{digest}/{j}")
        rows.append([generator.random() for _ in range(n)])
    return torch.tensor(rows, dtype=torch.float64)


def next_tokens(logits, uniform, temperature, top_p):
    """One token id for each row of logits (N, V), the inverse of the cumulative distribution at uniform (N,).
    Temperature 0 takes the likeliest. top_p keeps the fewest likeliest tokens that have that mass together (Holtzman et
    al. 2020)."""
    if temperature == 0:
        return logits.argmax(-1)
    probs = (logits.double() / temperature).softmax(-1)
    order = None  # of the columns of probs: that of the ids
    if top_p < 1:
        top, order = probs.topk(min(512, probs.shape[1]))  # nearly always enough, at a tenth of the cost of sorting all
        if not (top.sum(-1) >= top_p).all():
            top, order = probs.sort(descending=True)
        probs = top * (top.cumsum(-1) - top < top_p)
    cumulative = probs.cumsum(-1)
    total = cumulative[:, -1:]
    # Below the total, also where uniform * total is rounded up to it: no token of probability 0 is drawn.
    point = torch.minimum(uniform[:, None] * total, total.nextafter(torch.zeros_like(total)))
    # NaN lies beyond every column; generate() refuses it once all is drawn, without waiting for the device each token.
    index = torch.searchsorted(cumulative, point, right=True).clamp(max=probs.shape[1] - 1)
    if order is not None:
        index = order.gather(1, index)
    return index[:, 0]


NO_TOKEN = -1  # after the end of a completion
NOT_FINITE = -2  # in the place of a token that was drawn from NaN
NOT_FINITE_REMEDY = "its weights are broken, or --precision is too low for them"


@torch.no_grad()
def generate(policy, prompts, uniform, temperature, top_p, stops):
    """k completions of each of B prompts (lists of ids) -> ids [B][k], each with its stop token if it came to one; None
    for one that was drawn from logits that are not finite (an id's own may be -inf: it is never drawn).

    uniform (B, k, n): the random numbers; n tokens at most. A row of the cache holds [prompt | first tokens of the k
    completions | their second tokens | ...]: the prompt is computed and kept once, and segments keep the completions
    from seeing each other."""
    B, k, n = uniform.shape
    device = device_of(policy)
    uniform = uniform.to(device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    rows, _ = response_rows(prompts, [[]] * B)
    last_tokens = [(b, len(prompt) - 1) for b, prompt in enumerate(prompts)]
    batch = batch_tensors(rows, last_tokens, device)
    cache = Cache(policy.config, B, batch["ids"].shape[1] + k * n, policy.model.dtype, device)
    hidden = cached_forward(policy.model, batch["ids"], batch["positions"], batch["segments"], cache)  # (B, P, D)
    logits = policy.logits(hidden.flatten(0, 1)[batch["predict"]]).repeat_interleave(k, dim=0)
    stops = torch.tensor(stops, device=device)
    segments = torch.arange(1, k + 1, device=device)
    tokens = torch.full((B, k, n), NO_TOKEN, device=device)
    ended = torch.zeros(B, k, dtype=torch.bool, device=device)
    broken = torch.zeros(B, k, dtype=torch.bool, device=device)
    running = torch.arange(B, device=device)  # the prompts that rows of the cache belong to
    for t in range(n):
        # The largest is NaN if any is; of one that has ended the logits do not matter.
        not_finite = ~logits.amax(-1).isfinite().view(-1, k)
        broken[running] |= not_finite & ~ended[running]
        new = next_tokens(logits, uniform[running, :, t].flatten(), temperature, top_p).view(-1, k)
        tokens[running, :, t] = new.where(~ended[running], NO_TOKEN)
        ended[running] |= torch.isin(new, stops)
        goes_on = ~ended[running].all(dim=1)
        left = goes_on.sum().item()
        if left == 0 or t == n - 1:
            break
        if left <= len(running) / 2:  # not one by one: each time the cache is copied
            running = running[goes_on]
            new = new[goes_on]
            cache.keep(goes_on)
        positions = (lengths[running, None] + t).expand(-1, k)
        hidden = cached_forward(policy.model, new, positions, segments.expand(len(running), k), cache)
        logits = policy.logits(hidden.flatten(0, 1))
    found = []
    for of_prompt in tokens.masked_fill(broken[..., None], NOT_FINITE).tolist():
        cut = [[token for token in ids if token != NO_TOKEN] for ids in of_prompt]
        found.append([None if NOT_FINITE in ids else ids for ids in cut])
    return found


def rounds_of_rank(lengths, size, desc):
    """Yield this rank's share, a list of indices, of each round of about `size` examples a rank, longest first. The
    same number of rounds on every rank."""
    rank = dist.get_rank()
    rounds = split_into_micro_batches(lengths, max(1, size), dist.get_world_size()) if lengths else []
    for micro in tqdm(rounds, desc=desc, disable=rank > 0 or not sys.stderr.isatty(), leave=False):
        yield micro[rank]


def completions(policy, prompts, args, *, k, temperature, top_p, stops, desc):
    """Generate for all prompts; yield [(index of the prompt, ids of its k completions)] a round, on every rank. Raises
    UserError, on every rank, where the policy gives logits that are not finite."""
    lengths = [len(prompt.ids) for prompt in prompts]
    for mine in rounds_of_rank(lengths, args.batch_size // k, desc):
        ids = []
        if mine:
            asked = [prompts[i].ids for i in mine]
            uniform = torch.stack([uniform_numbers(prompt, k, args.max_new_tokens, args.seed) for prompt in asked])
            ids = generate(policy, asked, uniform, temperature, top_p, stops)
        of_ranks = [None] * dist.get_world_size()
        dist.all_gather_object(of_ranks, list(zip(mine, ids)))
        finished = list(itertools.chain.from_iterable(of_ranks))
        broken = [prompts[i].index for i, ys in finished if None in ys]
        if broken:
            raise UserError(f"{policy.config.name_or_path}: its logits are not finite (NaN or inf), first for row"
                            f" {min(broken)} of the data: {NOT_FINITE_REMEDY}")
        yield finished


# ------------------------------------------------------------------------------------------- rewards and divergence
def response_rows(prompts, responses):
    """Rows [prompt | y_1 | ... | y_k] as in training: (tokens, positions, segments) each, and (row, first column,
    response) of every response in turn."""
    rows = []
    places = []
    for b, (prompt, ys) in enumerate(zip(prompts, responses)):
        tokens = list(prompt)
        positions = list(range(len(prompt)))
        segments = [0] * len(prompt)
        for number, y in enumerate(ys, 1):
            places.append((b, len(tokens), y))
            tokens += y
            positions += range(len(prompt), len(prompt) + len(y))
            segments += [number] * len(y)
        rows.append((tokens, positions, segments))
    return rows, places


def predicted_tokens(prompts, places):
    """Of response_rows: (row, column) of the token before each response token, and those tokens. A response's first
    follows its prompt's last, wherever it stands in the row."""
    predict = []
    targets = []
    for row, start, y in places:
        predict.append((row, len(prompts[row]) - 1))
        predict += [(row, start + t) for t in range(len(y) - 1)]
        targets += y
    return predict, targets


RESPONSES_A_ROW = 8


def compute_in_batches(compute, prompts, responses, *, columns, batch_size, desc):
    """compute(prompts, responses) -> (responses, columns) on batches of about batch_size responses, divided among ranks
    -> a float64 CPU tensor (number of responses of the prompt, columns) a prompt, on every rank."""
    groups = []  # (prompt, some of its responses): a row each, whose attention grows with the square of its length
    for prompt, ys in zip(prompts, responses):
        groups += [(prompt, ys[start : start + RESPONSES_A_ROW]) for start in range(0, len(ys), RESPONSES_A_ROW)]
    counts = [len(ys) for _, ys in groups]
    ends = list(itertools.accumulate(counts))
    results = torch.zeros(sum(counts), columns, dtype=torch.float64)
    lengths = [len(prompt) + sum(map(len, ys)) for prompt, ys in groups]
    for mine in rounds_of_rank(lengths, batch_size // max(counts, default=1), desc):
        if mine:
            rows = [row for i in mine for row in range(ends[i] - counts[i], ends[i])]
            results[rows] = compute([groups[i][0] for i in mine], [groups[i][1] for i in mine]).double().cpu()
    dist.all_reduce(results)  # each was computed by one rank: a sum with zeros is exact
    return list(results.split([len(ys) for ys in responses]))


@torch.no_grad()
def rewards(reward_model, prompts, responses):
    """r(x, y) of each response in turn, read at its last token -> (S, 1)."""
    rows, places = response_rows(prompts, responses)
    predict = [(row, start + len(y) - 1) for row, start, y in places]
    return reward_model(**batch_tensors(rows, predict, device_of(reward_model)))


def score(reward_model, prompts, responses, places, args, known, desc):
    """Rewards of responses (ids, [n][k]), a float64 vector a prompt, to 9 decimals: what follows depends on the batch,
    also in fp64. Each different (prompt, response) is computed once and noted in `known`: in another batch its last
    bits would differ, and equal responses would not tie. `places` say where the prompts stand. Raises UserError where
    a reward is not finite."""
    keys = [[(tuple(prompt), tuple(y)) for y in ys] for prompt, ys in zip(prompts, responses)]
    unknown = {}  # prompt: its responses, in order, each once
    for x, y in itertools.chain.from_iterable(keys):
        if (x, y) not in known:
            unknown.setdefault(x, {})[y] = None

    def compute(xs, ys):
        return rewards(reward_model, xs, ys)

    computed = compute_in_batches(compute, list(unknown), [list(ys) for ys in unknown.values()], columns=1,
                                  batch_size=args.batch_size, desc=desc)
    for (x, ys), values in zip(unknown.items(), computed):
        for y, reward in zip(ys, values[:, 0].tolist()):
            known[x, y] = reward
    found = [torch.tensor([known[key] for key in of_prompt], dtype=torch.float64) for of_prompt in keys]
    refuse_not_finite(found, f"{args.rm}: the reward", places)
    return [of_prompt.round(decimals=9) for of_prompt in found]


def refuse_not_finite(values, what, places):
    """Raise UserError, naming the first place, where a tensor of values, one a prompt, holds NaN or inf: it would pass
    for a figure, as it neither wins nor loses."""
    for of_prompt, place in zip(values, places):
        if not of_prompt.isfinite().all():
            raise UserError(f"{what} is not finite (NaN or inf), first at {place}: {NOT_FINITE_REMEDY}")


@torch.no_grad()
def divergences(policy, ref, prompts, responses):
    """Of each response in turn: the sum over its steps of the exact KL(pi || ref) of the next token, and log pi(y) -
    log ref(y), k1 -> (S, 2), nats. Both estimate KL(pi || ref) if the responses are drawn from pi at temperature 1,
    top-p 1."""
    rows, places = response_rows(prompts, responses)
    predict, targets = predicted_tokens(prompts, places)
    batch = batch_tensors(rows, predict, device_of(policy), targets=targets)
    hidden = []
    for model in (policy, ref):
        x = model.model(batch["ids"], batch["positions"], batch["segments"])
        hidden.append(x.flatten(0, 1)[batch["predict"]])
    # In pieces: logits of all steps at once would be gigabytes.
    size = max(1, 2**25 // policy.config.vocab_size)
    steps = []
    for policy_hidden, ref_hidden, y in zip(hidden[0].split(size), hidden[1].split(size), batch["targets"].split(size)):
        policy_logits = policy.logits(policy_hidden)
        ref_logits = ref.logits(ref_hidden)
        ratios = policy_logits.log_softmax(-1) - ref_logits.log_softmax(-1)
        steps.append(torch.stack([step_kl(policy_logits, ref_logits), ratios.gather(1, y[:, None])[:, 0]], dim=1))
    lengths = [len(y) for _, _, y in places]
    return torch.stack([part.sum(0) for part in torch.cat(steps).double().split(lengths)])


@torch.no_grad()
def sampler_logps(policy, prompts, responses, temperature, top_p):
    """Log-prob of each response in turn, its stop included, under the distribution that `next_tokens` draws from
    (temperature > 0, top_p) -> (S, 1), nats: the denominator of an importance weight; -inf for what it never draws."""
    rows, places = response_rows(prompts, responses)
    predict, targets = predicted_tokens(prompts, places)
    batch = batch_tensors(rows, predict, device_of(policy), targets=targets)
    hidden = policy.model(batch["ids"], batch["positions"], batch["segments"]).flatten(0, 1)[batch["predict"]]
    size = max(1, 2**25 // policy.config.vocab_size)  # in pieces: logits of all steps at once would be gigabytes
    steps = []
    for x, y in zip(hidden.split(size), batch["targets"].split(size)):
        probs = (policy.logits(x).double() / temperature).softmax(-1)
        drawn = probs.gather(1, y[:, None])[:, 0]
        if top_p < 1:
            # Kept are tokens before which less than top_p stands; equally likely ones in the order of a sort.
            top, order = probs.sort(descending=True)
            kept = top.cumsum(-1) - top < top_p
            is_kept = (kept & (order == y[:, None])).any(-1)
            drawn = torch.where(is_kept, drawn / (top * kept).sum(-1), 0.0)
        steps.append(drawn.log())
    lengths = [len(y) for _, _, y in places]
    return torch.stack([part.sum() for part in torch.cat(steps).split(lengths)])[:, None]


def device_of(model):
    return model.model.embed_tokens.weight.device


# -------------------------------------------------------------------------------------------------------- the flags
HERE = Path(__file__).resolve().parent
TOY = dict(model=f"{HERE}/toy/sft", ref=f"{HERE}/toy/sft", rm=f"{HERE}/toy/rm", n=256, max_new_tokens=64, threads=1,
           data=f"{HERE}/toy/truth_pairs_eval.jsonl.gz", max_length=160, max_prompt_length=96)
PAPER = dict(n=512, max_new_tokens=128, max_length=640, max_prompt_length=512, threads=0)  # Appendix C and D
PRESETS = {"toy": TOY, "paper": PAPER}
# Hub datasets that a name stands for: id, train split, held-out split, columns.
RECIPES = {
    "tldr": ("trl-lib/tldr-preference", "train", "validation", ("prompt", "chosen", "rejected")),
    "hh": ("Anthropic/hh-rlhf", "train", "test", ("chosen", "rejected")),  # implicit prompt
    "ultrafeedback": ("HuggingFaceH4/ultrafeedback_binarized", "train_prefs", "test_prefs",
                      ("chosen", "rejected")),  # the prompt is their first message
}
PROTOCOL = ("n", "k", "temperature", "top_p", "max_new_tokens", "max_length", "max_prompt_length", "seed", "precision")


def parse_args(argv=None):
    parser = Parser(description="What a policy says, what judges make of it, whether it over-optimizes.", usage=None)
    subparsers = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    commands = {}
    for command in (sample, label, golden, bench, judge, plot):
        name = command.__name__
        commands[name] = subparsers.add_parser(name, help=command.__doc__, description=command.__doc__)

    def add(names, flag, **options):
        for name in names.split():
            commands[name].add_argument(flag, **options)

    models = "sample label golden bench"
    add("golden plot", "runs", nargs="+", metavar="RUN", help="--out of train_pref.py; plot: evaluated by golden")
    add("sample bench", "--model", help="policy: model directory or Hub id; with --api the server's name")
    add("label golden", "--rm", help="reward model: what train_rm.py wrote, or a Hub id")
    add("golden", "--ref", help="reference policy, for the KL and as step 0: model directory or Hub id")
    add("sample golden", "--data", help="prompts and reference responses: a file, recipe or Hub id")
    add("label judge", "--samples", required=True, help="what `sample` wrote (judge --mt_bench: what `bench` wrote)")
    add("judge", "--against", help="the same prompts' completions to compare with (None: with the first reference)")
    add("judge", "--mt_bench", metavar="DIR", help="grade MT-Bench answers by FastChat's fastchat/llm_judge/data")
    add("judge", "--judge", required=True, metavar="MODEL", help="the server's name of the judge, such as gpt-4o-mini")
    add("bench", "--suite", choices=["alpaca_eval", "mt_bench"], required=True, help="whose questions and format")
    add("bench", "--questions", required=True, help="FastChat's question.jsonl, or alpaca_eval.json")
    add("sample label judge bench", "--out", required=True, help=".jsonl (alpaca_eval: .json); run again to go on")
    add("plot", "--out", default="figs", help="directory of figures, their rows and the table")
    add("plot", "--log_eps", type=float, default=1.0, help="cap of weighted runs in figures 3, 4, 6, nats; inf: none")
    add("sample judge", "--api", metavar="URL", help="OpenAI-compatible server; the key comes from OPENAI_API_KEY")
    add("sample judge", "--concurrency", type=int, default=8, help="requests at a time")
    add("golden", "--keep_samples", action="store_true", help="write what was said to RUN/golden_samples/")
    add("label", "--noise", choices=["none", "bt"], default="none", help="none: chosen is the better one; bt: with"
        " probability sigmoid(difference of rewards), as people would")
    add("label", "--pairs", choices=["best_worst", "random"], default="best_worst", help="which two of a prompt's"
        " completions: of more than two the best and the worst are no draws of their policy; random ones are")
    add("bench", "--template", choices=["chat", "hh"], default="chat", help="the tokenizer's, or HH's plain dialogue")
    add("sample golden", "--n", type=int, help="prompts: the first n different ones")
    add("sample golden", "--k", type=int, default=2, help="completions a prompt")
    draw = "sample golden bench"
    add(draw, "--temperature", type=float, default=0.7, help="0: likeliest token (golden's KL 1; mt_bench by category)")
    add(draw, "--top_p", type=float, default=0.95, help="mass of the likeliest tokens (golden's KL, bench: 1)")
    add(draw, "--max_new_tokens", type=int, help="tokens of a completion at most")
    add("label golden", "--max_length", type=int, help="tokens of prompt + response that are scored")
    add(models, "--max_prompt_length", type=int, help="tokens of the prompt at most: it keeps its end")
    add(models, "--batch_size", type=int, default=64, help="completions a rank at a time: less takes less memory")
    precision = "bf16" if torch.cuda.is_available() else "fp32"
    add(models, "--precision", choices=["bf16", "fp32", "fp64"], default=precision, help="of weights and products")
    add(models, "--chat_template_kwargs", type=json_object, metavar="JSON", help="given to the chat template, as"
        ' {"enable_thinking": false}')
    add(models, "--preset", choices=list(PRESETS), help="defaults: toy, or paper if a model or data is given")
    add(models, "--threads", type=int, help="CPU threads a rank; 0: torch's own choice")
    add(models, "--timeout", type=int, default=1800, help="seconds after which a rank that hangs ends the run")
    add(models + " judge", "--seed", type=int, default=0, help="of all that is drawn; judge: of who is A")

    # A preset's values are defaults, which --help shows too: it is looked for first. Whose model or data it is not gets
    # the paper's, as in the trainers.
    chooser = Parser(add_help=False)
    for flag in ("preset", "model", "ref", "rm", "data"):
        chooser.add_argument(f"--{flag}")
    given = vars(chooser.parse_known_args(argv)[0])
    preset = given.pop("preset") or ("paper" if any(given.values()) else "toy")
    for name in models.split():
        flags = {action.dest for action in commands[name]._actions}
        values = {flag: value for flag, value in PRESETS.get(preset, {}).items() if flag in flags}
        commands[name].set_defaults(**values | dict(preset=preset))
    commands["bench"].set_defaults(temperature=None, top_p=1.0, max_new_tokens=1024)
    args = parser.parse_args(argv)
    values = vars(args)
    for flag in ["api"] if args.command == "judge" else ["model", "ref", "rm", "data"]:
        if flag in values and not values[flag]:
            parser.error(f"--{flag} is missing")
    positive = ("n", "k", "top_p", "max_new_tokens", "max_length", "max_prompt_length", "batch_size", "timeout",
                "concurrency")
    check_ranges(parser, args, positive, signed=("log_eps",))
    if args.command in ("sample", "label", "judge") and not args.out.endswith(".jsonl"):
        parser.error(f"--out {args.out}: the name must end in .jsonl")
    if values.get("top_p", 1) > 1:
        parser.error(f"--top_p {args.top_p}: must be at most 1")
    if "max_length" in values and args.max_prompt_length >= args.max_length:
        parser.error(f"--max_prompt_length {args.max_prompt_length} leaves no room in --max_length {args.max_length}")
    return args


# ------------------------------------------------------------------------------------------------ prompts and texts
LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")  # JSON can hold half of a pair, no tokenizer takes it
# A prompt to answer. index: its row in the data; content: a text or a conversation, a list of messages; tools: what its
# chat template is given besides, or None; ids: by the policy's tokenizer (None with --api); references: the data's
# responses to it, (text, stop) each, like completions. A conversation stays one in all files: each model and judge that
# reads it renders it in its own way.
Prompt = namedtuple("Prompt", "index content tools ids references")


def load_prompts(args, tokenizer, vocab_size):
    """-> the first args.n different prompts of args.data, and their sha256. tokenizer None: without ids. Rows of one
    prompt are one: their responses are all references. Raises UserError."""
    n_rows = 0
    prompts = {}  # by what they say
    skipped = {}
    cut = {}
    unread = {}  # columns, in the order in which they come
    for n_rows, (where, row) in enumerate(read_rows(args.data, True, RECIPES), 1):
        try:
            content, tools, reference, columns = read_prompt(row)
            key = json.dumps([content, tools])
            if key not in prompts:
                if len(prompts) == args.n:
                    raise SkipRow("beyond --n")
                ids = None
                if tokenizer is not None:
                    text = render_prompt(tokenizer, content, tools, args.model if "model" in args else args.ref)
                    ids = prompt_ids(text, isinstance(content, list), tokenizer, vocab_size, args, cut, where)
                prompts[key] = Prompt(n_rows - 1, content, tools, ids, references=[])
            if reference and reference not in prompts[key].references:
                prompts[key].references.append(reference)
            for column, value in row.items():
                if value is not None and column not in columns:
                    unread[column] = True
        except SkipRow as skip:
            count_skip(skipped, str(skip), where)
    report = (f"{args.data}: {len(prompts)} prompts of {n_rows} rows; skipped: {describe_skips(skipped)}; cut:"
              f" {describe_skips(cut)}")
    if unread:
        report += f"; columns not read: {', '.join(unread)}"
    if not prompts:
        raise UserError(f"no usable prompts in {report}")
    print_rank0(report)
    contents = []
    for prompt in prompts.values():
        contents.append([prompt.index, prompt.content, prompt.references] + ([prompt.tools] if prompt.tools else []))
    return list(prompts.values()), hashlib.sha256(json.dumps(contents).encode()).hexdigest()


def read_prompt(row):
    """A data row -> prompt (a text, or a list of messages), tools or None, (text, stop) of its response or None, and
    the columns that were read. The stop is "": how the response ends is for its reader to say. Raises SkipRow."""
    if isinstance(row.get("prompt"), (str, list)) and not {"chosen", "completion", "messages"} & row.keys():
        prompt = row["prompt"]
        response = ""
        columns = ("prompt",)
    else:
        prompt, response, columns = split_demonstration(row)
    if not prompt:
        raise SkipRow("empty prompt")
    if isinstance(prompt, list):
        prompt = text_messages(prompt)
    if isinstance(response, list):
        response = text_messages(response)
        if len(response) != 1 or not isinstance(response[0]["content"], str):
            raise SkipRow("a response that is not one message of text")
        response = response[0]["content"]
    tools = row.get("tools") or None
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            raise SkipRow("tools that are not JSON") from None
    if LONE_SURROGATE.search(json.dumps([prompt, tools, response], ensure_ascii=False)):
        raise SkipRow("broken Unicode")
    return prompt, tools, (response, "") if response else None, (*columns, "tools")


def render_prompt(tokenizer, content, tools, model):
    """The text with which `model`, a name, is asked for a response: a conversation goes through its own template.
    Raises SkipRow where that refuses it, UserError where there is none."""
    if isinstance(content, str):
        return content
    if tokenizer.chat_template is None:
        raise UserError(f"{model} has no chat template, and the prompts are conversations: take a model with one, or"
                        " prompts that are texts")
    return apply_template(tokenizer, content, tools, add_generation_prompt=True)


def prompt_ids(text, rendered, tokenizer, vocab_size, args, cut, where):
    """The ids of a prompt's text, as the trainers make them; its end where it is too long, which is counted in `cut`.
    rendered: by a chat template. Raises SkipRow."""
    ids = encode(tokenizer, [text])[0]
    require_known(ids, vocab_size)
    ids, n_cut = finish_prompt(ids, tokenizer, begin=[] if rendered else text_begin(tokenizer),
                               max_prompt_length=args.max_prompt_length)
    if n_cut:
        count_skip(cut, "prompt", where)
    if not ids:  # of a chat template that writes nothing
        raise SkipRow("empty prompt")
    return ids


SAMPLE_FORMAT = 2  # 1: conversations had gone through the policy's template, and no other model could read them


def read_samples(path, bad):
    """-> [("file:line", what `sample` wrote)]; `stops`, `references`, `logps` may lack: all ended, none, unknown. What
    is no sample is counted in `bad`."""
    samples = []
    for where, row in read_jsonl(Path(path)):
        try:
            check_sample(row)
            samples.append((where, row))
        except SkipRow as skip:
            count_skip(bad, str(skip), where)
    return samples


def check_sample(row):
    """Fill in what a sample may lack. Raises SkipRow."""
    if row.get("format") != SAMPLE_FORMAT:
        raise SkipRow(f"no sample of format {SAMPLE_FORMAT} (older ones hold rendered conversations: make them anew; in"
                      f" rows of your own write \"format\": {SAMPLE_FORMAT})")
    texts = row.get("completions")
    row.setdefault("references", [])
    well_formed = are_texts(texts) and texts and are_texts(row["references"])
    well_formed = well_formed and is_prompt(row.get("prompt"))
    well_formed = well_formed and one_each(texts, row.setdefault("stops", [""] * len(texts)), is_text)
    if row.get("logps") is not None:
        well_formed = well_formed and one_each(texts, row["logps"], is_log_prob)
    if not well_formed:
        raise SkipRow("no sample: want prompt (a text or messages), completions, references (texts), and for each"
                      " completion its stop (a text) and, if known, in logps its log-prob (0 at most), or null, as"
                      " `sample` writes them")
    if LONE_SURROGATE.search(json.dumps(row, ensure_ascii=False)):
        raise SkipRow("broken Unicode")


def is_prompt(content):
    """Is it a text or a conversation?"""
    try:
        return isinstance(content, str) or len(text_messages(content)) > 0
    except SkipRow:
        return False


def are_texts(values):
    return isinstance(values, list) and all(is_text(value) for value in values)


def is_text(value):
    return isinstance(value, str)


def is_log_prob(value):
    return type(value) in (int, float) and -math.inf < value <= 0


def one_each(texts, values, is_right):
    """Is `values` a list of what belongs to each of the texts, or None?"""
    right = isinstance(values, list) and len(values) == len(texts)
    return right and all(value is None or is_right(value) for value in values)


@functools.lru_cache(maxsize=4)  # the template is rendered for it, which would take longer than a row does
def stop_texts(tokenizer):
    """{text of a token that ends a response: its id}"""
    return {decode(tokenizer, [token]): token for token in sorted(stop_ids(tokenizer))}


def decode(tokenizer, ids):
    """Ids of a completion -> its text as it stands after the prompt, in which special tokens stay to be seen."""
    as_said = dict(skip_special_tokens=False, clean_up_tokenization_spaces=False)
    before = token_before(tokenizer)
    return tokenizer.decode(before + ids, **as_said).removeprefix(tokenizer.decode(before, **as_said))


@functools.lru_cache(maxsize=4)
def token_before(tokenizer):
    """[any id] to decode a completion after, or []: SentencePiece drops the space before the first word it decodes, so
    that alone " lived" would read "lived", and be other ids after its prompt."""
    return encode(tokenizer, ["a"])[0][-1:] if begins_with_a_space(tokenizer) else []


def completion_text(ids, stops, tokenizer, frame=("", "")):
    """-> the text, the text of the stop that it came to or None, number of tokens. frame: see repeated_frame."""
    head, end = frame
    if ids[-1] in stops:
        text = decode(tokenizer, ids[:-1]).removesuffix(end)
        return text.removeprefix(head), decode(tokenizer, ids[-1:]), len(ids)
    return decode(tokenizer, ids).removeprefix(head), None, len(ids)


def render_response(tokenizer, prompt, tools, text):
    """What a chat template makes of a conversation's next message, from the end of the prompt on. Raises SkipRow."""
    return render_chat(tokenizer, prompt, [dict(role="assistant", content=text)], tools)[1]


WORDS = "0123456789"  # stand in no template


def template_frame(tokenizer, prompt, tools):
    """What a chat template writes before and after a response's words, its stop included. Raises SkipRow."""
    head, _, tail = render_response(tokenizer, prompt, tools, WORDS).partition(WORDS)
    return head, tail


def repeated_frame(tokenizer, prompt, tools):
    """What a policy says before its words, and between them and the stop, because its template writes that, and would
    write once more around a text that holds it: so a completion's does not. ("", "") of most templates; Zephyr's begins
    what is said with a line break that its prompt lacks."""
    try:
        head, tail = template_frame(tokenizer, prompt, tools)
        end = tail.removesuffix(decode(tokenizer, [assistant_stop_id(tokenizer)]))
        again = render_response(tokenizer, prompt, tools, head + WORDS + end)
    except SkipRow:  # it refuses responses
        return "", ""
    return ("", "") if again == head + WORDS + tail else (head, end)


def scored_ids(tokenizer, prompt, tools, responses, vocab_size, args):
    """A prompt (text or messages) and its responses, (text, stop) each -> their ids, as train_rm.py makes them of a
    pair, rendered by the reward model's own template and cut alike. A stop of None: it was cut, and has none; any other
    is the template's own for a conversation, and for a text itself, or EOS where this tokenizer does not know it. An
    empty response is a stop alone. Raises SkipRow; UserError where a conversation finds no template."""
    conversation = isinstance(prompt, list)
    prompt_text = render_prompt(tokenizer, prompt, tools, args.rm)
    x = prompt_ids(prompt_text, conversation, tokenizer, vocab_size, args, {}, "")
    stops = stop_texts(tokenizer)
    end = assistant_stop_id(tokenizer) if conversation else tokenizer.eos_token_id
    texts = [text for text, _ in responses]
    if conversation:
        _, tail = template_frame(tokenizer, prompt, tools)
        for k, (text, stop) in enumerate(responses):
            if text.strip():
                rendered = render_response(tokenizer, prompt, tools, text)
                texts[k] = rendered.removesuffix(tail) if stop is None else rendered
    ys = []
    for y, (text, stop) in zip(encode_after(tokenizer, [prompt_text] * len(texts), texts), responses):
        require_known(y, vocab_size)
        needs_end = not y or (stop is not None and y[-1] not in stops.values())
        if stop in stops and not conversation:
            y = y + [stops[stop]]
        elif needs_end:
            y = y + [end]
        ys.append(y[: args.max_length - len(x)])
    return x, ys


def load_model(name, make, precision, device, chat_template_kwargs=None):
    """A model directory or Hub id -> (model, tokenizer, directory). Weights are kept in the dtype of the products, but
    for a reward model's head, which is float32 as in training."""
    directory = find_model(name)
    model = load_weights(build_model(lambda: make(read_config(directory)), device, precision), directory)
    model.model.to(model.model.dtype)
    if getattr(model, "lm_head", None) is not None:
        model.lm_head.to(model.model.dtype)
    return model.eval(), load_tokenizer(directory, chat_template_kwargs), directory


def load_policy(name, args, device):
    """load_model of a policy that is to be sampled. Says once what its generation_config.json asks for besides stops,
    and is not heeded: the flags decide how is sampled."""
    policy, tokenizer, directory = load_model(name, CausalLM, args.precision, device, args.chat_template_kwargs)
    if args.preset != "toy":  # whose prompts are far shorter than it allows: no warning
        check_length(policy.config, directory, args.max_prompt_length + args.max_new_tokens)
    path = directory / "generation_config.json"
    config = read_json(path) if path.exists() else {}
    ignored = []
    for key, value in config.items():
        if key not in NO_SAMPLING and value not in (None, False):
            ignored.append(f"{key} {value!r:.40}")
    if ignored:
        print_rank0(f"{path}: ignored, as the flags decide how is sampled: {', '.join(ignored)}")
    return policy, tokenizer, directory


# Of generation_config.json: what does not change what is said.
NO_SAMPLING = ("eos_token_id", "bos_token_id", "pad_token_id", "transformers_version", "_from_model_config",
               "max_length", "max_new_tokens", "use_cache")

def load_scorer(args, device):
    model, tokenizer, directory = load_model(args.rm, RewardModel, args.precision, device, args.chat_template_kwargs)
    if args.preset != "toy":
        check_length(read_config(directory), directory, args.max_length)
    return model, tokenizer, directory


# ---------------------------------------------------------------------------------------------------- sample, label
def sample(args):
    """Completions of a policy, a row a prompt."""
    _, world, device = init_distributed(args.seed, args.timeout, args.threads)
    if args.api and world > 1:
        raise UserError("--api: one process is enough, run it without torchrun")
    if args.api:
        fingerprint = None
        prompts, digest = load_prompts(args, tokenizer=None, vocab_size=None)
    else:
        policy, tokenizer, directory = load_policy(args.model, args, device)
        fingerprint = model_fingerprint(directory)
        stops = sorted(stop_ids(tokenizer))
        prompts, digest = on_rank_0(lambda: load_prompts(args, tokenizer, policy.config.vocab_size))
    provenance = vars(args) | dict(policy=fingerprint, prompts=digest, format=SAMPLE_FORMAT)

    def compute(lacking):
        if args.api:
            return api_rows(lacking.values(), args)
        return sampled_rows(policy, tokenizer, list(lacking.values()), args, k=args.k, temperature=args.temperature,
                            stops=stops, desc="sampling", with_logps=True)

    rows = complete_rows(Path(args.out), provenance, {prompt.index: prompt for prompt in prompts}, compute,
                         dict(index=int, completions=list, stops=list)).values()
    texts = [text for row in rows for text in row["completions"]]
    stops_said = [stop for row in rows for stop in row["stops"]]
    ended = len(stops_said) - stops_said.count(None)
    summary = dict(prompts=len(rows), completions=len(texts), ended=ended, empty=texts.count(""))
    print_rank0(f"{args.out}: {json.dumps(summary)}")
    print_rank0(f"next: python {HERE}/evaluate.py label --rm REWARD_MODEL --samples {shlex.quote(args.out)}"
                " --out pairs.jsonl")


def sampled_rows(policy, tokenizer, prompts, args, *, k, temperature, stops, desc, with_logps=False):
    """Yield the rows of prompts with k completions of each, a list a round. with_logps: and their sampler's log-probs,
    None where the distribution has none (temperature 0) or the text, read again, is of other ids."""

    def compute(xs, ys):
        return sampler_logps(policy, xs, ys, temperature, args.top_p)

    rounds = completions(policy, prompts, args, k=k, temperature=temperature, top_p=args.top_p, stops=stops, desc=desc)
    for finished in rounds:
        rows = []
        for i, ys in finished:
            frame = ("", "")
            if isinstance(prompts[i].content, list):
                frame = repeated_frame(tokenizer, prompts[i].content, prompts[i].tools)
            rows.append(sample_row(prompts[i], [completion_text(y, stops, tokenizer, frame) for y in ys]))
        if with_logps and temperature > 0:
            ids = [prompts[i].ids for i, _ in finished]
            logps = compute_in_batches(compute, ids, [ys for _, ys in finished], columns=1, batch_size=args.batch_size,
                                       desc="log-probs")
            again = read_again(tokenizer, [prompts[i] for i, _ in finished], rows, args)
            for row, (_, ys), ids_again, of_prompt in zip(rows, finished, again, logps):
                row["logps"] = known_logps(row, ys, ids_again, of_prompt[:, 0].tolist())
        yield rows


def read_again(tokenizer, prompts, rows, args):
    """The ids that a trainer will read in the completions of `rows`, [n][k]; None where it will skip them."""
    befores = []
    texts = []
    for prompt, row in zip(prompts, rows):
        prompt_text = render_prompt(tokenizer, prompt.content, prompt.tools, args.model)
        for text, stop in zip(row["completions"], row["stops"]):
            response = text + (stop or "")
            if isinstance(prompt.content, list) and text.strip():
                try:
                    response = render_response(tokenizer, prompt.content, prompt.tools, text)
                except SkipRow:  # the template refuses the response, and so a trainer will
                    response = None
            befores.append(prompt_text)
            texts.append(response)
    ids = encode_after(tokenizer, befores, [text or "" for text in texts])
    ids = iter([None if text is None else of_text for text, of_text in zip(texts, ids)])
    return [list(itertools.islice(ids, len(row["completions"]))) for row in rows]


def known_logps(row, ys, ids_again, logps):
    """The log-probs of a row's completions, to a thousandth of a nat (the batch decides what comes after it); None for
    one that a trainer will read as other ids than `ys`, those that were drawn, or that was cut."""
    known = []
    for stop, y, again, logp in zip(row["stops"], ys, ids_again, logps):
        same = stop is not None and again == y
        known.append(round(min(logp, 0.0), 3) if same and math.isfinite(logp) else None)
    return known


def sample_row(prompt, answers):
    """answers: text, stop and number of tokens of each completion."""
    row = dict(index=prompt.index, format=SAMPLE_FORMAT, prompt=prompt.content)
    if prompt.tools:
        row["tools"] = prompt.tools
    return row | dict(references=[text for text, _ in prompt.references],
                      completions=[text for text, _, _ in answers], stops=[stop for _, stop, _ in answers],
                      n_tokens=[n for _, _, n in answers])


def label(args):
    """Preference pairs among sampled completions, as a reward model sees them: its rewards go to OUT.scores.jsonl."""
    _, _, device = init_distributed(args.seed, args.timeout, args.threads)
    out = Path(args.out)
    reward_model, tokenizer, directory = load_scorer(args, device)
    vocab_size = reward_model.model.embed_tokens.num_embeddings
    bad = {}
    samples = read_samples(args.samples, bad)
    if not samples:  # before OUT says what it is made of: the file may be mended
        raise UserError(f"{args.samples}: no samples: {describe_skips(bad)}")
    provenance = vars(args) | dict(rm=model_fingerprint(directory), samples=file_sha256(args.samples))
    skipped = dict(bad)

    def compute(lacking):
        known = {}
        todo = []  # (index, where, prompt ids, ids of the responses)
        for index, (where, row) in lacking.items():
            try:
                responses = list(zip(row["completions"], row["stops"]))
                ids = scored_ids(tokenizer, row["prompt"], row.get("tools"), responses, vocab_size, args)
                todo.append((index, where, *ids))
            except SkipRow as skip:
                count_skip(skipped, str(skip), where)
        for start in range(0, len(todo), 1024):
            indices, places, prompts, responses = zip(*todo[start : start + 1024])
            desc = f"scoring {start} of {len(todo)}"
            scores = score(reward_model, prompts, responses, places, args, known, desc)
            yield [dict(index=index, rewards=of_prompt.tolist()) for index, of_prompt in zip(indices, scores)]

    scores = complete_rows(out.with_suffix(".scores.jsonl"), provenance, dict(enumerate(samples)), compute,
                           dict(index=int, rewards=list), out)
    pairs = []
    for index, score_row in scores.items():
        where, row = samples[index]
        try:
            pairs.append(choose_pair(row, score_row["rewards"], tokenizer.eos_token, args))
        except SkipRow as skip:
            count_skip(skipped, str(skip), where)
    report = f"{args.samples}: {len(pairs)} pairs of {len(samples)} prompts; skipped: {describe_skips(skipped)}"
    if not pairs:
        raise UserError(f"no usable pairs in {report}")
    complete = on_rank_0(lambda: write_once(out, as_lines(pairs)))
    print_rank0(f"{out}{complete}: {report}")
    print_rank0(f"next: python {HERE}/train_pref.py --model REFERENCE --data {shlex.quote(str(out))} --loss is_dpo")
    return 1 if bad else 0


def choose_pair(row, rewards, eos, args):
    """The best and the worst of a prompt's completions (--pairs random: of any two) as a pair, with their rewards and,
    where they are known, the log-probs of their sampler. Raises SkipRow. A completion that is empty or was cut is not
    taken: in a pair's text it would look as if it had ended there. A stop other than the trainer's `eos` is written, so
    that it reads what was said. What is drawn is a function of (seed, prompt, texts)."""
    candidates = []
    logps = row.get("logps") or [None] * len(rewards)
    for reward, text, stop, logp in zip(rewards, row["completions"], row["stops"], logps):
        if stop is not None and text.strip():
            candidates.append((reward, text, stop, logp))
    if len(candidates) < 2:
        raise SkipRow("fewer than two completions that ended and are not empty")
    if args.pairs == "random":
        candidates = random.Random(json.dumps([args.seed, row["prompt"]])).sample(candidates, 2)
    chosen = max(candidates, key=itemgetter(0))
    rejected = min(candidates, key=itemgetter(0))
    if chosen[0] == rejected[0]:
        raise SkipRow("completions of equal reward")
    if args.noise == "bt":
        drawn = random.Random(json.dumps([args.seed, row["prompt"], chosen[1], rejected[1]])).random()
        if drawn > 1 / (1 + math.exp(rejected[0] - chosen[0])):
            chosen, rejected = rejected, chosen

    def response(text, stop):
        if isinstance(row["prompt"], list):  # the trainer's template ends it
            return [dict(role="assistant", content=text)]
        return text if stop == eos else text + stop

    pair = dict(prompt=row["prompt"], chosen=response(*chosen[1:3]), rejected=response(*rejected[1:3]),
                chosen_reward=chosen[0], rejected_reward=rejected[0])
    if chosen[3] is not None and rejected[3] is not None:
        pair |= dict(chosen_logps=chosen[3], rejected_logps=rejected[3])
    if row.get("tools"):
        pair["tools"] = row["tools"]
    return pair


# ----------------------------------------------------------------------------------------------------------- golden
# A checkpoint to evaluate, of the preference run `run`. weights: a sha256 of what it holds; row_exists: its row stands
# in RUN/golden.jsonl, and only its samples lack.
Evaluation = namedtuple("Evaluation", "run path name weights step epoch row_exists")


def golden(args):
    """Win rate, KL and reward of every checkpoint of runs: a row in RUN/golden.jsonl; none is computed twice."""
    _, _, device = init_distributed(args.seed, args.timeout, args.threads)
    reward_model, rm_tokenizer, rm_directory = load_scorer(args, device)
    ref, tokenizer, ref_directory = load_policy(args.ref, args, device)
    stops = sorted(stop_ids(tokenizer))
    prompts, digest = on_rank_0(lambda: load_prompts(args, tokenizer, ref.config.vocab_size))
    protocol = {name: getattr(args, name) for name in PROTOCOL}
    if args.chat_template_kwargs:
        protocol["chat_template_kwargs"] = args.chat_template_kwargs
    # Rows are known by what they were made of and how; where any of it differs, they are other rows in the same file.
    made_of = dict(rm=model_fingerprint(rm_directory), ref=model_fingerprint(ref_directory), prompts=digest)
    settings = hashlib.sha256(json.dumps([protocol, made_of]).encode()).hexdigest()[:12]
    evaluations, failures = on_rank_0(lambda: find_work(args, ref_directory, made_of["ref"], settings))
    print_rank0(f"{len(evaluations)} checkpoints to evaluate, settings {settings}")
    vocab_size = reward_model.model.embed_tokens.num_embeddings

    def rate(prompts, responses, known, desc):
        """(text, stop) of the responses to each prompt -> their rewards, a vector a prompt."""
        ids = []
        for prompt, of_prompt in zip(prompts, responses):
            ids.append(scored_ids(rm_tokenizer, prompt.content, prompt.tools, of_prompt, vocab_size, args))
        places = [f"row {prompt.index} of {args.data}" for prompt in prompts]
        return score(reward_model, [x for x, _ in ids], [ys for _, ys in ids], places, args, known, desc)

    if evaluations:
        # Before anything is sampled: a prompt that cannot be judged would stop every checkpoint.
        prompts = leave_out_refused(prompts, rm_tokenizer, vocab_size, args)
        references = {}
        reference_rewards = rate(prompts, [prompt.references for prompt in prompts], references, "references")
    measured = {}  # by weights: the reference policy is step 0 of every run
    for evaluation in evaluations:
        try:
            if evaluation.weights in measured:
                # By their manifest: it says what was written, not what is there.
                on_rank_0(lambda: verify_checkpoint(evaluation.path))
            else:
                # Of rewards only the references' are known before: which others are computed together, and so their
                # last bits, must not depend on what else was evaluated before, or before a kill.
                known = dict(references)
                policy = ref
                if evaluation.step > 0:
                    policy, _, _ = load_model(str(evaluation.path), CausalLM, args.precision, device)
                if policy.config.vocab_size != ref.config.vocab_size:
                    raise UserError(f"its vocabulary has {policy.config.vocab_size} tokens, that of --ref"
                                    f" {ref.config.vocab_size}")
                measured[evaluation.weights] = measure(
                    policy, ref, tokenizer, stops, prompts, reference_rewards,
                    lambda responses: rate(prompts, responses, known, "win rate: scoring"), args)
        except (UserError, SkipRow) as error:  # of one checkpoint: the others are evaluated all the same
            failures.append(f"{evaluation.path}: {error}")
            continue
        measures, samples = measured[evaluation.weights]
        row = dict(checkpoint=evaluation.name, step=evaluation.step, epoch=evaluation.epoch, **measures,
                   prompts=len(prompts), weights=evaluation.weights, settings=settings, protocol=protocol, of=made_of)
        on_rank_0(lambda: write_evaluation(evaluation, row, samples if args.keep_samples else None))
        on_rank_0(lambda: show_on_dashboard(evaluation.run, row))
        print_rank0(f"{evaluation.run} {evaluation.name}: {', '.join(figure_text(name, row) for name in FIGURES)}")
    for failure in failures:
        print_rank0(f"failed: {failure}")
    if failures:
        raise UserError(f"{len(failures)} runs or checkpoints could not be evaluated, the first: {failures[0]}; all"
                        " others are in RUN/golden.jsonl")
    print_rank0(f"next: python {HERE}/evaluate.py plot {shlex.join(args.runs)} --out figs")


FIGURES = ("win_rate", "kl", "k1", "reward", "length", "ended")  # each with its standard error, over prompts


def figure_text(name, row):
    error = row[f"{name}_se"]
    return f"{name} {row[name]:.3f}" + ("" if error is None else f" +- {error:.3f}")


def leave_out_refused(prompts, rm_tokenizer, vocab_size, args):
    """The prompts that have references, and whose references the reward model's template and tokenizer take; the others
    are said."""
    kept = []
    skipped = {}
    for prompt in prompts:
        try:
            if not prompt.references:
                raise SkipRow("without a response to compare with (`completion` or `chosen`)")
            scored_ids(rm_tokenizer, prompt.content, prompt.tools, prompt.references, vocab_size, args)
            kept.append(prompt)
        except SkipRow as skip:
            count_skip(skipped, str(skip), f"row {prompt.index}")
    if skipped:
        print_rank0(f"{args.data}: {len(kept)} of {len(prompts)} prompts; skipped: {describe_skips(skipped)}")
    if not kept:
        raise UserError(f"{args.data}: no prompt that {args.rm} can judge: {describe_skips(skipped)}")
    return kept


def find_work(args, ref_directory, ref_fingerprint, settings):
    """-> the checkpoints whose row RUN/golden.jsonl lacks under these settings, or whose samples lack where they are
    asked for; and why runs cannot be evaluated, a text each. Locks the rows' files."""
    evaluations = []
    failures = []
    for run in map(Path, dict.fromkeys(args.runs)):
        try:
            header = read_header(run)
            # KL and win rate are of the policy against what it was trained to stay near, and step 0 is that reference.
            if header.get("ref") != ref_fingerprint:
                trained_with = header["args"].get("ref") or header["args"].get("model")
                raise UserError(f"{run} was trained against another reference: {trained_with}, fingerprint"
                                f" {header.get('ref')}; --ref {args.ref} has {ref_fingerprint}")
            steps_per_epoch = math.ceil(header["pairs"] / header["args"]["batch_size"])
            paths = {0: ref_directory}
            for path in run.glob("step_*"):
                if path.name[5:].isdecimal():  # no .bak
                    paths[int(path.name[5:])] = path
            if (run / "final").exists():
                paths.setdefault(header["steps"], run / "final")
            done = read_own_rows(run / "golden.jsonl", dict(checkpoint=str, step=int, weights=str, settings=str),
                                 key=["step", "weights", "settings"])
            put_settings_last(run / "golden.jsonl", settings)
        except UserError as error:
            failures.append(str(error))
            continue
        for step, path in sorted(paths.items()):
            try:
                weights = weights_sha256(path, header if step > 0 else {})
            except UserError as error:
                failures.append(str(error))
                continue
            name = path.name if step > 0 else "reference"
            row_exists = (step, weights, settings) in done
            if not row_exists or args.keep_samples and not samples_file(run, settings, name).exists():
                evaluations.append(Evaluation(run, path, name, weights, step, step / steps_per_epoch, row_exists))
    return evaluations, failures


def read_header(run):
    """The first line of RUN/metrics.jsonl, which train_pref.py wrote. Raises UserError where it did not."""
    where = f"{run}/metrics.jsonl:1"
    header = parse_json(read_text(Path(run, "metrics.jsonl")).split("\n")[0], where)
    args = header.get("args") if isinstance(header.get("args"), dict) else {}
    for name, value in (("pairs", header.get("pairs")), ("steps", header.get("steps")),
                        ("batch_size", args.get("batch_size"))):
        if type(value) is not int or value <= 0:
            raise UserError(f"{where}: not the header of a run of train_pref.py: {name} is {value!r:.40}")
    return header


def weights_sha256(path, header):
    """Of a checkpoint's manifest, which has the sha256 of each file, or of the files. Raises UserError where the
    manifest bears the mark of another run than the header's."""
    manifest = path / "manifest.json"
    if not manifest.exists():
        return model_fingerprint(path)
    mark = read_json(manifest).get("run")
    if mark and header.get("run") not in (mark, None):
        raise UserError(f"{path} is a checkpoint of another run: {mark}, and not {header['run']}; move it away")
    return file_sha256(manifest)


def samples_file(run, settings, name):
    return run / "golden_samples" / settings / f"{name}.jsonl"


def write_evaluation(evaluation, row, samples):
    """A checkpoint's row, last, and before it its samples, unless they are None."""
    if samples is not None:  # first: a row whose samples lack would be taken for done
        path = samples_file(evaluation.run, row["settings"], evaluation.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_lines(path, samples)
    if not evaluation.row_exists:
        append_rows(evaluation.run / "golden.jsonl", [row])


def show_on_dashboard(run, row):
    """A checkpoint's figures in the dashboard run that its training was shown in, if any, over `golden/step`: a step of
    their own, as dashboards take no earlier one than the last."""
    kind = read_header(run)["args"].get("track", "none")
    if kind != "none":
        open_tracker(kind, run, read_header(run)["args"])
        tracker = sys.modules[kind]
        tracker.log({f"golden/{name}": row[name] for name in ("step", "sqrt_kl", *FIGURES)})
        tracker.finish()


def put_settings_last(path, settings):
    """Put the rows of these settings behind all others: `plot` takes the last ones that are complete."""
    others = []
    last = []
    for line in read_text(path).split("\n") if path.exists() else []:
        if line.strip():
            same = json.loads(line)["settings"] == settings
            (last if same else others).append(line + "\n")
    if last and others:
        write_text(path, "".join(others + last))


def measure(policy, ref, tokenizer, stops, prompts, reference_rewards, rate, args):
    """-> win rate, KL, k1, reward, length, share that ended, each with its standard error (None of a single prompt);
    what was said, as rows. rate(responses, (text, stop) each, a list a prompt) -> their rewards."""
    rounds = sampled_rows(policy, tokenizer, prompts, args, k=args.k, temperature=args.temperature, stops=stops,
                          desc="win rate: sampling")
    said = sorted(itertools.chain.from_iterable(rounds), key=itemgetter("index"))
    our_rewards = rate([list(zip(row["completions"], row["stops"])) for row in said])
    # The KL is of what the policy says by itself: temperature 1, all tokens. Of one cut off at max_new_tokens it is the
    # KL of what is said until there.
    rounds = completions(policy, prompts, args, k=args.k, temperature=1.0, top_p=1.0, stops=stops, desc="KL: sampling")
    drawn = [ys for _, ys in sorted(itertools.chain.from_iterable(rounds))]

    def compute(xs, ys):
        return divergences(policy, ref, xs, ys)

    ids = [prompt.ids for prompt in prompts]
    kls = compute_in_batches(compute, ids, drawn, columns=2, batch_size=args.batch_size, desc="KL")
    refuse_not_finite(kls, f"the KL of {policy.config.name_or_path} from {ref.config.name_or_path}",
                      [f"row {prompt.index} of the data" for prompt in prompts])

    def prompt_means(values):
        return torch.stack([torch.as_tensor(of_prompt).double().mean() for of_prompt in values])

    ended = [[stop is not None for stop in row["stops"]] for row in said]
    per_prompt = dict(win_rate=win_shares(our_rewards, reference_rewards),
                      kl=prompt_means([columns[:, 0] for columns in kls]),
                      k1=prompt_means([columns[:, 1] for columns in kls]),
                      reward=prompt_means(our_rewards),
                      length=prompt_means([row["n_tokens"] for row in said]),
                      ended=prompt_means(ended))
    measures = {}
    for name, values in per_prompt.items():
        mean, error = mean_and_error(values)
        measures[name] = mean
        measures[f"{name}_se"] = error if len(prompts) > 1 else None
    root = math.sqrt(max(measures["kl"], 0.0))
    measures["sqrt_kl"] = root
    measures["sqrt_kl_se"] = 0.0
    if root > 0:
        measures["sqrt_kl_se"] = measures["kl_se"] and measures["kl_se"] / (2 * root)  # to first order
    rows = []
    for row, theirs, ours in zip(said, reference_rewards, our_rewards):
        rows.append(row | dict(reference_rewards=theirs.tolist(), rewards=ours.tolist()))
    return measures, rows


# ------------------------------------------------------------------------------------------------------------ bench
# FastChat's sampling temperature of a category (fastchat/llm_judge/common.py, temperature_config); others 0.7.
MT_BENCH_TEMPERATURE = dict(extraction=0.0, math=0.0, coding=0.0, reasoning=0.0, stem=0.1, humanities=0.1)


def bench(args):
    """Answers to the questions of AlpacaEval 2 or MT-Bench, in their formats; what turn N says, in OUT.turnN.jsonl."""
    _, _, device = init_distributed(args.seed, args.timeout, args.threads)
    out = Path(args.out)
    policy, tokenizer, directory = load_policy(args.model, args, device)
    stops = sorted(stop_ids(tokenizer))
    skipped = {}
    cut = {}
    questions = read_questions(args, skipped)
    provenance = vars(args) | dict(policy=model_fingerprint(directory), questions=file_sha256(args.questions),
                                   format=SAMPLE_FORMAT)

    def compute(lacking):
        for temperature in sorted({questions[number]["temperature"] for number in lacking}):
            group = [prompt for number, prompt in lacking.items() if questions[number]["temperature"] == temperature]
            for fresh in sampled_rows(policy, tokenizer, group, args, k=1, temperature=temperature, stops=stops,
                                      desc=f"at {temperature}"):
                yield [row | dict(tstamp=time.time()) for row in fresh]

    for turn in range(max((len(question["turns"]) for question in questions), default=0)):
        prompts = {}
        for number, question in enumerate(questions):
            messages = question["messages"]
            if len(messages) != 2 * turn or turn == len(question["turns"]):
                continue  # refused before, or answered
            messages.append(dict(role="user", content=question["turns"][turn]))
            try:
                content = dialogue(messages) if args.template == "hh" else messages[:]
                text = render_prompt(tokenizer, content, None, args.model)
                ids = prompt_ids(text, isinstance(content, list), tokenizer, policy.config.vocab_size, args, cut,
                                 question["where"])
                prompts[number] = Prompt(number, content, None, ids, references=[])
            except SkipRow as skip:
                count_skip(skipped, str(skip), question["where"])
        rows = complete_rows(out.with_suffix(f".turn{turn + 1}.jsonl"), provenance, prompts, compute,
                             dict(index=int, completions=list, tstamp=float), out)
        for number, row in rows.items():
            questions[number]["messages"].append(dict(role="assistant", content=row["completions"][0].strip()))
            questions[number]["tstamp"] = row["tstamp"]
    answered = [question for question in questions if len(question["messages"]) == 2 * len(question["turns"])]
    n_questions = len(answered) + sum(n for n, _ in skipped.values())
    summary = (f"{len(answered)} answers to {n_questions} questions; skipped: {describe_skips(skipped)}; cut:"
               f" {describe_skips(cut)}")
    if not answered:
        raise UserError(f"{args.questions}: no answers: {summary}")
    rows = [bench_row(args.suite, question, args.model) for question in answered]
    text = as_lines(rows) if args.suite == "mt_bench" else to_json(rows, indent=2) + "\n"
    print_rank0(f"{out}{on_rank_0(lambda: write_once(out, text))}: {summary}")
    if args.suite == "mt_bench":
        print_rank0(f"next: python {HERE}/evaluate.py judge --mt_bench DIR --samples {shlex.quote(str(out))} --api URL"
                    " --judge MODEL --out verdicts.jsonl")
    else:
        print_rank0(f"next: alpaca_eval --model_outputs {shlex.quote(str(out))}")
    return 1 if skipped else 0  # a mean over fewer questions is another one


def read_questions(args, skipped):
    """The suite's question file -> its rows with `turns`, `temperature`, `where` and empty `messages`. One that does
    not fit is counted in `skipped`."""
    questions = []
    for number, (where, row) in enumerate(read_jsonl(Path(args.questions))):  # of alpaca_eval.json, one array, too
        if args.suite == "alpaca_eval":
            row["question_id"] = number
            row["turns"] = [row.get("instruction")]
        if row.get("question_id") is None or not row.get("turns") or not are_texts(row["turns"]):
            count_skip(skipped, f"not one of {args.suite}", f"{where}, question {number}")
            continue
        temperature = args.temperature
        if temperature is None:
            temperature = MT_BENCH_TEMPERATURE.get(row.get("category"), 0.7)
        questions.append(row | dict(temperature=temperature, where=where, messages=[]))
    return questions


def dialogue(messages):
    """Messages up to a user's as one text in the form of Anthropic's HH, which ends where the answer is to come."""
    names = dict(user="Human", assistant="Assistant", system="System")
    text = ""
    for message in messages:
        name = names.get(message["role"], message["role"])
        content = message.get("content") or to_json(message["tool_calls"])
        text += f"\n\n{name}: {content}"
    return text + "\n\nAssistant:"


def bench_row(suite, question, generator):
    """An answer in the suite's format: FastChat's model_answer line or an entry of AlpacaEval's model_outputs.json."""
    name = question["question_id"]
    answers = [message["content"] for message in question["messages"][1::2]]
    if suite == "mt_bench":
        return dict(question_id=name, answer_id=f"{generator}/{name}", model_id=generator,
                    choices=[dict(index=0, turns=answers)], tstamp=question["tstamp"])
    return dict(dataset=question.get("dataset", ""), instruction=question["turns"][0], output=answers[0],
                generator=generator)


# --------------------------------------------------------------------------------- a language model as judge or sampler
# Table 2 of the paper, for dialogues.
COMPARE = """For the following dialogue history to a chatbot, which response is more helpful?

Dialogue history:

{prompt}

Response A:

{a}

Response B:

{b}

FIRST provide a one-sentence comparison of the two responses and explain which you feel is more helpful. SECOND, on a \
new line, state only "A" or "B" to indicate which response is more helpful. Your response should use the format:

Comparison: <one-sentence comparison and explanation>

More helpful: <"A" or "B">"""
# The last line that COMPARE asks for, or the letter alone, whatever marks stand around them.
CHOICE = re.compile(r"[\W_]*+((?i:more helpful)[\W_]++)?((?i:response)[\W_]++)?([AB])[\W_]*+")
JUDGE_SAMPLING = dict(temperature=0, max_tokens=2048)  # FastChat's for MT-Bench
NEED_REFERENCE = ("math", "reasoning", "coding")  # MT-Bench's categories that are graded beside a reference answer


def parse_choice(text):
    """A judge's answer -> "A", "B" or None: of the last line that has it alone or after "More helpful:", as asked."""
    matches = [CHOICE.fullmatch(line) for line in text.splitlines()]
    choices = [match[3] for match in matches if match]
    return choices[-1] if choices else None


def parse_rating(text):
    """A judge's answer -> the rating, 1 to 10, or None: the first [[n]], the form that is asked for. FastChat falls
    back to [n], which may be anything, a footnote too."""
    match = re.search(r"\[\[(\d+(?:\.\d*)?)\]\]", text)
    return float(match[1]) if match and 1 <= float(match[1]) <= 10 else None


def request_seed(seed, prompt, j):
    """A number in [0, 2^31), a pure function of the seed, the prompt (text or messages) and the completion's index."""
    digest = hashlib.sha256(json.dumps([seed, prompt, j], sort_keys=True).encode()).hexdigest()
    return int(digest[:8], 16) >> 1


def api_rows(prompts, args):
    """Like sampled_rows, from a server: each completion a request with its own seed; a text is continued as it is, a
    conversation answered through the server's chat template. A prompt of whose requests one failed has no row."""
    sampling = dict(model=args.model, temperature=args.temperature, top_p=args.top_p, max_tokens=args.max_new_tokens)
    items = []
    for prompt in prompts:
        request = dict(sampling)
        if isinstance(prompt.content, str):
            request["prompt"] = prompt.content
        else:
            request["messages"] = prompt.content
        if prompt.tools:
            request["tools"] = prompt.tools
        seeds = [request_seed(args.seed, prompt.content, j) for j in range(args.k)]
        items.append((prompt, f"row {prompt.index} of the data", [request | dict(seed=seed) for seed in seeds]))
    for prompt, replies in ask_all(items, args):
        answers = []
        for reply in replies:
            stop = "" if reply["finish_reason"] == "stop" else None
            answers.append((reply["text"], stop, reply["tokens"]))
        yield [sample_row(prompt, answers)]


def comparison_tasks(args, bad):
    """-> the requests that compare samples, [(what one asks about, its messages)], and how many completions have
    nothing to be compared with. `completion_is` is the letter of our completion. Texts lose the blanks around them,
    which would tell the writers apart; an empty completion is judged like any other. A conversation is put to the judge
    in the form of the paper's dialogues, whatever template its policy has. Rows that are no samples are counted in
    `bad`."""
    tasks = []
    n_unmatched = 0
    others = {}
    for _, row in read_samples(args.against, bad) if args.against else []:
        others[json.dumps(row["prompt"])] = row["completions"]
    for _, row in read_samples(args.samples, bad):
        prompt = row["prompt"]
        history = prompt if isinstance(prompt, str) else dialogue(prompt)
        completions_ = row["completions"]
        if args.against:
            opponents = others.get(json.dumps(prompt), [])
        else:
            opponents = row["references"][:1] * len(completions_)
        n_unmatched += max(0, len(completions_) - len(opponents))
        for j, (ours, theirs) in enumerate(zip(completions_, opponents)):
            letter = "AB"[request_seed(args.seed, prompt, j) % 2]
            a, b = (ours, theirs) if letter == "A" else (theirs, ours)
            content = COMPARE.format(prompt=history.strip(), a=a.strip(), b=b.strip())
            about = dict(prompt=prompt, j=j, completion_is=letter)
            tasks.append((about, [dict(role="user", content=content)]))
    return tasks, n_unmatched


def mt_bench_tasks(args, bad):
    """Like comparison_tasks: the requests that grade MT-Bench answers one by one, turn 1 and turn 2, in FastChat's
    words; and how many questions have no answer. One that does not fit its question is counted in `bad`."""
    folder = Path(args.mt_bench)
    try:
        templates = {row["name"]: row for _, row in read_jsonl(folder / "judge_prompts.jsonl")}
        questions = {row["question_id"]: row for _, row in read_jsonl(folder / "mt_bench/question.jsonl")}
        references = {}
        for _, row in read_jsonl(folder / "mt_bench/reference_answer/gpt-4.jsonl"):
            references[row["question_id"]] = row["choices"][0]["turns"]
    except (LookupError, TypeError) as error:
        raise UserError(f"{folder}: not FastChat's fastchat/llm_judge/data: {error!r}") from None
    tasks = []
    for where, answer in read_jsonl(Path(args.samples)):
        try:
            name = answer["question_id"]
            question = questions.pop(name)  # an answer of another model to it is an error
            tasks += grading_tasks(question, answer["choices"][0]["turns"], references.get(name, []), templates)
        except (LookupError, TypeError) as error:
            count_skip(bad, f"does not fit {folder}, or answers a question twice: {error!r}", where)
    return tasks, len(questions)


def grading_tasks(question, answer, reference, templates):
    """Of one question, from the texts of its turns. Raises LookupError or TypeError where they do not fit."""
    texts = {}
    for field, turns in dict(question=question["turns"], answer=answer, ref_answer=reference).items():
        if not are_texts(turns):  # a text for a list of texts would be graded by its letters
            raise TypeError(f"the turns of {field} are {turns!r:.40}")
        for turn, text in enumerate(turns, 1):
            texts[f"{field}_{turn}"] = text
    texts |= dict(question=texts["question_1"], answer=texts["answer_1"])
    kind = "single-math-v1" if question["category"] in NEED_REFERENCE else "single-v1"
    tasks = []
    for turn, name in enumerate((kind, f"{kind}-multi-turn")[: len(question["turns"])], 1):
        system = dict(role="system", content=templates[name]["system_prompt"])
        user = dict(role="user", content=templates[name]["prompt_template"].format(**texts))
        about = dict(question_id=question["question_id"], category=question["category"], turn=turn)
        tasks.append((about, [system, user]))
    return tasks


def judge(args):
    """Verdicts of a judge behind an API: those that the ledger OUT lacks (delete a line to ask it again) are asked for,
    then all are scored. The key of one is the hash of its request and what it is about: a ledger serves many runs."""
    bad = {}
    if args.mt_bench:
        tasks, n_unmatched = mt_bench_tasks(args, bad)
        parse = parse_rating
        summarize = grade_result
    else:
        tasks, n_unmatched = comparison_tasks(args, bad)
        parse = parse_choice
        summarize = comparison_result
    if not tasks:
        raise UserError(f"{args.samples}: nothing to judge, {n_unmatched} without an opponent or an answer; bad rows:"
                        f" {describe_skips(bad)}")
    out = Path(args.out)
    summary_file = out.with_suffix(".summary.json")
    if summary_file.exists() and "verdicts_wanted" not in read_json(summary_file):
        raise UserError(f"{summary_file} is not one that this command wrote: choose another --out")
    wanted = {}  # by key: what it is about, its request
    for about, messages in tasks:
        request = dict(model=args.judge, messages=messages, **JUDGE_SAMPLING)
        identity = json.dumps(dict(request, about=about), sort_keys=True, separators=(",", ":"))
        wanted[hashlib.sha256(identity.encode()).hexdigest()] = about, request
    ledger = read_own_rows(out, dict(key=str, verdict=object, text=str), key=["key"])
    pending = [(key, f"key {key[:12]}", [request]) for key, (_, request) in wanted.items() if key not in ledger]
    print_rank0(f"{out}: {len(wanted)} verdicts wanted, {len(pending)} of them still to be asked of {args.judge}")
    failure = None
    try:
        for key, (reply,) in ask_all(pending, args):
            about, _ = wanted[key]
            ledger[key] = dict(key=key, judge=args.judge, **about, verdict=parse(reply["text"]), **reply)
            append_rows(out, [ledger[key]])
    except UserError as error:
        failure = error  # what there is, is scored
    scored = []
    malformed = {}  # in the judge's words; they are not scored
    n_missing = 0
    for key, (about, _) in wanted.items():
        if key not in ledger:
            n_missing += 1
            continue
        text = ledger[key]["text"]
        verdict = parse(text)  # not what the line says it is: it may be edited, or of an older, laxer parser
        if verdict is None:
            malformed[key] = " ".join(text.split())[:80]
        else:
            scored.append((about, verdict))
    result = dict(bad_rows=sum(n for n, _ in bad.values()), unmatched=n_unmatched, verdicts_wanted=len(wanted),
                  scored=len(scored), malformed=len(malformed), missing=n_missing)
    if scored:
        result |= summarize(scored)
    write_json(summary_file, vars(args) | result | dict(malformed_verdicts=malformed))
    print_rank0(f"{json.dumps(result, indent=2)}\n-> {summary_file}")
    if bad:
        print_rank0(f"bad rows: {describe_skips(bad)}")
    if failure:
        raise failure
    return 1 if bad else 0


def comparison_result(scored):
    """[(about, "A" or "B")] -> win rate, the mean over prompts, its error; share_a: of A, 0.5 without position bias."""
    wins = {}
    for about, choice in scored:
        wins.setdefault(json.dumps(about["prompt"]), []).append(float(choice == about["completion_is"]))
    win_rate, error = mean_and_error(torch.tensor([np.mean(of_prompt) for of_prompt in wins.values()]))
    n_a = sum(choice == "A" for _, choice in scored)
    return dict(prompts=len(wins), win_rate=win_rate, win_rate_se=error if len(wins) > 1 else None,
                share_a=n_a / len(scored))


def grade_result(scored):
    """[(about, 1 to 10)] -> mean grades of categories and overall, a turn and, as FastChat pools them, of both."""
    grades = {}
    for about, rating in scored:
        for category in (about["category"], "overall"):
            for turn in (f"turn_{about['turn']}", "both"):
                grades.setdefault(category, {}).setdefault(turn, []).append(rating)
    means = {}
    for category, turns in grades.items():
        means[category] = {turn: sum(ratings) / len(ratings) for turn, ratings in turns.items()}
    return dict(grades=means)


# ------------------------------------------------------------------- plot: figures 3 to 6 and Table 1 from JSON lines
# Win rates in %, sqrt KL in sqrt nats, log-ratios and log_eps in nats, lengths in tokens. `x_se` is the standard error
# of the mean x over n seeds; of a single run that of its evaluation, over prompts; null where there is none.
LOOKS = {"dpo": ("#b04000", "s"), "is_dpo": ("#0060a0", "o"), "ipo": ("#d08a00", "v"), "is_ipo": ("#3a7d34", "^"),
         "chi_po": ("#7a3b8f", "D"), "rpo": ("#606060", "P"), "length_dpo": ("#8c6d46", "X"), "online": ("black", "h")}
COMPARED = ("dpo", "is_dpo")  # drawn thick, and with bands: those of seven losses would hide each other
LABELS = {"epoch": "epoch", "win_rate": "win rate by the {judge} (%)", "sqrt_kl": "√KL(π || ref) (√nats)",
          "ratio/chosen": "mean log π/ref, chosen (nats)", "ratio/rejected": "mean log π/ref, rejected (nats)",
          "weights/mean": "mean weight (capped)", "place": "log ε (nats a response; inf: no cap)",
          "peak_win_rate": "peak win rate by the {judge} (%)", "final_win_rate": "final win rate by the {judge} (%)",
          "final_sqrt_kl": "final √KL (√nats)"}
TRAINING = ["ratio/chosen", "ratio/rejected", "weights/mean"]
TABLE = ["peak_win_rate", "peak_sqrt_kl", "final_win_rate", "final_sqrt_kl", "drop", "ess_share", "final_length"]
BARS = "bars: one standard error over seeds, of one run over prompts"
FITS = "; lines: fits of start + d (a - b log d), d = √KL"
BANDS = ", bands: 95% of fits to seeds drawn with replacement"
TABLE_NOTE = """
Mean ± standard error over n seeds, of one run over prompts; win rates by the {judge} in %, √KL in √nats, lengths in
tokens. The peak is the best of the checkpoints and the reference, on the very prompts it is chosen by: biased upward.
ESS share: effective sample size of the weights over the step's pairs, median of the last tenth of the steps.
"""
METHOD = ["beta", "lr", "loss"]
SETTING = [*METHOD, "log_eps"]
# What runs in one plot share, and what those of one setting share, too
COMMON = ["judge", "protocol", "epochs", "max_steps", "batch_size", "warmup_steps", "grad_clip", "max_length",
          "max_prompt_length"]
OF_SETTING = ["label_smoothing", "length_average", "eta", "alpha", "r_max"]


def read_run(directory):
    """-> flags of a run of train_pref.py (log_eps None where the loss has none), and name, pairs, steps (lines of
    metrics.jsonl), points (lines of golden.jsonl under its last settings that are complete, win rates in %), `golden
    settings`, protocol and data, fingerprints of the evaluation and of the pairs. Raises UserError."""
    metrics = Path(directory, "metrics.jsonl")
    header = read_header(directory)
    args = header["args"]
    if args.get("loss") not in LOOKS:
        raise UserError(f"{metrics}:1: not the header of a run of train_pref.py: no loss that is known")
    for name in ("beta", "lr", "log_eps", "seed"):
        if not is_number(args.get(name)) and args.get(name) != math.inf:
            raise UserError(f"{metrics}:1: {name} is {args.get(name)!r:.40}: want a number")
    steps = []
    for where, line in read_whole_lines(metrics)[1:]:
        # Reversed or doubled lines would give other figures without a word.
        if line.get("step") != len(steps) + 1:
            raise UserError(f"{where}: step {line.get('step')!r:.40} where {len(steps) + 1} should stand: lines are"
                            " missing, doubled, out of order or not of this log: restore the file")
        for name in ("epoch", *TRAINING, "weights/ess"):
            if name not in line or line[name] is not None and not is_number(line[name]):
                raise UserError(f"{where}: {name} is {line.get(name)!r:.40}: want a number")
        steps.append(line)
    if not steps:
        raise UserError(f"{metrics}: no steps after the header")
    n_gaps = sum(line[name] is None for line in steps for name in TRAINING)
    if n_gaps:
        print_rank0(f"{directory}: {n_gaps} values of figure 6 are null, of steps that were not finite: it has gaps")
    points, settings = golden_points(directory, header["steps"])
    if max(points) < header["steps"]:
        print_rank0(f"{directory}: evaluated up to step {max(points)} of {header['steps']}: it stands for the final"
                    " policy")
    return args | {"name": directory, "log_eps": args["log_eps"] if args["loss"].startswith("is_") else None,
                   "pairs": header["pairs"], "steps": steps, "points": [points[step] for step in sorted(points)],
                   "data": header.get("data"), "golden settings": settings, "protocol": points[0].get("protocol"),
                   "judge": points[0].get("judge", "golden model")}


def golden_points(directory, last_step):
    """-> the rows {step: row} of RUN/golden.jsonl, win rates in %, of the last settings under which the run is
    evaluated to its end, else of the last that have the reference and a checkpoint; and these settings."""
    path = Path(directory, "golden.jsonl")
    remedy = f"python evaluate.py golden --rm REWARD_MODEL --ref REFERENCE --data PROMPTS {directory}"
    of_settings = {}  # in the order of their last rows
    for where, row in read_whole_lines(path) if path.is_file() else []:
        measures = {name: row.get(name) for name in ("step", "epoch", "win_rate", "sqrt_kl", "length")}
        errors = {name: row.get(name) for name in ("win_rate_se", "sqrt_kl_se")}
        fits = all(map(is_number, measures.values())) and isinstance(row.get("settings"), str)
        roots = [value for value in (measures["sqrt_kl"], *errors.values()) if value is not None]
        if not fits or not all(is_number(root) and root >= 0 for root in roots):
            raise UserError(f"{where}: {measures | errors} must be numbers, sqrt_kl and errors not below 0, with"
                            f" `settings`: delete {path} and run {remedy}")
        points = of_settings.pop(row["settings"], {})
        of_settings[row["settings"]] = points  # now the last
        in_percent = {name: row[name] and 100 * row[name] for name in ("win_rate", "win_rate_se") if name in row}
        points[row["step"]] = row | in_percent
    usable = [settings for settings, points in of_settings.items() if 0 in points and len(points) > 1]
    complete = [settings for settings in usable if max(of_settings[settings]) >= last_step]
    if not usable:
        raise UserError(f"{path}: no line of step 0, the reference, or none after it: run {remedy}")
    settings = (complete or usable)[-1]
    return of_settings[settings], settings


def is_number(value):
    return type(value) in (int, float) and math.isfinite(value)


def check_comparable(runs):
    """Raise UserError where runs were not trained and evaluated alike enough for a figure, or one comes twice."""
    for a, b in itertools.combinations(runs, 2):
        same_setting = all(a[name] == b[name] for name in SETTING)
        same_seed = a["seed"] == b["seed"]
        names = list(COMMON)
        if same_setting:
            names += OF_SETTING
        if same_seed:  # another one may have its own data, reference and reward model
            names += ["golden settings", "data"]  # fingerprints: paths differ between machines
        differences = [f"{name} {a.get(name)!r} and {b.get(name)!r}" for name in names if a.get(name) != b.get(name)]
        if same_setting and same_seed and not differences:
            differences = ["the same setting and seed"]
        if differences:
            raise UserError(f"{a['name']} and {b['name']} do not belong in one plot: {'; '.join(differences)}")


def average(runs, lines, names, key=()):
    """lines(run), dicts, of all runs -> DataFrame, a row a setting and value of the columns `key`: the means over n
    seeds of each seed's mean, and their standard errors, sd / sqrt(n); of a single seed the errors that it says."""
    import pandas as pd  # here: the other commands do not wait for it

    rows = []
    for run in runs:
        setting_and_seed = {name: run[name] for name in (*SETTING, "seed")}
        rows += [line | setting_and_seed for line in lines(run)]
    by = [*SETTING, *key]
    errors = [f"{name}_se" for name in names]
    dtypes = dict.fromkeys(["log_eps", *names, *errors], float)
    dtypes["loss"] = pd.CategoricalDtype(list(LOOKS))  # in the order in which they are drawn
    frame = pd.DataFrame(rows, columns=[*by, "seed", *names, *errors]).astype(dtypes)
    seeds = strict_means(frame.groupby([*by, "seed"], dropna=False, observed=True)).reset_index()
    groups = seeds.groupby(by, dropna=False, observed=True)
    means = strict_means(groups[names])
    spread = groups[names].sem().where(means.notna()).add_suffix("_se").fillna(groups[errors].mean())
    return pd.concat([groups.size().rename("n"), means, spread], axis=1).reset_index()


def strict_means(groups):
    """Means of a DataFrame's groups. One null makes its mean null: a step that was not finite leaves a gap in a figure,
    and not the mean of its neighbours."""
    return groups.mean().where(groups.count().eq(groups.size(), axis=0))


def fit_curve(seeds, start, grid):
    """(a, b) of WR(d) = WR_sft + d (a - b log d), d = sqrt KL (Gao et al. 2022, Rafailov et al. 2024), by least squares
    with WR_sft = `start` fixed; the curve at `grid` (G,); 2.5 and 97.5 percentiles (2, G) of curves of 1,000 draws of
    seeds with replacement. A seed is an array (checkpoints, 2) of d > 0 and win rate, and stays whole; three have but
    ten different draws."""
    draws = np.random.default_rng(0).integers(len(seeds), size=(1000, len(seeds)))
    fits = []  # of all seeds, then of the draws
    for picked in [range(len(seeds)), *draws]:
        d, win_rates = np.concatenate([seeds[k] for k in picked]).T
        columns = np.stack([d, -d * np.log(d)], -1)
        fits.append(np.linalg.lstsq(columns, win_rates - start, rcond=None)[0])
    curves = [start + grid * (a - b * np.log(grid)) for a, b in fits]
    return fits[0], curves[0], np.percentile(curves[1:], [2.5, 97.5], axis=0)


def draw(rows, x, ys, judge, ticks=None, **line):
    """A column of axes a (beta, lr), a line of axes a y; over x the means of each loss, with bars of one standard
    error. Full markers: the weighted losses. judge: who says what wins, for the labels."""
    from matplotlib.figure import Figure

    panels = rows.groupby(["beta", "lr"])
    figure = Figure(figsize=(max(9, 1 + 3.4 * len(panels)), 2 + 2.4 * len(ys)), layout="constrained")
    axes = figure.subplots(len(ys), len(panels), sharex="col", sharey="row", squeeze=False)
    for ((beta, lr), panel), column in zip(panels, axes.T):
        column[0].set_title(f"β = {beta:g}, lr {lr:g}", fontsize=10)
        column[-1].set_xlabel(LABELS[x])
        for loss, of_loss in panel.groupby("loss", observed=True):
            color, marker = LOOKS[loss]
            look = dict(color=color, marker=marker, markersize=4, linewidth=1.8 if loss in COMPARED else 0.8,
                        fillstyle="full" if loss.startswith("is_") else "none")
            for ax, y in zip(column, ys):
                ax.errorbar(of_loss[x], of_loss[y], of_loss[f"{y}_se"], label=loss, elinewidth=0.8, capsize=2,
                            **look | line)
        if ticks:
            column[-1].set_xticks(range(len(ticks)), ticks)
    for ax, y in zip(axes[:, 0], ys):
        ax.set_ylabel(LABELS[y].format(judge=judge))
    return figure


def add_legend(figure, title):
    """Below all axes, each label once."""
    legend = {}
    for ax in figure.axes:
        for handle, text in zip(*ax.get_legend_handles_labels()):
            legend[text] = handle
    figure.legend(legend.values(), legend, loc="outside lower center", fontsize=8, frameon=False, ncols=len(legend),
                  title=title, title_fontsize=8)


def draw_curves(runs, points):
    """Figure 3: means of the checkpoints; where each seed has three, the curve fitted to all seeds' own, with a star at
    its maximum (exp(a/b - 1), WR_sft + b d), where a - b log d - b = 0, if that is inside the data -> rows, figure."""
    import pandas as pd

    figure = draw(points, "sqrt_kl", ["win_rate"], runs[0]["judge"], linestyle="")
    axes = dict(zip(points.groupby(["beta", "lr"]).groups, figure.axes))
    rows = []
    for row in points[points["step"] == 0].to_dict("records"):
        seeds = []
        for run in runs:
            if all(run[name] == row[name] for name in METHOD):
                after_start = [(point["sqrt_kl"], point["win_rate"]) for point in run["points"][1:] if point["sqrt_kl"]]
                seeds.append(np.array(after_start))
        if min(map(len, seeds)) < 3:
            continue
        d = np.concatenate(seeds)[:, 0]
        start = row["win_rate"]
        grid = np.linspace(1e-9, d.max(), 61)
        (a, b), curve, band = fit_curve(seeds, start, grid)
        peak = math.exp(a / b - 1) if b > 0 and a / b < 700 else math.nan  # none that a float holds
        inside = bool(d.min() <= peak <= d.max())
        setting = {name: row[name] for name in (*SETTING, "n")}
        rows.append(setting | dict(start=start, a=a, b=b, peak_sqrt_kl=peak, peak_win_rate=start + b * peak,
                                   inside=inside))
        ax = axes[row["beta"], row["lr"]]
        color, _ = LOOKS[row["loss"]]
        ax.plot(grid, curve, color=color, linewidth=1.8 if row["loss"] in COMPARED else 0.8)
        if row["loss"] in COMPARED:
            ax.fill_between(grid, *band, color=color, alpha=0.12, linewidth=0)
        if inside:
            ax.plot(peak, start + b * peak, "*", color=color, markersize=13, mec="white")
    if any(row["inside"] for row in rows):
        figure.axes[-1].plot([], [], "*", color="grey", markersize=11, label="peak of a fitted curve")
    return pd.DataFrame(rows), figure


def pairs_of_step(run, line):
    """The pairs of a step, a line of metrics.jsonl: as logged, or all but an epoch's last step have batch_size."""
    if is_number(line.get("pairs")):
        return line["pairs"]
    place = (line["step"] - 1) % math.ceil(run["pairs"] / run["batch_size"])  # in its epoch
    return min(run["batch_size"], run["pairs"] - place * run["batch_size"])


def ess_share(run):
    """Effective sample size of the weights over the pairs of the step, median of the last tenth of the steps; NaN if
    none of these says it."""
    last_tenth = run["steps"][-max(1, len(run["steps"]) // 10) :]
    shares = [line["weights/ess"] / pairs_of_step(run, line) for line in last_tenth if line["weights/ess"] is not None]
    if len(shares) < len(last_tenth):
        print_rank0(f"{run['name']}: {len(last_tenth) - len(shares)} of the last {len(last_tenth)} steps have no"
                    " weights/ess: the ESS share is of the others")
    return float(np.median(shares)) if shares else math.nan


def run_numbers(run):
    """What Table 1 says of one run: the measures of the final policy and of the peak, the best of the checkpoints and
    the reference; the drop between (points); the ESS share."""
    peak = max(run["points"], key=itemgetter("win_rate"))
    final = run["points"][-1]
    numbers = {f"peak_{name}": value for name, value in peak.items()}
    numbers |= {f"final_{name}": value for name, value in final.items()}
    return numbers | dict(drop=peak["win_rate"] - final["win_rate"], ess_share=ess_share(run))


def table_cells(table):
    """-> the rows of Table 1 as texts, the header first; "-" where there is no number."""
    names = ["loss", "beta", "lr", "log_eps", "n"]
    rows = [[*names, *TABLE]]
    for row in table.to_dict("records"):
        cells = [str(row[name]) for name in names] + [f"{row[name]:.2f} ± {row[f'{name}_se']:.2f}" for name in TABLE]
        rows.append([cell.replace(" ± nan", "").replace("nan", "-") for cell in cells])
    return rows


def markdown_table(table, judge):
    header, *rows = table_cells(table)
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines) + TABLE_NOTE.format(judge=judge)


def latex_table(table):
    """The same for a paper that loads booktabs."""
    header, *rows = table_cells(table)
    lines = [" & ".join(row).replace("_", r"\_").replace("±", r"$\pm$") + r" \\" for row in (header, *rows)]
    begin = [rf"\begin{{tabular}}{{{'l' + 'r' * (len(header) - 1)}}}", r"\toprule", lines[0], r"\midrule"]
    return "\n".join([*begin, *lines[1:], r"\bottomrule", r"\end{tabular}", ""])


def plot(args):
    """Figures 3 to 6 and Table 1 of the runs given, which must belong together."""
    runs = sorted(map(read_run, args.runs), key=itemgetter("seed"))
    check_comparable(runs)
    shown = [run for run in runs if run["log_eps"] in (None, args.log_eps)]
    if not shown:
        raise UserError(f"no run has log_eps {args.log_eps:g}, for figures 3, 4 and 6: choose another --log_eps")
    print_rank0(f"figures 3, 4, 6: {len(shown)} of {len(runs)} runs, those without a log_eps or of {args.log_eps:g}")
    judge = runs[0]["judge"]
    table = average(runs, lambda run: [run_numbers(run)], TABLE)
    points = average(shown, itemgetter("points"), ["epoch", "win_rate", "sqrt_kl"], ["step"])
    bin_size = math.ceil(max(len(run["steps"]) for run in shown) / 20)

    def binned(run):
        return [line | dict(first_step=(line["step"] - 1) // bin_size * bin_size + 1) for line in run["steps"]]

    bins = average(shown, binned, ["epoch", *TRAINING], ["first_step"])
    figures = {"figure3": draw_curves(shown, points),
               "figure4": (points, draw(points, "epoch", ["win_rate", "sqrt_kl"], judge)),
               "figure6": (bins, draw(bins, "epoch", TRAINING, judge))}
    ablation = table[table.groupby(METHOD, observed=True)["log_eps"].transform("nunique") > 1]
    if len(ablation):
        caps = sorted(set(ablation["log_eps"]))
        places = ablation["log_eps"].rank(method="dense") - 1
        ys = ["peak_win_rate", "final_win_rate", "final_sqrt_kl"]
        figures["figure5"] = ablation, draw(ablation.assign(place=places), "place", ys, judge, ticks=caps)

    out = Path(args.out)
    if out.exists() and any(out.iterdir()) and not (out / "table1.jsonl").exists():
        raise UserError(f"{out} is not empty, and `plot` did not make it: choose another --out")
    make_directory(out)
    lock_for_writing(out)

    def write_frame(name, rows):
        rows = rows.replace(math.inf, "inf")  # JSON has no infinity
        write_atomically(out / f"{name}.jsonl",
                         lambda aside: rows.to_json(aside, orient="records", lines=True, double_precision=15))

    write_frame("table1", table)
    write_text(out / "table1.md", markdown_table(table, judge))
    write_text(out / "table1.tex", latex_table(table))
    for stale in out.glob("figure5.*"):  # it would pass for one of these runs
        stale.unlink()
    for name, (rows, figure) in figures.items():
        fits = FITS + (BANDS if (table["n"] > 1).any() else "")
        add_legend(figure, BARS + (fits if name == "figure3" else ""))
        write_atomically(out / f"{name}.png", lambda aside: figure.savefig(aside, format="png", dpi=150))
        write_frame(name, rows)
    print_rank0(markdown_table(table, judge))
    print_rank0(f"{out}: {', '.join(sorted(figures))}, table1.md and table1.tex of {len(runs)} runs")


def main():
    args = parse_args()
    if args.command in ("judge", "plot"):
        init_distributed(0, 60, 0)  # one process; run_main takes leave of its group
    commands = dict(sample=sample, label=label, golden=golden, bench=bench, judge=judge, plot=plot)
    return commands[args.command](args)


# ================================================================================= Shared by the scripts: read it once
# --- shared: demonstration (train_sft, evaluate) ---
# The forms of a row, in the order in which they count; those of one column hold the prompt, or have none.
DEMONSTRATIONS = [("prompt", "completion"), ("messages",), ("text",), ("prompt", "chosen"), ("chosen",),
                  ("completion",)]


def split_demonstration(row):
    """A data row -> prompt or None, completion: texts, or lists of messages; the columns that were read. Raises
    SkipRow(kind). Of messages the last is the completion, of a preference the chosen response is; HH's have the prompt
    inside. Null is as good as absent."""
    filled = {column for column, value in row.items() if value is not None}
    columns = next((form for form in DEMONSTRATIONS if filled.issuperset(form)), None)
    if columns is None:
        raise lacking(row, "prompt and completion")
    prompt = row[columns[0]] if len(columns) == 2 else None
    completion = row[columns[-1]]
    if isinstance(completion, list) and not isinstance(prompt, list):  # the prompt is in the conversation
        columns = columns[-1:]
        prompt = completion[:-1]
        completion = completion[-1:]
    elif prompt is None and columns != ("text",) and isinstance(completion, str):
        marker = "\n\nAssistant:"
        if marker not in completion:
            raise lacking(row, "prompt and completion")
        end = completion.rfind(marker) + len(marker)
        prompt = completion[:end]
        completion = completion[end:]
    if isinstance(prompt, list) and isinstance(completion, list):
        return prompt, completion, columns
    if not isinstance(completion, str) or not isinstance(prompt, str | None):
        raise wrong_types(row, columns)
    if not completion.strip():
        raise SkipRow("empty completion")
    return prompt, completion, columns
# --- end shared: demonstration ---


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
