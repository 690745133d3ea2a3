"""On a bare GPU: designs for the weights' casts and for attention, beside what train_pref.py does.

    python tests/gpu_designs.py [--shape 3b] [--micro_batch_size 4 16] [--out rows.jsonl]

Weights: a step of 16 pairs. `master` is train_pref.py's way: float32 weights, each cast to bf16
where it is used, in every micro-batch; its gradient is cast to float32 and added. `autocast` leaves the casts to one
torch.autocast around all micro-batches, which keeps them for its length. `copy` holds a bf16 copy of the layers'
matrices, made again after each optimizer step, whose gradients are added to float32 sums by themselves. `compiled` is
`master` with --compile. AdamW's rate is 0, so that all must give the same loss, and `copy` the same gradient norm to
the bit. busy_ms is the time of the kernels, of which there are `launches`: where it is far below the step's, the host is
what the step waits for.

Attention: forward and backward of one layer, prompts shared, projections left out. `masked` is train_pref.py's way: the
prompt causal, the responses under a mask. `varlen` is flash attention over packed sequences, each response's queries
beside its keys and the prompt's, copied. `error` is the largest of out, dq, dk and dv beside float32's plain formula,
relative (Frobenius).
"""

import argparse
import contextlib
import functools
import json
import random
import statistics
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig

import train_pref as tp
from gpu_step import LLAMA3, SHAPES, draw_pair
from kernels.bench import seconds
from plumbing.process import peak_memory_gb

PAIRS = 16


# --------------------------------------------------------------------------------------------------- the weights' casts
@contextlib.contextmanager
def forward_of_linear(forward):
    before = tp.CastLinear.forward
    tp.CastLinear.forward = forward
    yield
    tp.CastLinear.forward = before


def master_design(policy):
    return tp.train_step


def compiled_design(policy):
    for layer in policy.model.layers:
        layer.compile(dynamic=True)
    return tp.train_step


def autocast_design(policy):
    device_type = next(policy.parameters()).device.type

    def step(*args):
        with forward_of_linear(lambda self, x: F.linear(x, self.weight)), torch.autocast(device_type, torch.bfloat16):
            return tp.train_step(*args)

    return step


def copy_design(policy):
    linears = [module for module in policy.modules() if isinstance(module, tp.CastLinear)]
    masters = [linear.weight for linear in linears]
    copies = [weight.detach().to(torch.bfloat16).requires_grad_() for weight in masters]
    sums = [torch.zeros_like(weight) for weight in masters]
    for linear, copy, total in zip(linears, copies, sums):
        copy.grad_dtype = None  # any: its gradient is a float32 sum
        copy.grad = total
        linear.__dict__["copy"] = copy  # no parameter of the module

    def step(*args):
        for weight, total in zip(masters, sums):
            weight.grad = total  # the trainer takes it away after each step
        with forward_of_linear(lambda self, x: F.linear(x, self.copy)):
            result = tp.train_step(*args)
        with torch.no_grad():
            torch._foreach_zero_(sums)
            torch._foreach_copy_(copies, masters)
        return result

    return step


def kernels_of(run, device):
    """-> milliseconds of a run's kernels on the GPU, and how many they are."""
    if device.type != "cuda":
        return None, None
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        run()
        torch.cuda.synchronize()
    events = [event for event in profiled.key_averages() if event.device_type.name == "CUDA"]
    return sum(event.self_device_time_total for event in events) / 1e3, sum(event.count for event in events)


def weights(shape, micro_batch_size, steps, device):
    """-> a row a design; the first is run again at the end."""
    c = LlamaConfig(**LLAMA3 | SHAPES[shape])
    torch.manual_seed(0)
    policy = tp.build_model(lambda: tp.Llama(c), device, "bf16")
    with torch.no_grad():
        for name, param in policy.named_parameters():
            param.fill_(1.0) if name.endswith("norm.weight") else param.normal_(std=0.02)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.0, weight_decay=0.0, fused=True)
    args = tp.parse_args(f"--loss dpo --model m --data d --micro_batch_size {micro_batch_size}".split())
    rng = random.Random(0)
    pairs = [draw_pair(rng, c.vocab_size, (6, 3, 3) if shape == "tiny" else None) for _ in range(PAIRS)]
    ref = torch.zeros(PAIRS, 2)
    for design in (master_design, autocast_design, copy_design, compiled_design, master_design):
        step, milliseconds = design(policy), []
        run = functools.partial(step, policy, optimizer, pairs, ref, args)
        for _ in range(steps + 2):  # the first two compile
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            logps, norm, applied = run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            milliseconds.append(1e3 * (time.perf_counter() - began))
        peak_gb = peak_memory_gb()
        busy_ms, launches = kernels_of(run, device)
        yield dict(kind="weights", design=design.__name__.split("_")[0], shape=shape, pairs=PAIRS,
                   micro_batch_size=micro_batch_size, tokens=sum(len(ids) for pair in pairs for ids in pair),
                   ms=milliseconds[2:], median_ms=statistics.median(milliseconds[2:]), busy_ms=busy_ms,
                   launches=launches, logps_sum=logps.double().sum().item(), norm=norm, applied=applied,
                   peak_gb=peak_gb)
        for module in policy.modules():
            module.__dict__.pop("copy", None)
            module._compiled_call_impl = None
        step = run = None  # and the copies with them


