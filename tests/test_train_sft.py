"""train_sft.py: its loss against transformers, packing, random weights, and whole runs on 1, 2 and 4 ranks."""

import json
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import load_rows
from safetensors.torch import load_file

import train_sft as sft

build = lambda config: sft.build_model(lambda: sft.Llama(config, "torch"), "cpu", "fp32")


class Args:
    max_length, micro_batch_size = 48, 2


def write_demonstrations(path, n, seed=0):
    """n rows, two thirds {prompt, completion} and one third {text}, of very different lengths."""
    rng = random.Random(seed)
    words = lambda most: " ".join(rng.choice(["ab", "c", "defg", "h,", "i."]) for _ in range(rng.randint(1, most)))
    rows = [dict(text=words(8)) if k % 3 == 2 else dict(prompt=words(6) + ":", completion=words(4)) for k in range(n)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def model_dir(tiny_llama, tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("model") / "tiny", seed=1, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_demonstrations(tmp_path_factory.mktemp("data") / "sft.jsonl", 22)


@pytest.fixture(scope="module")
def loaded(model_dir, data, process_group):
    model = sft.load_weights(build(sft.read_config(model_dir)), model_dir)
    return model, list(load_rows(sft, data, sft.load_tokenizer(model_dir), 272, 48, 32)[0])


def ids_and_first(example):
    """All ids, and the place of the first that the loss is on."""
    return example.prompt + example.completion, max(1, len(example.prompt))


def loss_tokens(examples):
    return sum(len(ids) - first for ids, first in map(ids_and_first, examples))


def transformers_nll(model_dir, examples):
    """One example at a time through transformers, without packing or padding: summed negative log-prob of the loss tokens."""
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(model_dir)
    total = 0.0
    for example in examples:
        ids, first = ids_and_first(example)
        ids = torch.tensor([ids])
        labels = ids.clone()
        labels[:, :first] = -100
        logits = reference(ids).logits
        total = total + F.cross_entropy(logits[0, :-1].double(), labels[0, 1:], reduction="sum")
    (total / loss_tokens(examples)).backward()
    grads = {name: p.grad for name, p in reference.named_parameters()}
    return total.item(), grads


def test_loss_and_gradient_equal_transformers(loaded, model_dir):
    model, examples = loaded
    n_tokens = loss_tokens(examples)
    model.zero_grad()
    loss = sft.step_loss(model, examples, Args, train=True).item()
    nll, grads = transformers_nll(model_dir, examples)
    assert loss == pytest.approx(nll / n_tokens, abs=1e-5)
    for name, param in model.named_parameters():
        assert (param.grad - grads[name]).norm() <= 1e-5 * grads[name].norm(), name
    model.zero_grad()


def test_loss_on_the_padded_batch_that_transformers_averages(loaded, model_dir):
    """The number that transformers itself returns for right-padded rows with labels, on prompt/completion rows."""
    from transformers import AutoModelForCausalLM

    model, examples = loaded
    T = max(len(ids) for ids, _ in map(ids_and_first, examples))
    ids = torch.zeros(len(examples), T, dtype=torch.long)
    labels, attention = torch.full_like(ids, -100), torch.zeros_like(ids)
    for b, (row, first) in enumerate(map(ids_and_first, examples)):
        ids[b, : len(row)] = torch.tensor(row)
        labels[b, first : len(row)] = torch.tensor(row[first:])
        attention[b, : len(row)] = 1
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(model_dir)(ids, attention_mask=attention, labels=labels).loss.item()
    assert sft.step_loss(model, examples, Args, train=False).item() == pytest.approx(theirs, abs=1e-5)


def test_an_example_sees_itself_alone(loaded):
    """Log-probs of packed examples equal those of each alone, to rounding."""
    model, examples = loaded
    packed = [[examples[i] for i in row] for row in sft.pack([sum(map(len, e)) for e in examples], 48)]
    assert max(map(len, packed)) >= 3
    with torch.no_grad():
        together, _ = model(**sft.collate_examples(packed, "cpu"))
        alone = torch.cat([model(**sft.collate_examples([[e]], "cpu"))[0] for row in packed for e in row])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-4)


def test_loss_tokens(loaded, model_dir):
    """A completion's tokens and its EOS; of a text all but the first."""
    _, examples = loaded
    tokenizer = sft.load_tokenizer(model_dir)
    completion, text = examples[0], examples[2]
    for ids, _ in map(ids_and_first, (completion, text)):
        assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(completion.prompt[1:]).endswith(":") and len(completion.prompt) > 1
    assert ids_and_first(text)[1] == 1


def test_random_weights(model_dir, tmp_path, process_group):
    config = sft.read_config(model_dir)
    make = lambda seed: sft.init_weights(build(config), 0.1, seed)
    a, b, c = (dict(make(seed).named_parameters()) for seed in (0, 0, 1))
    assert all(torch.equal(a[name], b[name]) for name in a)
    for name, param in a.items():
        if name.endswith("norm.weight"):
            assert torch.equal(param, torch.ones_like(param))
        else:
            assert not torch.equal(param, c[name]) and abs(param.std().item() / 0.1 - 1) < 0.1, name


def flags(model, data, out, *more, **values):
    values = dict(model=model, data=data, eval_data="", out=out, epochs=1, batch_size=6, micro_batch_size=2, lr=1e-3, warmup_steps=2,
                  max_length=48, max_prompt_length=32, save_every=0, eval_every=0, max_steps=5, keep_state=0, precision="fp32") | values
    return [*(word for name, value in values.items() for word in (f"--{name}", value)), *more]


def final(out):
    return load_file(out / "final" / "model.safetensors")


@pytest.fixture(scope="module")
def base_dir(model_dir, tmp_path_factory):
    """A config and tokenizer without weights."""
    directory = tmp_path_factory.mktemp("base")
    for file in Path(model_dir).iterdir():
        if file.suffix == ".json":
            (directory / file.name).write_bytes(file.read_bytes())
    return directory


def test_ranks(run_script, base_dir, data, tmp_path):
    """From random weights: 1, 2 and 4 ranks, whole or sharded, any micro-batch size, a short last step: the same parameters."""
    cli = run_script("train_sft")
    runs = {"1": dict(world=1), "1 micro 8": dict(world=1, micro=8), "2": dict(world=2), "4 --shard": dict(world=4, more=["--shard"], micro=1)}
    for name, run in runs.items():
        out = tmp_path / name.replace(" ", "_")
        cli(*flags(base_dir / "config.json", data, out, *run.get("more", []), micro_batch_size=run.get("micro", 2)), world=run["world"]).ok()
        runs[name] = final(out)
    for name, tensors in runs.items():
        for key, tensor in tensors.items():
            assert (tensor - runs["1"][key]).norm() <= 1e-5 * runs["1"][key].norm(), (name, key)
    start = sft.init_weights(build(sft.read_config(base_dir)), 0.02, 0)
    assert any((runs["1"][key] - param).norm() > 1e-3 * param.norm() for key, param in start.named_parameters())


def test_resume_is_exact_and_loss_falls(run_script, model_dir, data, tmp_path):
    cli = run_script("train_sft")
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    held_out = dict(eval_data=data, eval_every=3, epochs=3, max_steps=0, lr=1e-2)
    cli(*flags(model_dir, data, straight, **held_out)).ok()
    assert cli(*flags(model_dir, data, parts, **held_out), call=5, action=15).code == 128 + 15
    assert [p.name for p in parts.glob("step_*")] == ["step_000005"]
    cli(*flags(model_dir, data, parts, **held_out)).ok()
    lines = {}
    for out in (straight, parts):
        lines[out] = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()[1:]]
        for line in lines[out]:
            [line.pop(key) for key in ("tokens_per_s", "step_s", "mem_gb")]
    assert lines[straight] == lines[parts] and len(lines[straight]) == 12
    assert (straight / "final" / "model.safetensors").read_bytes() == (parts / "final" / "model.safetensors").read_bytes()
    evals = [line["eval_loss"] for line in lines[straight] if "eval_loss" in line]
    assert len(evals) == 4 and evals[-1] < evals[0] - 0.3


