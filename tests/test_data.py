"""From files to batches: JSON lines, pairs and demonstrations, every kind of skipped row, packing, dealing, collating."""

import copy
import gzip
import itertools
import json
import math
import random
import re
import sys
import types

import pytest
import torch
from conftest import byte_tokenizer, load_rows

import train_pref
import train_sft
from plumbing.data import read_jsonl, read_rows
from train_pref import Pair, UserError, split_into_micro_batches, epoch_order
from train_sft import Example, pack

BOS, EOS = 256, 257
LIMITS = (259, 10**6, 10**5)  # vocab_size, max_length, max_prompt_length
CHAT = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}" \
       "{% if add_generation_prompt %}[assistant]{% endif %}"


@pytest.fixture(scope="module")
def byte(tmp_path_factory):
    """A tokenizer of one token a byte, <s> 256, </s> 257, with a chat template."""
    directory = tmp_path_factory.mktemp("byte")
    byte_tokenizer(directory)
    tokenizer = train_pref.load_tokenizer(directory)
    tokenizer.chat_template = CHAT
    return tokenizer


def write(path, *rows):
    """Rows, or lines as they are, to a JSON-lines file; -> its path as --data takes it."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_bytes("".join(line + "\n" for line in lines).encode())
    return str(path)


def load_pairs(source, *limits, held_out=False):
    """-> pairs, index, report."""
    pairs, report = load_rows(train_pref, source, *limits, held_out=held_out)
    return list(pairs), pairs.index, report


def load_examples(source, *limits):
    """-> examples, report."""
    examples, report = load_rows(train_sft, source, *limits)
    return list(examples), report


def texts(tokenizer, pair):
    return tuple(tokenizer.decode(ids) for ids in (pair.prompt, pair.chosen, pair.rejected))


def turns(*contents):
    return [dict(role=("user", "assistant")[k % 2], content=content) for k, content in enumerate(contents)]


# ------------------------------------------------------------------------------------------------------------- JSON lines
# Everything that str.splitlines takes for the end of a line, and JSON lets stand inside a string.
UNICODE_LINE_ENDS = "a\u2028b\u2029c\x85d"


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_read_jsonl(suffix, tmp_path):
    lines = ['{"a": "' + UNICODE_LINE_ENDS + '"}\n', "\n", "   \r\n", '{"a": "x\\r\\ny\\u000b"}\r\n', '[1, "a"]\n', "3\n",
             '{"a": {"b": null}}']
    path = tmp_path / f"data{suffix}"
    path.write_bytes(gzip.compress("".join(lines).encode()) if suffix.endswith("gz") else "".join(lines).encode())
    assert list(read_jsonl(path)) == [
        (f"{path}:1", {"a": UNICODE_LINE_ENDS}),
        (f"{path}:4", {"a": "x\r\ny\x0b"}),  # blank lines are passed over, and counted
        (f"{path}:5", {}),  # JSON, but no object: a row without any key
        (f"{path}:6", {}),
        (f"{path}:7", {"a": {"b": None}}),  # the last line has no end
    ]


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".json.gz"])
@pytest.mark.parametrize("text", [
    json.dumps, lambda rows: json.dumps(rows, indent=2) + "\n", lambda rows: json.dumps(rows, indent="\t").replace("\n", "\r\n"),
    lambda rows: "[" + ",\n".join(map(json.dumps, rows)) + "]"], ids=["one line", "pretty", "CRLF", "a row a line"])
def test_json_array(text, suffix, byte, tmp_path):
    rows = [dict(prompt="a [", chosen="b]", rejected="c"), dict(prompt="d", chosen=UNICODE_LINE_ENDS, rejected="f"), 3]
    path, content = tmp_path / f"data{suffix}", text(rows).encode()
    path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    pairs, index, report = load_pairs(path, byte, *LIMITS)
    assert [texts(byte, pair) for pair in pairs] == [("<s>a [", "b]</s>", "c</s>"),
                                                     ("<s>d", UNICODE_LINE_ENDS + "</s>", "f</s>")]
    assert index.tolist() == [0, 1] and report.startswith(f"{path}: 2 pairs of 3 rows; skipped: 1 no chosen and rejected")


def test_a_broken_json_array(byte, tmp_path):
    path = tmp_path / "data.json"
    for content in (json.dumps([dict(prompt="a", chosen="b", rejected="c")], indent=2)[:-4], '[{"prompt": "a"},', "[", "{\n}"):
        path.write_text(content)
        with pytest.raises(UserError, match="data.json:1: not JSON"):
            load_pairs(path, byte, *LIMITS)


@pytest.mark.parametrize("line", [b'{"a": 1', b"hello", b'{"a": 1}{"a": 2}', b'{"a": 1}\r{"a": 2}', b'{"a": "\xff"}', b"{'a': 1}"])
def test_a_line_that_is_not_json(line, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"a": 0}\n\n' + line + b'\n{"a": 3}\n')
    rows = read_jsonl(path)
    assert next(rows) == (f"{path}:1", {"a": 0})
    with pytest.raises(UserError, match=r"data\.jsonl:3: not JSON"):
        next(rows)


def test_broken_gzip(tmp_path):
    path = tmp_path / "data.jsonl.gz"
    good = gzip.compress("".join(json.dumps({"a": random.Random(k).random()}) + "\n" for k in range(500)).encode())
    damages = {"cut": good[:-200], "no checksum": good[:-6], "checksum": good[:-8] + bytes(4) + good[-4:],
               "header": b"\x00" + good[1:], "middle": good[:2000] + bytes(200) + good[2200:], "no gzip": b'{"a": 1}\n'}
    for name, content in damages.items():
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"data\.jsonl\.gz"):
            list(read_jsonl(path))
            pytest.fail(name)
    path.write_bytes(good)
    assert len(list(read_jsonl(path))) == 500


def test_missing_file(byte, tmp_path):
    for name in ("data.jsonl", "data.jsonl.gz"):
        with pytest.raises(UserError, match=rf"No such file.*{name}"):
            load_pairs(tmp_path / name, byte, *LIMITS)
    with pytest.raises(UserError, match="No such file.*b.jsonl"):  # the second of two pooled
        load_pairs(f"{write(tmp_path / 'a.jsonl', {})}+{tmp_path / 'b.jsonl'}", byte, *LIMITS)


def test_pooled_files(tmp_path):
    a, b = write(tmp_path / "a.jsonl", {"k": 1}, {"k": 2}), write(tmp_path / "b.jsonl", {"k": 3})
    assert list(read_rows(f"{a}+{b}+{a}", False, {})) == [
        (f"{a}:1", {"k": 1}), (f"{a}:2", {"k": 2}), (f"{b}:1", {"k": 3}), (f"{a}:1", {"k": 1}), (f"{a}:2", {"k": 2})]
    plus = write(tmp_path / "c+d.jsonl", {"k": 4})  # a file whose name has a plus is that file
    assert list(read_rows(plus, False, {})) == [(f"{plus}:1", {"k": 4})]


def test_hub_dataset(tmp_path, monkeypatch, byte):
    """Whatever `datasets` loads: here a directory, with the splits that a Hub dataset would have."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    directory = tmp_path / "hub"
    directory.mkdir()
    write(directory / "train.jsonl", *(dict(prompt=f"{k}?", chosen="yes", rejected="no", score=0.5) for k in range(3)))
    write(directory / "test.jsonl", dict(prompt="x", chosen="a", rejected="b"), dict(prompt="y", chosen="a", rejected="a"))
    where, rows = zip(*read_rows(str(directory), False, {}))
    assert where == tuple(f"{directory}[{k}]" for k in range(3)) and [row["prompt"] for row in rows] == ["0?", "1?", "2?"]
    pairs, index, report = load_pairs(directory, byte, *LIMITS, held_out=True)
    assert [texts(byte, pair) for pair in pairs] == [("<s>x", "a</s>", "b</s>")] and index.tolist() == [0]
    assert f"1 identical responses (first {directory}[1])" in report

    # A recipe is an id, two splits and the columns read; it pools with files.
    recipes = {"toy": (str(directory), "test", "train[:2]", ("prompt", "chosen"))}
    file = write(tmp_path / "a.jsonl", {"prompt": "file"})
    pooled = [row for _, row in read_rows(f"toy+{file}", True, recipes)]
    assert pooled == [dict(prompt="0?", chosen="yes"), dict(prompt="1?", chosen="yes"), dict(prompt="file")]
    assert [row["prompt"] for _, row in read_rows("toy", False, recipes)] == ["x", "y"]


