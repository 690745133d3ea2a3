"""The Llama of train_pref.py against transformers, fp32 on CPU: logits, log-probs, gradients, checkpoints, refusals.

The block is byte-identical in every script (test_shared_blocks.py), so one of them stands for all.
"""

import functools
import json
import os
import pickle
import stat

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import plumbing.checkpoint
import train_pref
from plumbing.checkpoint import verify_checkpoint
from plumbing.data import encode
from train_pref import Pair, UserError

LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
THETA = dict(rope_type="default", rope_theta=10000.0)
# Each case changes tiny_llama's defaults: hidden 32, 4 heads of 8 on 2 key-value heads, untied.
CONFIGS = {
    "gqa": {},
    "mha": dict(num_key_value_heads=4),
    "mqa": dict(num_key_value_heads=1),
    "tied": dict(tie_word_embeddings=True),
    "attention_bias": dict(attention_bias=True),
    "mlp_bias": dict(mlp_bias=True),
    "head_dim_10": dict(head_dim=10),  # 4 heads of 10: wider than hidden
    "head_dim_6": dict(head_dim=6, num_key_value_heads=1),  # narrower, and no power of two
    "one_head": dict(num_attention_heads=1, num_key_value_heads=1),
    "eps_1e-1": dict(rms_norm_eps=0.1),  # large enough to be seen if it were left out
    "theta_100": dict(rope_parameters=dict(rope_type="default", rope_theta=100.0)),
    "llama3": dict(rope_parameters=dict(LLAMA3, rope_theta=10000.0)),
    "everything": dict(rope_parameters=dict(LLAMA3, rope_theta=500000.0), attention_bias=True, mlp_bias=True, head_dim=12,
                       num_attention_heads=8, tie_word_embeddings=True, rms_norm_eps=1e-5, num_hidden_layers=3, vocab_size=301),
}
SENTENCES = ["The quick brown fox jumps over the lazy dog.",
             "Once upon a time, there was a little girl named Lily. She loved to play outside in the park with her dog, and one day",
             "def fib(n):\n    return n if n < 2 else fib(n - 1) + fib(n - 2)\n",
             "La distance entre la Terre et la Lune est d'environ 384 400 km ; celle de la Terre au Soleil, 149,6 millions de km."]


def ours(directory, device="cpu", kernel="auto", precision="fp32", compile_layers=False, checkpoint_activations=False):
    config = train_pref.read_config(directory)
    how = (torch.device(device), precision, False, compile_layers, checkpoint_activations)
    return train_pref.load_weights(train_pref.build_model(lambda: train_pref.Llama(config, kernel), *how), directory)


def theirs(directory, attention="sdpa"):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation=attention).eval()


def logits(model, ids, positions=None, segments=None):
    """(B, T, V) of ours."""
    positions = torch.arange(ids.shape[1]).expand_as(ids) if positions is None else positions
    segments = torch.zeros_like(ids) if segments is None else segments
    head = model.model.embed_tokens if model.lm_head is None else model.lm_head
    return model.model(ids, positions, segments) @ head.weight.T


def random_ids(vocab_size, *shape, seed=0):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def edit_config(directory, drop=(), **changes):
    path = directory / "config.json"
    config = {k: v for k, v in json.loads(path.read_text()).items() if k not in drop} | changes
    path.write_text(json.dumps(config))


def edit_tensors(directory, edit):
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors")


