"""Log-probabilities of token sequences, forward and backward: Triton kernels between library matrix products.

For packed rows i = 1..N (tokens), columns j = 1..V (vocabulary), targets y_i, and sequences s = rows cu[s] : cu[s+1],

    x_ij = logits, or hidden_i . weight_j                      (N, V); in the linear form never held whole
    token_logps_i = x_{i,y_i} - log sum_j exp x_ij             (N,) nats; 0 where y_i < 0 (ignored)
    logps_s = sum_{i in s} token_logps_i                       (S,) nats

Forward, "online softmax" (Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867): walk over the columns with
m = the maximum so far and z = sum exp(x - m); where m grows to m', z becomes z exp(m - m') + the new columns' sum.

Backward. Let g_i = d loss / d token_logps_i: the gradient of row i's own log-prob plus that of its sequence's sum. Then

    d token_logps_i / d x_ij = [j = y_i] - softmax(x_i)_j =: D_ij             so d loss / d x_ij = g_i D_ij
    d loss / d hidden_i = g_i (D W)_i                      one number a row, so it goes in after the product
    d loss / d W        = (g D)^T H = D^T (g H)            or before it, into H (N, D) instead of D (N, V)

With g in H a slice of dW over the vocabulary is one product with all N rows inside: final when it is written, and no
second V x D tensor to add slices up in.

What it must cost: sequence_logps reads the logits forward, reads them and writes over them backward. The linear form
does 2 N D V FLOPs forward, 4 N D V backward, 2 N D V more where logits are not kept; a slice of A logits takes 4 A
bytes, and 2 A more backward on a GPU in bf16.

16-bit inputs round nowhere before the log-probs, for the products give fp32 logits (bf16 ones would put a 512-token
sequence 0.2 nat off): scoring with and without gradients agrees bit for bit. On a GPU D is rounded to bf16 for the
backward products. No entry of D is dropped for being small: that tail is what a rejected sequence pushes on.

Copy this file anywhere: it imports torch, and triton where that is installed (3.6 or newer; NVIDIA and AMD GPUs).
"""
import math
import warnings

import torch

try:
    import triton
    import triton.language as tl
except ImportError:     # torch comes without triton on macOS, on Windows and as a CPU wheel: the torch path does it all
    triton = None

# Kept by kind of device, see _by_device.
SLICE_ELEMENTS = {"gpu": 2**27, "cpu": 2**24}   # A: logits that the linear form holds at once (fp32: 512 and 64 MiB)
SAVE_BYTES = {"gpu": 2**31, "cpu": 2**26}       # logits kept from forward to backward; CPU: no more than a slice takes
TORCH_BLOCK = {"gpu": 2**26, "cpu": 2**17}      # elements the torch path works on at a time; CPU: what stays in cache
SLICE_MULTIPLE = 256                            # slices are rounded to this, so that products see whole tiles


# --- Triton: one read of the logits forward, one read and one write backward ------------------------------------------
# (BLOCK, num_warps) by kernel and bytes per element read: 16-32 values a thread, that is a few 16-byte loads, without
# spilling registers. A table and no autotuning: that needs a GPU, and may pick another summation order every run.
CONFIGS = {"row_stats": {2: (8192, 8), 4: (4096, 8)}, "dlogits": {2: (4096, 8), 4: (4096, 8)},
           "sequence_sums": {4: (1024, 4)}}

