"""Steps of the trainers traced as a GPU would run them, on a CPU: a tensor on the wrong device fails, and so does
whatever makes the host wait for the GPU while micro-batches are under way.

Tensors are fake: shapes, dtypes and devices without numbers, so that reading one (.item(), .tolist(), bool(), a mask as
an index) raises. PyTorch built without CUDA cannot differentiate fake CUDA tensors; a Python backend `gpu` stands in
for it, in a process of its own. What that changes: .is_cuda says so of `gpu`, torch.cuda.device_of does nothing, the
collectives too, the log-prob kernel is the torch one, and to_device copies without pin_memory, which needs CUDA; any
other copy to the GPU counts as one from memory that is not pinned, for which the host waits. Activation checkpointing
is left out: its second forward, inside the backward pass, ends the stand-in.
"""

import contextlib
import os
import random
import re
import traceback
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
STEP = dict(train_pref="train_step", train_sft="step_loss", train_rm="reward_step")
# What stands in each micro-batch, after its forward.
FORWARD = dict(train_pref="        micro_logps = policy(**batch)[0].view(-1, 2)\n",
               train_sft="            logps, _ = policy(**batch)\n",
               train_rm="        micro_rewards = reward_model(**batch).view(-1, 2)\n")
RESULT = dict(train_pref="micro_logps", train_sft="logps", train_rm="micro_rewards")


def load(script, bad):
    """The script as a module, with the line `bad`, of the forward's result x, in its micro-batches."""
    text, forward = (ROOT / f"{script}.py").read_text(), FORWARD[script]
    assert text.count(forward) == 1
    if bad:
        indent = re.match(" *", forward)[0]
        text = text.replace(forward, f"{forward}{indent}x = {RESULT[script]}\n{indent}{bad}\n")
    module = types.ModuleType(script)
    module.__file__ = str(ROOT / f"{script}.py")
    exec(compile(text, module.__file__, "exec"), module.__dict__)
    return module


def trace(script, bad, log):
    """In a process of its own: writes to `log` what went wrong, or what the host waited for in the whole step."""
    try:
        Path(log).write_text(repr(traced(script, bad)))
    except Exception:
        Path(log).write_text(traceback.format_exc())
    os._exit(0)  # threads of the backward pass are not made to end with a Python backend


