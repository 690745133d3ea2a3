"""evaluate.py: generation against transformers and exact distributions, estimators against enumeration, files against numpy."""

import itertools
import json
import math
import random

import numpy as np
import pytest
import torch
from conftest import ROOT, byte_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.generation import TemperatureLogitsWarper, TopPLogitsWarper

import evaluate as ev

CPU = torch.device("cpu")
TOY = ROOT / "toy"


def load(directory, precision="fp32"):
    return ev.load_model(str(directory), ev.CausalLM, precision, CPU)


def uniforms(prompts, k, n, seed=0):
    return torch.stack([ev.uniform_numbers(prompt, k, n, seed) for prompt in prompts])


def sampled(policy, prompts, k, n, stops, temperature=1.0, top_p=1.0, seed=0):
    return ev.generate(policy, prompts, uniforms(prompts, k, n, seed), temperature, top_p, stops)


# ------------------------------------------------------------------------------------------------------------ generation
def greedy_by_transformers(model, prompt, n, stops):
    ids = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=n, eos_token_id=stops, pad_token_id=0)
    return ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize("config", [dict(), dict(num_key_value_heads=1, tie_word_embeddings=True), dict(num_key_value_heads=4, head_dim=16),
                                    dict(rope_parameters=dict(rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0,
                                         high_freq_factor=4.0, original_max_position_embeddings=16))])
def test_greedy_equals_transformers(tiny_llama, tmp_path, process_group, config):
    directory = tiny_llama(tmp_path / "m", **config)
    policy, model = load(directory)[0], AutoModelForCausalLM.from_pretrained(directory)
    prompts = [list(range(40, 40 + n)) for n in (3, 17, 9, 1)]
    ours = sampled(policy, prompts, 3, 20, [257], temperature=0)
    for prompt, completions in zip(prompts, ours):
        assert completions == [greedy_by_transformers(model, prompt, 20, 257)] * 3


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (4, 1)])
def test_cached_forward_equals_transformers(tiny_llama, tmp_path, process_group, heads, kv_heads):
    """A prompt in two pieces, then the tokens of two completions in turn, one and three at a time: logits of each completion
    are those of transformers for the prompt and that completion alone. The other row of the batch is shorter, and padded."""
    directory = tiny_llama(tmp_path / "m", num_attention_heads=heads, num_key_value_heads=kv_heads, attention_bias=True, mlp_bias=True)
    policy, model = load(directory)[0], AutoModelForCausalLM.from_pretrained(directory)
    prompts, said = [list(range(40, 49)), list(range(60, 66))], [[[7, 8, 9, 10], [20, 21, 22, 23]], [[1, 2, 3, 4], [5, 6, 7, 8]]]
    cache = ev.Cache(policy.config, 2, 9 + 8 + 2, torch.float32, CPU)
    length = torch.tensor([9, 6])

    def forward(columns):  # of (token, position, segment) a row
        ids, positions, segments = (torch.tensor([[cell[k] for cell in row] for row in columns]) for k in range(3))
        with torch.no_grad():
            return policy.logits(ev.cached_forward(policy.model, ids, positions, segments, cache))

    rows = [[(token, t, 0) for t, token in enumerate(prompt)] + [(0, 0, -1)] * (9 - len(prompt)) for prompt in prompts]
    forward([row[:4] for row in rows])
    forward([row[4:] for row in rows])
    found = {}
    for first, last in ((0, 1), (1, 4)):
        cells = [(j, t) for t in range(first, last) for j in (0, 1)]
        logits = forward([[(said[b][j][t], int(length[b]) + t, j + 1) for j, t in cells] for b in (0, 1)])
        found |= {(b, *cell): logits[b, k] for b in (0, 1) for k, cell in enumerate(cells)}
    for (b, j, t), logits in found.items():
        with torch.no_grad():
            exact = model(torch.tensor([prompts[b] + said[b][j][: t + 1]])).logits[0, -1]
        assert (logits - exact).abs().max() < 2e-5 * exact.abs().max(), (b, j, t)
    cache.keep(torch.tensor([False, True]))  # the first prompt has ended
    more = torch.tensor([[11, 12]]), torch.tensor([[10, 10]]), torch.tensor([[1, 2]])
    with torch.no_grad():
        logits = policy.logits(ev.cached_forward(policy.model, *more, cache))[0]
        for j in (0, 1):
            exact = model(torch.tensor([prompts[1] + said[1][j] + [11 + j]])).logits[0, -1]
            assert (logits[j] - exact).abs().max() < 2e-5 * exact.abs().max()


def test_greedy_equals_transformers_on_stories(stories, process_group):
    policy, tokenizer, _ = load(stories)
    model = AutoModelForCausalLM.from_pretrained(stories)
    prompts = [[tokenizer.bos_token_id] + tokenizer.encode(text, add_special_tokens=False)
               for text in ("Once upon a time", "The cat", "Lily and Tom went to the park. They saw a big", "One day,")]
    ours = sampled(policy, prompts, 2, 100, [tokenizer.eos_token_id], temperature=0)
    for prompt, completions in zip(prompts, ours):
        assert completions == [greedy_by_transformers(model, prompt, 100, tokenizer.eos_token_id)] * 2


def test_greedy_equals_transformers_on_smollm(smollm, shared, process_group):
    policy, tokenizer, directory = load(smollm)
    model = AutoModelForCausalLM.from_pretrained(smollm, dtype=torch.float32)
    posts = [row["prompt"] for _, row in itertools.islice(ev.read_jsonl(shared / "data" / "tldr_sft.jsonl.gz"), 2)]
    prompts = [tokenizer.encode(post, add_special_tokens=False)[-60:] for post in posts] + [tokenizer.encode("The capital of France is")]
    stops = sorted(ev.stop_ids(tokenizer))
    for prompt, completions in zip(prompts, sampled(policy, prompts, 2, 16, stops, temperature=0)):
        assert completions == [greedy_by_transformers(model, prompt, 16, stops)] * 2


def test_completions_depend_on_nothing_else(tiny_llama, tmp_path, process_group):
    """Not on the batch, its padding, the other completions, or on who has ended."""
    policy = load(tiny_llama(tmp_path / "m"))[0]
    prompts = [list(range(30, 30 + n)) for n in (12, 3, 7, 7, 1)]
    stops = list(range(0, 272, 9))  # many: some end at once, some not at all
    together = sampled(policy, prompts, 4, 24, stops)
    assert {len(y) for ys in together for y in ys} >= {1, 24}
    for k in (1, 2, 4):
        assert [sampled(policy, [prompt], k, 24, stops)[0] for prompt in prompts] == [ys[:k] for ys in together]
    assert sampled(policy, prompts[::-1], 4, 24, stops) == together[::-1]
    shorter = sampled(policy, prompts, 4, 10, stops)
    assert shorter == [[y[:10] for y in ys] for ys in together]
    assert sampled(policy, prompts, 4, 24, stops, seed=1) != together
    assert len({tuple(y) for y in sampled(policy, prompts, 4, 24, [])[0]}) == 4  # the completions of a prompt differ


def test_what_is_sampled_is_what_was_asked(tiny_llama, tmp_path, process_group):
    """Chi-square: pairs of tokens after a prompt, against their exact probabilities by transformers' forward and warpers."""
    directory = tiny_llama(tmp_path / "m", vocab_size=12, num_key_value_heads=1, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    policy, model = ev.build_model(lambda: ev.CausalLM(ev.read_config(directory)), CPU, "fp32"), None
    ev.load_weights(policy, directory)
    model = AutoModelForCausalLM.from_pretrained(directory).double()
    prompt, k = [5, 3, 7], 4000
    for temperature, top_p in ((1.0, 1.0), (0.7, 0.9), (2.0, 0.5)):
        warp = lambda logits: TopPLogitsWarper(top_p)(None, TemperatureLogitsWarper(temperature)(None, logits)).softmax(-1)[0]
        with torch.no_grad():
            first = warp(model(torch.tensor([prompt])).logits[:, -1])
            exact = torch.stack([first[a] * warp(model(torch.tensor([prompt + [a]])).logits[:, -1]) for a in range(12)]).numpy()
        counts = np.zeros((12, 12))
        for a, b in sampled(policy, [prompt], k, 2, [], temperature, top_p, seed=f"{temperature}")[0]:
            counts[a, b] += 1
        assert counts[exact == 0].sum() == 0 and (top_p == 1 or (exact == 0).any())
        cells = exact * k >= 5
        rest, expected = counts[~cells].sum(), exact[~cells].sum() * k
        chi2 = ((counts[cells] - exact[cells] * k) ** 2 / (exact[cells] * k)).sum() + ((rest - expected) ** 2 / expected if expected else 0)
        degrees = cells.sum() - (expected == 0)
        assert cells.sum() > 8 and abs(chi2 - degrees) < 4 * math.sqrt(2 * degrees), (chi2, degrees)


@pytest.mark.parametrize("V", [7, 512, 3000])  # 3000 flat ones: more than the 512 likeliest are needed
def test_next_tokens_inverts_the_distribution(V):
    """At equally spaced numbers each token comes as often as its probability says, to one: exactly, without chance."""
    generator = torch.Generator().manual_seed(V)
    for scale, top_p in ((1.0, 1.0), (1.0, 0.95), (3.0, 0.9), (0.01, 0.99)):
        logits = scale * torch.randn(1, V, generator=generator)
        n = 4000
        uniform = (torch.arange(n, dtype=torch.float64) + 0.5) / n
        counts = torch.bincount(ev.next_tokens(logits.expand(n, -1), uniform, 0.8, top_p), minlength=V).double()
        p = np.exp(logits[0].double().numpy() / 0.8)
        p /= p.sum()
        order = np.argsort(-p)
        kept = order[: np.searchsorted(np.cumsum(p[order]), top_p) + 1] if top_p < 1 else order
        exact = np.zeros(V)
        exact[kept] = p[kept] / p[kept].sum()
        assert np.abs(counts.numpy() - n * exact).max() <= 1 + 1e-6
    edges = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    impossible = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]]).expand(2, -1)
    assert ev.next_tokens(impossible, edges, 1.0, 1.0).tolist() == [1, 2]
    assert ev.next_tokens(impossible, edges, 1.0, 0.5).tolist() == [2, 2]
    assert ev.next_tokens(impossible, edges, 0, 1.0).tolist() == [2, 2]


