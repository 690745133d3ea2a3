"""Runs of the trainers for tests, from a fork server that has imported them already: real processes with real exit codes and
signals, without seconds of imports for each."""

import importlib
import math
import os
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


def child(script, argv, env, log, call, action):
    """In the forked process: a trainer's command line, with output in the files log.out and log.err. With `action` (a signal's
    number, "nan": a loss that is not finite, or "bytes": what the rank holds is printed) something happens to the call-th step."""
    module = importlib.import_module(script)
    for suffix, descriptor in ((".out", 1), (".err", 2)):
        os.dup2(os.open(f"{log}{suffix}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.environ.update(env)
    sys.argv = [f"{script}.py", *argv]
    # What the loop calls once a step.
    name = {"train_pref": "train_step", "train_sft": "step_loss", "train_rm": "reward_step"}[script]
    calls, original = 0, getattr(module, name)

    def step(*args, **kwargs):
        nonlocal calls
        calls += kwargs.get("train", True)  # not the evaluations
        if calls == call and action == "nan":
            loss_name = {"train_pref": "preference_loss", "train_rm": "bradley_terry_loss"}[script]
            loss, spoil = getattr(module, loss_name), lambda x: tuple(map(spoil, x)) if isinstance(x, tuple) else math.nan * x
            setattr(module, loss_name, lambda *a, **k: spoil(loss(*a, **k)))
            result = original(*args)
            setattr(module, loss_name, loss)
            return result
        if calls == call and action == "bytes":
            result = original(*args)
            model, optimizer = args[:2]
            held = lambda tensors: sum(getattr(t, "to_local", lambda: t)().untyped_storage().nbytes() for t in tensors)
            moments = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
            print("bytes", held(model.parameters()), held(moments))
            return result
        if calls == call:
            signal.raise_signal(action)
        return original(*args, **kwargs)

    if action is not None:
        setattr(module, name, step)
    module.guard(module.main)


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
