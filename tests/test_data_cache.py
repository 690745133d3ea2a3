"""Data is tokenized once a run: TokenizedRows hold what a row at a time would give, a second start reads them without
touching the text, and a cache that is stale, foreign or damaged is never used silently."""

import copy
import json
import math
import shutil

import pytest
import torch
from conftest import byte_tokenizer
from conftest import load_rows as conftest_load_rows
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import plumbing.data
import train_pref
import train_sft
from plumbing.data import source_sha256
from train_pref import Pair, UserError, load_rows, split_pair

BOS, EOS = 256, 257
HEADER = dict(model="a model", data="some data")


@pytest.fixture(scope="module")
def byte(tmp_path_factory):
    """A tokenizer of one token a byte, <s> 256, </s> 257."""
    directory = tmp_path_factory.mktemp("byte")
    byte_tokenizer(directory)
    return train_pref.load_tokenizer(directory)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """2,500 rows (they are tokenized a thousand at a time), every seventh of which cannot be used; -> path, rows."""
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [dict(prompt="q" * (k % 41) + f" {k}?", chosen=f" yes {k}" * (k % 5 + 1),
                 rejected=f" no {k}" if k % 7 else "") for k in range(2500)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path, rows


def load(out, data, tokenizer, header=HEADER, max_length=64, max_prompt_length=32):
    header = header | dict(sources={str(data): source_sha256(str(data))})
    return load_rows(out / "data.safetensors", header, row_type=Pair, split=split_pair, source=str(data), held_out=False,
                     recipes={}, tokenizer=tokenizer, vocab_size=259, max_length=max_length,
                     max_prompt_length=max_prompt_length)


def listed(rows):
    return [tuple(row) for row in rows], rows.index.tolist()


def test_rows_are_those_of_one_at_a_time(byte, data, tmp_path, capsys):
    path, rows = data
    text = lambda string: byte(string, add_special_tokens=False).input_ids
    expected, cut, index = [], [0, 0], [k for k in range(2500) if k % 7]
    for k in index:
        prompt = text(rows[k]["prompt"])
        responses = [[*text(rows[k][key]), EOS] for key in ("chosen", "rejected")]
        kept = [BOS, *prompt[-31:]]  # 32 with BOS
        cut[0] += len(prompt) > 31
        cut[1] += sum(len(kept) + len(response) > 64 for response in responses)
        expected.append((kept, *(response[: 64 - len(kept)] for response in responses)))
    found = load(tmp_path, path, byte)
    assert listed(found) == (expected, index) and min(cut) > 100
    assert len(found) == len(index) and type(found[5]) is Pair and found[5].chosen == expected[5][1]
    assert [found[k] for k in (-1, -len(index))] == [expected[-1], expected[0]]
    with pytest.raises(IndexError):
        found[len(index)]
    first = lambda kind: next(k for k, row in zip(index, expected) if kind(k, row)) + 1
    prompt_place = first(lambda k, row: len(text(rows[k]["prompt"])) > 31)
    response_place = first(lambda k, row: EOS not in row[1] or EOS not in row[2])
    assert response_place < prompt_place and capsys.readouterr().out == (
        f"{path}: {len(index)} pairs of 2500 rows; skipped: 358 empty response (first {path}:1);"
        f" cut: {cut[1]} response (first {path}:{response_place}), {cut[0]} prompt (first {path}:{prompt_place})\n")


def test_the_file(byte, data, tmp_path):
    """Plain tensors, nothing else beside it, and read from the disk when they are asked for."""
    found = load(tmp_path, data[0], byte)
    assert [path.name for path in tmp_path.iterdir()] == ["data.safetensors"]
    tensors = load_file(tmp_path / "data.safetensors")
    assert {name: tensor.dtype for name, tensor in tensors.items()} == dict(
        ids=torch.int32, index=torch.int64, offsets=torch.int64, behaviour_logps=torch.float32)
    assert tensors["offsets"].shape == (len(found), 4) and tensors["ids"].numel() == tensors["offsets"][-1, -1]
    with open("/proc/self/smaps") as maps:
        assert sum(str(tmp_path / "data.safetensors") in line for line in maps) >= 1  # mapped, not copied


def forbidden(*args, **kwargs):
    pytest.fail("the text was touched")


def test_a_second_start_does_not_touch_the_text(byte, data, tmp_path, capsys, monkeypatch):
    first, said = listed(load(tmp_path, data[0], byte)), capsys.readouterr().out
    monkeypatch.setattr(type(byte), "__call__", forbidden)
    monkeypatch.setattr("plumbing.data.read_rows", forbidden)
    monkeypatch.setattr(train_pref, "split_pair", forbidden)
    before = (tmp_path / "data.safetensors").stat()
    assert listed(load(tmp_path, data[0], byte)) == first
    assert capsys.readouterr().out == said and "358 empty response" in said  # the report, again
    after = (tmp_path / "data.safetensors").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def flip(path, offset):
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def content(path):
    """Metadata and tensors, as texts of lists, of a safetensors file. (Its header has another order each time it is written.)"""
    with safe_open(path, framework="pt") as file:
        return file.metadata(), {name: repr(file.get_tensor(name).tolist()) for name in file.keys()}  # nan is not nan


def lie(path):
    """Other ids, under the metadata of these."""
    metadata, tensors = content(path)[0], {name: tensor.clone() for name, tensor in load_file(path).items()}
    tensors["ids"][7] += 1
    save_file(tensors, path, metadata)


HARMS = {
    "half-written": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "one byte short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "a flipped bit of an id": lambda path: flip(path, -9),
    "a flipped bit in the middle": lambda path: flip(path, path.stat().st_size // 2),
    "a flipped bit of the header": lambda path: flip(path, 20),
    "other ids": lie,
    "text": lambda path: path.write_text("hello"),
    "another's tensors": lambda path: save_file(dict(chosen=torch.zeros(3)), path),
    "another's, with metadata": lambda path: save_file(dict(chosen=torch.zeros(3)), path, dict(key="x", sha256="y")),
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_or_foreign_file_is_made_again(harm, byte, data, tmp_path, capsys):
    first, path = listed(load(tmp_path, data[0], byte)), tmp_path / "data.safetensors"
    whole = content(path)
    capsys.readouterr()
    HARMS[harm](path)
    assert listed(load(tmp_path, data[0], byte)) == first
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and str(path) in said[0] and said[0].endswith("made again")
    assert "358 empty response" in said[1]
    assert content(path) == whole


@pytest.mark.parametrize("changed", [dict(HEADER, model="another"), dict(HEADER, data="other")])
def test_a_stale_file_is_made_again(changed, byte, data, tmp_path, capsys):
    load(tmp_path, data[0], byte, max_length=40)
    capsys.readouterr()
    found = load(tmp_path, data[0], byte, changed, max_length=64)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and "of another model, tokenizer, data" in said[0] and said[0].endswith("made again")
    (tmp_path / "fresh").mkdir()
    assert listed(found) == listed(load(tmp_path / "fresh", data[0], byte, max_length=64))


def test_what_a_killed_start_left(byte, data, tmp_path):
    """Half of the file that is written aside is no cache, and in nobody's way."""
    (tmp_path / ".data.safetensors.tmp").write_bytes(b"half")
    found = load(tmp_path, data[0], byte)
    assert len(found) == 2142 and [path.name for path in tmp_path.iterdir()] == ["data.safetensors"]


def test_nothing_usable_leaves_no_file(byte, tmp_path):
    (tmp_path / "bad.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="no usable pairs"):
        load(tmp_path, tmp_path / "bad.jsonl", byte)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]


# ----------------------------------------------------------------------------------------------- behaviour log-probs
def test_behaviour_logps(byte, tmp_path, capsys):
    """They go with their responses; those of a response that was cut are of another one, and not used."""
    rows = [dict(prompt="a", chosen="b", rejected="c", chosen_logps=-1.5, rejected_logps=-2),
            dict(prompt="a", chosen="b", rejected="d"),
            dict(prompt="a", chosen="", rejected="d", chosen_logps=-9.0, rejected_logps=-9.0),  # skipped
            dict(prompt="a", chosen="b" * 40, rejected="e", chosen_logps=-3.5, rejected_logps=-4.5),
            dict(prompt="a", chosen="b", rejected="f", chosen_logps=None, rejected_logps=0.0)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for _ in range(2):  # made, and read again
        found = load(tmp_path, path, byte, max_length=40)
        expected = [[-1.5, -2.0], [math.nan, math.nan], [math.nan, -4.5], [math.nan, 0.0]]
        assert found.behaviour_logps.dtype == torch.float32 and found.index.tolist() == [0, 1, 3, 4]
        torch.testing.assert_close(found.behaviour_logps, torch.tensor(expected), rtol=0, atol=0, equal_nan=True)
        assert capsys.readouterr().out.endswith(f"behaviour log-probs: 4 kept (first {path}:1), 1 dropped as the response was"
                                                f" cut or edited (first {path}:4)\n")


def test_behaviour_logps_of_conversations(byte, tmp_path):
    """A template that trims a response, or writes an empty block of thoughts before it, makes another of it."""
    talk = lambda chosen, rejected: dict(prompt=[dict(role="user", content="Hi")], chosen=[dict(role="assistant", content=chosen)],
                                         rejected=[dict(role="assistant", content=rejected)], chosen_logps=-1.0, rejected_logps=-2.0)
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(talk(*texts)) + "\n" for texts in (("a", "b"), (" a", "b"), ("a", "b\n"))))
    trims = "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}</s>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    thinks = trims.replace("{{ m.content | trim }}", "{% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}")
    byte = copy.deepcopy(byte)
    for template, expected in ((trims, [[-1.0, -2.0], [math.nan, -2.0], [-1.0, math.nan]]), (thinks, [[math.nan] * 2] * 3)):
        byte.chat_template = template
        found = load(tmp_path, path, byte, header=HEADER | dict(data=template[:40] + str(len(template))))
        torch.testing.assert_close(found.behaviour_logps, torch.tensor(expected), rtol=0, atol=0, equal_nan=True)


def test_demonstrations_have_none(byte, tmp_path):
    path = tmp_path / "sft.jsonl"
    path.write_text(json.dumps(dict(prompt="a", chosen="b", rejected="c", chosen_logps=-1.5)) + "\n")
    rows, report = conftest_load_rows(train_sft, path, byte, 259, 64, 32)
    assert rows.behaviour_logps is None and report.endswith("columns not read: rejected, chosen_logps")


# -------------------------------------------------------------------------------------------------- on the command line
@pytest.fixture(scope="module")
def model(tiny_llama, tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("models") / "model", seed=1)


def no_tokenizing(model):
    """In a trainer's process: its texts must not be looked at."""
    for script in (train_pref, train_sft):
        plumbing.data.tokenize_rows = plumbing.data.read_rows = forbidden


def arguments(model, data, out):
    return ("--model", model, "--data", data, "--eval_data", data, "--max_length", 64, "--max_prompt_length", 32,
            "--batch_size", 4, "--out", out, "--max_steps", 2, "--save_every", 1, "--eval_every", 0,
            "--keep_state", 0)


@pytest.fixture
def few(tmp_path):
    path = tmp_path / "few.jsonl"
    rows = [dict(prompt=f"{k}?", chosen=" yes" * (k % 3 + 1), rejected=" no") for k in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{}\n")
    return path


def test_one_file_for_four_ranks(run_script, model, few, tmp_path):
    """Rank 0 makes it, and no other rank looks at a text."""
    run, out = run_script("train_pref"), tmp_path / "run"
    run(*arguments(model, few, out), world=4, call=0, action=no_tokenizing, on_rank=3).ok()
    found = sorted(path.name for path in out.iterdir() if path.is_file() and path.name != ".lock")
    assert found == ["data.safetensors", "data_eval.safetensors", "metrics.jsonl", "ref_logps.safetensors",
                     "ref_logps_eval.safetensors"]
    alone = tmp_path / "alone"
    run(*arguments(model, few, alone)).ok()
    assert content(out / "data.safetensors") == content(alone / "data.safetensors")


@pytest.mark.parametrize("script", ["train_pref", "train_sft"])
def test_restart(run_script, model, few, tmp_path, script):
    """A run that resumes reads no text, and says the report again; so does one that is complete, without the report.
    After the data changed it is another run."""
    run, out = run_script(script), tmp_path / "run"
    argv = arguments(model, few, out)
    first = run(*argv).ok()
    noun = "pairs" if script == "train_pref" else "examples"
    report = next(line for line in first.out.splitlines() if f"8 {noun} of 9 rows; skipped: 1 no " in line)
    shutil.rmtree(out / "final")
    shutil.rmtree(out / "step_000002")
    again = run(*argv, call=0, action=no_tokenizing).ok()
    assert again.out.count(report) == first.out.count(report) == 2  # training and held-out data
    assert "resumed from" in again.out
    complete = run(*argv, call=0, action=no_tokenizing).ok()
    assert "this run is complete" in complete.out and report not in complete.out
    few.write_text(few.read_text() + few.read_text())
    run(*argv).refused("holds another run", "data fingerprint was")


# ----------------------------------------------------------------------------------------- what else is said at a start
def test_lengths_beyond_the_models_positions(run_script, model, few, tmp_path):
    argv = (*arguments(model, few, tmp_path / "run"), "--max_steps", 1)
    for script in ("train_pref", "train_sft", "train_rm"):
        said = run_script(script)(*argv, "--max_length", 257, "--out", tmp_path / script).ok().out
        assert said.count("warning: up to 257 tokens, but") == 1 and "256 positions" in said
    said = run_script("train_pref")(*argv, "--max_length", 256, "--out", tmp_path / "fits").ok().out
    assert "positions" not in said


def test_a_reference_with_a_smaller_vocabulary(run_script, model, few, tiny_llama, tmp_path):
    """EOS is 257: a reference of 258 ids has what the data needs, one of 257 has not."""
    argv = (*arguments(model, few, tmp_path / "run"), "--loss", "dpo")
    for size in (257, 258):
        tiny_llama(tmp_path / f"ref{size}", vocab_size=size, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    run_script("train_pref")(*argv, "--ref", tmp_path / "ref257").refused("token id 257", "vocabulary of 257")
    run_script("train_pref")(*argv, "--ref", tmp_path / "ref258", "--out", tmp_path / "run258").ok()


def test_chat_template_kwargs(run_script, tiny_llama, tmp_path):
    """They reach the template, stand in the header and are part of what the data is known by; no tokenizer keeps them."""
    directory = tiny_llama(tmp_path / "model")
    template = ("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
                "{% if add_generation_prompt %}[assistant]{% endif %}")
    (directory / "chat_template.jinja").write_text("{{ system or 'none' }}" + template)
    path = tmp_path / "talks.jsonl"
    row = dict(prompt=[dict(role="user", content="Hi")], chosen=[dict(role="assistant", content="a")],
               rejected=[dict(role="assistant", content="b")])
    path.write_text((json.dumps(row) + "\n") * 4)
    run, out = run_script("train_pref"), tmp_path / "run"
    argv = (*arguments(directory, path, out), "--chat_template_kwargs", '{"system": "Be brief."}')
    run(*argv).ok()
    prompt = byte_tokenizer(tmp_path / "byte").decode(load_file(out / "data.safetensors")["ids"][:30].tolist())
    assert prompt.startswith("Be brief.[user]Hi[assistant]a</s>")
    header = json.loads((out / "metrics.jsonl").read_text().split("\n")[0])
    assert header["args"]["chat_template_kwargs"] == dict(system="Be brief.")
    assert "brief" not in "".join(p.read_text() for p in (out / "final").glob("*.json*") if p.name != "manifest.json")
    run(*arguments(directory, path, out)).refused("holds another run", "chat_template_kwargs was", "data fingerprint was")
    for wrong in ("[1]", "{x", "3", 2000 * '{"x":' + 2000 * "}"):
        run(*argv[:-1], wrong).refused("--chat_template_kwargs", code=2)