def traced(script, bad):
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend("gpu")
    module, gpu, waits, copying = load(script, bad), torch.device("gpu", 0), [], []
    FakeTensorMode.avoid_device_init = property(lambda mode: True)  # single numbers too stay fake when they are moved
    FakeTensor.is_cuda = property(lambda tensor: tensor.device.type == "gpu")
    torch.cuda.device_of = lambda tensor: contextlib.nullcontext()
    module.dist.all_reduce = lambda tensor, **how: tensor
    module.dist.get_rank = lambda: 0
    module.dist.get_world_size = lambda: 2

    def to_device(values, device):
        copying.append(True)
        tensor = torch.as_tensor(values).to(device, non_blocking=True)
        copying.pop()
        return tensor

    module.to_device = to_device

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, kinds, args=(), how=None):
            given = {x.device.type for x in tree_leaves((args, how)) if isinstance(x, torch.Tensor)}
            result = func(*args, **(how or {}))
            made = {x.device.type for x in tree_leaves(result) if isinstance(x, torch.Tensor)}
            if "gpu" in given and "cpu" in made:
                waits.append(f"{func} reads the GPU")
            if "cpu" in given and "gpu" in given | made and not copying:
                raise AssertionError(f"{func} takes to the GPU what is not pinned")
            return result

    def read(tensor, value):
        """Of a number on the GPU, where the step may: once its gradients are there."""
        waits.append("a number is read")
        return value

    def step_end(model, optimizer, *how, original=module.clip_and_step):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FakeTensor, "__bool__", lambda tensor: read(tensor, True), raising=False)
            patch.setattr(FakeTensor, "item", lambda tensor: read(tensor, 1.0), raising=False)
            assert waits == []  # in all micro-batches
            return original(model, optimizer, *how)

    module.clip_and_step = step_end
    rng = random.Random(0)
    ids = lambda low, high: [rng.randrange(200) for _ in range(rng.randint(low, high))]
    kind = module.Example if script == "train_sft" else module.Pair
    rows = [kind(*(ids(3, 20) for _ in kind._fields)) for _ in range(12)]
    config = module.read_config(ROOT / "toy" / "sft")
    for micro_batch_size, plain_prompt in (("2", 256), ("3", 2)):
        module.PLAIN_PROMPT, waits[:] = plain_prompt, []
        args = module.parse_args(["--model", "m", "--data", "d", "--max_length", "48", "--max_prompt_length", "32",
                                  "--micro_batch_size", micro_batch_size])
        with torch.device("meta"):
            model = module.RewardModel(config) if script == "train_rm" else module.Llama(config, "torch")
        model.model.dtype = torch.bfloat16
        with FakeTensorMode(), Watch():
            for name, param in list(model.named_parameters()):  # as build_model() does: to_empty() does not know fake tensors
                holder, _, leaf = name.rpartition(".")
                empty = torch.nn.Parameter(torch.empty(param.shape, device=gpu))
                setattr(model.get_submodule(holder), leaf, empty)
            model.model.frequencies = torch.empty(model.model.frequencies.shape, device=gpu)  # moved there once a run
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
            for _ in range(2):
                waits.clear()
                if script == "train_sft":
                    loss = module.step_loss(model, rows, args, train=True)
                    module.clip_and_step(model, optimizer, args.grad_clip, loss.isfinite())
                elif script == "train_rm":
                    module.reward_step(model, optimizer, rows, args)
                else:
                    module.train_step(model, optimizer, rows, torch.zeros(12, 2), args)
            step = list(waits)
            assert {param.device for param in model.parameters()} == {gpu} == {m.device for m in moments(optimizer)}
            waits.clear()
            if script != "train_sft":  # rewards or log-probs of all: read once, at the end
                (module.all_rewards if script == "train_rm" else module.all_logps)(model, rows, args, "")
    return step, list(waits)


def moments(optimizer):
    return [state["exp_avg"] for state in optimizer.state.values()]


@pytest.fixture
def tracing(context, tmp_path):
    def run(script, bad=""):
        log = tmp_path / "log"
        process = context.Process(target=trace, args=(script, bad, str(log)))
        process.start()
        process.join(120)
        assert process.exitcode == 0
        return log.read_text()

    return run


@pytest.mark.parametrize("script", STEP)
def test_a_step_waits_for_the_gpu_once(tracing, script):
    """Whether the update is finite, and then the norm, which is there by then; nothing else, and nothing before."""
    evaluation = [] if script == "train_sft" else ["aten._to_copy.default reads the GPU"]
    assert tracing(script) == repr((["a number is read", "a number is read"], evaluation))


BAD = {
    "x.sum().item()": "_local_scalar_dense",
    "x.tolist()": "_local_scalar_dense",
    "bool(x.isfinite().all())": "_local_scalar_dense",
    "x[x > 0]": "DynamicOutputShapeException",
    "x.cpu()": "reads the GPU",
    "x + torch.ones(x.shape)": "FakeTensorDeviceMismatchError",
    "x * torch.tensor([2.0], device=device)": "what is not pinned",
    "x[[0, 0]]": "what is not pinned",
    "x.detach()[[0]] = 1.0": "what is not pinned",
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("script", STEP)
def test_what_waits_is_seen(tracing, script, bad):
    """Each of these, put into the micro-batches, fails the trace."""
    said = tracing(script, bad)
    assert "Traceback" in said and (BAD[bad] in said or "assert waits == []" in said), said[-600:]
