"""From files and Hub datasets to rows, from rows to texts (chat templates), from texts to token ids."""

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

import numpy as np
import torch
from tqdm import tqdm

from plumbing.process import UserError, on_rank_0, open_safetensors, read_tensors, print_rank0, write_tensors


# ----------------------------------------------------------------------------------------------------------------- rows
class SkipRow(Exception):
    """This data row cannot be used; the message is the kind it is counted under."""


def count_skip(kinds, kind, where):
    """One more of a kind; the place of the first is kept."""
    kinds.setdefault(str(kind), [0, where])[0] += 1


def describe_skips(kinds):
    return ", ".join(f"{n} {kind} (first {where})" for kind, (n, where) in kinds.items()) or "none"


def read_rows(source, held_out, recipes):
    """Yield (where, row) of JSON, .csv or .parquet files, recipes' names, Hub ids or directories; `a+b` pools."""
    for part in [source] if Path(source).exists() else source.split("+"):
        if part.endswith((".jsonl", ".json", ".gz")):
            yield from read_jsonl(Path(part))
            continue
        name, train, test, columns = recipes.get(part, (part, "train", "test", None))
        kind = Path(part).suffix.removeprefix(".")
        try:
            load_dataset = importlib.import_module("datasets").load_dataset
            if kind in ("csv", "parquet"):
                rows = load_dataset(kind, data_files=part, split="train")
            else:
                rows = load_dataset(name, split=test if held_out else train)
            rows = rows.select_columns(list(columns)) if columns else rows
        except Exception as error:  # not installed, not there: `datasets` has classes of its own
            raise UserError(f"{part}: no JSON file or recipe ({', '.join(recipes)}), and `datasets` (pip install"
                            f" datasets) cannot read it: {error}") from None
        yield from ((f"{part}[{number}]", row) for number, row in enumerate(rows))


def read_jsonl(path):
    """Yield ("file:line", object) of a file of JSON lines or of one JSON array. Lines end at line feeds only: U+2028
    may stand inside a string. By hand, not by `datasets`: it names no line, and refuses a file for one row."""
    number = 0
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            first = file.readline().strip()
            file.seek(0)
            for number, line in enumerate([file.read()] if first[:1] == b"[" and first[-1:] != b"]" else file, 1):
                if line.strip():
                    rows = json.loads(line)
                    is_array = isinstance(rows, list) and any(isinstance(row, dict) for row in rows)
                    for row in rows if is_array else [rows]:
                        yield f"{path}:{number}", row if isinstance(row, dict) else {}
    except (ValueError, RecursionError) as error:  # json.JSONDecodeError, UnicodeDecodeError
        raise UserError(f"{path}:{number}: not JSON: {error}") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: broken after line {number}: {error}") from None


# ---------------------------------------------------------------------------------------- tokenizers and chat templates
TODAY = date(2024, 7, 26)  # for templates that write it (Llama 3.2's own default): a run is the same on any day


def load_tokenizer(directory):
    """The tokenizer of a model directory: AutoTokenizer, or for a directory with nothing but Meta's tokenizer.model
    (tiktoken's format) the same ids through transformers' converter, whose split pattern is Llama 3's."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    names = ["begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1",
             "finetune_right_pad_id", "step_id", "start_header_id", "end_header_id", "eom_id", "eot_id", "python_tag",
             "image", *(f"reserved_special_token_{k}" for k in range(2, 246))]  # 256 in all
    bos, eos, *_ = special = [f"<|{name}|>" for name in names]
    meta = directory / "tokenizer.model"
    os.environ["TIKTOKEN_CACHE_DIR"] = ""  # its cache goes by path: it would miss that another file stands there now
    try:
        if meta.exists() and not list(directory.glob("tokenizer*.json")):
            backend = TikTokenConverter(str(meta), extra_special_tokens=special).converted()
            bos_id = backend.token_to_id(bos)
            backend.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, bos_id)])
            tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos)
        else:
            tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a broken file leads to; `tokenizers` itself raises no other class
        raise UserError(f"{directory}: no tokenizer that transformers can load (a SentencePiece model needs its"
                        f" tokenizer.json): {error}") from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"{directory}: the tokenizer has no EOS token; set eos_token in tokenizer_config.json")
    return tokenizer


def encode(tokenizer, texts, vocab_size):
    """Texts -> lists of ids, without BOS and EOS. Special tokens written in the text are parsed, as everywhere in
    transformers: prompts come already rendered. Raises UserError for an id that the model does not have."""
    ids = tokenizer([*texts, ""], add_special_tokens=False, verbose=False)["input_ids"][: len(texts)]
    largest = max(tokenizer.eos_token_id, tokenizer.bos_token_id or 0, *map(max, filter(None, ids)), 0)
    if largest >= vocab_size:
        raise UserError(f"token id {largest} is outside the model's vocabulary of {vocab_size}: the tokenizer belongs"
                        " to another model")
    return ids


def encode_after(tokenizer, befores, texts, vocab_size):
    """Ids that texts have after what stands before them: SentencePiece begins a text on its own with a space. Where the
    two merge across their border: after a line break; where that merges too, on its own."""
    befores = [before[-64:] for before in befores]  # its last words decide, at a fraction of a long prompt's cost
    heads = encode(tokenizer, befores, vocab_size)
    found = encode(tokenizer, [before + text for before, text in zip(befores, texts)], vocab_size)
    for k, (head, ids) in enumerate(zip(heads, found)):
        for before in ("\n", ""):
            if ids[: len(head)] != head:
                head, ids = encode(tokenizer, [before, before + texts[k]], vocab_size)
        found[k] = ids[len(head) :]
    return found


def stop_ids(tokenizer):
    """The ids that may end a response: special tokens that neither begin a text nor stand for padding or unknowns."""
    special = {k for k, token in tokenizer.added_tokens_decoder.items() if token.special}
    return special - {tokenizer.bos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id} | {tokenizer.eos_token_id}


def truncate_prompt(ids, tokenizer, limit):
    """One BOS, if the tokenizer has one, then the prompt's end, at most `limit` ids -> ids, how many were cut."""
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = ids[1:] if bos and ids[:1] == bos else ids  # a chat template may have written it
    excess = max(0, len(bos) + len(ids) - limit)
    return bos + ids[excess:], excess


