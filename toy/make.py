"""The toy task: everything in toy/, made from nothing.

A post tells two to four facts among idle remarks, and a summary repeats the facts. `truth` scores a summary exactly, which
no real data set can offer: a preference run here can be judged by what is true instead of by a model of it.

    prompt      hugo bought tents this morning . leo found cameras after the storm . nobody said a word . tl;dr :
    completion  hugo bought tents and leo found cameras .

    python toy/make.py            make all of it (about three minutes on one CPU core; runs train_sft.py)
    python toy/make.py --check    make the files again in memory, all but toy/sft/, and compare them with those that stand here

What is made (one JSON object a line in the .gz files; the prompts of the four files are disjoint):

    base/               shape and tokenizer of a 0.13M-parameter Llama, without weights; one word is one token
    sft.jsonl.gz        {prompt, completion}, 19,200 posts with a summary by a careful or a careless writer
    sft_eval.jsonl.gz   512 more
    sft/                the reference policy: base/ trained on sft.jsonl.gz by `train_sft.py --preset toy`
    pairs.jsonl.gz      {prompt, chosen, rejected, chosen_truth, rejected_truth}, 2,048 prompts
    pairs_eval.jsonl.gz 256 more

A pair is two samples of sft/ (temperature 1, top-p 1). Which one is chosen is drawn from the Bradley-Terry model of their
truths, so labels are noisy: a truth that is higher by 1 wins 73% of the time. A prompt is left out if its two samples are
equal, or if one is empty or has no end within MAX_NEW words: a text without EOS cannot be told in this format. The script
prints how many prompts that costs.

Same bytes everywhere: texts use only `random.Random(seed).random()`, and sampling runs in float64, where the last-bit
differences between two CPUs are too small to change a word. The weights of sft/ are not reproducible in that sense (float32
training differs between CPUs), so they are kept, and --check samples from the ones that stand here.
"""

import argparse
import collections
import gzip
import io
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

HERE = Path(__file__).resolve().parent

# --- the language ---
PEOPLE = "anna ben clara david emma felix grace hugo irene jonas karin leo mona nils olga peter".split()
VERBS = "found lost sold broke fixed bought painted hid".split()
THINGS = "lamps bikes maps kites boats drums coats vases pianos clocks ladders mirrors radios tents rings cameras".split()
PLACES = ["at the lake", "in the garden", "near the school", "behind the barn", "on the train", "at the market"]
TIMES = ["on monday", "last night", "before lunch", "after the storm", "this morning", "on friday"]
REMARKS = ["it was raining", "i do not know why", "nobody said a word", "the dog barked all night", "we all laughed"]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
PUNCTUATION = [".", ",", "and", "tl;dr", ":"]
WORDS = list(dict.fromkeys(  # the vocabulary: a word's place in this list is its token id
    SPECIAL + PUNCTUATION + " ".join(PEOPLE + VERBS + THINGS + PLACES + TIMES + REMARKS).split()))

# --- the writers: half are careful and make no mistake; the others do, with these probabilities ---
CAREFUL = 0.5
SKIP = 0.3  # a fact
SLIP = 0.05  # a word of a fact becomes another of its kind
REPEAT = 0.1  # a clause is said again
CHATTER = 0.15  # a remark is added to the summary

# --- the truth: points ---
FACT, WRONG, AGAIN, REMARK, WORD, NO_END = 1.0, -0.75, -1.0, -0.5, -0.04, -1.0

# --- the files: seed of the texts, prompts drawn, prompts kept ---
SFT_FILES = {"sft.jsonl.gz": (1, 19200), "sft_eval.jsonl.gz": (2, 512)}
PAIR_FILES = {"pairs.jsonl.gz": (3, 3072, 2048), "pairs_eval.jsonl.gz": (4, 400, 256)}
MAX_NEW = 64  # words of a sample; the longest post and the longest summary of a writer have about 40 each

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": len(WORDS),
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 100.0,  # short texts: with the usual 10,000 copying is learned more slowly
    "initializer_range": 0.1,  # narrow model: with the usual 0.02 it sits on a plateau for most of the training
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


