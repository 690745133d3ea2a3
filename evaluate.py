"""Evaluation: what a policy says, what a reward model makes of it, and whether training has over-optimized.

    python evaluate.py sample --model out/sft/final --data prompts.jsonl --out samples.jsonl         # completions of a policy
    python evaluate.py label  --rm out/rm/final --samples samples.jsonl --out pairs.jsonl            # the golden preference set
    python evaluate.py golden --rm out/rm/final --ref out/sft/final --data held_out.jsonl RUN...     # -> RUN/golden.jsonl
    python evaluate.py plot   RUN... --out figs                                                      # figures 3 to 6, Table 1
    python evaluate.py judge  --samples samples.jsonl --api URL --judge gpt-4o-mini --out verdicts.jsonl
    python evaluate.py bench  --suite mt_bench --model out/run/final --questions question.jsonl --out answers.jsonl

`torchrun --nproc_per_node=4 evaluate.py sample ...` divides the prompts among ranks; so do label, golden and bench. Everything is
JSON lines, and every command goes on where it was stopped. The protocol is Appendix C and D of the IS-DAA paper: win rate over
all combinations of sampled completions (temperature 0.7, top-p 0.95) and reference responses, as the golden reward model sees
them; KL(policy || ref) of completions sampled at temperature 1 from the whole distribution, the only ones whose KL it is.

Units: rewards in nats of log-odds; KL in nats a response; lengths in tokens (EOS counted); n in prompts, k in completions a prompt.
"""

import argparse
import concurrent.futures
import contextlib
import errno
import gzip
import hashlib
import importlib
import itertools
import json
import math
import os
import random
import re
import sys
import time
import zlib
from array import array
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from jinja2 import TemplateError
from safetensors import SafetensorError, safe_open
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm


# ------------------------------------------------------------------------------------------------------- the estimators
def win_shares(rewards, reference_rewards):
    """Share of the (completion, reference) combinations of each prompt that the completion wins, ties half -> (n,). rewards and
    reference_rewards: a vector a prompt. The win rate is their mean (Appendix D)."""
    return torch.stack([((ours[:, None] > theirs).double() + 0.5 * (ours[:, None] == theirs)).mean()
                        for ours, theirs in zip(rewards, reference_rewards)])


def mean_and_error(values):
    """Mean of (n,) values, one a prompt, and its standard error. A prompt's completions are averaged before: they are not
    independent, prompts are (the error clustered by prompt)."""
    n = len(values)
    return values.mean().item(), (values.double().std() / n**0.5).item() if n > 1 else math.nan


def step_kl(policy_logits, ref_logits):
    """sum_v pi(v) (log pi(v) - log ref(v)) of each row of logits (N, V) -> (N,). Summed over the steps of a response drawn from
    pi it estimates KL(pi || ref) without bias, is never negative, and varies less than log pi(y) - log ref(y), which has the same
    mean (Rao-Blackwell; Amini et al. 2025). The paper's Appendix C prints log r + (r - 1), r = pi/ref: its mean is KL + chi^2."""
    policy, ref = policy_logits.log_softmax(-1), ref_logits.log_softmax(-1)
    return (policy.exp() * (policy - ref)).sum(-1)


# ----------------------------------------------------------------------------------------------------------- generation
class CausalLM(nn.Module):
    """A language model that gives logits. Module names are the checkpoint's; a tied head is the embedding."""

    def __init__(self, c):
        super().__init__()
        self.config, self.model = c, LlamaModel(c)
        self.lm_head = None if c.tie_word_embeddings else Linear(c.hidden_size, c.vocab_size, bias=False)

    def logits(self, hidden):
        """hidden (N, D) -> logits (N, V), float32 (float64 in fp64): 16-bit ones would be rounded to steps of 0.06 near 20."""
        weight = (self.model.embed_tokens if self.lm_head is None else self.lm_head).weight
        if hidden.is_cuda and hidden.dtype == torch.bfloat16:
            return torch.mm(hidden, weight.T, out_dtype=torch.float32)
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        return F.linear(hidden.to(dtype), weight.to(dtype))


class Cache:
    """Keys and values of the tokens of a batch of rows, with room for `capacity` tokens, and their segments (-1: padding)."""

    def __init__(self, c, batch, capacity, dtype, device):
        shape = (batch, c.num_key_value_heads, capacity, c.head_dim)
        self.layers = [tuple(torch.empty(shape, dtype=dtype, device=device) for _ in "kv") for _ in range(c.num_hidden_layers)]
        self.segments = torch.empty(batch, capacity, dtype=torch.long, device=device)
        self.length = 0

    def extend(self, segments):
        """Make room for tokens of these segments (B, T) -> the segments of all tokens (B, L), keys and values of each layer."""
        start, self.length = self.length, self.length + segments.shape[1]
        self.segments[:, start : self.length] = segments
        return self.segments[:, : self.length], [[t[:, :, : self.length] for t in layer] for layer in self.layers]

    def keep(self, rows):
        self.segments = self.segments[rows]
        self.layers = [tuple(t[rows] for t in layer) for layer in self.layers]


def uniform_numbers(prompt, k, n, seed):
    """(k, n) numbers in [0, 1), float64: a pure function of (seed, prompt, completion, token). So a completion does not depend
    on the other prompts, the batch or the ranks, and two policies are compared on the same draws."""
    digest = hashlib.sha256(array("i", prompt).tobytes()).hexdigest()
    generators = [random.Random(f"{seed}/{digest}/{j}") for j in range(k)]
    return torch.tensor([[generator.random() for _ in range(n)] for generator in generators], dtype=torch.float64)


def next_tokens(logits, uniform, temperature, top_p):
    """One token id for each row of logits (N, V), the inverse of the cumulative distribution at uniform (N,). Temperature 0
    takes the likeliest. top_p keeps the fewest likeliest tokens that have that mass together (Holtzman et al. 2020)."""
    if temperature == 0:
        return logits.argmax(-1)
    probs, order = (logits.double() / temperature).softmax(-1), None
    if top_p < 1:
        top, order = probs.topk(min(512, probs.shape[1]))  # nearly always enough, at a tenth of the cost of sorting all
        if not (top.sum(-1) >= top_p).all():
            top, order = probs.sort(descending=True)
        probs = top * (top.cumsum(-1) - top < top_p)
    cumulative = probs.cumsum(-1)
    total = cumulative[:, -1:]
    point = torch.minimum(uniform[:, None] * total, total.nextafter(torch.zeros_like(total)))  # below the total, also once rounded
    index = torch.searchsorted(cumulative, point, right=True)
    return (index if order is None else order.gather(1, index))[:, 0]


@torch.no_grad()
def generate(policy, prompts, uniform, temperature, top_p, stops, device):
    """k completions of each of B prompts (lists of ids) -> ids [B][k], each with its stop token if it came to one.

    uniform (B, k, n): the random numbers; n tokens at most. A row of the cache holds [prompt | first tokens of the k completions |
    their second tokens | ...]: the prompt is computed and kept once, and segments keep the completions from seeing each other."""
    B, k, n = uniform.shape
    lengths, uniform = torch.tensor([len(prompt) for prompt in prompts], device=device), uniform.to(device)
    rows = [(list(prompt), list(range(len(prompt))), [0] * len(prompt)) for prompt in prompts]
    batch = batch_tensors(rows, [(b, len(prompt) - 1) for b, prompt in enumerate(prompts)], device)
    cache = Cache(policy.config, B, batch["ids"].shape[1] + k * n, policy.model.dtype, device)
    hidden = policy.model(batch["ids"], batch["positions"], batch["segments"], cache=cache).flatten(0, 1)[batch["predict"]]  # (B, D)
    logits = policy.logits(hidden).repeat_interleave(k, dim=0)
    stops, segments = torch.tensor(stops, device=device), torch.arange(1, k + 1, device=device)
    tokens = torch.full((B, k, n), -1, device=device)
    ended = torch.zeros(B, k, dtype=torch.bool, device=device)
    running = torch.arange(B, device=device)  # the prompts that rows of the cache belong to
    for t in range(n):
        new = next_tokens(logits, uniform[running, :, t].flatten(), temperature, top_p).view(-1, k)
        tokens[running, :, t] = new
        ended[running] |= torch.isin(new, stops)
        goes_on = ~ended[running].all(dim=1)
        left = goes_on.sum().item()
        if left == 0 or t == n - 1:
            break
        if left <= len(running) / 2:  # not one by one: each time the cache is copied
            running, new = running[goes_on], new[goes_on]
            cache.keep(goes_on)
        positions = (lengths[running, None] + t).expand(-1, k)
        logits = policy.logits(policy.model(new, positions, segments.expand(len(running), k), cache=cache).flatten(0, 1))
    return [[until_stop(ids, stops.tolist()) for ids in completions] for completions in tokens.tolist()]


def until_stop(ids, stops):
    """What came after a completion's stop token, while others of its batch went on, is not part of it."""
    end = next((t for t, token in enumerate(ids) if token in stops or token < 0), len(ids) - 1)
    return ids[: end + 1] if ids[end] >= 0 else ids[:end]


