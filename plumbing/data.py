"""From files and Hub datasets to rows, from rows to texts (chat templates), from texts to token ids."""

import dataclasses
import functools
import gzip
import hashlib
import importlib
import itertools
import json
import math
import os
import re
import sys
import tempfile
import zlib
from array import array
from datetime import date
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from plumbing.process import (UserError, file_sha256, on_rank_0, open_safetensors, print_rank0, read_json, read_tensors,
                              write_tensors)


# ----------------------------------------------------------------------------------------------------------------- rows
class SkipRow(Exception):
    """This data row cannot be used; the message is the kind it is counted under."""


def count_skip(counts, kind, place):
    """Count one more of a kind in {kind: [number, place of the first]}; a place is "file:line"."""
    entry = counts.setdefault(str(kind), [0, place])
    entry[0] += 1


def describe_skips(counts):
    """What count_skip counted, as a report has it: "3 wrong types (first data.jsonl:7), .."; "none"."""
    return ", ".join(f"{n} {kind} (first {place})" for kind, (n, place) in counts.items()) or "none"


def read_rows(source, held_out, recipes):
    """Yield (place, row) of a --data or --eval_data: a path, a recipe's name, a Hub id, or several joined by "+".

    recipes: {name: (Hub id, train split, held-out split, columns read)}. Raises UserError for what cannot be read."""
    for part in source_parts(source):
        if part.endswith((".jsonl", ".json", ".gz")):
            yield from read_jsonl(Path(part))
        else:
            yield from read_dataset(part, held_out, recipes)


def source_parts(source):
    """The parts that a --data pools. A file whose own name has a plus is that file."""
    return [source] if Path(source).exists() else source.split("+")


def source_sha256(source):
    """Of the parts of a --data: files and directories by what they hold, a Hub dataset by its name."""
    digest = hashlib.sha256()
    for part in source_parts(source):
        path = Path(part)
        files = [path] if path.is_file() else sorted(inner for inner in path.rglob("*") if inner.is_file())
        known_by = [file_sha256(file) for file in files] or [part]
        digest.update(json.dumps(known_by).encode())
    return digest.hexdigest()


def read_dataset(name, held_out, recipes):
    """Yield ("name[number]", row) of what the package `datasets` reads: .csv, .parquet, a directory, the Hub."""
    hub_id, train, test, columns = recipes.get(name, (name, "train", "test", None))
    file_format = Path(name).suffix.removeprefix(".")
    try:
        load_dataset = importlib.import_module("datasets").load_dataset
        if file_format in ("csv", "parquet"):
            rows = load_dataset(file_format, data_files=name, split="train")
        else:
            rows = load_dataset(hub_id, split=test if held_out else train)
        if columns:
            rows = rows.select_columns(list(columns))
    except Exception as error:  # not installed, not there: `datasets` has classes of its own
        raise UserError(f"{name}: no JSON file or recipe ({', '.join(recipes)}), and `datasets` (pip install"
                        f" datasets) cannot read it: {error}") from None
    for number, row in enumerate(rows):
        yield f"{name}[{number}]", row


def read_jsonl(path):
    """Yield ("file:line", object) of a file of JSON lines or of one JSON array; a value that is no object is {}.

    By hand, not by `datasets`: it names no line, and refuses a whole file for one row. Raises UserError: not JSON."""
    number = 0  # of the last line that was read
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            for number, text in json_texts(file):
                if not text.strip():
                    continue
                value = json.loads(text)
                # A line may hold an array of rows, too; one without objects is a row without columns, to be counted.
                is_array_of_rows = isinstance(value, list) and any(isinstance(item, dict) for item in value)
                rows = value if is_array_of_rows else [value]
                for row in rows:
                    yield f"{path}:{number}", row if isinstance(row, dict) else {}
    except (ValueError, RecursionError) as error:  # json.JSONDecodeError, UnicodeDecodeError
        raise UserError(f"{path}:{number}: not JSON: {error}") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: broken after line {number}: {error}") from None


def json_texts(file):
    """Yield (line number, bytes) of each JSON value in a binary file: its lines, or all of it if an array is spread
    over them. Read as bytes, whose lines end at line feeds only: U+2028 may stand inside a JSON string."""
    first = file.readline().strip()
    file.seek(0)
    if first.startswith(b"[") and not first.endswith(b"]"):
        yield 1, file.read()
    else:
        yield from enumerate(file, 1)


