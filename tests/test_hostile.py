"""Model directories that are broken, by accident or on purpose: refused in one line, before memory is taken or code is run."""

import json
import os
import pickle
import shutil
import struct
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer
from safetensors.torch import load_file, save_file

import train_pref as tp

ROW = '{"prompt": "p", "chosen": "good", "rejected": "bad"}\n'


@pytest.fixture(scope="module")
def good(tiny_llama, tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("good") / "model", seed=1)


@pytest.fixture(scope="module")
def sharded(good, tmp_path_factory):
    """The same in several files and an index, as transformers writes it."""
    from transformers import AutoModelForCausalLM

    directory = tmp_path_factory.mktemp("sharded") / "model"
    AutoModelForCausalLM.from_pretrained(good).save_pretrained(directory, max_shard_size="30KB")
    byte_tokenizer(directory)
    assert len(list(directory.glob("*.safetensors"))) >= 3
    return directory


@pytest.fixture
def copy(tmp_path):
    """-> copy(directory) -> another of the same, to be harmed."""
    made = []

    def make(directory):
        made.append(tmp_path / f"model{len(made)}")
        return Path(shutil.copytree(directory, made[-1]))

    return make


def load(directory):
    """What a trainer does with --model before it trains."""
    tp.model_files(directory, tokenizer := tp.load_tokenizer(directory), tp.assistant_stop_id(tokenizer))
    return tp.load_weights(tp.build_model(lambda: tp.Llama(tp.read_config(directory), "torch"), "cpu", "fp32"), directory)


def refused(directory, *words, by=load):
    with pytest.raises(tp.UserError) as caught:
        by(directory)
    said = " ".join(str(caught.value).split())
    for word in words:
        assert str(word) in said, said
    assert len(said) < 700
    return said


def edit_json(path, drop=(), **changes):
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k not in drop} | changes))


# --------------------------------------------------------------------------------------------------------- code in files
PICKLES = ("pytorch_model.bin", "model.pt", "consolidated.00.pth", "optimizer.pt", "training_args.bin", "tokenizer.pkl",
           "vocab.pkl", "model.safetensors.pkl", "scheduler.ckpt", "rng_state.pth")


class Trap:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def watch_pickles(model, directory):
    """In a trainer's process: exit with 77 where a file of PICKLES is opened."""
    def hook(event, args):
        if event == "open" and os.path.basename(str(args[0])) in PICKLES and str(directory) in str(args[0]):
            os._exit(77)

    sys.addaudithook(hook)


@pytest.mark.parametrize("script", ["train_pref", "train_sft", "train_rm"])
def test_pickles_are_never_opened(run_script, good, copy, tmp_path, script):
    directory, data = copy(good), tmp_path / "data.jsonl"
    for name in PICKLES:
        (directory / name).write_bytes(pickle.dumps(Trap(tmp_path / "executed")))
    data.write_text(ROW)
    run = partial(run_script(script), "--model", directory, "--data", data, "--eval_data", "", "--max_length", 64,
                  "--max_prompt_length", 32, "--save_every", 1, "--max_steps", 1, action=partial(watch_pickles, directory=directory))
    run("--out", tmp_path / "run").ok()
    assert not [path for path in (tmp_path / "run").rglob("*") if path.name in PICKLES]
    (directory / "model.safetensors").unlink()
    run("--out", tmp_path / "without").refused("model.safetensors: no whole safetensors file", "never read")
    (directory / "model.safetensors").write_bytes(pickle.dumps(Trap(tmp_path / "executed")))
    run("--out", tmp_path / "renamed").refused("model.safetensors: no whole safetensors file")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("key", ["AutoTokenizer", "AutoConfig", "AutoModelForCausalLM"])
def test_code_in_a_model_directory_is_not_run(good, copy, tmp_path, monkeypatch, key):
    """Even where somebody at the terminal would say yes: it is never asked."""
    directory = copy(good)
    (directory / "evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'executed')!r})\nclass Evil: pass\n")
    monkeypatch.setattr("builtins.input", lambda *question: "y")
    auto_map = {key: ["evil.Evil", "evil.Evil"] if key == "AutoTokenizer" else "evil.Evil"}
    edit_json(directory / "tokenizer_config.json", auto_map=auto_map, tokenizer_class="Evil")
    edit_json(directory / "config.json", auto_map=auto_map)
    try:
        load(directory)
    except tp.UserError as error:
        assert str(directory) in str(error)
    assert not (tmp_path / "executed").exists()