if triton is not None:
    INTERPRET = triton.knobs.runtime.interpret      # TRITON_INTERPRET=1 before this import: kernels run on CPU tensors

    @triton.jit
    def row_stats_kernel(x_ptr, x_stride, targets_ptr, max_ptr, sum_ptr, target_logits_ptr, first_column, V,
                         BLOCK: tl.constexpr):
        """One program a row: fold V columns, the first of them number `first_column`, into the row's (m, z)."""
        row = tl.program_id(0).to(tl.int64)         # int64: row * stride passes 2^31 at 16,743 rows of 128,256
        x_ptr += row * x_stride
        # BLOCK / 4 running (m, z), each of 4 columns a step: all of a thread's own, so the loop has no barrier.
        columns = tl.arange(0, 4)[:, None] * (BLOCK // 4) + tl.arange(0, BLOCK // 4)[None, :]
        m = tl.full((BLOCK // 4,), float("-inf"), tl.float32)
        z = tl.zeros((BLOCK // 4,), tl.float32)
        for start in range(0, V, BLOCK):
            x = tl.load(x_ptr + start + columns, mask=start + columns < V, other=float("-inf")).to(tl.float32)
            m_new = tl.maximum(m, tl.max(x, 0))
            shift = tl.where(m_new == float("-inf"), 0.0, m_new)        # nothing but -inf so far: -inf - -inf is NaN
            z = z * tl.exp(m - shift) + tl.sum(tl.exp(x - shift[None, :]), 0)
            m = m_new
        m_before = tl.load(max_ptr + row)           # -inf before the first slice
        m_new = tl.maximum(m_before, tl.max(m, 0))
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        z_before = tl.load(sum_ptr + row)
        tl.store(max_ptr + row, m_new)
        tl.store(sum_ptr + row, z_before * tl.exp(m_before - shift) + tl.sum(z * tl.exp(m - shift), 0))
        y = tl.load(targets_ptr + row) - first_column
        here = (y >= 0) & (y < V)
        tl.store(target_logits_ptr + row, tl.load(x_ptr + tl.where(here, y, 0)).to(tl.float32), mask=here)

    @triton.jit
    def dlogits_kernel(x_ptr, x_stride, out_ptr, out_stride, targets_ptr, max_ptr, log_sum_ptr, g_ptr, first_column, V,
                       SCALE: tl.constexpr, BLOCK: tl.constexpr):
        """One program a block of a row: out = [j = y] - exp(x - m - log z), times g if SCALE. out may be x."""
        blocks = tl.cdiv(V, BLOCK)
        row = (tl.program_id(0) // blocks).to(tl.int64)
        columns = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
        target = tl.load(targets_ptr + row)
        m = tl.load(max_ptr + row)
        log_sum = tl.load(log_sum_ptr + row)
        x = tl.load(x_ptr + row * x_stride + columns, mask=columns < V, other=float("-inf")).to(tl.float32)
        # (x - m) - log z and not x - (m + log z): at |x| = 1e4 that sum would round by 5e-4.
        d = tl.where(columns == target - first_column, 1.0, 0.0) - tl.exp((x - m) - log_sum)
        if SCALE:
            d *= tl.load(g_ptr + row)
        d = tl.where(target < 0, 0.0, d)            # last, for an ignored row may hold NaN
        tl.store(out_ptr + row * out_stride + columns, d.to(out_ptr.dtype.element_ty), mask=columns < V)

    @triton.jit(do_not_specialize=["N", "S"])       # or each step's lengths could compile it anew
    def sequence_sums_kernel(token_logps_ptr, cu_seqlens_ptr, out_ptr, N, S, BLOCK: tl.constexpr):
        """One program a sequence, rows added in a fixed order: no atomics, the same bits every time."""
        s = tl.program_id(0)
        start = tl.load(cu_seqlens_ptr + s)
        end = tl.load(cu_seqlens_ptr + s + 1)
        # The host cannot look at cu_seqlens without waiting for the GPU: bounds that do not fit give NaN, no wild read.
        bad = (start < 0) | (end < start) | (end > N) | ((s == 0) & (start != 0)) | ((s == S - 1) & (end != N))
        total = tl.zeros((BLOCK,), tl.float32)
        for i in range(start, tl.where(bad, start, end), BLOCK):
            rows = i + tl.arange(0, BLOCK)
            total += tl.load(token_logps_ptr + rows, mask=rows < end, other=0.0)
        tl.store(out_ptr + s, tl.where(bad, float("nan"), tl.sum(total, 0)))


def _config(name, x):
    """(BLOCK, num_warps) of a kernel that reads rows of x, no wider than a row. The interpreter likes it wide."""
    block, num_warps = CONFIGS[name][x.element_size()]
    num_warps //= 2 if torch.version.hip else 1     # AMD's have 64 threads
    return min(65536 if INTERPRET else block, triton.next_power_of_2(max(4, x.shape[-1]))), num_warps


# --- The three steps, by Triton or, on a few rows at a time that stay in the cache, by torch --------------------------
def _by_device(table, x):
    return table["gpu" if x.is_cuda else "cpu"]     # is_cuda is true on AMD GPUs too


def _slices(total, size):
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def row_stats_(x, targets, first_column, row_max, row_sum, target_logits, use_triton):
    """Fold x (n, v), columns first_column onward, into the running row_max, row_sum, target_logits (n,), in place."""
    n, v = x.shape
    if use_triton:
        block, num_warps = _config("row_stats", x)
        row_stats_kernel[(n,)](x, x.stride(0), targets, row_max, row_sum, target_logits, first_column, v,
                               BLOCK=block, num_warps=num_warps)
        return
    for rows in _slices(n, max(1, _by_device(TORCH_BLOCK, x) // v)):
        part, m = x[rows].to(row_max.dtype), row_max[rows]
        m_new = torch.maximum(m, part.amax(1))
        shift = m_new.masked_fill(m_new == float("-inf"), 0.0)          # nothing but -inf so far: -inf - -inf is NaN
        row_sum[rows] = row_sum[rows] * (m - shift).exp_() + (part - shift[:, None]).exp_().sum(1)
        row_max[rows] = m_new
    y = targets - first_column
    found = x.gather(1, y.clamp(0, v - 1)[:, None])[:, 0].to(target_logits.dtype)
    target_logits.copy_(torch.where((y >= 0) & (y < v), found, target_logits))


def dlogits_(x, out, targets, first_column, row_max, log_sum, g, use_triton):
    """out (n, v) = D, or g D where g is (n,) and not None, from the logits x (n, v). out may be x itself."""
    n, v = x.shape
    if use_triton:
        block, num_warps = _config("dlogits", x)
        dlogits_kernel[(n * triton.cdiv(v, block),)](x, x.stride(0), out, out.stride(0), targets, row_max, log_sum, g,
                                                     first_column, v, SCALE=g is not None, BLOCK=block,
                                                     num_warps=num_warps)
        return
    y = targets - first_column
    at_target = torch.where((y >= 0) & (y < v), torch.ones_like(row_max) if g is None else g, 0.0)
    for rows in _slices(n, max(1, _by_device(TORCH_BLOCK, x) // v)):
        d = x[rows].to(row_max.dtype, copy=out is not x)                # without a copy where x is fp32 and given up
        d.sub_(row_max[rows, None]).sub_(log_sum[rows, None]).exp_()
        d = d.neg_() if g is None else d.mul_(-g[rows, None])
        d.scatter_add_(1, y[rows, None].clamp(0, v - 1), at_target[rows, None])
        d.masked_fill_(targets[rows, None] < 0, 0.0)                    # last, for an ignored row may hold NaN
        if out is not x or out.dtype != d.dtype:
            out[rows] = d


def sequence_sums(token_logps, cu_seqlens, use_triton):
    """(N,) -> (S,): sums over rows cu_seqlens[s] : cu_seqlens[s+1]. On a GPU, bounds that do not fit give NaN."""
    N, S = token_logps.numel(), cu_seqlens.numel() - 1
    if use_triton:
        out = torch.empty(S, device=token_logps.device, dtype=torch.float32)
        block, num_warps = _config("sequence_sums", token_logps)
        sequence_sums_kernel[(S,)](token_logps, cu_seqlens, out, N, S, BLOCK=block, num_warps=num_warps)
        return out
    bad = (cu_seqlens < 0) | (cu_seqlens > N)                           # (S+1,)
    bad[0] |= cu_seqlens[0] != 0
    bad[-1] |= cu_seqlens[-1] != N
    # In float64: segment_reduce adds rows one after the other, and N numbers cost nothing. It must see rising offsets.
    offsets = cu_seqlens.clamp(0, N).cummax(0).values
    sums = torch.segment_reduce(token_logps.double(), "sum", offsets=offsets, unsafe=True)
    return sums.masked_fill(bad[1:] | bad[:-1] | (cu_seqlens.diff() < 0), float("nan")).to(token_logps.dtype)


def _start_stats(x):
    """row_max, row_sum, target_logits (N,) before any column was seen: float32, for float64 inputs float64."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    row_max = torch.full(x.shape[:1], float("-inf"), device=x.device, dtype=dtype)
    return row_max, torch.zeros_like(row_max), torch.zeros_like(row_max)


def _finish_stats(targets, V, row_max, row_sum, target_logits):
    """-> log_sum (N,), token_logps (N,). A target >= V makes both NaN, and through log_sum the gradient too."""
    log_sum = row_sum.log().masked_fill(targets >= V, float("nan"))
    return log_sum, (target_logits - row_max - log_sum).masked_fill(targets < 0, 0.0)


def _row_gradients(d_logps, d_token_logps, targets, cu_seqlens):
    """g (N,): each row's own gradient plus its sequence's; 0 where ignored, NaN for rows behind the last sequence."""
    rows = torch.arange(targets.numel(), device=targets.device)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), rows, right=True)            # (N,), S behind the last
    d_logps = torch.cat([d_logps, d_logps.new_full((1,), float("nan"))])
    return (d_logps[sequence] + d_token_logps).masked_fill(targets < 0, 0.0)


# --- From logits ------------------------------------------------------------------------------------------------------
class _SequenceLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, cu_seqlens, use_triton, overwrite):
        stats = _start_stats(logits)
        row_stats_(logits, targets, 0, *stats, use_triton)
        log_sum, token_logps = _finish_stats(targets, logits.shape[1], *stats)
        ctx.save_for_backward(logits, targets, cu_seqlens, stats[0], log_sum)
        ctx.use_triton, ctx.overwrite = use_triton, overwrite
        return sequence_sums(token_logps, cu_seqlens, use_triton), token_logps

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_logps, d_token_logps):
        try:
            logits, targets, cu_seqlens, row_max, log_sum = ctx.saved_tensors
        except RuntimeError as error:
            if "inplace" not in str(error):
                raise
            raise RuntimeError("sequence_logps: the logits were changed after the forward, by an in-place operation or "
                               "by a backward of sequence_logps, which writes the gradient over them. Give it "
                               "logits.clone(), or use linear_sequence_logps, which can go back twice") from error
        x = logits.detach()                 # the same memory and version counter, without the graph
        out = x if ctx.overwrite else torch.empty(x.shape, device=x.device, dtype=x.dtype)
        g = _row_gradients(d_logps, d_token_logps, targets, cu_seqlens)
        dlogits_(x, out, targets, 0, row_max, log_sum, g, ctx.use_triton)
        if ctx.overwrite:
            # A Triton kernel writes behind autograd's back. Counted as a change, it makes a second backward, or that of
            # another operation that saved these logits (tanh saves its output), fail aloud and not go wrong.
            torch.autograd.graph.increment_version(x)
        return out, None, None, None, None


@torch.compiler.disable     # a clean graph break: inside a compiled model this runs eagerly, forward and backward
def sequence_logps(logits, targets, cu_seqlens, *, kernel="auto"):
    """Log-probs, in nats, of target tokens and of sequences under logits. Equations: top of this file.

    logits (N, V) float32, bfloat16, float16 or float64; targets (N,) int64, < 0 = ignored: log-prob and gradient are 0;
    cu_seqlens (S+1,) int32 or int64, from 0 to N: sequence s is rows cu_seqlens[s] : cu_seqlens[s+1], perhaps none.
    kernel: "triton", "torch", or "auto" = triton on GPUs (except for float64), torch elsewhere.
    Returns logps (S,) and token_logps (N,), float32 (float64 for float64), both differentiable.

    BACKWARD WRITES THE GRADIENT OVER THE LOGITS: no second N x V tensor. Do not use the logits after backward();
    a second backward, or that of another operation that saved them, raises RuntimeError. Pass logits.clone() to keep
    them. Left as they are: leaves and views of leaves, and logits that had to be made contiguous.

    Raises ValueError where shapes, dtypes or devices do not fit, and on the CPU for a target >= V or cu_seqlens that
    does not rise from 0 to N. On a GPU, which would have to be waited for to look, those two give NaN.
    """
    _, V = _check_matrix(logits, "logits", "(N, V)")
    targets, cu_seqlens = _check_rows(logits, "logits", targets, cu_seqlens, V)
    use_triton = _use_triton(kernel, logits)
    logits = _plain_rows(logits)
    base = logits._base if logits._is_view() else logits
    overwrite = not base.is_leaf            # a leaf's values are its owner's, and its .grad must not be its own memory
    with torch.cuda.device_of(logits):      # Triton launches on the current device
        return _SequenceLogps.apply(logits, targets, cu_seqlens, use_triton, overwrite)


# --- From hidden states and the head's weight -------------------------------------------------------------------------
def slice_shape(N, V, budget):
    """(rows, columns) of the blocks of logits held at a time, about `budget` elements each: all rows and a slice of the
    vocabulary, so that dW takes one product a slice; but square tiles, for thin products are slow, where a slice would
    be thinner than a quarter of its height."""
    if N * V <= budget:
        return max(N, 1), V
    side = math.isqrt(budget)
    rows, columns = (N, budget // N) if N <= 2 * side else (side, side)
    rounded = [max(1, round(size / SLICE_MULTIPLE)) * SLICE_MULTIPLE for size in (rows, columns)]
    return N if rows == N else min(N, rounded[0]), min(V, rounded[1])


def _block(buffer, rows, columns):
    """The front of a flat buffer as a matrix with as many rows and columns as these slices have."""
    n, v = rows.stop - rows.start, columns.stop - columns.start
    return buffer[:n * v].view(n, v)


def _product(a, b, out, add=False):
    """out = a @ b or out += a @ b. For 16-bit a, b and fp32 out: the GPU library's own fp32 sums, not rounded to 16.
    Only products with out=: torch.autocast leaves them alone, and slices land where they belong without a copy."""
    if a.dtype == out.dtype:
        return out.addmm_(a, b) if add else torch.mm(a, b, out=out)
    if add:
        return torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    return torch.mm(a, b, out_dtype=out.dtype, out=out)


def _product_dtypes(hidden):
    """dtypes of the factors of the forward and of the backward products. GPU: 16-bit for 16-bit inputs; for fp16 bf16
    backward, since g may leave fp16's range. Elsewhere 16-bit slices are upcast one by one: torch multiplies 16-bit
    matrices on many CPUs some 100 times slower than fp32, and rounds more."""
    if hidden.dtype in (torch.float32, torch.float64):
        return hidden.dtype, hidden.dtype
    return (hidden.dtype, torch.bfloat16) if hidden.is_cuda else (torch.float32, torch.float32)


class _LinearSequenceLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, cu_seqlens, use_triton, keep):
        N, V = hidden.shape[0], weight.shape[0]
        height, width = ctx.tile = slice_shape(N, V, _by_device(SLICE_ELEMENTS, hidden))
        stats = _start_stats(hidden)
        dtype, _ = _product_dtypes(hidden)
        h = hidden.to(dtype)
        # Kept logits are fp32, never bf16: near 20 that rounds by up to 0.06, percents of a probability, and worst for
        # the target's 1 - p. Where fp32 does not fit save_bytes, computing them again costs 2 N D V and loses nothing.
        kept, buffer = [], torch.empty(N * V if keep else height * width, device=h.device, dtype=stats[0].dtype)
        for columns in _slices(V, width):           # the vocabulary outermost: one slice of weight at a time
            w = weight[columns].to(dtype)                                                       # (v, D)
            for rows in _slices(N, height):
                x = _product(h[rows], w.T, _block(buffer, rows, columns))                       # (n, v)
                row_stats_(x, targets[rows], columns.start, *(stat[rows] for stat in stats), use_triton)
                if keep:
                    kept.append(x)
                    buffer = buffer[x.numel():]
        log_sum, token_logps = _finish_stats(targets, V, *stats)
        ctx.save_for_backward(hidden, weight, targets, cu_seqlens, stats[0], log_sum)
        ctx.kept, ctx.use_triton = kept, use_triton
        return sequence_sums(token_logps, cu_seqlens, use_triton), token_logps

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_logps, d_token_logps):
        hidden, weight, targets, cu_seqlens, row_max, log_sum = ctx.saved_tensors
        need_dh, need_dw = ctx.needs_input_grad[:2]
        (N, D), V, (height, width) = hidden.shape, weight.shape[0], ctx.tile
        kept, ctx.kept = ctx.kept, []               # used up here: a second backward computes the logits again
        g = _row_gradients(d_logps, d_token_logps, targets, cu_seqlens)[:, None]                # (N, 1)
        forward_dtype, dtype = _product_dtypes(hidden)
        h, ignored = hidden.to(forward_dtype), targets[:, None] < 0
        # The rows of ignored tokens become 0 instead of being multiplied by it: they may hold NaN.
        gh = (g * hidden).masked_fill_(ignored, 0.0).to(dtype) if need_dw else None             # (N, D)
        dh = torch.zeros(N, D, device=h.device, dtype=g.dtype) if need_dh else None
        dw = torch.empty(V, D, device=h.device, dtype=weight.dtype) if need_dw else None
        buffer = None if kept else torch.empty(height * width, device=h.device, dtype=g.dtype)
        rounded = None if dtype == g.dtype else torch.empty(height * width, device=h.device, dtype=dtype)
        tiles = _slices(N, height) or [slice(0, 0)]                     # N = 0 still has a dW to fill, with zeros
        # Straight into dW, but not where each row tile's part would be rounded to 16 bits, or in another kind of them.
        straight = need_dw and (dw.dtype == g.dtype or (dw.dtype == dtype and len(tiles) == 1))
        for columns in _slices(V, width):
            w = weight[columns].to(forward_dtype)                                               # (v, D)
            dw_slice = dw[columns] if straight else torch.empty_like(w, dtype=g.dtype) if need_dw else None
            for rows in tiles:
                x = kept.pop(0) if kept else _product(h[rows], w.T, _block(buffer, rows, columns))
                d = x if rounded is None else _block(rounded, rows, columns)                    # (n, v)
                dlogits_(x, d, targets[rows], columns.start, row_max[rows], log_sum[rows], None, ctx.use_triton)
                if need_dh:
                    _product(d, w.to(dtype), dh[rows], add=True)        # fp32 over the slices, g at the end
                if need_dw:
                    _product(d.T, gh[rows], dw_slice, add=rows.start > 0)
            if need_dw and not straight:
                dw[columns] = dw_slice
        if need_dh:
            dh = dh.mul_(g).masked_fill_(ignored, 0.0).to(hidden.dtype)
        return dh, dw, None, None, None, None


@torch.compiler.disable
def linear_sequence_logps(hidden, weight, targets, cu_seqlens, *, save_bytes=None, kernel="auto"):
    """What sequence_logps(hidden @ weight.T, targets, cu_seqlens) gives, without holding the (N, V) logits.

    hidden (N, D) float32, bfloat16, float16 or float64; weight (V, D) of the same dtype, or float32 master weights for
    a 16-bit hidden: on a GPU slices of them are cast to it for the products; their gradient comes in float32.
    save_bytes: keep the logits for backward if they fit, at 4 N V bytes (float64: 8), instead of computing them twice.
    0 = never, None = SAVE_BYTES (GPU 2 GiB, CPU 64 MiB). It changes time and memory, and not one bit of the log-probs.
    targets, cu_seqlens, kernel, results and errors: as in sequence_logps. Under torch.autocast hidden is cast first, as
    for torch.nn.Linear. Backward leaves its inputs alone, may run twice, and skips what needs no gradient (a frozen
    head costs 2 N D V less). Equations: top of this file.
    """
    _, D = _check_matrix(hidden, "hidden", "(N, D)")
    V, weight_D = _check_matrix(weight, "weight", "(V, D)")
    if weight_D != D or V == 0 or weight.device != hidden.device:
        raise ValueError(f"weight {tuple(weight.shape)} on {weight.device} does not fit hidden {tuple(hidden.shape)} "
                         f"on {hidden.device}: give (V, {D}), as torch.nn.Linear({D}, V).weight is, on that device")
    targets, cu_seqlens = _check_rows(hidden, "hidden", targets, cu_seqlens, V)
    if save_bytes is None:
        save_bytes = _by_device(SAVE_BYTES, hidden)
    elif save_bytes < 0:
        raise ValueError(f"save_bytes is {save_bytes}: give a number of bytes >= 0 (0 = never keep logits)")
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    if weight.dtype != hidden.dtype and (weight.dtype != torch.float32 or hidden.dtype == torch.float64):
        raise ValueError(f"weight is {weight.dtype} but hidden {hidden.dtype}: cast weight to hidden's dtype (for a "
                         "16-bit hidden float32 will do too)")
    use_triton = _use_triton(kernel, hidden)
    keep = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    keep = keep and hidden.shape[0] * V * (8 if hidden.dtype == torch.float64 else 4) <= save_bytes
    hidden, weight = _plain_rows(hidden), _plain_rows(weight)
    with torch.cuda.device_of(hidden):
        return _LinearSequenceLogps.apply(hidden, weight, targets, cu_seqlens, use_triton, keep)


# --- Checks -----------------------------------------------------------------------------------------------------------
def _check_matrix(x, name, form):
    if x.dim() != 2 or x.shape[1] == 0:
        raise ValueError(f"{name} has shape {tuple(x.shape)} but must be {form}: flatten leading dimensions first")
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"{name} is {x.dtype}: cast it to float32, bfloat16, float16 or float64")
    if hasattr(x, "full_tensor"):
        raise ValueError(f"{name} is a DTensor: call this in the forward of the sharded module, where parameters are "
                         f"gathered, or pass {name}.full_tensor()")
    return x.shape


def _check_rows(x, name, targets, cu_seqlens, V):
    """Check targets and cu_seqlens against the rows of x; return both as contiguous int64."""
    N = x.shape[0]
    if targets.shape != (N,) or targets.dtype != torch.int64:
        raise ValueError(f"targets is {targets.dtype} {tuple(targets.shape)} but must be int64 ({N},), one id for each "
                         f"row of {name}")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens is {cu_seqlens.dtype} {tuple(cu_seqlens.shape)} but must be int32 or int64 "
                         "(S+1,): 0, then the cumulative sum of the lengths")
    for other, value in (("targets", targets), ("cu_seqlens", cu_seqlens)):
        if value.device != x.device:
            raise ValueError(f"{other} is on {value.device} but {name} on {x.device}: pass {other}.to({name}.device)")
    targets, cu_seqlens = targets.contiguous(), cu_seqlens.to(torch.int64).contiguous()
    if x.is_cuda:           # looking at values would wait for the GPU; what does not fit gives NaN there
        return targets, cu_seqlens
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != N or (cu_seqlens.diff() < 0).any():
        raise ValueError(f"cu_seqlens is {cu_seqlens.tolist()[:20]} but must rise from 0 to N = {N}: 0, then the "
                         "cumulative sum of the lengths, ignored rows counted")
    if N and targets.max() >= V:
        raise ValueError(f"target {targets.max().item()} is not below the vocabulary size {V}: do tokenizer and model "
                         "fit? (negative targets are ignored)")
    return targets, cu_seqlens


def _plain_rows(x):
    """x if its rows are contiguous and do not overlap (as in a slice of a wider tensor), else a contiguous copy."""
    return x if x.stride(1) == 1 and (x.stride(0) >= x.shape[1] or x.shape[0] <= 1) else x.contiguous()


def _use_triton(kernel, x):
    if kernel not in ("auto", "triton", "torch"):
        raise ValueError(f"kernel is {kernel!r}: choose auto, triton or torch")
    if kernel == "torch" or (kernel == "auto" and (not x.is_cuda or x.dtype == torch.float64)):
        return False
    if triton is None and kernel == "auto":
        warnings.warn("triton is not installed: log-probs take the slower torch path (pip install triton)")
        return False
    if triton is None:
        raise ValueError("kernel='triton', but triton is not installed: pip install triton, or use kernel='torch'")
    if x.dtype == torch.float64:
        raise ValueError("kernel='triton' computes in float32: use kernel='torch' for float64 inputs")
    if not x.is_cuda and not INTERPRET:
        raise ValueError(f"kernel='triton' on a {x.device.type} tensor: move it to a GPU, use kernel='torch', or set "
                         "TRITON_INTERPRET=1 before Python starts, for Triton's (slow) interpreter")
    return True
