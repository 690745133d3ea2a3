"""kernels/logprob.py against float64, on three ways to run it: torch, Triton's interpreter, a GPU.

Every case that takes the fixture `way` runs with torch here and, in one child process with TRITON_INTERPRET=1, with the
Triton kernels (Triton reads that variable when it is imported, and other tests need it imported without). Where it is
set already, as in `TRITON_INTERPRET=1 python -m pytest`, both run here. With a GPU they run there too.

Tolerances. float32 has eps = 1.2e-7. A log-prob is the difference of a logit and a log-sum, rounded at the size of the
largest logit, and in the linear form logits are sums of D rounded products: errors of a few eps times that size.
Gradients add up many such numbers and are compared in norm, at some eps. float64 is held to 1e-12.
"""
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kernels.logprob as K
from kernels.logprob import linear_sequence_logps, sequence_logps

ROOT = pathlib.Path(__file__).parents[1]
EPS = torch.finfo(torch.float32).eps
INTERPRETED = K.triton is not None and K.INTERPRET
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available() or INTERPRETED, reason="needs a GPU")]
TORCH, TRITON = ("cpu", "torch"), ("cpu", "triton")
WAYS = [pytest.param(TORCH, id="torch")] + ([pytest.param(TRITON, id="interpreted")] if INTERPRETED else [])
WAYS += [pytest.param(("cuda", "triton"), id="gpu", marks=GPU)]