# ------------------------------------------------------------------------------------------------------------ the index
INDEXES = {
    "a directory above": {"weight_map": {"x": "../x.safetensors"}},
    "a directory below": {"weight_map": {"x": "sub/x.safetensors"}},
    "an absolute path": {"weight_map": {"x": "/etc/x.safetensors"}},
    "no file": {"weight_map": {"x": ".."}},
    "the empty name": {"weight_map": {"x": ""}},
    "a pickle": {"weight_map": {"x": "pytorch_model.bin"}},
    "a number": {"weight_map": {"x": 3}},
    "null": {"weight_map": {"x": None}},
    "a list": {"weight_map": ["model.safetensors"]},
    "a string": {"weight_map": "model.safetensors"},
    "nothing": {"weight_map": {}},
    "no map": {"metadata": {}},
    "no object": ["model.safetensors"],
}


@pytest.mark.parametrize("case", INDEXES)
def test_index(sharded, copy, case):
    directory = copy(sharded)
    content = INDEXES[case]
    real = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    save_file({"x": torch.zeros(3)}, directory.parent / "x.safetensors")
    if isinstance(content, dict) and isinstance(content.get("weight_map"), dict) and content["weight_map"]:
        content = {"weight_map": real | content["weight_map"]}
    (directory / "model.safetensors.index.json").write_text(json.dumps(content))
    refused(directory, directory / "model.safetensors.index.json")


def test_index_that_is_not_json(sharded, copy):
    directory = copy(sharded)
    index = directory / "model.safetensors.index.json"
    good = index.read_text()
    for content in ("", good[:-3], "[" * 10**5, "\ufeff" + good, '{"weight_map": ' * 10**5):
        index.write_text(content)
        refused(directory, index)


