"""Qwen2 (and 2.5), Qwen3 and Mistral beside Llama: transformers computes the same from the same directory, and loads what we save."""

import itertools
import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

import evaluate
import train_pref as tp
import train_rm
from conftest import byte_tokenizer, randomize

SIZES = dict(vocab_size=272, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=512, eos_token_id=257, bos_token_id=256, pad_token_id=None)
FAMILIES = {
    "qwen2": {},
    "qwen3": dict(head_dim=16),  # 4 x 16 is not the hidden size, as in Qwen3-0.6B
    "qwen3 with biases": dict(head_dim=8, attention_bias=True),
    "mistral": dict(sliding_window=None),
    "mistral, head_dim": dict(sliding_window=512, head_dim=16),
    "llama": {},
}
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=[(name, tied) for name in FAMILIES for tied in (False, True)], ids=lambda p: f"{p[0]}-{p[1]}")
def directory(request, tmp_path_factory):
    """A random model as transformers saves it; norms and biases are random too, so that none can be left out."""
    name, tied = request.param
    config = AutoConfig.for_model(name.split()[0].strip(","), **SIZES, **FAMILIES[name], tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config).float()
    randomize(model, seed=1)
    path = tmp_path_factory.mktemp("family")
    model.save_pretrained(path)
    byte_tokenizer(path)
    return path


