"""On a bare GPU: steps of train_pref.py on random Llamas of real shapes (time, rate, memory); attention by backend.

    python tests/gpu_step.py --shape 3b --ddp [--shard] [--compile] [--out rows.jsonl]
        [--lengths tldr max uf] [--activations kept checkpointed]
    python tests/gpu_step.py --attention [--out rows.jsonl]

--ddp wraps even a group of one in DDP, as several GPUs would, so that its buckets are seen in the memory. Lengths are
drawn anew for every step, as in training. TFLOP/s counts what the loss asks for: 6 P_body t + 6 r D V + 6 L H d t^2 a
pair of t tokens, r of them in the head. Attention is compared with float32's plain formula, as max |error| of the
output and of all three gradients, under the mask of a shared prompt.
"""

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig

import train_pref as tp
from plumbing.process import peak_memory_gb

SHAPES = {
    "tiny": dict(vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=8),
    "1b": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, head_dim=64),
    "3b": dict(hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24, head_dim=128),
}
LLAMA3 = dict(vocab_size=128256, num_key_value_heads=8, rms_norm_eps=1e-5, tie_word_embeddings=True)
LENGTHS = {"tldr": None, "max": (512, 128, 128), "uf": (128, 512, 512)}  # tokens of prompt, chosen, rejected


def draw_pair(rng, vocab_size, lengths):
    lengths = lengths or (min(512, max(60, int(rng.gauss(351, 110)))), *(max(5, int(rng.gauss(38, 12))) for _ in "wl"))
    return tp.Pair(*([rng.randrange(vocab_size) for _ in range(n)] for n in lengths))


def needed_flops(policy, c, pair):
    """The loss's own FLOPs, forward and backward: each prompt once, response rows alone in the head."""
    body = sum(p.numel() for name, p in policy.named_parameters() if ".layers." in name)
    t, r = sum(map(len, pair)), len(pair.chosen) + len(pair.rejected)
    attention = 6 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * t**2
    return 6 * body * t + 6 * r * c.hidden_size * c.vocab_size + attention


def steps(options, world, device):
    """Run the steps -> a row for all lengths and activations: medians over all steps but the first."""
    c = LlamaConfig(**LLAMA3 | SHAPES[options.shape])
    precision = "bf16" if device.type == "cuda" else "fp32"
    policy = tp.build_model(lambda: tp.Llama(c, "auto"), device, precision, options.shard, options.compile)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, param in policy.named_parameters():
            local = param.to_local() if isinstance(param, tp.DTensor) else param
            local.fill_(1.0) if name.endswith("norm.weight") else local.normal_(std=0.02)
    rng = random.Random(0)
    first = tp.collate_pairs([draw_pair(rng, c.vocab_size, None)], True, device)
    model = tp.data_parallel(policy, lambda m: m(**first)[0].sum()) if options.ddp else policy
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6, eps=1e-5, weight_decay=0.0, fused=True)
    flags = ["--loss", "dpo", "--model", "m", "--data", "d", "--micro_batch_size", str(options.micro_batch_size)]
    args = tp.parse_args(flags)
    for lengths in options.lengths:
        for activations in options.activations:
            policy.model.checkpoint_activations = activations == "checkpointed"
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            seconds, rates = [], []
            for _ in range(options.steps):
                pairs = [draw_pair(rng, c.vocab_size, LENGTHS[lengths]) for _ in range(options.pairs)]
                began = time.perf_counter()
                ref = torch.zeros(len(pairs), 2)
                _, norm, applied = tp.train_step(model, optimizer, pairs, ref, args)  # reads the norm
                seconds.append(time.perf_counter() - began)
                rates.append(sum(needed_flops(policy, c, pair) for pair in pairs) / world / seconds[-1] / 1e12)
            times = dict(ms=1e3 * statistics.median(seconds[1:]), first_ms=1e3 * seconds[0])
            yield dict(lengths=lengths, activations=activations, **times, tflops=statistics.median(rates[1:]),
                       peak_gb=peak_memory_gb(), norm=norm, applied=applied)


def attention(device):
    """-> rows: max |error| of output and gradients of each backend against float32's formula, under a pair's mask."""
    for T in (64, 128, 192, 320, 576, 640, 832, 1088, 1280) if device.type == "cuda" else (64, 192):
        generator = torch.Generator(device).manual_seed(T)
        q, k, v, g = (torch.randn(2, 4, T, 64, generator=generator, device=device) for _ in range(4))
        segments = torch.tensor([0] * (T // 2) + [1] * (T // 4) + [2] * (T - T // 2 - T // 4), device=device)
        query, key = segments[:, None], segments[None, :]
        mask = torch.where(((query == key) | ((key == 0) & (query > 0))).tril(), 0.0, -torch.inf)[None, None]
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

        def run(dtype, backend):
            leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
            with sdpa_kernel(backend):
                out = F.scaled_dot_product_attention(*leaves, attn_mask=mask.to(dtype))
            return [out, *torch.autograd.grad(out, leaves, g.to(dtype))]

        exact = run(torch.float32, SDPBackend.MATH)
        for backend in (SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            try:
                errors = [(a.float() - b).abs().max().item() for a, b in zip(run(dtype, backend), exact)]
                yield dict(T=T, backend=backend.name, **dict(zip(("out", "dq", "dk", "dv"), errors)))
            except RuntimeError as error:
                yield dict(T=T, backend=backend.name, unavailable=str(error).splitlines()[0][:100])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--lengths", nargs="+", choices=LENGTHS, default=["tldr"])
    parser.add_argument("--activations", nargs="+", choices=["kept", "checkpointed"], default=["kept"])
    parser.add_argument("--pairs", type=int, default=16, help="a step")
    parser.add_argument("--micro_batch_size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6)
    for flag in ("ddp", "shard", "compile", "attention"):
        parser.add_argument(f"--{flag}", action="store_true")
    parser.add_argument("--out", type=Path, help="append the rows to this file")
    options = parser.parse_args()
    rank, world, device = tp.init_distributed(0, 600, 0)
    rows = attention(device) if options.attention else steps(options, world, device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    asked = {k: v for k, v in vars(options).items() if k not in ("out", "attention")}
    for row in rows:
        row = dict(device=name, torch=torch.__version__, **({} if options.attention else asked)) | row
        print(json.dumps(row), flush=True)
        if options.out and rank == 0:
            with options.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
