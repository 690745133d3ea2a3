"""Supervised fine-tuning of a Llama on demonstrations: the reference policy that preference training starts from.

The loss is the mean negative log-prob over the loss tokens of a whole step (all ranks, all micro-batches):

    L = - sum_{i, t} log pi(y_{i,t} | x_i, y_{i,<t}) / sum_i |y_i|

over the completion's tokens (EOS included) of {prompt, completion} rows, over every token after the first of {text}
rows. The examples of a step are packed into rows of --max_length tokens; no example sees another. The recipe of the
IS-DAA paper (Appendix C: TL;DR demonstrations and HH's chosen responses, pooled) is `--preset tldr+hh`.

    python train_sft.py                                                  # CPU: the toy task, random weights
    python train_sft.py --model DIR_OR_HUB_ID --data demonstrations.jsonl  # 1 GPU
    torchrun --nproc_per_node=4 train_sft.py --preset tldr+hh              # 4 GPUs, DDP; --shard past one's memory
    torchrun --nnodes=2 --nproc_per_node=4 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train_sft.py --shard ...

Units: log-probs in nats, lengths in tokens, batch sizes in examples, micro-batch sizes in rows; a step is an optimizer
step.
"""

import functools
import math
import random
import shlex
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

from kernels.logprob import linear_sequence_logps
from plumbing.checkpoint import find_model, load_trainer, load_weights, model_files, save_checkpoint, shard_like
from plumbing.data import (RowTexts, SkipRow, assistant_stop_id, lacking, load_rows, load_tokenizer, render_chat,
                           wrong_types)
from plumbing.process import UserError, catch_signals, init_distributed, on_rank_0, print_rank0, read_json, run_main
from plumbing.run import (Parser, StepLog, announce_schedule, checkpoint_to_resume, common_flags, count_step, interval,
                          is_due, model_card, open_tracker, parse_with_preset, run_header, save_or_stop, step_metrics)


# ------------------------------------------------------------------------------------------ examples, packing, the loss
class Example(NamedTuple):
    """Token ids; the loss is on the completion, of plain text (no prompt, or BOS alone) on all but the first token. The
    prompt begins with BOS where the tokenizer (of texts) or the chat template writes one; a completion that was not cut
    ends with its stop."""

    prompt: list
    completion: list


def split_example(row, tokenizer):
    """A data row -> RowTexts of prompt or None, [completion]. Raises SkipRow(kind)."""
    prompt, completion, columns = split_demonstration(row)
    rendered = isinstance(completion, list)
    if rendered:
        prompt, completion = render_chat(tokenizer, prompt, completion, row.get("tools"))
        columns = (*columns, "tools")
    return RowTexts(prompt=prompt, responses=[completion], rendered=rendered, columns=columns)


