"""plumbing/one_file.py: a script with its plumbing and the kernel in one file, in an empty folder, does what the script does."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A folder with the four scripts joined, and toy/ beside them; nothing else of ours can be imported there."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "toy").symlink_to(ROOT / "toy")
    for script in ("train_sft", "train_rm", "train_pref", "evaluate"):
        command = [sys.executable, ROOT / "plumbing" / "one_file.py", f"{script}.py"]
        text = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        assert "from plumbing" not in text and "from kernels" not in text
        (folder / f"{script}.py").write_text(text)
    return folder


def start(folder, *argv):
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run([*map(str, argv)], cwd=folder, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("script", ["train_sft", "train_rm"])
def test_a_step(alone, script, tmp_path):
    done = start(alone, sys.executable, f"{script}.py", "--max_steps", 2, "--out", tmp_path / "run")
    assert done.returncode == 0 and (tmp_path / "run" / "final" / "model.safetensors").exists(), done.stderr


def test_the_main_job(alone, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=4", "train_pref.py", "--loss", "is_dpo"]
    done = start(alone, *command, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    now, then = (rows(path) for path in (tmp_path / "run" / "metrics.jsonl", ROOT / "results" / "main_job.jsonl"))
    assert len(now) == len(then) == 128
    for a, b in zip(now, then):
        assert a.keys() == b.keys() and a == pytest.approx(b, rel=1e-3)
    done = start(alone, sys.executable, "evaluate.py", "golden", "--preset", "toy", "--n", 8, tmp_path / "run")
    assert done.returncode == 0 and len((tmp_path / "run" / "golden.jsonl").read_text().splitlines()) == 5, done.stderr


def rows(path):
    """Its steps, without clock and memory."""
    steps = [row for row in map(json.loads, path.read_text().splitlines()) if "step" in row]
    return [{name: value for name, value in row.items() if name not in ("tokens_per_s", "step_s", "mem_gb")} for row in steps]


@pytest.mark.parametrize("script", ["train_sft", "train_rm", "train_pref", "evaluate"])
def test_no_name_is_taken_twice(alone, script):
    """Joined, the later of two definitions of a name would silently be everybody's; so would an import of that name."""
    tree = ast.parse((alone / f"{script}.py").read_text(encoding="utf-8"))
    names = []
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.append(node.name)
        elif isinstance(node, ast.Assign):
            names += [target.id for target in node.targets if isinstance(target, ast.Name)]
    imported = {alias.asname or alias.name for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))
                for alias in node.names}
    assert sorted(names) == sorted({*names}) and imported.isdisjoint(names)
