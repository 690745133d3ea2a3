"""Evaluation: what a policy says, what a reward model makes of it, and whether training has over-optimized.

    python evaluate.py sample --model out/sft/final --data prompts.jsonl --out samples.jsonl  # completions of a policy
    python evaluate.py label  --rm out/rm/final --samples samples.jsonl --out pairs.jsonl     # golden preference set
    python evaluate.py golden --rm out/rm/final --ref out/sft/final --data held_out.jsonl RUN...    # RUN/golden.jsonl
    python evaluate.py plot   RUN... --out figs                                               # figures 3 to 6, Table 1
    python evaluate.py judge  --samples samples.jsonl --api URL --judge gpt-4o-mini --out verdicts.jsonl
    python evaluate.py bench  --suite mt_bench --model out/run/final --questions question.jsonl --out answers.jsonl

`torchrun --nproc_per_node=4 -- evaluate.py sample ...` divides the prompts among ranks; so do label, golden and bench
(without the `--` torchrun takes --n for an option of its own).
Everything is JSON lines, and every command goes on where it was stopped. The protocol is Appendix C and D of the IS-DAA
paper: win rate over all combinations of sampled completions (temperature 0.7, top-p 0.95) and reference responses, as
the golden reward model sees them; KL(policy || ref) of completions sampled at temperature 1 from all tokens, the only
ones whose KL it is.

Units: rewards in nats of log-odds; KL in nats a response; lengths in tokens (the stop counted); n in prompts, k in
completions a prompt. A response ends with its stop: the token, EOS or what the chat template ends a turn with, that the
policy said; samples keep it apart from the text (`stops`; null: cut at --max_new_tokens), and no judge sees it.
"""

import hashlib
import itertools
import json
import math
import os
import random
import re
import sys
import time
from array import array
from collections import namedtuple
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
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

from plumbing.checkpoint import find_model, model_fingerprint, load_weights
from plumbing.data import (SkipRow, apply_template, assistant_stop_id, count_skip, describe_skips, encode, encode_after,
                           load_tokenizer, read_jsonl, read_rows, render_chat, stop_ids, truncate_prompt)
from plumbing.process import (UserError, file_sha256, init_distributed, lock_for_writing, on_rank_0, print_rank0,
                              read_json, run_main, write_atomically)
from plumbing.run import Parser, check_ranges


# --------------------------------------------------------------------------------------------------- the estimators
def win_shares(rewards, reference_rewards):
    """Share of the (completion, reference) combinations of each prompt that the completion wins, ties half -> (n,).
    rewards and reference_rewards: a vector a prompt. The win rate is their mean (Appendix D)."""
    return torch.stack([((ours[:, None] > theirs).double() + 0.5 * (ours[:, None] == theirs)).mean()
                        for ours, theirs in zip(rewards, reference_rewards)])


def mean_and_error(values):
    """Mean of (n,) values, one a prompt, and its standard error. A prompt's completions are averaged before: they are
    not independent, prompts are (the error clustered by prompt)."""
    n = len(values)
    return values.mean().item(), (values.double().std() / n**0.5).item() if n > 1 else math.nan


def step_kl(policy_logits, ref_logits):
    """sum_v pi(v) (log pi(v) - log ref(v)) of each row of logits (N, V) -> (N,). Summed over the steps of a response
    drawn from pi it estimates KL(pi || ref) without bias, is never negative, and varies less than log pi(y) - log
    ref(y), which has the same mean (Rao-Blackwell; Amini et al. 2025). The paper's Appendix C prints log r + (r - 1), r
    = pi/ref: its mean is KL + chi^2."""
    policy, ref = policy_logits.log_softmax(-1), ref_logits.log_softmax(-1)
    return (policy.exp() * (policy - ref)).sum(-1)


# ------------------------------------------------------------------------------------------------------- generation
class CausalLM(nn.Module):
    """A language model that gives logits. Module names are the checkpoint's; a tied head is the embedding."""

    def __init__(self, c):
        super().__init__()
        self.config, self.model = c, LlamaModel(c)
        self.lm_head = None if c.tie_word_embeddings else CastLinear(c.hidden_size, c.vocab_size, bias=False)

    def logits(self, hidden):
        """hidden (N, D) -> logits (N, V), float32 (fp64: float64): 16-bit ones would be rounded to 0.06 near 20."""
        weight = (self.model.embed_tokens if self.lm_head is None else self.lm_head).weight
        if hidden.is_cuda and hidden.dtype == torch.bfloat16:
            return torch.mm(hidden, weight.T, out_dtype=torch.float32)
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        return F.linear(hidden.to(dtype), weight.to(dtype))


class Cache:
    """Keys and values (2, B, K, capacity, head_dim) a layer, and segments (B, capacity; -1: padding), of B rows of
    tokens, the first `length` of which are there."""

    def __init__(self, c, batch, capacity, dtype, device):
        shape = (2, batch, c.num_key_value_heads, capacity, c.head_dim)
        self.layers = [torch.empty(shape, dtype=dtype, device=device) for _ in range(c.num_hidden_layers)]
        self.segments, self.length = torch.empty(batch, capacity, dtype=torch.long, device=device), 0

    def keep(self, rows):
        self.segments, self.layers = self.segments[rows], [layer[:, rows] for layer in self.layers]


