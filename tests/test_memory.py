"""tests/memory.py counts what can be counted by hand: bytes held between steps, tensors that a step must hold."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
CODE = """
import json, memory
count = memory.Memory()
memory.become_a_gpu(count)
found = []
for reward, shard, checkpointed in (0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 1, 0):
    found.append(memory.simulate(count, "1b", reward, shard, checkpointed, (512, 128, 128), layers=3))
print(json.dumps(found))
"""


def test_what_can_be_counted():
    done = subprocess.run([sys.executable, "-c", CODE], cwd=HERE, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    plain, checkpointed, shard, reward = json.loads(done.stdout)
    D, V, inner, tokens, rows = 2048, 128256, 8192, 4 * 768, 4 * 256
    body = 3 * (2 * D * D + 2 * D * 512 + 3 * D * inner + 2 * D) + D + V * D  # 32 heads of 64, 8 of keys; embedding
    assert plain[0] == pytest.approx(16 * body, rel=1e-3)  # float32 weights, gradients and AdamW's two moments
    assert checkpointed[0] == plain[0]
    assert shard[0] == pytest.approx(12 * body / 4, rel=0.02)  # gradients are freed between steps; the angles' table
    assert reward[0] == pytest.approx(12 * (body + D) / 4, rel=0.02)
    logits = 4 * rows * V  # the head's, kept in float32
    assert plain[1] > plain[0] + logits + 4 * V * D  # and the head's gradient beside the embedding's
    # Of a layer are kept at least, in bf16: gate, up, silu(gate), their product, and 12 tensors of D or fewer columns.
    saved = plain[1] - checkpointed[1]
    assert 2 * 2 * tokens * 4 * inner < saved < 3 * 2 * tokens * (4 * inner + 24 * D)