# --------------------------------------------------------------------------------------------------------------- logits
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("case", CONFIGS)
@torch.no_grad()
def test_logits_equal_transformers(case, attention, tiny_llama, tmp_path):
    directory = tiny_llama(tmp_path / "m", **CONFIGS[case])
    ids = random_ids(257, 2, 64)  # 64 positions: past the 16 of the original context in the llama3 cases
    expected = theirs(directory, attention)(ids).logits
    assert expected.std() > 0.5  # else 1e-5 would say little
    torch.testing.assert_close(logits(ours(directory), ids), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", ["gqa", "llama3"])
@torch.no_grad()
def test_far_positions(case, tiny_llama, tmp_path):
    directory = tiny_llama(tmp_path / "m", **CONFIGS[case])
    ids, positions = random_ids(257, 2, 24), torch.arange(100_000, 100_048, 2).expand(2, 24)
    expected = theirs(directory)(ids, position_ids=positions).logits
    torch.testing.assert_close(logits(ours(directory), ids, positions), expected, rtol=0, atol=1e-5)
    assert (logits(ours(directory), ids) - expected).abs().max() > 0.1  # every second position: not the same as 0, 1, 2..


@pytest.mark.parametrize("rope", [
    dict(THETA),
    dict(THETA, rope_theta=500000.0),
    dict(LLAMA3, rope_theta=500000.0, original_max_position_embeddings=8192),  # Llama 3.1
    dict(LLAMA3, rope_theta=500000.0, original_max_position_embeddings=8192, factor=32.0),  # Llama 3.2
])
def test_rope_frequencies(rope, tiny_llama, tmp_path):
    shape = dict(hidden_size=256, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=131072)
    config = LlamaConfig(rope_parameters=dict(rope), **shape)
    config.save_pretrained(tmp_path)
    found = train_pref.rope_frequencies(train_pref.read_config(tmp_path))
    if rope["rope_type"] == "llama3":
        expected, attention_factor = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        assert attention_factor == 1.0
    else:
        expected = rope["rope_theta"] ** (-torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    torch.testing.assert_close(found, expected.float(), rtol=2e-6, atol=0)


@pytest.mark.parametrize("case", ["theta_100", "llama3", "everything"])
@pytest.mark.parametrize("key", ["type", "rope_type"])
@torch.no_grad()
def test_old_config_dialect(case, key, tiny_llama, tmp_path):
    """transformers 4 wrote rope_theta and rope_scaling, with "type" before "rope_type"; and torch_dtype."""
    directory = tiny_llama(tmp_path / "m", **CONFIGS[case])
    ids = random_ids(257, 2, 40)
    new = logits(ours(directory), ids)
    rope = json.loads((directory / "config.json").read_text())["rope_parameters"]
    scaling = {key: rope["rope_type"]} | {k: v for k, v in rope.items() if k not in ("rope_type", "rope_theta")}
    edit_config(directory, drop=("rope_parameters", "dtype"), rope_theta=rope["rope_theta"], torch_dtype="float32",
                rope_scaling=scaling if rope["rope_type"] == "llama3" else None)
    assert torch.equal(logits(ours(directory), ids), new)
    torch.testing.assert_close(theirs(directory)(ids).logits, new, rtol=0, atol=1e-5)


@torch.no_grad()
def test_defaults_of_absent_keys(tiny_llama, tmp_path):
    """Llama 1 and 2 exports leave out what has transformers' default value."""
    directory = tiny_llama(tmp_path / "m", num_key_value_heads=4)
    ids = random_ids(257, 2, 20)
    before = logits(ours(directory), ids)
    edit_config(directory, drop=("num_key_value_heads", "head_dim", "rope_parameters", "attention_bias", "mlp_bias", "hidden_act",
                                 "rms_norm_eps", "tie_word_embeddings", "initializer_range"))
    assert torch.equal(logits(ours(directory), ids), before)
    torch.testing.assert_close(theirs(directory)(ids).logits, before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_right_padding(attention, tiny_llama, tmp_path):
    directory = tiny_llama(tmp_path / "m", **CONFIGS["everything"])
    model, ids = ours(directory), random_ids(257, 3, 20)
    lengths = torch.tensor([20, 13, 1])
    real = torch.arange(20) < lengths[:, None]
    expected = theirs(directory, attention)(ids, attention_mask=real.long()).logits
    found = logits(model, ids, segments=torch.where(real, 0, -1))
    torch.testing.assert_close(found[real], expected[real], rtol=0, atol=1e-5)
    assert found.isfinite().all()  # padding too: a NaN there would spread through the gradients
    other = torch.where(real, ids, 7)  # what the padding holds does not matter
    assert torch.equal(logits(model, other, segments=torch.where(real, 0, -1))[real], found[real])


@torch.no_grad()
def test_packed_segments(tiny_llama, tmp_path):
    """Segments 1, 2, 3 of one row are three separate runs."""
    directory = tiny_llama(tmp_path / "m", **CONFIGS["everything"])
    model, parts = ours(directory), [random_ids(257, 1, n, seed=n) for n in (11, 5, 17)]
    ids = torch.cat([*parts, random_ids(257, 1, 3)], 1)  # and 3 of padding
    positions = torch.cat([torch.arange(p.shape[1]) for p in parts] + [torch.zeros(3, dtype=torch.long)])[None]
    segments = torch.tensor([1] * 11 + [2] * 5 + [3] * 17 + [-1] * 3)[None]
    found = logits(model, ids, positions, segments)[:, :33].split([11, 5, 17], 1)
    reference = theirs(directory)
    for part, got in zip(parts, found):
        torch.testing.assert_close(got, reference(part).logits, rtol=0, atol=1e-5)


# Deep or trained models have logits of 20 to 45, one float32 step of which is 2e-6 to 4e-6, and transformers' own two attention
# functions differ there by 1.2e-5 to 7.6e-5. So: 1e-5 against sdpa, which ours calls too; and against eager, that both are
# about as far from the truth, which is a float64 run of ours that agrees with a float64 run of theirs to 1e-9.
def exact_norm(self, x):
    """LlamaRMSNorm in the dtype of its input (transformers' casts to float32, whatever it gets)."""
    return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)


@torch.no_grad()
def check_real_model(directory, texts, monkeypatch):
    tokenizer, model, reference = AutoTokenizer.from_pretrained(directory), ours(directory), theirs(directory)
    rows = [tokenizer(text, return_tensors="pt").input_ids for text in texts]
    found = [logits(model, ids) for ids in rows]
    for ids, got in zip(rows, found):
        torch.testing.assert_close(got, reference(ids).logits, rtol=0, atol=1e-5)
    reference.set_attn_implementation("eager")
    found_eager = [reference(ids).logits for ids in rows]
    reference.set_attn_implementation("sdpa")  # eager takes its softmax in float32, always
    model.double().model.dtype = torch.float64
    reference.double()
    monkeypatch.setattr(LlamaRMSNorm, "forward", exact_norm)
    for ids, got, got_eager in zip(rows, found, found_eager):
        truth = logits(model, ids)
        torch.testing.assert_close(truth, reference(ids).logits, rtol=0, atol=1e-9)
        assert (got - truth).abs().max() < 2 * (got_eager - truth).abs().max() < 2e-4


@torch.no_grad()
def test_stories260k(stories, monkeypatch):
    check_real_model(stories, SENTENCES, monkeypatch)
    text = "Once upon a time, there was a little girl named Lily."
    ids = AutoTokenizer.from_pretrained(stories)(text, return_tensors="pt").input_ids
    nll = F.cross_entropy(logits(ours(stories), ids)[0, :-1], ids[0, 1:])
    assert nll < 1.0  # it was trained on such sentences; chance is log 512 = 6.2


def test_smollm2(smollm, monkeypatch):
    check_real_model(smollm, SENTENCES[::2], monkeypatch)


@torch.no_grad()
def test_smollm2_shared_prompt(smollm):
    """Log-probs of a pair with its prompt computed once are those of two plain runs of transformers."""
    tokenizer = train_pref.load_tokenizer(smollm)
    eos = [tokenizer.eos_token_id]
    texts = ["SUBREDDIT: r/dogs\n\nTITLE: My dog ate 2 pounds of chocolate\n\nPOST: What should I do now?\n\nTL;DR:",
             " Dog ate chocolate, what now?",
             " I have a dog and it ate a lot of chocolate, so I am asking the people of this place for advice."]
    prompt, chosen, rejected = (ids + eos for ids in encode(tokenizer, texts))
    pair = Pair(prompt[:-1], chosen, rejected)
    logps, token_logps = ours(smollm)(**train_pref.collate_pairs([pair], True, torch.device("cpu")))
    expected = [response_logps(theirs(smollm), pair.prompt, response) for response in (pair.chosen, pair.rejected)]
    torch.testing.assert_close(token_logps, torch.cat(expected), rtol=0, atol=1e-4)
    torch.testing.assert_close(logps, torch.stack([e.sum() for e in expected]), rtol=1e-5, atol=0)


# ------------------------------------------------------------------------------------------------ log-probs and gradients
def response_logps(reference, prompt, response):
    """Log-prob of each response token after the prompt, by transformers and log_softmax."""
    ids = torch.tensor([*prompt, *response])
    logps = reference(ids[None]).logits[0, :-1].log_softmax(-1)
    return logps.gather(1, ids[1:, None])[len(prompt) - 1 :, 0]


def random_pairs(lengths):
    """Pairs with prompt, chosen, rejected of these lengths."""
    row = lambda n, seed: random_ids(257, n, seed=seed).tolist()
    return [Pair(*(row(n, 10 * k + j) for j, n in enumerate(three))) for k, three in enumerate(lengths)]


PAIRS = random_pairs([(9, 4, 7), (1, 1, 12), (17, 8, 1), (5, 5, 5)])
LONG = random_pairs([(300, 4, 7), (270, 40, 1), (310, 3, 3), (258, 1, 20)])  # attention takes their first 258 columns apart
COEFFICIENTS = torch.tensor([1.0, -0.5, 0.25, 1.5, -2.0, 0.75, 1.25, -1.0])  # all different: no two sequences may be mixed up
CPU = torch.device("cpu")


def assert_close_tensors(found, expected, rtol):
    assert found.keys() == expected.keys()
    for name in expected:
        error = (found[name] - expected[name]).norm() / expected[name].norm()
        assert error < rtol, f"{name}: relative error {error:.2e}"


def gradients(model):
    return {name: param.grad for name, param in model.named_parameters()}


@pytest.fixture
def reference_run(tiny_llama, tmp_path):
    """-> run(config, pairs): the directory, and transformers' token log-probs, sums and gradients of sum(COEFFICIENTS * sums)."""

    def run(case, pairs=PAIRS, **more):
        directory = tiny_llama(tmp_path / "m", **CONFIGS[case] | more)
        reference = theirs(directory)
        rows = [response_logps(reference, pair.prompt, r) for pair in pairs for r in (pair.chosen, pair.rejected)]
        sums = torch.stack([row.sum() for row in rows])
        (sums * COEFFICIENTS).sum().backward()
        return directory, torch.cat(rows).detach(), sums.detach(), gradients(reference)

    return run


@pytest.fixture
def masks(monkeypatch):
    """The shape (T, L) of the mask, or None, of every call of attention."""
    calls, attention = [], torch.nn.functional.scaled_dot_product_attention

    def spy(*tensors, attn_mask=None, **more):
        calls.append(None if attn_mask is None else tuple(attn_mask.shape[2:]))
        return attention(*tensors, attn_mask=attn_mask, **more)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    return calls


@pytest.mark.parametrize("shared_prompt", [True, False])
@pytest.mark.parametrize("case", ["gqa", "tied", "everything"])
@pytest.mark.parametrize("pairs", [PAIRS, LONG], ids=["short", "long"])
def test_logps_and_gradients(case, pairs, shared_prompt, reference_run, masks):
    directory, expected_tokens, expected_sums, expected_grads = reference_run(case, pairs)
    model = ours(directory)
    masks.clear()
    logps, token_logps = model(**train_pref.collate_pairs(pairs, shared_prompt, CPU))
    T, layers = max(len(p.prompt) + len(p.chosen) + len(p.rejected) * shared_prompt for p in pairs), len(model.model.layers)
    T = max(T, *(len(p.prompt) + len(p.rejected) for p in pairs))
    assert masks == ([(T, T)] if pairs is PAIRS else [(T - 258, T), None]) * layers
    torch.testing.assert_close(token_logps, expected_tokens, rtol=0, atol=1e-5)
    torch.testing.assert_close(logps, expected_sums, rtol=1e-6, atol=1e-5)
    (logps * COEFFICIENTS).sum().backward()
    assert_close_tensors(gradients(model), expected_grads, 1e-5)


@pytest.mark.parametrize("pairs", [PAIRS, LONG], ids=["short", "long"])
def test_checkpoint_activations(pairs, reference_run):
    directory, _, _, expected = reference_run("everything", pairs)
    calls, found = [0, 0], []
    for checkpointing in (False, True):
        model = ours(directory, checkpoint_activations=checkpointing)
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, k=int(checkpointing): calls.__setitem__(k, calls[k] + 1))
        logps, _ = model(**train_pref.collate_pairs(pairs, True, CPU))
        (logps * COEFFICIENTS).sum().backward()
        found.append(gradients(model))
    assert calls == [1, 2]  # it did recompute
    assert_close_tensors(found[1], found[0], 1e-7)
    assert_close_tensors(found[1], expected, 1e-5)


@pytest.mark.parametrize("pairs", [PAIRS, LONG], ids=["short", "long"])
def test_compiled_layers(pairs, reference_run, monkeypatch):
    """The layers are traced forward and backward, in more than one shape. Without code generation, which takes a minute."""
    monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    directory, expected, _, expected_grads = reference_run("everything", pairs)
    model = ours(directory, compile_layers=True)
    torch._dynamo.utils.counters.clear()
    for some in (pairs[:2], pairs):
        token_logps = model(**train_pref.collate_pairs(some, True, CPU))[1]
        torch.testing.assert_close(token_logps, expected[: len(token_logps)], rtol=0, atol=1e-5)
    (model(**train_pref.collate_pairs(pairs, True, CPU))[0] * COEFFICIENTS).sum().backward()
    assert_close_tensors(gradients(model), expected_grads, 1e-5)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] >= 1 and not counters["graph_break"], counters
    assert model.state_dict().keys() == ours(directory).state_dict().keys()  # names stay the checkpoint's