def test_fp64_is_float64(tiny_llama, tmp_path, process_group):
    directory = tiny_llama(tmp_path / "m")
    policy, model = load(directory, "fp64")[0], AutoModelForCausalLM.from_pretrained(directory).double()
    rows, places = ev.response_rows([[65, 66]], [[[67, 68, 69]]])
    hidden = policy.model(**{k: v for k, v in ev.batch_tensors(rows, [], CPU).items() if k != "predict"})
    with torch.no_grad():
        difference = policy.logits(hidden[0]) - model(torch.tensor([[65, 66, 67, 68, 69]])).logits[0]
    assert policy.logits(hidden[0]).dtype == torch.float64 and difference.abs().max() < 1e-5  # rotary angles are float32


def test_generation_with_attention_laid_out_as_by_a_gpu(tiny_llama, tmp_path, monkeypatch, process_group):
    """A GPU's attention kernels give (B, H, T, head_dim) with the heads of a token beside each other in memory."""
    policy = load(tiny_llama(tmp_path / "m"))[0]
    prompts = [list(range(30, 30 + n)) for n in (12, 3, 7)]
    expected = ev.generate(policy, prompts, uniforms(prompts, 3, 20), 1.0, 0.95, [257])
    attention = torch.nn.functional.scaled_dot_product_attention
    heads_beside_each_other = lambda *args, **how: attention(*args, **how).transpose(1, 2).contiguous().transpose(1, 2)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", heads_beside_each_other)
    assert ev.generate(policy, prompts, uniforms(prompts, 3, 20), 1.0, 0.95, [257]) == expected


@pytest.mark.gpu
def test_generation_on_a_gpu(tiny_llama, tmp_path, process_group):
    """float32: the CPU's completions. bf16: float32 logits from 16-bit products, within rounding of the float32 model's."""
    directory, gpu = tiny_llama(tmp_path / "m"), torch.device("cuda")
    prompts = [list(range(30, 30 + n)) for n in (12, 3, 7)]
    policy = ev.load_model(str(directory), ev.CausalLM, "fp32", gpu)[0]
    ours = ev.generate(policy, prompts, uniforms(prompts, 3, 20), 1.0, 0.95, [257])
    assert ours == sampled(load(directory)[0], prompts, 3, 20, [257], top_p=0.95)
    half = ev.load_model(str(directory), ev.CausalLM, "bf16", gpu)[0]
    hidden = torch.randn(5, 32, device=gpu)
    logits = half.logits(hidden.bfloat16())
    assert logits.dtype == torch.float32 and (logits - policy.logits(hidden)).abs().max() < 0.05
    kl = ev.divergences(half, policy, prompts, [[[1, 2, 3]]] * 3)
    assert kl.abs().max() < 0.05


# ------------------------------------------------------------------------------------------------------------ estimators
class Enumerated:
    """Two tiny models over 5 tokens, responses of up to 3 tokens (EOS is 0): everything can be summed over all responses."""

    N, STOP, PROMPT = 3, 0, [3, 1, 4]

    def __init__(self, tmp_path):
        self.models, self.policies = [], []
        for seed in (0, 1):
            config = LlamaConfig(vocab_size=5, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                                 num_key_value_heads=1, bos_token_id=1, eos_token_id=0)
            model = LlamaForCausalLM(config)
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for param in model.parameters():
                    param.normal_(std=0.5, generator=generator)
            model.save_pretrained(tmp_path / str(seed))
            policy = ev.build_model(lambda c=ev.read_config(tmp_path / str(seed)): ev.CausalLM(c), CPU, "fp32")
            ev.load_weights(policy, tmp_path / str(seed))
            self.models.append(model.double().eval())
            self.policies.append(policy)
        self.responses = [list(y) for n in (1, 2, 3) for y in itertools.product(range(5), repeat=n)
                          if 0 not in y[:-1] and (y[-1] == 0 or n == 3)]

    @torch.no_grad()
    def log_prob(self, model, y, temperature=1.0, top_p=1.0):
        logits = self.models[model](torch.tensor([self.PROMPT + y])).logits[0, len(self.PROMPT) - 1 : -1]
        if top_p < 1 or temperature != 1:
            logits = TopPLogitsWarper(top_p)(None, TemperatureLogitsWarper(temperature)(None, logits))
        return logits.log_softmax(-1).gather(1, torch.tensor(y)[:, None]).sum().item()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, process_group):
    return Enumerated(tmp_path_factory.mktemp("enumerated"))


def test_kl_is_unbiased(tiny):
    """200 draws of the estimate golden makes, against the sum over all 85 responses."""
    log_pi = np.array([tiny.log_prob(0, y) for y in tiny.responses])
    log_ref = np.array([tiny.log_prob(1, y) for y in tiny.responses])
    pi, r = np.exp(log_pi), np.exp(log_pi - log_ref)
    assert abs(pi.sum() - 1) < 1e-9
    exact = (pi * np.log(r)).sum()
    responses = sampled(tiny.policies[0], [tiny.PROMPT], 200, 3, [0])
    estimates = ev.divergences(*tiny.policies, [tiny.PROMPT], responses).numpy()
    for column in (0, 1):
        mean, error = estimates[:, column].mean(), estimates[:, column].std(ddof=1) / math.sqrt(200)
        assert abs(mean - exact) < 3 * error, (column, mean, exact, error)
    assert (estimates[:, 0] >= 0).all() and estimates[:, 0].std() < 0.5 * estimates[:, 1].std()  # what Rao and Blackwell promise
    # Without chance: the mean over all responses, each with its probability, is the KL, for both.
    everything = ev.divergences(*tiny.policies, [tiny.PROMPT], [tiny.responses]).numpy()
    assert np.abs(pi @ everything - exact).max() < 1e-6
    assert np.abs(everything[:, 1] - np.log(r)).max() < 1e-5
    # Erratum: Appendix C prints log r + (r - 1), and says it is unbiased. Its mean is KL + chi^2(pi || ref); 1/r makes it right.
    chi2 = (pi**2 / np.exp(log_ref)).sum() - 1
    assert abs((pi * (np.log(r) + r - 1)).sum() - (exact + chi2)) < 1e-9 and chi2 > exact > 0.1
    assert abs((pi * (np.log(r) + 1 / r - 1)).sum() - exact) < 1e-9


def test_win_rate_by_enumeration(tiny):
    """The expected win rate at temperature 0.7 and top-p 0.95 against two reference responses, a tie among them."""
    reward = {tuple(y): float(7 * sum(y) % 5) for y in tiny.responses}  # few values: ties happen
    theirs = torch.tensor([2.0, 3.5])
    exact = sum(math.exp(tiny.log_prob(0, y, 0.7, 0.95)) * ((reward[tuple(y)] > theirs).double() + 0.5 * (reward[tuple(y)] == theirs)).mean().item()
                for y in tiny.responses)
    draws = 400
    shares = [ev.win_shares([torch.tensor([reward[tuple(y)] for y in ys])], [theirs])
              for ys in (sampled(tiny.policies[0], [tiny.PROMPT], 2, 3, [0], 0.7, 0.95, seed=seed)[0] for seed in range(draws))]
    mean, error = ev.mean_and_error(torch.cat(shares))
    assert 0.05 < exact < 0.95 and abs(mean - exact) < 3 * error, (mean, exact, error)


def test_win_shares_and_errors_against_numpy():
    rng = np.random.default_rng(0)
    ours = [torch.tensor(rng.integers(0, 4, size=3).astype(float)) for _ in range(50)]
    theirs = [torch.tensor(rng.integers(0, 4, size=n).astype(float)) for n in rng.integers(1, 4, size=50)]
    by_hand = [np.mean([1.0 if a > b else 0.5 if a == b else 0.0 for a in x.tolist() for b in y.tolist()]) for x, y in zip(ours, theirs)]
    shares = ev.win_shares(ours, theirs)
    assert np.allclose(shares, by_hand, atol=1e-12)
    mean, error = ev.mean_and_error(shares)
    assert math.isclose(mean, np.mean(by_hand)) and math.isclose(error, np.std(by_hand, ddof=1) / math.sqrt(50))
    # The error is that of prompts: saying each completion ten times makes it no smaller.
    assert math.isclose(ev.mean_and_error(ev.win_shares([x.repeat(10) for x in ours], theirs))[1], error)
    assert math.isnan(ev.mean_and_error(torch.tensor([0.3]))[1])


@pytest.mark.parametrize("lengths", [(5, 9), (270, 290)])  # of the longer ones attention takes the first 270 columns apart
def test_divergences_against_float64(tiny_llama, tmp_path, process_group, lengths):
    """Two prompts, three responses each in one row, against transformers in float64, a response at a time."""
    a, b = tiny_llama(tmp_path / "a", seed=0), tiny_llama(tmp_path / "b", seed=1)
    policies, models = [load(d)[0] for d in (a, b)], [AutoModelForCausalLM.from_pretrained(d).double() for d in (a, b)]
    generator = random.Random(0)
    draw = lambda n: [generator.randrange(272) for _ in range(n)]
    prompts, responses = [draw(n) for n in lengths], [[draw(n) for n in (4, 1, 7)], [draw(n) for n in (2, 6, 1)]]
    ours = ev.divergences(*policies, prompts, responses)
    for row, (x, y) in zip(ours, ((x, y) for x, ys in zip(prompts, responses) for y in ys)):
        with torch.no_grad():
            p, q = (m(torch.tensor([x + y])).logits[0, len(x) - 1 : -1].log_softmax(-1) for m in models)
        kl, k1 = (p.exp() * (p - q)).sum(), (p - q).gather(1, torch.tensor(y)[:, None]).sum()
        assert abs(row[0] - kl) < 1e-4 * max(1, kl) and abs(row[1] - k1) < 1e-4 * max(1, abs(k1))


# ----------------------------------------------------------------------------------------------------- the commands: sample
@pytest.fixture(scope="module")
def policy_dir(tiny_llama, tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("policy") / "m")