def ensure_stop(ids, tokenizer, stops):
    """A response ends with the stop that the template or the sampler put there; EOS where there is none."""
    ids = ids if ids and ids[-1] in stops else ids + [tokenizer.eos_token_id]
    if len(ids) == 1:
        raise SkipRow("empty response")
    return ids


def apply_template(tokenizer, messages, tools, **kwargs):
    """Messages as the text that the chat template gives. Raises SkipRow; UserError if there is no template."""
    if tokenizer.chat_template is None:
        raise UserError("the data is conversational, but the tokenizer has no chat template: use an instruct model's"
                        " tokenizer, or data with text prompts")
    try:
        kwargs["tools"] = (json.loads(tools or "null") if isinstance(tools, str) else tools) or None
        template = re.sub(r"""strftime_now\((["'])(.*?)\1\)""", lambda call: repr(TODAY.strftime(call[2])),
                          tokenizer.get_chat_template(tools=kwargs["tools"]))
        return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **kwargs)
    except Exception as error:  # a template is a program: it may raise anything
        raise SkipRow(f"refused by the chat template ({' '.join(str(error).split())[:80]})") from None


def render_chat(tokenizer, prompt, response, tools=None):
    """Lists of {role, content} -> prompt text, response text by the tokenizer's chat template, up to the stop that
    ends the turn. Raises SkipRow; UserError if there is no template."""
    messages = prompt + response
    if not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages) or not all(
            isinstance(m.get("content"), str) or m.get("tool_calls") for m in messages):
        raise SkipRow("wrong types")
    if not prompt or not response or response[0]["role"] != "assistant":
        raise SkipRow("prompt mismatch")
    if not any((m.get("content") or "").strip() or m.get("tool_calls") for m in response):
        raise SkipRow("empty response")
    prompt_text = apply_template(tokenizer, prompt, tools, add_generation_prompt=True)
    text = apply_template(tokenizer, messages, tools)
    if not text.startswith(prompt_text):
        raise SkipRow("chat template does not continue the prompt")
    stops = tuple(tokenizer.convert_ids_to_tokens(sorted(stop_ids(tokenizer))))
    text = text[len(prompt_text) :]
    return prompt_text, text.rstrip() if text.rstrip().endswith(stops) else text


def assistant_stop_id(tokenizer):
    """The id that ends an assistant's turn in the chat template; EOS where there is no template or it writes none."""
    try:
        _, text = render_chat(tokenizer, [dict(role="user", content="a")], [dict(role="assistant", content="b")])
    except (SkipRow, UserError):
        return tokenizer.eos_token_id
    return ensure_stop(tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer, stop_ids(tokenizer))[-1]