TABLE = [dict(prompt="a", chosen="b", rejected="c"), dict(prompt="d", chosen="e", rejected="e")]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_tables(kind, byte, tmp_path, monkeypatch):
    """Through `datasets`, as it reads them."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / f"data.{kind}"
    getattr(datasets.Dataset.from_list(TABLE), f"to_{kind}")(path)
    pairs, index, report = load_pairs(path, byte, *LIMITS, held_out=True)  # a file has no splits
    assert [texts(byte, pair) for pair in pairs] == [("<s>a", "b</s>", "c</s>")] and index.tolist() == [0]
    assert report == f"{path}: 1 pairs of 2 rows; skipped: 1 identical responses (first {path}[1]); cut: none"


def test_how_datasets_is_asked(byte, tmp_path, monkeypatch):
    """A stand-in for the package: what it is asked for, where the package itself is not installed."""
    class Rows(list):
        def select_columns(self, names):
            return Rows({name: row[name] for name in names} for row in self)

    asked = []
    stub = types.ModuleType("datasets")
    stub.load_dataset = lambda *args, **kwargs: asked.append((args, kwargs)) or Rows(TABLE)
    monkeypatch.setitem(sys.modules, "datasets", stub)
    recipes = {"mine": ("me/mine", "train_prefs", "test_prefs[:9]", ("chosen", "rejected"))}
    sources = ["x.csv", str(tmp_path / "y.parquet"), "some/hub", "mine", "mine+x.csv"]
    found = [list(read_rows(source, held_out, recipes)) for source in sources for held_out in (False, True)]
    file = lambda name: ((name.split(".")[1],), dict(data_files=name, split="train"))
    assert asked == [file("x.csv")] * 2 + [(("parquet",), dict(data_files=sources[1], split="train"))] * 2 + [
        (("some/hub",), dict(split="train")), (("some/hub",), dict(split="test")),
        (("me/mine",), dict(split="train_prefs")), (("me/mine",), dict(split="test_prefs[:9]")),
        (("me/mine",), dict(split="train_prefs")), file("x.csv"), (("me/mine",), dict(split="test_prefs[:9]")), file("x.csv")]
    assert found[0] == [("x.csv[0]", TABLE[0]), ("x.csv[1]", TABLE[1])]
    assert found[6] == [(f"mine[{k}]", dict(chosen=row["chosen"], rejected=row["rejected"])) for k, row in enumerate(TABLE)]
    assert len(found[8]) == 4


def test_hub_refusals(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "datasets", None)  # importing it fails
        with pytest.raises(UserError, match="no-such/data.*pip install datasets"):
            list(read_rows("no-such/data", False, {}))
    pytest.importorskip("datasets")
    with pytest.raises(UserError, match="no-such/data: no JSON file or recipe"):  # HF_HUB_OFFLINE is set
        list(read_rows("no-such/data", False, {"tldr": None}))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: no JSON file or recipe"):
        list(read_rows(str(tmp_path / "empty"), False, {}))


# ------------------------------------------------------------------------------------------------------------------ pairs
def test_pairs(byte, tmp_path):
    source = write(tmp_path / "pairs.jsonl",
                   dict(prompt="Q: 1+1?", chosen=" 2", rejected=" three", note="unread"),
                   dict(chosen="\n\nHuman: Hi\n\nAssistant: Hey", rejected="\n\nHuman: Hi\n\nAssistant: Ha!"),
                   dict(chosen="\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: same start d",
                        rejected="\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: same start e"),
                   dict(prompt=turns("Hi"), chosen=turns("", "Hello")[1:], rejected=turns("", "Go away")[1:]),
                   dict(chosen=turns("Hi", "Hello", "Who?", "Me"), rejected=turns("Hi", "Hello", "Who?", "You")),
                   dict(prompt="Hi", chosen=turns("Hi", "A"), rejected=turns("Hi", "B")),  # the prompt as text, too
                   dict(prompt=f"é{UNICODE_LINE_ENDS}", chosen="\U0001f600", rejected="</s>x"))
    pairs, index, report = load_pairs(source, byte, *LIMITS)
    assert [texts(byte, pair) for pair in pairs] == [
        ("<s>Q: 1+1?", " 2</s>", " three</s>"),
        ("<s>\n\nHuman: Hi\n\nAssistant:", " Hey</s>", " Ha!</s>"),
        ("<s>\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", " same start d</s>", " same start e</s>"),
        ("[user]Hi[assistant]", "Hello</s>", "Go away</s>"),  # the template writes no BOS
        ("[user]Hi[assistant]Hello</s>[user]Who?[assistant]", "Me</s>", "You</s>"),
        ("[user]Hi[assistant]", "A</s>", "B</s>"),
        (f"<s>é{UNICODE_LINE_ENDS}", "\U0001f600</s>", "</s>x</s>"),
    ]
    assert index.tolist() == list(range(7)) and index.dtype == torch.int64
    assert report == f"{source}: 7 pairs of 7 rows; skipped: none; cut: none; columns not read: note"
    for pair in pairs:
        assert pair.chosen[-1] == pair.rejected[-1] == EOS and pair.chosen.count(EOS) == 1


GOOD = dict(prompt="p", chosen="good", rejected="bad")
SHAREGPT = ("ShareGPT row: rename conversations to messages (of pairs: to prompt, chosen and rejected being lists), its from to role"
            " with human as user and gpt as assistant, its value to content")
SKIPPED = {
    "no chosen and rejected, keys: []": ["[1, 2]", '"text"', "null", "3", {}],
    "no chosen and rejected, keys: ['question', 'answer']": [dict(question="q", answer="a")],
    "no chosen and rejected, keys: ['prompt', 'chosen']": [dict(prompt="p", chosen="a"), dict(prompt="p", chosen=turns("a"))],
    "no prompt, keys: ['question', 'chosen', 'rejected']": [dict(question="q", chosen="a", rejected="b")],
    "no prompt, keys: ['chosen', 'rejected']": [dict(chosen="no marker", rejected="no mark"),
                                                dict(prompt=None, chosen="a", rejected="b")],
    "wrong types, prompt is str, chosen is int, rejected is str": [dict(prompt="p", chosen=1, rejected="b")],
    "wrong types, prompt is str, chosen is NoneType, rejected is str": [dict(prompt="p", chosen=None, rejected="b")],
    "wrong types, prompt is int, chosen is str, rejected is str": [dict(prompt=3, chosen="a", rejected="b")],
    "wrong types, prompt is str, chosen is NoneType, rejected is NoneType": [dict(prompt="p", chosen=None, rejected=None)],
    "wrong types, prompt is str, chosen is str, rejected is list": [dict(prompt="p", chosen="a", rejected=turns("a", "b"))],
    "wrong types, prompt is list, chosen is str, rejected is str": [dict(prompt=turns("p"), chosen="a", rejected="b")],
    "wrong types, a message is int": [dict(chosen=[1, "x"], rejected=[1, "y"])],
    "wrong types, a message's role is NoneType": [dict(prompt=turns("p"), chosen=[dict(content="x")], rejected=turns("a"))],
    "wrong types, a message's content is NoneType": [
        dict(chosen=turns("p") + [dict(role="assistant", content=None)], rejected=turns("p", "x"))],
    "wrong types, a part of a message's content is image_url": [
        dict(prompt=turns([dict(type="text", text="see"), dict(type="image_url", image_url="x")]), chosen=turns("a", "b")[1:],
             rejected=turns("a", "c")[1:])],
    "wrong types, chosen_logps is str": [GOOD | dict(chosen_logps="-1.5")],
    "rejected_logps positive or not finite": [GOOD | dict(rejected_logps=value) for value in (0.5, math.nan, -math.inf, -1e39, -10**400)],
    SHAREGPT: [dict(conversations=[{"from": "human", "value": "a"}], chosen={"from": "gpt", "value": "b"}),
               dict(conversations=[{"from": "human", "value": "a"}], chosen={"from": "gpt", "value": "b"}, rejected={"from": "gpt", "value": "c"}),
               dict(prompt=[{"from": "human", "value": "a"}], chosen=[{"from": "gpt", "value": "b"}], rejected=turns("a", "c"))],
    "prompt mismatch": [dict(chosen="\n\nHuman: a\n\nAssistant: x", rejected="\n\nHuman: b\n\nAssistant: y"),
                        dict(chosen="\n\nHuman: a\n\nAssistant: x\n\nHuman: c\n\nAssistant: z",
                             rejected="\n\nHuman: a\n\nAssistant: y"),
                        dict(chosen=turns("a", "x"), rejected=turns("b", "x")),
                        dict(chosen=turns("a", "x", "y"), rejected=turns("a", "x", "z")),  # they end with the user
                        dict(prompt=turns("a"), chosen=turns("a", "x"), rejected=turns("a", "y"))],  # the prompt twice
    "empty response": [dict(prompt="p", chosen="", rejected="b"), dict(prompt="p", chosen="a", rejected=" \n\t"),
                       dict(chosen="\n\nHuman: a\n\nAssistant: x", rejected="\n\nHuman: a\n\nAssistant:"),
                       dict(prompt="p", chosen="</s>", rejected="b"),  # nothing but EOS
                       dict(chosen=turns("a", " "), rejected=turns("a", "x"))],
    "identical responses": [dict(prompt="p", chosen="a", rejected="a"),
                            dict(chosen="\n\nHuman: a\n\nAssistant: x", rejected="\n\nHuman: a\n\nAssistant: x"),
                            dict(prompt=turns("a"), chosen=turns("", "x")[1:], rejected=turns("", "x")[1:])],
    "refused by the chat template (division by zero)": [dict(chosen=turns("BOOM", "x"), rejected=turns("BOOM", "y"))],
    "chat template does not continue the prompt": [dict(chosen=turns("STRANGE", "x"), rejected=turns("STRANGE", "y"))],
}


@pytest.mark.parametrize("kind", SKIPPED)
def test_skipped_rows(kind, byte, tmp_path, monkeypatch):
    strange = "{% if messages[0].content == 'BOOM' %}{{ 1 / 0 }}{% endif %}" \
              "{% if add_generation_prompt and messages[0].content == 'STRANGE' %}!{% endif %}"
    monkeypatch.setattr(byte, "chat_template", strange + CHAT)
    rows = SKIPPED[kind]
    for row in rows:  # each alone, between two good ones and after a blank line
        source = write(tmp_path / "one.jsonl", GOOD, "", row, GOOD)
        pairs, index, report = load_pairs(source, byte, *LIMITS)
        assert report == f"{source}: 2 pairs of 3 rows; skipped: 1 {kind} (first {source}:3); cut: none", row
        assert index.tolist() == [0, 2] and len(pairs) == 2  # rows are numbered, not lines
    source = write(tmp_path / "all.jsonl", GOOD, *rows)
    report = load_pairs(source, byte, *LIMITS)[2]
    assert f"1 pairs of {len(rows) + 1} rows; skipped: {len(rows)} {kind} (first {source}:2)" in report
    source = write(tmp_path / "none.jsonl", *rows)
    with pytest.raises(UserError, match=f"no usable pairs in .*none.jsonl.*{len(rows)} {re.escape(kind)}"):
        load_pairs(source, byte, *LIMITS)


def test_several_kinds_at_once(byte, tmp_path):
    kinds = ["empty response", "prompt mismatch", "identical responses"]
    source = write(tmp_path / "all.jsonl", *(SKIPPED[kind][k] for k in range(3) for kind in kinds), GOOD)
    pairs, index, report = load_pairs(source, byte, *LIMITS)
    assert index.tolist() == [9] and len(pairs) == 1
    skipped = ", ".join(f"3 {kind} (first {source}:{k})" for k, kind in enumerate(kinds, 1))
    assert report == f"{source}: 1 pairs of 10 rows; skipped: {skipped}; cut: none"


def test_identical_conversations(byte, tmp_path):
    source = write(tmp_path / "pairs.jsonl", GOOD, dict(chosen=turns("a", "x"), rejected=turns("a", "x")))
    assert "1 identical responses" in load_pairs(source, byte, *LIMITS)[2]


def test_broken_unicode(byte, tmp_path):
    """JSON can hold half of a surrogate pair, which is no text: "\\ud83d". One such row is skipped."""
    source = write(tmp_path / "pairs.jsonl", GOOD, dict(prompt="p", chosen="\ud83d", rejected="b"))
    assert f"(first {source}:2)" in load_pairs(source, byte, *LIMITS)[2]


def test_cut_pairs(byte, tmp_path):
    rows = [dict(prompt="0123456", chosen="abc", rejected="xyz"),  # 8 + 4: fits
            dict(prompt="0123456789", chosen="abcdef", rejected="x"),
            dict(prompt="0123456789", chosen="abcdef", rejected="abcdefg"),  # differ past the cut only
            dict(prompt="01", chosen="abcdefgh", rejected="abcdefghijk")]
    source = write(tmp_path / "pairs.jsonl", *rows)
    load = lambda max_length=12: load_pairs(source, byte, 259, max_length, 8)
    pairs, index, report = load()
    assert [texts(byte, pair) for pair in pairs] == [("<s>0123456", "abc</s>", "xyz</s>"), ("<s>3456789", "abcd", "x</s>"),
                                                     ("<s>01", "abcdefgh</s>", "abcdefghi")]
    assert index.tolist() == [0, 1, 3]
    assert report.endswith(f"3 pairs of 4 rows; skipped: 1 identical once cut (first {source}:3);"
                           f" cut: 1 prompt (first {source}:2), 2 response (first {source}:2)")  # of rows that are kept
    with pytest.raises(UserError, match="3 no room for a response"):  # after a prompt of 8
        load(max_length=8)
    for pair in pairs:
        assert len(pair.prompt) <= 8 and len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) <= 12


def test_vocabulary_too_small(byte, tmp_path):
    source = write(tmp_path / "pairs.jsonl", GOOD)
    with pytest.raises(UserError, match="257.*vocabulary of 257"):
        load_pairs(source, byte, 257, *LIMITS[1:])


@pytest.mark.parametrize(("name", "kept", "rows", "skipped"), [
    ("hh_harmless_test", 2303, 2312, {"empty response": 4, "prompt mismatch": 5}), ("tldr_pref", 1000, 1000, {})])
def test_real_pairs(name, kept, rows, skipped, shared, stories):
    source = shared / "data" / f"{name}.jsonl.gz"
    tokenizer = train_pref.load_tokenizer(stories)
    pairs, index, report = load_pairs(source, tokenizer, 512, *LIMITS[1:])
    assert len(pairs) == len(index) == kept and f": {kept} pairs of {rows} rows; " in report and report.endswith("cut: none")
    for kind, n in skipped.items():
        assert f"{n} {kind} (first {source}:" in report
    if not skipped:
        assert "skipped: none" in report
    with gzip.open(source, "rt", encoding="utf-8", newline="\n") as file:
        data = [json.loads(line) for line in file]
    for pair, number in list(zip(pairs, index.tolist()))[::100]:  # the rows that the index says, put together again
        row = data[number]
        for response, key in ((pair.chosen, "chosen"), (pair.rejected, "rejected")):
            whole = tokenizer.decode(pair.prompt + response, skip_special_tokens=True)
            assert whole == row.get("prompt", "") + row[key]


# ---------------------------------------------------------------------------------------------------------- demonstrations
def example_text(tokenizer, example):
    """What is given, what is learned."""
    return tokenizer.decode(example.prompt), tokenizer.decode(example.completion)


def test_examples(byte, tmp_path):
    source = write(tmp_path / "sft.jsonl",
                   dict(prompt="Q", completion=" A"),
                   dict(text="Once upon"),
                   dict(text="<s>Twice"),  # BOS is there already
                   dict(prompt="Q", chosen=" good", rejected=" bad"),
                   dict(chosen="\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d", rejected="..."),
                   dict(messages=turns("Hi", "Hello", "Who?", "Me")),
                   dict(prompt=turns("Hi"), completion=turns("", "Hello")[1:]),
                   dict(prompt=turns("Hi"), chosen=turns("", "Hello")[1:], rejected=turns("", "No")[1:]),
                   dict(prompt="", completion="A"))
    examples, report = load_examples(source, byte, *LIMITS)
    assert [example_text(byte, example) for example in examples] == [
        ("<s>Q", " A</s>"),
        ("<s>", "Once upon</s>"),
        ("<s>", "Twice</s>"),
        ("<s>Q", " good</s>"),
        ("<s>\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", " d</s>"),
        ("[user]Hi[assistant]Hello</s>[user]Who?[assistant]", "Me</s>"),  # the template writes no BOS
        ("[user]Hi[assistant]", "Hello</s>"),
        ("[user]Hi[assistant]", "Hello</s>"),
        ("<s>", "A</s>"),
    ]
    assert report == f"{source}: 9 examples of 9 rows; skipped: none; cut: none; columns not read: rejected"


def test_text_without_bos(tmp_path):
    """Without BOS a text's first token is given, as nothing predicts it (see test_collate_examples)."""
    byte_tokenizer(tmp_path, bos_token=None)
    tokenizer = train_pref.load_tokenizer(tmp_path)
    source = write(tmp_path / "sft.jsonl", dict(text="abc"), dict(prompt="p", completion="c"), dict(prompt="", completion="c"))
    examples, report = load_examples(source, tokenizer, *LIMITS)
    assert [example_text(tokenizer, example) for example in examples] == [("", "abc</s>"), ("p", "c</s>")]
    assert f"1 empty prompt (first {source}:3)" in report


