"""From a file of pairs to the first batch: CPU time and memory of train_pref.py, of another version, of TRL.

    python tests/bench_data.py [--pairs 10000] [--before DIR] [--ranks 1 4] [--out rows.jsonl]

The pairs are made here, TL;DR-like (1.8 kB a pair), and tokenized with the stories260K model's tokenizer in ../shared.
Each start is made of processes of its own, a rank each, that do what main() does up to the first batch, and wait for
each other before they look at their memory:

    ours     a first start (rank 0 tokenizes once, into OUT/data.safetensors), then a second one with the same OUT
    before   the train_pref.py in --before, of a version that had load_pairs: every rank tokenizes at every start
    trl      DPOTrainer's own preparation through `datasets`, one process; the second start finds its cache

CPU seconds (user + system, all threads, summed over the ranks) are of reading, tokenizing, cutting and looking at the
first 64 pairs; imports are left out, and hashing the data and model files (`hash_s`) stands beside. Memory in MB, of
all ranks together, as /proc/self/smaps_rollup has it after the first batch, less what each had before it looked at the
data: `private` pages are no other process's, `pss` counts a page that k processes share as 1/k in each; `peak` is the
largest resident size of any rank, all in all.
"""

import argparse
import importlib.util
import inspect
import json
import os
import random
import resource
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LENGTHS = 640, 512  # max_length, max_prompt_length
BATCH = 64
WORDS = """the I to and a my of in was that it me for he is have but she with her him on we this so just at not be had
been like know about don't what when do would get out up are friend if from time because now want really as they or
feel all years how one them more going who told think even said some can there got years after never go people other
back before good been things only relationship boyfriend girlfriend dating months parents together school work college
house another something weekend anything apartment, although, yesterday, family. money, sister, brother. conversation.
anyway, basically honestly, eventually. Edit: Sorry uncomfortable. understand. situation. 2 3 18 21 (22F) (25M) ~6 :)
... I'm it's can't didn't""".split()


def write_pairs(path, n):
    """-> characters written."""
    rng = random.Random(0)
    weights = [1 / (k + 3) for k in range(len(WORDS))]
    text = lambda low, high: " ".join(rng.choices(WORDS, weights, k=rng.randint(low, high)))
    with open(path, "w") as file:
        for k in range(n):
            post = f"SUBREDDIT: r/{rng.choice(WORDS)}\n\nTITLE: {text(5, 20)}?\n\nPOST: {text(100, 470)}\n\n"
            post += f"{text(20, 70)}.\n\nTL;DR:"
            responses = dict(chosen=f" {text(10, 45)}.", rejected=f" {text(10, 45)} {k}.")
            file.write(json.dumps(dict(prompt=post, **responses)) + "\n")
    return path.stat().st_size


def memory():
    """-> private and proportional MB of this process."""
    fields = [line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]]
    kilobytes = {name.rstrip(":"): int(value) for name, value, *_ in fields}
    return {"private": (kilobytes["Private_Clean"] + kilobytes["Private_Dirty"]) / 1e3, "pss": kilobytes["Pss"] / 1e3}


def load_ours(tp, out, model, data):
    """What main() does; -> pairs, CPU seconds spent on hashing."""
    words = f"--max_length {LENGTHS[0]} --max_prompt_length {LENGTHS[1]} --model".split()
    args = tp.parse_args([*words, str(model), "--data", str(data), "--out", str(out)])
    cpu, models = tp.torch.device("cpu"), dict(model=model, ref=model)
    began = time.process_time()
    header = tp.on_rank_0(lambda: tp.run_header("train_pref", args, 1, cpu, models))
    hashed = time.process_time() - began
    pairs = tp.load_rows(out / "data.safetensors", header, row_type=tp.Pair, split=tp.split_pair, source=str(data),
                         held_out=False, recipes=tp.RECIPES, tokenizer=tp.load_tokenizer(model),
                         vocab_size=tp.read_config(model).vocab_size, max_length=LENGTHS[0], max_prompt_length=LENGTHS[1])
    return pairs, hashed


