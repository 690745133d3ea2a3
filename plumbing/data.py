"""From files and Hub datasets to rows, from rows to texts (chat templates), from texts to token ids."""

import dataclasses
import gzip
import importlib
import itertools
import json
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

from plumbing.process import UserError, on_rank_0, open_safetensors, print_rank0, read_tensors, write_tensors


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
    # A file whose own name has a plus is that file.
    parts = [source] if Path(source).exists() else source.split("+")
    for part in parts:
        if part.endswith((".jsonl", ".json", ".gz")):
            yield from read_jsonl(Path(part))
        else:
            yield from read_dataset(part, held_out, recipes)


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
TODAY = date(2024, 7, 26)  # for templates that write it (Llama 3.2's own default): a run is the same on any day


def load_tokenizer(directory):
    """The tokenizer of a model directory: AutoTokenizer's, or meta_tokenizer's where there is only a tokenizer.model.
    Raises UserError where transformers can load none, or one without EOS."""
    from transformers import AutoTokenizer

    try:
        if (directory / "tokenizer.model").exists() and not list(directory.glob("tokenizer*.json")):
            tokenizer = meta_tokenizer(directory / "tokenizer.model")
        else:
            tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a broken file leads to; `tokenizers` itself raises no other class
        raise UserError(f"{directory}: no tokenizer that transformers can load (a SentencePiece model needs its"
                        f" tokenizer.json): {error}") from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"{directory}: the tokenizer has no EOS token; set eos_token in tokenizer_config.json")
    return tokenizer


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


def encode(tokenizer, texts, vocab_size):
    """Texts -> lists of ids, without BOS and EOS. Special tokens written in the text are parsed, as everywhere in
    transformers: prompts come already rendered. Raises UserError for an id that the model does not have."""
    if not texts:
        return []  # of which transformers would make an IndexError
    ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    largest = max(tokenizer.eos_token_id, tokenizer.bos_token_id or 0)
    for text_ids in ids:
        largest = max(largest, *text_ids, 0)
    if largest >= vocab_size:
        raise UserError(f"token id {largest} is outside the model's vocabulary of {vocab_size}: the tokenizer belongs"
                        " to another model")
    return ids


def encode_after(tokenizer, befores, texts, vocab_size):
    """Ids that texts have after the texts before them: SentencePiece begins a text on its own with a space of its own.

    Where the two merge across their border (a prompt that ends with a space) the prompt keeps its ids, and the text has
    those that it has at the beginning of a line. Raises UserError for an id that the model does not have."""
    # The last words decide, at a fraction of a long prompt's cost.
    befores = [before[-64:] for before in befores]
    heads = encode(tokenizer, befores, vocab_size)
    wholes = encode(tokenizer, [before + text for before, text in zip(befores, texts)], vocab_size)
    line_start = "\n" if begins_with_a_space(tokenizer) else ""
    found = []
    for text, head, whole in zip(texts, heads, wholes):
        if whole[: len(head)] != head:
            head, whole = encode(tokenizer, [line_start, line_start + text], vocab_size)
        found.append(whole[len(head) :])
    return found


def begins_with_a_space(tokenizer):
    """Does the tokenizer write a space of its own before a text, as SentencePiece does, but not before a line's?"""
    alone, second_line = tokenizer(["a", "\na"], add_special_tokens=False)["input_ids"]
    return second_line[-len(alone) :] != alone


def stop_ids(tokenizer):
    """The ids that may end a response: special tokens that neither begin a text nor stand for padding or unknowns."""
    special = {k for k, token in tokenizer.added_tokens_decoder.items() if token.special}
    special -= {tokenizer.bos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id}
    return special | {tokenizer.eos_token_id}


def truncate_prompt(ids, tokenizer, limit):
    """One BOS, if the tokenizer has one, then the prompt's end, at most `limit` ids -> ids, how many were cut."""
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    if bos and ids[:1] == bos:
        ids = ids[1:]  # a chat template wrote it
    excess = max(0, len(bos) + len(ids) - limit)
    return bos + ids[excess:], excess


def ensure_stop(ids, tokenizer, stops):
    """A response ends with the stop that the template or the sampler put there; EOS where there is none."""
    if not ids or ids[-1] not in stops:
        ids = ids + [tokenizer.eos_token_id]
    if len(ids) == 1:
        raise SkipRow("empty response")
    return ids