@pytest.fixture(scope="module")
def prompt_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [dict(prompt=f"post {'x' * (3 * n)} TL;DR:", chosen=f" good {n}", rejected=" bad") for n in range(9)]
    rows += [dict(prompt=rows[0]["prompt"], chosen=" good again", rejected=" bad"), dict(prompt="no answer yet:"),
             dict(prompt=7, chosen="a"), dict(prompt="empty", completion=" ")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sample_args(policy_dir, prompt_file, out, *more):
    return ["sample", "--model", policy_dir, "--data", prompt_file, "--out", out, "--max_new_tokens", 12, "--n", 20, "--k", 3, *more]


def read(path):
    return [row for _, row in ev.read_jsonl(path)]


def write_samples(path, rows):
    """What `sample` would write, of a format that says so."""
    path.write_text("".join(json.dumps(dict(format=2) | row) + "\n" for row in rows))
    return path


def bare_run(folder, ref, steps=1, **header):
    """A preference run's folder with nothing but the header: trained against `ref`, without a checkpoint."""
    folder.mkdir()
    header = dict(pairs=8, steps=steps, args=dict(batch_size=8, model=str(ref)), ref=ev.model_fingerprint(ref)) | header
    (folder / "metrics.jsonl").write_text(json.dumps(header) + "\n")
    return folder


def test_sample(run_script, policy_dir, prompt_file, tmp_path):
    run = run_script("evaluate")
    result = run(*sample_args(policy_dir, prompt_file, tmp_path / "s.jsonl")).ok()
    assert "10 prompts of 13 rows" in result.out and "1 wrong types" in result.out and "1 empty completion" in result.out
    rows = read(tmp_path / "s.jsonl")
    assert [row["index"] for row in rows] == [*range(9), 10]
    assert rows[0]["references"] == [" good 0", " good again"] and rows[-1]["references"] == []
    policy, tokenizer, directory = load(policy_dir)
    for row in rows[::4]:
        prompt = [tokenizer.bos_token_id] + tokenizer.encode(row["prompt"], add_special_tokens=False)
        ids = sampled(policy, [prompt], 3, 12, [257], 0.7, 0.95)[0]
        assert row["n_tokens"] == [len(y) for y in ids] and row["stops"] == ["</s>" if y[-1] == 257 else None for y in ids]
        assert row["completions"] == [tokenizer.decode(y[:-1] if y[-1] == 257 else y) for y in ids]
    assert '"completions": 30' in result.out and json.loads((tmp_path / "s.about.json").read_text())["top_p"] == 0.95
    # Two ranks, other batches: the same bytes.
    run(*sample_args(policy_dir, prompt_file, tmp_path / "t.jsonl", "--batch_size", 4), world=2).ok()
    assert (tmp_path / "t.jsonl").read_bytes() == (tmp_path / "s.jsonl").read_bytes()
    # Again: nothing to do. Otherwise: refused. The first prompts alone: the same completions.
    assert "is complete" in run(*sample_args(policy_dir, prompt_file, tmp_path / "s.jsonl")).ok().out
    run(*sample_args(policy_dir, prompt_file, tmp_path / "s.jsonl", "--seed", 1)).refused("seed was 0, is 1")
    run(*sample_args(policy_dir, prompt_file, tmp_path / "u.jsonl", "--n", 2, "--k", 1)).ok()
    assert [row["completions"] for row in read(tmp_path / "u.jsonl")] == [row["completions"][:1] for row in rows[:2]]


def test_sample_resumes(run_script, policy_dir, prompt_file, tmp_path):
    """Killed while it wrote: half a line goes, whole ones are not sampled again, the end is the same."""
    run, out = run_script("evaluate"), tmp_path / "s.jsonl"
    argv = sample_args(policy_dir, prompt_file, out, "--batch_size", 3)
    run(*argv).ok()
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)
    marked = lines[4].replace(b'"index": 4, ', b'"index": 4, "kept": true, ')
    out.write_bytes(marked + lines[2] + lines[7][:30])
    run(*argv).ok()
    assert out.read_bytes() == whole.replace(lines[4], marked)
    (tmp_path / "s.about.json").unlink()
    run(*argv).refused(out, "choose another --out")


