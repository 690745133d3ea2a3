"""Runs of the trainers for tests, from a fork server that has imported them already: real processes with real exit codes and
signals, without seconds of imports for each."""

import ctypes
import importlib
import math
import os
import resource
import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Result:
    code: int
    out: str
    err: str

    def ok(self):
        assert self.code == 0, self.err or self.out
        return self

    def refused(self, *words, code=1):
        """The exit code and one line, which holds the words: no traceback."""
        lines = [line for line in self.err.splitlines() if line.strip()]
        assert self.code == code and "Traceback" not in self.err, self.err
        assert len(lines) == 1 and lines[0].startswith("error: "), self.err
        for word in words:
            assert str(word) in lines[0], (word, lines[0])
        return self


def spoil(model, factor=math.nan, gradient=False):
    """Multiply what the model returns on this rank, or the gradient that its body is handed, by `factor`. -> what undoes it."""
    body = next(module for name, module in model.named_modules() if name.endswith("model.norm"))

    def output(module, inputs, result):
        return tuple(factor * x for x in result) if isinstance(result, tuple) else factor * result

    def slope(module, inputs, result):
        if result.requires_grad:
            result.register_hook(lambda grad: factor * grad)

    return (body.register_forward_hook(slope) if gradient else model.register_forward_hook(output)).remove


def full_disk(model, size):
    """From now on no file grows beyond `size` bytes: writing fails, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def obey_permissions(model):
    """Take from root the capabilities by which permissions do not bind it."""
    header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.capget(header, data) == 0
    data[0] &= ~0b110  # effective: not CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert libc.capset(header, data) == 0


def kill_at_event(model, n, directory):
    """kill -9 at the n-th time from now that a file or directory is opened, made, renamed or removed in `directory`."""
    events, left = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate"}, n

    def hook(event, args):
        nonlocal left
        if event in events and (str(directory) in str(args[0]) or event in ("os.remove", "os.rmdir")):  # these by descriptor
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def child(script, argv, env, log, call, action):
    """In the forked process: a trainer's command line, with output in the files log.out and log.err. With `action` something
    happens at the call-th step: a signal by its number, "bytes" (what the rank holds is printed), or a function of the model,
    whose result, if any, is called after the step. With call 0 it happens before the program begins."""
    module = importlib.import_module(script)
    for suffix, descriptor in ((".out", 1), (".err", 2)):
        os.dup2(os.open(f"{log}{suffix}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.environ.update(env)
    sys.argv = [f"{script}.py", *argv]
    # What the loop calls once a step.
    name = {"train_pref": "train_step", "train_sft": "step_loss", "train_rm": "reward_step", "evaluate": "main"}[script]
    calls, original = 0, getattr(module, name)

    def step(*args, **kwargs):
        nonlocal calls
        train = kwargs.get("train", True)  # not the evaluations
        calls += train
        if calls != call or not train:
            return original(*args, **kwargs)
        undo = None
        if callable(action):
            undo = action(args[0])
        elif action != "bytes":
            signal.raise_signal(action)
        result = original(*args, **kwargs)
        if undo:
            undo()
        if action == "bytes":
            model, optimizer = args[:2]
            held = lambda tensors: sum(getattr(t, "to_local", lambda: t)().untyped_storage().nbytes() for t in tensors)
            moments = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
            print("bytes", held(model.parameters()), held(moments))
        return result

    if action is not None and call:
        setattr(module, name, step)
    elif action is not None:
        action(None)
    module.run_main(module.main)


def launch(context, script, log, argv, world=1, call=0, action=None, on_rank=0):
    """Start a process a rank -> [(process, path of its logs)]. on_rank None: the action is on all."""
    argv = [str(word) for word in argv]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = []
    for rank in range(world):
        env = dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        args = script, argv, env if world > 1 else {}, f"{log}.{rank}", call, action if on_rank in (rank, None) else None
        process = context.Process(target=child, args=args)
        process.start()
        started.append((process, f"{log}.{rank}"))
    return started


def finish(started):
    """-> Result of rank 0, once all ranks have ended; their exit codes must agree."""
    for process, _ in started:
        process.join(60)
    codes = [process.exitcode for process, _ in started]
    for process, _ in started:
        process.kill()
    out, err = (Path(started[0][1] + suffix).read_text() for suffix in (".out", ".err"))
    assert len(set(codes)) == 1 and codes[0] is not None, (codes, out, err)  # None: it hangs
    return Result(codes[0], out, err)