def apply_template(tokenizer, messages, tools, *, add_generation_prompt):
    """Messages as the text that the chat template gives. Raises SkipRow; UserError if there is no template."""
    if tokenizer.chat_template is None:
        raise UserError("the data is conversational, but the tokenizer has no chat template: use an instruct model's"
                        " tokenizer, or data with text prompts")
    try:
        if isinstance(tools, str):
            tools = json.loads(tools or "null")
        # Templates ask `if tools is not none`: a row without any must not say [].
        tools = tools or None
        return tokenizer.apply_chat_template(messages, chat_template=pin_date(tokenizer.get_chat_template(tools=tools)),
                                             tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt)
    except Exception as error:  # a template is a program: it may raise anything
        raise SkipRow(f"refused by the chat template ({' '.join(str(error).split())[:80]})") from None


def pin_date(template):
    """A chat template whose calls of strftime_now tell TODAY: transformers' function of that name tells the day, and no
    other can be given in its place."""
    call = r"""strftime_now\((["'])(.*?)\1\)"""
    return re.sub(call, lambda match: repr(TODAY.strftime(match[2])), template)


def render_chat(tokenizer, prompt, response, tools=None):
    """Lists of {role, content} -> prompt text, response text by the tokenizer's chat template, up to the stop that
    ends the turn. Raises SkipRow; UserError if there is no template."""
    messages = prompt + response
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise SkipRow("wrong types")
        if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
            raise SkipRow("wrong types")
    if not prompt or not response or response[0]["role"] != "assistant":
        raise SkipRow("prompt mismatch")
    if not any((message.get("content") or "").strip() or message.get("tool_calls") for message in response):
        raise SkipRow("empty response")
    prompt_text = apply_template(tokenizer, prompt, tools, add_generation_prompt=True)
    whole = apply_template(tokenizer, messages, tools, add_generation_prompt=False)
    if not whole.startswith(prompt_text):
        raise SkipRow("chat template does not continue the prompt")
    response_text = whole[len(prompt_text) :]
    # Many templates write a line break after the stop, which no model is to learn: generation is over by then.
    stops = tuple(tokenizer.convert_ids_to_tokens(sorted(stop_ids(tokenizer))))
    if response_text.rstrip().endswith(stops):
        response_text = response_text.rstrip()
    return prompt_text, response_text


def assistant_stop_id(tokenizer):
    """The id that ends an assistant's turn in the chat template; EOS where there is no template or it writes none."""
    prompt = [dict(role="user", content="a")]
    response = [dict(role="assistant", content="b")]
    try:
        _, text = render_chat(tokenizer, prompt, response)
    except (SkipRow, UserError):
        return tokenizer.eos_token_id
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ensure_stop(ids, tokenizer, stop_ids(tokenizer))[-1]


# ---------------------------------------------------------------------------------------- rows as token ids, once a run
BATCH = 1000  # rows tokenized together: tokenizers use all cores


@dataclasses.dataclass
class RowCounts:
    """What became of the rows of a data set: how many there were; those skipped and cut by kind, see count_skip."""

    rows: int = 0
    skipped: dict = dataclasses.field(default_factory=dict)
    cut: dict = dataclasses.field(default_factory=dict)

    def __str__(self):
        return f"{self.rows} rows; skipped: {describe_skips(self.skipped)}; cut: {describe_skips(self.cut)}"


class RowTexts(NamedTuple):
    """A data row split: prompt, a text, or None where the one response is plain text that is learned whole."""

    number: int
    place: str
    prompt: str | None
    responses: list


class RowIds(NamedTuple):
    """A data row tokenized: its number in the data, [prompt ids, response ids, ..]."""

    number: int
    parts: list


