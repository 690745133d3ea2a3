"""The toy task: everything in toy/, made from nothing.

A post tells two to four facts among idle remarks, and a summary repeats the facts. `truth` scores a summary exactly, which
no real data set can offer: a preference run here can be judged by what is true instead of by a model of it.

    prompt      hugo bought tents this morning . leo found cameras after the storm . nobody said a word . tl;dr :
    completion  hugo bought tents and leo found cameras .

    python toy/make.py            make all of it (about ten minutes on one CPU core) with the project's own commands
    python toy/make.py --check    make the files again in a temporary directory, all but the weights, and compare
    python toy/make.py --seed 1 --to out/toy1    other posts, writers, samples, labels and weights, elsewhere
    python toy/make.py --seed 1 --to out/toy1 --truth_only    without what needs rm/: in 2 minutes (toy/study.py)
    python toy/make.py --seed 1 --to out/long1 --truth_only --long    ten to thirteen facts a post (toy/study.py too)

What is made, in the order of the paper's experiment (one JSON object a line in the .gz files; no prompt stands in two of them):

    base/                   shape and tokenizer of a 0.13M-parameter Llama, without weights; one word is one token
    sft.jsonl.gz            {prompt, completion}, 19,200 posts with a summary by a careful or a careless writer
    sft_eval.jsonl.gz       512 more
    sft/                    the reference policy: base/ trained on sft.jsonl.gz by `train_sft.py`
    rm_pairs.jsonl.gz       {prompt, chosen, rejected, chosen_truth, rejected_truth}: two samples of sft/ for each of 14,336
                            prompts (`evaluate.py sample`, temperature 1, top-p 1); the truth, with noise, says which is chosen
    rm_pairs_eval.jsonl.gz  1,024 more
    rm/                     the golden reward model: trained on rm_pairs.jsonl.gz by `train_rm.py`, from sft/
    pairs.jsonl.gz          {prompt, chosen, rejected, chosen_reward, rejected_reward, chosen_truth, rejected_truth}: two samples
                            of sft/ for each of 2,048 prompts, labelled by rm/ (`evaluate.py label`)
    pairs_eval.jsonl.gz     256 more
    truth_pairs.jsonl.gz    {prompt, chosen, rejected, chosen_truth, rejected_truth}: two samples of sft/ for each of 2,048
                            more prompts, labelled by the truth itself, without noise; ties are left out. What
                            `train_pref.py` trains on by default, as the paper takes its golden model for the truth
    truth_pairs_eval.jsonl.gz  256 more

In rm_pairs the chosen one is drawn from the Bradley-Terry model of the two truths, as people's labels are noisy: a truth that is
higher by 1 wins 73% of the time. A prompt is left out if its two samples are equal, or if one is empty or has no end: a text
without EOS cannot be told in this format.

Same bytes everywhere: texts use only `random.Random(seed).random()`, and samples and rewards are computed in float64, where the
last-bit differences between two CPUs are too small to change a word. The weights of sft/ and rm/ are not reproducible in that sense
(float32 training differs between CPUs), so they are kept, and --check samples and labels with the ones that stand here.
"""

import argparse
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
TO = HERE  # where the files are made or checked: --to
SEED = 0  # of everything: --seed

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

# --- the posts: how many facts one tells ---
FACTS = [2, 3, 3, 4]
LONG_FACTS = [10, 11, 12, 13]  # --long: a summary of all has 40 to 52 tokens
LONG_POSITIONS, LONG_PROMPT, LONG_COMPLETION = 256, 128, 96  # tokens

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
PAIR_FILES = {"pairs.jsonl.gz": (3, 3072, 2048), "pairs_eval.jsonl.gz": (4, 400, 256)}  # labelled by rm/
RM_FILES = {"rm_pairs_eval.jsonl.gz": (6, 1280, 1024), "rm_pairs.jsonl.gz": (5, 16384, 14336)}  # labelled by the truth
TRUTH_FILES = {"truth_pairs.jsonl.gz": (7, 3072, 2048), "truth_pairs_eval.jsonl.gz": (8, 400, 256)}  # ... without noise

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


def make_post(rng, facts=None):
    """-> (prompt, facts): two to four (person, verb, thing), no word of them used twice, and one idle remark.

    A long post has more facts than there are verbs: only its people and things are used once. `facts`: the numbers of
    facts it may have.
    """
    n = pick(rng, facts or FACTS)
    people = pick_different(rng, PEOPLE, n)
    verbs = pick_different(rng, VERBS, n) if n <= len(VERBS) else [pick(rng, VERBS) for _ in range(n)]
    facts = list(zip(people, verbs, pick_different(rng, THINGS, n)))
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
    for name, (seed, n, *_) in {**SFT_FILES, **PAIR_FILES, **RM_FILES, **TRUTH_FILES}.items():
        rng = random.Random(seed + 100 * SEED)
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


