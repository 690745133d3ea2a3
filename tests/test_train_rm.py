"""train_rm.py: its loss against TRL and float64, its scores against transformers, and whole runs on 1, 2 and 4 ranks."""

import ast
import inspect
import json
import math
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import load_rows
from safetensors.torch import load_file, save_file

import train_rm as rm
from runs import finish, spoil

SOURCE = Path(rm.__file__).read_text()
pytestmark = pytest.mark.usefixtures("process_group")  # without which no weights are loaded


def write_pairs(path, n, seed=0):
    """n pairs of text of very different lengths; a reader of the first letter can tell chosen from rejected."""
    rng = np.random.default_rng(seed)
    text = lambda low, high: "".join(rng.choice(list("abcdefgh .,"), rng.integers(low, high)))
    row = lambda: dict(prompt=text(3, 24) + ":", chosen="A" + text(1, 14), rejected="B" + text(1, 14))
    path.write_text("".join(json.dumps(row()) + "\n" for _ in range(n)))
    return path


def flags(model, data, out, *more, **values):
    defaults = dict(model=model, data=data, eval_data="", out=out, epochs=1, batch_size=6, micro_batch_size=2, lr=1e-3,
                    warmup_steps=2, max_length=34, max_prompt_length=26, save_every=0, eval_every=0, max_steps=5, keep_state=0, precision="fp32")
    values = defaults | values
    return [*(word for name, value in values.items() for word in (f"--{name}", value)), *more]


def metrics_of(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()[1:]]
    return [{k: v for k, v in line.items() if k not in ("tokens_per_s", "step_s", "mem_gb")} for line in lines]


def final(out):
    return load_file(out / "final" / "model.safetensors")


def load(directory, seed=0):
    """-> the reward model, what was said of its head."""
    model = rm.build_model(lambda: rm.RewardModel(rm.read_config(directory)), "cpu", "fp32")
    return model, rm.load_reward_model(model, Path(directory), seed)


def pairs_of(data, directory, max_length=34):
    """The pairs; at 34 tokens some responses are cut and end with another token than EOS."""
    limits = rm.load_tokenizer(directory), rm.read_config(directory).vocab_size, max_length, 26
    return list(load_rows(rm, data, *limits)[0])


def responses(pairs):
    return [[*pair.prompt, *response] for pair in pairs for response in (pair.chosen, pair.rejected)]


@pytest.fixture(scope="module")
def model_dir(tiny_llama, tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("model") / "untied", seed=1)