@pytest.mark.timeout(300)
@torch.no_grad()
def test_compiled_layers_generated_code(reference_run):
    """The same, with the code that torch.compile generates (C++ here)."""
    with torch.enable_grad():
        directory, expected, _, _ = reference_run("gqa", num_hidden_layers=1)
    token_logps = ours(directory, compile_layers=True)(**train_pref.collate_pairs(PAIRS, True, CPU))[1]
    torch.testing.assert_close(token_logps, expected, rtol=0, atol=1e-5)


def check_precisions(directory, device):
    """bf16 products: 8 bits, so a log-prob of a 3-layer model is off by some hundredths of a nat; float32 ones by 1e-4."""
    batch = train_pref.collate_pairs(PAIRS, True, device)
    with torch.no_grad():
        expected = ours(directory, "cpu")(**train_pref.collate_pairs(PAIRS, True, CPU))[1]
    for precision, mean_limit, limit in (("fp32", 1e-5, 1e-4), ("bf16", 0.03, 0.2)):
        model = ours(directory, device, precision=precision)
        logps, token_logps = model(**batch)
        error = (token_logps.detach().cpu() - expected).abs()
        assert error.mean() < mean_limit and error.max() < limit, f"{precision}: mean {error.mean()}, max {error.max()}"
        assert precision == "fp32" or error.max() > 1e-4  # bf16 it was
        logps.sum().backward()
        assert logps.dtype == token_logps.dtype == torch.float32
        assert {p.dtype for p in model.parameters()} | {p.grad.dtype for p in model.parameters()} == {torch.float32}


