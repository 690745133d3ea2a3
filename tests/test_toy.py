"""The toy task: its grammar, its truth, its tokenizer, and that toy/ holds what toy/make.py makes.

Run by `python -m pytest tests/test_toy.py`, about two minutes on one core: a --check makes the whole of toy/ again.
"""

import gzip
import importlib.util
import json
import math
import random
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
TOY = REPO / "toy"
FILES = ["sft.jsonl.gz", "sft_eval.jsonl.gz", "rm_pairs.jsonl.gz", "rm_pairs_eval.jsonl.gz", "pairs.jsonl.gz",
         "pairs_eval.jsonl.gz", "truth_pairs.jsonl.gz", "truth_pairs_eval.jsonl.gz"]
POST = "hugo bought tents this morning . leo found cameras after the storm . nobody said a word . tl;dr :"

spec = importlib.util.spec_from_file_location("toy_make", TOY / "make.py")
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)
spec = importlib.util.spec_from_file_location("toy_study", TOY / "study.py")
study = importlib.util.module_from_spec(spec)
spec.loader.exec_module(study)


def rows(name):
    return [json.loads(line) for line in gzip.decompress((TOY / name).read_bytes()).decode().removesuffix("\n").split("\n")]


def run_check(toy):
    return subprocess.run([sys.executable, str(toy / "make.py"), "--check"], capture_output=True, text=True, cwd=toy.parent)


def mean(values):
    return sum(values) / len(values)


# --- the language ---


def test_generator_is_deterministic():
    assert make.make_texts() == make.make_texts()
    # and the same on every machine and Python: the first post and summary of seed 0, pinned
    rng = random.Random(0)
    post, facts = make.make_post(rng)
    assert post == ("nobody said a word . mona broke clocks . grace painted rings on friday . david lost vases last night . "
                    "irene fixed kites at the market . tl;dr :")
    assert make.make_summary(rng, facts) == "mona broke clocks , grace bought rings , irene lost vases and irene fixed kites ."


def test_grammar_round_trip():
    """parse_post gives back exactly the facts that make_post told, in their order; no word of a kind comes twice."""
    rng = random.Random(123)
    for _ in range(3000):
        post, facts = make.make_post(rng)
        assert make.parse_post(post) == facts
        assert 2 <= len(facts) <= 4 and all(len(set(kind)) == len(facts) for kind in zip(*facts))


@pytest.mark.parametrize("prompt", ["", "hugo bought tents .", "hugo bought . tl;dr :", "hugo bought tents on mars . tl;dr :",
                                    "tents bought hugo . tl;dr :", POST + " ", "post : " + POST])
def test_what_is_no_post_is_refused(prompt):
    with pytest.raises(ValueError, match="toy task"):
        make.parse_post(prompt)


def test_long_posts(tmp_path):
    """Ten to thirteen facts of different people and things; the flag wants another place than toy/, and --truth_only."""
    rng = random.Random(124)
    for _ in range(500):
        post, facts = make.make_post(rng, make.LONG_FACTS)
        people, _, things = zip(*facts)
        assert make.parse_post(post) == facts and 10 <= len(facts) <= 13
        assert len(set(people)) == len(set(things)) == len(facts)
        assert len(post.split()) < make.LONG_PROMPT and len(make.make_summary(rng, facts).split()) < make.LONG_COMPLETION
        best = " , ".join(map(" ".join, facts)) + " ."
        assert make.truth(post, best) == pytest.approx(len(facts) - 0.04 * len(best.split()))
    for flags in (["--long", "--truth_only"], ["--long", "--to", tmp_path]):
        result = subprocess.run([sys.executable, TOY / "make.py", *flags], capture_output=True, text=True)
        assert result.returncode == 2 and "--long" in result.stderr and not [*tmp_path.iterdir()]


def test_words_of_the_grammar_do_not_overlap():
    """What makes parsing unambiguous: kinds are disjoint, remarks are no facts, nothing contains a separator."""
    kinds = [make.PEOPLE, make.VERBS, make.THINGS]
    assert len(set(sum(kinds, []))) == sum(map(len, kinds))
    for phrase in make.REMARKS + make.PLACES + make.TIMES:
        assert not set(phrase.split()) & {".", ",", "and", *make.PEOPLE}


