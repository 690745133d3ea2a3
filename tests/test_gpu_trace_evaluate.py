"""golden and sample on a stand-in for a GPU, on a CPU: a tensor on the wrong device fails, and so does whatever makes
the host wait for the GPU beyond what is known.

Tensors have numbers here, unlike in test_gpu_trace.py, for they decide what is said: one on the device `gpu` keeps them
in a CPU tensor. Models are loaded on the CPU and moved; bf16 products that give float32 are computed in float32;
to_device copies without pin_memory, which needs CUDA; any other copy to the GPU makes the host wait.
"""

import contextlib
import json
import os
import re
import shutil
import sys
import traceback
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

ROOT = Path(__file__).resolve().parent.parent
# What happens, a letter each. b: rewards or divergences of a batch are wanted; g: its completions; t: the next tokens.
LETTERS = dict(rewards="b", divergences="b", generate="g", next_tokens="t")
# What the host waits for. r: a number; m: how many a mask takes as an index; d: a copy to the host; c: one to the GPU.
SCORED = "(bd)+"
# With top_p two numbers a token: has topk enough mass, and how many prompts go on? Else the second alone. Masks where
# one of two prompts has ended.
LIKELY, DRAWN = (f"(gc*((t{reads})+m+)?(t{reads})+d)+" for reads in ("rr", "r"))


def happens(checkpoints):
    """golden: references and checkpoints; sample, at temperature 0."""
    return SCORED + checkpoints * (LIKELY + SCORED + DRAWN + SCORED) + DRAWN


class OnGpu(torch.Tensor):
    is_cuda = True

    @staticmethod
    def __new__(cls, numbers):
        how = dict(strides=numbers.stride(), dtype=numbers.dtype, device="gpu")
        tensor = torch.Tensor._make_wrapper_subclass(cls, numbers.shape, **how)
        tensor.numbers = numbers
        return tensor

    def __torch_dispatch__(self, func, *how):
        raise AssertionError(f"{func} is not watched")

    def tolist(self):  # PyTorch's own refuses subclasses; of others it makes a copy too
        return self.cpu().tolist()


class Watch(TorchDispatchMode):
    happened = ""

    def __torch_dispatch__(self, func, kinds, args=(), how=None):
        name, how = str(func), dict(how or {})
        devices = {x.device.type for x in tree_leaves((args, how)) if isinstance(x, torch.Tensor)}
        to = torch.device(how["device"]).type if how.get("device") is not None else None
        index = [x for x in tree_leaves(args[1:2]) if isinstance(x, torch.Tensor)] if "aten.index" in name else []
        masks = any(x.dtype == torch.bool for x in index) if index else torch.Tag.dynamic_output_shape in func.tags
        if devices == {"cpu"} and to == "gpu" or index and len(devices) == 2:
            self.happened += "c"
        elif "gpu" in devices:
            assert devices == {"gpu"}, f"{name} of tensors on two devices"
            reads = torch.Tag.data_dependent_output in func.tags
            self.happened += "r" if reads else "m" if masks else "d" if to == "cpu" else ""
        if to == "gpu":
            how["device"] = "cpu"
        inputs, how = tree_map_only(OnGpu, lambda x: x.numbers, (args, how))
        if func is torch.ops.aten.mm.dtype:
            func, inputs = torch.ops.aten.mm.default, [x.to(inputs[2]) for x in inputs[:2]]
        result = func(*inputs, **how)
        return tree_map_only(torch.Tensor, OnGpu, result) if "gpu" in (to or devices) else result