def pack(lengths, capacity):
    """First-fit decreasing: examples of `lengths` tokens -> rows (lists of examples) of at most `capacity` tokens."""
    rows = []
    room = []  # tokens left in each row
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        row = next((r for r, left in enumerate(room) if left >= lengths[i]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(capacity)
        rows[row].append(i)
        room[row] -= lengths[i]
    return rows


def collate_examples(packed_rows, device):
    """Rows of examples -> the arguments of Llama.forward; sequence s is the s-th example. An example's segment is its
    number in the row, from 1, so that it sees itself alone, and its positions start at 0."""
    rows = []
    predict = []  # (row, column) of the token before each target
    targets = []
    cu_seqlens = [0]
    for b, examples in enumerate(packed_rows):
        tokens = []
        positions = []
        segments = []
        for number, example in enumerate(examples, 1):
            start = len(tokens)
            ids = example.prompt + example.completion
            first = max(1, len(example.prompt))  # nothing predicts the first token of plain text
            tokens += ids
            positions += range(len(ids))
            segments += [number] * len(ids)
            predict += [(b, start + t - 1) for t in range(first, len(ids))]
            targets += ids[first:]
            cu_seqlens.append(len(targets))
        rows.append((tokens, positions, segments))
    return batch_tensors(rows, predict, device, targets=targets, cu_seqlens=cu_seqlens)


def step_loss(policy, examples, args, train):
    """Mean negative log-prob a token over all examples (the same list on all ranks), in nats; with `train` its gradient
    is left in the parameters. One all-reduce: every rank returns the same number."""
    rank = dist.get_rank()
    world = dist.get_world_size()
    device = next(policy.parameters()).device
    lengths = [len(prompt) + len(completion) for prompt, completion in examples]
    n_tokens = sum(lengths) - sum(max(1, len(prompt)) for prompt, _ in examples)
    rows = pack(lengths, args.max_length)
    rounds = split_into_micro_batches([sum(lengths[i] for i in row) for row in rows], args.micro_batch_size, world)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for k, micro in enumerate(rounds):
        picked = micro[rank] or [0]  # an idle rank computes row 0, times 0, so that collectives match
        # DDP sums the ranks' gradients once, with the last micro-batch; FSDP2 each time, as it keeps only its shard.
        policy.require_backward_grad_sync = k == len(rounds) - 1
        batch = collate_examples([[examples[i] for i in rows[r]] for r in picked], device)
        with torch.set_grad_enabled(train):
            logps, _ = policy(**batch)
            nll = -logps.sum()
            if not micro[rank]:
                nll = 0.0 * nll
            if train:
                (nll * (world / n_tokens)).backward()  # DDP and FSDP2 average over ranks: the sum / n_tokens remains
        total += nll.detach()
    dist.all_reduce(total)
    return total / n_tokens


@torch.no_grad()
def init_weights(model, std, seed):
    """Random weights: normal with the config's initializer_range, norms 1, biases 0. Whole tensors are drawn on CPU, so
    that the ranks, sharded or not, begin with the same ones."""
    generator = torch.Generator().manual_seed(seed)
    for name, param in model.named_parameters():
        if name.endswith("norm.weight"):
            param.fill_(1.0)
        elif name.endswith(".bias"):
            param.zero_()
        else:
            param.copy_(shard_like(param, torch.empty(param.shape).normal_(std=std, generator=generator)))
    return model


# ----------------------------------------------------------------------------------------------------------- the flags
HERE = Path(__file__).resolve().parent
# Appendix C of the paper; the 512 prompt tokens are its released code's.
PAPER = dict(model="meta-llama/Llama-3.2-3B", epochs=1, max_length=640, max_prompt_length=512, batch_size=64,
             micro_batch_size=4, lr=1e-6, warmup_steps=100, keep_state=1)
PRESETS = {
    "toy": dict(model=f"{HERE}/toy/base/config.json", data=f"{HERE}/toy/sft.jsonl.gz",
                eval_data=f"{HERE}/toy/sft_eval.jsonl.gz", epochs=4, max_length=128, max_prompt_length=96,
                batch_size=48, micro_batch_size=16, lr=3e-3, warmup_steps=200, save_every=400, eval_every=200,
                threads=1),
    "paper": dict(PAPER, eval_data=""),
    "tldr": dict(PAPER, data="tldr", eval_data="tldr"),
    "hh": dict(PAPER, data="hh", eval_data="hh"),
    "tldr+hh": dict(PAPER, data="tldr+hh", eval_data="tldr+hh"),
}
# Hub datasets that a name stands for: id, train split, held-out split, the columns read.
RECIPES = {
    "tldr": ("trl-lib/tldr", "train", "validation[:1024]", ("prompt", "completion")),
    "hh": ("Anthropic/hh-rlhf", "train", "test[:1024]", ("chosen",)),  # the prompt is in it
}


def parse_args(argv=None):
    parser = Parser(description="Supervised fine-tuning on demonstrations or text.")
    common_flags(parser)
    parser.add_argument("--kernel", choices=["auto", "triton", "torch"], default="auto",
                        help="log-prob kernel; auto: triton on a GPU")
    args = parse_with_preset(parser, PRESETS, argv)
    args.out = args.out or f"out/sft-{args.preset}"
    return args


# ------------------------------------------------------------------------------------------------------------- the run
def main():
    args = parse_args()
    _, world, device = init_distributed(args.seed, args.timeout, args.threads)
    out = Path(args.out)
    model_dir = find_model(args.model)

    # A new run, or one to go on with
    header = on_rank_0(lambda: run_header("train_sft", args, world, device, dict(model=model_dir)))
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
    reading = dict(row_type=Example, split=split_example, recipes=RECIPES, tokenizer=tokenizer,
                   vocab_size=config.vocab_size, max_length=args.max_length, max_prompt_length=args.max_prompt_length)
    examples = load_rows(out / "data.safetensors", header, source=args.data, held_out=False, **reading)
    eval_examples = load_rows(out / "data_eval.safetensors", header, source=args.eval_data, held_out=True, **reading)
    steps_per_epoch = math.ceil(len(examples) / args.batch_size)
    total = min(args.epochs * steps_per_epoch, args.max_steps or math.inf)
    header |= dict(examples=len(examples), steps=total)

    # Policy and optimizer
    policy = build_model(lambda: Llama(config, args.kernel), device, args.precision, shard=args.shard,
                         compile_layers=args.compile, checkpoint_activations=args.checkpoint_activations)
    if args.model.endswith("config.json") and not resumed:
        init_weights(policy, config.initializer_range, args.seed)
    else:
        load_weights(policy, begin_dir)
    files = model_files(begin_dir, tokenizer, assistant_stop_id(tokenizer),
                        architectures=[architecture(config, "ForCausalLM")])
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, eps=1e-5, weight_decay=0.0, fused=True)
    state = dict(step=0, updates=0, num_tokens=0, skipped=0, skipped_in_a_row=0)
    if resumed:
        state = load_trainer(resumed, policy, optimizer)
        print_rank0(f"resumed from {resumed}")
    parallel_policy = policy  # what a step calls: under DDP its wrapper, sharded or alone itself
    if world > 1 and not args.shard:
        batch = collate_examples([[examples[0]]], device)
        parallel_policy = data_parallel(policy, lambda model: model(**batch)[0].sum())
    size = sum(p.numel() for p in policy.parameters()) / 1e6
    print_rank0(f"sft: {size:.2f}M parameters, {len(examples)} examples, {total} steps of {args.batch_size}, {world} x"
                f" {header['device']}, {args.precision} -> {out}")
    announce_schedule(args, "examples", len(examples), total)

    def save(directory):
        save_checkpoint(directory, model=policy, tokenizer=tokenizer, files=files, run=header["run"],
                        optimizer=optimizer, state=state)

    log = StepLog(out / "metrics.jsonl", header, resumed, steps_done=state["step"], total=total,
                  log_every=args.log_every, track=args.track)
    signals = catch_signals()
    began = time.perf_counter()
    for step in range(state["step"] + 1, total + 1):
        step_began = time.perf_counter()
        epoch, k = divmod(step - 1, steps_per_epoch)
        picked = epoch_order(len(examples), args.seed, epoch)[k * args.batch_size : (k + 1) * args.batch_size]
        batch = [examples[i] for i in picked]
        lr = learning_rate(step, total, args.warmup_steps, args.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = step_loss(parallel_policy, batch, args, train=True)
        grad_norm, applied = clip_and_step(parallel_policy, optimizer, args.grad_clip, loss.isfinite())

        # Log
        step_s = time.perf_counter() - step_began
        n_tokens = sum(len(prompt) + len(completion) for prompt, completion in batch)
        count_step(state, applied=applied, n_tokens=n_tokens)
        metrics = {"loss": loss.item()}
        metrics |= step_metrics(state, grad_norm=grad_norm, lr=lr, epoch=step / steps_per_epoch, n_tokens=n_tokens,
                                step_s=step_s)
        if eval_examples and is_due(step, interval(args.eval_every, total), total):
            metrics["eval_loss"] = step_loss(policy, eval_examples, args, train=False).item()
        line = (f"step {step}/{total} | loss {metrics['loss']:.4f} | norm {grad_norm:.3f} | lr {lr:.2e}"
                f" | {1e3 * step_s:.0f} ms | {metrics['tokens_per_s']:.0f} tok/s")
        if "eval_loss" in metrics:
            line += f" || held out: loss {metrics['eval_loss']:.4f}"
        log.write(step, metrics, line, applied)

        # Save, stop
        code = save_or_stop(out, state, signals, save, save_every=interval(args.save_every, total), keep=args.keep,
                            keep_state=args.keep_state)
        if code:
            return code

    log.close(state)
    files |= {"README.md": model_card(header, "AutoModelForCausalLM")}
    save_checkpoint(out / "final", model=policy, tokenizer=tokenizer, files=files, run=header["run"],
                    save_dtype=args.save_dtype)
    print_rank0(f"done: {total} steps in {time.perf_counter() - began:.0f} s; model in {out}/final")
    final = shlex.quote(str(out / "final"))
    print_rank0(f"next: python {HERE}/train_rm.py --model {final} --data LABELLED_PAIRS, or python"
                f" {HERE}/evaluate.py sample --model {final} --data PROMPTS --temperature 1 --top_p 1 --out"
                " samples.jsonl")
    return 0


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
