"""The benchmarks run at toy size, and what they say of each other (equal loss, small gradient error) holds. Times are
not judged."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from kernels import bench

TORCHS_OWN = {"torch linear_cross_entropy"} if hasattr(F, "linear_cross_entropy") else set()  # newer than torch 2.11


def run(tmp_path, script, *argv):
    """-> rows, screen of a benchmark started as a user starts it."""
    out = tmp_path / "rows.jsonl"
    env = os.environ | dict(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    command = [sys.executable, str(ROOT / script), *argv, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in out.read_text().splitlines()], done.stdout


def test_logprob(tmp_path):
    rows, screen = run(tmp_path, "kernels/bench.py", "--shapes", "64,300,16", "16,50,8", "--runs", "2")
    assert "missing: cut-cross-entropy: " in screen and "floors: a copy" in screen and "/ ours" in screen
    names = {row["name"] for row in rows}
    ours = {"ours", "ours, kept", "ours, computed again", "ours, frozen head"}
    assert ours | {"log_softmax+gather", "cross_entropy"} <= names
    assert TORCHS_OWN <= names and (TORCHS_OWN or "missing: torch linear_cross_entropy: " in screen)
    assert len(rows) == 2 * len(names)
    for row in rows:
        assert row["gradient_error"] < 1e-5, row
        assert len(row["forward_s"]) == len(row["both_s"]) == 2 and row["ratio_to_ours"] > 0
        assert row["floors"]["bandwidth"] > 0 and row["versions"]["torch"] == torch.__version__


def test_logprob_error_is_seen(monkeypatch):
    """A gradient that is a little wrong has a large error, on all rows and where 64 stand for all."""
    cpu = torch.device("cpu")
    found, _ = bench.contestants(cpu, False)
    for limit in (bench.ALL_ROWS, 0):
        monkeypatch.setattr(bench, "ALL_ROWS", limit)
        case = bench.Case(128, 300, 16, cpu)
        for name in ("ours", "ours, kept", "cross_entropy", *TORCHS_OWN):
            group, kind, _, f = found[name]
            case.fresh(group, False)
            case.run(group, kind, f, True)
            assert case.error(group, kind) < 1e-5, name
            (case.box[1] if group == "logits" else case.h.grad).mul_(1.01)
            assert case.error(group, kind) == pytest.approx(0.01, rel=0.01), name


def test_peak_sees_what_is_freed():
    with bench.Peak(torch.device("cpu")) as peak:
        torch.ones(2**24)  # 64 MiB
    if peak.over is None:
        pytest.skip("this system does not let a process reset its peak")
    assert 60e6 < peak.over < 90e6


def test_step(tmp_path):
    pytest.importorskip("trl")
    rows, screen = run(tmp_path, "tests/bench_step.py", "--shape", "toy", "--data", "synthetic", "--scale", "0.1",
                       "--pairs", "4", "--micro_batch_size", "2", "--runs", "1", "--contestants", "ours", "trl_default",
                       "trl_best", "trl_shipped")
    (row,) = rows
    results = row["results"]
    assert list(results) == ["ours", "trl_default", "trl_best", "trl_shipped"]
    ours = results["ours"]
    for name, result in results.items():
        assert abs(result["loss"] - ours["loss"]) < 1e-4 and name in screen
        assert abs(result["grad_norm"] / ours["grad_norm"] - 1) < 1e-3
        assert result["ratio"] > 0 and 0 <= result["padding"] < 1 and result["tflop_done"] >= row["tflop_needed"]
    assert abs(ours["loss"] - 0.6931472) > 1e-3  # not the log 2 that any model beside itself gives
    assert ours["computed_tokens"] < results["trl_best"]["computed_tokens"] <= results["trl_default"]["computed_tokens"]
    assert "/" not in row["command"].replace("tests/bench_step.py", "")  # no path of this machine


def test_data(tiny_llama, tmp_path):
    model = tiny_llama(tmp_path / "model", max_position_embeddings=1024)
    (row,), screen = run(tmp_path, "tests/bench_data.py", "--pairs", "70", "--ranks", "1", "2", "--no-trl", "--model", str(model))
    assert list(row["results"]) == [f"ours, {ranks} ranks, {start}" for ranks in (1, 2) for start in ("first", "second")]
    for result in row["results"].values():
        assert result["pairs"] == 70 and result["tokens_a_pair"] > 500 and result["peak"] > 100 and result["wall_s"] > 0
    assert "CPU seconds of a second start" in screen and "memory (pss) of 2 ranks / of 1" in screen
    assert "/" not in row["command"].replace("tests/bench_data.py", "")  # no path of this machine