# ---------------------------------------------------------------------------------------- tokenizers and chat templates
SHAREGPT = ("ShareGPT row: rename conversations to messages (of pairs: to prompt, chosen and rejected being lists), its"
            " from to role with human as user and gpt as assistant, its value to content")
TODAY = date(2024, 7, 26)  # for templates that write it (Llama 3.2's own default): a run is the same on any day


def load_tokenizer(directory, chat_template_kwargs=None):
    """The tokenizer of a model directory: AutoTokenizer's, or meta_tokenizer's where there is only a tokenizer.model.

    It keeps what its texts depend on besides its own files, as attributes that save_pretrained does not write:
    chat_template_kwargs, given to every call of its template, and generation_stops, ids that end a completion by
    generation_config.json. Raises UserError where transformers can load none, or one without EOS."""
    from transformers import AutoTokenizer

    try:
        if (directory / "tokenizer.model").exists() and not list(directory.glob("tokenizer*.json")):
            tokenizer = meta_tokenizer(directory / "tokenizer.model")
        else:
            # Not mistral-common's own, where that is installed: it has another interface, and no chat template.
            tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False,
                                                      mistral_format=False)
    except Exception as error:  # whatever a broken file leads to; `tokenizers` itself raises no other class
        raise UserError(f"{directory}: no tokenizer that transformers can load (a SentencePiece model needs its"
                        f" tokenizer.json): {error}") from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"{directory}: the tokenizer has no EOS token; set eos_token in tokenizer_config.json")
    if not isinstance(tokenizer.model_max_length, (int, float)):  # transformers would fail at the first text
        raise UserError(f"{directory / 'tokenizer_config.json'}: model_max_length is"
                        f" {tokenizer.model_max_length!r:.100}: must be a number")
    tokenizer.chat_template_kwargs = chat_template_kwargs or {}
    tokenizer.generation_stops = generation_stops(directory)
    return tokenizer


def generation_stops(directory):
    """The ids at which generation_config.json says to stop, [] where it is silent. Raises UserError: no ids."""
    path = directory / "generation_config.json"
    found = read_json(path).get("eos_token_id") if path.exists() else None
    if found is None:
        return []
    stops = found if isinstance(found, list) else [found]
    for stop in stops:
        if type(stop) is not int or stop < 0:  # not isinstance: True is an int to it
            raise UserError(f"{path}: eos_token_id is {found!r:.100}: must be a token id or a list of them")
    return stops


def check_same_vocabulary(tokenizer, directory):
    """Raise UserError where the tokenizer of a model `directory`, which will read ids of `tokenizer`, means another
    token by one of them: of the same size, its model would score other words. A token that one of the two lacks, as an
    added pad token, is no conflict."""
    ours = {token_id: token for token, token_id in tokenizer.get_vocab().items()}
    theirs = {token_id: token for token, token_id in load_tokenizer(directory).get_vocab().items()}
    for token_id in sorted(ours.keys() & theirs.keys()):
        if ours[token_id] != theirs[token_id]:
            raise UserError(f"{directory}: its tokenizer is another one than {tokenizer.name_or_path}'s: token"
                            f" {token_id} is {theirs[token_id]!r} there, {ours[token_id]!r} here")


def meta_tokenizer(path):
    """Llama 3's tokenizer of a tokenizer.model as Meta ships it, tiktoken's format without the special tokens: through
    transformers' converter, whose split pattern is Llama 3's."""
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    # 256 of them, in the order of their ids.
    names = ["begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1",
             "finetune_right_pad_id", "step_id", "start_header_id", "end_header_id", "eom_id", "eot_id", "python_tag",
             "image"]
    names += [f"reserved_special_token_{k}" for k in range(2, 246)]
    special = [f"<|{name}|>" for name in names]
    bos = special[0]
    eos = special[1]
    # tiktoken's cache goes by the path: it would miss that another file stands there now.
    os.environ["TIKTOKEN_CACHE_DIR"] = ""
    backend = TikTokenConverter(str(path), extra_special_tokens=special).converted()
    bos_and_id = (bos, backend.token_to_id(bos))
    backend.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[bos_and_id])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos)