@pytest.mark.parametrize(("kind", "row"), [
    ("wrong types, text is int", dict(text=3)),
    ("no prompt and completion, keys: ['prompt']", dict(prompt="p", completion=None)),  # null is as good as absent
    ("wrong types, prompt is int, completion is str", dict(prompt=3, completion="c")),
    ("wrong types, prompt is str, completion is int", dict(prompt="p", completion=3)),
    ("wrong types, prompt is list, completion is str", dict(prompt=turns("a"), completion="c")),
    ("wrong types, messages is dict", dict(messages=dict(role="user"))),
    (SHAREGPT, dict(conversations=[{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}])),
    ("no prompt and completion, keys: ['completion']", dict(completion="c")),
    ("no prompt and completion, keys: ['chosen']", dict(chosen="no marker")),
    ("no prompt and completion, keys: []", {}), ("no prompt and completion, keys: []", "[1]"),
    ("no prompt and completion, keys: ['question', 'completion']", dict(question="q", completion="c")),
    ("no prompt and completion, keys: ['prompt', 'answer']", dict(prompt="p", answer="a")),
    ("no prompt and completion, keys: ['instruction', 'output']", dict(instruction="i", output="o")),
    ("empty completion", dict(text="")), ("empty completion", dict(prompt="p", completion=" \n")),
    ("empty completion", dict(chosen="\n\nHuman: a\n\nAssistant: ")),
    ("prompt mismatch", dict(messages=turns("Hi"))), ("prompt mismatch", dict(messages=turns("Hi", "Hello", "Bye"))),
    ("prompt mismatch", dict(messages=[])), ("wrong types, a message is str", dict(messages=["Hi", "Hello"])),
    ("response of weight 0", dict(messages=[*turns("Hi"), dict(role="assistant", content="Hello", weight=0)])),
    ("empty response", dict(messages=turns("Hi", " "))), ("empty response", dict(prompt="p", completion="</s>")),
])
def test_skipped_demonstrations(kind, row, byte, tmp_path):
    source = write(tmp_path / "sft.jsonl", dict(text="good"), "", row)
    examples, report = load_examples(source, byte, *LIMITS)
    assert report == f"{source}: 1 examples of 2 rows; skipped: 1 {kind} (first {source}:3); cut: none" and len(examples) == 1