# --- posts, summaries and their truth ---


def pick(rng, items):
    """One of the items, each as likely. (`random.choice` and friends may change between Python versions.)"""
    return items[int(rng.random() * len(items))]


def pick_different(rng, items, n):
    """n different items, in random order."""
    left = list(items)
    return [left.pop(int(rng.random() * len(left))) for _ in range(n)]


def make_post(rng):
    """-> (prompt, facts): two to four (person, verb, thing), no word of them used twice, and one idle remark."""
    n = pick(rng, [2, 3, 3, 4])
    facts = list(zip(pick_different(rng, PEOPLE, n), pick_different(rng, VERBS, n), pick_different(rng, THINGS, n)))
    sentences = []
    for fact in facts:
        where_or_when = pick(rng, [[], [pick(rng, PLACES)], [pick(rng, TIMES)]])
        sentences.append(" ".join([*fact, *where_or_when]))
    sentences.insert(int(rng.random() * (n + 1)), pick(rng, REMARKS))
    return " . ".join(sentences) + " . tl;dr :", facts


def parse_post(prompt):
    """The facts of a prompt, read back by the grammar: the inverse of `make_post`."""
    if not prompt.endswith(" . tl;dr :"):
        raise ValueError(f"a prompt of the toy task ends in ' . tl;dr :', this one does not: {prompt!r}")
    facts = []
    for sentence in prompt.removesuffix(" . tl;dr :").split(" . "):
        if sentence in REMARKS:
            continue
        who, verb, thing, *rest = sentence.split(" ") + [""] * 3
        where_or_when = " ".join(rest).strip()
        if who not in PEOPLE or verb not in VERBS or thing not in THINGS or where_or_when not in ["", *PLACES, *TIMES]:
            raise ValueError(f"not a sentence of the toy task: {sentence!r}")
        facts.append((who, verb, thing))
    return facts


def make_summary(rng, facts):
    """What one writer, careful or careless, says of the facts."""
    careful = rng.random() < CAREFUL
    clauses = []
    for fact in facts:
        if not careful and rng.random() < SKIP:
            continue
        said = list(fact)
        for i, kind in enumerate([PEOPLE, VERBS, THINGS]):
            if not careful and rng.random() < SLIP:
                said[i] = pick(rng, [word for word in kind if word != said[i]])
        clauses.append(" ".join(said))
        if not careful and rng.random() < REPEAT:
            clauses.append(clauses[-1])
    if not careful and (rng.random() < CHATTER or not clauses):
        clauses.insert(int(rng.random() * (len(clauses) + 1)), pick(rng, REMARKS))
    return " and ".join([" , ".join(clauses[:-1])] * (len(clauses) > 1) + clauses[-1:]) + " ."


def truth(prompt, response, ended=True):
    """The score of a response, in points. `ended`: it came to its EOS, which is not part of the text.

    A clause is what stands between ".", "," and "and". It is a repeat if it was said before, whatever it says.
    """
    facts = {" ".join(fact) for fact in parse_post(prompt)}
    words = response.split()
    points = WORD * len(words) + NO_END * (not ended)
    said = set()
    for clause in " ".join("\n" if word in (".", ",", "and") else word for word in words).split("\n"):
        clause = clause.strip()
        if not clause:
            continue
        points += AGAIN if clause in said else FACT if clause in facts else REMARK if clause in REMARKS else WRONG
        said.add(clause)
    return round(points, 2)


# --- files, as {name: content}; the content of a .gz is the uncompressed one ---


