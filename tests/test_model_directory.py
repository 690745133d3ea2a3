"""Model directories as transformers reads them, and those that hold something else: an error that is true."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForSequenceClassification

import train_pref
from conftest import byte_tokenizer
from plumbing.checkpoint import find_model, load_weights, verify_checkpoint
from plumbing.data import check_same_vocabulary, generation_stops
from plumbing.process import UserError
from test_faults import data, flags, model_dir  # noqa: F401 (fixtures)


@pytest.fixture
def copy(model_dir, tmp_path):
    return Path(shutil.copytree(model_dir, tmp_path / "copy"))


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def loaded(directory):
    policy = train_pref.build_model(lambda: train_pref.Llama(train_pref.read_config(directory), "torch"), "cpu", "fp32")
    return load_weights(policy, directory)


# -------------------------------------------------------------------------------------------------------------- weights
def test_the_single_file_counts_beside_an_old_index(tiny_llama, copy, tmp_path):
    """Old shards with their index, and a newer model.safetensors: what transformers reads of the two."""
    old = load_file(tiny_llama(tmp_path / "old", seed=11) / "model.safetensors")
    names = sorted(old)
    weight_map = {}
    for k, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        file = f"model-0000{k}-of-00002.safetensors"
        save_file({name: old[name] for name in part}, copy / file, dict(format="pt"))
        weight_map |= dict.fromkeys(part, file)
    (copy / "model.safetensors.index.json").write_text(json.dumps(dict(metadata={}, weight_map=weight_map)))
    theirs = AutoModelForCausalLM.from_pretrained(copy).state_dict()
    ours = dict(loaded(copy).named_parameters())
    assert all(torch.equal(param, theirs[name]) for name, param in ours.items())
    assert not all(torch.equal(param, old[name]) for name, param in ours.items())
    (copy / "model.safetensors").unlink()  # then the shards are the model
    theirs = AutoModelForCausalLM.from_pretrained(copy).state_dict()
    assert all(torch.equal(param, theirs[name]) for name, param in loaded(copy).named_parameters())


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize("script", ["train_pref", "train_sft", "train_rm"])
def test_an_adapter_is_to_be_merged_first(run_script, copy, data, tmp_path, script, beside):
    if not beside:
        (copy / "model.safetensors").unlink()
        (copy / "config.json").unlink()
    save_file({"base_model.model.lm_head.lora_A.weight": torch.ones(2, 2)}, copy / "adapter_model.safetensors")
    (copy / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    run_script(script)(*flags(copy, data, tmp_path / "run")).refused(copy, "adapter", "merge it into its base model")
    assert not (tmp_path / "run").exists()
    (copy / "adapter_config.json").unlink()
    with pytest.raises(UserError, match="adapter_model.safetensors"):
        find_model(str(copy))


@pytest.mark.parametrize("kind", ["two labels", "value head"])
def test_heads_that_are_no_reward_model(run_script, data, tmp_path, kind):
    config = LlamaConfig(vocab_size=272, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, pad_token_id=258, num_labels=2 if kind == "two labels" else 1)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "rm")
    byte_tokenizer(tmp_path / "rm")
    if kind == "value head":  # as TRL's AutoModelForCausalLMWithValueHead names it
        tensors = load_file(tmp_path / "rm" / "model.safetensors")
        tensors["v_head.summary.weight"] = tensors.pop("score.weight")
        tensors["v_head.summary.bias"] = torch.zeros(1)
        save_file(tensors, tmp_path / "rm" / "model.safetensors", dict(format="pt"))
    result = run_script("train_rm")(*flags(tmp_path / "rm", data, tmp_path / "run"))
    if kind == "two labels":
        result.refused(tmp_path / "rm", "score.weight is [2, 32]", "a classifier of 2 labels", "one (num_labels 1)")
    else:
        result.refused("missing ['score.weight']", "v_head.summary.weight", "the head of a reward model is score.weight")


def test_a_manifest_of_somebody_else(copy):
    """Without our mark it says nothing to us: neither refused nor advised upon. With it, and damaged, it is refused."""
    (copy / "manifest.json").write_text('{"version": 3, "files": ["model.safetensors"]}')
    verify_checkpoint(copy)
    loaded(copy)
    (copy / "manifest.json").write_text('{"run": "0", "model.safetensors": "0"}')
    with pytest.raises(UserError, match="model.safetensors is missing, new or not what was written"):
        verify_checkpoint(copy)


# --------------------------------------------------------------------------------------------------------------- config
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
ROPES = {
    "5, default": dict(rope_parameters=dict(rope_type="default", rope_theta=5e5)),
    "5, llama3": dict(rope_parameters=LLAMA3 | dict(rope_theta=5e5)),
    "4, default": dict(rope_theta=5e5),
    "4, null": dict(rope_theta=5e5, rope_scaling=None),
    "4, llama3": dict(rope_theta=5e5, rope_scaling=LLAMA3),
    "none": {},
}


@pytest.mark.parametrize("dialect", ROPES)
def test_both_rope_dialects_are_saved(copy, tmp_path, dialect):
    """transformers 5 reads the same of what is saved as of what was given. The keys that transformers 4 reads say the same:
    rope_theta on its own (else it is 10,000), and rope_scaling without it, or null."""
    path = copy / "config.json"
    config = {name: value for name, value in json.loads(path.read_text()).items() if not name.startswith("rope")}
    path.write_text(json.dumps(config | ROPES[dialect]))
    before = AutoConfig.from_pretrained(copy).rope_parameters
    tokenizer = train_pref.load_tokenizer(copy)
    files = train_pref.model_files(copy, tokenizer, tokenizer.eos_token_id)
    saved = files["config.json"]
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "config.json").write_text(json.dumps(saved))
    assert AutoConfig.from_pretrained(tmp_path / "saved").rope_parameters == before
    assert saved["rope_theta"] == (5e5 if dialect != "none" else 1e4)
    assert saved["rope_scaling"] == (LLAMA3 if "llama3" in dialect else None)
    read = train_pref.read_config(tmp_path / "saved")
    assert torch.equal(train_pref.rope_frequencies(read), train_pref.rope_frequencies(train_pref.read_config(copy)))


@pytest.mark.parametrize("eos, stops", [(2, [2]), ([2, 5], [2, 5]), (None, []), ([], []), (0, [0])])
def test_stops_of_generation_config(copy, eos, stops):
    (copy / "generation_config.json").write_text(json.dumps(dict(eos_token_id=eos)))
    assert generation_stops(copy) == stops
    tokenizer = train_pref.load_tokenizer(copy)
    saved = train_pref.model_files(copy, tokenizer, 7)["generation_config.json"]["eos_token_id"]
    assert saved == [*stops, tokenizer.eos_token_id, 7]


@pytest.mark.parametrize("eos", [[[1]], "</s>", ["</s>"], {"a": 1}, [None], True, 1.5, -1, [2, -1]])
def test_stops_that_are_no_ids(run_script, copy, data, tmp_path, eos):
    (copy / "generation_config.json").write_text(json.dumps(dict(eos_token_id=eos)))
    with pytest.raises(UserError, match="generation_config.json: eos_token_id is .*: must be a token id or a list"):
        generation_stops(copy)
    if eos in ("</s>", [[1]]):
        run_script("train_pref")(*flags(copy, data, tmp_path / "run")).refused("generation_config.json", "eos_token_id")


@pytest.mark.parametrize("value", ["x", "512", None, [512]])
def test_a_length_that_is_no_number(run_script, copy, data, tmp_path, value):
    edit_json(copy / "tokenizer_config.json", model_max_length=value)
    result = run_script("train_pref")(*flags(copy, data, tmp_path / "run", max_steps=1))
    if value is None:  # none is given: transformers has a default for that
        result.ok()
    else:
        result.refused("tokenizer_config.json", "model_max_length", "must be a number")


# ------------------------------------------------------------------------------------------------------------ tokenizers
def test_another_vocabulary_of_the_same_size(copy, model_dir, tmp_path):
    """Two tokenizers of 259 ids: the same bytes by other ids. Another template, or no pad token, is no conflict."""
    mine = train_pref.load_tokenizer(model_dir)
    check_same_vocabulary(mine, copy)
    path = copy / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    content["model"]["vocab"] = {token: (7 * token_id + 3) % 256 for token, token_id in vocab.items()}
    path.write_text(json.dumps(content))
    theirs = train_pref.load_tokenizer(copy)
    assert mine("Aby").input_ids != theirs("Aby").input_ids and len(mine) == len(theirs)
    with pytest.raises(UserError, match="its tokenizer is another one .*: token 0 is"):
        check_same_vocabulary(mine, copy)
    byte_tokenizer(tmp_path / "other", pad_token=None, chat_template="{{ messages }}")
    check_same_vocabulary(mine, tmp_path / "other")
    byte_tokenizer(tmp_path / "swapped", bos_token="</s>", eos_token="<s>")  # 256 and 257 change places
    with pytest.raises(UserError, match="token 256 is"):
        check_same_vocabulary(mine, tmp_path / "swapped")