@pytest.fixture(params=WAYS)
def way(request):
    """(device, kernel)"""
    return request.param


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def child(code_or_args, path=ROOT, **env):
    """Run python in a child process, importing from `path` first; its stdout, or a failure that shows everything."""
    args = ["-c", code_or_args] if isinstance(code_or_args, str) else code_or_args
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(path), os.environ.get("PYTHONPATH", "")]), **env}
    done = subprocess.run([sys.executable, *args], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(K.triton is None or INTERPRETED, reason="triton is not installed, or its cases run in this process")
def test_all_cases_in_the_interpreter():
    args = ["-m", "pytest", "-q", "-x", "-k", "interpreted", "-p", "no:cacheprovider", __file__]
    out = child(args, TRITON_INTERPRET="1")
    assert " passed" in out and "failed" not in out, out


# --- The oracle: float64 numpy, one row at a time, as the equations read ----------------------------------------------

def oracle(x, targets, cu, g_seq, g_tok):
    """x (N, V) float64 -> logps (S,), token_logps (N,), d loss / d x for loss = g_seq . logps + g_tok . token_logps."""
    N, V = x.shape
    token_logps, dx = np.zeros(N), np.zeros((N, V))
    for s in range(len(cu) - 1):
        for i in range(cu[s], cu[s + 1]):
            if targets[i] < 0:
                continue
            shifted = x[i] - x[i].max()
            log_p = shifted - np.log(np.exp(shifted).sum())
            token_logps[i] = log_p[targets[i]]
            dx[i] = -np.exp(log_p)
            dx[i, targets[i]] += 1
            dx[i] *= g_seq[s] + g_tok[i]
    logps = np.array([token_logps[cu[s]:cu[s + 1]].sum() for s in range(len(cu) - 1)])
    return logps, token_logps, dx


def numpy64(t):
    return t.detach().cpu().double().numpy()


def relative(got, want):
    """|got - want| / |want| in the 2-norm; 0 for 0 / 0."""
    error, size = np.linalg.norm(numpy64(got) - want), np.linalg.norm(want)
    return error / size if size else error


def example(N, V, D, lengths, device="cpu", dtype=torch.float32, ignore=()):
    hidden = torch.randn(N, D, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(V, D, device=device) * 2 / D**0.5).to(dtype).requires_grad_()     # logits of size 2, some 8
    targets = torch.randint(0, V, (N,))
    targets[list(ignore)] = -100
    cu = torch.tensor([0, *np.cumsum(lengths)])
    assert cu[-1] == N
    return hidden, weight, targets.to(device), cu.to(device)


def check_logits(way, logits, targets, cu, tolerance=None, **options):
    """sequence_logps and its gradient against the oracle, from a leaf and from an intermediate that is overwritten."""
    device, kernel = way
    S, N = cu.numel() - 1, targets.numel()
    g_seq, g_tok = torch.randn(S), torch.randn(N)
    logps, token_logps, dx = oracle(numpy64(logits), targets.tolist(), cu.tolist(), g_seq.tolist(), g_tok.tolist())
    size = max(1.0, float(np.abs(numpy64(logits)[numpy64(targets) >= 0]).max(initial=0.0)))
    double = logits.dtype == torch.float64
    tolerance = tolerance or {torch.float64: 1e-12, torch.float32: 8 * EPS}.get(logits.dtype,
                                                                               torch.finfo(logits.dtype).eps)
    atol = 1e-12 * size if double else 4 * EPS * size           # of log-probs: not rounded to 16 bits for any dtype
    for intermediate in (False, True):
        leaf = logits.detach().clone().requires_grad_()
        x = leaf * 1 if intermediate else leaf
        got, got_tok = sequence_logps(x, targets, cu, kernel=kernel, **options)
        assert got.dtype == got_tok.dtype == (torch.float64 if double else torch.float32)
        np.testing.assert_allclose(numpy64(got_tok), token_logps, rtol=2 * EPS, atol=atol)
        np.testing.assert_allclose(numpy64(got), logps, rtol=4 * EPS, atol=atol * max(1, N) ** 0.5)
        loss = (got * g_seq.to(got)).sum() + (got_tok * g_tok.to(got)).sum()
        loss.backward()
        assert leaf.grad.dtype == logits.dtype
        assert relative(leaf.grad, dx) <= tolerance
        assert torch.all(leaf.grad[targets < 0] == 0)
        if not intermediate:
            assert torch.equal(leaf.detach().nan_to_num(7.), logits.nan_to_num(7.)), "a leaf was overwritten"


def check_linear(way, hidden, weight, targets, cu, tolerance=None, **options):
    """linear_sequence_logps and both gradients against the oracle. Returns (logps, token_logps, dH, dW)."""
    device, kernel = way
    S, N = cu.numel() - 1, hidden.shape[0]
    g_seq, g_tok = torch.randn(S, device=device), torch.randn(N, device=device)
    ignored = numpy64(targets) < 0
    h, w = numpy64(hidden), numpy64(weight.to(hidden.dtype) if device == "cuda" else weight)    # GPU: 16-bit products
    h = np.where(ignored[:, None], 0.0, h)                      # what an ignored row holds must not matter
    logps, token_logps, dx = oracle(h @ w.T, targets.tolist(), cu.tolist(), g_seq.tolist(), g_tok.tolist())
    got, got_tok = linear_sequence_logps(hidden, weight, targets, cu, kernel=kernel, **options)
    double = hidden.dtype == torch.float64
    size = max(1.0, float(np.abs(h @ w.T).max(initial=0.0)))
    atol = 1e-12 * size if double else 4 * EPS * size
    np.testing.assert_allclose(numpy64(got_tok), token_logps, rtol=4 * EPS, atol=atol)
    np.testing.assert_allclose(numpy64(got), logps, rtol=4 * EPS, atol=atol * max(1, N) ** 0.5)
    dh, dw = torch.autograd.grad((got * g_seq).sum() + (got_tok * g_tok).sum(), (hidden, weight))
    if tolerance is None:                                       # 16 bits: results are rounded; on a GPU D and gH too
        half = 2**-7 if device == "cuda" else torch.finfo(hidden.dtype).eps / 2
        tolerance = {torch.float64: 1e-12, torch.float32: 10 * EPS}.get(hidden.dtype, half)
    assert dh.dtype == hidden.dtype and dw.dtype == weight.dtype
    assert relative(dh, dx @ w) <= tolerance
    assert relative(dw, dx.T @ h) <= tolerance
    assert torch.all(dh[targets < 0] == 0)
    return got, got_tok, dh, dw


def slices(monkeypatch, budget, multiple):
    monkeypatch.setattr(K, "SLICE_ELEMENTS", {"gpu": budget, "cpu": budget})
    monkeypatch.setattr(K, "SLICE_MULTIPLE", multiple)


# --- Values and gradients ---------------------------------------------------------------------------------------------

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits(way, dtype):
    targets = torch.randint(0, 1003, (9,))                      # odd V; first and last id; ignored rows; empty sequence
    targets[:5] = torch.tensor([0, 1002, -100, -1, 5])
    logits = (torch.randn(9, 1003) * 4).to(dtype)
    check_logits(way, logits.to(way[0]), targets.to(way[0]), torch.tensor([0, 3, 3, 4, 9], device=way[0]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear(way, dtype):
    hidden, weight, targets, cu = example(9, 203, 24, [3, 0, 1, 5], way[0], dtype, ignore=(2, 8))
    targets[:2] = torch.tensor([0, 202])
    check_linear(way, hidden, weight, targets, cu)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_many_rows_on_the_torch_path(dtype):                    # several blocks of rows, V no power of two
    hidden, weight, targets, cu = example(700, 1003, 32, [100, 250, 0, 350], dtype=dtype, ignore=range(0, 700, 7))
    check_linear(TORCH, hidden, weight, targets, cu)
    check_logits(TORCH, (hidden @ weight.T).detach(), targets, cu)


@pytest.mark.skipif(K.triton is None, reason="triton is not installed")
def test_triton_refuses_float64():
    with pytest.raises(ValueError, match="float64"):
        sequence_logps(torch.zeros(1, 2, dtype=torch.float64), torch.tensor([0]), torch.tensor([0, 1]), kernel="triton")


def test_large_vocabulary_few_rows(way):                        # Llama 3's: several blocks, the last one partial
    V = 128256
    targets = torch.tensor([0, V - 1, 70001], device=way[0])
    check_logits(way, torch.randn(3, V, device=way[0]) * 3, targets, torch.tensor([0, 2, 3], device=way[0]))


@pytest.mark.parametrize("case", ["very negative", "very large", "one far above", "-inf entries", "-inf block"])
def test_ranges(way, case):
    logits = torch.randn(4, 5000) * 5
    if case == "very negative":                                 # a maximum started at 0, or no maximum, would give 0
        logits -= 400
    elif case == "very large":                                  # exp overflows above 88
        logits = logits * 1e3 + 1e4
    elif case == "one far above":
        logits[:, 3] = 1e5
    elif case == "-inf entries":                                # masked tokens
        logits[:, 7:60] = -torch.inf
    else:                                                       # whole leading blocks of the loop hold nothing but -inf
        logits[:, :4990] = -torch.inf
    targets = torch.tensor([4991, 4999, 4992, 4995])
    logps, token_logps, dx = oracle(numpy64(logits), targets.tolist(), [0, 1, 4], [1.0, 2.0], [0.0] * 4)
    leaf = logits.to(way[0]).requires_grad_()
    got, got_tok = sequence_logps(leaf, targets.to(way[0]), torch.tensor([0, 1, 4], device=way[0]), kernel=way[1])
    # Differences of the target's logit and the maximum are exact where they are close; hence relative to the log-prob.
    np.testing.assert_allclose(numpy64(got_tok), token_logps, rtol=4 * EPS, atol=8 * EPS)
    np.testing.assert_allclose(numpy64(got), logps, rtol=4 * EPS, atol=8 * EPS)
    (got * torch.tensor([1.0, 2.0], device=way[0])).sum().backward()
    assert relative(leaf.grad, dx) < 8 * EPS


def test_linear_slice_of_nothing_but_minus_infinity(way, monkeypatch):
    """A head with ids masked out by a huge negative bias column: the first vocabulary slices hold only -inf."""
    slices(monkeypatch, 64, 16)
    hidden, weight = torch.ones(3, 1, device=way[0]), torch.randn(50, 1, device=way[0])
    weight[:32] = -torch.inf
    targets, cu = torch.tensor([33, 49, 40], device=way[0]), torch.tensor([0, 3], device=way[0])
    _, got = linear_sequence_logps(hidden, weight, targets, cu, kernel=way[1])
    want = torch.log_softmax((hidden @ weight.T).double(), 1).gather(1, targets[:, None])[:, 0]
    np.testing.assert_allclose(numpy64(got), numpy64(want), rtol=4 * EPS, atol=8 * EPS)


@pytest.mark.parametrize("budget, multiple, shape", [
    (2**24, 256, (21, 90)),         # one block
    (21 * 32, 32, (21, 32)),        # all rows, slices of the vocabulary; the last one partial
    (81, 8, (8, 8)),                # square tiles; the last ones partial both ways
    (64, 128, (21, 90)),            # a multiple larger than everything: no slice past the end
])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_slice_regimes(way, monkeypatch, budget, multiple, shape, dtype):
    if way[1] == "triton" and dtype == torch.float64:
        return
    slices(monkeypatch, budget, multiple)
    assert K.slice_shape(21, 90, budget) == shape
    data = example(21, 90, 16, [10, 0, 11], way[0], dtype, ignore=(0, 20))
    results = []
    for save_bytes in (0, 2**40):
        torch.manual_seed(1)
        results.append(check_linear(way, *data, save_bytes=save_bytes))
    for computed_again, kept in zip(*results):                  # bit for bit, log-probs and gradients
        assert torch.equal(computed_again, kept)
    with torch.no_grad():                                       # scoring agrees with training bit for bit
        scored = linear_sequence_logps(*data, kernel=way[1])
    assert torch.equal(scored[0], results[0][0]) and torch.equal(scored[1], results[0][1])


def test_slice_shape_keeps_to_its_budget():
    for A in (2**24, 2**27):
        for N in (1, 7, 300, 2048, 4096, 8192, 8193, 20000, 100000, 10**6):
            for V in (2, 32000, 49152, 128256):
                rows, columns = K.slice_shape(N, V, A)
                assert rows <= N and columns <= V
                assert rows * columns <= 1.13 * A               # rounding a slice of 1024 by half of 256
                assert rows == N or (columns >= 2048 and N > 2 * A**0.5)
    assert K.slice_shape(2048, 49152, 2**24) == (2048, 8192)
    assert K.slice_shape(20000, 128256, 2**27) == (20000, 6656)
    assert K.slice_shape(30000, 128256, 2**27) == (11520, 11520)


def test_never_holds_all_logits(monkeypatch):
    """The largest tensor made on the way, forward and backward, is a slice."""
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out._base is None:
                self.elements = max(self.elements, out.untyped_storage().nbytes() // out.element_size())
            return out

    hidden, weight, targets, cu = example(40, 30000, 4, [40])
    slices(monkeypatch, 40 * 4096, 256)
    with Largest() as largest:
        linear_sequence_logps(hidden, weight, targets, cu, save_bytes=0)[0].sum().backward()
    assert largest.elements == 40 * 4096                        # N V would be 7 times that; dW is 120,000


def test_row_stats_kernel_over_several_steps(way):
    """A block narrower than the row, lanes and a whole row that see only -inf at first, and a second slice."""
    if way[1] != "triton":
        pytest.skip("a test of the Triton kernel")
    x = 20 * torch.randn(4, 1000, device=way[0])
    x[0, :100], x[1, ::3], x[2] = -float("inf"), -float("inf"), -float("inf")
    targets = torch.tensor([500, 1, 2, 999], device=way[0])
    m, z, at_target = stats = K._start_stats(x)
    for start in (0, 600):
        part = x[:, start : start + 600].contiguous()
        K.row_stats_kernel[(4,)](part, part.stride(0), targets, *stats, start, part.shape[1], BLOCK=64)
    values = x.cpu().double().numpy()
    assert torch.equal(m, x.amax(1)) and torch.equal(at_target, x.gather(1, targets[:, None])[:, 0])
    shift = np.where(np.isinf(values.max(1)), 0, values.max(1))
    np.testing.assert_allclose(z.cpu(), np.exp(values - shift[:, None]).sum(1), rtol=4 * EPS)


# --- Ignored rows, NaN, nothing at all --------------------------------------------------------------------------------

@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_ignored_rows_may_hold_anything(way, bad):
    logits, targets = torch.randn(5, 300), torch.tensor([3, -1, 10, -100, 20])
    logits[1], logits[3, 5] = bad, bad
    leaf = logits.to(way[0]).requires_grad_()
    cu = torch.tensor([0, 2, 5], device=way[0])
    logps, token_logps = sequence_logps(leaf * 1, targets.to(way[0]), cu, kernel=way[1])
    assert token_logps[1] == token_logps[3] == 0 and logps.isfinite().all()
    (logps.sum() + token_logps.sum()).backward()
    assert torch.all(leaf.grad[[1, 3]] == 0) and leaf.grad.isfinite().all()

    hidden, weight, targets, cu = example(5, 40, 8, [2, 3], way[0], ignore=(1, 3))
    with torch.no_grad():
        hidden[1], hidden[3, 2] = bad, bad
    check_linear(way, hidden, weight, targets, cu)


def test_an_ignored_row_has_no_gradient_whatever_the_weight(way):
    hidden, weight, targets, cu = example(4, 40, 8, [1, 3], way[0], ignore=(1,))
    with torch.no_grad():
        weight[7, 2] = float("inf")
    linear_sequence_logps(hidden, weight, targets, cu, kernel=way[1])[0].sum().backward()
    assert torch.all(hidden.grad[1] == 0) and hidden.grad[0].isnan().any()


def test_all_rows_ignored(way):
    hidden, weight, targets, cu = example(4, 40, 8, [1, 3], way[0], ignore=range(4))
    _, _, dh, dw = check_linear(way, hidden, weight, targets, cu)
    assert torch.all(dh == 0) and torch.all(dw == 0)


def test_nan_in_a_row_that_counts_is_heard(way):
    hidden, weight, targets, cu = example(3, 40, 8, [1, 2], way[0])
    with torch.no_grad():
        hidden[0, 0] = float("nan")
    logps, token_logps = linear_sequence_logps(hidden, weight, targets, cu, kernel=way[1])
    assert token_logps.isnan().tolist() == [True, False, False] and logps.isnan().tolist() == [True, False]


@pytest.mark.parametrize("cu", [[0], [0, 0, 0]], ids=str)
def test_no_rows(way, cu):
    hidden, weight, targets, _ = example(0, 40, 8, [0], way[0])
    cu = torch.tensor(cu, device=way[0])
    logps, token_logps = linear_sequence_logps(hidden, weight, targets, cu, kernel=way[1])
    assert logps.tolist() == [0.0] * (cu.numel() - 1) and token_logps.shape == (0,)
    dh, dw = torch.autograd.grad(logps.sum() + token_logps.sum(), (hidden, weight))
    assert dh.shape == (0, 8) and torch.all(dw == 0) and dw.shape == (40, 8)
    logits = torch.zeros(0, 40, device=way[0], requires_grad=True)
    logps, token_logps = sequence_logps(logits * 1, targets, cu, kernel=way[1])
    (logps.sum() + token_logps.sum()).backward()
    assert logps.tolist() == [0.0] * (cu.numel() - 1) and logits.grad.shape == (0, 40)


def test_what_a_gpu_cannot_check_gives_nan(way):
    """A target >= V and cu_seqlens that do not fit, past the checks that only the CPU makes."""
    device, triton = way[0], way[1] == "triton"
    logits = torch.randn(4, 50, device=device, requires_grad=True)
    targets, cu = torch.tensor([1, 50, 2**40, 3], device=device), torch.tensor([0, 1, 3, 4], device=device)
    logps, token_logps = K._SequenceLogps.apply(logits, targets, cu, triton, False)
    assert token_logps.isnan().tolist() == [False, True, True, False] and logps.isnan().tolist() == [False, True, False]
    logps.sum().backward()
    assert logits.grad.isnan().all(1).tolist() == [False, True, True, False]
    ones = torch.ones(4, device=device)
    for cu, nan in (([0, 2, 5], [False, True]), ([0, 3, 2, 4], [False, True, False]), ([1, 2, 4], [True, False]),
                    ([0, 2, 3], [False, True]), ([-2, 2, 4], [True, False]), ([0, 2**40, 4], [True, True])):
        assert K.sequence_sums(ones, torch.tensor(cu, device=device), triton).isnan().tolist() == nan


# --- Sharing, freezing, strides ---------------------------------------------------------------------------------------

def test_opposite_gradients_on_shared_rows(way):
    """Prompt rows that two sequences share: their gradients add up, here to almost nothing."""
    hidden, weight, _, cu = example(8, 60, 16, [4, 4], way[0])
    shared = torch.randn(4, 16, device=way[0], requires_grad=True)
    targets = torch.tensor([1, 2, 3, 4, 1, 2, 3, 59], device=way[0])
    rows = torch.tensor([0, 1, 2, 3] * 2, device=way[0])
    logps, _ = linear_sequence_logps(shared[rows], weight, targets, cu, kernel=way[1])
    dh, dw = torch.autograd.grad(logps[0] - logps[1], (shared, weight))
    x = shared.detach().double()
    want_dh, want_dw = torch.zeros_like(x), torch.zeros_like(weight, dtype=torch.float64)
    want_dh[3] = (weight[4] - weight[59]).double()              # what is left: + onehot(4) - onehot(59) in the last row
    want_dw[4], want_dw[59] = x[3], -x[3]
    assert (dh - want_dh).abs().max() < 16 * EPS and (dw - want_dw).abs().max() < 16 * EPS


def test_tied_head(way):
    """The weight also embeds the input: its gradient is the sum of both uses, as autograd's is."""
    ids, targets = torch.randint(0, 70, (9,), device=way[0]), torch.randint(0, 70, (9,), device=way[0])
    cu = torch.tensor([0, 4, 9], device=way[0])
    grads = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        embedding = torch.randn(70, 16).to(way[0], dtype).requires_grad_()
        hidden = torch.tanh(embedding[ids])
        if dtype == torch.float32:
            loss = (linear_sequence_logps(hidden, embedding, targets, cu, kernel=way[1])[0]**2).sum()
        else:
            token = torch.log_softmax(hidden @ embedding.T, 1).gather(1, targets[:, None])[:, 0]
            loss = token[:4].sum()**2 + token[4:].sum()**2
        loss.backward()
        grads.append(embedding.grad)
    assert relative(grads[0], numpy64(grads[1])) < 10 * EPS


@pytest.mark.parametrize("frozen", ["weight", "hidden"])
def test_frozen(way, frozen, monkeypatch):
    hidden, weight, targets, cu = example(6, 50, 8, [2, 4], way[0])
    both = check_linear(way, hidden, weight, targets, cu)
    torch.manual_seed(0)
    example(6, 50, 8, [2, 4])                                   # the same draws, so that check's g is the same
    g_seq, g_tok = torch.randn(2, device=way[0]), torch.randn(6, device=way[0])
    {"weight": weight, "hidden": hidden}[frozen].requires_grad_(False)
    products = []
    product = K._product
    monkeypatch.setattr(K, "_product", lambda a, b, out, **add: products.append(out.shape) or product(a, b, out, **add))
    logps, token_logps = linear_sequence_logps(hidden, weight, targets, cu, kernel=way[1], save_bytes=0)
    ((logps * g_seq).sum() + (token_logps * g_tok).sum()).backward()
    assert len(products) == 3                                   # logits twice and one gradient, not the other
    if frozen == "weight":
        assert weight.grad is None and products[2] == (6, 8)
        assert way[0] == "cuda" or torch.equal(hidden.grad, both[2])
    else:
        assert hidden.grad is None and products[2] == (50, 8)
        assert way[0] == "cuda" or torch.equal(weight.grad, both[3])


def test_strided_inputs(way):
    targets, cu = torch.tensor([1, 0, 299, -1], device=way[0]), torch.tensor([0, 1, 4], device=way[0])
    wide = torch.randn(4, 700, device=way[0])
    check_logits(way, wide[:, :300], targets, cu)
    for make in (lambda t: t[:4, 100:400], lambda t: t[:4, :300].T.contiguous().T,
                 lambda t: t[:1, :300].expand(4, 300), lambda t: t[::7][:4, ::2][:, :300]):
        leaf = torch.randn(700, 700, device=way[0], requires_grad=True)
        logps, token_logps = sequence_logps(make(leaf * 1), targets, cu, kernel=way[1])
        want_leaf = leaf.detach().double().requires_grad_()
        want = torch.log_softmax(make(want_leaf), 1).gather(1, targets.clamp_min(0)[:, None])[:, 0] * (targets >= 0)
        np.testing.assert_allclose(numpy64(token_logps), numpy64(want), rtol=4 * EPS, atol=8 * EPS)
        (logps * logps).sum().backward()
        (want[:1].sum()**2 + want[1:].sum()**2).backward()
        assert relative(leaf.grad, numpy64(want_leaf.grad)) < 8 * EPS
    hidden = torch.randn(4, 40, device=way[0])[:, ::2].detach().requires_grad_()
    weight = torch.randn(20, 300, device=way[0]).T.detach().requires_grad_()
    check_linear(way, hidden, weight, targets, cu.int())        # int32 cu_seqlens, as flash attention wants them
    hidden = torch.randn(4, 40, device=way[0])[:, 20:].detach().requires_grad_()
    weight = torch.randn(300, 40, device=way[0])[:, :20].detach().requires_grad_()
    check_linear(way, hidden, weight, targets, cu)


def test_fp32_master_weights(way):
    """bf16 hidden and a float32 weight: dW comes in float32 (but on a GPU D and gH were bf16)."""
    hidden, _, targets, cu = example(9, 60, 16, [4, 5], way[0], torch.bfloat16, ignore=(3,))
    weight = torch.randn(60, 16, device=way[0], requires_grad=True)
    _, _, _, dw = check_linear(way, hidden, weight, targets, cu, tolerance=2**-8)
    assert dw.dtype == torch.float32 and not torch.equal(dw, dw.bfloat16().float())


def test_autocast(way):
    hidden, weight, targets, cu = example(9, 60, 16, [4, 5], way[0])
    with torch.autocast(way[0], dtype=torch.bfloat16):
        logps, _ = linear_sequence_logps(hidden, weight, targets, cu, kernel=way[1])
        dh, dw = torch.autograd.grad(logps.sum(), (hidden, weight))
    half = hidden.detach().bfloat16().requires_grad_()
    want, _ = linear_sequence_logps(half, weight, targets, cu, kernel=way[1])
    want_dh, want_dw = torch.autograd.grad(want.sum(), (half, weight))
    assert torch.equal(logps, want) and torch.equal(dh, want_dh.float()) and torch.equal(dw, want_dw)


INT64 = """
import sys, torch, kernels.logprob as K
path, use_triton = sys.argv[1], sys.argv[2] == "triton"
torch.manual_seed(0)
stride, V = 2**30, 1000                          # 3 rows, the last one 2^31 elements in; the file is sparse: no 6 GB
big = torch.from_file(path, shared=True, size=2 * stride + V, dtype=torch.bfloat16)
x = big.as_strided((3, V), (stride, 1))
x.copy_(torch.randn(3, V) * 3)
was, y = x.double(), torch.tensor([1, 2, 3])
want = was.log_softmax(1).gather(1, y[:, None])[:, 0]
_, got = K.sequence_logps(x, y, torch.tensor([0, 3]), kernel="triton" if use_triton else "torch")
assert (got - want).abs().max() < 1e-5, (got, want)
stats = K._start_stats(x)
K.row_stats_(x, y, 0, *stats, use_triton)
log_sum, _ = K._finish_stats(y, V, *stats)
K.dlogits_(x, x, y, 0, stats[0], log_sum, None, use_triton)
want = torch.nn.functional.one_hot(y, V) - was.softmax(1)
# Triton's interpreter cuts float32 to bfloat16, up to 2^-7 off a value (measured 0.8-1.0 x 2^-8 over all); GPUs round.
assert (x.double() - want).norm() < 2**-7 * want.norm()
print("ok")
"""


@pytest.mark.parametrize("kernel", ["torch", pytest.param("triton", marks=pytest.mark.skipif(
    K.triton is None or INTERPRETED, reason="runs once, from the parent"))])
def test_row_offsets_past_2_31(tmp_path, kernel):
    path = tmp_path / "sparse.bin"
    with open(path, "wb") as file:
        file.truncate((2 * 2**30 + 1000) * 2)
    assert "ok" in child(["-c", INT64, str(path), kernel], TRITON_INTERPRET="1")
    path.unlink()


# --- Autograd and compiled models -------------------------------------------------------------------------------------

def test_gradcheck():
    """Against finite differences in float64: both outputs, both functions (a leaf's logits are not overwritten)."""
    hidden, weight, targets, cu = example(5, 7, 3, [2, 0, 3], dtype=torch.float64, ignore=(1,))
    logits = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: sequence_logps(x, targets, cu), (logits,))
    for save_bytes in (0, 2**40):
        assert torch.autograd.gradcheck(lambda h, w: linear_sequence_logps(h, w, targets, cu, save_bytes=save_bytes),
                                        (hidden, weight))


def test_same_bits_every_time_with_and_without_gradients(way):
    data = example(11, 203, 24, [3, 8], way[0], ignore=(4,))
    torch.manual_seed(1)
    first = check_linear(way, *data)
    torch.manual_seed(1)
    for a, b in zip(first, check_linear(way, *data)):
        assert torch.equal(a, b)
    with torch.no_grad():
        for a, b in zip(first, linear_sequence_logps(*data, kernel=way[1])):
            assert torch.equal(a, b) and not b.requires_grad
    logits = (data[0] @ data[1].T).detach()
    runs = []
    for grad in (True, True, False):
        leaf = logits.clone().requires_grad_(grad)
        runs.append(sequence_logps(leaf * 1, *data[2:], kernel=way[1]))
        if grad:
            runs[-1][0].sum().backward()
            runs[-1] += (leaf.grad,)
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1]))
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[2]))