@pytest.fixture(scope="module")
def tied_dir(tiny_llama, tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("model") / "tied", seed=2, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl", 26)


@pytest.fixture(scope="module")
def pairs(model_dir, data):
    pairs = pairs_of(data, model_dir)
    assert len({response[-1] == 257 for response in responses(pairs)}) == 2
    return pairs


# ----------------------------------------------------------------------------------------------------------- the loss
@pytest.mark.parametrize("center", [0.0, 0.01, 2.0])
def test_loss_against_float64(center):
    rng = np.random.default_rng(0)
    chosen, rejected = (np.concatenate([rng.normal(0, 4, 50), extra]) for extra in ([-300.0, 300.0, 0.0], [300.0, -300.0, 0.0]))
    expected = np.logaddexp(0, rejected - chosen) + center * (chosen + rejected) ** 2
    for dtype, rtol in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        given = (torch.tensor(values, dtype=dtype) for values in (chosen, rejected))
        np.testing.assert_allclose(rm.bradley_terry_loss(*given, center=center), expected, rtol=rtol, atol=1e-30)
    metrics = rm.reward_metrics(torch.tensor(np.stack([chosen, rejected], 1)), center)
    assert metrics == pytest.approx({
        "loss": expected.mean(), "rewards/chosen": chosen.mean(), "rewards/rejected": rejected.mean(),
        "rewards/margins": (chosen - rejected).mean(), "rewards/accuracies": np.mean(chosen > rejected)})


@pytest.mark.parametrize("center", [None, 0.0, 0.3])
def test_loss_is_trl_s(center):
    """TRL's own compute_loss, run on a stand-in for its trainer."""
    RewardTrainer = pytest.importorskip("trl").RewardTrainer
    chosen, rejected = torch.randn(2, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind()
    logits = torch.cat([chosen, rejected])[:, None]
    same, lists = (lambda x: x), {key: [] for key in ("min_reward", "mean_reward", "max_reward", "accuracy", "margin")}
    trainer = SimpleNamespace(model=SimpleNamespace(training=False), args=SimpleNamespace(center_rewards_coefficient=center),
                              accelerator=SimpleNamespace(gather=same, gather_for_metrics=same), _total_train_tokens=0,
                              _metrics={"eval": lists}, aux_loss_enabled=False)
    theirs = RewardTrainer.compute_loss(trainer, lambda **inputs: SimpleNamespace(logits=logits), {})
    assert rm.bradley_terry_loss(chosen, rejected, center or 0.0).mean().item() == pytest.approx(theirs.item(), rel=1e-12)
    metrics = rm.reward_metrics(torch.stack([chosen, rejected], 1), 0.0)
    assert metrics["rewards/accuracies"] == pytest.approx(lists["accuracy"][0])
    assert metrics["rewards/margins"] == pytest.approx(lists["margin"][0])


def test_calibration():
    rng = np.random.default_rng(1)
    margins = rng.normal(0.5, 2, 997)
    margins[:3] = 0.0, 60.0, -60.0  # confidence 0.5, and 1 in float64: the first and the last bin
    rewards = rng.normal(0, 1, 997)[:, None] + np.stack([margins, np.zeros(997)], 1)
    found = rm.calibration(torch.tensor(rewards))
    p = 1 / (1 + np.exp(-(rewards[:, 0] - rewards[:, 1])))
    confidence, right, edges = np.maximum(p, 1 - p), p > 0.5, np.linspace(0.5, 1, 11)
    counts = np.histogram(confidence, edges)[0]
    assert [row["count"] for row in found["bins"]] == counts.tolist() and counts.min() > 0 and found["pairs"] == counts.sum() == 997
    which = np.digitize(confidence, edges[1:-1])
    error = 0.0
    for k, row in enumerate(found["bins"]):
        mean, accuracy = confidence[which == k].mean(), right[which == k].mean()
        assert (row["low"], row["high"]) == pytest.approx((edges[k], edges[k + 1]))
        assert (row["confidence"], row["accuracy"]) == pytest.approx((mean, accuracy))
        error += counts[k] / 997 * abs(mean - accuracy)
    assert found["ece"] == pytest.approx(error) and error > 0.05
    one = rm.calibration(torch.tensor([[5.0, 0.0], [4.0, 0.0]]))
    assert [row["count"] for row in one["bins"]] == [0] * 9 + [2] and one["bins"][0]["confidence"] is None
    assert "   0      -      -" in rm.reliability(one) and one["ece"] == pytest.approx(1 - one["bins"][-1]["confidence"])


# ---------------------------------------------------------------------------------------------- forward and checkpoints
def test_collate_reads_the_last_token():
    pairs = [rm.Pair([1, 5], [6, 2], [7, 8, 2]), rm.Pair([1], [9], [2])]  # one response of one token
    for shared, expected in ((True, [[2, 2], [9, 2]]), (False, [[2, 2], [9, 2]])):
        batch = rm.collate_responses(pairs, shared, "cpu")
        assert batch["ids"].flatten()[batch["predict"]].view(2, 2).tolist() == expected
    assert rm.collate_responses(pairs, True, "cpu")["predict"].tolist() == [3, 6, 8, 9]
    assert rm.collate_responses(pairs, False, "cpu")["predict"].tolist() == [3, 9, 11, 16]


@pytest.mark.parametrize("which, plain_prompt", [("model_dir", 256), ("model_dir", 2), ("tied_dir", 256)])
def test_shared_prompt_equals_plain_rows(request, which, plain_prompt, pairs, process_group, monkeypatch):
    monkeypatch.setattr(rm, "PLAIN_PROMPT", plain_prompt)  # 2: attention takes the prompts apart
    model, _ = load(request.getfixturevalue(which))
    grads = {}

    def take(model, optimizer, grad_clip, finite):
        grads[len(grads)] = {name: param.grad.clone() for name, param in model.named_parameters()}
        model.zero_grad()
        return 0.0, bool(finite)

    monkeypatch.setattr(rm, "clip_and_step", take)
    rewards = []
    for form, micro in (("--shared_prompt", 26), ("--no-shared_prompt", 26), ("--shared_prompt", 3)):
        args = rm.parse_args([str(x) for x in flags("m", "d", "o", form, micro_batch_size=micro, center=0.01)])
        rewards.append(rm.reward_step(model, None, pairs, args)[0])
    for other in (1, 2):
        torch.testing.assert_close(rewards[0], rewards[other], rtol=1e-5, atol=1e-5)
        for name, grad in grads[0].items():
            assert (grad - grads[other][name]).norm() <= 1e-4 * grad.norm(), name
    args = rm.parse_args([str(x) for x in flags("m", "d", "o")])
    torch.testing.assert_close(rm.all_rewards(model, pairs, args, ""), rewards[0], rtol=1e-5, atol=1e-5)
    # The gradient is that of the mean over pairs, worked out by autograd on every pair alone.
    alone = [rm.bradley_terry_loss(*model(**rm.collate_responses([p], False, "cpu"))[:, 0], center=0.01) for p in pairs]
    torch.stack(alone).mean().backward()
    for name, param in model.named_parameters():
        assert (param.grad - grads[0][name]).norm() <= 1e-4 * param.grad.norm(), name


def test_new_head(model_dir, tied_dir, tiny_llama, tmp_path):
    model, said = load(model_dir, seed=5)
    assert f"lm_head.weight of {model_dir} dropped" in said and "std 0.1741" in said  # 1/sqrt(33)
    assert "tied: the embedding, which stays" in load(tied_dir)[1]
    assert torch.equal(load(model_dir, seed=5)[0].score.weight, model.score.weight)
    assert not torch.equal(load(model_dir, seed=6)[0].score.weight, model.score.weight)
    files = load_file(model_dir / "model.safetensors")
    body = {name: param for name, param in model.named_parameters() if name != "score.weight"}
    assert set(files) - set(body) == {"lm_head.weight"} and all(torch.equal(files[name], body[name]) for name in body)
    wide = tiny_llama(tmp_path / "wide", hidden_size=4096, intermediate_size=8, num_hidden_layers=1, vocab_size=259)
    weight = load(wide)[0].score.weight
    assert weight.shape == (1, 4096) and weight.std().item() * math.sqrt(4097) == pytest.approx(1, abs=0.05)
    assert abs(weight.mean().item()) * math.sqrt(4097) < 0.05


def rewrite(source, directory, change, **config):
    """A copy of a model directory whose tensors `change` has edited."""
    directory.mkdir()
    for file in Path(source).iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return directory


def test_strict_loading(model_dir, data, tmp_path, run_script):
    norm, score = "model.norm.weight", torch.zeros(1, 32)
    as_reward = dict(architectures=["LlamaForSequenceClassification"])
    cases = {  # what is wrong, the name it is refused by, config
        "missing": (lambda t: t.pop(norm), f"missing ['{norm}']", {}),
        "extra": (lambda t: t.update(odd=score), "extra ['odd']", {}),
        "a head that no language model has": (lambda t: t.update({"score.weight": score}), "extra ['score.weight']", {}),
        "misshapen": (lambda t: t.update({norm: torch.ones(7)}), f"{norm} is torch.float32 [7]; config.json says [32]", {}),
        "no reward head": (lambda t: t.pop("lm_head.weight"), "missing ['score.weight']", as_reward),
        "two heads": (lambda t: t.update({"score.weight": score}), "extra ['lm_head.weight']", as_reward),
        "two labels": (lambda t: (t.pop("lm_head.weight"), t.update({"score.weight": torch.zeros(2, 32)})),
                       "score.weight is [2, 32], a classifier of 2 labels", as_reward),
    }
    for k, (name, (change, words, config)) in enumerate(cases.items()):
        directory = rewrite(model_dir, tmp_path / str(k), change, **config)
        with pytest.raises(rm.UserError, match=re.escape(words)):
            load(directory)
    out = tmp_path / "out"
    run_script("train_rm")(*flags(directory, data, out)).refused("score.weight is [2, 32], a classifier of 2 labels", directory)
    shutil.rmtree(directory)  # mended, the same command goes through
    shutil.copytree(model_dir, directory)
    run_script("train_rm")(*flags(directory, data, out)).ok()


def their_scores(directory, rows, side=None):
    """transformers' scores: each row alone, or one batch padded on a side by the tokenizer."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model, info = AutoModelForSequenceClassification.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()) and type(model).__name__ == "LlamaForSequenceClassification" and model.config.num_labels == 1
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert tokenizer.padding_side == "right" and model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    with torch.no_grad():
        if side is None:
            return torch.cat([model(torch.tensor([row])).logits[:, 0] for row in rows])
        batch = tokenizer.pad({"input_ids": rows}, padding_side=side, return_tensors="pt")
        return model(**batch).logits[:, 0]


@pytest.mark.parametrize("pad", ["<pad>", "</s>", None])
def test_scores_equal_transformers(run_script, model_dir, data, pairs, tmp_path, pad):
    """Also where the tokenizer pads with EOS, by which transformers would pool one token early, or with nothing: then with BOS."""
    start, out = rewrite(model_dir, tmp_path / "start", lambda tensors: None), tmp_path / "out"
    path = start / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": pad}))
    said = run_script("train_rm")(*flags(start, data, out)).ok().out
    assert f"lm_head.weight of {start} dropped" in said
    model, kept = load(out / "final")
    assert kept == f"score.weight of {out / 'final'} kept"
    with torch.no_grad():
        ours = model(**rm.collate_responses(pairs, True, "cpu"))[:, 0]
    assert ours.std() > 0.1
    rows = responses(pairs)
    for side in (None, "right", "left"):
        torch.testing.assert_close(their_scores(out / "final", rows, side), ours, rtol=1e-5, atol=1e-5)
    config = json.loads((out / "final" / "config.json").read_text())
    assert config["pad_token_id"] == (258 if pad == "<pad>" else 256) and not (out / "final" / "generation_config.json").exists()


def test_choose_pad(model_dir):
    tokenizer = rm.load_tokenizer(model_dir)
    tokenizer.bos_token = tokenizer.eos_token  # as SmolLM2's base model has it: of the other special tokens one
    tokenizer.pad_token = tokenizer.eos_token
    assert rm.choose_pad(tokenizer) in (256, 258) and tokenizer.pad_token_id != tokenizer.eos_token_id
    ids = dict(pad_token_id=2, bos_token_id=2, eos_token_id=2, unk_token_id=2)
    nothing = SimpleNamespace(**ids, added_tokens_decoder={}, get_vocab=dict, chat_template=None,
                              generation_stops=[])
    with pytest.raises(rm.UserError, match="pad_token"):
        rm.choose_pad(nothing)


def test_choose_pad_where_pad_ends_turns(model_dir):
    """transformers pools at the last token that is not pad: a response's end must not be taken for padding, be it the template's
    stop or one that generation_config.json names."""
    tokenizer = rm.load_tokenizer(model_dir)  # EOS is 257, pad 258
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ pad_token }}{% endfor %}"
    assert rm.choose_pad(tokenizer) == 256
    tokenizer = rm.load_tokenizer(model_dir)
    assert rm.choose_pad(tokenizer) == 258
    tokenizer.generation_stops = [257, 258]
    assert rm.choose_pad(tokenizer) == 256


def test_goes_on_from_a_reward_model_of_transformers(model_dir, data, pairs, tmp_path, run_script):
    """LlamaForSequenceClassification as transformers saves it is loaded, head and all, and comes back the same."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    theirs = LlamaForSequenceClassification(LlamaConfig.from_pretrained(model_dir, num_labels=1)).float()
    theirs.save_pretrained(tmp_path / "theirs")
    rm.load_tokenizer(model_dir).save_pretrained(tmp_path / "theirs")
    out = tmp_path / "out"
    said = run_script("train_rm")(*flags(tmp_path / "theirs", data, out, max_steps=1, lr=0.0)).ok().out
    assert f"score.weight of {tmp_path / 'theirs'} kept" in said
    assert all(torch.equal(tensor, final(out)[name]) for name, tensor in theirs.state_dict().items())


# ------------------------------------------------------------------------------------------------------------ whole runs
def test_ranks(run_script, model_dir, data, tmp_path):
    """1, 2 and 4 ranks, whole or sharded, any micro-batch size, a last step of two pairs: the same parameters and metrics."""
    runs = {"1": [], "1 micro 8": [], "1 plain": ["--no-shared_prompt"], "2": [], "4": [], "2 --shard": ["--shard"]}
    for name, more in runs.items():
        out = tmp_path / name.replace(" ", "_")
        how = dict(micro_batch_size=8 if "8" in name else 1, center=0.01, eval_data=data, eval_every=5)
        argv = flags(model_dir, data, out, *more, **how)
        run_script("train_rm")(*argv, world=int(name[0])).ok()
        runs[name] = final(out), metrics_of(out)
    tensors, lines = runs["1"]
    start = load(model_dir)[0]
    assert any((tensors[name] - param).norm() > 1e-3 * param.norm() for name, param in start.named_parameters())
    for name, (others, other_lines) in runs.items():
        for key, tensor in tensors.items():
            assert (tensor - others[key]).norm() <= 1e-5 * tensor.norm(), (name, key)
        assert len(lines) == len(other_lines) == 5
        for a, b in zip(lines, other_lines):
            assert a == pytest.approx(b, rel=1e-4, abs=1e-5)


def test_a_rank_holds_a_quarter(run_script, model_dir, data, tmp_path):
    """--shard on 4 ranks: the same parameters as one rank's, and on each rank a quarter of them and of the moments, in bytes."""
    whole, quarter = tmp_path / "whole", tmp_path / "quarter"
    run_script("train_rm")(*flags(model_dir, data, whole)).ok()
    started = run_script("train_rm").start(*flags(model_dir, data, quarter, "--shard", micro_batch_size=1), world=4, call=2,
                                           action="bytes", on_rank=None)
    finish(started).ok()
    total = 4 * sum(tensor.numel() for tensor in final(whole).values())
    for _, log in started:
        (held,) = re.findall(r"^bytes (\d+) (\d+)$", Path(log + ".out").read_text(), re.M)
        params, moments = map(int, held)
        assert params == pytest.approx(total / 4, rel=0.01) and moments == pytest.approx(2 * total / 4, rel=0.01)
    for key, tensor in final(whole).items():
        assert (tensor - final(quarter)[key]).norm() <= 1e-5 * tensor.norm(), key


def test_resume_is_exact(run_script, model_dir, data, tmp_path):
    """Ended by a signal in the middle of an epoch and in the second one, and gone on with: the same files and lines."""
    cli, straight, parts = run_script("train_rm"), tmp_path / "straight", tmp_path / "parts"
    how = dict(eval_data=data, eval_every=3, epochs=2, max_steps=8, save_every=4)
    cli(*flags(model_dir, data, straight, **how)).ok()
    argv = flags(model_dir, data, parts, **how)
    result = cli(*argv, call=3, action=signal.SIGTERM)
    assert result.code == 143 and "stopped by signal 15 after step 3" in result.out
    result = cli(*argv, call=3, action=signal.SIGUSR1)
    assert result.code == 128 + signal.SIGUSR1 and f"resumed from {parts}/step_000003" in result.out
    out = cli(*argv).ok().out
    assert "held out, 26 pairs: expected calibration error" in out and out.count("confidence    pairs") == 1
    trainer = (f"step_000008/trainer/{name}" for name in ("exp_avg/model.safetensors", "exp_avg_sq/model.safetensors", "state.json"))
    for file in ("step_000008/model.safetensors", *trainer, "final/model.safetensors", "final/config.json", "calibration.json"):
        assert (straight / file).read_bytes() == (parts / file).read_bytes(), file
    assert metrics_of(straight) == metrics_of(parts) and len(metrics_of(parts)) == 8
    assert "this run is complete" in cli(*argv).ok().out
    cli(*argv, "--center", 0.1).refused("center was 0.0, is 0.1")
    assert json.loads((parts / "calibration.json").read_text())["step"] == 8


def test_accuracy_rises_and_files(run_script, model_dir, data, tmp_path):
    held_out, out = write_pairs(tmp_path / "held_out.jsonl", 40, seed=9), tmp_path / "out"
    how = dict(eval_data=held_out, eval_every=10, epochs=12, max_steps=0, lr=3e-3)
    cli = run_script("train_rm")
    text = cli(*flags(model_dir, data, out, **how)).ok().out
    lines = metrics_of(out)
    mean = lambda name, part: sum(line[name] for line in part) / len(part)
    assert len(lines) == 60 and mean("rewards/accuracies", lines[:3]) < 0.8
    assert mean("rewards/accuracies", lines[-5:]) > 0.95 and mean("loss", lines[-5:]) < 0.2 < 0.5 < mean("loss", lines[:3])
    names = ("loss rewards/chosen rewards/rejected rewards/margins rewards/accuracies grad_norm learning_rate epoch num_tokens"
             " skipped").split()
    assert all(line.keys() >= set(names) for line in lines)
    evals = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in evals] == [10, 20, 30, 40, 50, 60]
    # The last evaluation, against transformers
    pairs = pairs_of(held_out, model_dir)
    chosen, rejected = their_scores(out / "final", responses(pairs)).double().numpy().reshape(-1, 2).T
    last = evals[-1]
    assert last["eval_loss"] == pytest.approx(np.logaddexp(0, rejected - chosen).mean(), abs=1e-5)
    assert last["eval_rewards/accuracies"] == pytest.approx(np.mean(chosen > rejected)) and np.mean(chosen > rejected) > 0.9
    assert last["eval_rewards/margins"] == pytest.approx((chosen - rejected).mean(), abs=1e-4)
    table = json.loads((out / "calibration.json").read_text())
    assert table["step"] == 60 and table["pairs"] == 40 and table["ece"] == last["eval_ece"]
    assert rm.reliability(table) in text
    header = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    assert header["script"] == "train_rm" and header["pairs"] == 26
    names = {"config.json", "manifest.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"}
    assert {p.name for p in (out / "final").iterdir()} == names


def test_center_holds_the_mean_at_zero(run_script, model_dir, data, pairs, tmp_path):
    sums = []
    for center in (0, 1):
        out = tmp_path / str(center)
        run_script("train_rm")(*flags(model_dir, data, out, center=center, epochs=12, max_steps=0, lr=3e-3)).ok()
        with torch.no_grad():
            rewards = load(out / "final")[0](**rm.collate_responses(pairs, True, "cpu")).view(-1, 2)
        sums.append(rewards.sum(1).square().mean().item())
    assert sums[1] < 0.1 * sums[0]


def test_a_step_that_is_not_finite_is_skipped(run_script, model_dir, data, tmp_path):
    result = run_script("train_rm")(*flags(model_dir, data, tmp_path / "out"), world=2, call=2, action=spoil, on_rank=1).ok()
    lines = metrics_of(tmp_path / "out")
    assert [line["skipped"] for line in lines] == [0, 1, 1, 1, 1] and lines[1]["grad_norm"] is None
    assert "NOT FINITE: skipped" in result.out and all(tensor.isfinite().all() for tensor in final(tmp_path / "out").values())


@pytest.mark.parametrize("more", [[], ["--shard", "--checkpoint_activations"]])
def test_bf16(run_script, model_dir, data, tmp_path, more):
    """bf16 products with the head and its result in float32: near the float32 run, whole or sharded; the files are float32."""
    for precision in ("fp32", "bf16"):
        run_script("train_rm")(*flags(model_dir, data, tmp_path / precision, *more, precision=precision, max_steps=3), world=2).ok()
    a, b = metrics_of(tmp_path / "fp32"), metrics_of(tmp_path / "bf16")
    for x, y in zip(a, b, strict=True):
        assert y["rewards/margins"] == pytest.approx(x["rewards/margins"], abs=0.05) and y["loss"] == pytest.approx(x["loss"], abs=0.05)
    assert a != b and all(tensor.dtype == torch.float32 for tensor in final(tmp_path / "bf16").values())


def test_refused_flags(run_script, model_dir, data, tmp_path):
    for more, words in (("--center -1", "--center -1"), ("--center nan", "--center nan"), ("--kernel torch", "--kernel"),
                        ("--beta 0.1", "--beta"), ("--max_prompt_length 34", "--max_prompt_length 34")):
        with pytest.raises(rm.UserError, match=re.escape(words)):
            rm.parse_args([str(x) for x in flags(model_dir, data, tmp_path)] + more.split())


def test_no_dead_flags():
    """Every flag is read as args.name or header["args"]["name"] where the work is done. --preset the parser itself reads."""
    tree = ast.parse(SOURCE)
    tree.body = [node for node in tree.body if getattr(node, "name", "") not in ("parse_args", "parse_with_preset", "common_flags")]
    read = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "args"}
    read |= set(re.findall(r'\["args"\]\["(\w+)"\]', SOURCE))
    defined = set(vars(rm.parse_args([])))
    assert defined - read == {"preset"} and read <= defined