def test_writers():
    """Careful writers tell every fact and nothing else; the careless do what they do about as often as the constants say."""
    rng = random.Random(7)
    posts = [make.make_post(rng) for _ in range(20000)]
    summaries = [(prompt, facts, make.make_summary(rng, facts)) for prompt, facts in posts]
    perfect = [make.truth(p, s) == round(len(f) - 0.04 * len(s.split()), 2) for p, f, s in summaries]
    # a careless writer is perfect too if nothing happens: (0.7 * 0.95^3 * 0.9)^n * 0.85 for n = 2, 3, 4 facts
    flawless = mean([(0.7 * 0.95**3 * 0.9) ** len(facts) * 0.85 for _, facts in posts])
    assert mean(perfect) == pytest.approx(0.5 + 0.5 * flawless, abs=0.01)
    remarks = mean([any(remark in s for remark in make.REMARKS) for _, _, s in summaries])
    nothing_left = mean([0.3 ** len(facts) for _, facts in posts])
    assert remarks == pytest.approx(0.5 * (0.15 + 0.85 * nothing_left), abs=0.01)


# --- the truth ---


@pytest.mark.parametrize("response, points", [
    ("hugo bought tents and leo found cameras .", 2 * 1.0 - 8 * 0.04),  # both facts
    ("leo found cameras , hugo bought tents", 2 * 1.0 - 7 * 0.04),  # order and full stop do not count
    ("hugo bought tents .", 1.0 - 4 * 0.04),  # one left out
    ("hugo bought cameras .", -0.75 - 4 * 0.04),  # wrong
    ("hugo bought tents this morning .", -0.75 - 6 * 0.04),  # more than the fact is not the fact
    ("hugo bought tents leo found cameras .", -0.75 - 7 * 0.04),  # no separator: one clause, and wrong
    ("hugo bought tents and hugo bought tents .", 1.0 - 1.0 - 8 * 0.04),  # a fact again
    ("hugo bought maps , hugo bought maps and hugo bought maps .", -0.75 - 2 * 1.0 - 12 * 0.04),  # a mistake again
    ("nobody said a word .", -0.5 - 5 * 0.04),  # chatter, from the post
    ("it was raining and it was raining .", -0.5 - 1.0 - 8 * 0.04),  # chatter, not from the post, twice
    ("leo found cameras , nobody said a word , leo found cameras and hugo lost tents .",
     1.0 - 0.5 - 1.0 - 0.75 - 17 * 0.04),  # everything
    (". , and .", -4 * 0.04),  # separators alone say nothing
    ("", 0.0),
])
def test_truth(response, points):
    assert make.truth(POST, response) == pytest.approx(points, abs=1e-9)
    assert make.truth(POST, response, ended=False) == pytest.approx(points - 1, abs=1e-9)


# --- the tokenizer and the model ---


@pytest.mark.parametrize("folder", ["base", "sft", "rm"])
def test_tokenizer(folder):
    """Every text of every file comes back as it was, without <unk>; ids are the places in WORDS; one BOS, no EOS."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TOY / folder)
    assert tokenizer.get_vocab() == {word: i for i, word in enumerate(make.WORDS)}
    assert (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == tuple(make.SPECIAL)
    texts = sorted({text for name in FILES for row in rows(name) for text in row.values() if isinstance(text, str)})
    ids = tokenizer(texts, add_special_tokens=False).input_ids
    assert tokenizer.batch_decode(ids) == texts
    assert not {i for row in ids for i in row} & set(range(len(make.SPECIAL)))
    assert tokenizer(POST).input_ids == [1] + tokenizer(POST, add_special_tokens=False).input_ids
    assert tokenizer("of mice").input_ids == [1, 3, 3]


def test_config_is_read_by_transformers():
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(TOY / "base")
    model = AutoModelForCausalLM.from_config(config)
    assert type(model).__name__ == "LlamaForCausalLM" and config.tie_word_embeddings
    assert config.rope_parameters["rope_theta"] == 100.0 and config.vocab_size == len(make.WORDS)
    assert sum(p.numel() for p in model.parameters()) == 64 * len(make.WORDS) + 3 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64) + 64


def test_reference_policy_has_learned_the_task():
    """Fresh posts: its samples score far above the same samples dealt to other posts, and, by three standard errors, above nothing
    said at all."""
    import torch

    import evaluate as ev

    cpu, rng = torch.device("cpu"), random.Random(99)
    policy, tokenizer, _ = ev.load_model(str(TOY / "sft"), ev.CausalLM, "fp32", cpu)
    prompts = [make.make_post(rng)[0] for _ in range(256)]
    ids = [tokenizer(prompt).input_ids for prompt in prompts]
    uniform = torch.stack([ev.uniform_numbers(prompt, 1, 64, 0) for prompt in ids])
    samples = [ev.completion_text(ys[0], [2], tokenizer) for ys in ev.generate(policy, ids, uniform, 1.0, 1.0, [2])]
    samples = [(text, stop is not None) for text, stop, _ in samples]
    own = [make.truth(p, text, ended) for p, (text, ended) in zip(prompts, samples)]
    dealt = [make.truth(p, text, ended) for p, (text, ended) in zip(prompts[1:] + prompts[:1], samples)]
    assert mean([ended for _, ended in samples]) > 0.99
    error = (mean([(x - mean(own)) ** 2 for x in own]) / len(own)) ** 0.5
    assert mean(own) > 3 * error and mean(own) > mean(dealt) + 2


@pytest.fixture(scope="module")
def reward():
    """-> reward(prompt, response) of toy/rm by transformers, in float64."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(TOY / "rm", dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(TOY / "rm")

    def score(prompt, response):
        with torch.no_grad():
            return model(torch.tensor([tokenizer(prompt).input_ids + tokenizer.encode(response, add_special_tokens=False) + [2]])).logits.item()

    return score


