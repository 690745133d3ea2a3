"""Data that is not as it should be: every kind of bad row is skipped and counted, every kind of bad file is an error in one line
that names it. What is done with good rows is in test_data.py."""

import gzip
import json
import re

import pytest
from conftest import byte_tokenizer, load_rows
from hypothesis import given, settings
from hypothesis import strategies as st

import train_pref
import train_sft
from plumbing.data import read_jsonl

UserErrors = train_pref.UserError, train_sft.UserError

LIMITS = (259, 128, 64)  # vocab_size, max_length, max_prompt_length
GOOD = b'{"prompt": "p", "chosen": "good", "rejected": "bad"}'
CHAT = "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"


@pytest.fixture(scope="module")
def byte(tmp_path_factory):
    directory = tmp_path_factory.mktemp("byte")
    byte_tokenizer(directory)
    tokenizer = train_pref.load_tokenizer(directory)
    tokenizer.chat_template = CHAT
    return tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def row(**changes):
    return json.dumps(dict(prompt="p", chosen="good", rejected="bad") | changes).encode()


# One line each: what is skipped, and by which kind; None: it is a good row.
ROWS = {
    "not an object": (b"[1, 2]", "no chosen and rejected, keys: []"),
    "a string": (b'"text"', "no chosen and rejected, keys: []"),
    "a number": (b"3", "no chosen and rejected, keys: []"),
    "null": (b"null", "no chosen and rejected, keys: []"),
    "NaN": (b"NaN", "no chosen and rejected, keys: []"),
    "no key": (b"{}", "no chosen and rejected, keys: []"),
    "other keys": (b'{"question": "p", "answer": "a"}', "no chosen and rejected, keys: ['question', 'answer']"),
    "no rejected": (b'{"prompt": "p", "chosen": "a"}', "no chosen and rejected, keys: ['prompt', 'chosen']"),
    "no prompt": (b'{"chosen": "a", "rejected": "b"}', "no prompt, keys: ['chosen', 'rejected']"),
    "response null": (row(chosen=None), "wrong types, prompt is str, chosen is NoneType, rejected is str"),
    "response a number": (row(chosen=7), "wrong types, prompt is str, chosen is int, rejected is str"),
    "response true": (row(rejected=True), "wrong types, prompt is str, chosen is str, rejected is bool"),
    "response NaN": (b'{"prompt": "p", "chosen": NaN, "rejected": "b"}', "wrong types, prompt is str, chosen is float, rejected is str"),
    "response -Infinity": (b'{"prompt": "p", "chosen": -Infinity, "rejected": "b"}', "wrong types, prompt is str, chosen is float, rejected is str"),
    "response 1e999": (b'{"prompt": "p", "chosen": 1e999, "rejected": "b"}', "wrong types, prompt is str, chosen is float, rejected is str"),
    "response an object": (row(chosen={"text": "a"}), "wrong types, prompt is str, chosen is dict, rejected is str"),
    "response a list of strings": (row(chosen=["a"], rejected=["b"]), "wrong types, a message is str"),
    "prompt a number": (row(prompt=3), "wrong types, prompt is int, chosen is str, rejected is str"),
    "one response a list": (row(chosen=[{"role": "assistant", "content": "a"}]), "wrong types, prompt is str, chosen is list, rejected is str"),
    "lone surrogate in a response": (row(chosen="\ud83d"), "broken Unicode"),
    "lone surrogate in the prompt": (row(prompt="\udc00 p"), "broken Unicode"),
    "surrogate written as UTF-8": (b'{"prompt": "\xed\xa0\xbd", "chosen": "good", "rejected": "bad"}', "broken Unicode"),
    "empty response": (row(chosen=""), "empty response"),
    "white space": (row(rejected=" \t\u2028\u00a0"), "empty response"),
    "nothing but EOS": (row(rejected="</s>"), "empty response"),
    "identical": (row(chosen="same", rejected="same"), "identical responses"),
    "identical once cut": (row(chosen="a" * 1000 + "b", rejected="a" * 1000 + "c"), "identical once cut"),
    "roles that are no text": (row(prompt=[{"role": 1, "content": "a"}], chosen=[{}], rejected=[{"x": 1}]), "wrong types, a message's role is int"),
    "a surrogate in a conversation": (row(prompt=[{"role": "user", "content": "\ud83d"}], chosen=[{"role": "assistant", "content": "a"}],
                                          rejected=[{"role": "assistant", "content": "b"}]), "broken Unicode"),
    "NUL": (row(prompt="a\x00b"), None),
    "U+2028 and other line ends": (b'{"prompt": "a\xe2\x80\xa8b\xc2\x85c", "chosen": "good", "rejected": "bad"}', None),
    "an unread key with NaN": (row(score=float("nan")), None),
    "an unread key with a lone surrogate": (row(note="\ud83d"), None),
    "CRLF": (GOOD + b"\r", None),
    "white space around": (b"  " + GOOD + b" \t", None),
    "huge": (row(prompt="x" * 10**6, chosen="y" * 10**6), None),
    "nested 500 deep, unread": (b'{"prompt": "p", "chosen": "good", "rejected": "bad", "meta": ' + b"[" * 500 + b"]" * 500 + b"}", None),
}