def test_precisions(tiny_llama, tmp_path):
    check_precisions(tiny_llama(tmp_path / "m", **CONFIGS["everything"]), CPU)


@pytest.mark.gpu
def test_precisions_on_gpu(tiny_llama, tmp_path, process_group):
    assert process_group.type == "cuda"
    check_precisions(tiny_llama(tmp_path / "m", **CONFIGS["everything"]), process_group)


# ---------------------------------------------------------------------------------------------------------- checkpoints
def save(directory, source, model=None):
    """What a trainer does at its end."""
    tokenizer = train_pref.load_tokenizer(source)
    files = train_pref.model_files(source, tokenizer, train_pref.assistant_stop_id(tokenizer))
    train_pref.save_checkpoint(directory, model=model or ours(source), tokenizer=tokenizer, files=files, run="")
    return directory


@pytest.mark.parametrize("case", ["gqa", "everything"])
@torch.no_grad()
def test_checkpoint_loads_in_transformers(case, tiny_llama, tmp_path):
    source = tiny_llama(tmp_path / "m", **CONFIGS[case])
    edit_config(source, drop=("dtype",), torch_dtype="bfloat16", our_own_note={"kept": [1, 2]})
    generation = dict(bos_token_id=256, eos_token_id=[11, 12], temperature=0.6, do_sample=True)
    (source / "generation_config.json").write_text(json.dumps(generation))
    model = ours(source)
    model.model.layers[0].mlp.down_proj.weight += 0.125  # as training would
    out = save(tmp_path / "final", source, model)

    loaded, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info  # no missing, unexpected or mismatched keys
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    ids = random_ids(257, 2, 30)
    torch.testing.assert_close(loaded(ids).logits, logits(model, ids), rtol=0, atol=1e-5)
    assert torch.equal(logits(ours(out), ids), logits(model, ids))

    text = "héllo </s> 12345 \U0001f600"
    assert AutoTokenizer.from_pretrained(out)(text).input_ids == AutoTokenizer.from_pretrained(source)(text).input_ids
    config, before = (json.loads((d / "config.json").read_text()) for d in (out, source))
    del before["torch_dtype"]
    # Both dialects of the rotary embedding: transformers 4 reads rope_theta and rope_scaling, 5 rope_parameters.
    rope = dict(before["rope_parameters"])
    rope_theta = rope.pop("rope_theta")
    old = dict(rope_theta=rope_theta, rope_scaling=rope if rope["rope_type"] == "llama3" else None)
    assert config == before | old | dict(dtype="float32", architectures=["LlamaForCausalLM"])
    # What training wrote at the end of each response stops generation; the rest is the source's.
    assert json.loads((out / "generation_config.json").read_text()) == generation | dict(eos_token_id=[11, 12, 257])
    assert loaded.generation_config.eos_token_id == [11, 12, 257]
    assert not (out / "trainer").exists() and not list(tmp_path.glob(".*"))  # nothing left from writing it aside