def json_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def make_base():
    """The model's shape and its tokenizer: words between spaces, a BOS in front as Llama tokenizers put it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", WORDS.index("<s>"))])
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer_config = {  # by hand: the class name that transformers 5 would write is unknown to 4
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,  # keep the space before a full stop: texts come back as they were
        "model_max_length": CONFIG["max_position_embeddings"],
    }
    return {
        "base/config.json": (json.dumps(CONFIG, indent=2) + "\n").encode(),
        "base/tokenizer.json": (tokenizer.to_str(pretty=True) + "\n").encode(),
        "base/tokenizer_config.json": (json.dumps(tokenizer_config, indent=2) + "\n").encode(),
    }


def make_texts():
    """-> (the two SFT files, {name of a pair file: its prompts}). One `seen` for all, so no prompt comes twice anywhere."""
    seen, files, prompts = set(), {}, {}
    for name, (seed, n, *_) in {**SFT_FILES, **PAIR_FILES}.items():
        rng = random.Random(seed)
        rows = []
        while len(rows) < n:
            prompt, facts = make_post(rng)
            completion = make_summary(rng, facts)
            if prompt not in seen:
                seen.add(prompt)
                rows.append({"prompt": prompt, "completion": completion})
        if name in SFT_FILES:
            files[name] = json_lines(rows)
        else:
            prompts[name] = [row["prompt"] for row in rows]
    return files, prompts


def sample(model, tokenizer, prompts, key):
    """One response a prompt at temperature 1, top-p 1 -> [(text, ended)].

    Word t of prompt p is the inverse of the cumulative distribution at the t-th number of random.Random(f"{key} {p}"): the
    sample of a prompt does not depend on which other prompts are sampled with it. Prompts of one length make one batch, so
    nothing is padded. A sample that says <pad>, <s> or <unk> counts as not ended.
    """
    import torch

    by_length = collections.defaultdict(list)
    for i, prompt in enumerate(prompts):
        ids = [tokenizer.bos_token_id] + tokenizer.encode(prompt, add_special_tokens=False)
        by_length[len(ids)].append((i, ids))
    samples = [None] * len(prompts)
    for batch in by_length.values():
        rngs = [random.Random(f"{key} {prompts[i]}") for i, _ in batch]
        new = torch.tensor([ids for _, ids in batch])
        cache, words = None, []
        ended = torch.zeros(len(batch), 1, dtype=torch.bool)
        while len(words) < MAX_NEW + 1 and not ended.all():  # + 1: the EOS
            with torch.no_grad():
                out = model(new, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            cumulative = out.logits[:, -1].softmax(-1).cumsum(-1)  # (B, V)
            uniform = torch.tensor([[rng.random()] for rng in rngs], dtype=torch.float64)  # (B, 1)
            new = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
            ended |= new == tokenizer.eos_token_id
            words.append(new)
        for (i, _), ids in zip(batch, torch.cat(words, 1).tolist()):
            text = tokenizer.decode(ids).split("</s>")
            samples[i] = text[0].strip(), len(text) > 1 and not any(word in text[0].split() for word in SPECIAL)
    return samples


def make_pairs(prompts):
    """{name: prompts} -> the pair files: two samples of toy/sft/ a prompt, labelled by Bradley-Terry on their truths."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)  # fastest for a model of this size
    model = AutoModelForCausalLM.from_pretrained(HERE / "sft", dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(HERE / "sft")
    files = {}
    for name, drawn in prompts.items():
        rows, left_out = [], collections.Counter()
        for prompt, (a, a_ended), (b, b_ended) in zip(
                drawn, *(sample(model, tokenizer, drawn, key=number) for number in ("first", "second"))):
            if not (a_ended and b_ended):
                left_out["no end"] += 1
            elif not (a and b):
                left_out["empty"] += 1
            elif a == b:
                left_out["equal"] += 1
            else:
                a_truth, b_truth = truth(prompt, a), truth(prompt, b)
                a_wins = random.Random(f"label {prompt}").random() < 1 / (1 + math.exp(b_truth - a_truth))
                chosen, rejected = ((a, a_truth), (b, b_truth)) if a_wins else ((b, b_truth), (a, a_truth))
                rows.append({"prompt": prompt, "chosen": chosen[0], "rejected": rejected[0],
                             "chosen_truth": chosen[1], "rejected_truth": rejected[1]})
        n = PAIR_FILES[name][2]
        if len(rows) < n:
            raise ValueError(f"{name}: {len(drawn)} prompts gave {len(rows)} usable pairs, {n} are wanted: draw more prompts "
                             f"in PAIR_FILES (left out: {dict(left_out)})")
        agree = sum(row["chosen_truth"] >= row["rejected_truth"] for row in rows[:n]) / n
        mean = sum(row["chosen_truth"] + row["rejected_truth"] for row in rows[:n]) / (2 * n)
        print(f"{name}: first {n:,} of {len(rows):,} usable pairs from {len(drawn):,} prompts (left out: {dict(left_out)}), "
              f"mean truth {mean:.3f}, the chosen is not the worse in {agree:.1%}")
        files[name] = json_lines(rows[:n])
    return files


# --- making and checking ---


def write(name, content):
    """Write toy/`name` aside, then put it in place. A .gz says neither a time nor a name: same content, same bytes."""
    if name.endswith(".gz"):
        buffer = io.BytesIO()
        with gzip.GzipFile(filename="", mode="wb", fileobj=buffer, mtime=0, compresslevel=9) as f:
            f.write(content)
        content = buffer.getvalue()
    path = HERE / name
    path.parent.mkdir(exist_ok=True)
    aside = path.with_name(path.name + ".new")
    aside.write_bytes(content)
    os.replace(aside, path)
    print(f"made toy/{name}: {len(content):,} bytes")


def train_reference():
    """Train sft/ by train_sft.py and put its final/ in place of the old one."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "train_sft.py", "--preset", "toy", "--out", out]
        subprocess.run(command, cwd=HERE.parent, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        shutil.rmtree(HERE / "sft.new", ignore_errors=True)
        shutil.copytree(Path(out) / "final", HERE / "sft.new")
    if (HERE / "sft").exists():
        os.rename(HERE / "sft", HERE / "sft.old")
    os.rename(HERE / "sft.new", HERE / "sft")
    shutil.rmtree(HERE / "sft.old", ignore_errors=True)
    print(f"made toy/sft/: {sum(path.stat().st_size for path in (HERE / 'sft').iterdir()):,} bytes")


def check(name, content):
    """Stop with the first line in which toy/`name` is not `content`."""
    try:
        found = (HERE / name).read_bytes()
        found = gzip.decompress(found) if name.endswith(".gz") else found
    except (OSError, EOFError, zlib.error) as error:  # missing, or not a whole gzip file
        sys.exit(f"toy/{name}: cannot be read: {error}")
    if found != content:
        found, content = found.split(b"\n"), content.split(b"\n")
        line = next((i for i, (a, b) in enumerate(zip(found, content)) if a != b), min(len(found), len(content)))
        there, made = (lines[line].decode(errors="replace") if line < len(lines) else "(no such line)" for lines in (found, content))
        sys.exit(f"toy/{name}:{line + 1}: differs\n  there: {there}\n  made:  {made}")
    print(f"same toy/{name}: {len(content):,} bytes, {content.count(bytes([10])):,} lines")


def main():
    parser = argparse.ArgumentParser(description="make the toy task's files in toy/")
    parser.add_argument("--check", action="store_true",
                        help="write nothing; make all but sft/ again and compare; exit code 1 at the first difference")
    args = parser.parse_args()
    put = check if args.check else write
    files, prompts = make_texts()
    for name, content in {**make_base(), **files}.items():
        put(name, content)
    if not args.check:
        train_reference()
    for name, content in make_pairs(prompts).items():
        put(name, content)


if __name__ == "__main__":
    main()
