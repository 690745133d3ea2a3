"""Speed, memory and gradient error of kernels/logprob.py beside its peers, alternated in one process.

    python kernels/bench.py [--shapes 512,256,64 2048,49152,576] [--runs 5] [--out rows.jsonl]     # N, V, D of each

Logits group: from logits (N, V) made anew for each run; the least traffic is one read forward, one read and one write
backward, judged by a copy's bandwidth measured here. Linear group: from hidden (N, D) and weight (V, D); the least work
is 2 NDV FLOPs forward, and forward with backward 4 NDV (frozen head), 6 NDV (logits kept) or 8 NDV (computed again),
judged by a large matrix product's rate measured here. A peer is judged by 6 NDV, whatever it computes; Liger's losses
and torch's linear_cross_entropy compute their gradients in the forward, so that only both together compare. Inputs:
bf16 on a GPU, else float32.

Each gives log-probs whose gradients are g (N,): both signs, as in DPO; -1 for those that only sum (`sum`); a DPO loss
of its own for Liger's. `error` is the largest relative error (Frobenius) of a gradient against float64, on 64 rows
where all are too many. Memory is the peak over the inputs: of CUDA's allocator, or of the resident set (Linux, reset
before each run). A peer that is not installed, or that this device cannot run, is named. Targets, for an H100, stand
beside what they ask.
"""

import argparse
import ctypes
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F

from kernels.logprob import linear_sequence_logps, sequence_logps

SHAPES = {
    "cpu": ["512,256,64", "2048,49152,576"],
    "cuda": ["512,256,64", "4096,32000,2048", "8192,128256,2048", "16384,128256,3072", "65536,128256,4096"],
}
SEQUENCES = 8  # of equal length in each shape; pairs of them for Liger's DPO
ALL_ROWS = 2e11  # N V D up to which the float64 reference takes all rows


# ---------------------------------------------------------------- measuring; tests/bench_step.py uses these too
class Peak:
    """with Peak(device) as peak: ...; then peak.over: bytes at the peak over what was held before, or None: unknown."""

    def __init__(self, device):
        self.cuda, self.over = device.type == "cuda", None

    def __enter__(self):
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return self
        try:
            ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back, or the next run would use it uncounted
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins again here
            self.before = resident("VmRSS")
        except (OSError, AttributeError):
            self.before = None
        return self

    def __exit__(self, *error):
        if self.cuda:
            torch.cuda.synchronize()
            self.over = torch.cuda.max_memory_allocated() - self.before
        elif self.before is not None:
            self.over = max(0, resident("VmHWM") - self.before)