def test_a_full_disk_while_sampling(run_script, policy_dir, prompt_file, tmp_path):
    """The error names the file; the same command finishes it, to the byte."""
    from functools import partial

    from runs import full_disk

    run, argv = run_script("evaluate"), ("sample", "--model", policy_dir, "--data", prompt_file, "--batch_size", 2, "--max_new_tokens", 5)
    run(*argv, "--out", tmp_path / "whole.jsonl").ok()
    size = (tmp_path / "whole.jsonl").stat().st_size
    assert size > 2 * (tmp_path / "whole.about.json").stat().st_size
    run(*argv, "--out", tmp_path / "s.jsonl", action=partial(full_disk, size=size - 1)).refused("cannot write", tmp_path / "s.jsonl", "are kept")
    assert (tmp_path / "s.jsonl").stat().st_size == size - 1
    run(*argv, "--out", tmp_path / "s.jsonl").ok()
    assert (tmp_path / "s.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_an_empty_completion_is_recorded(run_script, policy_dir, prompt_file, tmp_path):
    """A policy that stops at once: its first greedy token is named as an end in generation_config.json."""
    import shutil

    directory = shutil.copytree(policy_dir, tmp_path / "m")
    policy, tokenizer, _ = load(policy_dir)
    prompt = [tokenizer.bos_token_id] + tokenizer.encode("post  TL;DR:", add_special_tokens=False)
    first = sampled(policy, [prompt], 1, 1, [], temperature=0)[0][0][0]
    (directory / "generation_config.json").write_text(json.dumps(dict(eos_token_id=[first])))
    result = run_script("evaluate")(*sample_args(directory, prompt_file, tmp_path / "s.jsonl", "--temperature", 0, "--n", 1)).ok()
    row = read(tmp_path / "s.jsonl")[0]
    assert row["completions"] == [""] * 3 and None not in row["stops"] and row["n_tokens"] == [1] * 3
    assert '"empty": 3' in result.out


def test_conversations_are_rendered(run_script, policy_dir, tmp_path):
    import shutil

    directory = shutil.copytree(policy_dir, tmp_path / "m")
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    byte_tokenizer(directory, chat_template=template)
    data, user = tmp_path / "chat.jsonl", dict(role="user", content="hi")
    answer = [dict(role="assistant", content="ho")]
    data.write_text("".join(json.dumps(row) + "\n" for row in (dict(prompt=[user]), dict(chosen=[user, *answer]),
                                                               dict(messages=[user, *answer, user, *answer]))))
    run_script("evaluate")(*sample_args(directory, data, tmp_path / "s.jsonl")).ok()
    rows = read(tmp_path / "s.jsonl")
    assert [(row["prompt"], row["references"]) for row in rows] == [([user], ["ho"]), ([user, *answer, user], ["ho"])]
    policy, tokenizer, _ = load(directory)  # what they are answers to is what the template makes of them
    for row, text in zip(rows, ("[user]hi[assistant]", "[user]hi[assistant]ho[user]hi[assistant]")):
        ids = sampled(policy, [tokenizer.encode(text, add_special_tokens=False)], 3, 12, [257], 0.7, 0.95)[0]
        assert row["completions"] == [tokenizer.decode([i for i in y if i != 257]) for y in ids]


# ------------------------------------------------------------------------------------------------------ the commands: label
@pytest.fixture(scope="module")
def rm_dir(tmp_path_factory):
    """A random reward model as transformers saves it."""
    from transformers import LlamaForSequenceClassification

    from conftest import randomize

    directory = tmp_path_factory.mktemp("rm")
    config = LlamaConfig(vocab_size=272, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, bos_token_id=256, eos_token_id=257, pad_token_id=258, num_labels=1)
    model = LlamaForSequenceClassification(config).float()
    randomize(model, 5)
    model.save_pretrained(directory)
    byte_tokenizer(directory)
    return directory


def score_by_transformers(rm_dir, prompt, text, ended=True):
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(rm_dir), AutoTokenizer.from_pretrained(rm_dir)
    ids = [256] + tokenizer.encode(prompt, add_special_tokens=False) + tokenizer.encode(text, add_special_tokens=False)
    with torch.no_grad():
        return model(torch.tensor([ids + ([257] if ended or not text else [])])).logits[0, 0].item()


def test_label(run_script, rm_dir, tmp_path):
    samples = [dict(prompt="one:", completions=["a", "bb", "ccc", "dddd"], stops=["</s>"] * 4, index=0),
               dict(prompt="two:", completions=["same", "same"], stops=["</s>", "</s>"], index=1),
               dict(prompt="three is longer:", completions=["x", "cut o"], stops=["</s>", None], index=2),
               dict(prompt="four:", completions=["", "y", "zz"], index=3)]
    path, run = tmp_path / "s.jsonl", run_script("evaluate")
    write_samples(path, samples)
    label = lambda name, *more, **how: run("label", "--rm", rm_dir, "--samples", path, "--out", tmp_path / name, *more, **how)
    result = label("p.jsonl").ok()
    assert "2 pairs of 4 prompts" in result.out and "1 completions of equal reward" in result.out
    assert f"1 fewer than two completions that ended and are not empty (first {path}:3)" in result.out
    pairs, scores = read(tmp_path / "p.jsonl"), read(tmp_path / "p.scores.jsonl")
    for row, found in zip(samples, scores):
        for text, stop, reward in zip(row["completions"], row.get("stops", [""] * 3), found["rewards"]):
            assert abs(reward - score_by_transformers(rm_dir, row["prompt"], text, stop is not None)) < 1e-5
    assert scores[1]["rewards"][0] == scores[1]["rewards"][1]
    for pair, row, found in zip(pairs, (samples[0], samples[3]), (scores[0], scores[3])):
        rewards = {text: reward for text, reward in zip(row["completions"], found["rewards"]) if text}  # the empty one is not taken
        best, worst = max(rewards, key=rewards.get), min(rewards, key=rewards.get)
        assert pair == dict(prompt=row["prompt"], chosen=best, rejected=worst, chosen_reward=rewards[best], rejected_reward=rewards[worst])
    # Two ranks, batches of one; and again after a kill between scoring and writing.
    label("two.jsonl", "--batch_size", 1, world=2).ok()
    two = read(tmp_path / "two.jsonl")
    assert [(p["chosen"], p["rejected"]) for p in two] == [(p["chosen"], p["rejected"]) for p in pairs]
    whole = (tmp_path / "p.jsonl").read_bytes()
    (tmp_path / "p.jsonl").unlink()
    (tmp_path / "p.scores.jsonl").write_text("".join((tmp_path / "p.scores.jsonl").read_text().splitlines(keepends=True)[1:3]) + '{"ind')
    label("p.jsonl").ok()
    again = read(tmp_path / "p.jsonl")
    assert again == [{k: pytest.approx(v, abs=1e-6) if isinstance(v, float) else v for k, v in pair.items()} for pair in pairs]
    # Complete: said. Its pairs deleted: made anew. Changed by hand: left alone. The scores' flags other: refused.
    assert "p.jsonl is complete" in label("p.jsonl").ok().out
    whole = (tmp_path / "p.jsonl").read_bytes()
    (tmp_path / "p.jsonl").unlink()
    assert "p.jsonl is complete" not in label("p.jsonl").ok().out and (tmp_path / "p.jsonl").read_bytes() == whole
    (tmp_path / "p.jsonl").write_bytes(whole[:-20])
    label("p.jsonl").refused("p.jsonl holds something else", "choose another --out")
    assert (tmp_path / "p.jsonl").read_bytes() == whole[:-20]
    label("p.jsonl", "--noise", "bt").refused("noise was 'none', is 'bt'")
    # One row that is no sample is said, the others are labelled, and the exit code is 1.
    write_samples(path, [dict(prompt="none"), *samples])
    result = label("rest.jsonl")
    assert result.code == 1 and f"(first {path}:1)" in result.out and "2 pairs of 4 prompts" in result.out
    assert [pair["chosen"] for pair in read(tmp_path / "rest.jsonl")] == [pair["chosen"] for pair in pairs]
    path.write_text('{"prompt": "p", "format": 2}\n')
    label("bad.jsonl").refused(f"{path}:1", "as `sample` writes them")
    path.write_text('{"prompt": "p", "completions": ["a", "b"]}\n')  # of a version that rendered conversations
    label("bad.jsonl").refused(f"{path}:1", "no sample of format 2")


def test_noise_is_as_people_would():
    """The better one is chosen with probability sigmoid(difference), the same each time."""
    from types import SimpleNamespace

    def pair(prompt, rewards, noise="bt"):
        row = dict(prompt=prompt, completions=["a", "b", "c"], stops=[""] * 3)
        return ev.choose_pair(row, rewards, "</s>", SimpleNamespace(seed=0, noise=noise, pairs="best_worst"))

    n, wins = 4000, 0
    for k in range(n):
        found = pair(f"p{k}", [0.0, 1.0, 0.3])
        assert {found["chosen"], found["rejected"]} == {"a", "b"} and found["chosen_reward"] == dict(a=0.0, b=1.0)[found["chosen"]]
        wins += found["chosen"] == "b"
    p = 1 / (1 + math.exp(-1.0))
    assert abs(wins - n * p) < 3.5 * math.sqrt(n * p * (1 - p))
    assert pair("p7", [0.0, 1.0, 0.3]) == pair("p7", [0.0, 1.0, 0.3])
    assert pair("far", [-1e4, 1e4, 0.0])["chosen"] == "b" and pair("p", [0.0, 1.0, 0.3], "none")["chosen"] == "b"
    with pytest.raises(ev.SkipRow, match="equal reward"):
        pair("tie", [1.0, 1.0, 1.0])


def test_labelled_pairs_train(run_script, policy_dir, prompt_file, rm_dir, tmp_path):
    """sample -> label -> train_pref: every file is what the next takes."""
    run = run_script("evaluate")
    (tmp_path / "gen.jsonl").write_text(prompt_file.read_text())
    samples = [dict(prompt=f"post {n}:", completions=[f" yes {n}", " no"], stops=["</s>", ""], index=n) for n in range(8)]
    write_samples(tmp_path / "s.jsonl", samples)
    run("label", "--rm", rm_dir, "--samples", tmp_path / "s.jsonl", "--out", tmp_path / "p.jsonl").ok()
    result = run_script("train_pref")("--model", policy_dir, "--data", tmp_path / "p.jsonl", "--out", tmp_path / "run", "--batch_size", 4,
                                      "--max_length", 64, "--max_prompt_length", 32).ok()
    assert "8 pairs of 8 rows; skipped: none" in result.out and (tmp_path / "run" / "final").exists()


# ----------------------------------------------------------------------------------------------------- the commands: golden
@pytest.fixture(scope="module")
def run_dir(policy_dir, tmp_path_factory, context):
    """A preference run of 4 steps with two checkpoints, at a rate that moves the policy."""
    from runs import finish, launch

    directory = tmp_path_factory.mktemp("run")
    rows = [dict(prompt=f"post {n}:", chosen=f" yes {n}", rejected=" no, never") for n in range(8)]
    (directory / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["--model", policy_dir, "--data", directory / "pairs.jsonl", "--out", directory / "run", "--batch_size", 4, "--epochs", 2,
            "--max_length", 64, "--max_prompt_length", 32, "--lr", 3e-3, "--warmup_steps", 0, "--save_every", 2]
    finish(launch(context, "train_pref", directory / "log", argv)).ok()
    return directory / "run"


def golden_args(policy_dir, rm_dir, prompt_file, *runs):
    data = prompt_file.parent / "answered.jsonl"
    data.write_text("".join(line + "\n" for line in prompt_file.read_text().splitlines() if "chosen" in line))
    return ["golden", "--rm", rm_dir, "--ref", policy_dir, "--data", data, "--n", 8, "--max_new_tokens", 12, *runs]


def test_golden(run_script, policy_dir, rm_dir, prompt_file, run_dir, tmp_path):
    import shutil

    run, copy = run_script("evaluate"), shutil.copytree(run_dir, tmp_path / "run")
    argv = golden_args(policy_dir, rm_dir, prompt_file, copy)
    samples_of = lambda row: copy / "golden_samples" / row["settings"] / f"{row['checkpoint']}.jsonl"
    (copy / "step_000004.bak").mkdir()
    run(*argv, "--keep_samples").ok()
    rows = read(copy / "golden.jsonl")
    assert [(row["checkpoint"], row["step"], row["epoch"]) for row in rows] == [("reference", 0, 0.0), ("step_000002", 2, 1.0),
                                                                             ("step_000004", 4, 2.0)]  # final is step 4's weights
    assert rows[0]["kl"] == rows[0]["k1"] == rows[0]["sqrt_kl"] == 0 and rows[2]["kl"] > rows[1]["kl"] > 0.01
    for row in rows:
        said = read(samples_of(row))
        shares = [np.mean([(a > b) + 0.5 * (a == b) for a in r["rewards"] for b in r["reference_rewards"]]) for r in said]
        lengths = [np.mean(r["n_tokens"]) for r in said]
        for name, values in (("win_rate", shares), ("length", lengths), ("reward", [np.mean(r["rewards"]) for r in said])):
            assert math.isclose(row[name], np.mean(values), rel_tol=1e-6)
            assert math.isclose(row[f"{name}_se"], np.std(values, ddof=1) / math.sqrt(8), rel_tol=1e-6)
        assert math.isclose(row["sqrt_kl"], math.sqrt(row["kl"]))
        r = said[3]
        assert abs(r["reference_rewards"][0] - score_by_transformers(rm_dir, r["prompt"], r["references"][0])) < 1e-5
        assert abs(r["rewards"][1] - score_by_transformers(rm_dir, r["prompt"], r["completions"][1], r["stops"][1] is not None)) < 1e-5
    assert len(read(samples_of(rows[0]))[0]["references"]) == 2
    # Again: nothing is computed. A line that was cut in two is made again, the others stay. Ranks and batches change nothing.
    before = (copy / "golden.jsonl").read_bytes()
    assert "0 checkpoints" in run(*argv).ok().out and (copy / "golden.jsonl").read_bytes() == before
    (copy / "golden.jsonl").write_bytes(before[:-40])
    assert "1 checkpoints" in run(*argv, "--batch_size", 2, world=2).ok().out
    again = read(copy / "golden.jsonl")
    assert again[:2] == rows[:2]
    for name, value in rows[2].items():
        assert again[2][name] == (pytest.approx(value, rel=1e-5, abs=1e-6) if isinstance(value, float) else value), name
    # Another setting makes other rows beside these.
    run(*argv, "--seed", 1).ok()
    more = read(copy / "golden.jsonl")
    assert len(more) == 6 and {row["settings"] for row in more[3:]}.isdisjoint({row["settings"] for row in more[:3]})
    assert [row["protocol"]["seed"] for row in more] == [0, 0, 0, 1, 1, 1]
    # Nothing left to do under the first: its rows come last, for plot; and each settings have samples of their own.
    assert "0 checkpoints" in run(*argv).ok().out
    assert read(copy / "golden.jsonl") == [*more[3:], *more[:3]]
    kept = samples_of(rows[2]).read_bytes()
    assert not samples_of(more[5]).exists()
    assert "3 checkpoints" in run(*argv, "--seed", 1, "--keep_samples").ok().out
    assert samples_of(more[5]).read_bytes() != kept == samples_of(rows[2]).read_bytes()
    assert read(copy / "golden.jsonl") == more


def test_golden_kl_against_transformers(policy_dir, run_dir, process_group):
    """The KL of a real checkpoint, from the same draws, by a plain loop in transformers."""
    policy, ref = load(run_dir / "step_000004")[0], load(policy_dir)[0]
    models = [AutoModelForCausalLM.from_pretrained(d).double() for d in (run_dir / "step_000004", policy_dir)]
    prompt = [256, *b"post 3:"]
    responses = sampled(policy, [prompt], 6, 12, [257])[0]
    ours = ev.divergences(policy, ref, [prompt], [responses])
    for y, row in zip(responses, ours):
        with torch.no_grad():
            p, q = (m(torch.tensor([prompt + y])).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for m in models)
        assert abs(row[0] - (p.exp() * (p - q)).sum()) < 1e-4
        assert abs(row[1] - (p - q).gather(1, torch.tensor(y)[:, None]).sum()) < 1e-4


def test_golden_refuses(run_script, policy_dir, rm_dir, prompt_file, run_dir, tmp_path, tiny_llama):
    run = run_script("evaluate")
    before = {path: path.read_bytes() for path in run_dir.glob("golden*")}
    run(*golden_args(policy_dir, rm_dir, prompt_file, tmp_path)).refused(tmp_path, "metrics.jsonl")
    (tmp_path / "bare.jsonl").write_text('{"prompt": "p", "chosen": ""}\n{"prompt": "q"}\n')
    run("golden", "--rm", rm_dir, "--ref", policy_dir, "--data", tmp_path / "bare.jsonl", run_dir).refused("without a response", "first row ")
    run("golden", "--rm", policy_dir, "--ref", policy_dir, "--data", prompt_file, run_dir).refused("score.weight")
    # Another reference than the run's: of another vocabulary, of other weights, and the toy's, where no flag is given.
    for other in (tiny_llama(tmp_path / "larger", vocab_size=280), tiny_llama(tmp_path / "weights", seed=1)):
        run(*golden_args(other, rm_dir, prompt_file, run_dir)).refused(run_dir, "another reference", other, policy_dir)
    run("golden", "--n", 8, run_dir).refused(run_dir, "another reference", policy_dir)
    assert {path: path.read_bytes() for path in run_dir.glob("golden*")} == before


# ------------------------------------------------------------------------------------------------------ the commands: bench
def test_bench_mt_bench(run_script, policy_dir, shared, tmp_path):
    """FastChat's format, two turns, the first answer in the second's context, temperature by category."""
    questions = read(shared / "data" / "mt_bench" / "question.jsonl")
    temperatures = dict(writing=0.7, roleplay=0.7, reasoning=0, math=0, coding=0, extraction=0, stem=0.1, humanities=0.1)
    chosen = [next(q for q in questions if q["category"] == c) for c in temperatures]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(q) + "\n" for q in chosen))
    argv = ["bench", "--suite", "mt_bench", "--model", policy_dir, "--questions", tmp_path / "q.jsonl", "--template", "hh",
            "--max_new_tokens", 10, "--max_prompt_length", 900, "--out", tmp_path / "a.jsonl"]
    run_script("evaluate")(*argv).ok()
    answers = read(tmp_path / "a.jsonl")
    assert {*answers[0]} == {"question_id", "answer_id", "model_id", "choices", "tstamp"} and len({a["answer_id"] for a in answers}) == 8
    assert [a["question_id"] for a in answers] == sorted(q["question_id"] for q in chosen)
    policy, tokenizer, _ = load(policy_dir)
    for question in chosen:
        answer = next(a for a in answers if a["question_id"] == question["question_id"])
        assert answer["model_id"] == str(policy_dir) and len(answer["choices"][0]["turns"]) == 2 and answer["tstamp"] > 1e9
        text, temperature = "", temperatures[question["category"]]
        for turn, said in zip(question["turns"], answer["choices"][0]["turns"]):
            text += f"\n\nHuman: {turn}\n\nAssistant:"
            prompt = [256] + tokenizer.encode(text, add_special_tokens=False)[-899:]
            ids = sampled(policy, [prompt], 1, 10, [257], temperature)[0][0]
            assert said == tokenizer.decode([i for i in ids if i != 257]).strip()
            text += f" {said}"
    # Stopped in the second turn: what was said before is not said again, and the end is the same.
    (tmp_path / "a.jsonl").unlink()
    kept = (tmp_path / "a.turn2.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "a.turn2.jsonl").write_bytes(kept[1] + kept[0][:20])
    first = (tmp_path / "a.turn1.jsonl").read_bytes()
    assert "a.turn1.jsonl is complete" in run_script("evaluate")(*argv).ok().out and (tmp_path / "a.turn1.jsonl").read_bytes() == first
    again = read(tmp_path / "a.jsonl")
    assert [a | dict(tstamp=0) for a in again] == [a | dict(tstamp=0) for a in answers] and again[1] == answers[1]
    whole = (tmp_path / "a.jsonl").read_bytes()
    assert "a.jsonl is complete" in run_script("evaluate")(*argv).ok().out and (tmp_path / "a.jsonl").read_bytes() == whole
    run_script("evaluate")(*argv, "--seed", 1).refused("seed was 0, is 1")
    assert (tmp_path / "a.jsonl").read_bytes() == whole


def test_bench_alpaca_eval(run_script, policy_dir, tmp_path):
    questions = [dict(dataset="helpful_base", instruction=f"Say {n}.", output="?", generator="text_davinci_003") for n in range(3)]
    (tmp_path / "q.json").write_text(json.dumps(questions))
    argv = ["bench", "--suite", "alpaca_eval", "--model", policy_dir, "--questions", tmp_path / "q.json", "--template", "hh",
            "--max_new_tokens", 6, "--out", tmp_path / "model_outputs.json"]
    run = run_script("evaluate")
    run(*argv).ok()
    answers = json.loads((tmp_path / "model_outputs.json").read_text())
    assert [set(a) for a in answers] == [{"dataset", "instruction", "output", "generator"}] * 3
    assert [(a["instruction"], a["generator"], a["dataset"]) for a in answers] == [(q["instruction"], str(policy_dir), "helpful_base") for q in questions]
    run(*argv[:-1], tmp_path / "two.json", "--batch_size", 1, world=2).ok()  # two ranks, other batches: the same bytes
    assert (tmp_path / "two.json").read_bytes() == (tmp_path / "model_outputs.json").read_bytes()
    run(*argv, "--max_new_tokens", 7).refused("max_new_tokens was 6, is 7")
    (tmp_path / "q.json").write_text("[{}]")
    run(*argv[:-1], tmp_path / "other.json").refused("no answers", "1 not one of alpaca_eval", "q.json:1, question 0")
    (tmp_path / "q.json").write_text(json.dumps([questions[0], {}, questions[2]]))  # one bad question: the others are asked
    result = run(*argv[:-1], tmp_path / "some.json")
    assert result.code == 1 and "2 answers to 3 questions; skipped: 1 not one of alpaca_eval" in result.out
    assert [a["instruction"] for a in json.loads((tmp_path / "some.json").read_text())] == ["Say 0.", "Say 2."]
    for text in ('["Say 1."]', '[]', '3'):
        (tmp_path / "q.json").write_text(text)
        run(*argv[:-1], tmp_path / "other.json").refused("q.json", "not one of alpaca_eval")


def test_flags_say_what_is_wrong(run_script, tmp_path):
    run = run_script("evaluate")
    for argv, words in ((["sample", "--out", "s.jsonl", "--top_p", "0"], ["--top_p 0", "must be above 0"]),
                        (["sample", "--out", "s.jsonl", "--top_p", "1.5"], ["--top_p 1.5", "at most 1"]),
                        (["sample", "--out", "s.jsonl", "--temperature", "nan"], ["--temperature", "nan"]),
                        (["sample", "--out", "s.jsonl", "--model", "m"], ["--data is missing"]),
                        (["golden", "--rm", "x", "run"], ["--ref is missing"]),
                        (["sample", "--out", "s.txt"], ["--out s.txt", ".jsonl"]),
                        (["label", "--samples", "s.jsonl", "--out", "p.jsonl", "--noise", "most"], ["--noise", "most"])):
        result = run(*argv)
        assert result.code == 2 and "Traceback" not in result.err and all(word in result.err for word in words), result.err


# ------------------------------------------------------------------------------------------- how a response ends, and ties
EOT = 259  # the byte tokenizer's next id
CHAT = ("{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('no') }}{% endif %}[{{ m.role }}]{{ m.content }}<|eot|>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}")


@pytest.fixture(scope="module")
def chat_dirs(policy_dir, rm_dir, tmp_path_factory):
    """The policy and the reward model with a chat template that ends a turn with <|eot|>, which is not the tokenizer's EOS."""
    import shutil

    from conftest import byte_tokenizer

    found = []
    for name, directory in (("policy", policy_dir), ("rm", rm_dir)):
        found.append(shutil.copytree(directory, tmp_path_factory.mktemp("chat") / name))
        byte_tokenizer(found[-1], chat_template=CHAT, additional_special_tokens=["<|eot|>"])
    return found


def ids_of(directory, text):
    return AutoTokenizer.from_pretrained(directory).encode(text, add_special_tokens=False)


def reward_of_ids(rm_dir, ids):
    with torch.no_grad():
        return AutoModelForSequenceClassification.from_pretrained(rm_dir)(torch.tensor([ids])).logits[0, 0].item()


def test_a_samples_stop_is_kept_apart(run_script, chat_dirs, tmp_path):
    """Both ends stop the sampler; the text shows neither; what was said can be put together again."""
    policy_dir, _ = chat_dirs
    (tmp_path / "d.jsonl").write_text(json.dumps(dict(prompt=[dict(role="user", content="hi")])) + "\n")
    run_script("evaluate")("sample", "--model", policy_dir, "--data", tmp_path / "d.jsonl", "--out", tmp_path / "s.jsonl", "--k", 100,
                           "--max_new_tokens", 60, "--temperature", 1, "--top_p", 1).ok()
    (row,) = read(tmp_path / "s.jsonl")
    policy, tokenizer, _ = load(policy_dir)
    prompt = [*ids_of(policy_dir, "[user]hi"), EOT, *ids_of(policy_dir, "[assistant]")]  # the template writes no BOS
    assert row["prompt"] == [dict(role="user", content="hi")] and set(row["stops"]) == {"</s>", "<|eot|>", None}
    for text, stop, n, ids in zip(row["completions"], row["stops"], row["n_tokens"], sampled(policy, [prompt], 100, 60, [257, EOT])[0]):
        assert n == len(ids) and stop == {257: "</s>", EOT: "<|eot|>"}.get(ids[-1]) and (stop or n == 60)
        assert text == tokenizer.decode(ids[: len(ids) - (stop is not None)], clean_up_tokenization_spaces=False)
        assert "<|eot|>" not in text and "</s>" not in text


def test_labels_are_of_what_was_said(run_script, chat_dirs, tmp_path):
    """The reward of a response is of the ids that the policy said, its own stop among them; and a trainer reads these ids in the
    pair: EOS is what it writes itself, another stop stands in the text."""
    _, rm_dir = chat_dirs
    rows = [dict(prompt="sum:", completions=["4", "5"], stops=["<|eot|>", "</s>"]), dict(prompt="sum:", completions=["6", "7"], stops=["", "<x>"]),
            dict(prompt=[dict(role="user", content="hi")], completions=["8", "9"], stops=["", ""])]
    write_samples(tmp_path / "s.jsonl", rows)
    run_script("evaluate")("label", "--rm", rm_dir, "--samples", tmp_path / "s.jsonl", "--out", tmp_path / "p.jsonl").ok()
    of = lambda *parts: [256, *itertools.chain.from_iterable([part] if isinstance(part, int) else ids_of(rm_dir, part) for part in parts)]
    ids = {"4": of("sum:4", EOT), "5": of("sum:5", 257), "6": of("sum:6", 257), "7": of("sum:7", 257),  # <x> is no token here
           "8": of("[user]hi", EOT, "[assistant]8", EOT)[1:], "9": of("[user]hi", EOT, "[assistant]9", EOT)[1:]}
    exact = {text: reward_of_ids(rm_dir, of_text) for text, of_text in ids.items()}
    for row, found in zip(rows, read(tmp_path / "p.scores.jsonl")):
        assert found["rewards"] == pytest.approx([exact[text] for text in row["completions"]], abs=1e-5)
    written = {"4": "4<|eot|>", "5": "5", "6": "6", "7": "7<x>", "8": [dict(role="assistant", content="8")],
               "9": [dict(role="assistant", content="9")]}
    pairs = read(tmp_path / "p.jsonl")
    assert len(pairs) == 3
    for pair, row in zip(pairs, rows):
        worst, best = sorted(row["completions"], key=exact.get)
        assert (pair["chosen"], pair["rejected"]) == (written[best], written[worst])


def test_references_end_as_the_template_ends_them(run_script, chat_dirs, tmp_path):
    """The response of a conversation: plain text in the rows, scored with the template's stop."""
    policy_dir, rm_dir = chat_dirs
    run = bare_run(tmp_path / "run", policy_dir)
    (tmp_path / "d.jsonl").write_text(json.dumps(dict(prompt=[dict(role="user", content="hi")],
                                                      completion=[dict(role="assistant", content="ho")])) + "\n")
    result = run_script("evaluate")("golden", "--rm", rm_dir, "--ref", policy_dir, "--data", tmp_path / "d.jsonl", "--n", 8,
                                    "--max_new_tokens", 12, "--keep_samples", run).ok()
    assert "1 prompts of 1 rows" in result.out
    (row,) = read(next((run / "golden_samples").rglob("reference.jsonl")))
    assert row["references"] == ["ho"]
    ids = [*ids_of(rm_dir, "[user]hi"), EOT, *ids_of(rm_dir, "[assistant]ho"), EOT]
    assert row["reference_rewards"] == pytest.approx([reward_of_ids(rm_dir, ids)], abs=1e-5)


def test_refused_prompts_are_counted(run_script, chat_dirs, tmp_path):
    """A template that refuses a prompt, or a later turn of it: that one is left out, with its place, and the others are not."""
    policy_dir, rm_dir = chat_dirs
    run, user = run_script("evaluate"), lambda text: [dict(role="user", content=text)]
    write_samples(tmp_path / "s.jsonl", [dict(prompt=user(text), completions=["8", "9"]) for text in ("hi", "no", "hey")])
    result = run("label", "--rm", rm_dir, "--samples", tmp_path / "s.jsonl", "--out", tmp_path / "p.jsonl").ok()
    assert "2 pairs of 3 prompts; skipped: 1 refused by the chat template" in result.out and f"(first {tmp_path / 's.jsonl'}:2)" in result.out
    result = run("sample", "--model", policy_dir, "--data", tmp_path / "s.jsonl", "--out", tmp_path / "t.jsonl", "--max_new_tokens", 3).ok()
    assert "2 prompts of 3 rows; skipped: 1 refused by the chat template" in result.out
    rows = [dict(prompt=user(text), completion=[dict(role="assistant", content="8")]) for text in ("hi", "no", "hey")]
    (tmp_path / "h.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    bare_run(tmp_path / "run", policy_dir)
    result = run("golden", "--rm", rm_dir, "--ref", policy_dir, "--data", tmp_path / "h.jsonl", "--max_new_tokens", 3,
                 tmp_path / "run").ok()
    assert "2 prompts of 3 rows; skipped: 1 refused by the chat template" in result.out
    assert [row["prompts"] for row in read(tmp_path / "run" / "golden.jsonl")] == [2]
    questions = [dict(question_id=n, category="math", turns=turns) for n, turns in enumerate((["hi", "ho"], ["no", "ho"], ["hi", "no"]))]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    result = run("bench", "--suite", "mt_bench", "--model", policy_dir, "--questions", tmp_path / "q.jsonl", "--out", tmp_path / "a.jsonl",
                 "--max_new_tokens", 3, "--max_prompt_length", 99)
    assert result.code == 1 and "1 answers to 3 questions; skipped: 2 refused by the chat template" in result.out
    assert [row["question_id"] for row in read(tmp_path / "a.jsonl")] == [0]


def test_a_template_that_makes_nothing_of_a_prompt_and_refuses_responses(run_script, policy_dir, tmp_path):
    """The prompt is left out; the responses are kept, without log-probs, which no trainer could use."""
    import shutil

    from conftest import byte_tokenizer

    template = "{{ messages[0]['content'] }}{% if messages[1] %}{{ raise_exception('no') }}{% endif %}"
    byte_tokenizer(shutil.copytree(policy_dir, tmp_path / "policy"), chat_template=template)
    rows = [dict(prompt=[dict(role="user", content=text)]) for text in ("hi", "")]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run_script("evaluate")("sample", "--model", tmp_path / "policy", "--data", tmp_path / "d.jsonl", "--out", tmp_path / "s.jsonl",
                                    "--max_new_tokens", 3).ok()
    assert f"1 prompts of 2 rows; skipped: 1 empty prompt (first {tmp_path / 'd.jsonl'}:2)" in result.out
    (row,) = read(tmp_path / "s.jsonl")
    assert any(row["completions"]) and row["logps"] == [None, None]


@pytest.mark.parametrize("batch_size", [2, 5, 64])
def test_equal_responses_tie(rm_dir, process_group, batch_size):
    """Among other responses, in other places of a batch and in another call: the same to the last bit, and right."""
    from types import SimpleNamespace

    known, model = {}, ev.load_model(str(rm_dir), ev.RewardModel, "fp32", CPU)[0]
    texts = [f"post {'x' * (7 * n)}:" for n in range(6)]
    prompts, ys = [[256, *text.encode()] for text in texts], [[[70, 71, 257], [72, 257], [70, 71, 257]]] * 6
    args = SimpleNamespace(batch_size=batch_size, rm="rm")
    first = ev.score(model, prompts, ys, texts, args, known, "")
    second = ev.score(model, prompts[::-1], [[[72, 257], [75] * 30, [70, 71, 257]]] * 6, texts, args, known, "")[::-1]
    for x, one, two in zip(prompts, first, second):
        assert one[0] == one[2] == two[2] and one[1] == two[0] and one[0] != one[1]
        assert abs(one[0] - reward_of_ids(rm_dir, x + [70, 71, 257])) < 1e-5


def test_a_policy_ties_with_its_own_words(run_script, tmp_path):
    """References that are what the greedy reference policy says, of many lengths: it wins one half, exactly, in any batch."""
    run = run_script("evaluate")
    run("sample", "--temperature", 0, "--k", 1, "--n", 40, "--preset", "toy", "--out", tmp_path / "s.jsonl").ok()
    rows = [dict(prompt=row["prompt"], completion=row["completions"][0]) for row in read(tmp_path / "s.jsonl") if row["stops"] == ["</s>"]]
    assert len(rows) > 20
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for batch_size in (2, 6, 64):
        folder = bare_run(tmp_path / f"run{batch_size}", TOY / "sft")
        run("golden", "--preset", "toy", "--data", tmp_path / "d.jsonl", "--temperature", 0, "--batch_size", batch_size, folder).ok()
        (row,) = read(folder / "golden.jsonl")
        assert (row["win_rate"], row["win_rate_se"]) == (0.5, 0.0)


# --------------------------------------------------------------------------- a conversation, as each model's template has it
# Another family's: it trims what is said, writes BOS and other marks, and a line break after its stop.
RM_CHAT = ("{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}<|eot|>\n{% endfor %}"
           "{% if add_generation_prompt %}<assistant>{% endif %}")
TOOLS = [dict(type="function", function=dict(name="look", description="look up", parameters=dict(type="object", properties={})))]


@pytest.fixture(scope="module")
def other_rm(rm_dir, tmp_path_factory):
    """The reward model with a template of its own."""
    import shutil

    directory = shutil.copytree(rm_dir, tmp_path_factory.mktemp("other") / "rm")
    byte_tokenizer(directory, chat_template=RM_CHAT, additional_special_tokens=["<|eot|>"])
    return directory


def rendered_ids(directory, messages, **how):
    """What transformers makes of a conversation, in ids."""
    return AutoTokenizer.from_pretrained(directory).apply_chat_template(messages, tokenize=True, return_dict=False, **how)


def test_a_conversation_is_rendered_by_its_reader(run_script, chat_dirs, other_rm, tmp_path):
    """sample -> label: the policy reads the prompt by its template, the reward model all of it by its own, as transformers
    renders them; the pair is messages, as TRL reads it; a cut completion has no stop, and an empty one nothing else."""
    policy_dir, _ = chat_dirs
    run, user = run_script("evaluate"), [dict(role="user", content="hi "), dict(role="assistant", content="ho"), dict(role="user", content="x")]
    (tmp_path / "d.jsonl").write_text(json.dumps(dict(prompt=user, tools=TOOLS)) + "\n")
    run("sample", "--model", policy_dir, "--data", tmp_path / "d.jsonl", "--out", tmp_path / "s.jsonl", "--k", 40, "--max_new_tokens", 60,
        "--temperature", 1, "--top_p", 1).ok()
    (sample,) = read(tmp_path / "s.jsonl")
    assert sample["prompt"] == user and sample["tools"] == TOOLS
    policy = load(policy_dir)[0]
    prompt = rendered_ids(policy_dir, user, tools=TOOLS, add_generation_prompt=True)
    assert sample["n_tokens"] == [len(y) for y in sampled(policy, [prompt], 40, 60, [257, EOT])[0]]
    said = [" one ", "two", "three", ""]
    rows = [dict(sample, completions=said, stops=["</s>", "<|eot|>", None, "<|eot|>"], n_tokens=[1] * 4, logps=None)]
    run("label", "--rm", other_rm, "--samples", write_samples(tmp_path / "t.jsonl", rows), "--out", tmp_path / "p.jsonl").ok()
    exact = []
    for text in said[:3]:
        ids = rendered_ids(other_rm, user + [dict(role="assistant", content=text)])
        assert ids[-2:] == [EOT, *ids_of(other_rm, "\n")]
        exact.append(reward_of_ids(other_rm, ids[:-2] if text == "three" else ids[:-1]))  # the line break is nobody's to say
    exact.append(reward_of_ids(other_rm, rendered_ids(other_rm, user, add_generation_prompt=True) + [EOT]))
    assert read(tmp_path / "p.scores.jsonl")[0]["rewards"] == pytest.approx(exact, abs=1e-5)
    (pair,) = read(tmp_path / "p.jsonl")
    best, worst = (" one ", "two") if exact[0] > exact[1] else ("two", " one ")
    assert pair["prompt"] == user and pair["tools"] == TOOLS
    assert pair["chosen"] == [dict(role="assistant", content=best)] and pair["rejected"] == [dict(role="assistant", content=worst)]


def test_golden_of_a_conversation(run_script, chat_dirs, other_rm, tmp_path):
    """Its prompt by the reference's template, what is said and the data's response by the reward model's."""
    policy_dir, _ = chat_dirs
    user = [dict(role="user", content="hi")]
    (tmp_path / "d.jsonl").write_text(json.dumps(dict(prompt=user, completion=[dict(role="assistant", content=" ho")])) + "\n")
    run = bare_run(tmp_path / "run", policy_dir)
    run_script("evaluate")("golden", "--rm", other_rm, "--ref", policy_dir, "--data", tmp_path / "d.jsonl", "--max_new_tokens", 12, "--keep_samples",
                           "--temperature", 0, "--k", 1, run).ok()
    (row,) = read(next((run / "golden_samples").rglob("reference.jsonl")))
    ids = sampled(load(policy_dir)[0], [rendered_ids(policy_dir, user, add_generation_prompt=True)], 1, 12, [257, EOT], temperature=0)[0][0]
    assert row["n_tokens"] == [len(ids)] and row["prompt"] == user and row["references"] == [" ho"]
    answer = lambda text: rendered_ids(other_rm, user + [dict(role="assistant", content=text)])
    ours = answer(row["completions"][0])[: -1 if row["stops"][0] else -2]
    assert row["rewards"] == pytest.approx([reward_of_ids(other_rm, ours)], abs=1e-5)
    assert row["reference_rewards"] == pytest.approx([reward_of_ids(other_rm, answer(" ho")[:-1])], abs=1e-5)


ZEPHYR = ("{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}")


@pytest.mark.parametrize("chat", [False, True])
def test_the_round_trip(run_script, stories, tmp_path, chat):
    """sample -> label -> train_pref with a SentencePiece tokenizer: the trainer reads the prompt that the policy was given and
    the ids that it said, stop and all. Of a sampled text that is another way to spell it, it reads the tokenizer's way."""
    import shutil

    from conftest import load_rows, randomize
    from transformers import LlamaForSequenceClassification

    import train_pref

    directory, rm = shutil.copytree(stories, tmp_path / "m"), tmp_path / "rm"
    tokenizer = AutoTokenizer.from_pretrained(directory)
    full_stop = tokenizer.encode("a.", add_special_tokens=False)[-1]
    if chat:
        tokenizer.chat_template = ZEPHYR
        tokenizer.save_pretrained(directory)
    else:  # where generation stops besides EOS, training does
        (directory / "generation_config.json").write_text(json.dumps(dict(eos_token_id=[tokenizer.eos_token_id, full_stop])))
    model = LlamaForSequenceClassification(LlamaConfig.from_pretrained(stories, num_labels=1, pad_token_id=0)).float()
    randomize(model, 3)
    model.save_pretrained(rm)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json", "chat_template.jinja"):
        if (directory / name).exists():
            shutil.copy(directory / name, rm)
    texts = ["Once upon a time", "The cat", "Lily and Tom went to the", "One day, a big"]
    prompts = [[dict(role="user", content=text)] if chat else text for text in texts]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(dict(prompt=prompt)) + "\n" for prompt in prompts))
    run = run_script("evaluate")
    run("sample", "--model", directory, "--data", tmp_path / "d.jsonl", "--out", tmp_path / "s.jsonl", "--k", 6, "--max_new_tokens", 60).ok()
    samples = read(tmp_path / "s.jsonl")
    if chat:  # it has not learned to end a turn: what it said is taken as ended where it was cut
        for row in samples:
            row["stops"] = ["</s>"] * 6
        write_samples(tmp_path / "s.jsonl", samples)
    run("label", "--rm", rm, "--samples", tmp_path / "s.jsonl", "--out", tmp_path / "p.jsonl").ok()
    policy, own, _ = load(directory)
    pairs, report = load_rows(train_pref, tmp_path / "p.jsonl", own, 512, 400, 200)
    assert len(pairs) == 4, report
    n_same = 0
    for pair, written, row, prompt in zip(pairs, read(tmp_path / "p.jsonl"), samples, prompts):
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False) if chat else tokenizer(prompt)["input_ids"]
        assert pair.prompt == ids
        said = sampled(policy, [ids], 6, 60, sorted(ev.stop_ids(own)), 0.7, 0.95)[0]
        assert row["n_tokens"] == [len(y) for y in said]
        for response, written_text in ((pair.chosen, written["chosen"]), (pair.rejected, written["rejected"])):
            text = written_text[0]["content"] if chat else written_text
            j = next(j for j, (t, stop) in enumerate(zip(row["completions"], row["stops"])) if t + ("" if chat or stop == "</s>" else stop or "") == text)
            y = said[j] + ([tokenizer.eos_token_id] if chat and said[j][-1] != tokenizer.eos_token_id else [])
            assert response[-1] == y[-1] and own.decode(response) == own.decode(y)
            n_same += response == y
    assert n_same >= 6