def test_presets():
    """Every preset parses and leaves no flag without a value but what is off."""
    for preset in sft.PRESETS:
        args = sft.parse_args(["--preset", preset, *(["--data", "mine.jsonl"] if preset == "paper" else [])])
        assert args.out == f"out/sft-{preset}"
        assert {flag for flag, value in vars(args).items() if value is None} <= {
            "shard", "checkpoint_activations", "chat_template_kwargs", "save_every", "eval_every"}
    assert sft.parse_args([]).preset == "toy" and sft.parse_args(["--preset", "toy", "--data", "mine.jsonl"]).lr == 3e-3
    mine = sft.parse_args(["--data", "mine.jsonl"])  # never the toy's rate and lengths unasked
    assert (mine.preset, mine.lr, mine.max_length, mine.eval_data) == ("paper", 1e-6, 640, "")
    with pytest.raises(sft.UserError, match="--data must be given"):
        sft.parse_args(["--model", "mine"])
    assert "tldr+hh" in sft.PRESETS and sft.PRESETS["tldr+hh"]["data"] == "tldr+hh"


def test_no_dead_flags():
    source = Path(sft.__file__).read_text()
    for name in vars(sft.parse_args([])):
        read = f"args.{name}" in source or f'["args"]["{name}"]' in source or name == "preset"  # parse_with_preset reads that
        assert read, f"--{name} is read nowhere"
