"""Tokenization: Llama 3's ids against Meta's own tokenizer, AutoTokenizer's ids, BOS and EOS, cuts, chat templates."""

import base64
import copy
import datetime
import gzip
import json
import math
import random
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, llama2_tokenizer, mistral_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

import train_pref
from plumbing.data import (RowCounts, RowTexts, SkipRow, UserError, assistant_stop_id, encode, encode_after, ensure_stop,
                           finish_prompt, load_tokenizer, render_chat, stop_ids, text_begin, tokenize_rows)

# Text and its ids in Llama 3's vocabulary. Non-ASCII is escaped, so that no editor can normalize it.
LLAMA3_IDS = [
    ('',
     []),
    ('Hello, world!',
     [9906, 11, 1917, 0]),
    ('na\xefve caf\xe9',
     [3458, 38672, 588, 53050]),
    ('cafe\u0301 A\u030a\u0323',
     [936, 1897, 54939, 362, 136, 232, 105001]),
    ('\U0001f600 \U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1eb\U0001f1f7',
     [76460, 222, 62904, 102, 102470, 9468, 239, 102, 102470, 9468, 239, 100, 11410, 229, 104, 9468, 229, 115]),
    ('1 12 123 1234 12345 123456 1234567',
     [16, 220, 717, 220, 4513, 220, 4513, 19, 220, 4513, 1774, 220, 4513, 10961, 220, 4513, 10961, 22]),
    ('3.14159 x\xb2 \u0664\u0662',
     [18, 13, 9335, 2946, 865, 30556, 220, 124079, 110546]),
    ('a  b   c    d',
     [64, 220, 293, 256, 272, 262, 294]),
    ('  leading and trailing   ',
     [220, 6522, 323, 28848, 262]),
    ('one\ntwo\n\n\nthree\r\n  four \n',
     [606, 198, 20375, 1432, 28956, 319, 220, 3116, 720]),
    ('\tif x:\n\t\treturn\t0',
     [748, 865, 512, 197, 862, 197, 15]),
    ("I'm can't WE'LL it's they'd you've 'tis",
     [40, 2846, 649, 956, 20255, 6, 4178, 433, 596, 814, 4265, 499, 3077, 364, 83, 285]),
    ('aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa',
     [70540, 70540, 70540, 70540, 70540, 70540, 5418]),
    ('\u6211\u559c\u6b22\u673a\u5668\u5b66\u4e60\u3002',
     [37046, 114765, 33748, 32648, 111478, 1811]),
    ('\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645',
     [101244, 30925, 103645, 100700, 24102, 101952]),
    ('\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35\u0e0a\u0e32\u0e27\u0e42\u0e25\u0e01',
     [106123, 119657, 111289, 100707, 107972]),
    ('\xa0\u2003\u3000x\u200b\u2028y\x85z\x00\x1b',
     [4194, 116503, 23249, 87, 16067, 378, 101, 88, 116360, 89, 188, 215]),
    ('def f(x):\n    return {k: v**2 for k, v in x.items()}  # \u2190 squares\n',
     [755, 282, 2120, 997, 262, 471, 314, 74, 25, 348, 334, 17, 369, 597, 11, 348, 304, 865, 9812, 22533, 220, 674, 48564, 32440, 198]),
    ('$$$ ... !!!??? -->',
     [75673, 2564, 33970, 34115, 3929]),
    ('<|not_special|> <|begin_of_text',
     [27, 91, 1962, 42729, 91, 29, 83739, 7413, 3659, 4424]),
]
SPECIAL_TEXT = "Hi <|eot_id|>\n<|begin_of_text|>"
SPECIAL_PARSED = [13347, 220, 128009, 198, 128000]
SPECIAL_PLAIN = [13347, 83739, 68, 354, 851, 91, 397, 27, 91, 7413, 3659, 4424, 91, 29]


# ---------------------------------------------------------------------------------------------------------------- Llama 3
@pytest.fixture(scope="module")
def meta():
    """Meta's own tokenizer, with its tokenizer.model."""
    module = pytest.importorskip("llama_models.llama3.tokenizer", reason="package llama-models is not installed")
    return module.Tokenizer.get_instance()


@pytest.fixture(scope="module")
def llama3(meta, tmp_path_factory):
    """load_tokenizer of a directory that holds tokenizer.model and nothing else."""
    from llama_models.llama3 import tokenizer as module

    directory = tmp_path_factory.mktemp("llama3")
    (directory / "tokenizer.model").symlink_to(module.__file__.replace("tokenizer.py", "tokenizer.model"))
    return load_tokenizer(directory)