def test_presets():
    golden = rm.parse_args(["--preset", "tldr+hh"])
    assert (golden.data, golden.batch_size, golden.lr, golden.epochs, golden.shard) == ("tldr+hh", 128, 5e-6, 1, True)
    mine = rm.parse_args(["--data", "mine.jsonl"])
    assert (mine.preset, mine.lr, mine.shard) == ("paper", 5e-6, False)
    assert not rm.parse_args(["--preset", "tldr+hh", "--no-shard"]).shard and not rm.parse_args([]).shard
    for preset in rm.PRESETS:
        args = rm.parse_args(["--preset", preset, *(["--data", "mine.jsonl"] if preset == "paper" else [])])
        assert args.out == f"out/rm-{preset}-seed0" and args.center == 0
        assert {flag for flag, value in vars(args).items() if value is None} <= {
            "shard", "checkpoint_activations", "chat_template_kwargs", "save_every", "eval_every"}


def test_nothing_is_defined_and_not_used():
    """No function or class of this file is left over from another's."""
    names = [name for name, value in vars(rm).items() if getattr(value, "__module__", "") == "train_rm" and
             (inspect.isfunction(value) or inspect.isclass(value))]
    assert len(names) > 25 and [name for name in names if len(re.findall(rf"\b{name}\b", SOURCE)) < 2] == []


def test_an_idle_rank_skips_no_step_for_a_pair_elsewhere(run_script, model_dir, tmp_path):
    """A pair whose loss is NaN ends the updates of the steps that hold it and of no other, also where a rank runs out of pairs and
    computes one times 0, and where DDP's first backward is of that very pair."""
    def poison(tensors):
        (token,) = rm.load_tokenizer(model_dir)("~", add_special_tokens=False)["input_ids"]
        tensors["model.embed_tokens.weight"][token] = math.nan

    poisoned = rewrite(model_dir, tmp_path / "poisoned", poison)
    rows = [dict(prompt=f"p{k}:", chosen="Aa~" if k == 0 else "Aa", rejected="Bbb") for k in range(5)]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = flags(poisoned, data, tmp_path / "run", batch_size=4, epochs=3, max_steps=0, micro_batch_size=1, warmup_steps=0)
    run_script("train_rm")(*argv, world=2).ok()
    skipped = [line["skipped"] for line in metrics_of(tmp_path / "run")]
    in_step = [any(i == 0 for i in rm.epoch_order(5, 0, epoch)[start : start + 4]) for epoch in range(3) for start in (0, 4)]
    assert skipped == np.cumsum(in_step).tolist() and skipped[-1] == 3
