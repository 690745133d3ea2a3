"""Files are UTF-8 whatever the locale, and strict JSON: a reader that knows no NaN reads them all."""

import io
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from plumbing.process import UserError, read_json, read_text, to_json, write_text
from plumbing.run import write_metrics
from test_faults import data, flags, model_dir  # noqa: F401 (fixtures)

ROOT = Path(__file__).resolve().parent.parent


def strict_loads(text):
    """JSON as its grammar has it: Python's own reader takes NaN and Infinity, which no other does."""
    def refuse(constant):
        raise ValueError(constant)

    return json.loads(text, parse_constant=refuse)


def test_json_says_what_is_not_finite():
    content = dict(name="é", bins=[dict(accuracy=0.5), dict(accuracy=0.25)], none=None, many=(1, 2.5))
    assert strict_loads(to_json(content)) == content | dict(many=[1, 2.5])
    assert strict_loads(to_json(content, indent=2)) == content | dict(many=[1, 2.5])
    for value in (math.nan, math.inf, -math.inf):
        content["bins"][1]["accuracy"] = value
        with pytest.raises(UserError, match=rf"bins\[1\]\.accuracy is {value}"):
            to_json(content)
    with pytest.raises(UserError, match="is nan"):
        to_json(math.nan)


def test_metrics_that_are_not_finite_are_null():
    file = io.StringIO()
    write_metrics(file, 3, dict(loss=math.nan, grad_norm=math.inf, lr=-math.inf, skipped=1, epoch=0.5))
    assert strict_loads(file.getvalue()) == dict(step=3, loss=None, grad_norm=None, lr=None, skipped=1, epoch=0.5)


def test_what_is_no_json_object(tmp_path):
    path = tmp_path / "x.json"
    for content in (b"", b"{", b"[1]", b"3", b"null", b"\xff{}", b'{"a": "\xe9"}', b"[" * 100_000, b'{"a":' * 100_000):
        path.write_bytes(content)
        with pytest.raises(UserError, match=str(path)):
            read_json(path)
    with pytest.raises(UserError, match="nowhere"):
        read_json(tmp_path / "nowhere")


def test_utf8_whatever_the_locale(model_dir, data, tmp_path):
    """A run under a locale of ASCII alone: text of the model's config comes out as it went in."""
    model, out = Path(shutil.copytree(model_dir, tmp_path / "model")), tmp_path / "run"
    path = model / "config.json"
    path.write_bytes(json.dumps(json.loads(path.read_bytes()) | dict(note="naïve 漢"), ensure_ascii=False).encode())
    env = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHON"))}
    env |= dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", CUDA_VISIBLE_DEVICES="")
    code = ("import locale, sys; assert locale.getencoding() == 'ANSI_X3.4-1968';"
            " import train_pref; sys.argv[0] = 'train_pref.py'; train_pref.run_main(train_pref.main)")
    argv = [sys.executable, "-c", code, *flags(model, data, out, max_steps=1)]
    done = subprocess.run([*map(str, argv)], cwd=ROOT, env=env, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert read_json(out / "final" / "config.json")["note"] == "naïve 漢"
    write_text(out / "text", "naïve 漢")
    assert read_text(out / "text") == "naïve 漢" and (out / "text").read_bytes() == "naïve 漢".encode()