@pytest.mark.parametrize(("text", "ids"), LLAMA3_IDS, ids=[ascii(text)[1:-1][:20] or "empty" for text, _ in LLAMA3_IDS])
def test_llama3_ids(text, ids, llama3, meta):
    assert meta.encode(text, bos=False, eos=False) == ids
    assert encode(llama3, [text])[0] == ids
    assert llama3.decode(ids) == text  # and back, spaces before punctuation included


def test_llama3_special_tokens(llama3, meta):
    assert len(llama3) == meta.n_words == 128256
    assert (llama3.bos_token_id, llama3.eos_token_id) == (meta.bos_id, meta.eos_id) == (128000, 128001)
    assert len(meta.special_tokens) == 256
    for name, number in meta.special_tokens.items():
        assert encode(llama3, [name, f"a{name}b"]) == [[number], [64, number, 65]]
        assert llama3.decode([number], skip_special_tokens=True) == ""


def test_llama3_special_text(llama3, meta):
    """As everywhere in transformers the text of a special token is that token, unless split_special_tokens is set."""
    assert meta.encode(SPECIAL_TEXT, bos=False, eos=False, allowed_special="all") == SPECIAL_PARSED
    assert encode(llama3, [SPECIAL_TEXT])[0] == SPECIAL_PARSED
    assert meta.encode(SPECIAL_TEXT, bos=False, eos=False) == SPECIAL_PLAIN
    assert llama3(SPECIAL_TEXT, add_special_tokens=False, split_special_tokens=True).input_ids == SPECIAL_PLAIN


def posts(shared, n):
    path = shared / "data" / "tldr_pref.jsonl.gz"
    if not path.exists():
        pytest.skip("no tldr_pref.jsonl.gz")
    with gzip.open(path, "rt", encoding="utf-8", newline="\n") as file:
        return [text for _, line in zip(range(n), file) for text in json.loads(line).values()]


def test_llama3_corpus(llama3, meta, shared):
    texts = posts(shared, 100)
    assert sum(map(len, texts)) > 100_000
    for text, ids in zip(texts, encode(llama3, texts), strict=True):
        assert ids == meta.encode(text, bos=False, eos=False)


def test_llama3_save_and_reload(llama3, tmp_path):
    llama3.save_pretrained(tmp_path)
    for again in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)):
        assert (again.bos_token_id, again.eos_token_id, len(again)) == (128000, 128001, 128256)
        texts, ids = zip(*LLAMA3_IDS, (SPECIAL_TEXT, SPECIAL_PARSED))
        assert again(list(texts), add_special_tokens=False).input_ids == list(ids)
        assert [again.decode(row) for row in ids] == list(texts)


# ----------------------------------------------------------------------------------------------------- loading and refusals
@pytest.mark.parametrize("name", ["stories", "smollm"])
def test_auto_tokenizer(name, request, shared):
    directory = request.getfixturevalue(name)
    tokenizer, auto = load_tokenizer(directory), AutoTokenizer.from_pretrained(directory)
    texts = [text for text, _ in LLAMA3_IDS] + posts(shared, 400)
    assert len(texts) > 1000  # encode works through a thousand at a time
    found = encode(tokenizer, texts)
    assert found == [auto(text, add_special_tokens=False).input_ids for text in texts]


def test_encode_adds_nothing(tmp_path):
    """Some tokenizers write BOS, or were saved with truncation or padding switched on: encode gives the bare ids."""
    tokenizer = byte_tokenizer(tmp_path)
    backend = tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 256), ("</s>", 257)])
    backend.enable_truncation(2)
    backend.enable_padding(pad_id=258, pad_token="<pad>")
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer("ab").input_ids == [256, 64, 65, 257]
    assert encode(tokenizer, ["abcde", "", "b"]) == [[64, 65, 66, 67, 68], [], [65]]
    assert encode(tokenizer, []) == []


def test_a_tokenizer_of_another_model(tmp_path):
    """EOS, or the BOS that it writes, is none of the model's: no row could be used."""
    byte_tokenizer(tmp_path)  # BOS is 256, EOS 257
    assert tokens(load_tokenizer(tmp_path), "p", "abc", vocab_size=258)[1][-1] == 257
    with pytest.raises(UserError, match="257.*vocabulary of 257"):
        tokens(load_tokenizer(tmp_path), "p", "abc", vocab_size=257)
    byte_tokenizer(tmp_path, eos_token="a")  # EOS is 64
    with pytest.raises(UserError, match="256.*vocabulary of 256"):
        tokens(load_tokenizer(tmp_path), "p", "abc", vocab_size=256)