def test_golden_reward_model_knows_the_truth_but_not_all_of_it(reward):
    """Held-out pairs of unequal truth: it prefers the better one in 65 to 85% (the paper's golden model agrees with people in 75.2%)."""
    pairs = [row for row in rows("rm_pairs_eval.jsonl.gz") if row["chosen_truth"] != row["rejected_truth"]][:512]
    right = [(reward(r["prompt"], r["chosen"]) > reward(r["prompt"], r["rejected"])) == (r["chosen_truth"] > r["rejected_truth"]) for r in pairs]
    assert 0.65 < mean(right) < 0.85


def test_pairs_are_labelled_by_the_golden_reward_model(reward):
    for name in FILES[4:6]:
        for row in rows(name)[:256]:
            for side in ("chosen", "rejected"):
                assert abs(reward(row["prompt"], row[side]) - row[f"{side}_reward"]) < 1e-5
            assert row["chosen_reward"] > row["rejected_reward"]


# --- the files ---


def test_sizes_and_fields():
    assert sum(path.stat().st_size for path in TOY.rglob("*") if "__pycache__" not in path.parts) < 4e6
    assert [len(rows(name)) for name in FILES] == [19200, 512, 14336, 1024, 2048, 256, 2048, 256]
    for name in FILES:
        fields = ["prompt", "completion"] if "sft" in name else ["prompt", "chosen", "rejected", "chosen_truth", "rejected_truth"]
        fields[3:3] = ["chosen_reward", "rejected_reward"] if name in FILES[4:6] else []
        assert all(list(row) == fields for row in rows(name))


def test_prompts_are_disjoint():
    prompts = [row["prompt"] for name in FILES for row in rows(name)]
    assert len(set(prompts)) == len(prompts)


def test_pairs():
    """Two different texts with an end, scored right; nothing in them that the format cannot say."""
    for name in FILES[2:]:
        for row in rows(name):
            assert row["chosen"] != row["rejected"] and row["chosen"] and row["rejected"]
            assert row["chosen_truth"] == make.truth(row["prompt"], row["chosen"])
            assert row["rejected_truth"] == make.truth(row["prompt"], row["rejected"])
            assert not set((row["chosen"] + " " + row["rejected"]).split()) & set(make.SPECIAL)


@pytest.mark.parametrize("name", FILES[2:4])
def test_label_noise_is_bradley_terry(name):
    """Pairs of unequal truth: the better is chosen as often as the sigmoids of the differences say, within 3 standard errors."""
    differences = [row["chosen_truth"] - row["rejected_truth"] for row in rows(name)]
    differences = [d for d in differences if d != 0]
    expected = [1 / (1 + math.exp(-abs(d))) for d in differences]
    error = math.sqrt(sum(p * (1 - p) for p in expected)) / len(expected)
    assert abs(mean([d > 0 for d in differences]) - mean(expected)) < 3 * error
    assert 0.05 < 1 - mean(expected) < 0.4  # there is noise to speak of


