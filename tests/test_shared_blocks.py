"""Blocks that scripts share stand byte-identical between their fences.

    python -m pytest tests/test_shared_blocks.py             # check
    python tests/test_shared_blocks.py --fix train_pref.py   # copy train_pref.py's blocks to the scripts its fences name
"""

import argparse
import ast
import difflib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PLUMBING = sorted((ROOT / "plumbing").glob("*.py"))
BLOCK = re.compile(r"^# --- shared: (?P<name>\w+) \((?P<scripts>[\w, ]+)\) ---\n.*?^# --- end shared: (?P=name) ---\n", re.S | re.M)
# What each script says for itself: its entry point, its flags and what their values stand for.
OWN = {"main", "parse_args", "PAPER", "PRESETS", "RECIPES", "MADE_BY"}


HEADING = re.compile(r"^# =+ Shared by the scripts: read it once\n", re.M)
COLUMNS = 120
# The rooms of plumbing/ and those that each may import from.
ROOMS = {"__init__": set(), "process": set(), "data": {"process"}, "checkpoint": {"process"},
         "run": {"process", "data", "checkpoint"}, "rows": {"process", "data"}, "server": {"process"},
         "one_file": set()}


def scripts(root=ROOT):
    return {path.stem: path.read_text() for path in sorted(root.glob("*.py"))}


def blocks(text):
    """{block name: (scripts that its fence names, whole text)}"""
    return {m["name"]: (m["scripts"].split(", "), m[0]) for m in BLOCK.finditer(text)}


def top_level(text):
    """{name: source} of the functions, classes and constants outside the fences."""
    text = BLOCK.sub("", text)
    found = {}
    for node in ast.parse(text).body:
        names = [node.name] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else []
        if isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        start = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        found |= {name: "\n".join(text.splitlines()[start - 1 : node.end_lineno]) for name in names}
    return found


def problems(texts):
    """What is wrong, as texts with unified diffs; [] if nothing is."""
    found, first = [], {}
    for script, text in texts.items():
        fences = len(re.findall(r"^# --- (end )?shared: ", text, re.M))
        if fences != 2 * len(blocks(text)) or len(BLOCK.findall(text)) != len(blocks(text)):
            found.append(f"{script}.py: a fence has no partner, or a block stands twice")
        for name, (members, block) in blocks(text).items():
            if script not in members:
                found.append(f"{script}.py holds the block {name}, but its fence names {members}")
            other = first.setdefault(name, (script, members, block))
            if block != other[2]:
                diff = difflib.unified_diff(other[2].splitlines(), block.splitlines(), f"{other[0]}.py", f"{script}.py", lineterm="")
                found.append(f"block {name} differs:\n" + "\n".join(diff))
    for name, (script, members, _) in first.items():
        for member in members:
            if name not in blocks(texts.get(member, "")):
                found.append(f"block {name} of {script}.py is missing in {member}.py, which its fence names")
    tops = {script: top_level(text) for script, text in texts.items()}
    for a in tops:
        for b in tops:
            for name in sorted((tops[a].keys() & tops[b].keys()) - OWN):
                if a < b and tops[a][name] != tops[b][name]:
                    found.append(f"{a}.py and {b}.py both define {name}, differently: make it the same or rename one")
    return found


def test_shared_blocks():
    texts = scripts()
    assert len(texts) >= 2 and all(blocks(text) for text in texts.values())
    assert not (found := problems(texts)), "\n\n".join(found)


def test_a_difference_is_seen():
    texts = scripts()
    name = next(iter(texts))
    block = next(iter(blocks(texts[name]).values()))[1]
    line = block.splitlines()[2]
    changed = {**texts, name: texts[name].replace(block, block.replace(line, line + "  # changed", 1))}
    assert any("differs" in p and "+" in p for p in problems(changed))
    assert any("missing" in p for p in problems({**texts, name: texts[name].replace(block, "")}))
    renamed = re.sub(r"\(\w+(, \w+)*\) ---", "(nobody) ---", texts[name], count=1)
    assert any("its fence names" in p for p in problems({**texts, name: renamed}))
    assert any("no partner" in p for p in problems({**texts, name: texts[name].replace("# --- end shared: ", "#", 1)}))
    assert any("both define" in p for p in problems({n: t + f"\nLIMIT = {n!r}\n" for n, t in texts.items()}))


def imported(text):
    """Names of the modules that a source imports, wherever."""
    nodes = list(ast.walk(ast.parse(text)))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {node.module for node in nodes if isinstance(node, ast.ImportFrom)}