def encode(tokenizer, texts):
    """Texts -> lists of ids, without BOS and EOS. Special tokens written in the text are parsed, as everywhere in
    transformers: prompts come already rendered."""
    if not texts:
        return []  # of which transformers would make an IndexError
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def encode_after(tokenizer, befores, texts):
    """Ids that texts have after the texts before them: SentencePiece begins a text on its own with a space of its own.

    Where the two merge across their border (a prompt that ends with a space) the prompt keeps its ids, and the text has
    those that it has at the beginning of a line; None if it merges with that too."""
    # The last words decide, at a fraction of a long prompt's cost.
    befores = [before[-64:] for before in befores]
    heads = encode(tokenizer, befores)
    wholes = encode(tokenizer, [before + text for before, text in zip(befores, texts)])
    # Nothing merges with what is not there; but a text on its own would get SentencePiece's space.
    line_start = "\n" if begins_with_a_space(tokenizer) else ""
    found = []
    for text, head, whole in zip(texts, heads, wholes):
        if whole[: len(head)] != head:
            head, whole = encode(tokenizer, [line_start, line_start + text])
        merged = whole[: len(head)] != head
        found.append(None if merged else whole[len(head) :])
    return found


def begins_with_a_space(tokenizer):
    """Does the tokenizer write a space of its own before a text, as SentencePiece does, but not before a line's?"""
    alone, second_line = tokenizer(["a", "\na"], add_special_tokens=False)["input_ids"]
    return second_line[-len(alone) :] != alone


def require_known(ids, vocab_size):
    """Raises SkipRow where a text has no ids of its own (encode_after's None), or one that the model does not have."""
    if ids is None:
        raise SkipRow("response merges with the end of its prompt")
    if ids and max(ids) >= vocab_size:
        raise SkipRow(f"token outside the vocabulary of {vocab_size}")


def stop_ids(tokenizer):
    """The ids that end a response, in training as in sampling: EOS, what the chat template ends an assistant's turn
    with, and what generation_config.json names."""
    return {tokenizer.eos_token_id, assistant_stop_id(tokenizer), *tokenizer.generation_stops}


def assistant_stop_id(tokenizer):
    """The id that ends an assistant's turn: the first added token that the chat template writes after what is said, be
    it the pad token or not. EOS where there is no template or it writes none."""
    said = "0123456789"  # stands in no template
    messages = [dict(role="user", content="a"), dict(role="assistant", content=said)]
    try:
        text = apply_template(tokenizer, messages, None, add_generation_prompt=False)
    except (SkipRow, UserError):
        return tokenizer.eos_token_id
    _, found, after = text.rpartition(said)
    if found:  # a template may say nothing of the assistant's turns
        # Neither BOS nor the unknown token ends anything, unless EOS is the same token, as in GPT-2's family.
        stops = {*added_tokens(tokenizer)} - {tokenizer.bos_token, tokenizer.unk_token} | {tokenizer.eos_token}
        for token in tokenizer.tokenize(after):
            if token in stops:
                return tokenizer.convert_tokens_to_ids(token)
    return tokenizer.eos_token_id


@functools.lru_cache(maxsize=4)  # a tokenizer takes 0.4 ms to say it, once a conversation
def added_tokens(tokenizer):
    """The texts of tokens that are no part of the language: special ones, and what fine-tuning added. (Some tokenizers
    have white space among them.)"""
    return tuple(token.content for token in tokenizer.added_tokens_decoder.values() if token.content.strip())


def text_begin(tokenizer):
    """[BOS] where the tokenizer begins a text with it, or []: many have a BOS and write none (SmolLM2)."""
    first = tokenizer("a")["input_ids"][:1]
    return first if first == [tokenizer.bos_token_id] else []


