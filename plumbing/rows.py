"""Files of JSON lines that a command makes row by row, and that a second run of it goes on with.

A row is on disk before the next are computed. OUT.about.json beside the rows OUT.jsonl says how they are made, so that
rows made otherwise are not taken for them.
"""

import itertools
import os
from operator import itemgetter

import torch.distributed as dist

from plumbing.data import read_jsonl
from plumbing.process import (UserError, lock_for_writing, make_directory, on_rank_0, print_rank0, read_json, read_text,
                              to_json, write_text)

FREE = ("out", "batch_size", "timeout", "threads", "concurrency")  # flags that change no result


def complete_rows(out, provenance, items, compute, fields, product=None):
    """The rows {index: row} of items {index: item} in the .jsonl file `out`. compute(the items that it lacks) yields
    lists of rows, which are on disk before more are computed; an item without a row is left out. A row has the `fields`
    {name: type}. All ranks call it.

    OUT.about.json holds the `provenance`, how the rows are made: a second run must be told the same, but for the flags
    FREE. UserError lists the differences, or says that `out`, or the file `product` that is made of its rows, stands
    there without it."""
    rows = on_rank_0(lambda: rows_so_far(out, provenance, fields, product or out))
    lacking = {index: item for index, item in items.items() if index not in rows}
    if not lacking:
        print_rank0(f"{out} is complete")
    for fresh in compute(lacking):
        append_rows(out, fresh)
        for row in fresh:
            rows[row["index"]] = row
    rows = {index: rows[index] for index in items if index in rows}
    on_rank_0(lambda: write_lines(out, rows.values()))
    return rows


def rows_so_far(out, provenance, fields, product):
    """What complete_rows begins with: the rows {index: row} that `out` holds, if they were made in the same way."""
    sidecar = out.with_suffix(".about.json")
    if sidecar.exists():
        before = read_json(sidecar)
        differences = []
        for key in sorted({*before, *provenance} - {*FREE}):
            if before.get(key) != provenance.get(key):
                differences.append(f"{key} was {before.get(key)!r}, is {provenance.get(key)!r}")
        if differences:
            raise UserError(f"{sidecar}: {out} was made otherwise: {'; '.join(differences)}. Choose another --out")
    else:
        for path in (out, product):
            if path.exists():
                raise UserError(f"{path} exists, and no {sidecar.name} says how it was made: choose another --out")
    rows = read_own_rows(out, fields, key=["index"])
    write_json(sidecar, provenance)
    return rows


def read_own_rows(path, fields, key):
    """{values of the fields `key`: row} of a .jsonl file, which is locked from now on. A line that a kill cut in two is
    dropped, and of rows of one key the first is kept. Raises UserError, leaving it as it is, for a file of somebody
    else's or one that was edited: a row of ours has the `fields` {name: type}, the first at its head."""
    make_directory(path.parent)
    lock_for_writing(path)
    text = path.read_bytes() if path.exists() else b""
    begins = f'{{"{next(iter(fields))}": '.encode()
    if not begins.startswith(text[: len(begins)]):
        raise UserError(f"{path}:1: not a row of ours: give --out a file of its own")
    lines = read_whole_lines(path) if text else []
    rows = {}
    for where, row in lines:
        for name, kind in fields.items():
            if name not in row or not isinstance(row[name], kind):
                raise UserError(f"{where}: not a row of ours: {name} is {row.get(name)!r:.40}: mend or delete it")
        rows.setdefault(itemgetter(*key)(row), row)
    if len(rows) < len(lines):
        print_rank0(f"{path}: {len(lines) - len(rows)} rows stood there twice: the first of each is kept")
    if text and (len(rows) < len(lines) or not text.endswith(b"\n")):
        write_lines(path, rows.values())
    return rows


def read_whole_lines(path):
    """[("file:line", row)] of a JSON-lines file, without a last line that a kill cut in two."""
    n_whole = path.read_bytes().count(b"\n")
    return list(itertools.islice(read_jsonl(path), n_whole))


def append_rows(out, rows):
    """Add JSON lines, on rank 0; on disk when it returns. Raises UserError, which names the file, on a full disk."""
    if dist.get_rank() == 0:
        try:
            with open(out, "a", encoding="utf-8") as file:
                file.write(as_lines(rows))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"cannot write {out}: {error}; the rows before are kept") from None


def write_once(path, text):
    """A file that is made of finished rows -> " is complete" if it stood there. Raises UserError if it was changed."""
    stood_there = path.exists()
    if stood_there and read_text(path) != text:
        raise UserError(f"{path} holds something else than this command writes there: choose another --out")
    write_text(path, text)
    return " is complete" if stood_there else ""


def as_lines(rows):
    return "".join(to_json(row) + "\n" for row in rows)


def write_lines(path, rows):
    write_text(path, as_lines(rows))


def write_json(path, content):
    write_text(path, to_json(content, indent=2) + "\n")