def tokenize_rows(rows, split, counts, *, tokenizer, vocab_size, max_length, max_prompt_length):
    """Yield RowIds of the rows [(place, row)] that can be used; the others are counted in `counts`.

    split(row, tokenizer) -> prompt text or None, response texts; raises SkipRow. A prompt is cut to `max_prompt_length`
    ids, of which it keeps the end, then a response to what of `max_length` is left, of which it loses its own."""
    numbered = enumerate(rows)
    while batch := list(itertools.islice(numbered, BATCH)):
        counts.rows += len(batch)
        texts = split_rows(batch, split, tokenizer, counts)
        prompts = encode(tokenizer, [row.prompt or "" for row in texts], vocab_size)
        befores = []
        afters = []
        for row in texts:
            befores += [row.prompt or ""] * len(row.responses)
            afters += row.responses
        responses = iter(encode_after(tokenizer, befores, afters, vocab_size))
        stops = stop_ids(tokenizer)
        for row, prompt in zip(texts, prompts):
            own = list(itertools.islice(responses, len(row.responses)))
            prompt, n_cut = truncate_prompt(prompt, tokenizer, max_prompt_length)
            # Of plain text the first token is given, as nothing predicts it: BOS, which may be written there already.
            if row.prompt is None and own[0][:1] == prompt:
                own = [own[0][1:]]
            try:
                if not prompt and row.prompt is not None:
                    raise SkipRow("empty prompt")
                whole = [ensure_stop(response, tokenizer, stops) for response in own]
                kept = cut_responses(whole, max_length - len(prompt))
            except SkipRow as kind:
                count_skip(counts.skipped, kind, row.place)
                continue
            if n_cut:
                count_skip(counts.cut, "prompt", row.place)
            for before, after in zip(whole, kept):
                if before != after:
                    count_skip(counts.cut, "response", row.place)
            yield RowIds(row.number, [prompt, *kept])


def split_rows(batch, split, tokenizer, counts):
    """[(number, (place, row))] -> RowTexts of those that can be used; the others are counted."""
    texts = []
    for number, (place, row) in batch:
        try:
            prompt, responses = split(row, tokenizer)
            # JSON can hold half of a surrogate pair; no tokenizer takes it.
            "".join([prompt or "", *responses]).encode()
            texts.append(RowTexts(number, place, prompt, responses))
        except SkipRow as kind:
            count_skip(counts.skipped, kind, place)
        except UnicodeEncodeError:
            count_skip(counts.skipped, "broken Unicode", place)
    return texts


def cut_responses(responses, room):
    """Lists of ids cut to `room`. Raises SkipRow where nothing is left, or nothing that tells a pair's two apart."""
    kept = [response[:room] for response in responses]
    if not all(kept):
        raise SkipRow("no room for a response")
    if len(kept) == 2 and kept[0] == kept[1]:
        raise SkipRow("identical once cut")
    return kept


class TokenizedRows:
    """Data rows as token ids, memory-mapped from the file that load_rows wrote.

    rows[i] is a `row_type` (Pair, Example) of lists of ids: a prompt and what follows it. index (P,), int64: the number
    in the data of the row that each was made of."""

    def __init__(self, row_type, path):
        file = open_safetensors(path)
        self.row_type = row_type
        self.ids = file.get_tensor("ids")
        self.index = file.get_tensor("index")
        # (P, parts + 1): where in `ids` the parts of a row begin, and where its last one ends.
        self.offsets = file.get_tensor("offsets")

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
    rest: see tokenize_rows. The report of skipped rows is said each time. Raises UserError where nothing is left."""
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
        counts = RowCounts()
        rows = tqdm(read_rows(source, held_out, recipes), desc="tokenizing", disable=not sys.stderr.isatty())
        found = tokenize_rows(rows, split, counts, tokenizer=tokenizer, vocab_size=vocab_size, max_length=max_length,
                              max_prompt_length=max_prompt_length)
        # A million rows are more than memory should hold.
        with tempfile.TemporaryFile(dir=path.parent) as ids_file:
            index, offsets = write_ids(found, ids_file)
            report = f"{source}: {len(index)} {noun} of {counts}"
            if not index:
                raise UserError(f"no usable {noun} in {report}")
            ids = np.memmap(ids_file, np.int32, "r+")
            tensors = dict(ids=torch.as_tensor(ids), index=torch.tensor(index),
                           offsets=torch.tensor(offsets).view(len(index), -1))
            write_tensors(path, tensors, key, report)
        return report

    print_rank0(on_rank_0(find_or_make))
    return TokenizedRows(row_type, path)


def write_ids(rows, file):
    """RowIds -> index, offsets of TokenizedRows, as arrays; their ids follow one another in `file`, as int32."""
    index = array("q")
    offsets = array("q")
    end = 0
    for row in rows:
        index.append(row.number)
        offsets.append(end)
        for part in row.parts:
            array("i", part).tofile(file)
            end += len(part)
            offsets.append(end)
    file.flush()
    return index, offsets