@pytest.fixture
def doubles():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def old_dialect(directory, path):
    """The same model with the config as transformers 4 writes it."""
    path.mkdir()
    for file in directory.iterdir():
        (path / file.name).symlink_to(file)
    config = json.loads((directory / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope["rope_theta"]
    (path / "config.json").unlink()
    (path / "config.json").write_text(json.dumps(config))
    return path


def ours(directory, kind=None, precision="fp64"):
    config = tp.read_config(directory)
    make = kind or (lambda c: tp.Llama(c, "torch"))
    return tp.load_weights(tp.build_model(lambda: make(config), CPU, precision), directory)


def theirs(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64, attn_implementation="eager")


def pairs():
    generator = torch.Generator().manual_seed(3)
    ids = lambda n: torch.randint(0, 250, (n,), generator=generator).tolist()
    return [tp.Pair(ids(9), ids(5), ids(7)), tp.Pair(ids(4), ids(8), ids(3)), tp.Pair(ids(6), ids(2), ids(2))]


def token_logps(model, some):
    """Of the tokens of each response after its prompt, one response at a time."""
    found = []
    for pair in some:
        for response in (pair.chosen, pair.rejected):
            ids = torch.tensor([pair.prompt + response])
            logps = model(ids).logits[0, :-1].double().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            found.append(logps[len(pair.prompt) - 1 :])
    return found


@pytest.mark.parametrize("plain_prompt", [256, 2], ids=["mask", "prompt without mask"])
def test_logps_and_gradients(directory, doubles, process_group, monkeypatch, plain_prompt, tmp_path):
    """The shared prompt against rows of their own, both dialects of config.json."""
    monkeypatch.setattr(tp, "PLAIN_PROMPT", plain_prompt)
    reference = theirs(directory)
    expected = torch.stack([logps.sum() for logps in token_logps(reference, pairs())])
    coefficients = torch.linspace(-1, 2, len(expected))
    (expected * coefficients).sum().backward()
    gradients = {name: param.grad for name, param in reference.named_parameters()}
    for path in (directory, old_dialect(directory, tmp_path / "old")):
        model = ours(path)
        logps, _ = model(**tp.collate_pairs(pairs(), True, CPU))
        # In float64, but for transformers' norms, which compute in float32 whatever they are given.
        torch.testing.assert_close(logps, expected, rtol=1e-6, atol=1e-5)
        (logps * coefficients).sum().backward()
        assert {name for name, _ in model.named_parameters()} == gradients.keys()
        for name, param in model.named_parameters():
            difference = (param.grad - gradients[name]).norm() / gradients[name].norm()
            assert difference < 1e-5, name


def half(auto, directory, **how):
    """transformers' model in bf16."""
    return auto.from_pretrained(directory, dtype=torch.bfloat16, attn_implementation="eager", **how)


# In bf16 ours and transformers' are compared with float64. The two round in different places, so that their errors are not
# the same numbers; an error twice as large is one of bf16's eight bits lost.
def test_logps_and_gradients_in_bf16(directory, process_group):
    generator = torch.Generator().manual_seed(5)
    ids = lambda n: torch.randint(0, 250, (n,), generator=generator).tolist()
    some = [tp.Pair(ids(300), ids(9), ids(12)), tp.Pair(ids(33), ids(14), ids(6))]  # bf16 has no odd position above 256
    exact = theirs(directory)
    reference = half(AutoModelForCausalLM, directory)
    model = ours(directory, precision="bf16")
    exact_logps = torch.cat(token_logps(exact, some))
    reference_logps = torch.cat(token_logps(reference, some))
    _, logps = model(**tp.collate_pairs(some, True, CPU))
    for found in (exact_logps, reference_logps, logps):
        found.sum().backward()

    def gradient_error(model):
        """Of a parameter's gradient, relative: the mean over all."""
        exactly = {name: param.grad for name, param in exact.named_parameters()}
        errors = [(param.grad - exactly[name]).norm() / exactly[name].norm() for name, param in model.named_parameters()]
        return torch.stack(errors).mean()

    error = lambda found: (found - exact_logps).square().mean().sqrt()
    assert 1e-3 < error(logps) < 2 * error(reference_logps)
    assert 1e-3 < gradient_error(model) < 2 * gradient_error(reference)


def test_greedy_text_in_bf16(directory, process_group):
    """By the cache. Each token is by float64's logits the likeliest, but for twice an error of a logit."""
    prompt = pairs()[0].prompt
    (said,), = evaluate.generate(ours(directory, evaluate.CausalLM, "bf16"), [prompt], torch.zeros(1, 1, 12), 0, 1.0, [257])
    ids = torch.tensor([prompt + said])
    exact = theirs(directory)(ids).logits[0, len(prompt) - 1 : -1]
    error = (half(AutoModelForCausalLM, directory)(ids).logits[0, len(prompt) - 1 : -1] - exact).abs().max()
    below = exact.amax(-1) - exact.gather(1, ids[0, len(prompt) :, None])[:, 0]
    assert (below <= 2 * 2 * error).all() and 0 < error < 0.2 * exact.std()


@torch.no_grad()
def test_rewards_in_bf16(directory, process_group):
    generator = torch.Generator().manual_seed(6)
    rows = torch.randint(0, 250, (64, 12), generator=generator)
    config = tp.read_config(directory)
    model = train_rm.build_model(lambda: train_rm.RewardModel(config), CPU, "bf16")
    train_rm.load_reward_model(model, directory, seed=0)
    rewards = []
    for reference in (AutoModelForSequenceClassification.from_pretrained(directory, num_labels=1, dtype=torch.float64),
                      half(AutoModelForSequenceClassification, directory, num_labels=1)):
        reference.score.weight.copy_(model.score.weight)
        reference.config.pad_token_id = 258  # which no row has
        rewards.append(reference(rows).logits[:, 0])
    exact, rounded = rewards
    some = [train_rm.Pair(row[:6], row[6:], row[6:]) for row in rows.tolist()]
    found = model(**train_rm.collate_responses(some, False, CPU))[::2, 0]
    error = lambda found: (found - exact).square().mean().sqrt()
    assert 1e-3 < error(found) < 2 * error(rounded) < 0.2 * exact.std()


def test_greedy_text(directory, doubles, process_group):
    policy = ours(directory, evaluate.CausalLM)
    prompts = [pair.prompt for pair in pairs()]
    said = evaluate.generate(policy, prompts, torch.zeros(3, 1, 12), 0, 1.0, [257])
    for prompt, (ids,) in zip(prompts, said):
        expected = theirs(directory).generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12, eos_token_id=257,
                                              pad_token_id=0)
        assert expected[0, len(prompt) :].tolist() == ids


def test_saved_and_loaded_by_transformers(directory, process_group, tmp_path):
    """Nothing missing, nothing extra, the family's own class; a policy and a reward model."""
    config = tp.read_config(directory)
    tokenizer = tp.load_tokenizer(directory)
    policy = tp.load_weights(tp.build_model(lambda: tp.Llama(config, "torch"), CPU, "fp32"), directory)
    files = tp.model_files(directory, tokenizer, tp.assistant_stop_id(tokenizer),
                           architectures=[tp.architecture(config, "ForCausalLM")])
    tp.save_checkpoint(tmp_path / "policy", model=policy, tokenizer=tokenizer, files=files, run="")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "policy", output_loading_info=True)
    before = AutoModelForCausalLM.from_pretrained(directory)
    assert not any(info.values()) and type(loaded) is type(before)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), before.parameters(), strict=True))

    reward_model = train_rm.build_model(lambda: train_rm.RewardModel(config), CPU, "fp32")
    train_rm.load_reward_model(reward_model, directory, seed=0)
    files = train_rm.model_files(directory, tokenizer, tp.assistant_stop_id(tokenizer), pad_token_id=train_rm.choose_pad(tokenizer),
                                 architectures=[train_rm.architecture(config, train_rm.HEAD)], id2label={"0": "reward"},
                                 label2id={"reward": 0})
    tp.save_checkpoint(tmp_path / "rm", model=reward_model, tokenizer=tokenizer, files=files, run="")
    loaded, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm", output_loading_info=True)
    assert not any(info.values()) and type(loaded).__name__ == train_rm.architecture(config, train_rm.HEAD)
    rewards = reward_model(**train_rm.collate_responses(pairs(), True, CPU))[:, 0]
    expected = [loaded(torch.tensor([pair.prompt + response])).logits[0, 0] for pair in pairs() for response in (pair.chosen, pair.rejected)]
    torch.testing.assert_close(rewards, torch.stack(expected), rtol=1e-5, atol=1e-5)
    again = train_rm.build_model(lambda: train_rm.RewardModel(config), CPU, "fp32")
    assert "kept" in train_rm.load_reward_model(again, tmp_path / "rm", seed=1)
    assert torch.equal(again.score.weight, reward_model.score.weight)