def test_a_reward_model_without_a_template(run_script, rm_dir, policy_dir, tmp_path):
    rows = [dict(prompt=[dict(role="user", content="hi")], completions=["a", "b"])]
    run_script("evaluate")("label", "--rm", rm_dir, "--samples", write_samples(tmp_path / "s.jsonl", rows), "--out", tmp_path / "p.jsonl").refused(
        rm_dir, "has no chat template", "conversations")
    assert not (tmp_path / "p.jsonl").exists()
    (tmp_path / "d.jsonl").write_text(json.dumps(dict(prompt=rows[0]["prompt"])) + "\n")
    run_script("evaluate")("sample", "--model", policy_dir, "--data", tmp_path / "d.jsonl", "--out", tmp_path / "t.jsonl").refused(
        policy_dir, "has no chat template", "conversations")


def test_a_token_that_the_model_lacks(run_script, policy_dir, tmp_path):
    """The tokenizer has 20 more, the model 13 more than the 259: a row that spells one of the last is left out, and counted."""
    import shutil

    directory = shutil.copytree(policy_dir, tmp_path / "m")
    byte_tokenizer(directory, additional_special_tokens=[f"<t{k}>" for k in range(20)])
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(dict(prompt=text)) + "\n" for text in ("a <t0>", "b <t19>", "c")))
    result = run_script("evaluate")(*sample_args(directory, tmp_path / "d.jsonl", tmp_path / "s.jsonl")).ok()
    assert "2 prompts of 3 rows; skipped: 1 token outside the vocabulary of 272" in result.out and f"(first {tmp_path}/d.jsonl:2)" in result.out
    assert [row["prompt"] for row in read(tmp_path / "s.jsonl")] == ["a <t0>", "c"]