def test_a_row_that_spells_a_token_that_the_model_lacks(tmp_path):
    """A tokenizer may know more than its model (Llama 3's <|image|>): such a row is skipped, the others are not."""
    byte_tokenizer(tmp_path, pad_token="<|image|>")  # 258
    tokenizer = load_tokenizer(tmp_path)
    for texts in (("see <|image|>", "abc"), ("p", "a<|image|>c")):
        assert tokens(tokenizer, *texts, vocab_size=258) == "token outside the vocabulary of 258"
        assert len(tokens(tokenizer, *texts, vocab_size=259)) == 2


def test_refused_tokenizers(tmp_path):
    with pytest.raises(UserError, match="no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="no tokenizer"):
        load_tokenizer(tmp_path)
    byte_tokenizer(tmp_path / "no_eos", eos_token=None)
    with pytest.raises(UserError, match="no_eos.*no EOS"):
        load_tokenizer(tmp_path / "no_eos")
    cut = byte_tokenizer(tmp_path / "cut") and tmp_path / "cut" / "tokenizer.json"
    cut.write_text(cut.read_text()[:500])
    with pytest.raises(UserError, match="cut: no tokenizer"):
        load_tokenizer(tmp_path / "cut")


# The first bytes of a SentencePiece model: Llama 2's tokenizer.model has the same name as Llama 3's.
SENTENCEPIECE = b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02\n\x0c\n\x03<s>\x15\x00\x00\x00\x00\x18\x03"


def test_a_tokenizer_of_two_formats(tmp_path):
    """Mistral's repositories hold tekken.json too, which transformers prefers where mistral-common is installed."""
    package = pytest.importorskip("mistral_common", reason="package mistral_common is not installed")
    byte_tokenizer(tmp_path, chat_template="{{ messages[0].content }}")
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
    (tmp_path / "tekken.json").symlink_to(Path(package.__file__).parent / "data" / "tekken_240718.json")
    assert type(AutoTokenizer.from_pretrained(tmp_path)).__name__ == "MistralCommonBackend"
    tokenizer = load_tokenizer(tmp_path)
    assert encode(tokenizer, ["ab"]) == [[64, 65]] and tokenizer.chat_template == "{{ messages[0].content }}"
    tokenizer.save_pretrained(tmp_path / "saved")
    assert "mistral_format" not in (tmp_path / "saved" / "tokenizer_config.json").read_text()


def test_sentencepiece_is_refused(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(SENTENCEPIECE)
    with pytest.raises(UserError, match="a SentencePiece model needs its tokenizer.json.*tokenizer.model"):
        load_tokenizer(tmp_path)


def test_tokenizer_model_is_read_each_time(tmp_path):
    """tiktoken keeps copies of what it read in the system's temporary directory, by path: another file in the same place, or
    the same relative path in another project, would be taken for it."""
    path = tmp_path / "tokenizer.model"
    path.write_bytes(SENTENCEPIECE)
    with pytest.raises(UserError, match="SentencePiece"):
        load_tokenizer(tmp_path)
    path.write_bytes(b"".join(base64.b64encode(bytes([k])) + b" %d\n" % k for k in range(256)))
    assert encode(load_tokenizer(tmp_path), ["ab<|end_of_text|>"])[0] == [97, 98, 257]


# ---------------------------------------------------------------------------------------------------------- BOS, EOS, cuts
BOS, EOS, EOT = 256, 257, 258  # EOT stands for a chat template's own stop


@pytest.fixture(scope="module")
def byte(tmp_path_factory):
    """The byte tokenizer: <s> 256, </s> 257."""
    directory = tmp_path_factory.mktemp("byte")
    byte_tokenizer(directory)
    return load_tokenizer(directory)


@pytest.fixture(scope="module")
def no_bos(tmp_path_factory):
    directory = tmp_path_factory.mktemp("no_bos")
    byte_tokenizer(directory, bos_token=None, eos_token="</s>")
    return load_tokenizer(directory)


@pytest.mark.parametrize(("ids", "limit", "expected", "cut"), [
    ([1, 2, 3], 4, [BOS, 1, 2, 3], 0),  # fits exactly
    ([BOS, 1, 2, 3], 4, [BOS, 1, 2, 3], 0),  # the text spells BOS: still one
    ([BOS, BOS, 1], 4, [BOS, BOS, 1], 0),  # a second one belongs to the text
    ([1, 2, 3, 4], 4, [BOS, 2, 3, 4], 1),  # BOS is kept, whatever is cut
    ([BOS, 1, 2, 3, 4], 4, [BOS, 2, 3, 4], 1),
    ([1, 2, 3], 1, [BOS], 3),
    ([], 4, [BOS], 0),  # an empty prompt: BOS predicts the response
])
def test_cut_prompt(ids, limit, expected, cut, byte):
    given = list(ids)
    assert finish_prompt(given, byte, begin=text_begin(byte), max_prompt_length=limit) == (expected, cut) and given == ids


@pytest.mark.parametrize(("ids", "limit", "expected", "cut"), [
    ([1, 2, 3], 4, [1, 2, 3], 0),  # the template wrote no BOS: there is none
    ([BOS, 1, 2, 3], 4, [BOS, 1, 2, 3], 0),
    ([1, 2, 3, 4, 5], 4, [2, 3, 4, 5], 1),
    ([BOS, 1, 2, 3, 4], 4, [BOS, 2, 3, 4], 1),
    ([], 4, [], 0),
])
def test_cut_rendered_prompt(ids, limit, expected, cut, byte):
    assert finish_prompt(list(ids), byte, begin=[], max_prompt_length=limit) == (expected, cut)


def test_cut_prompt_without_bos(no_bos):
    assert text_begin(no_bos) == []
    assert finish_prompt([1, 2, 3], no_bos, begin=[], max_prompt_length=2) == ([2, 3], 1)
    assert finish_prompt([], no_bos, begin=[], max_prompt_length=4) == ([], 0)


@pytest.mark.parametrize(("ids", "expected"), [
    ([1, 2, 3], [1, 2, 3, EOS]),
    ([1, 2, 3, EOS], [1, 2, 3, EOS]),  # not doubled
    ([1, EOS, 3], [1, EOS, 3, EOS]),  # one inside is not the end
    ([1, EOT], [1, EOT]),  # the end that is there, whichever it is
    ([EOS, EOT], [EOS, EOT]),
])
def test_end_response(ids, expected, byte):
    given = list(ids)
    assert ensure_stop(given, byte, {EOS, EOT}) == expected and given == ids


@pytest.mark.parametrize("ids", [[], [EOS], [EOT]])
def test_end_response_refusals(ids, byte):
    with pytest.raises(SkipRow, match="empty response"):
        ensure_stop(ids, byte, {EOS, EOT})


def tokens(tokenizer, prompt, *responses, rendered=False, vocab_size=259, max_length=10**6, max_prompt_length=10**5):
    """[prompt ids, response ids ..] of one row of texts, or its SkipRow's kind."""
    counts = RowCounts()
    split = lambda row, tokenizer: RowTexts(prompt=prompt, responses=list(responses), rendered=rendered, columns=())
    rows = list(tokenize_rows([("file:1", {})], split, counts, tokenizer=tokenizer, vocab_size=vocab_size,
                              max_length=max_length, max_prompt_length=max_prompt_length))
    return rows[0].parts if rows else next(iter(counts.skipped))


def test_a_response_that_is_cut_has_no_end(byte):
    ids = lambda text: list(byte(text, add_special_tokens=False).input_ids)
    assert tokens(byte, "p", "abc", max_length=6) == [[BOS, *ids("p")], [*ids("abc"), EOS]]  # fits exactly
    assert tokens(byte, "p", "abc", max_length=5) == [[BOS, *ids("p")], ids("abc")]
    assert tokens(byte, "p", "abc</s>", max_length=5) == [[BOS, *ids("p")], ids("abc")]
    assert tokens(byte, "p", "abc", max_length=3) == [[BOS, *ids("p")], ids("a")]
    assert tokens(byte, "p", "abc", max_length=2) == "no room for a response"
    assert tokens(byte, "p", "</s>") == "empty response"


def test_no_prompt_and_no_bos(no_bos):
    assert tokens(no_bos, "", "abc") == "empty prompt"  # nothing could predict the first token


# ------------------------------------------------------------------------------------------------------------ SentencePiece
# Llama 2's tokenizers begin a text with a space of their own: the ids of a response are those it has after its prompt.
@pytest.fixture(params=["stories260K", "Llama 2, legacy", "Llama 2", "Mistral"])
def sentencepiece(request, tmp_path):
    if request.param == "stories260K":
        return load_tokenizer(request.getfixturevalue("stories"))
    if request.param == "Mistral":
        mistral_tokenizer(tmp_path)
    else:
        llama2_tokenizer(tmp_path, legacy="legacy" in request.param)
    return load_tokenizer(tmp_path)


def bare(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


def test_it_begins_a_text_with_a_space(sentencepiece):
    """Else the tests below say nothing."""
    alone, after = bare(sentencepiece, "the dog"), bare(sentencepiece, "a\nthe dog")
    assert after[-len(alone) :] != alone and sentencepiece.decode(alone) == "the dog"


def test_ids_of_real_responses(sentencepiece, shared):
    with gzip.open(shared / "data" / "tldr_pref.jsonl.gz", "rt", encoding="utf-8", newline="\n") as file:
        rows = [json.loads(line) for _, line in zip(range(200), file)]
    rows[::2] = [dict(prompt=row["prompt"] + "\n", chosen=row["chosen"].strip(), rejected=row["rejected"].strip())
                 for row in rows[::2]]  # and responses that begin without a space
    found = tokenize_rows([("", row) for row in rows], train_pref.split_pair, RowCounts(), tokenizer=sentencepiece,
                          vocab_size=10**6, max_length=10**6, max_prompt_length=10**5)
    different = 0
    for row, (_, (prompt, *responses), _) in zip(rows, found, strict=True):
        assert prompt == sentencepiece(row["prompt"]).input_ids
        for key, response in zip(("chosen", "rejected"), responses, strict=True):
            whole = bare(sentencepiece, row["prompt"] + row[key])
            assert [*prompt, *response] == [*prompt[:1], *whole, sentencepiece.eos_token_id]
            different += response[:-1] != bare(sentencepiece, row[key])
    assert different >= 200  # of 400


def test_ids_after_any_prompt(sentencepiece):
    """transformers' ids of the whole, less the prompt's where they begin it; else ids of the same text."""
    pieces = ["the", "Dog", "=====", "\n", "\n\n", " ", "  ", "aaaa", "\u00e9", "\U0001f600", "!!!", "TL;DR:", "</s>", "<s>",
              "0123456", "a b", "\u2581", "ing", "[/INST]"]
    rng, merged = random.Random(0), 0
    text = lambda n: "".join(rng.choice(pieces) + rng.choice(["", " ", " "]) for _ in range(n))
    prompts, responses = zip(*((text(rng.randint(0, 60)), text(rng.randint(1, 5))) for _ in range(1000)))
    for prompt, response, ids in zip(prompts, responses, encode_after(sentencepiece, prompts, responses), strict=True):
        head, whole = bare(sentencepiece, prompt), bare(sentencepiece, prompt + response)
        merged += whole[: len(head)] != head
        if whole[: len(head)] == head:
            assert head + ids == whole, (prompt, response)
        assert sentencepiece.decode(head + ids) == sentencepiece.decode(whole), (prompt, response)
    assert 100 < merged < 500


# ------------------------------------------------------------------------------------------------------------ chat templates
def said(*turns):
    """"u:Hi" -> a message of the user; s: system, a: assistant."""
    role = {"s": "system", "u": "user", "a": "assistant"}
    return [dict(role=role[turn[0]], content=turn[2:]) for turn in turns]


CHATS = [  # prompt, response
    (said("u:What is 2 + 2?"), said("a:It is 4.")),
    (said("s:Be brief.", "u:Hi", "a:Hello!", "u:Who\nare you?"), said("a:A model.\n\nOf language.")),
    (said("u:Count"), said("a:One", "u:And then?", "a:Two")),  # several turns to learn from
]
LLAMA3_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")


def assert_chat_is_whole(tokenizer, vocab_size, end_of_turn):
    """BOS and prompt, then response and EOS, are the template's own rendering of the whole, up to the end of the last turn."""
    for prompt, response in CHATS:
        texts = render_chat(tokenizer, prompt, response)
        prompt_ids, response_ids = tokens(tokenizer, *texts, rendered=True, vocab_size=vocab_size)
        text = tokenizer.apply_chat_template(prompt + response, tokenize=False)
        whole = tokenizer(text, add_special_tokens=False).input_ids
        end = len(whole) - whole[::-1].index(end_of_turn)
        assert prompt_ids + response_ids == whole[:end]
        asked = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        assert prompt_ids == tokenizer(asked, add_special_tokens=False).input_ids  # what a server will send


def test_chat_smollm2(smollm):
    tokenizer = load_tokenizer(smollm)  # ends a turn with "<|im_end|>\n", begins with BOS = <|im_start|>
    assert_chat_is_whole(tokenizer, 49152, tokenizer.convert_tokens_to_ids("<|im_end|>"))


def test_chat_llama3(llama3):
    tokenizer = copy.deepcopy(llama3)
    tokenizer.chat_template, tokenizer.eos_token = LLAMA3_TEMPLATE, "<|eot_id|>"  # as Llama-3-Instruct sets them
    assert_chat_is_whole(tokenizer, 128256, 128009)


@pytest.fixture
def chat(tmp_path):
    """The byte tokenizer with a template."""

    def with_template(template):
        byte_tokenizer(tmp_path)
        tokenizer = load_tokenizer(tmp_path)
        tokenizer.chat_template = template
        return tokenizer

    return with_template


PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}{{ '\n' }}" \
        "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"


def test_chat_text(chat):
    tokenizer = chat(PLAIN)
    assert render_chat(tokenizer, said("u:Hi"), said("a:Hello ")) == ("[user]Hi\n[assistant]", "Hello </s>")
    several = render_chat(tokenizer, said("u:Hi"), said("a:A", "u:B", "a:C"))
    assert several == ("[user]Hi\n[assistant]", "A</s>\n[user]B\n[assistant]C</s>")


@pytest.mark.parametrize(("prompt", "response", "kind"), [
    (said("u:Hi"), said("u:Hi"), "prompt mismatch"),
    ([], said("a:Hi"), "prompt mismatch"),
    (said("u:Hi"), [], "prompt mismatch"),
    (said("u:Hi"), said("a: \n"), "empty response"),
    (said("u:Hi"), [dict(role="assistant", content=None)], "wrong types"),
    (said("u:Hi"), [dict(role="assistant")], "wrong types"),
    (said("u:Hi"), ["Hello"], "wrong types"),
    ([dict(role=1, content="x")], said("a:Hi"), "wrong types"),
])
def test_chat_refusals(prompt, response, kind, chat):
    with pytest.raises(SkipRow, match=kind):
        render_chat(chat(PLAIN), prompt, response)


def test_chat_template_refusals(chat):
    with pytest.raises(UserError, match="no chat template"):
        render_chat(chat(None), said("u:Hi"), said("a:Hello"))
    thinking = PLAIN.replace("[assistant]{% endif %}", "[assistant]<think>{% endif %}")  # only before an answer
    with pytest.raises(SkipRow, match="does not continue"):
        render_chat(chat(thinking), said("u:Hi"), said("a:Hello"))


def test_chat_template_that_raises(chat):
    """Many templates refuse turns that do not alternate; one such row is no reason to stop."""
    tokenizer = chat("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(SkipRow, match="chat template"):
        render_chat(tokenizer, said("u:Hi"), said("a:Hello"))


@pytest.mark.parametrize("template", ["{{ 1 / 0 }}", "{{ messages[0].nothing.at.all }}", "{{ 'a' + 1 }}", "{% for %}"])
def test_chat_template_that_fails(template, chat):
    """Whatever the program does: one kind of skipped row, which says why."""
    with pytest.raises(SkipRow, match="refused by the chat template \\(."):
        render_chat(chat(template), said("u:Hi"), said("a:Hello"))


# ------------------------------------------------------------------------------------------------------ how a response ends
# Instruct models end a turn with a stop of the template's, which need not be the tokenizer's EOS.
CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
INSTRUCT = {  # template, BOS, EOS, the template's stop, its other special tokens
    "Llama 3": (LLAMA3_TEMPLATE, "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", ["<|start_header_id|>", "<|end_header_id|>"]),
    "ChatML": (CHATML, None, "<|endoftext|>", "<|im_end|>", ["<|im_start|>"]),
}


@pytest.fixture(params=INSTRUCT)
def instruct(request, tmp_path):
    """-> directory of a tokenizer, the ids of its EOS and of its template's stop."""
    template, bos, eos, stop, others = INSTRUCT[request.param]
    tokenizer = byte_tokenizer(tmp_path, bos_token=bos, eos_token=eos, additional_special_tokens=[stop, *others])
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path)
    return tmp_path, *tokenizer.convert_tokens_to_ids([eos, stop])


def test_the_end_is_the_templates(instruct):
    """A conversation's response ends where transformers' rendering of it does, but for what follows the stop."""
    directory, eos, stop = instruct
    tokenizer = load_tokenizer(directory)
    assert eos != stop and {eos, stop} <= stop_ids(tokenizer) and assistant_stop_id(tokenizer) == stop
    assert_chat_is_whole(tokenizer, 272, stop)
    for prompt, response in CHATS:
        _, ids = tokens(tokenizer, *render_chat(tokenizer, prompt, response), rendered=True, vocab_size=272)
        assert ids[-1] == stop and eos not in ids and ids.count(stop) == (len(response) + 1) // 2 + len(response) // 2


def test_the_end_is_the_samplers(instruct):
    """Text that a model wrote keeps the stop it ended with, whichever; EOS ends what has none. In pairs and in
    demonstrations."""
    import train_sft

    directory, eos, stop = instruct
    tokenizer = load_tokenizer(directory)
    texts = {k: tokenizer.decode([k]) for k in (eos, stop)}
    for response, end in ((" yes" + texts[stop], stop), (" yes" + texts[eos], eos), (" yes", eos)):
        expected = [*bare(tokenizer, " yes"), end]
        assert tokens(tokenizer, "Is it?", response, " no", vocab_size=272)[1:] == [expected, [*bare(tokenizer, " no"), eos]]
        prompt, (completion,), *_ = train_sft.split_example(dict(prompt="Is it?", completion=response), tokenizer)
        assert tokens(tokenizer, prompt, completion, vocab_size=272)[1] == expected
    assert tokens(tokenizer, "Is it?", texts[stop], vocab_size=272) == "empty response"


def test_a_saved_model_stops_at_both(instruct, tiny_llama, tmp_path, process_group):
    """generation_config.json of what a trainer saves: transformers' generate ends at EOS and at the template's stop."""
    directory, eos, stop = instruct
    source, out = tiny_llama(tmp_path / "m"), tmp_path / "final"
    tokenizer = load_tokenizer(directory)
    model = train_pref.build_model(lambda: train_pref.Llama(train_pref.read_config(source), "torch"), "cpu", "fp32")
    for path in source.glob("tokenizer*"):
        path.unlink()
    (source / "generation_config.json").unlink()
    files = train_pref.model_files(source, tokenizer, assistant_stop_id(tokenizer))
    train_pref.save_checkpoint(out, model=train_pref.load_weights(model, source), tokenizer=tokenizer, files=files, run="")
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert sorted(loaded.generation_config.eos_token_id) == sorted([eos, stop])
    for end, n_new in ((eos, 3), (stop, 3), (65, 8)):  # the third token is forced
        def force(ids, scores):
            scores[:, :] = -math.inf
            scores[:, end if ids.shape[1] == 3 else 66] = 0
            return scores

        ids = loaded.generate(torch.tensor([[66]]), max_new_tokens=8, do_sample=False, pad_token_id=0, logits_processor=[force])
        assert ids.shape[1] == 1 + n_new


# --------------------------------------------------------------------------------------------------------------------- tools
TOOLS = [dict(type="function", function=dict(name="weather", description="The weather of a town.", parameters=dict(
    type="object", properties=dict(town=dict(type="string")), required=["town"])))]
TOOL_TEMPLATE = (
    "{% if tools %}{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}{% for m in messages %}[{{ m.role }}]"
    "{% if m.content %}{{ m.content }}{% endif %}{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}"
    "{{ c.function.arguments | tojson }}{% endfor %}{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}")


def calls(town, **content):
    call = dict(type="function", function=dict(name="weather", arguments=dict(town=town)))
    return dict(role="assistant", tool_calls=[call]) | content


@pytest.mark.parametrize("as_text", [False, True], ids=["list", "JSON"])
@pytest.mark.parametrize("response", [
    [calls("Bonn", content="")], [calls("Bonn", content=None)], [calls("Bonn")], [calls("Bonn", content="I look.")],
    said("a:It is warm."),
    [calls("Bonn", content=None), dict(role="tool", content="18 degrees"), dict(role="assistant", content="18 degrees.")]])
def test_tools(response, as_text, chat):
    """Of pairs and of demonstrations: what transformers renders with tools=."""
    import train_sft

    tokenizer, prompt = chat(TOOL_TEMPLATE), said("u:Is it warm in Bonn?")
    text = lambda messages, **how: tokenizer.apply_chat_template(messages, tools=TOOLS, tokenize=False, **how)
    asked, whole = text(prompt, add_generation_prompt=True), text(prompt + response)
    assert '"description": "The weather of a town."' in asked and whole.startswith(asked)
    tools = json.dumps(TOOLS) if as_text else TOOLS
    pair = dict(prompt=prompt, chosen=response, rejected=[calls("Rome", content="")], tools=tools)
    found = train_pref.split_pair(pair, tokenizer)
    assert found[:2] == (asked, [whole[len(asked) :], "<call>weather" + '{"town": "Rome"}</s>'])
    ids = tokens(tokenizer, found.prompt, *found.responses, rendered=found.rendered)
    assert ids[0] + ids[1] == bare(tokenizer, whole)
    demonstration = dict(prompt=prompt, completion=response, tools=tools)
    assert train_sft.split_example(demonstration, tokenizer)[:2] == (asked, [whole[len(asked) :]])


def test_tools_that_are_none(chat):
    tokenizer = chat(TOOL_TEMPLATE)
    plain = train_pref.split_pair(dict(prompt=said("u:Hi"), chosen=said("a:A"), rejected=said("a:B")), tokenizer)
    for tools in (None, [], "", "[]", "null"):
        row = dict(prompt=said("u:Hi"), chosen=said("a:A"), rejected=said("a:B"), tools=tools)
        assert train_pref.split_pair(row, tokenizer) == plain
    with pytest.raises(SkipRow, match="refused by the chat template"):
        train_pref.split_pair(row | dict(tools="{not JSON"), tokenizer)


# ---------------------------------------------------------------------------------------------------------------------- dates
@pytest.mark.parametrize("template", [
    "{{ strftime_now('%d %b %Y') }}",
    "{% if strftime_now is defined %}{% set d = strftime_now(\"%d %b %Y\") %}{% else %}{% set d = 'x' %}{% endif %}{{ d }}"])
def test_a_template_that_writes_the_date(template, chat, monkeypatch):
    """The same ids on any day: those of Llama 3.2's own default."""
    tokenizer, found = chat(template + PLAIN), []
    for day in ((2025, 1, 2), (2031, 12, 31)):
        class Clock(datetime.datetime):
            @classmethod
            def now(cls, tz=None):
                return cls(*day)

        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)
        monkeypatch.setattr(datetime, "datetime", Clock)
        assert str(day[0]) in tokenizer.apply_chat_template(said("u:Hi"), tokenize=False)  # the clock was moved
        found.append(render_chat(tokenizer, said("u:Hi"), said("a:Hello")))
    assert found == [("26 Jul 2024[user]Hi\n[assistant]", "Hello</s>")] * 2


def test_a_template_that_takes_the_date(chat):
    """Llama 3.2's way; --chat_template_kwargs may give another."""
    tokenizer = chat("{% if date_string is not defined %}{{ strftime_now('%Y') }}{% endif %}{{ date_string }}" + PLAIN)
    assert render_chat(tokenizer, said("u:Hi"), said("a:Hello"))[0].startswith("26 Jul 2024[user]")
    tokenizer.chat_template_kwargs = dict(date_string="1 Jan 2026")
    assert render_chat(tokenizer, said("u:Hi"), said("a:Hello"))[0].startswith("1 Jan 2026[user]")


# --------------------------------------------------------------------------------------------------------------- one set of stops
def test_stops(tmp_path):
    """EOS, the template's end of an assistant's turn, be it the pad token or none of the special ones, and
    generation_config.json's: what ends a response in training is what transformers' generate would stop at."""
    tokenizer = byte_tokenizer(tmp_path, pad_token="<pad>", additional_special_tokens=["<|eom|>", "<|other|>"])
    tokenizer.add_tokens(["<|end|>"])  # as fine-tuning adds them
    stop = lambda token: tokenizer.convert_tokens_to_ids(token)
    turn = "{% for m in messages %}<|other|>{{ m.role }}\n{{ m.content }}STOP{% endfor %}"
    for template, expected in ((None, {EOS}), (turn.replace("STOP", ""), {EOS}), (turn.replace("STOP", "<pad>\n"), {EOS, stop("<pad>")}),
                               (turn.replace("STOP", "\n<|end|>\n<pad>"), {EOS, stop("<|end|>")}), ("{{ 1 / 0 }}", {EOS}),
                               ("<|eom|>", {EOS}), (turn.replace("STOP", "</s><|eom|>"), {EOS})):
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path)
        (tmp_path / "chat_template.jinja").unlink(missing_ok=True) if template is None else None
        for eos, more in ((None, set()), (EOS, set()), ([EOS, stop("<|eom|>")], {stop("<|eom|>")})):
            GenerationConfig(eos_token_id=eos).save_pretrained(tmp_path)
            assert stop_ids(load_tokenizer(tmp_path)) == expected | more, template
    (tmp_path / "generation_config.json").unlink()
    assert stop_ids(load_tokenizer(tmp_path)) == {EOS}


def test_a_response_ends_where_generation_stops(tmp_path):
    """A text that ends in another special token than those has no end yet."""
    byte_tokenizer(tmp_path, additional_special_tokens=["<|other|>"])
    tokenizer = load_tokenizer(tmp_path)
    other = tokenizer.convert_tokens_to_ids("<|other|>")
    assert tokens(tokenizer, "p", "a<|other|>", vocab_size=300)[1] == [*bare(tokenizer, "a"), other, EOS]
    tokenizer.generation_stops = [other]
    assert tokens(tokenizer, "p", "a<|other|>", vocab_size=300)[1] == [*bare(tokenizer, "a"), other]