def finish_prompt(ids, tokenizer, *, begin, max_prompt_length):
    """A prompt's bare ids -> the ids that a model reads, how many were cut.

    begin: text_begin of text, where it is not written already; [] of what a chat template rendered, which has the BOS
    that the template wrote, or none. Too long, a prompt keeps its BOS and its end."""
    if ids[: len(begin)] != begin:
        ids = begin + ids
    n_cut = max(0, len(ids) - max_prompt_length)
    # SmolLM2's BOS is what begins a turn: it, too, is kept in front of a prompt's end.
    if n_cut and ids[0] == tokenizer.bos_token_id:
        return ids[:1] + ids[1 + n_cut :], n_cut
    return ids[n_cut:], n_cut


def ensure_stop(ids, tokenizer, stops):
    """A response ends with the stop that the template or the sampler put there; EOS where there is none."""
    if not ids or ids[-1] not in stops:
        ids = ids + [tokenizer.eos_token_id]  # not in place: the caller's list may be read again
    if len(ids) == 1:
        raise SkipRow("empty response")
    return ids


def text_messages(messages):
    """A conversation as templates want it: content given as a list of text parts is joined. Raises SkipRow."""
    if not isinstance(messages, list):
        raise SkipRow(f"wrong types, a conversation is {type(messages).__name__}")
    found = []
    for message in messages:
        if not isinstance(message, dict):
            raise SkipRow(f"wrong types, a message is {type(message).__name__}")
        # Checked here, as a template would make "" of what lacks, and say nothing.
        if "from" in message and "role" not in message:
            raise SkipRow(SHAREGPT)
        if not isinstance(message.get("role"), str):
            raise SkipRow(f"wrong types, a message's role is {type(message.get('role')).__name__}")
        content = message.get("content")
        if isinstance(content, list):
            content = join_parts(content)
        if not isinstance(content, str) and not message.get("tool_calls"):
            raise SkipRow(f"wrong types, a message's content is {type(content).__name__}")
        found.append(message | dict(content=content))  # its other keys are the template's to read: tool_calls, name
    return found


def join_parts(parts):
    """[{"type": "text", "text": ..}, ..] -> the text. Raises SkipRow for a part that is none."""
    texts = []
    for part in parts:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            name = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise SkipRow(f"wrong types, a part of a message's content is {name}"[:80])
        texts.append(part["text"])
    return "".join(texts)


def wrong_types(row, columns):
    """A SkipRow that says what a row's columns hold."""
    if row.get("conversations") is not None:
        return SkipRow(SHAREGPT)
    held = [f"{column} is {type(row.get(column)).__name__}" for column in columns]
    return SkipRow(f"wrong types, {', '.join(held)}")


def lacking(row, what):
    """A SkipRow for a row without the columns `what`, that says which it has. (Where rows of several forms were pooled,
    the columns of the others are null: as good as absent.)"""
    if row.get("conversations") is not None:
        return SkipRow(SHAREGPT)
    keys = [column for column, value in row.items() if value is not None]
    return SkipRow(f"no {what}, keys: {keys}"[:120])


def apply_template(tokenizer, messages, tools, *, add_generation_prompt):
    """Messages as the text that the chat template gives. Raises SkipRow; UserError if there is no template."""
    if tokenizer.chat_template is None:
        raise UserError("the data is conversational, but the tokenizer has no chat template: use an instruct model's"
                        " tokenizer, or data with text prompts")
    messages = text_messages(messages)
    try:
        if isinstance(tools, str):
            tools = json.loads(tools or "null")
        # Templates ask `if tools is not none`: a row without any must not say [].
        tools = tools or None
        template = pin_date(tokenizer.get_chat_template(tools=tools))
        given = dict(date_string=TODAY.strftime("%d %b %Y")) | tokenizer.chat_template_kwargs
        return tokenizer.apply_chat_template(messages, chat_template=template, tools=tools, tokenize=False,
                                             add_generation_prompt=add_generation_prompt, **given)
    except Exception as error:  # a template is a program: it may raise anything
        raise SkipRow(f"refused by the chat template ({' '.join(str(error).split())[:80]})") from None


def pin_date(template):
    """A chat template whose calls of strftime_now tell TODAY: transformers' function of that name tells the day, and no
    other can be given in its place. (Templates that take a `date_string` are given one.)"""
    call = r"""strftime_now\((["'])(.*?)\1\)"""
    return re.sub(call, lambda match: repr(TODAY.strftime(match[2])), template)