def test_sampling_settings_of_the_model_are_said_to_be_ignored(run_script, policy_dir, prompt_file, tmp_path):
    """Greedy text is transformers' without the penalty, and the screen says so, once."""
    import shutil

    directory = shutil.copytree(policy_dir, tmp_path / "m")
    asks = dict(bos_token_id=256, eos_token_id=257, repetition_penalty=1.3, no_repeat_ngram_size=3, max_length=20)
    (directory / "generation_config.json").write_text(json.dumps(asks))
    result = run_script("evaluate")(*sample_args(directory, prompt_file, tmp_path / "s.jsonl", "--temperature", 0, "--n", 2)).ok()
    assert result.out.count("ignored") == 1 and "repetition_penalty 1.3, no_repeat_ngram_size 3" in result.out and "max_length" not in result.out
    model = AutoModelForCausalLM.from_pretrained(directory)
    model.generation_config.repetition_penalty, model.generation_config.no_repeat_ngram_size = 1.0, 0
    for row in read(tmp_path / "s.jsonl"):
        ids = greedy_by_transformers(model, AutoTokenizer.from_pretrained(directory)(row["prompt"])["input_ids"], 12, 257)
        assert row["completions"][0] == load(policy_dir)[1].decode([i for i in ids if i != 257])


# ---------------------------------------------------------------------------------------- finite or refused, one bad checkpoint
def spoiled(directory, to, name, value=math.nan):
    """A copy of a model with one weight that is not finite."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(directory, to)
    weights = load_file(to / "model.safetensors")
    weights[name].view(-1)[0] = value
    save_file(weights, to / "model.safetensors", dict(format="pt"))
    return to


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0, 1])
def test_a_policy_that_is_not_finite(run_script, policy_dir, prompt_file, tmp_path, temperature, value):
    bad = spoiled(policy_dir, tmp_path / "m", "model.norm.weight", value)
    run_script("evaluate")(*sample_args(bad, prompt_file, tmp_path / "s.jsonl", "--temperature", temperature)).refused(
        bad, "logits are not finite", "row 0 of the data")
    assert not (tmp_path / "s.jsonl").exists()


def test_an_id_that_is_masked_is_finite(tiny_llama, tmp_path, process_group):
    """Logits of -inf, of ids that a model never says, are no fault: they are not drawn, and the others are."""
    policy = load(tiny_llama(tmp_path / "m"))[0]
    original = policy.logits
    policy.logits = lambda hidden: original(hidden).index_fill(1, torch.arange(250), -math.inf)
    (ys,) = sampled(policy, [[5, 6, 7]], 4, 12, [])
    assert all(y is not None and min(y) >= 250 for y in ys)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_reward_model_that_is_not_finite(run_script, policy_dir, rm_dir, prompt_file, run_dir, tmp_path, value):
    import shutil

    bad = spoiled(rm_dir, tmp_path / "rm", "score.weight", value)
    write_samples(tmp_path / "s.jsonl", [dict(prompt="one:", completions=["a", "bb"])])
    run_script("evaluate")("label", "--rm", bad, "--samples", tmp_path / "s.jsonl", "--out", tmp_path / "p.jsonl").refused(
        bad, "reward is not finite", f"{tmp_path}/s.jsonl:1")
    assert not (tmp_path / "p.jsonl").exists() and not (tmp_path / "p.scores.jsonl").exists()
    copy = shutil.copytree(run_dir, tmp_path / "run", ignore=shutil.ignore_patterns("golden*"))
    run_script("evaluate")(*golden_args(policy_dir, bad, prompt_file, copy)).refused(bad, "reward is not finite", "row 0")
    assert not (copy / "golden.jsonl").exists()


def test_one_bad_checkpoint_or_run(run_script, policy_dir, rm_dir, prompt_file, run_dir, tmp_path):
    """A checkpoint of NaN, a cut one, one of another run, and a folder that is no run: each is said with what is wrong, exit
    code 1, and all others are evaluated; once it is mended, the same command evaluates the rest."""
    import shutil

    copy, other = (shutil.copytree(run_dir, tmp_path / name, ignore=shutil.ignore_patterns("golden*")) for name in ("run", "other"))
    shutil.rmtree(copy / "step_000002")
    spoiled(run_dir / "step_000002", copy / "step_000002", "model.norm.weight")
    (copy / "step_000002" / "manifest.json").unlink()
    shutil.rmtree(copy / "step_000002" / "trainer", ignore_errors=True)
    shutil.copytree(run_dir / "step_000004", copy / "step_000003")
    manifest = json.loads((copy / "step_000003" / "manifest.json").read_text())
    (copy / "step_000003" / "manifest.json").write_text(json.dumps(manifest | dict(run="0123456789abcdef")))
    weights = other / "step_000004" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    result = run_script("evaluate")(*golden_args(policy_dir, rm_dir, prompt_file, other, tmp_path / "nothing", copy))
    assert result.code == 1 and "Traceback" not in result.err and "4 runs or checkpoints could not be evaluated" in result.err
    for words in (f"failed: {copy}/step_000002: ", f"failed: {copy}/step_000003 is a checkpoint of another run", "failed: " + str(tmp_path / "nothing"),
                  f"failed: {other}/step_000004"):
        assert words in result.out, words
    assert [row["step"] for row in read(copy / "golden.jsonl")] == [0, 4] and [row["step"] for row in read(other / "golden.jsonl")] == [0, 2]
    shutil.rmtree(other / "step_000004")
    shutil.copytree(run_dir / "step_000004", other / "step_000004")
    run_script("evaluate")(*golden_args(policy_dir, rm_dir, prompt_file, other)).ok()
    assert [row["step"] for row in read(other / "golden.jsonl")] == [0, 2, 4]


def test_golden_reads_what_it_has_measured_already(run_script, policy_dir, rm_dir, prompt_file, run_dir, tmp_path):
    """A copy of a run has the manifests of its checkpoints, and one byte of it is flipped: no row says what it would say."""
    import shutil

    copy, other = (shutil.copytree(run_dir, tmp_path / name, ignore=shutil.ignore_patterns("golden*")) for name in ("run", "other"))
    weights = other / "step_000002" / "model.safetensors"
    flipped = bytearray(weights.read_bytes())
    flipped[-1] ^= 1
    weights.write_bytes(flipped)
    result = run_script("evaluate")(*golden_args(policy_dir, rm_dir, prompt_file, copy, other))
    assert result.code == 1 and f"failed: {other}/step_000002: {weights} is " in result.out
    assert [row["step"] for row in read(other / "golden.jsonl")] == [0, 4] and read(copy / "golden.jsonl")[2] == read(other / "golden.jsonl")[1]


def test_prompts_without_a_reference_are_counted(run_script, policy_dir, rm_dir, prompt_file, tmp_path):
    bare_run(tmp_path / "run", policy_dir)
    result = run_script("evaluate")("golden", "--rm", rm_dir, "--ref", policy_dir, "--data", prompt_file, "--max_new_tokens", 3,
                                    tmp_path / "run").ok()
    assert "9 of 10 prompts; skipped: 1 without a response" in result.out and "(first row 10)" in result.out
    assert [row["prompts"] for row in read(tmp_path / "run" / "golden.jsonl")] == [9]


def test_golden_goes_on_to_the_same_bytes(run_script, tmp_path):
    """Checkpoints that mostly say what the reference says: what was computed before must not decide which rewards are computed
    together. Killed after any row, or asked for one run alone, the rows are the same to the last bit."""
    import shutil

    from safetensors.torch import load_file, save_file

    run = bare_run(tmp_path / "run", TOY / "sft", steps=3)
    for step in (1, 2, 3):
        shutil.copytree(TOY / "sft", run / f"step_{step:06d}", ignore=shutil.ignore_patterns("manifest.json"))
        weights = load_file(TOY / "sft" / "model.safetensors")
        save_file({name: weight * (1 + 0.01 * step) for name, weight in weights.items()}, run / f"step_{step:06d}" / "model.safetensors")
    argv = ["golden", "--preset", "toy", "--n", 24, "--max_new_tokens", 24, "--batch_size", 16, run]
    run_script("evaluate")(*argv).ok()
    whole = (run / "golden.jsonl").read_bytes()
    rows = whole.splitlines(keepends=True)
    for n_left in (1, 2, 3):
        (run / "golden.jsonl").write_bytes(b"".join(rows[:n_left]) + rows[n_left][:50])
        run_script("evaluate")(*argv).ok()
        assert (run / "golden.jsonl").read_bytes() == whole


# -------------------------------------------------------------------------------------------- files of others, and two at once
def test_two_samplers_on_one_output(run_script, policy_dir, prompt_file, tmp_path):
    """While one writes, the next is refused and says who it is."""
    import time

    run, out = run_script("evaluate"), tmp_path / "s.jsonl"
    argv = sample_args(policy_dir, prompt_file, out, "--batch_size", 1, "--max_new_tokens", 4000)
    first = run.start(*argv)
    end = time.monotonic() + 60
    while not (tmp_path / "s.about.json").exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    run(*argv).refused("s.jsonl", f"process {first[0][0].pid}")
    first[0][0].kill()


def test_rows_that_stand_twice(run_script, policy_dir, prompt_file, tmp_path):
    run, out = run_script("evaluate"), tmp_path / "s.jsonl"
    argv = sample_args(policy_dir, prompt_file, out)
    run(*argv).ok()
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)
    out.write_bytes(whole + lines[3] + lines[5])
    result = run(*argv).ok()
    assert "2 rows stood there twice" in result.out and "is complete" in result.out and out.read_bytes() == whole
    out.unlink()  # complete is what is there
    assert "is complete" not in run(*argv).ok().out and out.read_bytes() == whole


@pytest.mark.parametrize("line", ['{"index": 5}', '{"index": [5], "completions": [], "stops": []}', '{"index": 5, "completions": 3, "stops": []}'])
def test_rows_that_were_edited(run_script, policy_dir, prompt_file, tmp_path, line):
    run, out = run_script("evaluate"), tmp_path / "s.jsonl"
    argv = sample_args(policy_dir, prompt_file, out)
    run(*argv).ok()
    edited = line + "\n" + "".join(out.read_text().splitlines(keepends=True)[1:])
    out.write_text(edited)
    run(*argv).refused(f"{out}:1", "mend or delete it")
    assert out.read_text() == edited


def test_files_of_others_are_left_alone(run_script, policy_dir, rm_dir, prompt_file, tmp_path):
    run = run_script("evaluate")
    write_samples(tmp_path / "s.jsonl", [dict(prompt="p", completions=["a", "b"])])
    (tmp_path / "mine.jsonl").write_text("my notes")
    (tmp_path / "mine.json").write_text("[]")
    (tmp_path / "q.json").write_text(json.dumps([dict(instruction="Say 1.")]))
    label = ["label", "--rm", rm_dir, "--samples", tmp_path / "s.jsonl", "--out"]
    bench = ["bench", "--suite", "alpaca_eval", "--model", policy_dir, "--questions", tmp_path / "q.json", "--template", "hh",
             "--max_new_tokens", 3, "--out"]
    before = {path: path.read_bytes() for path in tmp_path.glob("*.json*")}
    for argv in ([*label, tmp_path / "s.jsonl"], [*label, tmp_path / "mine.jsonl"], [*bench, tmp_path / "mine.json"], [*bench, tmp_path / "q.json"],
                 sample_args(policy_dir, prompt_file, tmp_path / "mine.jsonl")):
        run(*argv).refused(argv[-1] if argv[0] != "sample" else "mine.jsonl", "exists", "choose another --out")
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("text", ["3", "[]", "{}", '{"args": 3, "of": {}}', '{"args": {}}', "not JSON", ""])
def test_an_about_file_of_somebody_else(run_script, policy_dir, prompt_file, tmp_path, text):
    (tmp_path / "s.about.json").write_text(text)
    run_script("evaluate")(*sample_args(policy_dir, prompt_file, tmp_path / "s.jsonl")).refused("s.about.json")
    assert (tmp_path / "s.about.json").read_text() == text and not (tmp_path / "s.jsonl").exists()
