"""The README's whole chain, word for word but for paths and sizes: demonstrations to figures, on rows of the toy task."""

import gzip
import itertools
import json
import re
import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHAIN = re.search(r"<!-- chain -->\n((?:    .*\n)+)", (ROOT / "README.md").read_text())[1]
# So that a step says something in seconds; what README's line gives is not touched.
SMALL = {"train_sft.py": "--max_steps 3 --batch_size 8 --lr 1e-3 --threads 1", "train_rm.py": "--max_steps 3 --batch_size 8 --lr 1e-3 --threads 1",
         "train_pref.py": "--batch_size 8 --lr 1e-3 --threads 1", "sample": "--max_new_tokens 24 --threads 1", "label": "--threads 1",
         "golden": "--max_new_tokens 24 --threads 1", "plot": ""}


def rows_of(name, n, *columns):
    with gzip.open(ROOT / "toy" / f"{name}.jsonl.gz", "rt") as file:
        for line in itertools.islice(file, n):
            row = json.loads(line)
            yield {column: row[column] for column in columns or row}


def test_the_chain(run_script, tmp_path):
    tmp_path = tmp_path / "a folder"  # what a command says is next can be pasted
    tmp_path.mkdir()
    files = {"demonstrations.jsonl": rows_of("sft", 40), "labelled.jsonl": rows_of("rm_pairs", 40), "prompts.jsonl": rows_of("truth_pairs", 40, "prompt"),
             "held_out.jsonl": rows_of("pairs_eval", 12)}
    for name, rows in files.items():
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [shlex.split(line) for line in CHAIN.splitlines()]
    assert len(lines) == 8
    for python, script, *words in lines:
        assert python == "python"
        small = SMALL[words[0] if script == "evaluate.py" else script]
        words = [str(ROOT / "toy" / "sft") if word == "BASE" else word for word in words]
        words = [str(tmp_path / word) if word.startswith("out/") or word in files else word for word in words]
        said = run_script(script.removesuffix(".py"))(*words, *small.split()).ok().out
        assert "next: " in said or words[0] == "plot", f"{script} {words[:1]} does not say what comes next"
        for line in said.splitlines():
            if line.startswith("next: "):
                assert all("a folder" in word for word in shlex.split(line) if "folder" in word), line
    # Each arrow is a file, and the last of them a figure with both losses at more than one distance from the reference.
    pairs = [json.loads(line) for line in (tmp_path / "out" / "pairs.jsonl").read_text().splitlines()]
    assert 8 <= len(pairs) <= 40 and all(pair["chosen_reward"] > pair["rejected_reward"] for pair in pairs)
    points = [json.loads(line) for line in (tmp_path / "out" / "figs" / "figure4.jsonl").read_text().splitlines()]
    assert {point["loss"] for point in points} == {"dpo", "is_dpo"} and len({point["step"] for point in points}) > 2
    assert all((tmp_path / "out" / "figs" / f"figure{k}.png").stat().st_size > 10_000 for k in (3, 4, 6))