def render_chat(tokenizer, prompt, response, tools=None):
    """Lists of {role, content} -> prompt text, response text by the tokenizer's chat template, up to the stop that
    ends the turn. Raises SkipRow; UserError if there is no template."""
    prompt = text_messages(prompt)
    response = text_messages(response)
    if not prompt or not response or response[0]["role"] != "assistant":
        raise SkipRow("prompt mismatch")
    if not any((message["content"] or "").strip() or message.get("tool_calls") for message in response):
        raise SkipRow("empty response")
    # The field's way to say that a message is not to be learned; those of the prompt never are.
    if any(message.get("weight") == 0 for message in response):
        raise SkipRow("response of weight 0")
    # Rendered twice and split as texts: where the template would put a response's ids is not for us to guess.
    prompt_text = apply_template(tokenizer, prompt, tools, add_generation_prompt=True)
    whole = apply_template(tokenizer, prompt + response, tools, add_generation_prompt=False)
    if not whole.startswith(prompt_text):
        raise SkipRow("chat template does not continue the prompt")
    response_text = whole[len(prompt_text) :]
    # Many templates write a line break after the stop, which no model is to learn: generation is over by then.
    if response_text.rstrip().endswith(added_tokens(tokenizer)):
        response_text = response_text.rstrip()
    return prompt_text, response_text


def is_verbatim(messages, text):
    """Does the rendered text of a response begin with what its one message says? A template may trim that, or write an
    empty block of thoughts before it: then it is not what was sampled."""
    content = text_messages(messages)[0]["content"]
    return len(messages) == 1 and bool(content) and text.startswith(content)


# ---------------------------------------------------------------------------------------- rows as token ids, once a run
BATCH = 1000  # rows tokenized together: tokenizers use all cores


@dataclasses.dataclass
class RowCounts:
    """What became of the rows of a data set: how many there were; those skipped and cut, see count_skip."""

    rows: int = 0
    skipped: dict = dataclasses.field(default_factory=dict)
    cut: dict = dataclasses.field(default_factory=dict)
    # Behaviour log-probs: of how many responses, and where they could not be used.
    behaviour: dict = dataclasses.field(default_factory=dict)
    # Columns that hold something, and are not read.
    unread: list = dataclasses.field(default_factory=list)

    def __str__(self):
        told = f"{self.rows} rows; skipped: {describe_skips(self.skipped)}; cut: {describe_skips(self.cut)}"
        if self.behaviour:
            told += f"; behaviour log-probs: {describe_skips(self.behaviour)}"
        if self.unread:
            told += f"; columns not read: {', '.join(self.unread)}"
        return told


class RowTexts(NamedTuple):
    """What a split function reads in a data row."""

    prompt: str | None  # None: the one response is plain text, learned whole
    responses: list
    rendered: bool  # by a chat template, which wrote all special tokens, BOS too
    columns: tuple  # that were read
    # A response each: its behaviour log-prob in nats, NaN where the row has none; was it left as its sampler said it?
    behaviour_logps: tuple = ()
    verbatim: tuple = ()


class RowIds(NamedTuple):
    """A data row tokenized: its number in the data; [prompt ids, response ids, ..]; RowTexts.behaviour_logps."""

    number: int
    parts: list
    behaviour_logps: list


def read_behaviour(row, column):
    """The log-prob in nats, summed over a response with its stop, that whoever sampled it gave it; NaN where the row
    has none. Raises SkipRow where it can be none."""
    value = row.get(column)
    if value is None:
        return math.nan
    if type(value) not in (int, float):
        raise wrong_types(row, [column])
    # NaN fails both comparisons. The cache is float32: what is less than its least would be -inf there.
    if not torch.finfo(torch.float32).min <= value <= 0:
        raise SkipRow(f"{column} positive or not finite")
    return float(value)