def trace(folder, device, precision, place="", bad=""):
    """-> what happened or went wrong, golden's figures, samples: of two checkpoints, or briefly of one with the line
    `bad`, of a tensor x, in the function `place`."""
    text, watch, module = (ROOT / "evaluate.py").read_text(), Watch(), types.ModuleType("evaluate")
    module.watch, lines = watch, [(name, f"watch.happened += {letter!r}") for name, letter in LETTERS.items()]
    for name, line in ([(place, bad), (place, f"x = {PLACES[place]}")] if bad else []) + lines:  # at its beginning
        text, found = re.subn(rf"(\ndef {name}\((\w+)[^)]*\):\n)", rf"\1    {line}\n", text)
        assert found == 1
    module.__file__, sys.modules["evaluate"] = str(ROOT / "evaluate.py"), module
    exec(compile(text, module.__file__, "exec"), module.__dict__)

    def load_model(name, make, precision, device, chat_template_kwargs=None, original=module.load_model):
        model, *others = original(name, make, precision, "cpu")
        if device.type == "gpu":
            for part in model.modules():
                part._parameters = {name: x if x is None else OnGpu(x.detach()) for name, x in part._parameters.items()}
            model.model.frequencies = OnGpu(model.model.frequencies)  # moved there once a run
        return model, *others

    module.init_distributed, module.load_model = lambda *how: (0, 1, torch.device(device)), load_model
    module.PLAIN_PROMPT = 2 if precision == "fp32" else 256
    if device == "gpu":
        module.to_device = lambda values, device: OnGpu(torch.as_tensor(values))
    run, samples = folder / "run", folder / "samples.jsonl"
    run.mkdir(parents=True)
    if not bad:
        shutil.copytree(ROOT / "toy" / "sft", run / "step_1", ignore=shutil.ignore_patterns("manifest.json"))
        weights = load_file(run / "step_1" / "model.safetensors")
        save_file({name: 0.8 * weight for name, weight in weights.items()}, run / "step_1" / "model.safetensors")
    header = dict(pairs=1, steps=1, args=dict(batch_size=1), ref=module.model_fingerprint(ROOT / "toy" / "sft"))
    (run / "metrics.jsonl").write_text(json.dumps(header) + "\n")
    how = f"--preset toy --precision {precision} --batch_size 4".split()
    how += ["--n", "2", "--max_new_tokens", "2"] if bad else ["--n", "3", "--max_new_tokens", "12"]
    try:
        with watch if device == "gpu" else contextlib.nullcontext():
            module.golden(module.parse_args(["golden", *how, str(run)]))
            module.sample(module.parse_args(["sample", *how, "--temperature", "0", "--out", str(samples)]))
    except Exception:
        return traceback.format_exc(), [], ""
    rows = [json.loads(line) for line in (run / "golden.jsonl").read_text().splitlines()]
    return watch.happened, [x for row in rows for x in row.values() if type(x) is float], samples.read_text()


def traces(folder, hows):
    """In a process of its own: writes what each trace gives to folder/log."""
    import evaluate
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    evaluate.init_distributed(0, 60, 1)
    _setup_privateuseone_for_python_backend("gpu")
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(values, device=gpu) makes it on the CPU, then copies
    (folder / "log").write_text(json.dumps([trace(folder / str(i), *how) for i, how in enumerate(hows)]))
    os._exit(0)


@pytest.fixture
def tracing(context, tmp_path):
    def run(*hows):
        process = context.Process(target=traces, args=(tmp_path, hows))
        process.start()
        process.join(120)
        assert process.exitcode == 0
        return json.loads((tmp_path / "log").read_text())

    return run


def test_an_evaluation_waits_for_the_gpu_as_known(tracing):
    """And finds there what it finds on a CPU."""
    cpu, gpu = tracing(("cpu", "fp32"), ("gpu", "fp32"))
    assert re.fullmatch(happens(2), gpu[0]), gpu[0]
    assert "m" in gpu[0] and cpu[2].count("\n") == 3
    assert gpu[1] == pytest.approx(cpu[1], rel=1e-4, abs=1e-6) and gpu[2] == cpu[2]


PLACES = dict(next_tokens=r"\2", step_kl=r"\2", rewards=r"\2.score.weight")  # and x there, of the first argument \2
BAD = {
    "x.sum().item()": "r",
    "x.tolist()": "d",
    "x[x > 0]": "m",
    "x.cpu()": "d",
    "x + torch.ones(x.shape)": "of tensors on two devices",
    "x * torch.tensor([2.0], device=x.device)": "c",
    "x[[0, 0]]": "c",
}


@pytest.mark.parametrize("place", PLACES)
def test_what_waits_is_seen(tracing, place):
    """Each of these lines, in the token loop or where a batch is scored, fails the trace."""
    (good, *_), *found = tracing(*(("gpu", "bf16", place, bad) for bad in ("0", *BAD)))  # 0 does nothing
    assert re.fullmatch(happens(1), good), good
    for (bad, sign), (happened, *_) in zip(BAD.items(), found):
        assert ("Traceback" in happened) == (len(sign) > 1), (bad, happened[-600:])
        assert happened.count(sign) > good.count(sign) and not re.fullmatch(happens(1), happened), (bad, happened)