def load_before(tp, out, model, data):
    limits = (tp.load_tokenizer(model), tp.read_config(model).vocab_size, *LENGTHS, "keep_end")
    pairs, _, _ = tp.load_pairs(str(data), False, *limits)
    began = time.process_time()
    tp.ids_sha256(ids for pair in pairs for ids in (pair.prompt, pair.chosen, pair.rejected))  # its fingerprint
    return pairs, time.process_time() - began


def rank_main(kind, root, out, model, data):
    """One rank's process; its last line of stdout is what it measured."""
    sys.path.insert(0, root)
    tp = importlib.import_module("train_pref")
    assert Path(tp.__file__).parent == Path(root)
    tp.init_distributed(*(0, 600, 1)[: len(inspect.signature(tp.init_distributed).parameters)])
    importlib.import_module("transformers.models.auto.tokenization_auto")
    tp.load_tokenizer(Path(model))  # its imports
    tp.dist.barrier()
    before, cpu, wall = memory(), time.process_time(), time.perf_counter()
    load = load_ours if kind == "ours" else load_before
    pairs, hash_s = load(tp, Path(out), Path(model), Path(data))
    batch = [pairs[i] for i in tp.epoch_order(len(pairs), 0, 0)[:BATCH]]
    n_tokens = sum(len(ids) for pair in batch for ids in (pair.prompt, pair.chosen, pair.rejected))
    cpu, wall = time.process_time() - cpu - hash_s, time.perf_counter() - wall
    tp.dist.barrier()
    after = memory()
    tp.dist.barrier()
    print(json.dumps(dict(cpu_s=cpu, hash_s=hash_s, wall_s=wall, pairs=len(pairs), tokens_a_pair=n_tokens / BATCH,
                          peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
                          **{name: after[name] - before[name] for name in after})), flush=True)
    os._exit(0)


def trl_main(out, model, data):
    """TRL's preparation, as a user's script has it: the file through `datasets`, then DPOTrainer."""
    os.environ["HF_DATASETS_CACHE"] = f"{out}/cache"
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    policy, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.eos_token
    config = DPOConfig(output_dir=f"{out}/trainer", per_device_train_batch_size=BATCH, bf16=False, use_cpu=True,
                       report_to=[], disable_tqdm=True, max_length=None)  # with a limit it leaves out what is longer
    before, cpu, wall = memory(), sum(os.times()[:4]), time.perf_counter()
    rows = load_dataset("json", data_files=data, split="train")
    trainer = DPOTrainer(model=policy, args=config, processing_class=tokenizer, train_dataset=rows)
    batch = [trainer.train_dataset[i] for i in range(BATCH)]
    n_tokens = sum(len(row[name]) for row in batch for name in row if name.endswith("ids"))
    cpu, wall, after = sum(os.times()[:4]) - cpu, time.perf_counter() - wall, memory()
    print(json.dumps(dict(cpu_s=cpu, hash_s=0.0, wall_s=wall, pairs=len(trainer.train_dataset),
                          tokens_a_pair=n_tokens / BATCH, peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
                          **{name: after[name] - before[name] for name in after})), flush=True)