def tokenize_rows(rows, split, counts, *, tokenizer, vocab_size, max_length, max_prompt_length):
    """Yield RowIds of the rows [(place, row)] that can be used; the others are counted in `counts`.

    split(row, tokenizer) -> RowTexts; raises SkipRow. A prompt is cut to `max_prompt_length` ids, of which it keeps the
    end, then a response to what of `max_length` is left, of which it loses its own. Raises UserError where the model,
    of `vocab_size` ids, lacks the tokenizer's EOS or the BOS that it writes: it is another model's."""
    begin = text_begin(tokenizer)
    stops = stop_ids(tokenizer)
    largest = max([tokenizer.eos_token_id, *begin])
    if largest >= vocab_size:
        raise UserError(f"token id {largest} is outside the model's vocabulary of {vocab_size}: the tokenizer belongs"
                        " to another model")
    # Each number is a row's in the data, whatever is skipped: ref_logps and reports are matched to the file by it.
    numbered = enumerate(rows)
    while batch := list(itertools.islice(numbered, BATCH)):
        counts.rows += len(batch)
        kept = split_rows(batch, split, tokenizer, counts)
        for (number, place, texts), (prompt, responses) in zip(kept, encode_rows(kept, tokenizer)):
            try:
                for ids in (prompt, *responses):
                    require_known(ids, vocab_size)
                prompt, n_cut = finish_prompt(prompt, tokenizer, begin=[] if texts.rendered else begin,
                                              max_prompt_length=max_prompt_length)
                # Of plain text the first token is given, as nothing predicts it: BOS, which it may spell itself.
                if texts.prompt is None and responses[0][:1] == prompt:
                    responses = [responses[0][1:]]
                # Nothing would predict a response's first token.
                if not prompt and texts.prompt is not None:
                    raise SkipRow("empty prompt")
                responses = [ensure_stop(response, tokenizer, stops) for response in responses]
                kept_responses = cut_responses(responses, max_length - len(prompt))
            except SkipRow as kind:
                count_skip(counts.skipped, kind, place)
                continue
            if n_cut:
                count_skip(counts.cut, "prompt", place)
            is_cut = [a != b for a, b in zip(responses, kept_responses)]
            for _ in range(sum(is_cut)):
                count_skip(counts.cut, "response", place)
            logps = usable_behaviour(texts, is_cut, counts, place)
            yield RowIds(number, [prompt, *kept_responses], logps)


def split_rows(batch, split, tokenizer, counts):
    """[(number, (place, row))] -> [(number, place, RowTexts)] of those that can be used; the others are counted."""
    kept = []
    for number, (place, row) in batch:
        try:
            texts = split(row, tokenizer)
            # JSON can hold half of a surrogate pair; no tokenizer takes it.
            "".join([texts.prompt or "", *texts.responses]).encode()
        except SkipRow as kind:
            count_skip(counts.skipped, kind, place)
            continue
        except UnicodeEncodeError:
            count_skip(counts.skipped, "broken Unicode", place)
            continue
        kept.append((number, place, texts))
        for column, value in row.items():
            if value is not None and column not in texts.columns and column not in counts.unread:
                counts.unread.append(column)
    return kept


def encode_rows(kept, tokenizer):
    """Yield (bare prompt ids, [bare ids of each response after it]) of what split_rows kept."""
    prompts = [texts.prompt or "" for _, _, texts in kept]
    # One flat list of pairs for the tokenizer, taken apart again below by the number of responses of each row.
    befores = []
    afters = []
    for prompt, (_, _, texts) in zip(prompts, kept):
        befores += [prompt] * len(texts.responses)
        afters += texts.responses
    after_ids = iter(encode_after(tokenizer, befores, afters))
    for ids, (_, _, texts) in zip(encode(tokenizer, prompts), kept):
        yield ids, list(itertools.islice(after_ids, len(texts.responses)))


def cut_responses(responses, room):
    """Lists of ids cut to `room`. Raises SkipRow where nothing is left, or nothing that tells a pair's two apart."""
    kept = [response[:room] for response in responses]
    if not all(kept):
        raise SkipRow("no room for a response")
    if len(kept) == 2 and kept[0] == kept[1]:
        raise SkipRow("identical once cut")
    return kept


def usable_behaviour(texts, is_cut, counts, place):
    """A row's behaviour log-probs, NaN where they are of another response than its: one that was longer, or was not
    what the template made of it. What became of them is counted."""
    logps = []
    for logp, verbatim, cut in zip(texts.behaviour_logps, texts.verbatim, is_cut):
        usable = verbatim and not cut
        if not math.isnan(logp):
            kind = "kept" if usable else "dropped as the response was cut or edited"
            count_skip(counts.behaviour, kind, place)
        logps.append(logp if usable else math.nan)
    return logps