@pytest.mark.parametrize("name", FILES[6:])
def test_truth_pairs_have_no_ties_and_no_noise(name):
    assert all(row["chosen_truth"] > row["rejected_truth"] for row in rows(name))


# --- --check ---


def test_check_passes_on_what_is_committed():
    result = run_check(TOY)
    assert result.returncode == 0, result.stdout + result.stderr
    for name in [*FILES, "base/config.json", "base/tokenizer.json", "base/tokenizer_config.json"]:
        assert f"same toy/{name}:" in result.stdout


def damage(path, line, old, new):
    """Change one byte of the content."""
    content = gzip.decompress(path.read_bytes()).split(b"\n")
    assert old in content[line - 1]
    content[line - 1] = content[line - 1].replace(old, new, 1)
    path.write_bytes(gzip.compress(b"\n".join(content)))


def test_check_names_the_changed_line(tmp_path):
    toy = tmp_path / "toy"
    shutil.copytree(TOY, toy, ignore=shutil.ignore_patterns("__pycache__"))
    # recompressed otherwise, same content: no difference
    (toy / "sft_eval.jsonl.gz").write_bytes(gzip.compress(gzip.decompress((TOY / "sft_eval.jsonl.gz").read_bytes()), 1))
    for file in ("evaluate.py", "kernels"):  # make.py runs the scripts beside toy/
        (tmp_path / file).symlink_to(REPO / file)
    damage(toy / "rm_pairs_eval.jsonl.gz", 123, b'"chosen"', b'"chosem"')
    result = run_check(toy)
    assert result.returncode == 1 and "toy/rm_pairs_eval.jsonl.gz:123: differs" in result.stderr, result.stdout + result.stderr
    assert "same toy/sft_eval.jsonl.gz:" in result.stdout

    # the first files fail before any sampling, so these are quick
    damage(toy / "sft.jsonl.gz", 19200, b".", b",")
    result = run_check(toy)
    assert result.returncode == 1 and "toy/sft.jsonl.gz:19200: differs" in result.stderr
    (toy / "sft.jsonl.gz").write_bytes((TOY / "sft.jsonl.gz").read_bytes()[:-100])
    result = run_check(toy)
    assert result.returncode == 1 and "toy/sft.jsonl.gz: cannot be read" in result.stderr
    (toy / "base" / "config.json").unlink()
    result = run_check(toy)
    assert result.returncode == 1 and "toy/base/config.json: cannot be read" in result.stderr


# --- the study ---


def test_truth_as_judge(tmp_path):
    """toy/truth.py puts the truth's verdicts in the place of the reward model's, and leaves the rest of a row alone."""
    run = tmp_path / "runs0" / "dpo"
    (run / "golden_samples" / "5e77").mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"header": 1}\n')
    golden = dict(checkpoint="step_000022", settings="5e77", win_rate=0.1, reward=9.0, kl=2.0, sqrt_kl=1.4)
    (run / "golden.jsonl").write_bytes(make.json_lines([golden]))
    best, half, wrong = "hugo bought tents and leo found cameras .", "hugo bought tents .", "hugo bought cameras ."
    samples = [dict(prompt=POST, references=[half], completions=[best, wrong], stops=["</s>", "</s>"]),
               dict(prompt=POST, references=[half, best], completions=[half, best], stops=["</s>", None])]
    (run / "golden_samples" / "5e77" / "step_000022.jsonl").write_bytes(make.json_lines(samples))
    subprocess.run([sys.executable, TOY / "truth.py", tmp_path / "out", run], check=True)
    (row,) = make.read_lines(tmp_path / "out" / "runs0-dpo" / "golden.jsonl")
    shares = [0.5, (0.5 + 0 + 0 + 0) / 4]  # the unended one is worth 1.68 - 1, below `half`, 0.84
    truths = [(1.68 - 0.91) / 2, (0.84 + 0.68) / 2]
    assert row["win_rate"] == pytest.approx(mean(shares)) and row["reward"] == pytest.approx(mean(truths))
    assert row["win_rate_se"] == pytest.approx(abs(shares[0] - shares[1]) / 2) and row["kl"] == 2.0
    assert (tmp_path / "out" / "runs0-dpo" / "metrics.jsonl").read_text() == '{"header": 1}\n'
    # Rows of other settings, whose samples were not kept, are not given the truth of these: left out, or refused.
    (run / "golden.jsonl").write_bytes(make.json_lines([golden, golden | dict(settings="0ther")]))
    truth = [sys.executable, TOY / "truth.py", tmp_path / "out", run]
    result = subprocess.run(truth, check=True, capture_output=True, text=True)
    assert "no samples of step_000022 under settings 0ther" in result.stdout
    assert make.read_lines(tmp_path / "out" / "runs0-dpo" / "golden.jsonl") == [row]
    (run / "golden.jsonl").write_bytes(make.json_lines([golden | dict(settings="0ther")]))
    result = subprocess.run(truth, capture_output=True, text=True)
    assert result.returncode == 1 and "no samples of any row" in result.stderr and "Traceback" not in result.stderr