def project(script, *words):
    """Run one of the project's scripts by its toy preset; small models are fastest on one thread."""
    command = [sys.executable, HERE.parent / script, *words, "--preset", "toy", "--seed", SEED]
    if FACTS == LONG_FACTS:
        samples = script == "evaluate.py"
        command += ["--max_new_tokens", LONG_COMPLETION] if samples else ["--max_length", LONG_POSITIONS]
        command += ["--max_prompt_length", LONG_PROMPT]
    subprocess.run(list(map(str, command)), check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def sample(name, prompts, directory):
    """Two samples of sft/ for each prompt -> the file that `evaluate.py sample` writes."""
    data, out = directory / f"{name}.prompts.jsonl", directory / f"{name}.samples.jsonl"
    data.write_bytes(json_lines({"prompt": prompt} for prompt in prompts))
    project("evaluate.py", "sample", "--model", TO / "sft", "--data", data, "--n", len(prompts), "--k", 2, "--temperature", 1,
            "--top_p", 1, "--batch_size", 256, "--precision", "fp64", "--out", out)
    return out


def first_pairs(name, rows, n):
    """The first n pairs without <pad>, <s> or <unk> in them, with the truths of both sides."""
    rows = [row for row in rows if not {*row["chosen"].split(), *row["rejected"].split()} & {*SPECIAL}]
    if len(rows) < n:
        raise ValueError(f"{name}: {len(rows)} usable pairs, {n} are wanted: draw more prompts")
    for row in rows[:n]:
        row |= {f"{side}_truth": truth(row["prompt"], row[side]) for side in ("chosen", "rejected")}
    agree = sum(row["chosen_truth"] >= row["rejected_truth"] for row in rows[:n]) / n
    print(f"{name}: first {n:,} of {len(rows):,} usable pairs; the chosen is not the worse by the truth in {agree:.1%}")
    return json_lines(rows[:n])


def make_truth_pairs(name, prompts, directory):
    """Two samples of sft/ a prompt: rm/'s labelled by Bradley-Terry on their truths, the others by the higher truth."""
    rows = []
    for row in read_lines(sample(name, prompts, directory)):
        a, b = row["completions"]
        difference = truth(row["prompt"], a) - truth(row["prompt"], b)
        if None not in row["stops"] and a != b and a and b and (name in RM_FILES or difference != 0):
            noise = random.Random(f"label {row['prompt']}").random()
            a_wins = noise < sigmoid(difference) if name in RM_FILES else difference > 0
            rows.append(dict(prompt=row["prompt"], chosen=a if a_wins else b, rejected=b if a_wins else a))
    return first_pairs(name, rows, {**RM_FILES, **TRUTH_FILES}[name][2])


def make_pairs(name, prompts, directory):
    """Two samples of sft/ a prompt, labelled by rm/."""
    out = directory / f"{name}.pairs.jsonl"
    project("evaluate.py", "label", "--rm", TO / "rm", "--samples", sample(name, prompts, directory), "--precision", "fp64", "--out", out)
    pairs = read_lines(out)
    for pair in pairs:  # the reference said them: its own log-probs are what training measures from anyhow
        pair.pop("chosen_logps", None)
        pair.pop("rejected_logps", None)
    return first_pairs(name, pairs, PAIR_FILES[name][2])


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


# --- making and checking ---


def write(name, content):
    """Write toy/`name` aside, then put it in place. A .gz says neither a time nor a name: same content, same bytes."""
    if name.endswith(".gz"):
        buffer = io.BytesIO()
        with gzip.GzipFile(filename="", mode="wb", fileobj=buffer, mtime=0, compresslevel=9) as f:
            f.write(content)
        content = buffer.getvalue()
    path = TO / name
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".new")
    aside.write_bytes(content)
    os.replace(aside, path)
    print(f"made toy/{name}: {len(content):,} bytes")


def train(script, name, model, data, directory):
    """Train `name`/ by the toy preset of a script and put it in place of the old one."""
    eval_data = data.replace(".jsonl", "_eval.jsonl")
    project(script, "--model", TO / model, "--data", TO / data, "--eval_data", TO / eval_data, "--out", directory / name)
    new, old = TO / f"{name}.new", TO / f"{name}.old"
    for aside in (new, old):
        shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(directory / name / "final", new)
    if (TO / name).exists():
        os.rename(TO / name, old)
    os.rename(new, TO / name)
    shutil.rmtree(old, ignore_errors=True)
    print(f"made {name}/: {sum(path.stat().st_size for path in (TO / name).iterdir()):,} bytes")


def check(name, content):
    """Stop with the first line in which toy/`name` is not `content`."""
    try:
        found = (TO / name).read_bytes()
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
                        help="write nothing; make all but the weights again and compare; exit code 1 at the first difference")
    parser.add_argument("--seed", type=int, default=0, help="of everything (default: 0, the toy/ that is shipped)")
    parser.add_argument("--truth_only", action="store_true",
                        help="leave out the golden reward model and the pairs it labels")
    parser.add_argument("--long", action="store_true", help="posts of ten to thirteen facts; with --truth_only")
    parser.add_argument("--to", type=Path, default=HERE, help="directory for the files (default: toy/)")
    args = parser.parse_args()
    global SEED, TO, FACTS
    SEED, TO = args.seed, args.to.resolve()
    if (SEED or args.long) and TO == HERE:
        parser.error("--seed, --long: toy/ holds seed 0, short; give --to another directory")
    if args.long and not args.truth_only:
        parser.error("--long: with --truth_only alone")
    if args.long:
        FACTS, CONFIG["max_position_embeddings"] = LONG_FACTS, LONG_POSITIONS
    put = check if args.check else write
    files, prompts = make_texts()
    with tempfile.TemporaryDirectory() as directory:
        directory = Path(directory)
        for name, content in {**make_base(), **files}.items():
            put(name, content)
        if not args.check:
            train("train_sft.py", "sft", "base/config.json", "sft.jsonl.gz", directory)
        for name in [] if args.truth_only else RM_FILES:
            put(name, make_truth_pairs(name, prompts[name], directory))
        if not args.check and not args.truth_only:
            train("train_rm.py", "rm", "sft", "rm_pairs.jsonl.gz", directory)
        for name in [] if args.truth_only else PAIR_FILES:
            put(name, make_pairs(name, prompts[name], directory))
        for name in TRUTH_FILES:
            put(name, make_truth_pairs(name, prompts[name], directory))


if __name__ == "__main__":
    main()