class TokenizedRows:
    """Data rows as token ids, memory-mapped from the file that load_rows wrote.

    rows[i] is a `row_type` (Pair, Example) of lists of ids: a prompt and what follows it. index (P,), int64: the number
    in the data of the row that each was made of. behaviour_logps (P, 2), float32, of pairs: read_behaviour of chosen
    and rejected, NaN also where a response was cut or edited; None of examples."""

    def __init__(self, row_type, path):
        file = open_safetensors(path)
        self.row_type = row_type
        self.ids = file.get_tensor("ids")
        self.index = file.get_tensor("index")
        # (P, parts + 1): where in `ids` the parts of a row begin, and where its last one ends.
        self.offsets = file.get_tensor("offsets")
        self.behaviour_logps = None
        if "behaviour_logps" in file.keys():
            self.behaviour_logps = file.get_tensor("behaviour_logps")

    def __len__(self):
        return len(self.index)

    def __getitem__(self, i):
        bounds = self.offsets[i].tolist()  # raises IndexError, which ends a `for`
        parts = [self.ids[begin:end].tolist() for begin, end in itertools.pairwise(bounds)]
        return self.row_type(*parts)


def load_rows(path, header, *, row_type, split, source, held_out, recipes, tokenizer, vocab_size, max_length,
              max_prompt_length):
    """Data as TokenizedRows, tokenized and cut once a run: rank 0 does it and writes `path`, all ranks map that file,
    and so does a run that resumes. No source: no rows.

    header: the run's, whose fingerprints the file is known by. source, held_out, recipes: see read_rows; split and the
    rest: see tokenize_rows. The report of skipped rows is said each time. Raises UserError where nothing is left, or
    the source was rewritten since it was hashed for the header."""
    if not source:
        return []
    noun = f"{row_type.__name__.lower()}s"
    key = f"{path.stem}-{noun}-{header['model']}-{header['data']}"

    def find_or_make():
        if path.exists():
            try:
                return read_tensors(path, key)[1]
            except UserError as error:
                print_rank0(f"{error}; made again")
        try:
            return make()
        except OSError as error:
            if error.filename:
                raise
            raise UserError(f"cannot make {path} of {source}: {error}") from None  # "No space left on device"

    def make():
        counts = RowCounts()
        rows = tqdm(read_rows(source, held_out, recipes), desc="tokenizing", disable=not sys.stderr.isatty())
        found = tokenize_rows(rows, split, counts, tokenizer=tokenizer, vocab_size=vocab_size, max_length=max_length,
                              max_prompt_length=max_prompt_length)
        # A million rows are more than memory should hold.
        with tempfile.TemporaryFile(dir=path.parent) as ids_file:
            index, offsets, logps = write_ids(found, ids_file)
            report = f"{source}: {len(index)} {noun} of {counts}"
            if not index:
                raise UserError(f"no usable {noun} in {report}")
            if source_sha256(source) != header["sources"][source]:
                raise UserError(f"{source} was rewritten while it was read: its rows are not those that the run's"
                                " fingerprint says; run it again")
            # Mapped, not read: safetensors writes them from the file's pages.
            ids = np.memmap(ids_file, np.int32, "r+")
            tensors = dict(ids=torch.as_tensor(ids), index=torch.tensor(index),
                           offsets=torch.tensor(offsets).view(len(index), -1))
            if logps:
                tensors["behaviour_logps"] = torch.tensor(logps, dtype=torch.float32).view(len(index), -1)
            write_tensors(path, tensors, key, report)
        return report

    print_rank0(on_rank_0(find_or_make))
    return TokenizedRows(row_type, path)


def write_ids(rows, file):
    """RowIds -> index, offsets, behaviour_logps of TokenizedRows, as arrays; their ids follow one another in `file`, as
    int32."""
    index = array("q")
    offsets = array("q")
    logps = array("d")
    end = 0
    for row in rows:
        index.append(row.number)
        logps.extend(row.behaviour_logps)
        offsets.append(end)
        for part in row.parts:
            array("i", part).tofile(file)
            end += len(part)
            offsets.append(end)
    file.flush()
    return index, offsets, logps