def test_checkpoint_without_generation_config(tiny_llama, tmp_path):
    source = tiny_llama(tmp_path / "m")
    (source / "generation_config.json").unlink()
    out = save(tmp_path / "final", source)
    assert json.loads((out / "generation_config.json").read_text()) == dict(bos_token_id=256, eos_token_id=[257])
    generated = AutoModelForCausalLM.from_pretrained(out).generate(torch.tensor([[256]]), max_new_tokens=2, do_sample=False)
    assert generated.shape[1] >= 2


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_checkpoint_file_modes(umask, tiny_llama, tmp_path):
    """safetensors writes 0600: a checkpoint that a colleague or a server cannot read."""
    source, before = tiny_llama(tmp_path / "m"), os.umask(umask)
    try:
        out = save(tmp_path / "final", source)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()}
    assert set(modes.values()) == {0o666 & ~umask} and {"model.safetensors", "manifest.json"} <= modes.keys(), modes
    assert stat.S_IMODE(out.stat().st_mode) == 0o777 & ~umask


@pytest.mark.parametrize("case", ["gqa", "tied"])
@torch.no_grad()
def test_sharded_safetensors(case, tiny_llama, tmp_path, monkeypatch):
    directory = tiny_llama(tmp_path / "m", **CONFIGS[case])
    ids, before = random_ids(257, 2, 20), ours(directory)
    sharded = tmp_path / "sharded"
    theirs(directory).save_pretrained(sharded, max_shard_size="20KB")
    AutoTokenizer.from_pretrained(directory).save_pretrained(sharded)
    assert len(list(sharded.glob("*.safetensors"))) > 2 and not (sharded / "model.safetensors").exists()
    assert torch.equal(logits(ours(sharded), ids), logits(before, ids))

    save_torch_state_dict = plumbing.checkpoint.save_torch_state_dict
    monkeypatch.setattr(plumbing.checkpoint, "save_torch_state_dict",
                        lambda tensors, folder, max_shard_size: save_torch_state_dict(tensors, folder, max_shard_size="20KB"))
    out = save(tmp_path / "final", sharded)
    assert len(list(out.glob("*.safetensors"))) > 2
    assert torch.equal(logits(ours(out), ids), logits(before, ids))
    loaded, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    torch.testing.assert_close(loaded(ids).logits, logits(before, ids), rtol=0, atol=1e-5)

    last = max(sharded.glob("*.safetensors"))
    last.write_bytes(last.read_bytes()[:-8])
    with pytest.raises(UserError, match=last.name):
        ours(sharded)
    last.unlink()
    with pytest.raises(UserError, match=last.name):
        ours(sharded)