def test_rows_and_tables_of_the_golden_study(tmp_path):
    """Two seeds of dpo and is_dpo: the golden model's measures beside the truth's, ESS shares since the checkpoint before, and
    differences of runs of one seed with half their 95% t interval (12.706 standard errors for two)."""
    best, wrong = "hugo bought tents and leo found cameras .", "hugo bought cameras ."
    measures = dict(kl=4.0, sqrt_kl=2.0, reward=1.0, length=9.0, ended=1.0)
    golden = {("dpo", 0): [0.5, 0.6, 0.4], ("dpo", 1): [0.5, 0.5, 0.5], ("is_dpo", 0): [0.5, 0.5, 0.7],
              ("is_dpo", 1): [0.5, 0.5, 0.6]}
    for (loss, seed), win_rates in golden.items():
        run = tmp_path / f"runs{seed}" / loss
        (run / "golden_samples" / "5e77").mkdir(parents=True)
        header = dict(args=dict(loss=loss, beta=0.01, lr=4e-4, seed=seed, log_eps=1.0, batch_size=4))
        logs = [{"step": k, "weights/ess": ess, "weights/mean": 1.0} for k, ess in enumerate([4.0, 4.0, 3.0, 1.0], 1)]
        (run / "metrics.jsonl").write_bytes(make.json_lines([header, *logs]))
        names = {0: "reference", 2: "step_000002", 4: "final"}
        rows = [dict(measures, checkpoint=name, settings="5e77", step=step, win_rate=win_rate) for (step, name), win_rate in
                zip(names.items(), win_rates)]
        rows = [row | {f"{name}_se": 0.1 for name in ("win_rate", *measures)} for row in rows]
        (run / "golden.jsonl").write_bytes(make.json_lines(rows))
        for step, name in names.items():  # by the truth is_dpo's last responses lose, all others tie
            said = wrong if (loss, step) == ("is_dpo", 4) else best
            samples = [dict(prompt=POST, references=[best], completions=[said], stops=["</s>"])] * 2
            (run / "golden_samples" / "5e77" / f"{name}.jsonl").write_bytes(make.json_lines(samples))
    runs = [tmp_path / f"runs{seed}" / loss for loss, seed in golden]
    subprocess.run([sys.executable, TOY / "truth.py", tmp_path / "out", *runs, "--rows", tmp_path / "rows.jsonl"], check=True)
    rows = make.read_lines(tmp_path / "rows.jsonl")
    assert [(row["method"], row["seed"], row["step"]) for row in rows] == [(*run, step) for run in golden for step in (0, 2, 4)]
    assert [row["win_rate"] for row in rows] == [rate for rates in golden.values() for rate in rates]
    assert [row["truth_win_rate"] for row in rows] == [0.5] * 8 + [0.0, 0.5, 0.5, 0.0]
    assert "ess" not in rows[0] and [row["ess"] for row in rows[1:3]] == [1.0, 0.5]  # (4 + 4) / 2 / 4, (3 + 1) / 2 / 4
    text = (tmp_path / "rows.md").read_text()
    # dpo: ends 40, 50; peaks 60, 50; drops 20, 0. is_dpo - dpo: +30, +10 by the golden model, -50, -50 by the truth.
    assert "| dpo | 2 | 45.0 ± 63.5 | 55.0 ± 63.5 | 10.0 ± 127.1 | 2.00 ± 0.00 | 9.0 ± 0.0 | 0.50 ± 0.00 | 50.0 ± 0.0 |" in text
    assert "| is_dpo - dpo | 20.0 ± 127.1 | 2 | -50.0 ± 0.0 | 0 |" in text