def test_preference_rows_with_implicit_conversation(byte, tmp_path):
    source = write(tmp_path / "sft.jsonl", dict(chosen=turns("Hi", "Hello"), rejected=turns("Hi", "No")),
                   dict(prompt="Hi", chosen=turns("Hi", "Hello"), rejected=turns("Hi", "No")))
    examples, _ = load_examples(source, byte, *LIMITS)
    assert [example_text(byte, example) for example in examples] == [("[user]Hi[assistant]", "Hello</s>")] * 2


def test_cut_demonstrations(byte, tmp_path):
    rows = [dict(prompt="0123456789", completion="abcdef"), dict(text="abcdefghijklmnop"), dict(text="abcdefghijk")]
    source = write(tmp_path / "sft.jsonl", *rows)
    examples, report = load_examples(source, byte, 259, 12, 8)
    assert [example_text(byte, example) for example in examples] == [("<s>3456789", "abcd"), *[("<s>", "abcdefghijk")] * 2]
    assert report.endswith(f"skipped: none; cut: 1 prompt (first {source}:1), 3 response (first {source}:1)")


# ------------------------------------------------------------------------------------------------- order, packing, dealing
def test_epoch_order():
    for n, seed, epoch in itertools.product((1, 2, 7, 100), (0, 1), (0, 1, 2)):
        order = epoch_order(n, seed, epoch)
        random.seed(n)  # nothing outside its arguments matters
        torch.manual_seed(n)
        assert epoch_order(n, seed, epoch) == order and sorted(order) == list(range(n))
    orders = {tuple(epoch_order(100, seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25
    assert epoch_order(10, 0, 0) == [1, 0, 2, 4, 9, 3, 8, 6, 7, 5]  # on every machine: a run goes on elsewhere
    assert epoch_order(10, 7, 3) == [1, 9, 7, 3, 5, 4, 2, 6, 8, 0]


def test_pack():
    rng = random.Random(0)
    for n, capacity in itertools.product((1, 2, 3, 10, 60), (1, 5, 32)):
        for _ in range(5):
            lengths = [rng.randint(1, capacity) for _ in range(n)]
            rows = pack(lengths, capacity)
            assert sorted(i for row in rows for i in row) == list(range(n))
            loads = [sum(lengths[i] for i in row) for row in rows]
            assert all(rows) and max(loads) <= capacity
            # First fit leaves no two rows that would fit in one, so fewer than twice the least possible number.
            assert all(a + b > capacity for a, b in itertools.combinations(loads, 2))
            assert rows == pack(lengths, capacity)
    assert pack([3, 5, 2, 7, 4], 8) == [[3], [1, 0], [4, 2]]
    assert pack([4, 4, 4, 4], 8) == [[0, 1], [2, 3]]


def test_deal():
    rng = random.Random(0)
    for n, micro_batch_size, world in itertools.product((*range(1, 20), 64), (1, 2, 3, 8), (1, 2, 3, 4, 7)):
        lengths = [rng.randint(1, 50) for _ in range(n)]
        rounds = split_into_micro_batches(lengths, micro_batch_size, world)
        assert rounds == split_into_micro_batches(lengths, micro_batch_size, world)
        assert len(rounds) == math.ceil(n / (micro_batch_size * world))  # no more forwards than needed
        assert all(len(ranks) == world for ranks in rounds)  # every rank takes part in every round
        groups = [group for ranks in rounds for group in ranks]
        assert sorted(i for group in groups for i in group) == list(range(n))  # everything exactly once
        assert max(map(len, groups)) <= micro_batch_size
        assert max(map(len, groups)) - min(map(len, groups)) <= 1  # no rank idles while another has two more
        dealt = [lengths[i] for group in groups for i in group]
        assert dealt == sorted(lengths, reverse=True)  # neighbours in length together


# ------------------------------------------------------------------------------------------------------------------ collate
def seen(batch, b, t):
    """The tokens that position t of row b sees, itself included, by the rule of LlamaModel.forward, in order of position."""
    segments = batch["segments"][b].tolist()
    keys = [k for k in range(t + 1) if segments[k] == segments[t] or (segments[k] == 0 and segments[t] > 0)]
    positions = batch["positions"][b, keys].tolist()
    assert positions == list(range(len(keys)))  # a text's tokens stand at 0, 1, 2, ..: what rotary embedding needs
    return batch["ids"][b, keys].tolist()


def check_batch(batch, sequences):
    """`sequences` (context, targets): target i of each is predicted from exactly context + targets[:i], read off the masks."""
    B, T = batch["ids"].shape
    assert all(batch[name].shape == (B, T) for name in ("positions", "segments"))
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    assert batch["cu_seqlens"].tolist() == [0, *itertools.accumulate(len(targets) for _, targets in sequences)]
    assert batch["targets"].tolist() == [token for _, targets in sequences for token in targets]
    contexts = [[*context, *targets[:i]] for context, targets in sequences for i in range(len(targets))]
    assert len(batch["predict"]) == len(contexts)
    for index, context in zip(batch["predict"].tolist(), contexts):
        assert seen(batch, *divmod(index, T)) == context
        assert batch["segments"].flatten()[index] >= 0
    assert (batch["segments"][:, -1] >= 0).any()  # no column of padding alone


def random_pair(rng, longest=9):
    return Pair(*([rng.randrange(1, 256) for _ in range(rng.randint(1, longest))] for _ in range(3)))


@pytest.mark.parametrize("shared_prompt", [True, False])
def test_collate_pairs(shared_prompt):
    rng = random.Random(0)
    for n in (1, 2, 5, 8):
        pairs = [random_pair(rng) for _ in range(n)]
        before = copy.deepcopy(pairs)
        batch = train_pref.collate_pairs(pairs, shared_prompt, torch.device("cpu"))
        check_batch(batch, [(pair.prompt, response) for pair in pairs for response in (pair.chosen, pair.rejected)])
        rows = [[*p.prompt, *p.chosen, *p.rejected] for p in pairs] if shared_prompt else [
            [*p.prompt, *r] for p in pairs for r in (p.chosen, p.rejected)]
        T = max(map(len, rows))
        assert batch["ids"].tolist() == [row + [0] * (T - len(row)) for row in rows]  # the prompt once, or twice
        assert (batch["segments"] >= 0).tolist() == [[t < len(row) for t in range(T)] for row in rows]
        assert pairs == before


def test_collate_pairs_by_hand(monkeypatch):
    pairs = [Pair([1, 2], [3, 4], [5]), Pair([6], [7], [8])]
    batch = train_pref.collate_pairs(pairs, True, torch.device("cpu"))
    assert {name: tensor.tolist() for name, tensor in batch.items()} == dict(
        ids=[[1, 2, 3, 4, 5], [6, 7, 8, 0, 0]], positions=[[0, 1, 2, 3, 2], [0, 1, 1, 0, 0]],
        segments=[[0, 0, 1, 1, 2], [0, 1, 2, -1, -1]], predict=[1, 2, 1, 5, 5], targets=[3, 4, 5, 7, 8], cu_seqlens=[0, 2, 3, 4, 5])
    batch = train_pref.collate_pairs(pairs[:1], False, torch.device("cpu"))
    assert {name: tensor.tolist() for name, tensor in batch.items()} == dict(
        ids=[[1, 2, 3, 4], [1, 2, 5, 0]], positions=[[0, 1, 2, 3], [0, 1, 2, 0]], segments=[[0, 0, 1, 1], [0, 0, 2, -1]],
        predict=[1, 2, 5], targets=[3, 4, 5], cu_seqlens=[0, 2, 3])
    for few, expected in ((1, [1, 2]), (2, [0, 2]), (3, [0, 0])):  # columns that are prompt in every row, if they are that many
        monkeypatch.setattr(train_pref, "PLAIN_PROMPT", few)
        for some, columns in zip((pairs, pairs[:1]), expected):
            batch = train_pref.collate_pairs(some, True, "cpu")
            assert batch["ids"].shape[1] - batch["segments"].shape[1] == columns  # segments are of the columns after them


def test_collate_examples():
    rng = random.Random(0)
    for _ in range(20):
        examples = []
        for _ in range(rng.randint(1, 12)):
            ids = [rng.randrange(1, 256) for _ in range(rng.randint(2, 12))]
            first = rng.randint(0, len(ids) - 1)
            examples.append(Example(ids[:first], ids[first:]))
        length = lambda example: len(example.prompt) + len(example.completion)
        rows = [[examples[i] for i in row] for row in pack([*map(length, examples)], 16)]
        batch = train_sft.collate_examples(rows, torch.device("cpu"))
        given = [example if example.prompt else (example.completion[:1], example.completion[1:]) for row in rows for example in row]
        check_batch(batch, given)  # of a text without prompt the first token is not predicted
        assert batch["ids"].shape == (len(rows), max(sum(map(length, row)) for row in rows))
        assert (batch["segments"] >= 0).sum(1).tolist() == [sum(map(length, row)) for row in rows]
