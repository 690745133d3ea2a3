"""Peak memory of an optimizer step on a GPU, simulated: fake tensors, which have shapes and no bytes. No GPU is needed.

    python tests/memory.py [--shapes 3b] [--out results/memory_h100_simulated.jsonl]      # all shapes: 10 minutes

The trainers' own train_step, reward_step, build, data_parallel and AdamW run on Llamas of real shapes. Every live
storage is counted, rounded up to 512 bytes as CUDA's allocator does; the peak is that of a second step, of two
micro-batches of 4 pairs a rank. torch without CUDA has no fake CUDA tensors, so they are the CPU's, and what a GPU runs
otherwise is replaced by what holds and makes the same tensors: attention, RMSNorm, the log-prob kernels, DDP (whose
buckets are the gradients). Not counted: CUDA's context, NCCL's buffers, cuBLAS's workspaces and fragmentation, together
some 2 to 4 GB. GB are 1e9 bytes.
"""

import argparse
import functools
import gc
import json
import sys
import weakref
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig

import kernels.logprob
import train_pref
import train_rm

LLAMA3 = dict(vocab_size=128256, num_key_value_heads=8, rms_norm_eps=1e-5)
SHAPES = {
    "1b": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, head_dim=64,
               tie_word_embeddings=True),
    "3b": dict(hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24, head_dim=128,
               tie_word_embeddings=True),
    "8b": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, head_dim=128),
}
# Shape, reward model, --shard. 8B needs 128 GB without.
CASES = [("1b", False, False), ("1b", False, True), ("3b", False, False), ("3b", False, True), ("8b", False, True),
         ("8b", True, True)]
LENGTHS = [(512, 128, 128), (128, 512, 512)]  # tokens of prompt, chosen, rejected: TL;DR's longest, UltraFeedback's
CPU, MICRO, SHARDS = torch.device("cpu"), 4, 4
G = 1e9


class Memory(TorchDispatchMode):
    """Counts the bytes of all storages that live while it is on: now, and at the peak."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0

    def see(self, storage):
        key, size = storage._cdata, -(-storage.nbytes() // 512) * 512
        if key not in self.sizes:
            weakref.finalize(storage, self.forget, key)
        self.now += size - self.sizes.get(key, 0)
        self.sizes[key] = size
        self.peak = max(self.peak, self.now)

    def forget(self, key):
        self.now -= self.sizes.pop(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(t, train_pref.DTensor) for t in types):
            return NotImplemented  # it comes back as operations on what this rank holds
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                self.see(tensor.untyped_storage())
        return out


# ------------------------------------------------------------------------------------------ what a GPU runs otherwise
class Attention(torch.autograd.Function):
    """Flash and memory-efficient attention: the output, the log-sums; backward a float32 gradient of the queries."""

    @staticmethod
    def forward(ctx, q, k, v, mask):
        out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:3], dtype=torch.float32), mask)
        return out

    @staticmethod
    def backward(ctx, g):
        q, k, v, _, log_sums, _ = ctx.saved_tensors
        sums, accumulated = torch.empty_like(log_sums), torch.empty_like(q, dtype=torch.float32)
        del sums, accumulated
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None


class FusedRMSNorm(torch.autograd.Function):
    """Keeps its input and one number a row."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight, x.new_empty(*x.shape[:-1], 1, dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, g):
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