def test_float16_and_bfloat16_weights_become_float32(tiny_llama, tmp_path):
    directory = tiny_llama(tmp_path / "m")
    for dtype in (torch.float16, torch.bfloat16):
        saved = {name: t.to(dtype) for name, t in load_file(directory / "model.safetensors").items()}
        save_file(saved, directory / "model.safetensors")
        for name, param in ours(directory).named_parameters():
            assert param.dtype == torch.float32 and torch.equal(param, saved[name].float())


# -------------------------------------------------------------------------------------------------------------- refusals
REFUSED_CONFIGS = {
    "model_type": (dict(model_type="gemma"), ["model_type", "gemma"]),
    "rope_type": (dict(rope_parameters=dict(rope_type="yarn", rope_theta=1e4, factor=2.0)), ["rope_type", "yarn"]),
    "rope_type, old dialect": (dict(rope_scaling=dict(type="linear", factor=2.0), rope_parameters=None), ["rope_type", "linear"]),
    "partial_rotary_factor": (dict(rope_parameters=dict(THETA, partial_rotary_factor=0.5)), ["partial_rotary_factor", "0.5"]),
    "quantization": (dict(quantization_config=dict(quant_method="gptq", bits=4)), ["quantization_config", "gptq"]),
    "hidden_act": (dict(hidden_act="gelu"), ["hidden_act", "gelu"]),
    "odd head_dim": (dict(head_dim=7), ["head_dim", "7"]),
    "key-value heads": (dict(num_key_value_heads=3), ["4 heads", "3 key-value heads"]),
    **{f"no {key}": ({key: "absent"}, [key, "missing"]) for key in
       ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")},
    **{f"no {key}": (dict(rope_parameters={k: v for k, v in LLAMA3.items() if k != key}), [key, "missing"]) for key in
       ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")},
}


@pytest.mark.parametrize("case", REFUSED_CONFIGS)
def test_refused_configs(case, tiny_llama, tmp_path):
    changes, words = REFUSED_CONFIGS[case]
    directory = tiny_llama(tmp_path / "m")
    edit_config(directory, drop=[k for k, v in changes.items() if v == "absent"],
                **{k: v for k, v in changes.items() if v != "absent"})
    with pytest.raises(UserError) as error:
        train_pref.read_config(directory)
    for word in [*words, "config.json"]:
        assert word in str(error.value).replace("Missing", "missing")  # transformers' own word


def test_refused_config_files(tiny_llama, tmp_path):
    directory = tiny_llama(tmp_path / "m")
    (directory / "config.json").write_text('{"model_type": "llama",')
    with pytest.raises(UserError, match="config.json"):
        train_pref.read_config(directory)
    (directory / "config.json").unlink()
    with pytest.raises(UserError, match="config.json"):
        train_pref.read_config(directory)


NORM, THIRD, BIAS = (f"model.layers.{name}" for name in ("1.post_attention_layernorm.weight", "2.mlp.up_proj.weight",
                                                         "0.self_attn.q_proj.bias"))
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
REFUSED_WEIGHTS = {  # how the tensors are edited, what the message names
    "missing": (lambda t: t.pop(NORM), [NORM, "missing"]),
    "missing head": (lambda t: t.pop(HEAD), [HEAD, "missing"]),
    "extra": (lambda t: t.update({THIRD: torch.ones(2)}), [THIRD, "extra"]),
    "extra bias": (lambda t: t.update({BIAS: torch.ones(32)}), [BIAS, "extra"]),
    "misshapen": (lambda t: t.update({NORM: torch.ones(31)}), [NORM, "31", "32"]),
    "transposed": (lambda t: t.update({HEAD: t[HEAD].T.contiguous()}), [HEAD, "[32, 272]", "[272, 32]"]),
    "one more id": (lambda t: t.update({EMBEDDING: torch.ones(273, 32)}), [EMBEDDING, "273", "272"]),
}


@pytest.mark.parametrize("case", REFUSED_WEIGHTS)
def test_refused_weights(case, tiny_llama, tmp_path):
    edit, words = REFUSED_WEIGHTS[case]
    directory = tiny_llama(tmp_path / "m")
    edit_tensors(directory, edit)
    with pytest.raises(UserError) as error:
        ours(directory)
    for word in [*words, str(directory)]:
        assert word in str(error.value)


@torch.no_grad()
def test_tensors_that_may_be_left_out(tiny_llama, tmp_path):
    """Old exports hold rotary tables, and a tied head a second time: accepted if it is the embedding, refused if it is not."""
    directory = tiny_llama(tmp_path / "m", tie_word_embeddings=True)
    ids = random_ids(257, 1, 9)
    before = logits(ours(directory), ids)

    def old_export(tensors):
        assert "lm_head.weight" not in tensors
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors |= {f"model.layers.{k}.self_attn.rotary_emb.inv_freq": torch.ones(4) for k in range(2)}

    edit_tensors(directory, old_export)
    assert torch.equal(logits(ours(directory), ids), before)
    edit_tensors(directory, lambda tensors: tensors["lm_head.weight"][271, 31].add_(1e-3))
    with pytest.raises(UserError, match="lm_head.weight"):
        ours(directory)


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_truncated_weights(size, tiny_llama, tmp_path):
    path = tiny_llama(tmp_path / "m") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match=r"model\.safetensors"):
        ours(path.parent)


def test_pickled_weights_are_not_read(tiny_llama, tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    directory = tiny_llama(tmp_path / "m")
    (directory / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.pt"):
        (directory / name).write_bytes(pickle.dumps(Trap()))
    with pytest.raises(UserError, match="model.safetensors: no whole safetensors file.*pickle"):
        ours(directory)
    assert not (tmp_path / "executed").exists()


def test_damaged_checkpoint(tiny_llama, tmp_path, capsys):
    """One flipped bit in the weights of a checkpoint of ours, or any file gone, is refused by name before anything is used;
    a text that somebody edited is named, and used."""
    out = save(tmp_path / "step_000001", tiny_llama(tmp_path / "m"))
    verify_checkpoint(out)
    names = {path.name for path in out.iterdir()} - {"manifest.json"}
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} <= names
    for path in (out / name for name in names):
        good = path.read_bytes()
        capsys.readouterr()
        if path.suffix == ".safetensors":
            path.write_bytes(good[:-20] + bytes([good[-20] ^ 1]) + good[-19:])
            with pytest.raises(UserError, match=path.name):
                ours(out)
        else:
            path.write_bytes(good + b"\n")
            ours(out)
            assert f"warning: {path} was edited" in capsys.readouterr().out
        path.unlink()
        with pytest.raises(UserError, match=path.name):
            verify_checkpoint(out)
        path.write_bytes(good)
    (out / "extra.safetensors").write_bytes((out / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match="extra.safetensors"):
        ours(out)
    (out / "extra.safetensors").unlink()
    capsys.readouterr()
    ours(out)
    assert "warning" not in capsys.readouterr().out


def test_find_model(tmp_path):
    assert train_pref.find_model(str(tmp_path)) == train_pref.find_model(f"{tmp_path}/config.json") == tmp_path
    (tmp_path / "file").touch()
    (tmp_path / "small-config.json").touch()  # another shape than the directory's config.json
    for name in (tmp_path / "nowhere", tmp_path / "file", tmp_path / "small-config.json", "./nowhere", "a/b/c"):
        with pytest.raises(UserError, match="no such model directory"):
            train_pref.find_model(str(name))
    with pytest.raises(UserError, match="no-such-user/no-such-model"):  # HF_HUB_OFFLINE is set: nothing is asked
        train_pref.find_model("no-such-user/no-such-model")
