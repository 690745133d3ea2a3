"""The folders kernels/ and plumbing/ are found where packages of their names from PyPI (there are both; `kernels` is an extra of
transformers and TRL) are installed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NAMED = "import kernels.logprob; print(kernels.logprob.__file__)"


@pytest.mark.parametrize("argv", [["train_pref.py", "--help"], ["-c", "import train_pref; " + NAMED], ["-c", NAMED]])
@pytest.mark.parametrize("ours_too", [False, True])
def test_our_folder_comes_first(tmp_path, argv, ours_too):
    """As a script and in python -c, with theirs on PYTHONPATH, which comes after the folder of the script; alone or
    after ours."""
    for name in ("kernels", "plumbing"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("theirs = True\n")
    path = [str(ROOT)] * ours_too + [str(tmp_path)]
    done = subprocess.run([sys.executable, *argv], cwd=ROOT, env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    if argv[0] == "-c":
        assert done.stdout.strip() == str(ROOT / "kernels" / "logprob.py")