# ---------------------------------------------------------------------------------------- rows as token ids, once a run
class TokenizedRows:
    """Data rows as token ids, memory-mapped: rows[i] is a `kind` (Pair, Example) of lists of ids, a prompt and what
    follows it; index (P,) is the data row of each."""

    def __init__(self, kind, path):
        self.kind, file = kind, open_safetensors(path)
        self.ids, self.index, self.offsets = (file.get_tensor(name) for name in ("ids", "index", "offsets"))

    def __len__(self):
        return len(self.index)

    def __getitem__(self, i):
        bounds = self.offsets[i].tolist()  # raises IndexError, which ends a `for`
        return self.kind(*(self.ids[a:b].tolist() for a, b in zip(bounds, bounds[1:])))


def load_rows(path, header, kind, split, source, held_out, recipes, *limits):
    """Read, tokenize and cut data, once a run: rank 0 does it and writes `path`, all ranks map that file, and so does a
    run that resumes. For split and limits see tokenize_rows. -> TokenizedRows. The report of skipped rows, by kind with
    the place of the first, is said each time. No source: no rows. Raises UserError where nothing is left."""
    if not source:
        return []
    noun = f"{kind.__name__.lower()}s"
    key = f"{path.stem}-{noun}-{header['model']}-{header['data']}"

    def make():
        if path.exists():
            try:
                return read_tensors(path, key)[1]
            except UserError as error:
                print_rank0(f"{error}; made again")
        kinds, index, offsets, n = dict(skipped={}, cut={}), array("q"), array("q"), 0
        rows = enumerate(tqdm(read_rows(source, held_out, recipes), "tokenizing", disable=not sys.stderr.isatty()))
        with tempfile.TemporaryFile(dir=path.parent) as ids:  # a million rows are more than memory should hold
            while batch := list(itertools.islice(rows, 1000)):
                for number, parts in tokenize_rows(batch, kinds, split, *limits):
                    bounds = itertools.accumulate(map(len, parts), initial=offsets[-1] if offsets else 0)
                    offsets.extend(bounds)
                    index.append(number)
                    array("i", itertools.chain(*parts)).tofile(ids)
                n = batch[-1][0] + 1
            told = "; ".join(f"{what}: {describe_skips(found)}" for what, found in kinds.items())
            report = f"{source}: {len(index)} {noun} of {n} rows; {told}"
            if not index:
                raise UserError(f"no usable {noun} in {report}")
            ids.flush()
            tensors = dict(ids=torch.as_tensor(np.memmap(ids, np.int32, "r+")), index=torch.tensor(index),
                           offsets=torch.tensor(offsets).view(len(index), -1))
            write_tensors(path, tensors, key, report)
        return report

    print_rank0(on_rank_0(make))
    return TokenizedRows(kind, path)


def tokenize_rows(batch, kinds, split, tokenizer, vocab_size, max_length, max_prompt_length):
    """A batch of (number, (where, row)), tokenized together: tokenizers use all cores. split(row, tokenizer) -> prompt
    text or None, response texts. Yields (number, [prompt ids, response ids, ..]); the prompt keeps its end, a response
    that does not fit loses its own. What is skipped and cut is counted in `kinds`."""
    kept, stops = [], stop_ids(tokenizer)
    for number, (where, row) in batch:
        try:
            prompt, responses = split(row, tokenizer)
            "".join([prompt or "", *responses]).encode()
            kept.append((number, where, prompt, responses))
        except SkipRow as kind:
            count_skip(kinds["skipped"], kind, where)
        except UnicodeEncodeError:  # half of a surrogate pair: JSON can hold it, no tokenizer takes it
            count_skip(kinds["skipped"], "broken Unicode", where)
    prompts = encode(tokenizer, [prompt or "" for _, _, prompt, _ in kept], vocab_size)
    pairs = [(prompt or "", response) for _, _, prompt, responses in kept for response in responses]
    after = iter(encode_after(tokenizer, *map(list, zip(*pairs)), vocab_size) if pairs else [])
    for (number, where, prompt, responses), ids in zip(kept, prompts):
        responses = [next(after) for _ in responses]
        ids, excess = truncate_prompt(ids, tokenizer, max_prompt_length)
        if prompt is None and responses[0][:1] == ids:  # plain text: its first token is given, be it BOS or not
            responses = [responses[0][1:]]
        try:
            if not ids and prompt is not None:
                raise SkipRow("empty prompt")
            whole = [ensure_stop(response, tokenizer, stops) for response in responses]
            cut = [response[: max_length - len(ids)] for response in whole]
            if not all(cut):
                raise SkipRow("no room for a response")
            if len(cut) == 2 and cut[0] == cut[1]:
                raise SkipRow("identical once cut")
        except SkipRow as kind:
            count_skip(kinds["skipped"], kind, where)
            continue
        for what in ["prompt"] * bool(excess) + ["response"] * sum(a != b for a, b in zip(whole, cut)):
            count_skip(kinds["cut"], what, where)
        yield number, [ids, *cut]