def test_logits_are_overwritten_and_a_second_backward_says_so(way):
    targets, cu = torch.tensor([1, 2], device=way[0]), torch.tensor([0, 1, 2], device=way[0])
    leaf = torch.randn(2, 30, device=way[0], requires_grad=True)
    logits = leaf * 1
    logps, _ = sequence_logps(logits, targets, cu, kernel=way[1])
    logps.sum().backward(retain_graph=True)
    assert torch.equal(logits, leaf.grad)                       # one tensor's memory, no second N x V
    with pytest.raises(RuntimeError, match="linear_sequence_logps, which can go back twice"):
        logps.sum().backward()
    logits = leaf * 1                                           # twice the same logits: the second would read gradients
    first, second = (sequence_logps(logits, targets, cu, kernel=way[1]) for _ in range(2))
    with pytest.raises(RuntimeError, match="logits.clone()"):
        (first[0] - 2 * second[0]).sum().backward()
    logits = torch.tanh(leaf)                                   # tanh goes back with its output: autograd notices
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        sequence_logps(logits, targets, cu, kernel=way[1])[0].sum().backward()
    leaf.grad = None                                            # the remedy
    sequence_logps(torch.tanh(leaf).clone(), targets, cu, kernel=way[1])[0].sum().backward()
    assert leaf.grad.isfinite().all()