@pytest.mark.parametrize("case", ROWS)
def test_rows(case, byte, folder):
    line, kind = ROWS[case]
    path = folder / "rows.jsonl"
    path.write_bytes(b"\n".join([GOOD, b"", line, b" \r", GOOD]) + b"\n")
    pairs, report = load_rows(train_pref, path, byte, *LIMITS)
    index = pairs.index
    if kind is None:
        assert index.tolist() == [0, 1, 2] and "3 pairs of 3 rows; skipped: none" in report
    else:
        assert index.tolist() == [0, 2] and f"2 pairs of 3 rows; skipped: 1 {kind} (first {path}:3)" in report


# What the file holds (before, it has one good line), and what is said.
FILES = {
    "not JSON": (b"hello", "data.jsonl:2: not JSON"),
    "cut in two": (GOOD[:20], "data.jsonl:2: not JSON"),
    "single quotes": (b"{'prompt': 'p'}", "data.jsonl:2: not JSON"),
    "two objects on a line": (GOOD + GOOD, "data.jsonl:2: not JSON"),
    "trailing comma": (b'{"prompt": "p",}', "data.jsonl:2: not JSON"),
    "pretty-printed": (b'{\n "prompt": "p"\n}', "data.jsonl:2: not JSON"),
    "a raw NUL": (b'{"prompt": "\x00"}', "data.jsonl:2: not JSON"),
    "NUL bytes alone": (b"\x00" * 100, "data.jsonl:2: not JSON"),
    "Latin-1": (b'{"prompt": "\xe9"}', "data.jsonl:2: not JSON"),
    "UTF-16": ('{"prompt": "p"}\n{"prompt": "q"}'.encode("utf-16"), "data.jsonl:2: not JSON"),
    "a BOM inside": (b"\n\xef\xbb\xbf\xef\xbb\xbf" + GOOD, "data.jsonl:3: not JSON"),
    "nested deeply": (b'{"prompt": ' + b"[" * 10**5 + b"]" * 10**5 + b"}", "data.jsonl:2: not JSON: maximum recursion depth"),
    "objects nested deeply": (b'{"a": ' * 10**5, "data.jsonl:2: not JSON: maximum recursion depth"),
    "a huge integer": (b'{"n": ' + b"9" * 10**5 + b"}", "data.jsonl:2: not JSON"),
    "a gzip file": (gzip.compress(GOOD), "data.jsonl:2: not JSON"),
}


def refusal(load, *args):
    with pytest.raises(UserErrors) as caught:
        load(*args)
    return " ".join(str(caught.value).split())


@pytest.mark.parametrize("case", FILES)
def test_files(case, byte, folder):
    content, words = FILES[case]
    path = folder / "data.jsonl"
    path.write_bytes(GOOD + b"\n" + content + b"\n")
    said = refusal(load_rows, train_pref, path, byte, *LIMITS)
    assert f"{folder}/{words}" in said and len(said) < 500
    assert f"{folder}/{words}" in refusal(load_rows, train_sft, path, byte, *LIMITS)


def test_whole_files(byte, folder):
    load = lambda path: refusal(load_rows, train_pref, path, byte, *LIMITS)
    path = folder / "whole.jsonl"
    for content in (b"", b"\n\n \r\n"):
        path.write_bytes(content)
        assert f"no usable pairs in {path}: 0 pairs of 0 rows" in load(path)
    path.write_bytes(b'{"chosen": 1}\n' * 7)
    assert f"0 pairs of 7 rows; skipped: 7 no chosen and rejected, keys: ['chosen'] (first {path}:1)" in load(path)
    path.write_bytes(b"\xef\xbb\xbf" + GOOD)  # Windows' mark at a file's beginning is no error
    assert len(load_rows(train_pref, path, byte, *LIMITS)[0]) == 1
    zipped = folder / "whole.jsonl.gz"
    for content in (gzip.compress(GOOD * 100)[:-12], b"", GOOD, gzip.compress(GOOD)[:5]):
        zipped.write_bytes(content)
        assert str(zipped) in load(zipped)
    for name in ("dir.jsonl", "dir.jsonl.gz"):
        (folder / name).mkdir()
        said = load(folder / name)
        assert "directory" in said and f"{folder / name}" in said
    said = load(folder / "none.jsonl")
    assert "No such file" in said and f"{folder}/none.jsonl" in said


