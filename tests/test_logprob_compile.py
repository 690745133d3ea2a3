"""Compile every kernel of kernels/logprob.py, for every entry of its config table and input dtype, without a GPU.

For NVIDIA sm_80 and sm_90 and AMD gfx942. No kernel may spill registers on sm_90, and row_stats, whose loop over the
vocabulary may not hold a barrier, nowhere. `pytest -s` shows the table.
"""
import os
import pathlib
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton")
ROOT = pathlib.Path(__file__).parents[1]


def test_kernels_compile_without_spills():
    # In a child process: triton reads TRITON_INTERPRET when it is imported, and this process may have it set.
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, __file__], cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    print("\n" + done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[1:]]
    assert {row[2] for row in rows} == {"sm_80", "sm_90", "gfx942"}
    for kernel, dtype, target, *rest in rows:
        registers, spilled, barriers = map(int, rest[-3:])
        assert 0 < registers <= (512 if target == "gfx942" else 255), (kernel, dtype, target, registers)
        assert kernel != "row_stats" or barriers == 0, f"{barriers} barriers in the loop: {kernel} {dtype} {target}"
        if target == "sm_90" or kernel == "row_stats":
            assert spilled == 0, f"{kernel} {dtype} spills {spilled} bytes of registers a thread on {target}"


# --- What the child process runs --------------------------------------------------------------------------------------

POINTER = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32"}


def builds():
    """(name, kernel, {argument: type}, {constant: value}, num_warps, input dtype) for all that can be launched."""
    import kernels.logprob as K
    f32, ids = "*fp32", "*i64"
    for size, (block, num_warps) in K.CONFIGS["row_stats"].items():
        for dtype in ("bf16", "fp16") if size == 2 else ("fp32",):
            types = dict(x_ptr=POINTER[dtype], x_stride="i64", targets_ptr=ids, max_ptr=f32, sum_ptr=f32,
                         target_logits_ptr=f32, first_column="i32", V="i32")
            yield "row_stats", K.row_stats_kernel, types, dict(BLOCK=block), num_warps, dtype
    for size, (block, num_warps) in K.CONFIGS["dlogits"].items():
        # In place and scaled by g from logits; from the linear form's fp32 logits unscaled, on a GPU often into bf16.
        for dtype, out, scale in ((("bf16", "bf16", True), ("fp16", "fp16", True)) if size == 2 else
                                  (("fp32", "fp32", True), ("fp32", "fp32", False), ("fp32", "bf16", False))):
            types = dict(x_ptr=POINTER[dtype], x_stride="i64", out_ptr=POINTER[out], out_stride="i64", targets_ptr=ids,
                         max_ptr=f32, log_sum_ptr=f32, g_ptr=f32, first_column="i32", V="i32")
            constants = dict(SCALE=scale, BLOCK=block)
            if not scale:
                del types["g_ptr"]
                constants["g_ptr"] = None               # that is how a None argument reaches the compiler
            yield f"dlogits{'*g' if scale else ''}", K.dlogits_kernel, types, constants, num_warps, f"{dtype}>{out}"
    for size, (block, num_warps) in K.CONFIGS["sequence_sums"].items():
        types = dict(token_logps_ptr=f32, cu_seqlens_ptr=ids, out_ptr=f32, N="i32", S="i32")
        yield "sequence_sums", K.sequence_sums_kernel, types, dict(BLOCK=block), num_warps, "fp32"


def registers_and_spills(compiled, target):
    """Registers a thread, and spills: bytes of local memory on NVIDIA, spilled vector registers on AMD."""
    import tempfile
    import triton
    if target == "gfx942":
        text = compiled.asm["amdgcn"]
        return [int(re.search(rf"\.{key}:\s+(\d+)", text)[1]) for key in ("vgpr_count", "vgpr_spill_count")]
    cuobjdump = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        out = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True)
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", out.stdout + out.stderr)
    return int(usage[1]), int(usage[2]) + int(usage[3])         # spilled registers live on the thread's stack


def barriers_in_loops(compiled):
    """Barriers between a branch backward and its label, in PTX or in AMD's assembly."""
    label, branch, barrier = r"(\$L\w+):", r"bra\S*\s+(\$L\w+)", "bar.sync"
    if "amdgcn" in compiled.asm:
        label, branch, barrier = r"(\.LBB\w+):", r"s_c?branch\S*\s+(\.LBB\w+)", "s_barrier"
    seen, lines, found = {}, compiled.asm.get("ptx", compiled.asm.get("amdgcn")).splitlines(), set()
    for k, line in enumerate(lines):
        if here := re.match(label, line):
            seen[here[1]] = k
        if (to := re.search(branch, line)) and to[1] in seen:
            found |= {n for n in range(seen[to[1]], k) if barrier in lines[n]}
    assert seen, "no label: has the assembly another form?"
    return len(found)


def main():
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    import kernels.logprob as K
    # A constant folded in for one batch's N or S (1, or a multiple of 16) would compile it again in another step.
    assert [p.name for p in K.sequence_sums_kernel.params if p.do_not_specialize] == ["N", "S"]
    targets = {"sm_80": GPUTarget("cuda", 80, 32), "sm_90": GPUTarget("cuda", 90, 32),
               "gfx942": GPUTarget("hip", "gfx942", 64)}
    print("kernel         dtype      target  V      block warps shared  regs spills barriers in loops")
    for name, kernel, types, constants, num_warps, dtype in builds():
        signature = {a: types[a] if a in types else "constexpr" for a in kernel.arg_names}
        # As at a launch: torch allocates at multiples of 16 bytes, and whole vocabulary slices are multiples of 256.
        # An odd vocabulary has neither its width nor its row stride aligned and is loaded number by number.
        pointers = [a for a in types if a.endswith("_ptr")]
        even = pointers + [a for a in types if a in ("x_stride", "out_stride", "first_column", "V")]
        for target, gpu in targets.items():
            for width, aligned in (("even", even), ("odd", pointers)):
                attributes = {(kernel.arg_names.index(a),): [["tt.divisibility", 16]] for a in aligned}
                source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
                warps = num_warps // 2 if target == "gfx942" else num_warps             # as _config has it
                compiled = triton.compile(source, target=gpu, options=dict(num_warps=warps))
                registers, spilled = registers_and_spills(compiled, target)
                print(f"{name:14} {dtype:10} {target:7} {width:5} {constants['BLOCK']:6} {warps:5} "
                      f"{compiled.metadata.shared:6} {registers:5} {spilled:6} {barriers_in_loops(compiled):8}")


if __name__ == "__main__":
    main()