def test_a_sliding_window_that_matters_is_refused(tmp_path, process_group):
    config = AutoConfig.for_model("mistral", **SIZES, sliding_window=32)
    config.save_pretrained(tmp_path)
    c = tp.read_config(tmp_path)
    tp.check_length(c, tmp_path, 32)
    with pytest.raises(tp.UserError, match="sliding_window is 32.*33 tokens"):
        tp.check_length(c, tmp_path, 33)
    config = AutoConfig.for_model("qwen2", **SIZES, sliding_window=32, use_sliding_window=False)
    config.save_pretrained(tmp_path)
    tp.check_length(tp.read_config(tmp_path), tmp_path, 500)  # written, and not in use
    config = AutoConfig.for_model("qwen2", **SIZES, sliding_window=32, use_sliding_window=True, max_window_layers=1)
    config.save_pretrained(tmp_path)
    with pytest.raises(tp.UserError, match="sliding_window is 32"):
        tp.check_length(tp.read_config(tmp_path), tmp_path, 500)


RUNS = [*itertools.product(["qwen2", "qwen3", "mistral"], ["ddp", "shard"]), ("qwen3 with biases", "shard bf16")]


@pytest.mark.parametrize(("name", "form"), RUNS)
def test_two_ranks_train_as_one(run_script, tmp_path, name, form):
    config = AutoConfig.for_model(name.split()[0], **SIZES, **FAMILIES[name], tie_word_embeddings=name == "qwen2")
    model = AutoModelForCausalLM.from_config(config).float()
    randomize(model, seed=1)
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer(tmp_path / "model")
    rows = [dict(prompt=f"post {k}:", chosen=f" good {k}", rejected=" bad" * (1 + k % 3)) for k in range(8)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    finals = []
    precision = "bf16" if "bf16" in form else "fp32"
    for world, more in ((1, []), (2, ["--shard"] if "shard" in form else [])):
        out = tmp_path / f"run{world}"
        run_script("train_pref")("--model", tmp_path / "model", "--data", tmp_path / "pairs.jsonl", "--out", out, "--loss", "is_dpo",
                                 "--batch_size", 4, "--micro_batch_size", 1, "--lr", 1e-2, "--warmup_steps", 0, "--precision", precision,
                                 *more, world=world).ok()
        finals.append(AutoModelForCausalLM.from_pretrained(out / "final"))
    for a, b, before in zip(*(model.parameters() for model in finals), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    assert any((a - before).abs().max() > 1e-3 for a, before in zip(finals[0].parameters(), model.parameters()))