def test_symbolic_links_are_followed(sharded, tmp_path):
    """The Hub's cache is made of them."""
    directory = tmp_path / "links"
    directory.mkdir()
    for path in sharded.iterdir():
        (directory / path.name).symlink_to(path)
    a, b = (dict(load(d).named_parameters()) for d in (sharded, directory))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_shards(sharded, copy, tiny_llama, tmp_path):
    """Truncated, missing, swapped or another model's: refused by the file's or the tensor's name."""
    names = sorted(path.name for path in sharded.glob("*.safetensors"))
    for name in names:
        content = (sharded / name).read_bytes()
        for size in (0, 7, 8, 100, len(content) // 2, len(content) - 1):
            directory = copy(sharded)
            (directory / name).write_bytes(content[:size])
            refused(directory, directory / name)
        directory = copy(sharded)
        (directory / name).unlink()
        refused(directory, name)
        directory = copy(sharded)
        shutil.copy(sharded / names[names.index(name) - 1], directory / name)
        refused(directory, directory, "do not fit config.json: missing", min(load_file(sharded / name)))
    directory, tensors = copy(sharded), load_file(sharded / names[0])
    first = sorted(tensors)[0]
    save_file(tensors | {first: tensors[first][:-1].contiguous()}, directory / names[0])  # of a model of another size
    refused(directory, directory, first, list(tensors[first].shape))


# ----------------------------------------------------------------------------------------------------------- safetensors
def header(**tensors):
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text


HEADERS = {
    "length 2^63": struct.pack("<Q", 2**63) + b"{}",
    "length 2^40": struct.pack("<Q", 2**40) + b"{}",
    "length 0": struct.pack("<Q", 0),
    "longer than the file": struct.pack("<Q", 1000) + b"{}",
    "not JSON": struct.pack("<Q", 4) + b"\x80\x04N.",
    "no tensors": header(),
    "offsets past the end": header(x=dict(dtype="F32", shape=[2**30], data_offsets=[0, 2**32])),
    "offsets backwards": header(x=dict(dtype="F32", shape=[1], data_offsets=[4, 0])) + bytes(4),
    "a shape that overflows": header(x=dict(dtype="F32", shape=[2**62, 2**62], data_offsets=[0, 4])) + bytes(4),
    "a negative shape": header(x=dict(dtype="F32", shape=[-1], data_offsets=[0, 4])) + bytes(4),
    "an unknown type": header(x=dict(dtype="PICKLE", shape=[1], data_offsets=[0, 4])) + bytes(4),
    "overlapping": header(x=dict(dtype="F32", shape=[1], data_offsets=[0, 4]), y=dict(dtype="F32", shape=[1], data_offsets=[0, 4])) + bytes(4),
    "nested deeply": struct.pack("<Q", 10**5) + b"[" * 10**5,
}


@pytest.mark.parametrize("case", HEADERS)
def test_safetensors_headers(good, copy, case):
    directory = copy(good)
    (directory / "model.safetensors").write_bytes(HEADERS[case])
    refused(directory, directory)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_weights_that_are_no_floats(good, copy, dtype):
    """Quantized weights without a word in config.json would be taken for what they are not."""
    directory, name = copy(good), "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(directory / "model.safetensors")
    save_file(tensors | {name: tensors[name].to(dtype)}, directory / "model.safetensors")
    refused(directory, directory, name)


# ----------------------------------------------------------------------------------------------------------- config.json
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
NO_SIZE = (10**12, -1, 0, "32", True, 32.0, float("nan"), None, [32], {"a": 1})
NO_NUMBER = (float("nan"), float("inf"), -1.0, 0, "1e-6", True, [1], 10**400)
NO_OBJECT = ("llama3", [1], 3, True)
CONFIGS = [
    *((key, value) for key in SIZES for value in NO_SIZE),
    ("num_hidden_layers", 10**6),  # would be made for hours
    *((key, value) for key in ("head_dim", "num_key_value_heads") for value in NO_SIZE if value not in (0, None)),
    *((key, value) for key in ("rms_norm_eps", "initializer_range", "rope_theta") for value in NO_NUMBER),
    *((key, value) for key in ("rope_scaling", "rope_parameters") for value in NO_OBJECT),
    *((key, value) for key in ("tie_word_embeddings", "attention_bias", "mlp_bias") for value in ("false", 1, [], 0.0)),
    *(("rope_parameters", dict(rope_type="llama3", rope_theta=1e4, factor=factor, low_freq_factor=low, high_freq_factor=4.0,
                               original_max_position_embeddings=most))
      for factor, low, most in ((0, 1.0, 64), ("8", 1.0, 64), (8.0, float("nan"), 64), (8.0, 1.0, -64))),
]


@pytest.mark.parametrize(("key", "value"), CONFIGS, ids=lambda x: repr(x)[:30])
def test_config_values(good, tmp_path, key, value):
    """Refused when the file is read: before any tensor is made. Often by transformers, in its words."""
    words = lambda key: dict(rope_scaling="rope_parameters", num_key_value_heads="key-value heads",
                             num_attention_heads="attention heads").get(key, key.replace("_", " "))
    drop = ["rope_parameters"] if key in ("rope_theta", "rope_scaling") else []
    (tmp_path / "config.json").write_text((good / "config.json").read_text())
    edit_json(tmp_path / "config.json", drop, **{key: value})
    said = refused(tmp_path, tmp_path / "config.json", by=tp.read_config)
    assert key in said or words(key) in said or isinstance(value, dict) and "factor" in said or (
        "original_max_position_embeddings" in said) or (key, value) == ("num_attention_heads", 0), said  # a modulo by zero


def test_config_that_is_no_object(good, tmp_path):
    text = (good / "config.json").read_text()
    for content in ("", "[]", "3", "null", '"llama"', text[:-5], "[" * 10**5, '{"a": ' * 10**5, "\x00", '{"vocab_size": ' + "9" * 10**5 + "}"):
        (tmp_path / "config.json").write_text(content)
        refused(tmp_path, tmp_path / "config.json", by=tp.read_config)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    refused(tmp_path, tmp_path / "config.json", by=tp.read_config)


# ------------------------------------------------------------------------------------------- every file of a model, cut off
def test_every_file_truncated(good, copy):
    """Nothing that is cut off is taken for whole; a last line end may go."""
    names = sorted(path.name for path in good.iterdir())
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= set(names)
    for name in names:
        content = (good / name).read_bytes()
        for size in (0, 1, len(content) // 2, len(content.rstrip()) - 1):
            directory = copy(good)
            (directory / name).write_bytes(content[:size])
            refused(directory, directory)


TOKENIZERS = {  # a file of the tokenizer, and what it holds
    "a list": ("tokenizer.json", "[]"), "no model": ("tokenizer.json", "{}"), "a number": ("tokenizer.json", "3"),
    "not JSON": ("tokenizer.json", "\x80\x04N."), "nested deeply": ("tokenizer.json", "[" * 10**5),
    "an unknown model": ("tokenizer.json", '{"version": "1.0", "model": {"type": "Pickle"}}'),
    "config a list": ("tokenizer_config.json", "[]"), "config nested deeply": ("tokenizer_config.json", "[" * 10**5),
    "config not JSON": ("tokenizer_config.json", "{"),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_tokenizers(good, copy, case):
    directory = copy(good)
    name, content = TOKENIZERS[case]
    (directory / name).write_text(content)
    refused(directory, directory, by=tp.load_tokenizer)


@pytest.mark.parametrize("content", ["{", "[]", "3", "[" * 10**5])
def test_generation_config(good, copy, content):
    """The first checkpoint holds its keys: said at the start, not when hours of work are to be saved."""
    directory = copy(good)
    (directory / "generation_config.json").write_text(content)
    refused(directory, directory / "generation_config.json")