def test_a_hub_dataset_that_cannot_be_read(byte, folder, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    directory = folder / "hub"
    directory.mkdir()
    (directory / "train.jsonl").write_bytes(GOOD + b"\n" + GOOD[:20])
    assert str(directory) in refusal(load_rows, train_pref, directory, byte, *LIMITS)


@pytest.mark.parametrize("script", ["train_pref", "train_sft", "train_rm"])
def test_on_the_command_line(run_script, tiny_llama, folder, script):
    """One line and exit code 1 on both ranks; and fewer rows than a batch are one short step."""
    model, path = folder / "model", folder / "data.jsonl"
    if not model.exists():
        tiny_llama(model)
    argv = ("--model", model, "--data", path, "--eval_data", "", "--batch_size", 8, "--micro_batch_size", 4, "--max_length", 64,
            "--max_prompt_length", 32, "--out", folder / script, "--epochs", 2, "--save_every", 0)
    path.write_bytes(b"[" * 10**5)
    run_script(script)(*argv).refused(f"{path}:1: not JSON: maximum recursion depth")
    run_script(script)(*argv, "--data", "x" * 300).refused("File name too long")
    path.write_bytes(b"\n" + GOOD + b"\n{}\n")
    result = run_script(script)(*argv, world=2).ok()
    assert "keys: []" in result.out and "step 2/2" in result.out


# -------------------------------------------------------------------------------------------------------------- any row
TEXT = st.text(st.characters(exclude_categories=()), max_size=12) | st.sampled_from(
    ["", " ", "a", "b", "</s>", "\ud83d", "\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant: c", "x" * 300])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
ANYTHING = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=6)
MESSAGES = st.lists(st.fixed_dictionaries({}, optional=dict(role=st.sampled_from(["user", "assistant", "system"]) | SCALARS,
                                                             content=TEXT | SCALARS)) | SCALARS, max_size=4)
VALUES = TEXT | TEXT | MESSAGES | ANYTHING
ROW = st.fixed_dictionaries({}, optional={key: VALUES for key in ("prompt", "chosen", "rejected", "completion", "text", "messages")})


def counts_add_up(load, path, n_rows, noun):
    """Rows kept and skipped are all rows; what cannot be used at all is an error in one line. -> the number kept."""
    try:
        rows, report = load(path)
        kept = len(rows)
    except UserErrors as error:
        kept, report = 0, str(error)
        assert report.startswith(f"no usable {noun} in ")
    found = re.search(rf": (\d+) {noun} of (\d+) rows; skipped: (.*); cut: ", report, re.S)
    skipped = sum(int(n) for n in re.findall(r"(\d+) [A-Za-z ]+(?:, (?:keys: )?.*?)? \(first ", found[3], re.S))
    assert (int(found[1]), int(found[2])) == (kept, n_rows) and kept + skipped == n_rows, report
    return kept


@settings(max_examples=400, derandomize=True, deadline=None, database=None)
@given(rows=st.lists(ROW | ANYTHING, max_size=6))
def test_no_row_is_lost(rows, byte, folder):
    path = folder / "any.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    is_array = lambda row: isinstance(row, list) and any(isinstance(item, dict) for item in row)  # of rows
    n_rows = sum(len(row) if is_array(row) else 1 for row in rows)
    counts_add_up(lambda source: load_rows(train_pref, source, byte, *LIMITS), path, n_rows, "pairs")
    counts_add_up(lambda source: load_rows(train_sft, source, byte, *LIMITS), path, n_rows, "examples")


def test_the_property_sees_all_outcomes(byte, folder):
    """Rows such as the strategy makes are kept by both, and skipped by both."""
    path = folder / "both.jsonl"
    path.write_bytes(GOOD + b"\n{}\n" + GOOD + b"\n")
    assert counts_add_up(lambda source: load_rows(train_pref, source, byte, *LIMITS), path, 3, "pairs") == 2
    assert counts_add_up(lambda source: load_rows(train_sft, source, byte, *LIMITS), path, 3, "examples") == 2


@settings(max_examples=400, derandomize=True, deadline=None, database=None)
@given(lines=st.lists(st.binary(max_size=30) | ROW.map(lambda row: json.dumps(row).encode()), max_size=4))
def test_no_line_is_lost(lines, folder):
    """Whatever the bytes: every line that is not blank is a row, or the file is refused with its name and the line's number."""
    path = folder / "bytes.jsonl"
    path.write_bytes(b"\n".join(lines))
    expected = [number for number, line in enumerate(path.read_bytes().split(b"\n"), 1) if line.strip()]
    try:
        assert [where for where, _ in read_jsonl(path)] == [f"{path}:{number}" for number in expected]
    except UserErrors as error:
        assert re.match(rf"{re.escape(str(path))}:\d+: ", str(error))