def test_study_trains_judges_and_goes_on(tmp_path, monkeypatch):
    """The driver on a short plan: rows of every checkpoint, nothing twice, what stands in no row is made again, and a run
    that another process holds is left to it."""
    monkeypatch.setattr(study, "ROWS", tmp_path / "rows.jsonl")
    for name, value in dict(JUDGED=40, CHOOSING=10, KL=20, STEPS=4, EVERY=3, WARMUP=2).items():
        monkeypatch.setattr(study, name, value)
    command = study.METHODS["dpo"] + " --max_steps 4"
    monkeypatch.setattr(study, "METHODS", {"dpo": command, "wpo": "", "online": ""})
    plan = [(method, 0.01, 1e-3, seed) for seed in (1, 10) for method in ("dpo", "wpo", "online")]
    monkeypatch.setattr(study, "PARTS", {"some": plan})
    (tmp_path / "toy10").mkdir()
    for path in [*TOY.glob("*.gz"), TOY / "sft"]:
        (tmp_path / "toy10" / path.name).symlink_to(path)
    drawn, draw = [], study.draw
    monkeypatch.setattr(study, "draw", lambda toy, of, ids, *how: drawn.extend(ids) or draw(toy, of, ids, *how))
    study.run(tmp_path, ["some"], [10])
    assert len(drawn) == 50 + 7 * (50 + 20) + 4 * 32  # the references, seven policies judged, the steps of online DPO
    assert all(ids[0] == make.WORDS.index("<s>") for ids in drawn)  # BOS, as in training
    made = study.read_rows(study.ROWS)
    steps = [("reference", 0), ("dpo", 3), ("dpo", 4), ("wpo", 3), ("wpo", 4), ("online", 3), ("online", 4)]
    assert [(row["method"], row["step"]) for row in made] == steps
    assert made[0]["kl"] == 0 and all(row["kl"] > 0 for row in made[1:]) and all(row["kl_se"] > 0 for row in made[1:])
    assert made[1]["ess"] == made[1]["weight"] == 1 and 0 < made[3]["weight"] < made[3]["ess"] < 1
    assert "ess" not in made[5]
    assert len({row["truth"] for row in made}) > 1 and not [*(tmp_path / "runs").iterdir()]
    study.run(tmp_path, ["some"], [10])
    assert study.read_rows(study.ROWS) == made
    (tmp_path / "rows.jsonl").write_bytes(make.json_lines(made[:3]))
    with study.locked(tmp_path / "locks" / "wpo-0.01-0.001-10", wait=True):
        study.run(tmp_path, ["some"], [10])
    assert study.read_rows(study.ROWS) == made[:3] + made[5:]
    study.run(tmp_path, ["some"], [10])
    assert study.read_rows(study.ROWS) == made[:3] + made[5:] + made[3:5]


def test_study_scores_and_log_probs():
    """The truth of what a policy says, from the texts; the log-probs of it, by transformers in float64."""
    import torch
    from transformers import AutoModelForCausalLM

    ref, tokenizer, _ = study.ev.load_model(str(TOY / "sft"), study.ev.CausalLM, "fp32", study.CPU)
    rng = random.Random(5)
    prompts = [make.make_post(rng)[0] for _ in range(40)]
    ids = study.prompt_ids(tokenizer, prompts)
    toy = types.SimpleNamespace(ref=ref, tokenizer=tokenizer, prompts=prompts, ids=ids, max_new_tokens=64)
    assert ids == tokenizer(prompts).input_ids  # BOS in front, as in training
    said = study.draw(toy, ref, ids, 2, 1.0, 1.0, "some")
    assert said == [study.draw(toy, ref, [one], 2, 1.0, 1.0, "some")[0] for one in ids]  # of a prompt alone, the same
    texts = [[tokenizer.decode(y).removesuffix(" </s>").removesuffix("</s>") for y in ys] for ys in said]
    expected = [[make.truth(prompt, text, y[-1] == 2) for text, y in zip(both, ys)]
                for prompt, both, ys in zip(prompts, texts, said)]
    assert study.score(toy, prompts, said).tolist() == expected

    theirs = AutoModelForCausalLM.from_pretrained(TOY / "sft", dtype=torch.float64).eval()
    ours, aligned = study.response_logps(ref, ids[:5], said[:5])
    assert ours.requires_grad and not aligned.requires_grad
    for k in range(5):
        for side in range(2):
            rows_of = torch.tensor([[*ids[k], *said[k][side]]])
            probs = theirs(rows_of).logits[0, len(ids[k]) - 1 : -1].softmax(-1)
            logps = probs.gather(1, rows_of[0, len(ids[k]) :, None])[:, 0].log()
            assert ours[k, side].item() == pytest.approx(logps.sum().item(), rel=1e-5)
            alignment = (logps - probs.pow(2).sum(-1).log()).mean()  # WPO's, of which a pair's weight is made
            assert aligned[k, side].item() == pytest.approx(alignment.item(), rel=1e-4, abs=1e-6)