# -------------------------------------------------------------------------------------------------------------- attention
def packed(P, C, R):
    """Cumulative lengths of the queries and keys of a pair's three sequences, prompt, chosen, rejected, and which
    columns of the row [prompt | chosen | rejected] the keys are."""
    prompt = torch.arange(P)
    keys = [prompt, torch.arange(P + C), torch.cat([prompt, torch.arange(P + C, P + C + R)])]
    return [P, C, R], [len(key) for key in keys], torch.cat(keys)


def attention_designs(H, K, D, B, P, C, R, device):
    """-> {name: run(q, k, v)} of q (B, H, T, D), k and v (B, K, T, D), giving (B, H, T, D)."""
    T = P + C + R
    segments = torch.tensor([[0] * P + [1] * C + [2] * R] * B, device=device)
    mask = tp.attention_mask(segments[:, P:], segments, torch.bfloat16)

    def masked(q, k, v):
        k, v = (x.repeat_interleave(H // K, dim=1) for x in (k, v))
        out = F.scaled_dot_product_attention(q[:, :, P:], k, v, attn_mask=mask)
        of_prompt = F.scaled_dot_product_attention(q[:, :, :P], k[:, :, :P], v[:, :, :P], is_causal=True)
        return torch.cat((of_prompt, out), dim=2)

    lengths_q, lengths_k, columns = packed(P, C, R)
    bounds = lambda lengths: torch.tensor([0, *lengths * B], device=device).cumsum(0).to(torch.int32)
    bounds_q, bounds_k = bounds(lengths_q), bounds(lengths_k)
    columns = torch.cat([columns + b * T for b in range(B)]).to(device)

    def varlen(q, k, v):
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # (B T, heads, D)
        out = varlen_attn(q, k[columns], v[columns], bounds_q, bounds_k, max(lengths_q), max(lengths_k),
                          window_size=(-1, 0))
        return out.unflatten(0, (B, T)).transpose(1, 2)

    return {"masked": masked, "varlen": varlen}


def attention(device, runs=20):
    """-> a row a design and length."""
    H, K, D, B = 24, 8, 128, 4  # of a 3B Llama
    for P, C, R in ((512, 64, 64), (3072, 512, 512)):
        T = P + C + R
        generator = torch.Generator(device).manual_seed(T)
        draw = lambda heads: torch.randn(B, heads, T, D, generator=generator, device=device)
        exact_leaves = [draw(heads).requires_grad_() for heads in (H, K, K)]
        gradient = draw(H)
        segments = torch.tensor([[0] * P + [1] * C + [2] * R] * B, device=device)
        with sdpa_kernel(SDPBackend.MATH):
            q, k, v = exact_leaves
            out = F.scaled_dot_product_attention(q, *(x.repeat_interleave(H // K, dim=1) for x in (k, v)),
                                                 attn_mask=tp.attention_mask(segments, segments, torch.float32))
        exact = [out, *torch.autograd.grad(out, exact_leaves, gradient)]
        for name, run in attention_designs(H, K, D, B, P, C, R, device).items():
            leaves = [leaf.detach().bfloat16().requires_grad_() for leaf in exact_leaves]

            def both():
                out = run(*leaves)
                return [out, *torch.autograd.grad(out, leaves, gradient.bfloat16())]

            errors = [((a.float() - b).norm() / b.norm()).item() for a, b in zip(both(), exact)]
            seconds_taken = [seconds(both, device) for _ in range(runs)]
            yield dict(kind="attention", design=name, P=P, C=C, R=R, B=B, heads=H, kv_heads=K, head_dim=D,
                       ms=[1e3 * s for s in seconds_taken], median_ms=1e3 * statistics.median(seconds_taken),
                       error=max(errors))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--micro_batch_size", type=int, nargs="+", default=[4])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--out", type=Path, help="append the rows to this file")
    options = parser.parse_args()
    _, _, device = tp.init_distributed(0, 600, 0)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    parts = [weights(options.shape, size, options.steps, device) for size in options.micro_batch_size]
    if device.type == "cuda":  # varlen_attn is flash attention's
        parts.insert(0, attention(device))
    for rows in parts:
        for row in rows:
            row = dict(device=name, torch=torch.__version__) | row
            print(json.dumps({key: value for key, value in row.items() if key != "ms"}), flush=True)
            if options.out:
                with options.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