class DataParallel(nn.Module):
    """DDP with gradient_as_bucket_view: its buckets are the gradients, so it holds nothing more."""

    def __init__(self, module, gradient_as_bucket_view):
        super().__init__()
        assert gradient_as_bucket_view and all(p.grad is not None for p in module.parameters())
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def become_a_gpu(memory):
    F.scaled_dot_product_attention = lambda q, k, v, attn_mask=None, **causal: Attention.apply(q, k, v, attn_mask)
    F.rms_norm = lambda x, shape, weight, eps: FusedRMSNorm.apply(x, weight)
    K = kernels.logprob
    K._by_device = lambda table, x: table["gpu"]
    K._product_dtypes = lambda hidden: (hidden.dtype, hidden.dtype)  # bf16's, on a GPU
    K._product = lambda a, b, out, add=False: out
    K._check_rows = lambda x, name, targets, cu_seqlens, V: (targets, cu_seqlens)  # it looks at no value there
    K._use_triton = lambda kernel, x: True
    K.row_stats_ = K.dlogits_ = lambda *args: None
    K.sequence_sums = lambda token_logps, cu_seqlens, use_triton: token_logps.new_empty(len(cu_seqlens) - 1)
    for script in (train_pref, train_rm):
        script.DistributedDataParallel = DataParallel
        script.bool = lambda tensor: True  # an update is applied, whatever the numbers that are not there
    torch.Tensor.item = lambda tensor: 1.0
    nn.Module.to_empty = lambda module, device: module  # it cannot exchange fake parameters; `make` makes them there
    resize = torch.UntypedStorage.resize_

    def seen_resize(storage, size):  # FSDP2 frees and takes gathered weights so
        resize(storage, size)
        memory.see(storage)

    torch.UntypedStorage.resize_ = seen_resize


# ---------------------------------------------------------------------------------------------------------- the steps
def simulate(memory, shape, reward, shard, checkpoint_activations, lengths, layers=None):
    """-> bytes: held between steps (weights, AdamW's state, under DDP gradients), and the peak of a step."""
    gc.collect()
    began = memory.now
    c = LlamaConfig(**LLAMA3 | SHAPES[shape] | (dict(num_hidden_layers=layers) if layers else {}))
    world = SHARDS if shard else 1  # as many ranks as share the weights; DDP's hold the same, however many
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    script = train_rm if reward else train_pref
    # The mesh of all ranks, which fully_shard makes where none is given; of real tensors, for it reads them.
    script.fully_shard = functools.partial(fully_shard, mesh=init_device_mesh("cpu", (world,)))
    with FakeTensorMode(allow_non_fake_inputs=True), memory:

        def make():
            with CPU:
                return train_rm.RewardModel(c) if reward else train_pref.Llama(c, "triton")

        model = body = script.build_model(make, CPU, "bf16", shard, False, checkpoint_activations)
        gc.collect()
        args = script.parse_args(["--model", "m", "--data", "d", "--micro_batch_size", str(MICRO)])
        pair = script.Pair(*([0] * n for n in lengths))
        if not shard:
            batch = (train_rm.collate_responses if reward else train_pref.collate_pairs)([pair], True, CPU)
            model = script.data_parallel(body, lambda m: m(**batch)[0].sum())
            del batch
        optimizer = torch.optim.AdamW(body.parameters(), lr=1e-6, eps=1e-5, weight_decay=0.0, fused=True)
        pairs = [pair] * (2 * MICRO * world)
        for _ in range(2):
            memory.peak = memory.now
            if reward:
                train_rm.reward_step(model, optimizer, pairs, args)
            else:
                train_pref.train_step(model, optimizer, pairs, torch.zeros(len(pairs), 2), args)
            gc.collect()
        held, peak = memory.now - began, memory.peak - began
    dist.destroy_process_group()
    return held, peak


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--out", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    rows, memory = [], Memory()
    become_a_gpu(memory)
    print("| a GPU of | rows of P + C + R tokens | held between steps, GB | peak | with --checkpoint_activations |")
    print("|---|---|---|---|---|")
    for shape, reward, shard in CASES:
        for lengths in LENGTHS if shape in options.shapes else []:
            found = []
            for checkpointed in (False, True):
                held, peak = simulate(memory, shape, reward, shard, checkpointed, lengths)
                found.append(peak / G)
                rows.append(dict(
                    simulated=True, torch=torch.__version__, shape=shape, reward_model=reward, lengths=lengths,
                    micro_batch_size=MICRO, shard=SHARDS if shard else 0, checkpoint_activations=checkpointed,
                    held_gb=round(held / G, 2), peak_gb=round(peak / G, 2)))
            name = f"{shape}{' reward model' if reward else ''}, {f'--shard on {SHARDS} GPUs' if shard else 'DDP'}"
            tokens = " + ".join(map(str, lengths))
            print(f"| {name} | {tokens} | {held / G:.1f} | {found[0]:.1f} | {found[1]:.1f} |", flush=True)
    if options.out:
        options.out.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