def test_scripts_import_no_script():
    for script, text in scripts().items():
        assert not {m.split(".")[0] for m in imported(text)} & set(scripts()), f"{script}.py imports a script"


def test_imports_go_one_way():
    """process <- data, checkpoint <- run, and nothing else of ours; scripts take names from the rooms, not the rooms,
    for plumbing/one_file.py joins them."""
    assert {path.stem for path in PLUMBING} == ROOMS.keys()
    for path in PLUMBING:
        ours = {m for m in imported(path.read_text()) if m.split(".")[0] in ("plumbing", "kernels", *scripts())}
        assert ours <= {f"plumbing.{room}" for room in ROOMS[path.stem]}, path.name
    for script, text in scripts().items():
        assert not re.search(r"(?m)^\s*(import (plumbing|kernels)|from (plumbing|kernels) import)", text), script


def test_every_name_stands_once():
    """In whatever is joined into one file: scripts with plumbing and kernel."""
    rooms = {path.name: top_level(path.read_text()) for path in [*PLUMBING, ROOT / "kernels" / "logprob.py"]}
    for script, text in scripts().items():
        names = [name for part in [*rooms.values(), dict.fromkeys([*top_level(text), *shared_names(text)])] for name in part]
        assert len(names) == len(set(names)), (script, [name for name in set(names) if names.count(name) > 1])


def shared_names(text):
    return [name for _, block in blocks(text).values() for name in top_level(block.replace("# --- ", "# "))]


def out_of_place(text):
    """What of a script's shared blocks, but its losses, stands outside one last stretch under the one heading."""
    held = {name: block for name, (_, block) in blocks(text).items() if name != "losses"}
    if not held:
        return [] if not HEADING.search(text) else ["a heading without blocks"]
    before, *stretches = HEADING.split(text)
    if len(stretches) != 1:
        return [f"{len(stretches)} headings"]
    found = [f"{name} stands before the heading" for name, block in held.items() if block in before]
    left = BLOCK.sub("", stretches[0]).replace('if __name__ == "__main__":\n    run_main(main)\n', "").strip()
    return found + ([f"between or after the blocks: {left[:200]}"] if left else [])


@pytest.mark.parametrize("script", scripts())
def test_blocks_stand_in_one_last_stretch(script):
    assert not out_of_place(scripts()[script])


def test_a_block_out_of_place_is_seen():
    text = scripts()["train_pref"]
    heading, block = HEADING.search(text)[0], blocks(text)["step"][1]
    moved = text.replace(block, "")
    assert out_of_place(moved.replace(heading, block + heading)) == ["step stands before the heading"]
    assert out_of_place(text.replace(heading, "")) == ["0 headings"]
    assert out_of_place(text.replace(block, heading + block)) == ["2 headings"]
    assert "between" in out_of_place(text.replace(block, "LIMIT = 3\n" + block))[0]
    assert "after" in out_of_place(text + "\nrun_main(main)\n")[0]


@pytest.mark.parametrize("path", sorted([*ROOT.glob("*.py"), *ROOT.glob("kernels/*.py"), *PLUMBING]), ids=lambda path: path.name)
def test_columns(path):
    assert not [k for k, line in enumerate(path.read_text().splitlines(), 1) if len(line) > COLUMNS]


def fix(source, root=ROOT):
    """Copy the blocks of one script over those of the same name in the others. -> the scripts that changed."""
    good, changed = blocks((root / source).read_text()), []
    for script, text in scripts(root).items():
        new = BLOCK.sub(lambda m: good[m["name"]][1] if m["name"] in good else m[0], text)
        if new != text:
            (root / f"{script}.py").write_text(new)
            changed.append(script)
    return changed


def test_fix(tmp_path):
    texts = scripts()
    for script, text in texts.items():
        (tmp_path / f"{script}.py").write_text(text)
    a, shared = next((script, name) for script in texts for name in blocks(texts[script]))
    b = next(member for member in blocks(texts[a])[shared][0] if member != a)
    old = blocks(texts[a])[shared][1]
    (tmp_path / f"{a}.py").write_text(texts[a].replace(old, old.replace("\n", "\n# a new line\n", 1)))
    assert problems(scripts(tmp_path))
    assert b in fix(f"{a}.py", tmp_path)
    assert not problems(scripts(tmp_path))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Copy one script's shared blocks to the others.")
    parser.add_argument("--fix", required=True, metavar="SCRIPT", help="the script whose blocks are right")
    print("changed:", ", ".join(fix(parser.parse_args().fix)) or "nothing")