def test_online_dpo_learns_what_is_true():
    """52 steps at a fair rate: its samples score above the reference's by more than three standard errors."""
    toy = types.SimpleNamespace(directory=TOY, max_new_tokens=64)
    toy.ref, toy.tokenizer, _ = study.ev.load_model(str(TOY / "sft"), study.ev.CausalLM, "fp32", study.CPU)
    rng = random.Random(6)
    prompts = [make.make_post(rng)[0] for _ in range(256)]
    ids = study.prompt_ids(toy.tokenizer, prompts)
    truths = lambda policy: study.score(toy, prompts, study.draw(toy, policy, ids, 1, 1.0, 1.0, "held out"))[:, 0]
    policy = next(policy for step, policy, _ in study.train_here(toy, "online", 0.01, 4e-4, 0) if step == 52)
    gain = truths(policy) - truths(toy.ref)
    assert gain.mean() > 3 * gain.std() / 16


def test_wpo_with_weights_of_one_is_the_trainers_dpo(tmp_path, monkeypatch):
    """The loop that trains WPO, its weights taken away, against train_pref.py: same pairs, order, rate and clipping."""
    monkeypatch.setitem(study.METHODS, "dpo", "--loss dpo --max_steps 6")
    monkeypatch.setattr(study, "STEPS", 6)
    monkeypatch.setattr(study, "EVERY", 3)
    monkeypatch.setattr(study, "WARMUP", 30)  # longer than the run: a tenth of it, in both
    logps = study.response_logps
    monkeypatch.setattr(study, "response_logps", lambda *of: (logps(*of)[0], 0 * logps(*of)[1].detach()))
    toy = types.SimpleNamespace(directory=tmp_path / "toy", long=False)
    toy.directory.mkdir()
    for name in ("sft", "truth_pairs.jsonl.gz"):
        (toy.directory / name).symlink_to(TOY / name)
    toy.ref, toy.tokenizer, _ = study.ev.load_model(str(TOY / "sft"), study.ev.CausalLM, "fp32", study.CPU)
    ours = [(step, [p.detach().clone() for p in policy.parameters()], log) for step, policy, log in
            study.train_here(toy, "wpo", 0.01, 1e-3, 0)]
    theirs = [*study.train_offline(toy, "dpo", 0.01, 1e-3, 0, tmp_path / "run")]
    assert [step for step, *_ in ours] == [step for step, *_ in theirs] == [3, 6]
    for (_, mine, log), (_, policy, _) in zip(ours, theirs):
        assert log == dict(ess=1, weight=1)
        for p, q, before in zip(mine, policy.parameters(), toy.ref.parameters()):
            assert (p - q).norm() < 1e-3 * (q - before).norm()


def test_quantiles_of_t():
    """The density integrated up to each: 97.5%."""
    for df, t in enumerate(study.T_975, 1):
        n, scale = 20000, math.gamma((df + 1) / 2) / math.gamma(df / 2) / math.sqrt(df * math.pi)
        area = scale * sum((1 + ((k + 0.5) * t / n) ** 2 / df) ** (-(df + 1) / 2) for k in range(n)) * t / n
        assert 0.5 + area == pytest.approx(0.975, abs=5e-5)


def test_study_uses_flags_that_exist():
    subprocess.run(["bash", "-n", TOY / "study.sh"], check=True)
    flags = set(re.findall(r"[ \"](--[a-z_]+)", (TOY / "study.sh").read_text() + (TOY / "study.py").read_text()))
    scripts = "train_pref.py", "plumbing/run.py", "evaluate.py", "toy/make.py", "toy/study.py", "toy/truth.py"
    sources = "".join((REPO / name).read_text() for name in scripts)
    assert len(flags) > 12 and not [flag for flag in flags if f'"{flag}"' not in sources]