def cached_forward(model, ids, positions, segments, cache):
    """LlamaModel.forward of tokens (B, T) that follow those in the cache, which takes them in -> hidden (B, T, D)."""
    start, end = cache.length, cache.length + ids.shape[1]
    cache.segments[:, start:end], cache.length = segments, end
    x, (cos, sin) = model.embed_tokens(ids).to(model.dtype), model.angles(positions)
    query, key = segments[:, None, :, None], cache.segments[:, None, None, :end]
    seen = ((query == key) | ((key == 0) & (query > 0))).tril(start)  # (B, 1, T, end), as in LlamaModel
    group = model.layers[0].self_attn.H // model.layers[0].self_attn.K
    mask = torch.where(seen, x.new_zeros(()), -math.inf).repeat(1, 1, group, 1)
    for layer, (keys, values) in zip(model.layers, cache.layers):
        q, keys[:, :, start:end], values[:, :, start:end] = layer.self_attn.project(layer.input_layernorm(x), cos, sin)
        grouped = q.reshape(len(q), keys.shape[1], -1, q.shape[3])  # heads of a kv head as more queries: no copies
        out = F.scaled_dot_product_attention(grouped, keys[:, :, :end], values[:, :, :end], attn_mask=mask)
        x = x + layer.self_attn.o_proj(out.view(q.shape).transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.norm(x)


def uniform_numbers(prompt, k, n, seed):
    """(k, n) numbers in [0, 1), float64: a pure function of (seed, prompt, completion, token). So a completion does not
    depend on the other prompts, the batch or the ranks, and two policies are compared on the same draws."""
    digest = hashlib.sha256(array("i", prompt).tobytes()).hexdigest()
    generators = [random.Random(f"{seed}/{digest}/{j}") for j in range(k)]
    return torch.tensor([[generator.random() for _ in range(n)] for generator in generators], dtype=torch.float64)


def next_tokens(logits, uniform, temperature, top_p):
    """One token id for each row of logits (N, V), the inverse of the cumulative distribution at uniform (N,).
    Temperature 0 takes the likeliest. top_p keeps the fewest likeliest tokens that have that mass together (Holtzman et
    al. 2020)."""
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
    point = torch.minimum(uniform[:, None] * total, total.nextafter(torch.zeros_like(total)))  # below it, also rounded
    index = torch.searchsorted(cumulative, point, right=True)
    return (index if order is None else order.gather(1, index))[:, 0]


@torch.no_grad()
def generate(policy, prompts, uniform, temperature, top_p, stops):
    """k completions of each of B prompts (lists of ids) -> ids [B][k], each with its stop token if it came to one.

    uniform (B, k, n): the random numbers; n tokens at most. A row of the cache holds [prompt | first tokens of the k
    completions | their second tokens | ...]: the prompt is computed and kept once, and segments keep the completions
    from seeing each other."""
    (B, k, n), device = uniform.shape, device_of(policy)
    uniform = uniform.to(device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    rows, _ = response_rows(prompts, [[]] * B)
    batch = batch_tensors(rows, [(b, len(prompt) - 1) for b, prompt in enumerate(prompts)], device)
    cache = Cache(policy.config, B, batch["ids"].shape[1] + k * n, policy.model.dtype, device)
    hidden = cached_forward(policy.model, batch["ids"], batch["positions"], batch["segments"], cache)  # (B, P, D)
    logits = policy.logits(hidden.flatten(0, 1)[batch["predict"]]).repeat_interleave(k, dim=0)
    stops, segments = torch.tensor(stops, device=device), torch.arange(1, k + 1, device=device)
    tokens = torch.full((B, k, n), -1, device=device)
    ended = torch.zeros(B, k, dtype=torch.bool, device=device)
    running = torch.arange(B, device=device)  # the prompts that rows of the cache belong to
    for t in range(n):
        new = next_tokens(logits, uniform[running, :, t].flatten(), temperature, top_p).view(-1, k)
        tokens[running, :, t] = new.where(~ended[running], -1)
        ended[running] |= torch.isin(new, stops)
        goes_on = ~ended[running].all(dim=1)
        left = goes_on.sum().item()
        if left == 0 or t == n - 1:
            break
        if left <= len(running) / 2:  # not one by one: each time the cache is copied
            running, new = running[goes_on], new[goes_on]
            cache.keep(goes_on)
        positions = (lengths[running, None] + t).expand(-1, k)
        hidden = cached_forward(policy.model, new, positions, segments.expand(len(running), k), cache)
        logits = policy.logits(hidden.flatten(0, 1))
    return [[[token for token in ids if token >= 0] for ids in completions] for completions in tokens.tolist()]


def rounds_of_rank(lengths, size, desc):
    """Yield this rank's share, a list of indices, of each round of about `size` examples a rank, longest first. The
    same number of rounds on every rank."""
    rank = dist.get_rank()
    rounds = split_into_micro_batches(lengths, max(1, size), dist.get_world_size()) if lengths else []
    for micro in tqdm(rounds, desc=desc, disable=rank > 0 or not sys.stderr.isatty(), leave=False):
        yield micro[rank]


def completions(policy, prompts, args, k, temperature, top_p, stops, desc):
    """Generate for all prompts (ids); yield [(index of the prompt, ids of its k completions)] a round, on every
    rank."""
    for mine in rounds_of_rank([len(prompt) for prompt in prompts], args.batch_size // k, desc):
        ids, everyones = [], [None] * dist.get_world_size()
        if mine:
            uniform = torch.stack([uniform_numbers(prompts[i], k, args.max_new_tokens, args.seed) for i in mine])
            ids = generate(policy, [prompts[i] for i in mine], uniform, temperature, top_p, stops)
        dist.all_gather_object(everyones, list(zip(mine, ids)))
        yield list(itertools.chain.from_iterable(everyones))


# ------------------------------------------------------------------------------------------- rewards and divergence
def response_rows(prompts, responses):
    """Rows [prompt | y_1 | ... | y_k] as in training: (tokens, positions, segments) each, and (row, first column,
    response) of every response in turn."""
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


def compute_in_batches(compute, prompts, responses, columns, batch_size, desc):
    """compute(prompts, responses) -> (responses, columns) on batches of about batch_size responses, divided among ranks
    -> a float64 CPU tensor (number of responses of the prompt, columns) a prompt, on every rank."""
    counts = [len(ys) for ys in responses]
    ends = list(itertools.accumulate(counts))
    results = torch.zeros(sum(counts), columns, dtype=torch.float64)
    lengths = [len(prompt) + sum(map(len, ys)) for prompt, ys in zip(prompts, responses)]
    for mine in rounds_of_rank(lengths, batch_size // max(counts, default=1), desc):
        if mine:
            where = [r for i in mine for r in range(ends[i] - counts[i], ends[i])]
            results[where] = compute([prompts[i] for i in mine], [responses[i] for i in mine]).double().cpu()
    dist.all_reduce(results)  # each was computed by one rank: a sum with zeros is exact
    return list(results.split(counts))


@torch.no_grad()
def rewards(reward_model, prompts, responses):
    """r(x, y) of each response in turn, read at its last token -> (S, 1)."""
    rows, places = response_rows(prompts, responses)
    predict = [(row, start + len(y) - 1) for row, start, y in places]
    return reward_model(**batch_tensors(rows, predict, device_of(reward_model)))


def score(reward_model, prompts, responses, args, known, desc):
    """Rewards of responses (ids, [n][k]), a float64 vector a prompt. Each different (prompt, response) is computed once
    and noted in `known`: in another batch its last bits would differ, and equal responses would not tie."""
    names = [[(tuple(prompt), tuple(y)) for y in ys] for prompt, ys in zip(prompts, responses)]
    wanted = {}  # prompt: its responses that are not known
    for x, y in itertools.chain.from_iterable(names):
        if (x, y) not in known:
            wanted.setdefault(x, {})[y] = None
    found = compute_in_batches(lambda xs, ys: rewards(reward_model, xs, ys), [*wanted],
                               [[*ys] for ys in wanted.values()], 1, args.batch_size, desc)
    for (x, ys), values in zip(wanted.items(), found):
        known.update(zip(((x, y) for y in ys), values[:, 0].tolist()))
    return [torch.tensor([known[name] for name in of_prompt], dtype=torch.float64) for of_prompt in names]


@torch.no_grad()
def divergences(policy, ref, prompts, responses):
    """Of each response in turn: the sum over its steps of the exact KL(pi || ref) of the next token, and log pi(y) -
    log ref(y), k1 -> (S, 2), nats. Both estimate KL(pi || ref) if the responses are drawn from pi at temperature 1,
    top-p 1."""
    rows, places = response_rows(prompts, responses)
    predict = [(row, start + t - 1 if t else len(prompts[row]) - 1) for row, start, y in places for t in range(len(y))]
    batch = batch_tensors(rows, predict, device_of(policy), targets=[token for *_, y in places for token in y])
    where = batch["ids"], batch["positions"], batch["segments"], batch["prompt"]
    hidden = [m.model(*where).flatten(0, 1)[batch["predict"]] for m in (policy, ref)]
    steps = []
    for a, b, y in zip(*(h.split(max(1, 2**25 // policy.config.vocab_size)) for h in (*hidden, batch["targets"]))):
        policy_logits, ref_logits = policy.logits(a), ref.logits(b)
        ratios = policy_logits.log_softmax(-1) - ref_logits.log_softmax(-1)
        steps.append(torch.stack([step_kl(policy_logits, ref_logits), ratios.gather(1, y[:, None])[:, 0]], dim=1))
    lengths = [len(y) for *_, y in places]
    return torch.stack([part.sum(0) for part in torch.cat(steps).double().split(lengths)])


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
FREE = ("out", "batch_size", "timeout", "threads", "concurrency")  # flags that change no result
PROTOCOL = ("n", "k", "temperature", "top_p", "max_new_tokens", "max_length", "max_prompt_length", "seed", "precision")


def parse_args(argv=None):
    parser = Parser(description="What a policy says, what judges make of it, whether it over-optimizes.", usage=None)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    flags = {command.__name__: commands.add_parser(command.__name__, help=command.__doc__, description=command.__doc__)
             for command in (sample, label, golden, plot, judge, bench)}

    def add(names, flag, **how):
        for name in names.split():
            flags[name].add_argument(flag, **how)

    models = "sample label golden bench"
    add("golden plot", "runs", nargs="+", metavar="RUN", help="--out of train_pref.py; plot: evaluated by golden")
    add("sample bench", "--model", help="policy: model directory or Hub id; with --api the server's name (preset)")
    add("label golden", "--rm", help="reward model: what train_rm.py wrote, or a Hub id (preset)")
    add("golden", "--ref", help="reference policy, for the KL and as step 0: model directory or Hub id (preset)")
    add("sample golden", "--data", help="prompts and reference responses: a file, recipe or Hub id (preset)")
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
    add("bench", "--template", choices=["chat", "hh"], default="chat", help="the tokenizer's, or HH's plain dialogue")
    add("sample golden", "--n", type=int, help="prompts: the first n different ones (preset)")
    add("sample golden", "--k", type=int, default=2, help="completions a prompt")
    draw = "sample golden bench"
    add(draw, "--temperature", type=float, default=0.7, help="0: likeliest token (golden's KL 1; mt_bench by category)")
    add(draw, "--top_p", type=float, default=0.95, help="mass of the likeliest tokens (golden's KL, bench: 1)")
    add(draw, "--max_new_tokens", type=int, help="tokens of a completion at most (preset; bench: 1024)")
    flags["bench"].set_defaults(temperature=None, top_p=1.0, max_new_tokens=1024)
    add("label golden", "--max_length", type=int, help="tokens of prompt + response that are scored (preset)")
    add(models, "--max_prompt_length", type=int, help="tokens of the prompt at most: it keeps its end (preset)")
    add(models, "--batch_size", type=int, default=64, help="completions a rank at a time: less takes less memory")
    precision = "bf16" if torch.cuda.is_available() else "fp32"
    add(models, "--precision", choices=["bf16", "fp32", "fp64"], default=precision, help="of weights and products")
    add(models, "--preset", choices=list(PRESETS), help="defaults (None: toy, or paper if a model or data is given)")
    add(models, "--threads", type=int, help="CPU threads a rank; 0: torch's own choice (preset)")
    add(models, "--timeout", type=int, default=1800, help="seconds after which a rank that hangs ends the run")
    add(models + " judge", "--seed", type=int, default=0, help="of all that is drawn; judge: of who is A")

    args = parser.parse_args(argv)
    given = vars(args)
    if "preset" in given:
        args.preset = args.preset or ("paper" if any(given.get(x) for x in ("model", "ref", "rm", "data")) else "toy")
        given.update({x: value for x, value in PRESETS[args.preset].items() if x in given and given[x] is None})
    for flag in ["api"] if args.command == "judge" else ["model", "ref", "rm", "data"]:
        if flag in given and not given[flag]:
            parser.error(f"--{flag} is missing")
    check_ranges(parser, args, ("n", "k", "top_p", "max_new_tokens", "max_length", "max_prompt_length", "batch_size",
                                "timeout", "concurrency"), ("log_eps",))
    if args.command in ("sample", "label", "judge") and not args.out.endswith(".jsonl"):
        parser.error(f"--out {args.out}: the name must end in .jsonl")
    if given.get("top_p", 1) > 1:
        parser.error(f"--top_p {args.top_p}: must be at most 1")
    if "max_length" in given and args.max_prompt_length >= args.max_length:
        parser.error(f"--max_prompt_length {args.max_prompt_length} leaves no room in --max_length {args.max_length}")
    return args


# ------------------------------------------------------------------------------------------------ prompts and texts
HALF_A_PAIR = re.compile(r"[\ud800-\udfff]")  # a lone surrogate: JSON can hold it, no tokenizer takes it
# A prompt to answer. index: its row in the data; text: with --api also a list of messages; ids; references: the data's
# responses to it, (text, stop) each.
Prompt = namedtuple("Prompt", "index text ids references")


def load_prompts(args, tokenizer, vocab_size):
    """-> the first args.n different prompts of args.data, and their sha256. tokenizer None: no ids, and conversations
    stay lists of messages. Rows of one prompt are one: their responses are all references. Raises UserError."""
    n_rows, found, skipped, cut = 0, {}, {}, {}
    for n_rows, (where, row) in enumerate(read_rows(args.data, True, RECIPES), 1):
        try:
            text, reference = read_prompt(row, tokenizer)
            key = json.dumps(text)
            if key not in found and len(found) == args.n:
                raise SkipRow("beyond --n")
            if key not in found:
                ids = tokenizer and prompt_ids(text, tokenizer, vocab_size, args, cut, where)
                found[key] = Prompt(n_rows - 1, text, ids, [])
            if reference and reference not in found[key].references:
                found[key].references.append(reference)
        except SkipRow as skip:
            count_skip(skipped, str(skip), where)
    report = (f"{args.data}: {len(found)} prompts of {n_rows} rows; skipped: {describe_skips(skipped)}; cut:"
              f" {describe_skips(cut)}")
    if not found:
        raise UserError(f"no usable prompts in {report}")
    print_rank0(report)
    texts = [[prompt.index, prompt.text, prompt.references] for prompt in found.values()]
    return [*found.values()], hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def read_prompt(row, tokenizer):
    """A data row -> prompt, and (text, stop) of its response or None. Raises SkipRow."""
    bare = isinstance(row.get("prompt"), (str, list)) and not {"chosen", "completion", "messages"} & row.keys()
    text, response = (row["prompt"], "") if bare else split_demonstration(row)
    stop = ""
    if isinstance(text, list) and tokenizer is None:
        response = response and isinstance(response[0], dict) and response[0].get("content") or ""
    elif isinstance(text, list) and bare:
        text = apply_template(tokenizer, text, row.get("tools"), add_generation_prompt=True)
    elif isinstance(text, list):
        text, response = render_chat(tokenizer, text, response, row.get("tools"))
        stop = next((stop for stop in stop_texts(tokenizer) if response.endswith(stop)), "")
    if not text:
        raise SkipRow("empty prompt")
    if HALF_A_PAIR.search(json.dumps([text, response], ensure_ascii=False)):
        raise SkipRow("broken Unicode")
    return text, (response.removesuffix(stop), stop) if response else None


def prompt_ids(text, tokenizer, vocab_size, args, cut, where):
    """The ids of a prompt's text, its end where it is too long, which is counted in `cut`. Raises SkipRow."""
    ids, excess = truncate_prompt(encode(tokenizer, [text], vocab_size)[0], tokenizer, args.max_prompt_length)
    if excess:
        count_skip(cut, "prompt", where)
    return ids


def read_samples(path):
    """-> [("file:line", what `sample` wrote)]; `stops`, `references` may lack: all ended, none. Raises UserError."""
    samples = list(read_jsonl(Path(path)))
    for where, row in samples:
        said, references = row.get("completions"), row.setdefault("references", [])
        if not (isinstance(row.get("prompt"), (str, list)) and are_texts(said) and said and are_texts(references)
                and len(row.setdefault("stops", [""] * len(said))) == len(said)):
            raise UserError(f"{where}: want prompt, completions, references (texts) and stops, as `sample` writes them")
        if HALF_A_PAIR.search(json.dumps(row, ensure_ascii=False)):
            raise UserError(f"{where}: half of a surrogate pair: mend or drop that row")
    return samples


def are_texts(values):
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def stop_texts(tokenizer):
    """{text of a token that may end a response: its id}"""
    return {tokenizer.decode([token], skip_special_tokens=False): token for token in stop_ids(tokenizer)}


def completion_text(ids, stops, tokenizer):
    """-> the text (special tokens stay to be seen), the text of the stop that it came to or None, number of tokens."""
    how, ended = dict(skip_special_tokens=False, clean_up_tokenization_spaces=False), ids[-1] in stops
    text = tokenizer.decode(ids[:-1] if ended else ids, **how)
    return text, tokenizer.decode(ids[-1:], **how) if ended else None, len(ids)


def scored_ids(tokenizer, prompt, texts, stops, vocab_size, args):
    """A prompt (text or messages), its responses' texts and stops -> their ids, as train_rm.py makes them of a pair:
    cut alike, each with its stop if it came to one (EOS for one that this tokenizer does not know); an empty response
    is a stop alone. Raises SkipRow."""
    end, known = tokenizer.eos_token_id, stop_texts(tokenizer)
    if isinstance(prompt, list):
        prompt, end = apply_template(tokenizer, prompt, None, add_generation_prompt=True), assistant_stop_id(tokenizer)
    x = prompt_ids(prompt, tokenizer, vocab_size, args, {}, "")
    ys = encode_after(tokenizer, [prompt] * len(texts), texts, vocab_size)
    ys = [y if text and stop is None else y + [known.get(stop, end)] for y, text, stop in zip(ys, texts, stops)]
    return x, [y[: args.max_length - len(x)] for y in ys]


def load_model(name, make, precision, device):
    """A model directory or Hub id -> (model, tokenizer, directory). Weights are kept in the dtype of the products, but
    for a reward model's head, which is float32 as in training."""
    directory = find_model(name)
    model = load_weights(build_model(lambda: make(read_config(directory)), device, precision), directory)
    model.model.to(model.model.dtype)
    if getattr(model, "lm_head", None) is not None:
        model.lm_head.to(model.model.dtype)
    return model.eval(), load_tokenizer(directory), directory


def sampling_stops(directory, tokenizer):
    """The ids that end a completion: EOS, what the chat template ends a turn with, generation_config.json's."""
    path = directory / "generation_config.json"
    stops = read_json(path).get("eos_token_id") if path.exists() else None
    stops = stops if isinstance(stops, list) else [stops]
    return sorted({tokenizer.eos_token_id, assistant_stop_id(tokenizer), *stops} - {None})


# ------------------------------------------------------------------------------------- files that a second run extends
def extend_rows(out, about, items, compute, made=None):
    """The rows {index: row} of items {index: item} in the .jsonl file `out`. compute(the items that it lacks) yields
    lists of rows, which are on disk before more are computed; an item without a row is left out. OUT.about.json says
    how they are made: a second run must be told the same, but for the flags FREE: UserError lists the differences, or
    says that `out`, or the file `made` of it, stands there without it. All ranks call it."""

    def held():
        sidecar = out.with_suffix(".about.json")
        then = read_json(sidecar) if sidecar.exists() else about
        differ = [key for key in sorted({*then, *about} - {*FREE}) if then.get(key) != about.get(key)]
        if differ:
            says = "; ".join(f"{key} was {then.get(key)!r}, is {about.get(key)!r}" for key in differ)
            raise UserError(f"{sidecar}: {out} was made otherwise: {says}. Choose another --out")
        for path in (out, made or out) if not sidecar.exists() else ():
            if path.exists():
                raise UserError(f"{path} exists, and no {sidecar.name} says how it was made: choose another --out")
        found = read_own_rows(out, ["index"], ["index"])
        write_json(sidecar, about)
        return found

    rows = on_rank_0(held)
    lacking = {index: item for index, item in items.items() if index not in rows}
    if not lacking:
        print_rank0(f"{out} is complete")
    for fresh in compute(lacking):
        append_rows(out, fresh)
        rows |= {row["index"]: row for row in fresh}
    rows = {index: rows[index] for index in items if index in rows}
    on_rank_0(lambda: write_lines(out, rows.values()))
    return rows


def read_own_rows(path, fields, key):
    """{values of the fields `key`: row} of a .jsonl file, which is locked from now on. A line that a kill cut in two is
    dropped, and of rows of one key the first is kept. Raises UserError, leaving it as it is, for a file of somebody
    else's: a row of ours has the `fields`, the first at its head."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock_for_writing(path)
    text, rows = path.read_bytes() if path.exists() else b"", {}
    begins = f'{{"{fields[0]}": '.encode()
    if not begins.startswith(text[: len(begins)]):
        raise UserError(f"{path}:1: not a row of ours: give --out a file of its own")
    lines = read_whole_lines(path) if text else []
    for where, row in lines:
        if not {*fields} <= row.keys():
            raise UserError(f"{where}: not a row of ours, which has {', '.join(fields)}: mend or delete it")
        rows.setdefault(itemgetter(*key)(row), row)
    if len(rows) < len(lines):
        print_rank0(f"{path}: {len(lines) - len(rows)} rows stood there twice: the first of each is kept")
    if text and (len(rows) < len(lines) or not text.endswith(b"\n")):
        write_lines(path, rows.values())
    return rows


def read_whole_lines(path):
    """[("file:line", row)] of a JSON-lines file, without a last line that a kill cut in two."""
    return list(itertools.islice(read_jsonl(path), path.read_bytes().count(b"\n")))


def append_rows(out, rows):
    """Add JSON lines, on rank 0; on disk when it returns."""
    if dist.get_rank() == 0:
        with open(out, "a") as file:
            file.write(as_lines(rows))
            file.flush()
            os.fsync(file.fileno())


def write_once(path, text):
    """A file that is made of finished rows -> " is complete" if it stood there. Raises UserError if it was changed."""
    if path.exists() and path.read_text() != text:
        raise UserError(f"{path} holds something else than this command writes there: choose another --out")
    complete = " is complete" if path.exists() else ""
    write_atomically(path, lambda aside: aside.write_text(text))
    return complete


def as_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_lines(path, rows):
    write_atomically(path, lambda aside: aside.write_text(as_lines(rows)))


def write_json(path, content):
    write_atomically(path, lambda aside: aside.write_text(json.dumps(content, indent=2) + "\n"))


# ----------------------------------------------------------------------------------------------------- the commands
def sample(args):
    """Completions of a policy, a row a prompt."""
    _, world, device = init_distributed(args.seed, args.timeout, args.threads)
    if args.api and world > 1:
        raise UserError("--api: one process is enough, run it without torchrun")
    policy = tokenizer = directory = None
    if not args.api:
        policy, tokenizer, directory = load_model(args.model, CausalLM, args.precision, device)
    prompts, digest = on_rank_0(lambda: load_prompts(args, tokenizer, policy and policy.config.vocab_size))
    about = vars(args) | dict(policy=directory and model_fingerprint(directory), prompts=digest)

    def compute(lacking):
        if args.api:
            return api_rows(lacking.values(), args)
        how = args.k, args.temperature, sampling_stops(directory, tokenizer), "sampling"
        return sampled_rows(policy, tokenizer, [*lacking.values()], args, *how)

    rows = extend_rows(Path(args.out), about, {prompt.index: prompt for prompt in prompts}, compute).values()
    ended = [stop is not None for row in rows for stop in row["stops"]]
    summary = dict(prompts=len(rows), completions=len(ended), ended=sum(ended))
    print_rank0(f"{args.out}: {json.dumps(summary | dict(empty=sum(row['completions'].count('') for row in rows)))}")


def sampled_rows(policy, tokenizer, prompts, args, k, temperature, stops, desc):
    """Yield the rows of prompts with k completions of each, a list a round."""
    for found in completions(policy, [prompt.ids for prompt in prompts], args, k, temperature, args.top_p, stops, desc):
        yield [sample_row(prompts[i], [completion_text(y, stops, tokenizer) for y in ys]) for i, ys in found]


def sample_row(prompt, answers):
    """answers: text, stop and number of tokens of each completion."""
    texts, stops, n_tokens = map(list, zip(*answers))
    return dict(index=prompt.index, prompt=prompt.text, references=[text for text, _ in prompt.references],
                completions=texts, stops=stops, n_tokens=n_tokens)


def label(args):
    """Preference pairs among sampled completions, as a reward model sees them: its rewards go to OUT.scores.jsonl."""
    _, _, device = init_distributed(args.seed, args.timeout, args.threads)
    out, skipped, pairs = Path(args.out), {}, []
    reward_model, tokenizer, directory = load_model(args.rm, RewardModel, args.precision, device)
    samples, vocab_size = read_samples(args.samples), reward_model.model.embed_tokens.num_embeddings
    about = vars(args) | dict(rm=model_fingerprint(directory), samples=file_sha256(args.samples))

    def compute(lacking):
        known, todo = {}, []
        for index, (where, row) in lacking.items():
            try:
                said = row["completions"], row["stops"]
                todo.append((index, *scored_ids(tokenizer, row["prompt"], *said, vocab_size, args)))
            except SkipRow as skip:
                count_skip(skipped, str(skip), where)
        for k in range(0, len(todo), 1024):
            indices, prompts, responses = zip(*todo[k : k + 1024])
            found = score(reward_model, prompts, responses, args, known, f"scoring {k} of {len(todo)}")
            # To 9 decimals: what follows depends on the batch, also in fp64.
            yield [dict(index=index, rewards=r.round(decimals=9).tolist()) for index, r in zip(indices, found)]

    scores = extend_rows(out.with_suffix(".scores.jsonl"), about, dict(enumerate(samples)), compute, out)
    for index, found in scores.items():
        where, row = samples[index]
        try:
            pairs.append(choose_pair(row, found["rewards"], tokenizer.eos_token, args))
        except SkipRow as skip:
            count_skip(skipped, str(skip), where)
    report = f"{args.samples}: {len(pairs)} pairs of {len(samples)} prompts; skipped: {describe_skips(skipped)}"
    if not pairs:
        raise UserError(f"no usable pairs in {report}")
    complete = on_rank_0(lambda: write_once(out, as_lines(pairs)))
    print_rank0(f"{out}{complete}: {report}")


def choose_pair(row, rewards, eos, args):
    """The best and the worst of a prompt's completions as a pair, with their rewards. Raises SkipRow. One that is empty
    or was cut is not taken: in a pair's text it would look as if it had ended there. A stop other than the trainer's
    `eos` is written, so that it reads what was said. Noise is a function of (seed, prompt, texts)."""
    said = [one for one in zip(rewards, row["completions"], row["stops"]) if one[2] is not None and one[1].strip()]
    if len(said) < 2:
        raise SkipRow("fewer than two completions that ended and are not empty")
    chosen, rejected = max(said, key=lambda one: one[0]), min(said, key=lambda one: one[0])
    if chosen[0] == rejected[0]:
        raise SkipRow("completions of equal reward")
    if args.noise == "bt":
        drawn = random.Random(json.dumps([args.seed, row["prompt"], chosen[1], rejected[1]])).random()
        if drawn > 1 / (1 + math.exp(rejected[0] - chosen[0])):
            chosen, rejected = rejected, chosen
    texts = [text if stop == eos else text + stop for _, text, stop in (chosen, rejected)]
    if isinstance(row["prompt"], list):  # the trainer's template ends them
        texts = [[dict(role="assistant", content=text)] for _, text, _ in (chosen, rejected)]
    return dict(prompt=row["prompt"], chosen=texts[0], rejected=texts[1], chosen_reward=chosen[0],
                rejected_reward=rejected[0])


def golden(args):
    """Win rate, KL and reward of every checkpoint of runs: a row in RUN/golden.jsonl; none is computed twice."""
    rank, _, device = init_distributed(args.seed, args.timeout, args.threads)
    reward_model, rm_tokenizer, rm_directory = load_model(args.rm, RewardModel, args.precision, device)
    ref, tokenizer, ref_directory = load_model(args.ref, CausalLM, args.precision, device)
    prompts, digest = on_rank_0(lambda: load_prompts(args, tokenizer, ref.config.vocab_size))
    known, vocab_size = {}, reward_model.model.embed_tokens.num_embeddings
    if not all(prompt.references for prompt in prompts):
        raise UserError(f"{args.data}: prompts without a response to compare with: it takes `completion` or `chosen`")
    protocol, stops = {name: getattr(args, name) for name in PROTOCOL}, sampling_stops(ref_directory, tokenizer)
    of = dict(rm=model_fingerprint(rm_directory), ref=model_fingerprint(ref_directory), prompts=digest)
    settings = hashlib.sha256(json.dumps([protocol, of]).encode()).hexdigest()[:12]
    work = on_rank_0(lambda: golden_work(args.runs, ref_directory, settings))
    print_rank0(f"{len(work)} checkpoints to evaluate, settings {settings}")

    def rate(responses, desc):  # n times (texts, stops) -> n vectors of rewards
        said = zip(prompts, responses)
        ids = [scored_ids(rm_tokenizer, prompt.text, *of_prompt, vocab_size, args) for prompt, of_prompt in said]
        return score(reward_model, *zip(*ids), args, known, desc)

    references = rate([zip(*prompt.references) for prompt in prompts], "references") if work else None
    measured = {}  # by weights: the reference policy is step 0 of every run
    for run, path, weights, step, epoch in work:
        if weights not in measured:
            policy = ref if step == 0 else load_model(str(path), CausalLM, args.precision, device)[0]
            if policy.config.vocab_size != ref.config.vocab_size:
                raise UserError(f"{path}: vocabulary of {policy.config.vocab_size}, --ref has {ref.config.vocab_size}")
            measured[weights] = measure(policy, ref, tokenizer, stops, prompts, references, rate, args)
        measures, said = measured[weights]
        name = "reference" if step == 0 else path.name
        row = dict(checkpoint=name, step=step, epoch=epoch, **measures, prompts=len(prompts), weights=weights,
                   settings=settings, protocol=protocol, of=of)
        if args.keep_samples and rank == 0:
            (run / "golden_samples").mkdir(exist_ok=True)
            write_lines(run / "golden_samples" / f"{name}.jsonl", said)
        append_rows(run / "golden.jsonl", [row])
        figures = ("win_rate", "kl", "k1", "reward", "length", "ended")
        print_rank0(f"{run} {name}: " + ", ".join(f"{x} {row[x]:.3f} +- {row[f'{x}_se']:.3f}" for x in figures))


def golden_work(runs, ref_directory, settings):
    """-> [(run, checkpoint, sha256 of its weights, step, epoch)] that RUN/golden.jsonl lacks under these settings."""
    work, key = [], ["step", "weights", "settings"]
    for run in map(Path, dict.fromkeys(runs)):
        try:
            header = json.loads((run / "metrics.jsonl").read_text().split("\n")[0])
            steps_per_epoch = math.ceil(header["pairs"] / header["args"]["batch_size"])
        except (OSError, ValueError, LookupError, TypeError):
            raise UserError(f"{run}: not the --out of a preference run (no metrics.jsonl that says so)") from None
        found = {int(path.name[5:]): path for path in run.glob("step_*") if path.name[5:].isdecimal()}  # no .bak
        if (run / "final").exists():
            found.setdefault(header["steps"], run / "final")
        done = read_own_rows(run / "golden.jsonl", ["checkpoint", *key], key)
        for step, path in sorted({0: ref_directory, **found}.items()):
            manifest = path / "manifest.json"
            weights = file_sha256(manifest) if manifest.exists() else model_fingerprint(path)
            if (step, weights, settings) not in done:
                work.append((run, path, weights, step, step / steps_per_epoch))
    return work


def measure(policy, ref, tokenizer, stops, prompts, reference_rewards, rate, args):
    """-> win rate, KL, k1, reward, length, share that ended, each with its standard error; what was said, as rows."""
    ids, how = [prompt.ids for prompt in prompts], (args.k, args.temperature, stops, "win rate: sampling")
    rounds = sampled_rows(policy, tokenizer, prompts, args, *how)
    said = sorted(itertools.chain.from_iterable(rounds), key=itemgetter("index"))
    rewards_ = rate([(row["completions"], row["stops"]) for row in said], "win rate: scoring")
    rounds = completions(policy, ids, args, args.k, 1.0, 1.0, stops, "KL: sampling")
    # Cut off at max_new_tokens: the KL of what is said until there.
    drawn = [ys for _, ys in sorted(itertools.chain.from_iterable(rounds))]
    kls = compute_in_batches(lambda xs, ys: divergences(policy, ref, xs, ys), ids, drawn, 2, args.batch_size, "KL")
    mean = lambda values: torch.stack([torch.as_tensor(of_prompt).double().mean() for of_prompt in values])
    per_prompt = dict(win_rate=win_shares(rewards_, reference_rewards), kl=mean([x[:, 0] for x in kls]),
                      k1=mean([x[:, 1] for x in kls]), reward=mean(rewards_),
                      length=mean([row["n_tokens"] for row in said]),
                      ended=mean([[stop is not None for stop in row["stops"]] for row in said]))
    measures = {}
    for name, values in per_prompt.items():
        measures[name], measures[f"{name}_se"] = mean_and_error(values)
    root = math.sqrt(max(measures["kl"], 0.0))
    measures |= dict(sqrt_kl=root, sqrt_kl_se=measures["kl_se"] / (2 * root) if root else 0.0)  # to first order
    rows = [row | dict(reference_rewards=theirs.tolist(), rewards=ours.tolist())
            for row, theirs, ours in zip(said, reference_rewards, rewards_)]
    return measures, rows


# FastChat's sampling temperature of a category (fastchat/llm_judge/common.py, temperature_config); others 0.7.
MT_BENCH_TEMPERATURE = dict(extraction=0.0, math=0.0, coding=0.0, reasoning=0.0, stem=0.1, humanities=0.1)


def bench(args):
    """Answers to the questions of AlpacaEval 2 or MT-Bench, in their formats; what turn N says, in OUT.turnN.jsonl."""
    _, _, device = init_distributed(args.seed, args.timeout, args.threads)
    out, skipped, cut = Path(args.out), {}, {}
    policy, tokenizer, directory = load_model(args.model, CausalLM, args.precision, device)
    questions, stops = read_questions(args), sampling_stops(directory, tokenizer)
    about = vars(args) | dict(policy=model_fingerprint(directory), questions=file_sha256(args.questions))

    def compute(lacking):
        for temperature in sorted({questions[number]["temperature"] for number in lacking}):
            group = [prompt for index, prompt in lacking.items() if questions[index]["temperature"] == temperature]
            for fresh in sampled_rows(policy, tokenizer, group, args, 1, temperature, stops, f"at {temperature}"):
                yield [row | dict(tstamp=time.time()) for row in fresh]

    for turn in range(max((len(question["turns"]) for question in questions), default=0)):
        prompts = {}
        for number, question in enumerate(questions):
            if len(question["messages"]) != 2 * turn or turn == len(question["turns"]):
                continue  # refused before, or answered
            question["messages"].append(dict(role="user", content=question["turns"][turn]))
            try:
                text = dialogue(tokenizer, question["messages"], args.template)
                ids = prompt_ids(text, tokenizer, policy.config.vocab_size, args, cut, question["where"])
                prompts[number] = Prompt(number, text, ids, [])
            except SkipRow as skip:
                count_skip(skipped, str(skip), question["where"])
        rows = extend_rows(out.with_suffix(f".turn{turn + 1}.jsonl"), about, prompts, compute, out)
        for number, row in rows.items():
            questions[number]["messages"].append(dict(role="assistant", content=row["completions"][0].strip()))
            questions[number]["tstamp"] = row["tstamp"]
    answered = [question for question in questions if len(question["messages"]) == 2 * len(question["turns"])]
    summary = (f"{len(answered)} answers to {len(questions)} questions; skipped: {describe_skips(skipped)}; cut:"
               f" {describe_skips(cut)}")
    if not answered:
        raise UserError(f"{args.questions}: no answers: {summary}")
    rows = [bench_row(args.suite, question, args.model) for question in answered]
    text = as_lines(rows) if args.suite == "mt_bench" else json.dumps(rows, indent=2) + "\n"
    print_rank0(f"{out}{on_rank_0(lambda: write_once(out, text))}: {summary}")


def read_questions(args):
    """The suite's question file -> its rows with `turns`, `temperature`, `where` and empty `messages`; or UserError."""
    questions = []
    for number, (where, row) in enumerate(read_jsonl(Path(args.questions))):  # of alpaca_eval.json, one array, too
        if args.suite == "alpaca_eval":
            row |= dict(question_id=number, turns=[row.get("instruction")])
        if row.get("question_id") is None or not row.get("turns") or not are_texts(row["turns"]):
            raise UserError(f"{where}: question {number}: not one of {args.suite}")
        temperature = MT_BENCH_TEMPERATURE.get(row.get("category"), 0.7)
        temperature = temperature if args.temperature is None else args.temperature
        questions.append(row | dict(temperature=temperature, where=where, messages=[]))
    return questions


def dialogue(tokenizer, messages, template):
    """Messages up to a user's as the prompt of the answer: by the chat template or in HH's form. Raises SkipRow."""
    if template == "hh":
        names = dict(user="Human", assistant="Assistant")
        return "".join(f"\n\n{names[m['role']]}: {m['content']}" for m in messages) + "\n\nAssistant:"
    return apply_template(tokenizer, messages, None, add_generation_prompt=True)


def bench_row(suite, question, generator):
    """An answer in the suite's format: FastChat's model_answer line or an entry of AlpacaEval's model_outputs.json."""
    name, said = question["question_id"], [message["content"] for message in question["messages"][1::2]]
    if suite == "mt_bench":
        return dict(question_id=name, answer_id=f"{generator}/{name}", model_id=generator,
                    choices=[dict(index=0, turns=said)], tstamp=question["tstamp"])
    return dict(dataset=question.get("dataset", ""), instruction=question["turns"][0], output=said[0],
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
CHOICE = re.compile(r"[\W_]*+((?i:more helpful|preferred)[\W_]++)?((?i:response|summary)[\W_]++)?([AB])[\W_]*+")
JUDGE_SAMPLING = dict(temperature=0, max_tokens=2048)  # FastChat's for MT-Bench
NEED_REFERENCE = ("math", "reasoning", "coding")  # MT-Bench's categories that are graded beside a reference answer
PATIENCE = dict(timeout=300, max_retries=8)  # seconds; retries after 429, 5xx, a time-out or no connection
GIVE_UP = 20  # requests failed in a row, each after its retries: the server is down


def parse_choice(text):
    """A judge's answer -> "A", "B" or None: of the last line that has it alone or after "More helpful:" and such."""
    found = [line[3] for line in map(CHOICE.fullmatch, text.splitlines()) if line]
    return found[-1] if found else None


def parse_rating(text):
    """A judge's answer -> the rating, 1 to 10, or None: like FastChat the first [[n]], or else the first [n]."""
    match = re.search(r"\[\[(\d+(?:\.\d*)?)\]\]", text) or re.search(r"\[(\d+(?:\.\d*)?)\]", text)
    return float(match[1]) if match and 1 <= float(match[1]) <= 10 else None


def request_seed(seed, prompt, j):
    """A number in [0, 2^31), a pure function of the seed, the prompt (text or messages) and the completion's index."""
    return int(hashlib.sha256(json.dumps([seed, prompt, j], sort_keys=True).encode()).hexdigest()[:8], 16) >> 1


def ask_all(items, args):
    """Send all requests of items (what it is for, its requests), one after another, of args.concurrency items at a
    time; yield (what for, replies), and send no more until that is kept: never are more replies paid for and not kept.
    Repeating is the openai client's business. A reply: text, finish_reason, tokens (None if the server does not say)
    and model. The key is read from the environment and goes nowhere else; where a server quotes it, it is cut out.
    Raises UserError: at once for a request that is refused, at the end if others failed."""
    try:
        import openai
    except ImportError:
        raise UserError("asking a model through --api needs `pip install openai`") from None
    if not re.fullmatch(r"https?://[^@?#\s]+", args.api):  # not repeated here: it may hold a password
        raise UserError("--api: want http(s)://HOST[:PORT]/PATH without credentials, such as http://localhost:8000/v1")
    key = os.environ.get("OPENAI_API_KEY", "").strip() or "no-key-is-set"  # a local server wants none
    if not (key.isascii() and key.isprintable()):
        raise UserError("OPENAI_API_KEY: a key has plain letters only")
    client = openai.OpenAI(api_key=key, base_url=args.api, **PATIENCE)
    redact = lambda words: words.replace(key, "[key]") if len(key) > 15 else words  # `x` or `EMPTY` is no secret

    def ask(request):
        answer = (client.chat.completions if "messages" in request else client.completions).create(**request)
        choice = answer.choices[0]
        text = choice.message.content if "messages" in request else choice.text
        return dict(text=redact(text or ""), finish_reason=choice.finish_reason, model=redact(answer.model or ""),
                    tokens=answer.usage.completion_tokens if answer.usage else None)

    unsent, running, failures, in_a_row = iter(tqdm(items, disable=None)), {}, [], 0
    pool = ThreadPoolExecutor(args.concurrency)
    try:
        while True:
            free = args.concurrency - len(running) if in_a_row < GIVE_UP else 0
            for what, requests in itertools.islice(unsent, free):
                running[pool.submit(list, map(ask, requests))] = what  # one after another, in a thread
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                what, in_a_row = running.pop(future), in_a_row + 1
                try:
                    yield what, future.result()
                    in_a_row = 0
                # The others: what a proxy's page or cut JSON leads to.
                except (openai.APIError, json.JSONDecodeError, AttributeError, LookupError, TypeError) as error:
                    why = redact(f"{type(error).__name__}: {' '.join(str(error).split())}")[:300]
                    failures.append(why)
                    status = getattr(error, "status_code", 500)
                    if status < 500 and status not in (408, 409, 429):
                        raise UserError(f"{args.api} refuses a request: {why}") from None
    finally:  # Ctrl-C, or a request refused: do not wait for what is under way
        pool.shutdown(wait=False, cancel_futures=True)
    if failures:
        raise UserError(f"{len(failures)} of {len(items)} requests failed, the first: {failures[0]}; after {GIVE_UP} in"
                        " a row no more is asked; the same command asks those that are missing")


def api_rows(prompts, args):
    """Like sampled_rows, from a server: each completion a request with its own seed; a text is continued as it is, a
    list of messages answered through the server's chat template. A prompt of whose requests one failed has no row."""
    how = dict(model=args.model, temperature=args.temperature, top_p=args.top_p, max_tokens=args.max_new_tokens)
    items = []
    for prompt in prompts:
        what = dict(prompt=prompt.text) if isinstance(prompt.text, str) else dict(messages=prompt.text)
        seeds = [request_seed(args.seed, prompt.text, j) for j in range(args.k)]
        items.append((prompt, [what | how | dict(seed=seed) for seed in seeds]))
    for prompt, replies in ask_all(items, args):
        stops = ["" if reply["finish_reason"] == "stop" else None for reply in replies]
        yield [sample_row(prompt, [(reply["text"], stop, reply["tokens"]) for reply, stop in zip(replies, stops)])]


def comparison_tasks(args):
    """-> the requests that compare samples, [(what one asks about, its messages)], and how many completions have
    nothing to be compared with. `completion_is` is the letter of our completion. Texts lose the blanks around them,
    which would tell the writers apart; an empty completion is judged like any other."""
    tasks, unmatched = [], 0
    others = read_samples(args.against) if args.against else []
    others = {json.dumps(row["prompt"]): row["completions"] for _, row in others}
    for where, row in read_samples(args.samples):
        prompt, said = row["prompt"], row["completions"]
        if not isinstance(prompt, str):
            raise UserError(f"{where}: the judge's prompt takes texts, this one is a list of messages")
        opponents = others.get(json.dumps(prompt), []) if args.against else row["references"][:1] * len(said)
        unmatched += max(0, len(said) - len(opponents))
        for j, (ours, theirs) in enumerate(zip(said, opponents)):
            letter = "AB"[request_seed(args.seed, prompt, j) % 2]
            a, b = (ours, theirs) if letter == "A" else (theirs, ours)
            content = COMPARE.format(prompt=prompt.strip(), a=a.strip(), b=b.strip())
            tasks.append((dict(prompt=prompt, j=j, completion_is=letter), [dict(role="user", content=content)]))
    return tasks, unmatched


def mt_bench_tasks(args):
    """Like comparison_tasks: the requests that grade MT-Bench answers one by one, turn 1 and turn 2, in FastChat's
    words; and how many questions have no answer."""
    folder, tasks, where = Path(args.mt_bench), [], args.samples
    try:
        templates = {row["name"]: row for _, row in read_jsonl(folder / "judge_prompts.jsonl")}
        questions = {row["question_id"]: row for _, row in read_jsonl(folder / "mt_bench/question.jsonl")}
        references = {row["question_id"]: row["choices"][0]["turns"]
                      for _, row in read_jsonl(folder / "mt_bench/reference_answer/gpt-4.jsonl")}
        for where, answer in read_jsonl(Path(args.samples)):
            name = answer["question_id"]
            question = questions.pop(name)  # an answer of another model to it is an error
            fields = dict(question=question["turns"], answer=answer["choices"][0]["turns"],
                          ref_answer=references.get(name, []))
            texts = {f"{field}_{k}": text for field, of_turns in fields.items() for k, text in enumerate(of_turns, 1)}
            texts |= dict(question=texts["question_1"], answer=texts["answer_1"])
            kind = "single-math-v1" if question["category"] in NEED_REFERENCE else "single-v1"
            for turn, template in enumerate((kind, f"{kind}-multi-turn")[: len(question["turns"])], 1):
                system = dict(role="system", content=templates[template]["system_prompt"])
                user = dict(role="user", content=templates[template]["prompt_template"].format(**texts))
                tasks.append((dict(question_id=name, category=question["category"], turn=turn), [system, user]))
    except (LookupError, TypeError) as error:
        raise UserError(f"{where}: does not fit {folder}, or answers a question twice: {error!r}") from None
    return tasks, len(questions)


def judge(args):
    """Verdicts of a judge behind an API: those that the ledger OUT lacks (delete a line to ask it again) are asked for,
    then all are scored. The key of one is the hash of its request and what it is about: a ledger serves many runs."""
    tasks, unmatched = (mt_bench_tasks if args.mt_bench else comparison_tasks)(args)
    if not tasks:
        raise UserError(f"{args.samples}: nothing to judge, {unmatched} without an opponent or an answer")
    out, wanted, failed = Path(args.out), {}, None  # wanted, by key: what it is about, request
    for about, messages in tasks:
        request = dict(model=args.judge, messages=messages, **JUDGE_SAMPLING)
        identity = json.dumps(dict(request, about=about), sort_keys=True, separators=(",", ":"))
        wanted[hashlib.sha256(identity.encode()).hexdigest()] = about, request
    ledger = read_own_rows(out, ["key", "verdict", "text"], ["key"])
    pending = [(key, [request]) for key, (_, request) in wanted.items() if key not in ledger]
    print_rank0(f"{out}: {len(wanted)} verdicts wanted, {len(pending)} of them still to be asked of {args.judge}")
    try:
        for key, (reply,) in ask_all(pending, args):
            verdict = (parse_rating if args.mt_bench else parse_choice)(reply["text"])
            ledger[key] = dict(key=key, judge=args.judge, **wanted[key][0], verdict=verdict, **reply)
            append_rows(out, [ledger[key]])
    except UserError as error:
        failed = error  # what there is, is scored
    verdicts = [(about, ledger[key]) for key, (about, _) in wanted.items() if key in ledger]
    scored = [(about, row["verdict"]) for about, row in verdicts if row["verdict"] is not None]
    malformed = {row["key"]: " ".join(row["text"].split())[:80] for _, row in verdicts if row["verdict"] is None}
    result = dict(unmatched=unmatched, verdicts_wanted=len(wanted), scored=len(scored), malformed=len(malformed),
                  missing=len(wanted) - len(verdicts))
    if scored:
        result |= (grade_result if args.mt_bench else comparison_result)(scored)
    # Malformed verdicts: in the judge's words; they are not scored.
    write_json(out.with_suffix(".summary.json"), vars(args) | result | dict(malformed_verdicts=malformed))
    print_rank0(f"{json.dumps(result, indent=2)}\n-> {out.with_suffix('.summary.json')}")
    if failed:
        raise failed


def comparison_result(scored):
    """[(about, "A" or "B")] -> win rate, the mean over prompts, its error; share_a: of A, 0.5 without position bias."""
    wins = {}
    for about, choice in scored:
        wins.setdefault(about["prompt"], []).append(float(choice == about["completion_is"]))
    win_rate, error = mean_and_error(torch.tensor([np.mean(of_prompt) for of_prompt in wins.values()]))
    share_a = sum(choice == "A" for _, choice in scored) / len(scored)
    return dict(prompts=len(wins), win_rate=win_rate, win_rate_se=error if len(wins) > 1 else None, share_a=share_a)


def grade_result(scored):
    """[(about, 1 to 10)] -> mean grades of categories and overall, a turn and, as FastChat pools them, of both."""
    grades = {}
    for about, rating in scored:
        for category, turn in itertools.product((about["category"], "overall"), (f"turn_{about['turn']}", "both")):
            grades.setdefault(category, {}).setdefault(turn, []).append(rating)
    means = {name: {turn: sum(rs) / len(rs) for turn, rs in turns.items()} for name, turns in grades.items()}
    return dict(grades=means)


# ------------------------------------------------------------------- plot: figures 3 to 6 and Table 1 from JSON lines
# Win rates in %, sqrt KL in sqrt nats, log-ratios and log_eps in nats, lengths in tokens. `x_se` is the standard error
# of the mean x over n seeds; of a single run that of its evaluation, over prompts; null where there is none.
LOOKS = {"dpo": ("#b04000", "s"), "is_dpo": ("#0060a0", "o"), "ipo": ("#d08a00", "v"), "is_ipo": ("#3a7d34", "^"),
         "chi_po": ("#7a3b8f", "D"), "rpo": ("#606060", "P"), "length_dpo": ("#8c6d46", "X"), "online": ("black", "*")}
COMPARED = ("dpo", "is_dpo")  # drawn thick, and with bands: those of seven losses would hide each other
LABELS = {"epoch": "epoch", "win_rate": "win rate (%)", "sqrt_kl": "√KL(π || ref) (√nats)",
          "ratio/chosen": "mean log π/ref, chosen (nats)", "ratio/rejected": "mean log π/ref, rejected (nats)",
          "weights/mean": "mean weight (capped)", "place": "log ε (nats a response; inf: no cap)",
          "peak_win_rate": "peak win rate (%)", "final_win_rate": "final win rate (%)",
          "final_sqrt_kl": "final √KL (√nats)"}
TRAINING = ["ratio/chosen", "ratio/rejected", "weights/mean"]
TABLE = ["peak_win_rate", "peak_sqrt_kl", "final_win_rate", "final_sqrt_kl", "drop", "ess_share", "final_length"]
TABLE_NOTE = """
Mean ± standard error over n seeds, of one run over prompts; win rates in %, √KL in √nats, lengths in tokens. The peak
is the best of the checkpoints and the reference, on the very prompts it is chosen by: biased upward. ESS share:
effective sample size of the weights over the step's pairs, median of the last tenth of the steps.
"""
METHOD, SETTING = ["beta", "lr", "loss"], ["beta", "lr", "loss", "log_eps"]
# What runs in one plot share, and what those of one setting share, too
COMMON = ["protocol", "epochs", "max_steps", "batch_size", "warmup_steps", "grad_clip", "max_length",
          "max_prompt_length"]
OF_SETTING = ["label_smoothing", "length_average", "eta", "alpha", "r_max", "ess_target"]


def read_run(directory):
    """-> flags of a run of train_pref.py (log_eps None where the loss has none), and name, steps (lines of
    metrics.jsonl), points (lines of golden.jsonl under its last settings, win rates in %), `golden settings`, protocol
    and data, fingerprints of the evaluation and of the pairs. Raises UserError."""
    metrics, golden = Path(directory, "metrics.jsonl"), Path(directory, "golden.jsonl")
    remedy = f"python evaluate.py golden --rm REWARD_MODEL --ref REFERENCE --data PROMPTS {directory}"
    logged, lines = (read_whole_lines(path) if path.is_file() else [] for path in (metrics, golden))
    header, *steps = [row for _, row in logged] or [{}]
    args, points = header.get("args"), {}
    if not isinstance(args, dict) or args.get("loss") not in LOOKS or not steps:
        raise UserError(f"{metrics}:1: not the header of a run of train_pref.py, or no steps after it")
    for where, row in lines:
        if row.get("settings") == lines[-1][1].get("settings"):
            measures = {name: row.get(name) for name in ("win_rate", "sqrt_kl", "length")}
            if not all(isinstance(value, (int, float)) and math.isfinite(value) for value in measures.values()):
                raise UserError(f"{where}: {measures} must be numbers: delete {golden} and run {remedy}")
            points[row["step"]] = row | dict(win_rate=100 * row["win_rate"], win_rate_se=100 * row["win_rate_se"])
    if 0 not in points or len(points) == 1:
        raise UserError(f"{golden}: no line of step 0, the reference, or none after it: run {remedy}")
    if max(points) < header["steps"]:
        print_rank0(f"{directory}: evaluated up to step {max(points)} of {header['steps']}: it stands for the final"
                    " policy")
    log_eps = args["log_eps"] if args["loss"].startswith("is_") else None
    points = [points[step] for step in sorted(points)]
    return args | {"name": directory, "log_eps": log_eps, "steps": steps, "points": points, "data": header.get("data"),
                   "golden settings": row["settings"], "protocol": row.get("protocol")}


def check_comparable(runs):
    """Raise UserError where runs were not trained and evaluated alike enough for a figure, or one comes twice."""
    for a, b in itertools.combinations(runs, 2):
        same_setting, same_seed = all(a[name] == b[name] for name in SETTING), a["seed"] == b["seed"]
        names = COMMON + OF_SETTING * same_setting
        if same_seed:  # another one may have its own data, reference and reward model
            names = names + ["golden settings", "data"]  # fingerprints: paths differ between machines
        differ = [f"{name} {a.get(name)!r} and {b.get(name)!r}" for name in names if a.get(name) != b.get(name)]
        if differ or (same_setting and same_seed):
            raise UserError(f"{a['name']} and {b['name']} do not belong in one plot:"
                            f" {'; '.join(differ) or 'the same setting and seed'}")


def average(runs, lines, names, key=()):
    """lines(run), dicts, of all runs -> DataFrame, a row a setting and value of the columns `key`: the means over n
    seeds of each seed's mean, and their standard errors, sd / sqrt(n); of a single seed the errors that it says."""
    import pandas as pd  # here: the other commands do not wait for it

    by, errors = [*SETTING, *key], [f"{name}_se" for name in names]
    rows = [line | {name: run[name] for name in (*SETTING, "seed")} for run in runs for line in lines(run)]
    kinds = {"loss": pd.CategoricalDtype(list(LOOKS))} | dict.fromkeys(["log_eps", *names, *errors], float)
    frame = pd.DataFrame(rows, columns=[*by, "seed", *names, *errors]).astype(kinds)
    seeds = frame.groupby([*by, "seed"], dropna=False, observed=True).mean().reset_index()
    groups = seeds.groupby(by, dropna=False, observed=True)
    spread = groups[names].sem().add_suffix("_se").fillna(groups[errors].mean())
    return pd.concat([groups.size().rename("n"), groups[names].mean(), spread], axis=1).reset_index()


def fit_curve(seeds, start, grid):
    """(a, b) of WR(d) = WR_sft + d (a - b log d), d = sqrt KL (Gao et al. 2022, Rafailov et al. 2024), by least squares
    with WR_sft = `start` fixed; the curve at `grid` (G,); 2.5 and 97.5 percentiles (2, G) of curves of 1,000 draws of
    seeds with replacement. A seed is an array (checkpoints, 2) of d > 0 and win rate, and stays whole; three have but
    ten different draws."""
    fits, picks = [], np.random.default_rng(0).integers(len(seeds), size=(1000, len(seeds)))
    for pick in [range(len(seeds)), *picks]:
        d, win_rates = np.concatenate([seeds[k] for k in pick]).T
        fits.append(np.linalg.lstsq(np.stack([d, -d * np.log(d)], -1), win_rates - start, rcond=None)[0])
    curves = [start + grid * (a - b * np.log(grid)) for a, b in fits]
    return fits[0], curves[0], np.percentile(curves[1:], [2.5, 97.5], axis=0)


def draw(rows, x, ys, ticks=None, **line):
    """A column of axes a (beta, lr), a line of axes a y; over x the means of each loss, with bars of one standard
    error. Full markers: the weighted losses."""
    from matplotlib.figure import Figure

    panels = rows.groupby(["beta", "lr"])
    figure = Figure(figsize=(max(9, 1 + 3.4 * len(panels)), 2 + 2.4 * len(ys)), layout="constrained")
    axes = figure.subplots(len(ys), len(panels), sharex="col", sharey="row", squeeze=False)
    for ((beta, lr), panel), column in zip(panels, axes.T):
        column[0].set_title(f"β = {beta:g}, lr {lr:g}", fontsize=10)
        column[-1].set_xlabel(LABELS[x])
        for (loss, mine), (ax, y) in itertools.product(panel.groupby("loss", observed=True), zip(column, ys)):
            color, marker = LOOKS[loss]
            look = dict(color=color, marker=marker, markersize=4, linewidth=1.8 if loss in COMPARED else 0.8,
                        fillstyle="full" if loss.startswith("is_") else "none")
            ax.errorbar(mine[x], mine[y], mine[f"{y}_se"], label=loss, elinewidth=0.8, capsize=2, **look | line)
        if ticks:
            column[-1].set_xticks(range(len(ticks)), ticks)
    for ax, y in zip(axes[:, 0], ys):
        ax.set_ylabel(LABELS[y])
    return figure


def draw_curves(runs, points):
    """Figure 3: means of the checkpoints; where each seed has three, the curve fitted to all seeds' own, with a star at
    its maximum (exp(a/b - 1), WR_sft + b d), where a - b log d - b = 0, if that is inside the data -> rows, figure."""
    import pandas as pd

    figure, rows = draw(points, "sqrt_kl", ["win_rate"], linestyle=""), []
    axes = dict(zip(points.groupby(["beta", "lr"]).groups, figure.axes))
    for row in points[points["step"] == 0].to_dict("records"):
        seeds = [np.array([(point["sqrt_kl"], point["win_rate"]) for point in run["points"][1:] if point["sqrt_kl"]])
                 for run in runs if all(run[name] == row[name] for name in METHOD)]
        if min(map(len, seeds)) < 3:
            continue
        d, start = np.concatenate(seeds)[:, 0], row["win_rate"]
        grid = np.linspace(1e-9, d.max(), 61)
        (a, b), curve, band = fit_curve(seeds, start, grid)
        peak = math.exp(a / b - 1) if b > 0 and a / b < 700 else math.nan  # none that a float holds
        inside = bool(d.min() <= peak <= d.max())
        rows.append({name: row[name] for name in (*SETTING, "n")}
                    | dict(start=start, a=a, b=b, peak_sqrt_kl=peak, peak_win_rate=start + b * peak, inside=inside))
        ax, color, compared = axes[row["beta"], row["lr"]], LOOKS[row["loss"]][0], row["loss"] in COMPARED
        ax.plot(grid, curve, color=color, linewidth=1.8 if compared else 0.8)
        if compared:
            ax.fill_between(grid, *band, color=color, alpha=0.12, linewidth=0)
        if inside:
            ax.plot(peak, start + b * peak, "*", color=color, markersize=13, mec="white")
    figure.axes[-1].plot([], [], "*", color="grey", markersize=11, label="peak of a fitted curve")
    return pd.DataFrame(rows), figure


def run_numbers(run):
    """What Table 1 says of one run: the measures of the final policy and of the peak, the best of the checkpoints and
    the reference; the drop between (points); the ESS share."""
    peak, final = max(run["points"], key=lambda point: point["win_rate"]), run["points"][-1]
    numbers = {f"{when}_{name}": x for when, point in dict(peak=peak, final=final).items() for name, x in point.items()}
    sizes = [line["weights/ess"] for line in run["steps"][-max(1, len(run["steps"]) // 10) :]]
    ess = np.nanmedian(np.array(sizes, dtype=float))  # no mean: an epoch's last step may be short. NaN: not finite
    return numbers | dict(drop=peak["win_rate"] - final["win_rate"], ess_share=ess / run["batch_size"])


def markdown_table(table):
    lines = [["loss", "beta", "lr", "log_eps", "n", *TABLE], ["---"] * (5 + len(TABLE))]
    for row in table.to_dict("records"):
        numbers = [f"{row[name]:.2f} ± {row[f'{name}_se']:.2f}" for name in TABLE]
        lines.append([str(row[name]) for name in lines[0][:5]] + numbers)
    text = "".join("| " + " | ".join(line) + " |\n" for line in lines)
    return text.replace(" ± nan", "").replace("nan", "-") + TABLE_NOTE


def plot(args):
    """Figures 3 to 6 and Table 1 of the runs given, which must belong together."""
    runs, out = sorted(map(read_run, args.runs), key=lambda run: run["seed"]), Path(args.out)
    check_comparable(runs)
    shown = [run for run in runs if run["log_eps"] in (None, args.log_eps)]
    if not shown:
        raise UserError(f"no run has log_eps {args.log_eps:g}, for figures 3, 4 and 6: choose another --log_eps")
    print_rank0(f"figures 3, 4, 6: {len(shown)} of {len(runs)} runs, those without a log_eps or of {args.log_eps:g}")
    table = average(runs, lambda run: [run_numbers(run)], TABLE)
    points = average(shown, lambda run: run["points"], ["epoch", "win_rate", "sqrt_kl"], ["step"])
    size = math.ceil(max(len(run["steps"]) for run in shown) / 20)
    binned = lambda run: [line | dict(first_step=(line["step"] - 1) // size * size + 1) for line in run["steps"]]
    bins = average(shown, binned, ["epoch", *TRAINING], ["first_step"])
    curves, figure3 = draw_curves(shown, points)
    figures = dict(figure3=(curves, figure3), figure4=(points, draw(points, "epoch", ["win_rate", "sqrt_kl"])),
                   figure6=(bins, draw(bins, "epoch", TRAINING)))
    ablation = table[table.groupby(METHOD, observed=True)["log_eps"].transform("nunique") > 1]
    if len(ablation):
        places, caps = ablation["log_eps"].rank(method="dense"), sorted(set(ablation["log_eps"]))
        ys = ["peak_win_rate", "final_win_rate", "final_sqrt_kl"]
        figures["figure5"] = ablation, draw(ablation.assign(place=places - 1), "place", ys, ticks=caps)

    if out.exists() and any(out.iterdir()) and not (out / "table1.jsonl").exists():
        raise UserError(f"{out} is not empty, and `plot` did not make it: choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    lock_for_writing(out)
    finite = lambda rows: rows.replace(math.inf, "inf")  # JSON has no infinity
    as_json = dict(orient="records", lines=True, double_precision=15)
    write_atomically(out / "table1.jsonl", lambda aside: finite(table).to_json(aside, **as_json))
    write_atomically(out / "table1.md", lambda aside: aside.write_text(markdown_table(table)))
    for stale in out.glob("figure5.*"):  # it would pass for one of these runs
        stale.unlink()
    for name, (rows, figure) in figures.items():
        legend = {label: handle for ax in figure.axes for handle, label in zip(*ax.get_legend_handles_labels())}  # once
        figure.legend(legend.values(), legend, loc="outside lower center", fontsize=8, frameon=False, ncols=len(legend))
        write_atomically(out / f"{name}.png", lambda aside: figure.savefig(aside, format="png", dpi=150))
        write_atomically(out / f"{name}.jsonl", lambda aside: finite(rows).to_json(aside, **as_json))
    print_rank0(f"{out}: {', '.join(sorted(figures))} and table1.md of {len(runs)} runs")


def main():
    args = parse_args()
    if args.command in ("judge", "plot"):
        init_distributed(0, 60, 0)  # one process; run_main takes leave of its group
    return dict(sample=sample, label=label, golden=golden, bench=bench, judge=judge, plot=plot)[args.command](args)


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


def split_into_micro_batches(lengths, micro_batch_size, world):
    """Deal a step's examples, whose token counts are `lengths`, to micro-batches -> rounds[k][rank] = [example].

    Longest first, neighbours together: little padding, and the ranks of a round work for about the same time. Every
    rank has the same number of rounds (collectives must match); a micro-batch may be empty when examples run out."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    n_groups = world * math.ceil(len(order) / (micro_batch_size * world))
    bounds = [len(order) * g // n_groups for g in range(n_groups + 1)]
    groups = [order[a:b] for a, b in zip(bounds, bounds[1:])]
    return [groups[k : k + world] for k in range(0, n_groups, world)]
# --- end shared: batches ---


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


class CastLinear(nn.Linear):
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
        self.q_proj = CastLinear(c.hidden_size, self.H * c.head_dim, bias=c.attention_bias)
        self.k_proj = CastLinear(c.hidden_size, self.K * c.head_dim, bias=c.attention_bias)
        self.v_proj = CastLinear(c.hidden_size, self.K * c.head_dim, bias=c.attention_bias)
        self.o_proj = CastLinear(self.H * c.head_dim, c.hidden_size, bias=c.attention_bias)

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
        self.gate_proj = CastLinear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = CastLinear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = CastLinear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

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


def build_model(make, device, precision, shard=False, compile_layers=False, checkpoint_activations=False):
    """make() -> a module whose `model` is the body, with float32 weights allocated but not yet filled: whole on each
    rank, or with `shard` FSDP2's share of it."""
    with torch.device("meta"):
        model = make()
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}[precision]
    model.model.dtype, model.model.checkpoint_activations = dtype, checkpoint_activations
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

    def forward(self, ids, positions, segments, predict, prompt=0):
        """-> rewards (S, 1), float32. predict (S,) indexes the flattened (B, T): each response's last token."""
        hidden = self.model(ids, positions, segments, prompt).flatten(0, 1)[predict]
        return self.score(hidden.to(torch.promote_types(hidden.dtype, torch.float32)))
# --- end shared: reward ---


if __name__ == "__main__":
    run_main(main)