def test_leaves_and_their_views_are_left_alone(way):
    targets, cu = torch.tensor([1, 2], device=way[0]), torch.tensor([0, 1, 2], device=way[0])
    for view in (lambda x: x, lambda x: x[:, :20], lambda x: x.view(30, 2).view(2, 30)):
        leaf = torch.randn(2, 30, device=way[0], requires_grad=True)
        before = leaf.detach().clone()
        logps, _ = sequence_logps(view(leaf), targets, cu, kernel=way[1])
        logps.sum().backward(retain_graph=True)
        once = leaf.grad.clone()
        logps.sum().backward()                                  # nothing was overwritten, so twice is right as well
        assert torch.equal(leaf.detach(), before) and torch.equal(leaf.grad, 2 * once)


def test_linear_goes_back_twice(way):
    hidden, weight, targets, cu = example(6, 50, 8, [2, 4], way[0])
    for save_bytes in (0, 2**40):                               # the second time without the kept logits
        logps, _ = linear_sequence_logps(hidden, weight, targets, cu, kernel=way[1], save_bytes=save_bytes)
        first = torch.autograd.grad(logps.sum(), (hidden, weight), retain_graph=True)
        second = torch.autograd.grad(logps.sum(), (hidden, weight))
        assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_no_second_derivative():
    hidden, weight, targets, cu = example(3, 20, 4, [3])
    logps, _ = linear_sequence_logps(hidden, weight, targets, cu)
    (dh,) = torch.autograd.grad((logps * logps).sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dh.sum().backward()


def test_inside_a_compiled_model():
    """One clean graph break at the call; values and gradients are the eager ones."""
    hidden, weight, targets, cu = example(6, 50, 8, [2, 4])

    def model(hidden, weight):
        logps, token_logps = linear_sequence_logps(torch.tanh(hidden), weight, targets, cu)
        other, _ = sequence_logps(torch.tanh(hidden) @ weight.T, targets, cu)
        return (logps * logps).sum() + token_logps.sum() + other.sum()

    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    want = torch.autograd.grad(model(hidden, weight), (hidden, weight))
    got = torch.autograd.grad(compiled(hidden, weight), (hidden, weight))
    assert torch.equal(compiled(hidden, weight), model(hidden, weight))
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    assert torch._dynamo.explain(model)(hidden, weight).graph_break_count == 2      # one for each of the two calls
    torch._dynamo.reset()


# --- Mistakes ---------------------------------------------------------------------------------------------------------

def ok():
    return dict(logits=torch.randn(4, 9), hidden=torch.randn(4, 3), weight=torch.randn(9, 3),
                targets=torch.tensor([0, 1, 2, 8]), cu_seqlens=torch.tensor([0, 1, 4]))


MISTAKES = [
    (dict(logits=torch.randn(9)), r"logits has shape \(9,\) but must be \(N, V\)"),
    (dict(logits=torch.randn(2, 2, 9)), "flatten"),
    (dict(logits=torch.randn(4, 0)), r"logits has shape \(4, 0\)"),
    (dict(logits=torch.zeros(4, 9, dtype=torch.int64)), "logits is torch.int64: cast it"),
    (dict(targets=torch.tensor([0, 1, 2])), r"targets is torch.int64 \(3,\) but must be int64 \(4,\)"),
    (dict(targets=torch.tensor([0, 1, 2, 8], dtype=torch.int32)), "targets is torch.int32"),
    (dict(targets=torch.tensor([0, 1, 9, 8])), "target 9 is not below the vocabulary size 9"),
    (dict(targets=torch.zeros(4, dtype=torch.int64, device="meta")), "targets is on meta but"),
    (dict(cu_seqlens=torch.tensor([0.0, 4.0])), "cu_seqlens is torch.float32"),
    (dict(cu_seqlens=torch.zeros(0, dtype=torch.int64)), r"cu_seqlens is torch.int64 \(0,\)"),
    (dict(cu_seqlens=torch.tensor([[0, 4]])), r"cu_seqlens is torch.int64 \(1, 2\)"),
    (dict(cu_seqlens=torch.tensor([0, 3])), r"cu_seqlens is \[0, 3\] but must rise from 0 to N = 4"),
    (dict(cu_seqlens=torch.tensor([1, 4])), r"\[1, 4\]"),
    (dict(cu_seqlens=torch.tensor([0, 3, 2, 4])), r"\[0, 3, 2, 4\]"),
    (dict(kernel="cuda"), "kernel is 'cuda': choose auto, triton or torch"),
    (dict(hidden=torch.randn(4, 5)), r"weight \(9, 3\) on cpu does not fit hidden \(4, 5\)"),
    (dict(hidden=torch.randn(12)), r"hidden has shape \(12,\) but must be \(N, D\)"),
    (dict(weight=torch.randn(0, 3)), r"weight \(0, 3\)"),
    (dict(weight=torch.randn(9, 3, device="meta")), "on meta does not fit"),
    (dict(weight=torch.randn(9, 3).bfloat16()), "weight is torch.bfloat16 but hidden torch.float32: cast weight"),
    (dict(hidden=torch.randn(4, 3).double()), "weight is torch.float32 but hidden torch.float64"),
    (dict(save_bytes=-1), "save_bytes is -1"),
]


@pytest.mark.parametrize("wrong, message", MISTAKES, ids=[m for _, m in MISTAKES])
def test_mistakes_are_named(wrong, message):
    good, options = ok(), {k: v for k, v in wrong.items() if k in ("kernel", "save_bytes")}
    good.update({k: v for k, v in wrong.items() if k not in options})
    head = "hidden" in wrong or "weight" in wrong or "save_bytes" in wrong
    for linear in {head, True} - ({True} if "logits" in wrong else set()):
        with pytest.raises(ValueError, match=message):
            if linear:
                linear_sequence_logps(good["hidden"], good["weight"], good["targets"], good["cu_seqlens"], **options)
            else:
                sequence_logps(good["logits"], good["targets"], good["cu_seqlens"], **options)


@pytest.mark.skipif(K.triton is None or INTERPRETED, reason="needs triton, compiled")
def test_triton_on_cpu_tensors_names_the_remedy():
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        sequence_logps(torch.randn(2, 9), torch.tensor([0, 1]), torch.tensor([0, 2]), kernel="triton")


COPIED = """
import sys
sys.modules["triton"] = None                    # import triton now raises ImportError
import torch, logprob
assert logprob.triton is None
torch.manual_seed(0)
h, w = torch.randn(6, 8, requires_grad=True), torch.randn(40, 8, requires_grad=True)
y, cu = torch.randint(0, 40, (6,)), torch.tensor([0, 2, 6])
for logps in (logprob.linear_sequence_logps(h, w, y, cu)[0], logprob.sequence_logps(h @ w.T, y, cu)[0]):
    dh, dw = torch.autograd.grad(logps[0] - logps[1], (h, w))
    token = torch.log_softmax(h @ w.T, 1).gather(1, y[:, None])[:, 0]
    want = torch.stack([token[:2].sum(), token[2:].sum()])
    want_dh, want_dw = torch.autograd.grad(want[0] - want[1], (h, w))
    torch.testing.assert_close(logps, want)
    torch.testing.assert_close(dh, want_dh)
    torch.testing.assert_close(dw, want_dw)
try:
    logprob.sequence_logps(h @ w.T, y, cu, kernel="triton")
except ValueError as error:
    assert "pip install triton" in str(error)
    print("ok")
"""


def test_the_file_alone_without_triton(tmp_path):
    shutil.copy(K.__file__, tmp_path)
    assert "ok" in child(COPIED, path=tmp_path)