def measure(kind, ranks, root, out, model, data):
    """One start -> its figures over all ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    argv = [sys.executable, __file__, "--rank_of", kind, str(root), str(out), str(model), str(data)]
    env = os.environ | dict(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1")
    group = {} if kind == "trl" else dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE=str(ranks))
    place = lambda rank: group | (dict(RANK=str(rank), LOCAL_RANK=str(rank)) if group else {})
    running = [subprocess.Popen(argv, env=env | place(rank), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
               for rank in range(ranks)]
    said = [process.communicate() for process in running]
    if any(process.returncode for process in running):
        raise SystemExit(f"{kind}, {ranks} ranks:\n" + "\n".join(err for _, err in said))
    found = [json.loads(printed.splitlines()[-1]) for printed, _ in said]
    sums = {name: sum(rank[name] for rank in found) for name in ("cpu_s", "hash_s", "private", "pss")}
    return sums | {name: max(rank[name] for rank in found) for name in ("wall_s", "peak", "pairs", "tokens_a_pair")}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=10_000)
    parser.add_argument("--model", type=Path, default=ROOT.parent / "shared/models/stories260K")
    parser.add_argument("--before", type=Path, help="folder of a version of this project to measure beside this one")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 4])
    has_trl = importlib.util.find_spec("trl") is not None
    parser.add_argument("--trl", action=argparse.BooleanOptionalAction, default=has_trl)
    parser.add_argument("--note", default="", help="kept in the row: what else ran on this machine")
    parser.add_argument("--out", type=Path, help="append the row to this file")
    parser.add_argument("--rank_of", nargs=5, help=argparse.SUPPRESS)  # a process of its own
    args = parser.parse_args()
    if args.pairs < BATCH:
        parser.error(f"--pairs: at least {BATCH}, a batch")
    if args.rank_of:
        kind, root, *rest = args.rank_of
        return trl_main(*rest) if kind == "trl" else rank_main(kind, root, *rest)

    sys.path.insert(0, str(ROOT))
    import torch
    from kernels.bench import environment

    results = {}
    with tempfile.TemporaryDirectory() as directory:
        data = Path(directory) / "pairs.jsonl"
        size = write_pairs(data, args.pairs)
        print(f"{args.pairs:,} pairs, {size / 1e6:.0f} MB")
        print(f"{'':23}{'CPU s':>8}{'hash s':>8}{'wall s':>8}{'private':>9}{'pss':>7}{'peak':>7}")
        for kind, root in (("ours", ROOT), ("before", args.before), ("trl", ROOT if args.trl else None)):
            for ranks in args.ranks if kind != "trl" else [1]:
                out = Path(directory) / f"{kind}{ranks}"
                out.mkdir()
                for start in ("first", "second") if root else ():
                    r = measure(kind, ranks, Path(root).resolve(), out, args.model.resolve(), data)
                    assert r["pairs"] == args.pairs, r
                    results[f"{kind}, {ranks} ranks, {start}"] = r
                    print(f"{kind:7}{ranks:2} ranks {start:7}{r['cpu_s']:8.2f}{r['hash_s']:8.2f}{r['wall_s']:8.2f}"
                          f"{r['private']:9.0f}{r['pss']:7.0f}{r['peak']:7.0f}", flush=True)

    one, most = args.ranks[0], args.ranks[-1]
    get = lambda kind, ranks, start, name: results.get(f"{kind}, {ranks} ranks, {start}", {}).get(name)
    ratios = {
        f"CPU of a first start on {most} ranks: before / ours (at least 2)":
            (get("before", most, "first", "cpu_s"), get("ours", most, "first", "cpu_s")),
        f"CPU of a second start on {most} ranks: before / ours":
            (get("before", most, "second", "cpu_s"), get("ours", most, "second", "cpu_s")),
        "CPU of a first start on one rank: TRL / ours":
            (get("trl", 1, "first", "cpu_s"), get("ours", 1, "first", "cpu_s")),
        f"memory (pss) of {most} ranks / of {one}, second start (at most 1.3)":
            (get("ours", most, "second", "pss"), get("ours", one, "second", "pss")),
        f"memory (pss) of {most} ranks: before / ours":
            (get("before", most, "first", "pss"), get("ours", most, "first", "pss")),
    }
    ratios = {name: a / b for name, (a, b) in ratios.items() if a and b}
    for name, ratio in ratios.items():
        print(f"{ratio:6.2f}  {name}")
    print(f"{get('ours', one, 'second', 'cpu_s'):6.2f}  CPU seconds of a second start on {one} rank (under 3)")
    words = [Path(word).name if "/" in word else word for word in sys.argv[1:]]
    row = dict(bench="data", **environment(torch.device("cpu"), ("transformers", "tokenizers", "trl", "datasets")),
               command=shlex.join(["tests/bench_data.py", *words]), note=args.note, pairs=args.pairs, bytes=size,
               max_length=LENGTHS[0], max_prompt_length=LENGTHS[1], results=results, ratios=ratios)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