def resident(key):
    """VmRSS, now, or VmHWM, the peak: bytes."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key + ":")]
    return 1024 * int(line.split()[1])


def seconds(run, device):
    """Of one run: between CUDA events on a GPU, by the clock elsewhere. The GPU's own time: what the host launches
    waits behind a pause of some 10 ms, as it does in training behind the work before it."""
    if device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        torch.cuda._sleep(20_000_000)  # cycles
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def matmul_flops(device, runs=7):
    """FLOP/s of a large matrix product, bf16 on a GPU, float32 elsewhere: median of `runs`."""
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1536, torch.float32)
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    out = torch.empty_like(a)
    run = lambda: torch.mm(a, b, out=out)
    run()
    return 2 * n**3 / statistics.median(seconds(run, device) for _ in range(runs))


def copy_bandwidth(device, runs=7):
    """Bytes/s read plus written by a copy: 2 GiB on a GPU, 256 MiB elsewhere."""
    a = torch.ones(2**31 if device.type == "cuda" else 2**28, dtype=torch.uint8, device=device)
    b = torch.ones_like(a)
    return 2 * a.numel() / statistics.median(seconds(lambda: b.copy_(a), device) for _ in range(runs))


def environment(device, packages=()):
    """What a row of figures must say of the machine."""
    versions = {"torch": torch.__version__}
    for name in ("triton", *packages):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    name = f"cpu ({platform.machine()}, {os.cpu_count()} cores)"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return dict(device=name, threads=torch.get_num_threads(), load_average=os.getloadavg()[0], versions=versions)


# ---------------------------------------------------------------- the contestants
def log_softmax_gather(x, y):
    return F.log_softmax(x, -1, dtype=torch.float32).gather(1, y[:, None])[:, 0]


def contestants(device, compile):
    """-> {name: (group, gradient kind, FLOPs / NDV with backward, f)}, {name: why it is missing}. f(x, y) of the logits
    group and f(h, w, y) of the linear group -> token log-probs (N,), or a loss where the kind is sum or dpo."""
    bounds = lambda y: torch.linspace(0, len(y), SEQUENCES + 1, device=y.device).long()
    linear = lambda save_bytes: lambda h, w, y: linear_sequence_logps(h, w, y, bounds(y), save_bytes=save_bytes)[1]
    options = torch.nn.LinearCrossEntropyOptions() if hasattr(torch.nn, "LinearCrossEntropyOptions") else None
    found, missing = {
        "ours": ("logits", "signs", 0, lambda x, y: sequence_logps(x, y, bounds(y))[1]),
        "log_softmax+gather": ("logits", "signs", 0, log_softmax_gather),
        "cross_entropy": ("logits", "signs", 0, lambda x, y: -F.cross_entropy(x, y, reduction="none")),
        "ours, kept": ("linear", "signs", 6, linear(2**60)),
        "ours, computed again": ("linear", "signs", 8, linear(0)),
        "ours, frozen head": ("linear", "signs", 4, linear(2**60)),
        "matmul, log_softmax+gather": ("linear", "signs", 6, lambda h, w, y: log_softmax_gather(h @ w.T, y)),
    }, {}
    if options is None:
        missing["torch linear_cross_entropy"] = "not in this torch"
    else:
        found["torch linear_cross_entropy"] = ("linear", "sum", 6, lambda h, w, y: F.linear_cross_entropy(
            h, w, y, reduction="sum", options=options))
    if compile:
        compiled = torch.compile(log_softmax_gather)
        found["log_softmax+gather, compiled"] = ("logits", "signs", 0, compiled)
    else:
        missing["log_softmax+gather, compiled"] = "give --compile"
    try:
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE, selective_log_softmax

        found["trl selective_log_softmax"] = ("logits", "signs", 0, selective_log_softmax)
        found["trl chunked head"] = ("linear", "signs", 6, lambda h, w, y: ChunkedLogProbFunction.apply(
            h, w, None, y, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("log_probs",))[0])
    except ImportError as error:
        missing["trl"] = str(error)
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        dpo = LigerFusedLinearDPOLoss(use_ref_model=False, beta=0.1, compiled=device.type == "cuda")
        fold = lambda t: t.view(SEQUENCES, -1, *t.shape[1:])
        found["liger fused-linear DPO"] = ("linear", "dpo", 6, lambda h, w, y: dpo(w, fold(h), fold(y))[0])
        if device.type == "cuda":
            entropy = LigerFusedLinearCrossEntropyLoss(reduction="sum")
            found["liger fused-linear cross-entropy"] = ("linear", "sum", 6, lambda h, w, y: entropy(w, h, y))
        else:
            missing["liger fused-linear cross-entropy"] = "needs a GPU"
    except Exception as error:  # its import alone fails in several ways where there is no GPU
        missing["liger"] = f"{type(error).__name__}: {error}"
    try:
        from cut_cross_entropy import linear_cross_entropy

        if device.type == "cuda":
            cut = lambda eps: lambda h, w, y: -linear_cross_entropy(h, w, y, reduction="none", filter_eps=eps)
            found["cut-cross-entropy"] = ("linear", "signs", 6, cut("high"))  # drops small gradients, its default
            found["cut-cross-entropy, unfiltered"] = ("linear", "signs", 6, cut(None))
        else:
            missing["cut-cross-entropy"] = "needs a GPU"
    except Exception as error:
        missing["cut-cross-entropy"] = f"{type(error).__name__}: {error}"
    return found, missing


class Give(torch.autograd.Function):
    """box[0] as a tensor that some operation made, which it may write over; its gradient comes into box[1]."""

    @staticmethod
    def forward(ctx, anchor, box):
        ctx.box = box
        return box[0].detach()

    @staticmethod
    def backward(ctx, gradient):
        ctx.box[1] = gradient
        return None, None


class Case:
    """The inputs of a shape, and one contestant's run on them."""

    def __init__(self, N, V, D, device):
        self.shape, self.device = (N, V, D), device
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        generator = torch.Generator(device).manual_seed(0)
        make = lambda *size, scale=1.0: torch.randn(size, device=device, dtype=dtype, generator=generator) * scale
        self.h, self.w = make(N, D), make(V, D, scale=2 / D**0.5)  # logits of standard deviation 2
        self.y = torch.randint(0, V, (N,), device=device, generator=generator)
        signs = torch.where(torch.arange(N, device=device) * SEQUENCES // N % 2 == 0, 1.0, -1.0)
        self.g = {"signs": signs * 0.05, "sum": torch.full((N,), -1.0, device=device)}
        self.box = [None, None]  # the logits and their gradient
        self.sample = torch.linspace(0, N - 1, 64, device=device).long()

    def fresh(self, group, frozen):
        """Before a run, outside of its time: no gradients, and new logits."""
        self.h.grad = self.w.grad = self.box[1] = None
        self.h.requires_grad_(group == "linear")
        self.w.requires_grad_(group == "linear" and not frozen)
        if group == "logits":
            N, V, _ = self.shape
            with torch.no_grad():
                out = torch.empty(N, V, device=self.device, dtype=self.h.dtype) if self.box[0] is None else self.box[0]
                self.box[0] = torch.mm(self.h, self.w.T, out=out)
                self.sampled = out[self.sample]  # as given: ours writes over them
        else:
            self.box[0] = None

    def run(self, group, kind, f, backward):
        with torch.set_grad_enabled(backward):
            if group == "logits":
                x = self.box[0]
                if backward:
                    x = Give.apply(torch.zeros((), device=self.device, requires_grad=True), self.box)
                out = f(x, self.y)
            else:
                out = f(self.h, self.w, self.y)
            loss = (out * self.g[kind]).sum() if kind == "signs" else out
        if backward:
            loss.backward()

    def error(self, group, kind, chunk=256):
        """Largest relative error of the gradients that the last run left; None where the reference would take long."""
        N, V, D = self.shape
        whole = N * V * D <= ALL_ROWS and group == "linear"
        if kind == "dpo" and not whole:
            return None
        h, w, y = self.h.detach(), self.w.detach().double(), self.y
        blocks = torch.arange(N, device=self.device).split(chunk) if whole else [self.sample]
        logits = lambda b: self.sampled.double() if group == "logits" else h[b].double() @ w.T
        if kind == "dpo":  # halves are chosen and rejected: g = d loss / d logp = -+ beta sigmoid(-beta delta) / pairs
            logps = torch.cat([logits(b).log_softmax(1).gather(1, y[b, None])[:, 0] for b in blocks])
            chosen, rejected = logps.view(SEQUENCES, -1).sum(1).chunk(2)
            slope = -0.1 * torch.sigmoid(-0.1 * (chosen - rejected)) / (SEQUENCES // 2)
            g = torch.cat([slope, -slope]).repeat_interleave(N // SEQUENCES)
        else:
            g = self.g[kind].double()
        got_dw, dw = self.w.grad if whole else None, torch.zeros_like(w)
        difference = size = 0.0
        for b in blocks:
            d = -logits(b).softmax(1)
            d[torch.arange(len(b)), y[b]] += 1
            d *= g[b, None]
            expected, got = (d, self.box[1][b]) if group == "logits" else (d @ w, self.h.grad[b])
            difference += (got.double() - expected).square().sum().item()
            size += expected.square().sum().item()
            if got_dw is not None:
                dw += d.T @ h[b].double()
        errors = [(difference / size) ** 0.5]
        if got_dw is not None:
            errors.append(((got_dw.double() - dw).norm() / dw.norm()).item())
        return max(errors)


def measure(shape, found, missing, args, device, floors, about):
    N, V, D = shape
    case, rows = Case(N, V, D, device), {}
    for name, (group, kind, work, f) in found.items():  # the first runs compile; memory and error are the next one's
        frozen = "frozen" in name
        try:
            case.fresh(group, frozen)
            case.run(group, kind, f, False)
            case.run(group, kind, f, True)
            case.fresh(group, frozen)
            with Peak(device) as peak:
                case.run(group, kind, f, True)
            rows[name] = dict(group=group, peak=peak.over, error=case.error(group, kind), forward=[], both=[])
        except (torch.OutOfMemoryError, MemoryError):
            print(f"  {name}: out of memory")
        except Exception as error:  # a peer that cannot run this shape must not end the others' runs
            if name.startswith("ours"):
                raise
            print(f"  {name}: {type(error).__name__}: {str(error).splitlines()[0][:120]}")
    for _ in range(args.runs):
        for name, row in rows.items():
            group, kind, work, f = found[name]
            for key, backward in (("forward", False), ("both", True)):
                case.fresh(group, "frozen" in name)
                row[key].append(seconds(lambda: case.run(group, kind, f, backward), device))
    case.fresh("linear", False)
    print(f"\nN {N}, V {V}, D {D}, {str(case.h.dtype)[6:]}\n{'':30}{'forward ms':>26}{'forward + backward ms':>28}"
          f"{'floor: fwd':>11}{'bwd':>6}{'both':>6}{'/ ours':>8}{'peak MB':>9}{'error':>9}  H100 target")
    lines = []
    for name, row in rows.items():
        group, _, work, _ = found[name]
        if group == "logits":
            unit, parts, target = N * V * case.h.element_size() / floors["bandwidth"], (1, 2), ">= 90% fwd, bwd"
        else:
            unit, parts, target = N * D * V / floors["flops"], (2, work - 2), ">= 87% both (1.15x)"
        forward, both = (statistics.median(row[key]) for key in ("forward", "both"))
        least = [part * unit for part in (*parts, sum(parts))]
        times = forward, both - forward, both
        shares = [floor / s if s > 0 else None for floor, s in zip(least, times)]
        mine = rows.get("ours" if group == "logits" else "ours, kept", row)
        ratio = statistics.median(a / b for a, b in zip(row["both"], mine["both"]))
        spread = lambda t: f"{1e3 * statistics.median(t):.2f} ({1e3 * min(t):.2f}..{1e3 * max(t):.2f})"
        show = lambda value, form: "-" if value is None else format(value, form)
        print(f"{name:30}{spread(row['forward']):>26}{spread(row['both']):>28}{show(shares[0], '.0%'):>11}"
              f"{show(shares[1], '.0%'):>6}{show(shares[2], '.0%'):>6}{ratio:8.2f}"
              f"{show(row['peak'] and row['peak'] / 1e6, '.0f'):>9}{show(row['error'], '.1e'):>9}"
              f"  {target if name.startswith('ours') else ''}")
        lines.append(dict(bench="logprob", name=name, group=group, N=N, V=V, D=D, dtype=str(case.h.dtype)[6:], **about,
                          forward_s=row["forward"], both_s=row["both"], ratio_to_ours=ratio, peak_bytes=row["peak"],
                          gradient_error=row["error"], missing=missing, floors=floors,
                          share_of_floor=dict(zip(("forward", "backward", "both"), shares)),
                          least_s=dict(zip(("forward", "backward", "both"), least))))
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", nargs="+", help="N,V,D of each; N is a multiple of 8 (default: by device)")
    parser.add_argument("--runs", type=int, default=5, help="alternations")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available(),
                        help="torch.compile as a peer (default: on a GPU)")
    parser.add_argument("--note", default="", help="kept in the rows: what else ran on this machine")
    parser.add_argument("--out", type=Path, help="append the rows to this file")
    args = parser.parse_args()
    device = torch.device(args.device)
    found, missing = contestants(device, args.compile)
    for name, why in missing.items():
        print(f"missing: {name}: {why}")
    floors = dict(bandwidth=copy_bandwidth(device), flops=matmul_flops(device))
    print(f"floors: a copy {floors['bandwidth'] / 1e9:.1f} GB/s, a matrix product {floors['flops'] / 1e12:.3f} TFLOP/s")
    words = [Path(word).name if "/" in word else word for word in sys.argv[1:]]
    about = environment(device, ("trl", "liger-kernel", "cut-cross-entropy"))
    about |= dict(command=shlex.join(["kernels/bench.py", *words]), note=args.note)
    for shape in args.shapes or SHAPES[device.type]:
        lines = measure(tuple(map(int, shape.split(","))), found, missing, args, device, floors, about)
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            with args.out.open("a") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)


if __name__ == "__main__":
    main()
