"""The log-probs of whoever sampled a pair, from `sample` through `label` to the trainer's weight, against transformers' logits."""

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import evaluate as ev
import train_pref
from plumbing.data import load_tokenizer

N, K = 10, 3


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def theirs(model, prompt, response, temperature, top_p):
    """By transformers' logits, in float64 numpy: each token's share of what is kept at its step, or -inf."""
    with torch.no_grad():
        logits = model.double()(torch.tensor([prompt + response])).logits[0].numpy() / temperature
    total = 0.0
    for t, token in enumerate(response):
        row = logits[len(prompt) + t - 1]
        probs = np.exp(row - row.max())
        probs /= probs.sum()
        order = np.argsort(-probs, kind="stable")
        before = np.concatenate([[0.0], np.cumsum(probs[order])[:-1]])
        kept = set(order[before < top_p].tolist())
        total += math.log(probs[token] / probs[list(kept)].sum()) if token in kept else -math.inf
    return total


@pytest.fixture(scope="module")
def model_dir(tiny_llama, tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("model"), seed=3)


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 0.8)])
def test_samples_have_them(run_script, tmp_path, temperature, top_p):
    """Of what was drawn, in the place of each completion; None for one without its end. Nothing at temperature 0."""
    toy = Path(ev.__file__).parent / "toy" / "sft"
    argv = ["sample", "--preset", "toy", "--n", N, "--k", K, "--max_new_tokens", 11, "--seed", 2]
    out = tmp_path / "samples.jsonl"
    run_script("evaluate")(*argv, "--temperature", temperature, "--top_p", top_p, "--out", out).ok()
    model = AutoModelForCausalLM.from_pretrained(toy)
    tokenizer = load_tokenizer(toy)
    kinds = Counter()
    for row in read(out):
        prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        first = tokenizer("a")["input_ids"][:1]
        prompt = (first if first == [tokenizer.bos_token_id] else []) + prompt
        assert len(row["logps"]) == K
        for text, stop, logp in zip(row["completions"], row["stops"], row["logps"]):
            kinds[stop is None, logp is None] += 1
            if logp is not None:
                response = tokenizer(text + stop, add_special_tokens=False)["input_ids"]
                assert logp == pytest.approx(theirs(model, prompt, response, temperature, top_p), abs=2e-3)
    # (cut, without log-prob): what was cut has none, and what was not has one.
    assert kinds.keys() == {(True, True), (False, False)}, kinds
    run_script("evaluate")(*argv, "--temperature", 0, "--out", tmp_path / "greedy.jsonl").ok()
    assert all("logps" not in row for row in read(tmp_path / "greedy.jsonl"))


def test_a_draw_is_as_likely_as_its_log_prob(model_dir, process_group):
    """All responses of one token, enumerated: their probabilities are those with which next_tokens draws them, and sum to 1."""
    policy = ev.build_model(lambda: ev.CausalLM(ev.read_config(model_dir)), "cpu", "fp32")
    ev.load_weights(policy, model_dir)
    prompt, V = [256, 5, 9], 272
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (1.3, 0.6)):
        logps = ev.sampler_logps(policy, [prompt], [[[token] for token in range(V)]], temperature, top_p)[:, 0]
        assert logps.exp().sum().item() == pytest.approx(1, abs=1e-9)
        uniform = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
        row = policy.logits(policy.model(torch.tensor([prompt]), torch.arange(3)[None], torch.zeros(1, 3, dtype=torch.long))[0, -1:])
        drawn = ev.next_tokens(row.expand(20_000, -1), uniform, temperature, top_p)
        shares = torch.bincount(drawn, minlength=V) / 20_000
        torch.testing.assert_close(logps.exp(), shares.double(), rtol=0, atol=2e-4)


def labelled(row, rewards, *more):
    args = ev.parse_args(["label", "--samples", "s.jsonl", "--out", "o.jsonl", *more])
    return ev.choose_pair(row, rewards, "</s>", args)


def test_label_carries_them_on():
    row = dict(prompt="p:", completions=[" a", " b", " c"], stops=["</s>"] * 3, logps=[-1.5, None, -2.5])
    pair = labelled(row, [0.0, 1.0, 2.0])
    assert (pair["chosen"], pair["chosen_logps"], pair["rejected"], pair["rejected_logps"]) == (" c", -2.5, " a", -1.5)
    assert not {"chosen_logps", "rejected_logps"} & labelled(row, [0.0, 9.0, 2.0]).keys()  # that of " b" is not known
    logps = train_pref.split_pair(pair, None).behaviour_logps
    assert logps == (-2.5, -1.5)


def test_random_pairs_are_any_two():
    """Each of the three pairs of three completions about as often, the better one chosen; the same again for the same prompt."""
    found = Counter()
    for k in range(600):
        row = dict(prompt=f"p{k}:", completions=[" a", " b", " c"], stops=["</s>"] * 3)
        pair = labelled(row, [0.0, 1.0, 2.0], "--pairs", "random")
        assert pair == labelled(row, [0.0, 1.0, 2.0], "--pairs", "random") and pair["chosen_reward"] > pair["rejected_reward"]
        found[pair["chosen"], pair["rejected"]] += 1
    assert found.keys() == {(" b", " a"), (" c", " a"), (" c", " b")} and all(abs(n - 200) < 60 for n in found.values())
    pair = labelled(row, [0.0, 1.0, 2.0])
    assert (pair["chosen"], pair["rejected"]) == (" c", " a")