def completions(policy, prompts, k, max_new_tokens, temperature, top_p, seed, batch_size, stops, rank, world, device, desc):
    """Generate for all prompts, longest first, divided among ranks; yield [(index of the prompt, its k completions)] a round, the
    same on every rank."""
    rounds = deal([len(prompt) for prompt in prompts], max(1, batch_size // k), world)
    for micro in tqdm(rounds, desc=desc, disable=rank > 0 or not sys.stderr.isatty(), leave=False):
        mine, everyones = micro[rank], [None] * world
        if mine:
            uniform = torch.stack([uniform_numbers(prompts[i], k, max_new_tokens, seed) for i in mine])
            ids = generate(policy, [prompts[i] for i in mine], uniform, temperature, top_p, stops, device)
        dist.all_gather_object(everyones, list(zip(mine, ids)) if mine else [])
        yield [one for ranks in everyones for one in ranks]


# ------------------------------------------------------------------------------------------------- rewards and divergence
def response_rows(prompts, responses):
    """Rows [prompt | y_1 | ... | y_k] as in training: (tokens, positions, segments) each, and (row, first column, response) of
    every response in turn."""
    rows, places = [], []
    for b, (prompt, ys) in enumerate(zip(prompts, responses)):
        tokens, positions, segments = list(prompt), list(range(len(prompt))), [0] * len(prompt)
        for number, y in enumerate(ys, 1):
            places.append((b, len(tokens), y))
            tokens += y
            positions += range(len(prompt), len(prompt) + len(y))
            segments += [number] * len(y)
        rows.append((tokens, positions, segments))
    return rows, places


def in_batches(compute, prompts, responses, batch_size, columns, rank, world, device, desc):
    """compute(prompts, responses) -> (responses, columns) on batches of about batch_size responses, divided among ranks ->
    a float64 CPU tensor (number of responses of the prompt, columns) a prompt, on every rank."""
    counts = [len(ys) for ys in responses]
    ends = list(itertools.accumulate(counts))
    results = torch.zeros(sum(counts), columns, dtype=torch.float64, device=device)
    lengths = [len(prompt) + sum(map(len, ys)) for prompt, ys in zip(prompts, responses)]
    rounds = deal(lengths, max(1, batch_size // max(counts)), world)
    for micro in tqdm(rounds, desc=desc, disable=rank > 0 or not sys.stderr.isatty(), leave=False):
        if micro[rank]:
            where = [r for i in micro[rank] for r in range(ends[i] - counts[i], ends[i])]
            results[where] = compute([prompts[i] for i in micro[rank]], [responses[i] for i in micro[rank]]).double()
    dist.all_reduce(results)  # each was computed by one rank: a sum with zeros is exact
    return list(results.cpu().split(counts))


# --- shared: reward (train_rm, evaluate) ---
class RewardModel(nn.Module):
    """The body and a linear head: transformers' LlamaForSequenceClassification with one label."""

    def __init__(self, c):
        super().__init__()
        self.model = LlamaModel(c)
        self.score = Linear(c.hidden_size, 1, bias=False)

    def forward(self, ids, positions, segments, predict, prompt=0):
        """-> rewards (S, 1), float32. predict (S,) indexes the flattened (B, T) position of each response's last token."""
        hidden = self.model(ids, positions, segments, prompt).flatten(0, 1)[predict]
        return self.score(hidden.float())
# --- end shared: reward ---


@torch.no_grad()
def rewards(reward_model, prompts, responses, device):
    """r(x, y) of each response in turn, read at its last token -> (S, 1)."""
    rows, places = response_rows(prompts, responses)
    return reward_model(**batch_tensors(rows, [(row, start + len(y) - 1) for row, start, y in places], device))


@torch.no_grad()
def divergences(policy, ref, prompts, responses, device):
    """Of each response in turn: the sum over its steps of the exact KL(pi || ref) of the next token, and log pi(y) - log ref(y),
    k1 -> (S, 2), nats. Both estimate KL(pi || ref) if the responses are drawn from pi, at temperature 1 and top-p 1."""
    rows, places = response_rows(prompts, responses)
    predict = [(row, start + t - 1 if t else len(prompts[row]) - 1) for row, start, y in places for t in range(len(y))]
    batch = batch_tensors(rows, predict, device, targets=[token for *_, y in places for token in y])
    where = batch["ids"], batch["positions"], batch["segments"], batch["prompt"]
    hidden = [m.model(*where).flatten(0, 1)[batch["predict"]] for m in (policy, ref)]
    steps = []
    for a, b, y in zip(*(h.split(max(1, 2**25 // policy.config.vocab_size)) for h in (*hidden, batch["targets"]))):
        policy_logits, ref_logits = policy.logits(a), ref.logits(b)
        ratios = policy_logits.log_softmax(-1) - ref_logits.log_softmax(-1)
        steps.append(torch.stack([step_kl(policy_logits, ref_logits), ratios.gather(1, y[:, None])[:, 0]], dim=1))
    lengths = [len(y) for *_, y in places]
    return torch.stack([part.sum(0) for part in torch.cat(steps).double().split(lengths)])


# ------------------------------------------------------------------------------------------------------------ the flags
HERE = Path(__file__).resolve().parent
TOY = dict(model=f"{HERE}/toy/sft", ref=f"{HERE}/toy/sft", rm=f"{HERE}/toy/rm", data=f"{HERE}/toy/pairs_eval.jsonl.gz", n=256,
           max_new_tokens=64, max_length=160, max_prompt_length=96)
PAPER = dict(n=512, max_new_tokens=128, max_length=640, max_prompt_length=512)  # Appendix C and D
PRESETS = {"toy": TOY, "paper": PAPER}
# Hub datasets that a name stands for: id, train split, held-out split, and how a row becomes one with a prompt and a response.
RECIPES = {
    "tldr": ("trl-lib/tldr-preference", "train", "validation", lambda row: row),
    "hh": ("Anthropic/hh-rlhf", "train", "test", lambda row: row),  # implicit prompt
    "ultrafeedback": ("HuggingFaceH4/ultrafeedback_binarized", "train_prefs", "test_prefs",
                      lambda row: {key: row[key] for key in ("chosen", "rejected")}),  # the prompt is their first message
}


def parse_args(argv=None):
    parser = Parser(description="Sample, label and judge: what a policy says and whether it over-optimizes.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    flags = {}
    for name, what in (("sample", "completions of a policy"), ("label", "a reward model's preferences among completions"),
                       ("golden", "win rate, KL and reward of every checkpoint of runs"), ("plot", "figures 3 to 6 and Table 1"),
                       ("judge", "verdicts of a judge behind an API"), ("bench", "answers for AlpacaEval 2 or MT-Bench")):
        flags[name] = commands.add_parser(name, help=what, description=what, allow_abbrev=False)
    add = flags["sample"].add_argument
    add("--model", help="policy: model directory or Hub id; with --api: the name the server knows (preset)")
    api_flags(flags["sample"], required=False)
    add("--out", required=True, help="samples, .jsonl; run again with it to resume")
    add = flags["label"].add_argument
    add("--samples", required=True, help="what `sample` wrote")
    add("--out", required=True, help="pairs, .jsonl; run again with it to resume")
    add("--pairs", choices=["best_worst", "all", "random"], default="best_worst", help="which of k completions make pairs: those of"
        " the highest and lowest reward, every two, or two at random (default: %(default)s)")
    add("--noise", choices=["none", "bt"], default="none", help="none: the higher reward is chosen; bt: with probability"
        " sigmoid(difference), as people would (default: %(default)s)")
    add = flags["golden"].add_argument
    add("runs", nargs="+", metavar="RUN", help="--out of a trainer")
    add("--ref", help="reference policy, for the KL and as the checkpoint of step 0: directory or Hub id (preset)")
    add("--keep_samples", action="store_true", help="write what each checkpoint said, with rewards, to RUN/golden_samples/ (default: off)")
    add = flags["bench"].add_argument
    add("--suite", choices=["alpaca_eval", "mt_bench"], required=True, help="whose questions, and whose answer format")
    add("--questions", required=True, help="mt_bench: FastChat's question.jsonl; alpaca_eval: alpaca_eval.json")
    add("--model", required=True, help="policy: model directory or Hub id")
    add("--temperature", type=number(least=0), default=None, help="0: the likeliest token always (default: mt_bench's own by category; 0.7)")
    add("--top_p", type=number(above=0), default=1.0, help="mass of the likeliest tokens kept; 1: all (default: %(default)s)")
    add("--max_new_tokens", type=positive_int, default=1024, help="tokens of an answer at most (default: %(default)s)")
    add("--name", default=None, help="what the answers call the model (default: --model)")
    add("--template", choices=["chat", "hh"], default="chat", help="the tokenizer's chat template, or HH's plain dialogue (default:"
        " %(default)s)")
    add("--out", required=True, help="answers: .jsonl (mt_bench), .json (alpaca_eval); run again with it to resume")
    for name in ("label", "golden"):
        flags[name].add_argument("--rm", help="reward model: what train_rm.py wrote, or a Hub id (preset)")
        flags[name].add_argument("--max_length", type=positive_int, help="tokens of prompt + response that are scored (preset)")
    for name in ("sample", "golden"):
        add = flags[name].add_argument
        add("--data", help="prompts, and golden's reference responses: .jsonl[.gz], recipe or Hub id, its held-out part (preset)")
        add("--n", type=positive_int, help="prompts: the first n different ones (preset)")
        add("--k", type=positive_int, default=2, help="completions a prompt (default: %(default)s)")
        add("--temperature", type=number(least=0), default=0.7, help="0: the likeliest token always (default: %(default)s; golden's KL: 1)")
        add("--top_p", type=number(above=0), default=0.95, help="mass of the likeliest tokens kept; 1: all (default: %(default)s; golden's KL: 1)")
        add("--max_new_tokens", type=positive_int, help="tokens of a completion at most (preset)")
    for name in ("sample", "label", "golden", "bench"):
        add = flags[name].add_argument
        add("--preset", choices=list(PRESETS), help="set of defaults; a flag given wins (default: toy; paper if a model or data is given)")
        add("--max_prompt_length", type=positive_int, help="tokens of the prompt at most; of longer ones the end is kept (preset)")
        add("--seed", type=number(int, least=0, below=2**63), default=0, help="of everything drawn at random (default: %(default)s)")
        add("--batch_size", type=positive_int, default=64, help="completions per rank at a time; lower it when memory runs out"
            " (default: %(default)s)")
        add("--precision", choices=["bf16", "fp32", "fp64"], default="bf16" if torch.cuda.is_available() else "fp32",
            help="of weights and products; fp64: the same samples on any machine, slowly (default here: %(default)s)")
        add("--timeout", type=positive_int, default=1800, help="seconds after which a rank that hangs ends the run (default: %(default)s)")
    plot_flags(flags["plot"])
    judge_flags(flags["judge"])

    args = parser.parse_args(argv)
    if "preset" in vars(args):
        own = [flag for flag in ("model", "ref", "rm", "data") if getattr(args, flag, None)]
        args.preset = args.preset or ("paper" if own else "toy")
        for flag, value in PRESETS[args.preset].items():
            if flag in vars(args) and getattr(args, flag) is None:
                setattr(args, flag, value)
    for flag in ("model", "ref", "rm", "data"):
        if flag in vars(args) and not getattr(args, flag):
            parser.error(f"--{flag} is missing")
    if getattr(args, "top_p", 1) > 1:
        parser.error(f"--top_p {args.top_p}: must be at most 1")
    if "max_length" in vars(args) and args.max_prompt_length >= args.max_length:
        parser.error(f"--max_prompt_length {args.max_prompt_length} leaves no room in --max_length {args.max_length}")
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


# ------------------------------------------------------------------------------------------------------------ the data
# --- shared: demonstration (train_sft, evaluate) ---
def split_demonstration(row):
    """A data row -> prompt or None, completion: texts, or lists of messages. Raises SkipRow(kind). Takes {text}; {prompt,
    completion}; preference rows, of which the chosen response is the demonstration (HH's have the prompt inside); {messages}, of
    which the last is."""
    if "text" in row:
        prompt, completion = None, row["text"]
    elif "messages" in row and isinstance(row["messages"], list):
        prompt, completion = row["messages"][:-1], row["messages"][-1:]
    else:
        prompt, completion = row.get("prompt"), row.get("completion", row.get("chosen"))
        if isinstance(completion, list) and not isinstance(prompt, list):  # the prompt is in the conversation
            prompt, completion = completion[:-1], completion[-1:]
        marker = "\n\nAssistant:"
        if prompt is None and isinstance(completion, str) and marker in completion:
            cut = completion.rfind(marker) + len(marker)
            prompt, completion = completion[:cut], completion[cut:]
        if prompt is None:
            raise SkipRow("no prompt" if isinstance(completion, (str, list)) else "wrong types")
    if isinstance(prompt, list) and isinstance(completion, list):
        return prompt, completion
    if not isinstance(completion, str) or not isinstance(prompt, (str, type(None))):
        raise SkipRow("wrong types")
    if not completion.strip():
        raise SkipRow("empty completion")
    return prompt, completion
# --- end shared: demonstration ---


@dataclass
class Prompt:
    """A prompt to answer."""

    index: int  # its row in the data
    text: str  # with --api also a list of messages
    ids: array
    references: list  # the data's responses to it, texts


def load_prompts(args, tokenizer, vocab_size):
    """The first args.n different prompts of args.data -> prompts, report (str). tokenizer None: no ids, and conversations stay
    lists of messages. Rows of one prompt are one: their responses are all references. Raises UserError."""
    report, found = Report(args.data), {}
    for number, (where, row) in enumerate(read_rows(args.data, True, RECIPES)):
        with report.row(where):
            bare = isinstance(row.get("prompt"), (str, list)) and not {"chosen", "completion", "messages"} & row.keys()
            text, response = (row["prompt"], None) if bare else split_demonstration(row)
            if isinstance(text, list) and tokenizer is not None:
                text, response = (chat_prompt(tokenizer, text), None) if bare else render_chat(tokenizer, text, response)
            if isinstance(response, list):
                response = response[0].get("content") if isinstance(response[0], dict) else None
            if not text:
                raise SkipRow("empty prompt")
            json.dumps([text, response], ensure_ascii=False).encode()  # raises on broken Unicode
            key = json.dumps(text)
            if key not in found and len(found) == args.n:
                raise SkipRow("beyond --n")
            if key in found:
                report.cut("another response to a prompt")
            prompt = found.setdefault(key, Prompt(number, text, array("i"), []))
            if isinstance(response, str) and response not in prompt.references:
                prompt.references.append(response)
    prompts = list(found.values())
    if tokenizer is not None:
        for prompt, ids in zip(prompts, encode(tokenizer, [prompt.text for prompt in prompts], vocab_size)):
            prompt.ids = cut_prompt(ids, tokenizer, args.max_prompt_length, "keep_end", report)
    return prompts, report.finish(len(prompts), "prompts")


def chat_prompt(tokenizer, messages):
    """Messages as the text that the chat template gives, ready for the assistant's answer. Raises SkipRow, UserError."""
    if tokenizer.chat_template is None:
        raise UserError("the prompts are conversations, but the tokenizer has no chat template")
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except (TemplateError, TypeError, KeyError):
        raise SkipRow("refused by the chat template") from None


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


# ------------------------------------------------------------------------------------------- files that a second run extends
def resume_rows(out, about, free):
    """The rows that stand in the .jsonl file `out` -> (rows, whether it is complete). A line that a kill cut in two is dropped.

    Beside it, OUT.about.json says how it is made: a second run must be told the same (but for the flags `free`) and goes on;
    any other is a UserError that lists the differences."""
    sidecar = out.with_suffix(".about.json")
    if out.suffix != ".jsonl":
        raise UserError(f"--out {out}: the name must end in .jsonl")
    out.parent.mkdir(parents=True, exist_ok=True)
    if not sidecar.exists():
        if out.exists():
            raise UserError(f"{out} exists, and no {sidecar.name} says how it was made: choose another --out")
        write_json(sidecar, about)
        return [], False
    found = read_json(sidecar)
    then, now = ({k: v for k, v in (x["args"] | x["of"]).items() if k not in free} for x in (found, about))
    differ = [f"{k} was {then.get(k)!r}, is {now.get(k)!r}" for k in sorted({*then, *now}) if then.get(k) != now.get(k)]
    if differ:
        raise UserError(f"{out} was made otherwise: {'; '.join(differ)}. Choose another --out")
    text = out.read_text() if out.exists() else ""
    if not text.endswith("\n"):
        text = text[: text.rfind("\n") + 1]
        write_aside(out, lambda aside: aside.write_text(text))
    return [row for _, row in read_jsonl(out)], "summary" in found


def append_rows(out, rows):
    """Add JSON lines; on disk when it returns."""
    with open(out, "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())


def complete_rows(out, rows, about, summary):
    """All rows are there: put them in the data's order, and the summary beside them."""
    rows = sorted(rows, key=lambda row: row["index"])  # stable: the pairs of a prompt stay in order
    write_lines(out, rows)
    write_json(out.with_suffix(".about.json"), about | dict(summary=summary))


def write_lines(path, rows):
    write_aside(path, lambda aside: aside.write_text("".join(json.dumps(row) + "\n" for row in rows)))


def write_json(path, content):
    write_aside(path, lambda aside: aside.write_text(json.dumps(content, indent=2) + "\n"))


def load_model(name, make, precision, device):
    """A model directory or Hub id -> (model, tokenizer, directory). Weights are kept in the dtype of the products, but for a
    reward model's head, which is float32 as in training."""
    directory = find_model(name)
    model = build(lambda: make(read_config(directory)), device, precision, False, False, False)
    load_weights(model, directory)
    model.model.to(model.model.dtype)
    if getattr(model, "lm_head", None) is not None:
        model.lm_head.to(model.model.dtype)
    return model.eval(), load_tokenizer(directory), directory


def stop_ids(directory, tokenizer):
    """What ends a completion: the tokenizer's EOS and generation_config.json's."""
    path = directory / "generation_config.json"
    stops = json.loads(path.read_text()).get("eos_token_id") if path.exists() else None
    return sorted({tokenizer.eos_token_id, *(stops if isinstance(stops, list) else [stops])} - {None})


def completion_text(ids, stops, tokenizer):
    """-> the text without its stop token, and whether it came to one. Other special tokens stay to be seen."""
    ended = ids[-1] in stops
    return tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=False, clean_up_tokenization_spaces=False), ended


def scored_ids(tokenizer, texts, responses, vocab_size, max_length, max_prompt_length):
    """Prompt texts and the (text, ended) of their responses -> ids of prompts and responses, as train_rm.py makes them of a pair:
    cut alike, EOS after what came to its end. An empty response is EOS alone."""
    report = Report("")
    prompts = [cut_prompt(ids, tokenizer, max_prompt_length, "keep_end", report) for ids in encode(tokenizer, texts, vocab_size)]
    ids = iter(encode(tokenizer, [text for ys in responses for text, _ in ys], vocab_size))
    eos, cut = array("i", [tokenizer.eos_token_id]), []
    for prompt, ys in zip(prompts, responses):
        bodies = [next(ids) + (eos if ended or not text else array("i")) for text, ended in ys]
        cut.append([body[: max_length - len(prompt)] for body in bodies])
    return prompts, cut


# ----------------------------------------------------------------------------------------------------------- the commands
def sample(args):
    """Completions of a policy, a row a prompt."""
    rank, world, device = start(args.seed, args.timeout)
    say, out = tqdm.write if rank == 0 else lambda line: None, Path(args.out)
    if args.api:
        policy, tokenizer, model_of = None, None, dict(api=args.api)
        if world > 1:
            raise UserError("--api: one process is enough, run it without torchrun")
    else:
        policy, tokenizer, directory = load_model(args.model, CausalLM, args.precision, device)
        model_of, stops = dict(model_sha256=weights_sha256(directory)), stop_ids(directory, tokenizer)
    prompts, report = load_prompts(args, tokenizer, policy and policy.config.vocab_size)
    say(report)
    about = dict(args=vars(args), of=model_of | dict(prompts_sha256=text_sha256(prompts)))
    rows, complete = on_rank_0(lambda: resume_rows(out, about, {"out", "batch_size", "timeout", "concurrency", "request_timeout", "retries"}))
    if complete:
        say(f"{out} is complete: {len(rows)} prompts. Give another --out to sample again.")
        return
    done, began, before = {row["index"] for row in rows}, time.perf_counter(), len(rows)
    todo = [prompt for prompt in prompts if prompt.index not in done]
    if args.api:
        answers = api_completions([(p.index, p.text) for p in todo], args.k, args, set())
        by_index = {prompt.index: prompt for prompt in todo}
        new = ([sample_row(by_index[index], *answer)] for index, *answer in answers)
    else:
        settings = (args.k, args.max_new_tokens, args.temperature, args.top_p, args.seed, args.batch_size)
        rounds = completions(policy, [p.ids for p in todo], *settings, stops, rank, world, device, "sampling")
        new = ([sample_row(todo[i], *zip(*(completion_text(ids, stops, tokenizer) for ids in ys)), [len(ids) for ids in ys])
                for i, ys in one_round] for one_round in rounds)
    for fresh in new:
        if rank == 0:
            append_rows(out, fresh)
        rows += fresh
    seconds = time.perf_counter() - began
    lengths = [n for row in rows for n in row["n_tokens"] if n is not None]
    summary = dict(prompts=len(rows), completions=args.k * len(rows), ended=sum(sum(row["ended"]) for row in rows),
                   empty=sum(not text.strip() for row in rows for text in row["completions"]),
                   mean_tokens=sum(lengths) / len(lengths) if lengths else None,
                   completions_per_s=args.k * (len(rows) - before) / seconds)
    on_rank_0(lambda: complete_rows(out, rows, about, summary))
    say(f"{out}: {json.dumps(summary)}")


def sample_row(prompt, texts, ended, n_tokens):
    return dict(index=prompt.index, prompt=prompt.text, references=prompt.references, completions=list(texts), ended=list(ended),
                n_tokens=list(n_tokens))


def text_sha256(prompts):
    """Fingerprint of prompts and references as texts."""
    return hashlib.sha256(json.dumps([[p.index, p.text, p.references] for p in prompts]).encode()).hexdigest()


def label(args):
    """Preference pairs among sampled completions, as a reward model sees them. Rewards stand in OUT.scores.jsonl first."""
    rank, world, device = start(args.seed, args.timeout)
    say, out = tqdm.write if rank == 0 else lambda line: None, Path(args.out)
    scores_file = out.with_suffix(".scores.jsonl")
    reward_model, tokenizer, directory = load_model(args.rm, RewardModel, args.precision, device)
    samples = read_samples(args.samples)
    about = dict(args=vars(args), of=dict(rm_sha256=weights_sha256(directory), samples_sha256=sha256(args.samples)))
    scores, complete = on_rank_0(lambda: resume_rows(scores_file, about, {"out", "batch_size", "timeout"}))
    if complete:
        say(f"{out} is complete. Give another --out to label again.")
        return
    done = {row["index"] for row in scores}
    todo = [(index, row) for index, (_, row) in enumerate(samples) if index not in done]
    texts = [chat_prompt(tokenizer, p) if isinstance(p, list) else p for p in (row["prompt"] for _, row in todo)]
    responses = [list(zip(row["completions"], row["ended"])) for _, row in todo]
    limits = (read_config(directory).vocab_size, args.max_length, args.max_prompt_length)
    for k in range(0, len(todo), 1024):
        prompts, ids = scored_ids(tokenizer, texts[k : k + 1024], responses[k : k + 1024], *limits)
        found = in_batches(lambda p, ys: rewards(reward_model, p, ys, device), prompts, ids, args.batch_size, 1, rank, world, device,
                           f"scoring {k} of {len(todo)}")
        fresh = [dict(index=index, rewards=r[:, 0].tolist()) for (index, _), r in zip(todo[k : k + 1024], found)]
        if rank == 0:
            append_rows(scores_file, fresh)
        scores += fresh
    report, pairs = Report(args.samples), []
    for row in sorted(scores, key=lambda row: row["index"]):
        where, said = samples[row["index"]]
        with report.row(where):
            pairs += choose_pairs(said, row["rewards"], args, report)
    summary = report.finish(len(pairs), "pairs")
    on_rank_0(lambda: write_lines(out, pairs))
    on_rank_0(lambda: complete_rows(scores_file, scores, about, summary))
    say(f"{summary} -> {out}")


def read_samples(path):
    """What `sample` wrote -> [("file:line", row)]; `ended` and `references` may lack: all ended, none. Raises UserError."""
    samples, texts = list(read_jsonl(Path(path))), lambda value: isinstance(value, list) and all(isinstance(x, str) for x in value)
    for where, row in samples:
        completions = row.get("completions")
        if not (isinstance(row.get("prompt"), (str, list)) and texts(completions) and completions
                and texts(row.setdefault("references", [])) and len(row.setdefault("ended", [True] * len(completions))) == len(completions)):
            raise UserError(f"{where}: want prompt, completions and references (lists of texts) and ended, as `sample` writes them")
    if not samples:
        raise UserError(f"{path}: no samples")
    return samples


def choose_pairs(row, rewards, args, report):
    """The pairs that a prompt's completions make, with their rewards. A completion that is empty or did not come to its EOS makes
    none: in a pair's text it would look as if it had ended there. What is drawn is a function of (seed, prompt, completions)."""
    usable = []
    for j, (text, ended) in enumerate(zip(row["completions"], row["ended"])):
        if not ended or not text.strip():
            report.cut("completion that is empty" if ended else "completion without EOS")
        else:
            usable.append(j)
    if len(usable) < 2:
        raise SkipRow("fewer than two completions to use")

    def draw(*what):
        return random.Random(json.dumps([args.seed, row["prompt"], *what]))

    if args.pairs == "best_worst":
        chosen = [(max(usable, key=lambda j: rewards[j]), min(usable, key=lambda j: rewards[j]))]
    else:
        chosen = list(itertools.combinations(usable, 2))
        chosen = chosen if args.pairs == "all" else [draw("pair").choice(chosen)]
    pairs, left_out = [], []
    for a, b in chosen:
        if row["completions"][a] == row["completions"][b]:
            left_out.append("pair of equal completions")
        elif args.noise == "none" and rewards[a] == rewards[b]:
            left_out.append("pair of equal rewards")
        else:
            a_wins = rewards[a] > rewards[b]
            if args.noise == "bt":
                a_wins = draw(a, b).random() < 1 / (1 + math.exp(min(700, rewards[b] - rewards[a])))
            texts = [row["completions"][j] for j in ((a, b) if a_wins else (b, a))]
            if isinstance(row["prompt"], list):
                texts = [[dict(role="assistant", content=text)] for text in texts]
            high, low = (rewards[a], rewards[b]) if a_wins else (rewards[b], rewards[a])
            pairs.append(dict(prompt=row["prompt"], chosen=texts[0], rejected=texts[1], chosen_reward=high, rejected_reward=low))
    if not pairs:
        raise SkipRow(left_out[0])
    for kind in left_out:
        report.cut(kind)
    return pairs


def golden(args):
    """Is it over-optimized? A row a checkpoint in RUN/golden.jsonl; what stands there is not computed again."""
    rank, world, device = start(args.seed, args.timeout)
    say = tqdm.write if rank == 0 else lambda line: None
    reward_model, rm_tokenizer, rm_directory = load_model(args.rm, RewardModel, args.precision, device)
    ref, tokenizer, ref_directory = load_model(args.ref, CausalLM, args.precision, device)
    prompts, report = load_prompts(args, tokenizer, ref.config.vocab_size)
    say(report)
    if not all(prompt.references for prompt in prompts):
        raise UserError(f"{args.data}: prompts without a response to compare with: it takes rows with"
                        " `completion` or `chosen`")
    protocol = {k: getattr(args, k) for k in ("n", "k", "temperature", "top_p", "max_new_tokens", "max_length", "max_prompt_length", "seed",
                                              "precision")}
    of = dict(rm=weights_sha256(rm_directory), ref=weights_sha256(ref_directory), prompts=text_sha256(prompts))
    name = hashlib.sha256(json.dumps([protocol, of]).encode()).hexdigest()[:12]
    work = on_rank_0(lambda: golden_work(args.runs, ref_directory, name))
    say(f"{len(work)} checkpoints to evaluate, settings {name}")

    limits = (read_config(rm_directory).vocab_size, args.max_length, args.max_prompt_length)
    def score(responses, desc):  # [n][k] of (text, ended) -> n vectors of rewards
        ids = scored_ids(rm_tokenizer, [prompt.text for prompt in prompts], responses, *limits)
        scores = in_batches(lambda p, ys: rewards(reward_model, p, ys, device), *ids, args.batch_size, 1, rank, world, device, desc)
        return [vector[:, 0] for vector in scores]

    references = score([[(text, True) for text in prompt.references] for prompt in prompts], "references") if work else None
    known = {}  # the reference policy is step 0 of every run
    for run, path, weights, step, epoch in work:
        if weights not in known:
            policy = ref if step == 0 else load_model(str(path), CausalLM, args.precision, device)[0]
            if policy.config.vocab_size != ref.config.vocab_size:
                raise UserError(f"{path}: vocabulary of {policy.config.vocab_size}, the reference has {ref.config.vocab_size}")
            stops = stop_ids(ref_directory, tokenizer)
            measures, said = measure(policy, ref, tokenizer, score, references, prompts, stops, args, rank, world, device)
            if step == 0:
                known[weights] = measures, said
        else:
            measures, said = known[weights]
        checkpoint_name = "reference" if step == 0 else path.name
        row = dict(checkpoint=checkpoint_name, step=step, epoch=epoch, **measures, prompts=len(prompts), weights=weights,
                   settings=name, protocol=protocol, of=of)
        if rank == 0:
            if args.keep_samples:
                (run / "golden_samples").mkdir(exist_ok=True)
                write_lines(run / "golden_samples" / f"{checkpoint_name}.jsonl", said)
            append_rows(run / "golden.jsonl", [row])
        say(f"{run} {checkpoint_name}: win rate {100 * row['win_rate']:.1f} +- {100 * row['win_rate_se']:.1f} %, KL {row['kl']:.3f} +-"
            f" {row['kl_se']:.3f} nats (k1 {row['k1']:.3f} +- {row['k1_se']:.3f}), reward {row['reward']:+.3f} +- {row['reward_se']:.3f},"
            f" {row['length']:.1f} tokens, {100 * row['ended']:.0f} % ended")


def golden_work(runs, ref_directory, name):
    """-> [(run, checkpoint, fingerprint of its weights, step, epoch)] of what RUN/golden.jsonl does not hold under these settings."""
    work = []
    for run in map(Path, dict.fromkeys(runs)):
        try:
            header = json.loads((run / "metrics.jsonl").read_text().split("\n")[0])
            steps_per_epoch = math.ceil(header["pairs"] / header["args"]["batch_size"])
        except (OSError, ValueError, KeyError):
            raise UserError(f"{run}: not the --out of a preference run (no metrics.jsonl that says so)") from None
        found = {int(path.name[5:]): path for path in run.glob("step_*") if path.name[5:].isdecimal()}  # step_000500.bak is not ours
        if (run / "final").exists():
            found.setdefault(header["steps"], run / "final")
        done, rows = set(), run / "golden.jsonl"
        if rows.exists():
            text = rows.read_text()
            if not text.endswith("\n"):  # cut in two by a kill
                write_aside(rows, lambda aside: aside.write_text(text[: text.rfind("\n") + 1]))
            done = {(row["step"], row["weights"]) for _, row in read_jsonl(rows) if row.get("settings") == name}
        for step, path in sorted({0: ref_directory, **found}.items()):
            weights = sha256(path / "manifest.json") if (path / "manifest.json").exists() else weights_sha256(path)
            if (step, weights) not in done:
                work.append((run, path, weights, step, step / steps_per_epoch))
    return work


def measure(policy, ref, tokenizer, score, reference_rewards, prompts, stops, args, rank, world, device):
    """-> win rate, KL, k1, reward, length, each with its standard error, share of completions that ended; what was said, as rows."""
    ids = [prompt.ids for prompt in prompts]

    def draw(temperature, top_p, desc):
        rounds = completions(policy, ids, args.k, args.max_new_tokens, temperature, top_p, args.seed, args.batch_size, stops,
                             rank, world, device, desc)
        return [ys for _, ys in sorted(itertools.chain.from_iterable(rounds))]

    said = draw(args.temperature, args.top_p, "win rate: sampling")
    responses = [[completion_text(y, stops, tokenizer) for y in ys] for ys in said]
    reward = score(responses, "win rate: scoring")
    drawn = draw(1.0, 1.0, "KL: sampling")  # cut off at max_new_tokens: the KL of what is said until there
    kls = in_batches(lambda p, ys: divergences(policy, ref, p, ys, device), ids, drawn, args.batch_size, 2, rank, world, device, "KL")
    per_prompt = dict(win_rate=win_shares(reward, reference_rewards), kl=torch.stack([x[:, 0].mean() for x in kls]),
                      k1=torch.stack([x[:, 1].mean() for x in kls]), reward=torch.stack([x.mean() for x in reward]),
                      length=torch.tensor([sum(map(len, ys)) / len(ys) for ys in said]),
                      ended=torch.tensor([sum(ended for _, ended in ys) / len(ys) for ys in responses]))
    measures = {}
    for name, values in per_prompt.items():
        measures[name], measures[f"{name}_se"] = mean_and_error(values)
    root = math.sqrt(max(measures["kl"], 0.0))
    measures |= dict(sqrt_kl=root, sqrt_kl_se=measures["kl_se"] / (2 * root) if root else 0.0)  # to first order
    rows = [dict(index=p.index, prompt=p.text, references=p.references, reference_rewards=theirs.tolist(), rewards=ours.tolist(),
                 completions=[text for text, _ in ys], ended=[ended for _, ended in ys], n_tokens=list(map(len, tokens)))
            for p, theirs, ours, ys, tokens in zip(prompts, reference_rewards, reward, responses, said)]
    return measures, rows


# FastChat's sampling temperature of each category (fastchat/llm_judge/common.py, temperature_config); others 0.7.
MT_BENCH_TEMPERATURE = dict(writing=0.7, roleplay=0.7, extraction=0.0, math=0.0, coding=0.0, reasoning=0.0, stem=0.1, humanities=0.1)


def bench(args):
    """Answers to the questions of AlpacaEval 2 or MT-Bench, in their formats."""
    rank, world, device = start(args.seed, args.timeout)
    say, out = tqdm.write if rank == 0 else lambda line: None, Path(args.out)
    policy, tokenizer, directory = load_model(args.model, CausalLM, args.precision, device)
    stops, generator = stop_ids(directory, tokenizer), args.name or args.model
    questions = read_questions(args.suite, Path(args.questions))
    about = dict(args=vars(args), of=dict(model_sha256=weights_sha256(directory), questions_sha256=sha256(args.questions)))
    progress = out.with_suffix(".jsonl")  # alpaca_eval's own file is one JSON list: written at the end
    rows, complete = on_rank_0(lambda: resume_rows(progress, about, {"out", "batch_size", "timeout"}))
    done = {row["index"] for row in rows}
    todo = [question for question in questions if question["index"] not in done]
    groups = {}
    for question in todo:
        by_category = MT_BENCH_TEMPERATURE.get(question.get("category"), 0.7)
        groups.setdefault(by_category if args.temperature is None else args.temperature, []).append(question)

    def answer(conversations, temperature, desc):
        prompts = [dialogue_prompt(tokenizer, messages, args.template) for messages in conversations]
        report = Report(args.questions)
        ids = encode(tokenizer, prompts, policy.config.vocab_size)
        ids = [cut_prompt(prompt, tokenizer, args.max_prompt_length, "keep_end", report) for prompt in ids]
        settings = (1, args.max_new_tokens, temperature, args.top_p, args.seed, args.batch_size)
        found = itertools.chain.from_iterable(completions(policy, ids, *settings, stops, rank, world, device, desc))
        return [completion_text(ys[0], stops, tokenizer)[0].strip() for _, ys in sorted(found)]

    for temperature, group in sorted(groups.items()):
        for k in range(0, len(group), args.batch_size * world):
            part = group[k : k + args.batch_size * world]
            conversations = [[] for _ in part]
            for turn in range(len(part[0]["turns"])):
                for messages, question in zip(conversations, part):
                    messages.append(dict(role="user", content=question["turns"][turn]))
                desc = f"temperature {temperature}, {k} of {len(group)}, turn {turn + 1}"
                for messages, text in zip(conversations, answer(conversations, temperature, desc)):
                    messages.append(dict(role="assistant", content=text))
            fresh = [bench_row(args.suite, question, [m["content"] for m in messages[1::2]], generator)
                     for question, messages in zip(part, conversations)]
            if rank == 0:
                append_rows(progress, fresh)
            rows += fresh

    def finish():
        complete_rows(progress, rows, about, dict(questions=len(rows), empty=sum(not all(bench_texts(row)) for row in rows)))
        if args.suite == "alpaca_eval":
            rows.sort(key=lambda row: row["index"])
            write_json(out, [{k: v for k, v in row.items() if k != "index"} for row in rows])

    on_rank_0(finish)
    say(f"{out}: {len(rows)} answers, {sum(not all(bench_texts(row)) for row in rows)} with an empty turn")


def read_questions(suite, path):
    """Question files as the suites publish them -> rows with `turns` (texts) and `index`. Raises UserError."""
    if suite == "mt_bench":
        questions = [dict(row, index=row.get("question_id"), where=where) for where, row in read_jsonl(path)]
    else:
        try:
            rows = json.loads(path.read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path}: cannot be read as JSON: {error}") from None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise UserError(f"{path}: not a list of objects, as alpaca_eval.json is")
        questions = [dict(row, index=k, where=f"{path}[{k}]", turns=[row.get("instruction")]) for k, row in enumerate(rows)]
    for question in questions:
        turns = question.get("turns")
        if question["index"] is None or not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
            raise UserError(f"{question['where']}: not a question of {suite}")
    if not questions:
        raise UserError(f"{path}: no questions")
    return questions


def dialogue_prompt(tokenizer, messages, template):
    """Messages that end with the user's, as the prompt of the answer: by the chat template or in HH's form."""
    if template == "chat":
        return chat_prompt(tokenizer, messages)
    names = dict(user="Human", assistant="Assistant")
    return "".join(f"\n\n{names[m['role']]}: {m['content']}" for m in messages) + "\n\nAssistant:"


def bench_row(suite, question, texts, generator):
    """One answer in the suite's format: FastChat's model_answer line or an entry of AlpacaEval's model_outputs.json."""
    if suite == "mt_bench":
        digest = hashlib.sha256(json.dumps([generator, question["index"], texts]).encode()).hexdigest()
        return dict(question_id=question["index"], answer_id=digest[:22], model_id=generator, choices=[dict(index=0, turns=texts)],
                    tstamp=time.time(), index=question["index"])
    return dict(dataset=question.get("dataset", ""), instruction=question["turns"][0], output=texts[0], generator=generator,
                index=question["index"])


def bench_texts(row):
    return row["choices"][0]["turns"] if "choices" in row else [row["output"]]


# ------------------------------------------------------------------------------------- a language model as judge or sampler
PROMPTS = {
    # Table 2 of the paper, for dialogues.
    "hh": """For the following dialogue history to a chatbot, which response is more helpful?

Dialogue history:

{prompt}

Response A:

{a}

Response B:

{b}

FIRST provide a one-sentence comparison of the two responses and explain which you feel is more helpful. SECOND, on a new line, \
state only "A" or "B" to indicate which response is more helpful. Your response should use the format:

Comparison: <one-sentence comparison and explanation>

More helpful: <"A" or "B">""",
    # Rafailov et al. 2023, Appendix C.2, prompt (C), for summaries: the one of their main results.
    "tldr": """Which of the following summaries does a better job of summarizing the most important points in the given forum \
post, without including unimportant or irrelevant details? A good summary is both precise and concise.

Post:
{prompt}

Summary A:
{a}

Summary B:
{b}

FIRST provide a one-sentence comparison of the two summaries, explaining which you prefer and why. SECOND, on a new line, state \
only "A" or "B" to indicate your choice. Your response should use the format:
Comparison: <one-sentence comparison and explanation>
Preferred: <"A" or "B">""",
}
JUDGE_SAMPLING = dict(temperature=0, max_tokens=2048)  # FastChat's for MT-Bench
NEED_REFERENCE = ("math", "reasoning", "coding")  # MT-Bench's categories that are graded beside a reference answer
GIVE_UP = 20  # requests failed in a row, each after its retries: the server is down


def parse_choice(text):
    """A judge's answer -> "A", "B" or None. What counts is a line that holds the choice alone, after "More helpful:" or
    "Preferred:" or else after nothing; lines that disagree are no verdict."""
    lines = [re.findall(r"[^\W_]+", line) for line in text.splitlines()]
    for leads in (("more helpful", "preferred", "more helpful response", "preferred summary"), ("", "response", "summary")):
        found = {words[-1] for words in lines if words and words[-1] in ("A", "B") and " ".join(words[:-1]).lower() in leads}
        if found:
            return found.pop() if len(found) == 1 else None
    return None


def parse_rating(text):
    """A judge's answer -> the rating 1 to 10 as FastChat finds it, the first [[n]] or else the first [n], or None. FastChat
    would take any number; one outside the scale is no verdict here."""
    match = re.search(r"\[\[(\d+\.?\d*)\]\]", text) or re.search(r"\[(\d+\.?\d*)\]", text)
    rating = float(match[1]) if match else None
    return rating if match and 1 <= rating <= 10 else None


def wilson(successes, n, z=1.959963984540054):
    """Wilson's interval for a proportion, 95% by default -> (low, high): the p for which successes/n lies within z standard
    errors sqrt(p (1 - p) / n) of p. Needs n >= 1."""
    middle, spread = successes + z * z / 2, z * (successes * (n - successes) / n + z * z / 4) ** 0.5
    return (middle - spread) / (n + z * z), (middle + spread) / (n + z * z)


def clustered_error(clusters):
    """Standard error of the mean of all scores in `clusters` (a list of scores a prompt), which are independent between prompts
    only: sqrt(G/(G-1) sum_g (sum_i (s_gi - mean))^2) / n. None for fewer than two prompts."""
    n, groups = sum(map(len, clusters)), len(clusters)
    if groups < 2:
        return None
    mean = sum(map(sum, clusters)) / n
    return (groups / (groups - 1) * sum((sum(scores) - mean * len(scores)) ** 2 for scores in clusters)) ** 0.5 / n


def request_seed(seed, prompt, j):
    """A number in [0, 2^31), a pure function of the seed, the prompt (text or messages) and the completion's index j."""
    return int(hashlib.sha256(json.dumps([seed, prompt, j], sort_keys=True).encode()).hexdigest()[:8], 16) >> 1


# --------------------------------------------------------------------------------------------------------------- requests
def api_flags(parser, required):
    """What `judge` and `sample --api` share."""
    add = parser.add_argument
    add("--api", metavar="URL", required=required, help="OpenAI-compatible server, such as https://api.openai.com/v1 or"
        " http://localhost:8000/v1; the key comes from OPENAI_API_KEY")
    add("--concurrency", type=positive_int, default=8, help="requests under way at a time (default: %(default)s)")
    add("--request_timeout", type=positive_int, default=120, help="seconds that a request may take (default: %(default)s)")
    add("--retries", type=count, default=8, help="times that a request is repeated after 429, 5xx, a time-out or a lost"
        " connection; 0: never (default: %(default)s)")


def connect(args):
    """-> the openai client for --api. Repeating requests, Retry-After included, is its business. The key is read from the
    environment and goes nowhere else. Raises UserError if the package, a key that the server surely wants or the URL is amiss."""
    try:
        import openai
    except ImportError:
        raise UserError("asking a model through --api needs `pip install openai`") from None
    url = re.fullmatch(r"https?://([\w.-]+|\[[\da-fA-F:]+\])(:\d+)?(/[^@?#\s]*)?", args.api)
    if not url:  # not repeated here: it may hold a password
        raise UserError("--api: want http(s)://HOST[:PORT]/PATH, no credentials, no query, such as http://localhost:8000/v1")
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not key and url[1].endswith("openai.com"):
        raise UserError(f"{args.api} wants a key: set OPENAI_API_KEY in the environment")
    if not (key.isascii() and key.isprintable()):
        raise UserError("OPENAI_API_KEY holds characters that no key has: set it again")
    return openai.OpenAI(api_key=key or "no-key-is-set", base_url=args.api, timeout=args.request_timeout, max_retries=args.retries)


def attempt(client, create, what, **request):
    """One request -> (reply, None), or (None, why) if it failed after the client's retries. reply: text, finish_reason,
    tokens (of the answer; None if the server does not say) and model, the server's name for what answered. Raises UserError,
    which names `what`, if asking again cannot help. The key, which servers like to quote, is cut out of their words."""
    import openai

    said = lambda error: " ".join(str(error).replace(client.api_key, "[key]").split())[:300]
    try:
        reply = create(**request)
        choice = reply.choices[0]
        text = choice.message.content if "messages" in request else choice.text
        tokens = reply.usage.completion_tokens if reply.usage else None
        return dict(text=str(text or ""), finish_reason=choice.finish_reason, tokens=tokens, model=reply.model), None
    except openai.APIStatusError as error:
        if error.status_code < 500 and error.status_code not in (408, 409, 429):
            raise UserError(f"{client.base_url} refuses {what}: {said(error)}") from None
        return None, said(error)
    except openai.APIError as error:  # time-out, connection lost
        return None, said(error)
    except UnicodeEncodeError:
        raise UserError(f"{what}: half of a surrogate pair, which cannot be sent: mend or drop that row") from None
    except (json.JSONDecodeError, AttributeError, IndexError, TypeError) as error:  # a proxy's page, JSON cut short
        return None, f"not an OpenAI-compatible reply: {said(error)}"


def answered(ask, items, concurrency, failures):
    """Yield (item, reply) as replies arrive, where ask(item), in a thread, is an `attempt`; what failed is appended to `failures`
    as (item, why), and after GIVE_UP failures in a row so is all the rest, not asked. A request is sent only when the caller
    comes back from an earlier one, having written it down: never are more than `concurrency` replies paid for but not kept."""
    pool, items, in_a_row = concurrent.futures.ThreadPoolExecutor(concurrency), iter(items), 0
    running = {pool.submit(ask, item): item for item in itertools.islice(items, concurrency)}
    try:
        while running:
            for future in concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED).done:
                item = running.pop(future)
                reply, why = future.result()
                in_a_row = 0 if reply else in_a_row + 1
                if reply:
                    yield item, reply
                else:
                    failures.append((item, why))
                if in_a_row < GIVE_UP:
                    running |= {pool.submit(ask, item): item for item in itertools.islice(items, 1)}
        failures.extend((item, "not asked") for item in items)
    finally:  # Ctrl-C, or a request refused: do not wait for what is under way
        pool.shutdown(wait=False, cancel_futures=True)


def api_completions(prompts, k, args, done):
    """k completions of each prompt from a server. prompts: a list of (key, prompt), where a prompt is a text (continued as it
    is) or a list of {role, content} (answered through the server's chat template); keys in `done` are left out. Yields (key,
    completions, ended, n_tokens), lists of k texts, bools (false: cut at args.max_new_tokens) and token counts (None where the
    server does not say), as prompts are completed. Every completion is a request with its own seed. Raises UserError at once
    for a request that is refused, and at the end if some failed: their prompts were not yielded."""
    client = connect(args)
    wanted = [(key, prompt, j) for key, prompt in prompts if key not in done for j in range(k)]
    replies, failures = {}, []

    def ask(item):
        key, prompt, j = item
        what = f"{args.model} at prompt {str(key)[:100]!r}"
        how = dict(model=args.model, temperature=args.temperature, top_p=args.top_p, max_tokens=args.max_new_tokens)
        how["seed"] = request_seed(args.seed, prompt, j)
        if isinstance(prompt, str):
            return attempt(client, client.completions.create, what, prompt=prompt, **how)
        return attempt(client, client.chat.completions.create, what, messages=prompt, **how)

    for (key, _, j), reply in answered(ask, wanted, args.concurrency, failures):
        replies.setdefault(key, {})[j] = reply
        if len(replies[key]) == k:
            whole = [reply for _, reply in sorted(replies.pop(key).items())]
            yield (key, [reply["text"] for reply in whole], [reply["finish_reason"] == "stop" for reply in whole],
                   [reply["tokens"] for reply in whole])
    if failures:
        raise UserError(failed(failures, len(wanted)))


def failed(failures, n):
    """What is said of requests that failed after their retries."""
    unasked = sum(why == "not asked" for _, why in failures)
    rest = f"; {unasked} were not asked after {GIVE_UP} failures in a row" if unasked else ""
    first = f"{len(failures) - unasked} of {n} requests failed, the first: {failures[0][1]}"
    return f"{first}{rest}; the same command asks those that are missing"


# -------------------------------------------------------------------------------------------------------------- the judge
def judge_flags(parser):
    add = parser.add_argument
    add("--judge", required=True, metavar="MODEL", help="the server's name of the judge, such as gpt-4o-mini")
    add("--out", required=True, help="verdicts, one JSON line each: the ledger. Run again with it to ask only what is missing;"
        " delete a line to ask that again. The result goes beside it, to *.summary.json")
    add("--samples", help="compare these completions (a file that `sample` wrote) ...")
    add("--against", help="... with those of the same prompt and index in this file (default: with the first reference)")
    add("--prompt", choices=list(PROMPTS), default="hh", help="hh: the paper's Table 2, for dialogues; tldr: Rafailov et al."
        " 2023, C.2, for summaries (default: %(default)s)")
    add("--seed", type=number(int, least=0, below=2**63), default=0, help="seed of who is A and who is B (default: %(default)s)")
    add("--suite", choices=["mt_bench"], help="grade answers instead of comparing samples; needs the next four files")
    add("--answers", help="mt_bench: the answers, as FastChat and `bench` write them")
    add("--questions", help="mt_bench: FastChat's question.jsonl")
    add("--judge_prompts", help="mt_bench: FastChat's judge_prompts.jsonl")
    add("--reference_answers", help="mt_bench: FastChat's reference_answer/gpt-4.jsonl")
    api_flags(parser, required=True)


def comparison_tasks(args):
    """-> the requests that compare samples, and counts of what has nothing to be compared with. A task holds `messages` and
    `about`: what it asks about, with the letter that stands for our completion. Texts lose the blanks around them, which would
    tell the writers apart; an empty completion is judged like any other."""
    tasks, lacking, others = [], dict(prompts_without_opponent=0, completions_without_opponent=0), {}
    for _, row in read_samples(args.against) if args.against else []:
        others.setdefault(json.dumps(row["prompt"]), row["completions"])
    for where, row in read_samples(args.samples):
        if not isinstance(row["prompt"], str):
            raise UserError(f"{where}: the judge's prompts take texts, this prompt is a list of messages")
        prompt, completions = row["prompt"], row["completions"]
        opponents = others.get(json.dumps(prompt), []) if args.against else row["references"][:1] * len(completions)
        lacking["prompts_without_opponent"] += not opponents
        lacking["completions_without_opponent"] += max(0, len(completions) - len(opponents))
        for j, (ours, theirs) in enumerate(zip(completions, opponents)):
            letter = "AB"[request_seed(args.seed, prompt, j) % 2]
            a, b = (ours, theirs) if letter == "A" else (theirs, ours)
            content = PROMPTS[args.prompt].format(prompt=prompt.strip(), a=a.strip(), b=b.strip())
            about = dict(prompt=prompt, j=j, completion_is=letter)
            tasks.append(dict(messages=[dict(role="user", content=content)], about=about))
    return tasks, lacking


def read_turns(path):
    """FastChat's answers -> {question_id: texts, one a turn}."""
    found = {}
    for where, row in read_jsonl(Path(path)):
        try:
            name, turns = row["question_id"], row["choices"][0]["turns"]
        except (KeyError, IndexError, TypeError):
            raise UserError(f"{where}: want FastChat's {{question_id, choices: [{{turns: [text, ...]}}]}}") from None
        if name in found:
            raise UserError(f"{where}: question {name} is answered twice: leave one model's answers in the file")
        found[name] = turns
    return found


def mt_bench_tasks(args):
    """-> the requests that grade MT-Bench answers one by one, turn 1 and turn 2, in FastChat's words, and the count of
    questions without an answer. Like comparison_tasks."""
    answers, references = read_turns(args.answers), read_turns(args.reference_answers)
    templates = {row.get("name"): row for _, row in read_jsonl(Path(args.judge_prompts))}
    tasks, lacking = [], dict(questions_without_answer=0)
    for where, row in read_jsonl(Path(args.questions)):
        try:
            name, category, questions = row["question_id"], row["category"], row["turns"]
            if name not in answers:
                lacking["questions_without_answer"] += 1
                continue
            texts = dict(question=questions[0], answer=answers[name][0])
            for field, turns in (("question", questions), ("answer", answers[name]), ("ref_answer", references.get(name, []))):
                texts |= {f"{field}_{turn}": text for turn, text in enumerate(turns, 1)}
            kind = "single-math-v1" if category in NEED_REFERENCE else "single-v1"
            for turn, template in enumerate((kind, f"{kind}-multi-turn")[: len(questions)], 1):
                content = templates[template]["prompt_template"].format(**texts)
                system = dict(role="system", content=templates[template]["system_prompt"])
                about = dict(question_id=name, category=category, turn=turn)
                tasks.append(dict(messages=[system, dict(role="user", content=content)], about=about))
        except (KeyError, IndexError) as error:
            raise UserError(f"{where}: question, answer, reference answer or judge prompts lack {error}") from None
    return tasks, lacking


def open_ledger(path):
    """-> {key: verdict line}, and the file to append to. The end of a line that a kill cut short is dropped."""
    if path.suffix == ".gz":
        raise UserError(f"--out {path}: verdicts are not compressed: name it .jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("ab+")
    file.seek(0)
    held, begins = file.read(), b'{"key": "'
    if not begins.startswith(held[: len(begins)]):  # before anything is cut off
        raise UserError(f"{path}:1: not a verdict: give --out a file of its own")
    file.truncate(held.rfind(b"\n") + 1)
    settle(path.parent)
    ledger = {}
    for where, row in read_jsonl(path):
        if not {"key", "verdict", "text"} <= row.keys():
            raise UserError(f"{where}: not a verdict: mend or delete that line")
        ledger[row["key"]] = row
    return ledger, file


def judge(args):
    """Ask for every verdict that the ledger lacks, then score. A verdict's key is the hash of its request and of what it is
    about, so a ledger serves any number of runs, and other flags ask anew. Raises UserError at the end if requests failed."""
    compare, grade = ["samples"], ["answers", "questions", "judge_prompts", "reference_answers"]
    for name in [*compare, "against", *grade]:
        wanted, given = name in (grade if args.suite else compare), bool(getattr(args, name))
        if wanted and not given:
            raise UserError(f"--{name} is missing" + (f": --suite {args.suite} needs it" if args.suite else ""))
        if given and not wanted and (args.suite or name != "against"):
            raise UserError(f"--{name} has no meaning {'with' if args.suite else 'without'} --suite")
    tasks, lacking = (mt_bench_tasks if args.suite else comparison_tasks)(args)
    if not tasks:
        raise UserError(f"{args.answers or args.samples}: nothing to judge: {lacking}")
    for task in tasks:
        identity = dict(model=args.judge, messages=task["messages"], about=task["about"], **JUDGE_SAMPLING)
        task["key"] = hashlib.sha256(json.dumps(identity, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    out, failures = Path(args.out), []
    ledger, file = open_ledger(out)
    pending = {task["key"]: task for task in tasks if task["key"] not in ledger}
    print(f"{out}: {len(tasks)} verdicts wanted, {len(pending)} of them still to be asked of {args.judge}", flush=True)

    if pending:
        client, parse = connect(args), parse_rating if args.suite else parse_choice
        request = dict(model=args.judge, **JUDGE_SAMPLING)
        what = lambda task: f"{args.judge} about {str(task['about'])[:100]}"
        ask = lambda task: attempt(client, client.chat.completions.create, what(task), messages=task["messages"], **request)
        with tqdm(total=len(pending), unit="verdict", disable=None) as bar:
            for task, reply in answered(ask, pending.values(), args.concurrency, failures):
                row = dict(key=task["key"], judge=args.judge, **task["about"], verdict=parse(reply["text"]), **reply)
                file.write(json.dumps(row).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
                ledger[task["key"]] = row
                bar.update()
    file.close()

    verdicts = [(task["about"], ledger[task["key"]]) for task in tasks if task["key"] in ledger]
    scored = [(about, row["verdict"]) for about, row in verdicts if row["verdict"] is not None]
    malformed = {row["key"]: " ".join(row["text"].split())[:80] for _, row in verdicts if row["verdict"] is None}
    counts = dict(verdicts_wanted=len(tasks), scored=len(scored), malformed=len(verdicts) - len(scored),
                  missing=len(tasks) - len(verdicts)) | lacking
    result, lines = {}, ["no verdict could be scored"]
    if scored:
        result, lines = grade_result(scored) if args.suite else comparison_result(scored)
    asked = dict(judge=args.judge, answers=args.answers) if args.suite else dict(
        judge=args.judge, samples=args.samples, against=args.against or "first reference", prompt=args.prompt, seed=args.seed)
    summary = asked | counts | result | dict(malformed_verdicts=malformed)
    path = out.with_suffix(".summary.json")
    write_aside(path, lambda aside: aside.write_text(json.dumps(summary, indent=2)))
    for key, words in list(malformed.items())[:10]:
        print(f"malformed: {key[:12]} {words!r}")
    print(", ".join(f"{name.replace('_', ' ')} {count}" for name, count in counts.items()))
    print(*lines, f"-> {path}", sep="\n", flush=True)
    if failures:
        raise UserError(failed(failures, len(pending)))


def comparison_result(scored):
    """Scored comparisons [(about, "A" or "B")] -> the summary's figures, and the lines for the screen."""
    wins, clusters = [float(choice == about["completion_is"]) for about, choice in scored], {}
    for (about, _), win in zip(scored, wins):
        clusters.setdefault(about["prompt"], []).append(win)
    n, said_a = len(scored), sum(choice == "A" for _, choice in scored)
    (low, high), (low_a, high_a), error = wilson(sum(wins), n), wilson(said_a, n), clustered_error(list(clusters.values()))
    result = dict(prompts=len(clusters), win_rate=sum(wins) / n, win_rate_wilson95=[low, high], win_rate_se_by_prompt=error,
                  share_a=said_a / n, share_a_wilson95=[low_a, high_a])
    by_prompt = "none from one prompt" if error is None else f"{error:.4f}"
    return result, [f"win rate {sum(wins) / n:.4f}, 95% {low:.4f} to {high:.4f} (Wilson); s.e. clustered by prompt {by_prompt}",
                    f"position: the judge said A in {said_a / n:.4f}, 95% {low_a:.4f} to {high_a:.4f}; without bias 0.5"]


def grade_result(scored):
    """Scored MT-Bench grades [(about, 1 to 10)] -> the mean grades for the summary, and a table of them for the screen. A mean
    is over the verdicts that it covers, as FastChat's: a category's and the overall one pool both turns."""
    def means(category=None):
        rows = [(about["turn"], rating) for about, rating in scored if category in (None, about["category"])]
        columns = dict(turn_1=[r for t, r in rows if t == 1], turn_2=[r for t, r in rows if t == 2], both=[r for _, r in rows])
        return {name: sum(ratings) / len(ratings) if ratings else None for name, ratings in columns.items()}

    by_category = {category: means(category) for category in dict.fromkeys(about["category"] for about, _ in scored)}
    cell = lambda value: "      -" if value is None else f"{value:7.2f}"
    table = [f"{name:<12}" + "".join(map(cell, row.values())) for name, row in {**by_category, "all": means()}.items()]
    return dict(by_category=by_category, overall=means()), ["category     turn 1 turn 2   both", *table]


# ------------------------------------------------------------------------------ plot: figures 3 to 6 and Table 1 from JSON lines
# A figure is first a list of rows, which are written beside it; the picture is drawn from the rows alone. Units: win rates in %,
# their differences in points, sqrt KL in sqrt nats, log-ratios and log_eps in nats, lengths in tokens. `x_se` stands for the
# standard error of the mean x over seeds, sd / sqrt(n); None for one seed.
# A loss looks the same in every figure and is told apart without colour; the importance-sampled ones have full markers.
LOSS_LOOKS = {
    "is_dpo": dict(color="black", linestyle="-", marker="o"),
    "dpo": dict(color="#0060a0", linestyle="--", marker="s", fillstyle="none"),
    "is_ipo": dict(color="#606060", linestyle=(0, (8, 2)), marker="P"),
    "ipo": dict(color="#b04000", linestyle="-.", marker="D", fillstyle="none"),
    "rpo": dict(color="#3a7d34", linestyle=":", marker="v", fillstyle="none"),
    "chi_po": dict(color="#7a3b8f", linestyle=(0, (5, 1, 1, 1, 1, 1)), marker="^", fillstyle="none"),
    "length_dpo": dict(color="#907000", linestyle=(0, (1, 3)), marker="x"),
}
WIN_RATE, SQRT_KL = "win rate (%)", r"$\sqrt{\mathrm{KL}(\pi\,\|\,\mathrm{ref})}$ ($\sqrt{\mathrm{nats}}$)"
GOLDEN_NUMBERS = ("step", "epoch", "win_rate", "sqrt_kl", "reward", "length")
# What all runs of a plot must share, and what seeds of one setting must share too. Not paths, which differ between machines: the
# data's fingerprint and golden's settings stand for them.
COMMON = ("protocol", "epochs", "max_steps", "batch_size", "warmup_steps", "weight_decay", "adam_eps",
          "grad_clip", "max_length", "max_prompt_length", "truncation")
SAME_SEED = ("golden settings", "data fingerprint")  # another seed may have its own data, reference and reward model
LOSS_OWN_FLAGS = ("label_smoothing", "length_average", "eta", "alpha", "r_max")


def plot_flags(parser):
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="run directories of train_pref.py, on the same data, that `golden` has evaluated")
    add("--out", default="figs", help="directory for the figures, their rows and the table (default: %(default)s)")
    add("--log_eps", type=number(least=0, infinite=True), default=1.0, help="is_*: runs with this one are in figures 3, 4, 6 and the paired differences,"
        " nats; inf: no cap (default: %(default)s)")


def whole_lines(path):
    """[("file:line", object)] of a JSON-lines file. A last line that a kill cut in two is left out."""
    rows = []
    try:
        for row in read_jsonl(path):
            rows.append(row)
    except UserError as error:
        unended = path.read_bytes().count(b"\n") + 1  # the line after the last newline
        if not str(error).startswith(f"{path}:{unended}: not JSON"):
            raise
    return rows


def read_run(directory):
    """-> a run as a dict: name, setting (beta, lr, loss, log_eps: None where the loss has none, "inf" for no cap: JSON has no
    infinity), seed, args, pairs (an epoch's), steps (lines of metrics.jsonl), points (of golden.jsonl, from step 0 on), order."""
    metrics, golden = directory / "metrics.jsonl", directory / "golden.jsonl"
    remedy = f"python evaluate.py golden --rm REWARD_MODEL --ref REFERENCE --data PROMPTS {directory}"
    if not metrics.is_file():
        raise UserError(f"{directory}: no metrics.jsonl in it: give run directories of train_pref.py")
    if not golden.is_file():
        raise UserError(f"{golden}: no such file: first run {remedy}")

    header, *steps = [row for _, row in whole_lines(metrics)] or [{}]
    args = header.get("args", {})
    if args.get("loss") not in LOSS_LOOKS or not {"beta", "lr", "seed", "batch_size"} <= args.keys():
        raise UserError(f"{metrics}:1: not the header of a run of train_pref.py: give its run directories")
    log_eps = args.get("log_eps") if args["loss"].startswith("is_") else None
    setting = dict(beta=args["beta"], lr=args["lr"], loss=args["loss"], log_eps="inf" if log_eps == math.inf else log_eps)

    lines, points = whole_lines(golden), {}
    settings = lines[-1][1].get("settings") if lines else None
    for where, row in lines:
        if row.get("settings") == settings:
            bad = [k for k in GOLDEN_NUMBERS if not isinstance(row.get(k), (int, float)) or not math.isfinite(row[k])]
            if bad:
                raise UserError(f"{where}: no number for {', '.join(bad)}: delete {golden} and run {remedy}")
            points[row["step"]] = row  # evaluated twice: the later line holds
    if 0 not in points:
        raise UserError(f"{golden}: no line of step 0, the reference: {remedy} goes on where it stopped")
    others = sorted({str(row.get("settings")) for _, row in lines} - {str(settings)})
    if others:
        print(f"{golden}: read are the lines of its last settings, {settings}; left out are those of {', '.join(others)}")
    if max(points) < header.get("steps", 0):
        print(f"{directory}: evaluated up to step {max(points)} of {header['steps']}: that one stands for the final policy")
    return dict(name=str(directory), setting=setting, seed=args["seed"], pairs=header.get("pairs") or args["batch_size"],
                steps=steps, args=args | {"golden settings": settings, "protocol": lines[-1][1].get("protocol"), "data fingerprint": header.get("data")},
                order=(args["beta"], args["lr"], list(LOSS_LOOKS).index(args["loss"]), log_eps or 0, args["seed"]),
                points=[points[step] for step in sorted(points)])


def check_comparable(runs):
    """Raise UserError where runs were trained or evaluated in ways that do not belong in one figure, or where one comes twice."""
    for k, run in enumerate(runs):
        for other in runs[:k]:
            same_setting, names = other["setting"] == run["setting"], f"{other['name']} and {run['name']}"
            if same_setting and other["seed"] == run["seed"]:
                raise UserError(f"{names} are the same setting and seed: give one of them")
            pairs = {key: (other["args"].get(key), run["args"].get(key)) for key in
                     COMMON + LOSS_OWN_FLAGS * same_setting + SAME_SEED * (other["seed"] == run["seed"])}
            differ = "; ".join(f"{key} {then!r} and {now!r}" for key, (then, now) in pairs.items() if then != now)
            if differ:
                raise UserError(f"{names} are not comparable, {differ}: plot them apart, or run evaluate.py golden on both alike")


def by_setting(runs):
    """[(setting, its runs, one a seed)]"""
    groups = {}
    for run in runs:
        groups.setdefault(tuple(run["setting"].values()), []).append(run)
    return [(group[0]["setting"], group) for group in groups.values()]


def mean_se(name, values):
    """{name: mean, name_se: standard error of the mean, sd (n - 1) / sqrt(n)}; None for what no or one value cannot give."""
    n = len(values)
    return {name: float(np.mean(values)) if n else None, f"{name}_se": float(np.std(values, ddof=1) / n**0.5) if n > 1 else None}


# ------------------------------------------------------------------------------------------------- figure 3: the fitted curve
def curve_terms(d, form):
    """The columns (N, 2) that a and b multiply in WR(d) - WR_sft at d = sqrt KL (N,): d (a - b log d) for form "log" (Gao et al.
    2022, Rafailov et al. 2024), whose limit at d = 0 is 0; d (a - b d) for "quadratic"."""
    d = np.asarray(d, dtype=float)
    return np.stack([d, -d * (np.log(np.where(d > 0, d, 1.0)) if form == "log" else d)], -1)


def fit_curve(d, win_rates, start, form):
    """(a, b) by least squares, WR_sft = `start` held fixed; None where d > 0 at fewer than 3 points or at a single distance."""
    d, win_rates = np.asarray(d, dtype=float), np.asarray(win_rates, dtype=float)
    terms = curve_terms(d[d > 0], form)
    if len(terms) < 3 or np.linalg.matrix_rank(terms) < 2:
        return None
    return np.linalg.lstsq(terms, win_rates[d > 0] - start, rcond=None)[0]


def curve_peak(a, b, start, form):
    """(d*, WR*) where the derivative is 0: (exp(a/b - 1), WR_sft + b d*), quadratic: (a / 2b, WR_sft + b d*^2). None where the
    curve has no maximum at d > 0, or the log form's is beyond what a float holds."""
    if b <= 0 or (a / b > 700 if form == "log" else a <= 0):
        return None
    d = math.exp(a / b - 1) if form == "log" else a / (2 * b)
    return d, start + b * (d if form == "log" else d * d)


def bootstrap_band(seeds, start, grid, draws=1000):
    """2.5 and 97.5 percentiles (2, G), at the distances `grid` (G,), of the log form fitted to seeds drawn with replacement. A
    seed is an array (checkpoints, 2) of d and win rate and stays whole; WR_sft is fixed. None for a single seed; rough for three,
    of which there are but ten different draws."""
    if len(seeds) < 2:
        return None
    picks = np.sort(np.random.default_rng(0).integers(len(seeds), size=(draws, len(seeds))), axis=1)
    curves = []
    for picked, times in zip(*np.unique(picks, axis=0, return_counts=True)):
        fitted = fit_curve(*np.concatenate([seeds[k] for k in picked]).T, start, "log")
        if fitted is not None:  # few checkpoints of one seed, drawn again and again, may not do
            curves += [start + curve_terms(grid, "log") @ fitted] * int(times)
    return np.percentile(curves, [2.5, 97.5], axis=0)


def figure_3_rows(runs):
    """Rows of kind "point", a checkpoint of a seed, and of kind "fit", one a form: a (points a sqrt nat), b, root mean square
    residual (points), peak (None: there is none), whether it is inside the data; the log form's curve and band as drawn."""
    rows = []
    for setting, group in by_setting(runs):
        seeds = [np.array([(point["sqrt_kl"], 100 * point["win_rate"]) for point in run["points"]]) for run in group]
        for run, values in zip(group, seeds):
            rows += [dict(kind="point", **setting, seed=run["seed"], step=point["step"], sqrt_kl=d, win_rate=win_rate)
                     for point, (d, win_rate) in zip(run["points"], values.tolist())]
        start = float(np.mean([values[0, 1] for values in seeds]))
        seeds = [values[1:] for values in seeds]  # without the reference, where the curve is WR_sft whatever a and b
        d, win_rates = np.concatenate(seeds).T
        d, win_rates = d[d > 0], win_rates[d > 0]
        for form in ("log", "quadratic"):
            rows.append(dict(kind="fit", **setting, form=form, seeds=len(group), points=len(d), start=start, a=None, b=None))
            row, fitted = rows[-1], fit_curve(d, win_rates, start, form)
            if fitted is None:
                continue
            row["a"], row["b"] = fitted.tolist()
            row["residual"] = float(np.sqrt(np.mean((win_rates - start - curve_terms(d, form) @ fitted) ** 2)))
            row["peak_sqrt_kl"], row["peak_win_rate"] = curve_peak(row["a"], row["b"], start, form) or (None, None)
            row["low"], row["high"] = float(d.min()), float(d.max())
            row["inside"] = row["peak_sqrt_kl"] is not None and row["low"] <= row["peak_sqrt_kl"] <= row["high"]
            if form == "log":
                grid = np.linspace(0, row["high"], 61)
                band = bootstrap_band(seeds, start, grid)
                row["sqrt_kl"], row["win_rate"] = grid.tolist(), (start + curve_terms(grid, form) @ fitted).tolist()
                row["band"] = None if band is None else band.tolist()
    return rows


def fit_line(row):
    """What the screen says of a row of kind "fit"."""
    line = f"figure 3: {row['loss']}, beta {row['beta']:g}, lr {row['lr']:g}, {row['form']} form, {row['points']} points: "
    if row["a"] is None:
        return line + "no fit, which takes 3 checkpoints, at two distances at least, with sqrt KL above 0"
    line += f"a {row['a']:.4g}, b {row['b']:.4g}, residual {row['residual']:.2f} points; "
    if row["peak_sqrt_kl"] is None:
        return line + "it has no peak"
    where = f"{'inside' if row['inside'] else 'OUTSIDE'} the data ({row['low']:.3g} to {row['high']:.3g})"
    return line + f"peak {row['peak_win_rate']:.4g}% at {row['peak_sqrt_kl']:.3g}, {where}"


# ------------------------------------------------------------------------------------------------- figures 4 to 6 and Table 1
def figure_4_rows(runs):
    """A row a setting and evaluated step: win rate and sqrt KL, means over the n seeds that have it."""
    rows = []
    for setting, group in by_setting(runs):
        for step in sorted({point["step"] for run in group for point in run["points"]}):
            points = [point for run in group for point in run["points"] if point["step"] == step]
            rows.append(dict(**setting, step=step, epoch=points[0]["epoch"], n=len(points))
                        | mean_se("win_rate", [100 * point["win_rate"] for point in points])
                        | mean_se("sqrt_kl", [point["sqrt_kl"] for point in points]))
    return rows


def figure_6_rows(runs, bin_steps):
    """A row a setting and `bin_steps` steps: mean log pi/ref (nats) of chosen and of rejected responses, and mean weight (capped;
    1 where the loss has none), over a seed's steps, then over the n seeds. The paper plots a mean ratio, which is not logged, as
    a few pairs would decide it; the exp of a mean log-ratio is the geometric mean and lies below it."""
    rows = []
    for setting, group in by_setting(runs):
        for k in range(math.ceil(max((len(run["steps"]) for run in group), default=0) / bin_steps)):
            parts = [part for run in group if (part := run["steps"][k * bin_steps : (k + 1) * bin_steps])]
            row = dict(**setting, first_step=k * bin_steps + 1, bin_steps=bin_steps, n=len(parts),
                       epoch=float(np.mean([line["epoch"] for part in parts for line in part])))
            for name in ("ratio/chosen", "ratio/rejected", "weights/mean"):
                finite = [[line[name] for line in part if line[name] is not None] for part in parts]  # null: was not finite
                row |= mean_se(name, [np.mean(values) for values in finite if values])
            rows.append(row)
    return rows


def run_numbers(run):
    """What Table 1 says of one run: win rates (%) and sqrt KL of the final policy and of the peak, the best of the checkpoints
    and the reference; the drop between (points); the final reward and length (tokens); the effective sample size of the weights
    as a share of the step's pairs, averaged over the last tenth of the steps."""
    peak, final, size = max(run["points"], key=lambda point: point["win_rate"]), run["points"][-1], run["args"]["batch_size"]
    shares = []
    for line in run["steps"][-max(1, len(run["steps"]) // 10):]:
        done = (line["step"] - 1) % math.ceil(run["pairs"] / size) * size  # pairs of this epoch; its last step may be short
        if line["weights/ess"] is not None:
            shares.append(line["weights/ess"] / min(size, run["pairs"] - done))
    return dict(peak_win_rate=100 * peak["win_rate"], peak_sqrt_kl=peak["sqrt_kl"],
                final_win_rate=100 * final["win_rate"], final_sqrt_kl=final["sqrt_kl"],
                drop=100 * (peak["win_rate"] - final["win_rate"]), ess_share=float(np.mean(shares)) if shares else None,
                reward=final["reward"], length=final["length"])


def table_rows(runs):
    """A row a setting: run_numbers, means over its n seeds."""
    rows = []
    for setting, group in by_setting(runs):
        numbers = [run_numbers(run) for run in group]
        rows.append(dict(kind="setting", **setting, n=len(group), seeds=[run["seed"] for run in group]))
        for name in numbers[0]:
            rows[-1] |= mean_se(name, [of_run[name] for of_run in numbers if of_run[name] is not None])
    return rows


def paired_rows(runs):
    """A row a beta, lr and loss: is_dpo minus that loss, the difference (points) of two runs of one seed, mean over the n seeds
    that have both."""
    rows = []
    for setting, group in by_setting(runs):
        for other, others in by_setting(runs):
            pairs = [(run_numbers(a), run_numbers(b)) for a in group for b in others if a["seed"] == b["seed"]]
            same_panel = (setting["beta"], setting["lr"]) == (other["beta"], other["lr"])
            if setting["loss"] == "is_dpo" and other["loss"] != "is_dpo" and same_panel and pairs:
                rows.append(dict(kind="paired", **setting, minus=other["loss"], n=len(pairs))
                            | mean_se("final_win_rate", [a["final_win_rate"] - b["final_win_rate"] for a, b in pairs])
                            | mean_se("peak_win_rate", [a["peak_win_rate"] - b["peak_win_rate"] for a, b in pairs]))
    return rows


def markdown_table(table, paired, settings):
    """Table 1 and the paired differences below it, from their rows."""
    def cell(row, name, digits=1):
        mean, se = row[name], row[f"{name}_se"]
        return "-" if mean is None else f"{mean:.{digits}f}" + ("" if se is None else f" ± {se:.{digits}f}")

    text = ("| loss | β | log ε | lr | seeds | peak win rate (%) | √KL there | final win rate (%) | √KL there | drop (points) |"
            " ESS share | final reward | final length (tokens) |\n" + "|---" * 13 + "|\n")
    for row in table:
        log_eps = "-" if row["log_eps"] is None else row["log_eps"]
        text += (f"| {row['loss']} | {row['beta']:g} | {log_eps} | {row['lr']:g} | {row['n']} | {cell(row, 'peak_win_rate')} |"
                 f" {cell(row, 'peak_sqrt_kl', 2)} | {cell(row, 'final_win_rate')} | {cell(row, 'final_sqrt_kl', 2)} |"
                 f" {cell(row, 'drop')} | {cell(row, 'ess_share', 2)} | {cell(row, 'reward', 2)} | {cell(row, 'length')} |\n")
    text += (f"\nMean ± standard error over seeds; √KL in √nats; golden settings {settings}. The peak is the best of the"
             " checkpoints and the reference, on the very prompts it is chosen by: biased upward. ESS share: effective sample"
             " size of the weights over the step's pairs, last tenth of the steps; 1 without weights.\n")
    if paired:
        text += ("\n| is_dpo minus | β | lr | pairs of runs | final win rate (points) | peak win rate (points) |\n"
                 + "|---" * 6 + "|\n")
        for row in paired:
            text += (f"| {row['minus']} | {row['beta']:g} | {row['lr']:g} | {row['n']} | {cell(row, 'final_win_rate')} |"
                     f" {cell(row, 'peak_win_rate')} |\n")
        text += f"\nDifferences by seed, mean ± standard error over the pairs; is_dpo at log ε {paired[0]['log_eps']}.\n"
    return text


# ----------------------------------------------------------------------------------------- the pictures, from the rows alone
def panel_grid(rows, y_labels, x_label):
    """A column of axes a (beta, lr), a line of axes a y label -> figure, [(the column's axes, {loss: its rows})]."""
    from matplotlib.figure import Figure

    panels = sorted({(row["beta"], row["lr"]) for row in rows})
    height = 4.6 if len(y_labels) == 1 else 1.2 + 2.5 * len(y_labels)
    figure = Figure(figsize=(max(6.0, 1 + 3.4 * len(panels)), height), layout="constrained")
    axes, columns = figure.subplots(len(y_labels), len(panels), sharex="col", sharey="row", squeeze=False), []
    for ax, label in zip(axes[:, 0], y_labels):
        ax.set_ylabel(label)
    for column, (beta, lr) in zip(axes.T, panels):
        column[0].set_title(rf"$\beta$ = {beta:g}" + (f", lr {lr:g}" if len({lr for _, lr in panels}) > 1 else ""), fontsize=10)
        column[-1].set_xlabel(x_label)
        of_panel = [row for row in rows if (row["beta"], row["lr"]) == (beta, lr)]
        losses = {loss: [row for row in of_panel if row["loss"] == loss] for loss in LOSS_LOOKS}
        columns.append((column, {loss: of_loss for loss, of_loss in losses.items() if of_loss}))
    return figure, columns


def plot_figure_3(rows):
    """Checkpoints of all seeds; the log form's curve, its band, a star at a peak among the data. A panel a beta: with all of them
    in one, five losses cannot be followed. The quadratic form stays in the rows: its lines would hide the others."""
    figure, columns = panel_grid(rows, [WIN_RATE], SQRT_KL)
    for (ax,), losses in columns:
        for loss, of_loss in losses.items():
            look, points = dict(LOSS_LOOKS[loss], markersize=4), [row for row in of_loss if row["kind"] == "point"]
            ax.plot([p["sqrt_kl"] for p in points], [p["win_rate"] for p in points], **look | dict(linestyle="", alpha=0.7))
            ax.plot([], [], label=loss, **look)
            fit = next(row for row in of_loss if row["kind"] == "fit")  # the log form's
            if fit["a"] is not None:
                ax.plot(fit["sqrt_kl"], fit["win_rate"], **look | dict(marker=""))
                if fit["band"]:
                    ax.fill_between(fit["sqrt_kl"], *fit["band"], color=look["color"], alpha=0.12, linewidth=0)
                if fit["inside"]:
                    ax.plot(fit["peak_sqrt_kl"], fit["peak_win_rate"], "*", color=look["color"], markersize=13, mec="white")
        ax.set_xlim(0, None)
    ax.plot([], [], "*", color="grey", markersize=11, label="peak of a fitted curve")
    return figure


def draw_training(rows, labels, x_label, every=1):
    """Figures 4 and 6: means over seeds, shades of one standard error, over epochs; labels: {field of a row: its axis' label}."""
    figure, columns = panel_grid(rows, list(labels.values()), x_label)
    for axes, losses in columns:
        for loss, of_loss in losses.items():
            for ax, y in zip(axes, labels):
                if y == "weights/mean" and not loss.startswith("is_"):
                    continue  # it is 1
                # None becomes nan, which is not drawn
                x, mean, se = (np.array([row[key] for row in of_loss], dtype=float) for key in ("epoch", y, f"{y}_se"))
                ax.plot(x, mean, label=loss, markersize=4, markevery=every, **LOSS_LOOKS[loss])
                ax.fill_between(x, mean - se, mean + se, color=LOSS_LOOKS[loss]["color"], alpha=0.15, linewidth=0)
    return figure


def plot_figure_4(rows):
    return draw_training(rows, {"win_rate": WIN_RATE, "sqrt_kl": SQRT_KL}, "epoch")


def plot_figure_5(rows):
    """Win rate and sqrt KL, of the final policy and at the peak, over log_eps, evenly spaced; bars of one standard error."""
    figure, columns = panel_grid(rows, [WIN_RATE, SQRT_KL], r"log $\epsilon$ (nats a response; $\infty$: no cap)")
    ticks = sorted({float(row["log_eps"]) for row in rows})
    for axes, losses in columns:
        for k, (loss, of_loss) in enumerate(losses.items()):
            of_loss = sorted(of_loss, key=lambda row: float(row["log_eps"]))
            for ax, y in zip(axes, ("win_rate", "sqrt_kl")):
                for when, shift, look in (("final", 0.0, {}), ("peak", 0.06, dict(linestyle=":", fillstyle="none"))):
                    place = [ticks.index(float(row["log_eps"])) + 0.12 * k + shift for row in of_loss]  # beside each other
                    mean, se = (np.array([row[f"{when}_{y}{end}"] for row in of_loss], dtype=float) for end in ("", "_se"))
                    ax.errorbar(place, mean, se, capsize=2, markersize=4, label=f"{loss}, {when}", **LOSS_LOOKS[loss] | look)
        axes[-1].set_xticks(range(len(ticks)), [r"$\infty$" if tick == math.inf else f"{tick:g}" for tick in ticks])
    return figure


def plot_figure_6(rows):
    labels = {"ratio/chosen": r"mean log $\pi$/ref, chosen (nats)", "ratio/rejected": r"mean log $\pi$/ref, rejected (nats)"}
    if any(row["log_eps"] is not None for row in rows):
        labels["weights/mean"] = "mean weight (capped)"
    bin_steps = rows[0]["bin_steps"]
    return draw_training(rows, labels, "epoch" + (f" (a point: mean of {bin_steps} steps)" if bin_steps > 1 else ""), every=4)


def plot(args):
    """Figures 3 to 6 and Table 1 of the runs given."""
    import matplotlib

    runs, out = sorted((read_run(Path(run)) for run in args.runs), key=lambda run: run["order"]), Path(args.out)
    check_comparable(runs)
    shown = [run for run in runs if run["setting"]["log_eps"] is None or float(run["setting"]["log_eps"]) == args.log_eps]
    if len(shown) < len(runs):
        print(f"figures 3, 4, 6 and the paired differences leave out {len(runs) - len(shown)} runs of a log_eps other than"
              f" {args.log_eps:g} (--log_eps)")
    table, paired = table_rows(runs), paired_rows(shown)
    several = Counter((row["beta"], row["lr"], row["loss"]) for row in table)  # rows differ in log_eps then
    ablation = [row for row in table if several[row["beta"], row["lr"], row["loss"]] > 1]
    evaluated = [run for run in shown if len(run["points"]) > 1]
    bin_steps = max(1, max(len(run["steps"]) for run in runs) // 40)
    nothing = f"no run of a loss without log_eps, or at {args.log_eps:g}, has "
    figures = {"figure3": (figure_3_rows(evaluated), plot_figure_3, nothing + "a checkpoint after step 0 evaluated"),
               "figure4": (figure_4_rows(evaluated), plot_figure_4, nothing + "a checkpoint after step 0 evaluated"),
               "figure5": (ablation, plot_figure_5, "no beta, lr and loss has two values of log_eps"),
               "figure6": (figure_6_rows(shown, bin_steps), plot_figure_6, nothing + "a step in its metrics.jsonl")}

    out.mkdir(parents=True, exist_ok=True)
    for name, (rows, draw, reason) in figures.items():
        if not rows:
            print(f"{name} is not drawn: {reason}")
            for suffix in (".png", ".svg", ".jsonl"):  # an earlier one would pass for these runs'
                (out / f"{name}{suffix}").unlink(missing_ok=True)
            continue
        for row in rows:
            if row.get("kind") == "fit":
                print(fit_line(row))
        write_lines(out / f"{name}.jsonl", rows)
        figure = draw(rows)
        legend = {label: handle for ax in figure.axes for handle, label in zip(*ax.get_legend_handles_labels())}  # each once
        figure.legend(legend.values(), legend, loc="outside lower center", fontsize=9, frameon=False,
                      ncols=max(3, round(figure.get_figwidth() / 2)))
        with matplotlib.rc_context({"svg.hashsalt": name}):  # the same rows, the same bytes
            write_aside(out / f"{name}.png", lambda aside: figure.savefig(aside, format="png", dpi=150))
            write_aside(out / f"{name}.svg", lambda aside: figure.savefig(aside, format="svg", metadata={"Date": None}))
        print(f"{out / name}.png, .svg, .jsonl")
    write_lines(out / "table.jsonl", table + paired)
    settings = runs[0]["args"]["golden settings"]
    write_aside(out / "table1.md", lambda aside: aside.write_text(markdown_table(table, paired, settings)))
    print(f"{out / 'table1.md'}, {out / 'table.jsonl'}: {len(runs)} runs")


def main():
    args = parse_args()
    if args.command in ("judge", "plot"):
        start(0, 60)  # one process; guard takes leave of its group
    return dict(sample=sample, label=label, golden=golden, bench=bench, judge=judge, plot=plot)[args.command](args)


if __name__ == "__main__":
    guard(main)
