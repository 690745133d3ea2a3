"""The README names only what exists: commands parse, files are there, links point at the line of what they name, the gate runs
the command that a reader would."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text()
COMMANDS = [line.strip() for line in TEXT.splitlines() if line.startswith("    ") and re.search(r"\b(python|torchrun|pip)\b", line)]


def test_there_are_commands():
    assert len(COMMANDS) >= 8 and sum("train_pref.py" in command for command in COMMANDS) >= 5


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command):
    words = shlex.split(command.split("#")[0].replace("&&", ";"))
    for k, word in enumerate(words):
        if word.endswith(".py") and "/" not in word:
            flags = words[k + 1 :]
            importlib.import_module(word[:-3]).parse_args(flags)
        if word == "-r":
            assert (ROOT / words[k + 1]).is_file()


@pytest.mark.parametrize("script", ["train_sft", "train_rm", "train_pref"])
def test_commands_in_docstrings_parse(script):
    module = importlib.import_module(script)
    lines = [line for line in module.__doc__.splitlines() if f" {script}.py" in line and line.startswith("    ")]
    assert len(lines) == 4
    for line in lines:
        module.parse_args(shlex.split(line.split("#")[0].replace("...", "").split(f" {script}.py")[1]))


def test_commands_in_evaluates_docstring_parse():
    evaluate = importlib.import_module("evaluate")
    lines = [line for line in evaluate.__doc__.splitlines() if line.startswith("    python evaluate.py")]
    commands = [evaluate.parse_args(shlex.split(line.split("#")[0])[2:]).command for line in lines]
    assert sorted(commands) == ["bench", "golden", "judge", "label", "plot", "sample"]


@pytest.mark.parametrize("script", ["train_sft", "train_rm", "train_pref", "evaluate"])
def test_torchrun_leaves_our_flags_alone(script):
    """It refuses a script's flag that begins several of its own options, unless `--` comes first, as evaluate.py's docstring has it."""
    ahead = ["--"] if script == "evaluate" else []
    sources = [f"{script}.py"] if script == "evaluate" else [f"{script}.py", "plumbing/run.py"]
    flags = set(re.findall(r'"(--[a-z_]+)"', "".join((ROOT / source).read_text() for source in sources)))
    assert len(flags) > 20
    for flag in flags:
        args = get_args_parser().parse_args(["--nproc_per_node=2", *ahead, f"{script}.py", "sample", flag, "5"])
        assert (args.training_script, args.training_script_args) == (f"{script}.py", ["sample", flag, "5"])


def test_links_point_at_definitions():
    links = re.findall(r"\[(\w+)\]\(([\w./]+)#L(\d+)\)", TEXT)
    assert len(links) >= 8
    for name, file, number in links:
        line = (ROOT / file).read_text().splitlines()[int(number) - 1]
        assert re.match(rf"(def|class) {name}\b", line), f"{file}#L{number} is {line!r}, not {name}"


def test_named_flags_and_files_exist():
    scripts = "".join(path.read_text() for path in [*ROOT.glob("*.py"), ROOT / "plumbing" / "run.py"])
    for flag in set(re.findall(r"`--([a-z_]+)", TEXT)) - {"nnodes", "nproc_per_node", "shutdown_timeout", "help"}:  # torchrun's
        assert f'"--{flag}"' in scripts, f"--{flag}"
    for name in re.findall(r"^\| `([\w./]+)` \|", TEXT, re.M):
        if "." in name or name.endswith("/"):
            assert (ROOT / name).exists(), name


def test_line_counts():
    for file, count in re.findall(r"^\| `([\w/]+\.py)` \|.*\| ([\d,]+) \|$", TEXT, re.M):
        assert len((ROOT / file).read_text().splitlines()) == int(count.replace(",", "")), f"{file}: the README says {count} lines"


def test_gate_runs_the_readme_command():
    commands = TEXT.split("<!-- tests -->\n")[1].splitlines()
    assert commands[0].startswith("    pip install") and "pytest" in commands[0]
    assert "<!-- tests -->" in (ROOT / ".ci" / "run").read_text()
