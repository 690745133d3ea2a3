"""What a machine and its user do to a run: two at once, a closed terminal, a pipe that ends, a dead torchrun, a
tracker, too little data or too high a rate.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from runs import finish
from test_faults import SCRIPTS, assert_same_run, data, flags, metrics_of, model_dir, straight, wait_for  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent


def asleep(model, until):
    """Wait in the middle of a step until the file is there."""
    Path(f"{until}.asleep").touch()
    while not until.exists():
        time.sleep(0.02)


def children(pid):
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid):
    """Neither gone nor a zombie that nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


# ---------------------------------------------------------------------------------------------------------- two at once
@pytest.mark.parametrize("script", SCRIPTS)
def test_two_runs_with_one_out(run_script, straight, model_dir, data, tmp_path, script):
    """The second says who holds it and leaves all as it is; the first goes on unharmed."""
    cli, out, wake = run_script(script), tmp_path / "run", tmp_path / "wake"
    argv = flags(model_dir, data, out, max_steps=9, eval_data=data, eval_every=3)
    first = cli.start(*argv, call=4, action=partial(asleep, until=wake))
    wait_for(Path(f"{wake}.asleep").exists)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    cli(*argv).refused(out, f"process {first[0][0].pid} on {os.uname().nodename}")
    run_script("train_sft" if script != "train_sft" else "train_rm")(*argv).refused(f"process {first[0][0].pid} on")
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    wake.touch()
    finish(first).ok()
    assert_same_run(straight(script, "1"), out)


def test_a_lock_dies_with_its_process(run_script, straight, model_dir, data, tmp_path):
    cli, out, never = run_script("train_pref"), tmp_path / "run", tmp_path / "never"
    argv = flags(model_dir, data, out, max_steps=9, eval_data=data, eval_every=3)
    first = cli.start(*argv, world=2, call=4, action=partial(asleep, until=never), on_rank=None)
    wait_for(Path(f"{never}.asleep").exists)
    cli(*argv).refused(f"process {first[0][0].pid} on")
    for process, _ in first:
        process.kill()
        process.join()
    assert f"resumed from {out}/step_000003" in cli(*argv, world=2).ok().out
    assert_same_run(straight("train_pref", "2"), out)


# ------------------------------------------------------------------------------------------------ signals of a terminal
@pytest.mark.skipif(signal.getsignal(signal.SIGHUP) == signal.SIG_IGN, reason="under nohup a hang-up is nothing, see below")
def test_hangup_saves(run_script, straight, model_dir, data, tmp_path):
    """SIGHUP, of a terminal that is closed, is as good as SIGTERM."""
    cli, out = run_script("train_pref"), tmp_path / "run"
    argv = flags(model_dir, data, out, max_steps=9, eval_data=data, eval_every=3)
    result = cli(*argv, call=3, action=signal.SIGHUP)
    assert result.code == 128 + signal.SIGHUP == 129 and "stopped by signal 1 after step 3" in result.out
    cli(*argv).ok()
    assert_same_run(straight("train_pref", "1"), out)


def ignore_hangup(model):
    """What nohup does before it starts a program."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def test_under_nohup_a_hangup_is_nothing(run_script, model_dir, data, tmp_path):
    out = tmp_path / "run"
    started = run_script("train_pref").start(*flags(model_dir, data, out, epochs=8), action=ignore_hangup)
    ((process, log),) = started
    wait_for((out / "step_000002").exists)
    os.kill(process.pid, signal.SIGHUP)
    assert process.is_alive()
    finish(started).ok()
    assert len(metrics_of(out)) == 40 and "stopped" not in Path(f"{log}.out").read_text()


# --------------------------------------------------------------------------------------------------- lost while it runs
def real(*argv, **how):
    """A command line as users type it, on the toy task."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | dict(CUDA_VISIBLE_DEVICES="")
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([*map(str, argv)], env=env, **pipes, **how)


def test_a_screen_that_is_gone_stops_nothing(model_dir, data, tmp_path):
    """`python train_pref.py | head -n 1`: head leaves after the first line, the run goes on to its end."""
    out = tmp_path / "run"
    command = shlex.join(map(str, (sys.executable, ROOT / "train_pref.py", *flags(model_dir, data, out, save_every=0))))
    process = real("bash", "-c", f"{command} | head -n 1; exit ${{PIPESTATUS[0]}}")
    said, error = process.communicate(timeout=120)
    assert process.returncode == 0 and not error and said.count("\n") == 1
    assert len(metrics_of(out)) == 10 and (out / "final" / "model.safetensors").exists()


def remove(model, directory):
    shutil.rmtree(directory)


@pytest.mark.parametrize("script, world", [("train_pref", 2), ("train_sft", 1), ("train_rm", 1)])
def test_out_removed_during_the_run(run_script, model_dir, data, tmp_path, script, world):
    out = tmp_path / "run"
    argv = flags(model_dir, data, out, max_steps=4)
    run_script(script)(*argv, world=world, call=3, action=partial(remove, directory=out)).refused(
        f"{out}/metrics.jsonl", "No such file or directory")


@pytest.mark.parametrize("header", ["[1]", "3", '"words"', "null", "{}", '{"args": 3}', "", "{", "\x00",
                                    '{"args": [1], "script": "train_pref"}', '{"script": "train_pref"}'])
def test_a_log_that_begins_with_no_header(run_script, model_dir, data, tmp_path, header):
    out = tmp_path / "run"
    out.mkdir()
    (out / "metrics.jsonl").write_text(f"{header}\n")
    run_script("train_pref")(*flags(model_dir, data, out)).refused(out, "holds no run")
    assert (out / "metrics.jsonl").read_text() == f"{header}\n"


# ------------------------------------------------------------------------------------------------------------- torchrun
def test_a_killed_torchrun_leaves_no_worker(tmp_path):
    """kill -9 of torchrun itself, which can pass nothing on: its workers end within seconds, on the toy task."""
    torchrun = sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"
    process = real(*torchrun, ROOT / "train_pref.py", "--epochs", 1000, "--out", tmp_path / "run", cwd=tmp_path)
    try:
        log = tmp_path / "run" / "metrics.jsonl"
        wait_for(lambda: process.poll() is not None or log.exists() and log.read_text().count("\n") > 3)
        assert process.poll() is None, process.stderr.read()
        workers = children(process.pid)
        assert len(workers) == 2 and all(map(alive, workers))
        process.kill()
        process.wait()
        wait_for(lambda: not any(map(alive, workers)), seconds=5)
        lines = len(metrics_of(tmp_path / "run"))
        time.sleep(1)
        assert len(metrics_of(tmp_path / "run")) == lines  # nobody trains on
    finally:
        for pid in (process.pid, *children(process.pid)) if process.poll() is None else ():
            os.kill(pid, signal.SIGKILL)


def test_torchrun_killed_while_its_workers_import(tmp_path):
    """They cannot be told of its death yet, and must see it before they wait for the group (--timeout: 30 minutes)."""
    torchrun = sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"
    process = real(*torchrun, ROOT / "train_pref.py", "--epochs", 1000, "--out", tmp_path / "run", cwd=tmp_path)
    workers = []
    try:
        wait_for(lambda: len(children(process.pid)) == 2)
        workers = children(process.pid)
        process.kill()
        process.wait()
        assert all(map(alive, workers))
        wait_for(lambda: not any(map(alive, workers)), seconds=120)
        assert not (tmp_path / "run").exists() and "torchrun is gone" in process.stderr.read()
    finally:
        for pid in filter(alive, workers):
            os.kill(pid, signal.SIGKILL)


def test_torchrun_ends_with_our_line(model_dir, tmp_path):
    """torchrun writes some 40 lines of its own after ours: the last of them repeat it."""
    torchrun = sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"
    argv = flags(model_dir, tmp_path / "nothing.jsonl", tmp_path / "run")
    process = real(*torchrun, ROOT / "train_pref.py", *argv, cwd=tmp_path)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 1
    lines = error.splitlines()
    (ours,) = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    assert str(tmp_path / "nothing.jsonl") in ours
    assert any(ours in line for line in lines[-12:]), error


@pytest.mark.parametrize("name", ["file", "link", "link/run"])
def test_an_out_that_is_no_directory(run_script, model_dir, data, tmp_path, name):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "x")
    run_script("train_pref")(*flags(model_dir, data, tmp_path / name)).refused(tmp_path / name.split("/")[0], "a link to what is not there")
    assert not (tmp_path / "nowhere").exists()


# ------------------------------------------------------------------------------------------------------------- trackers
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_tracker_that_is_not_there(run_script, model_dir, data, tmp_path, script):
    """Said before any work: before data are read, a model is loaded or a log-prob computed."""
    for kind in ("wandb", "trackio"):
        out = tmp_path / kind
        argv = flags(model_dir, data, out, "--track", kind)
        run_script(script)(*argv).refused(f"--track {kind}", f"pip install {kind}", "No module named")
        assert sorted(path.name for path in out.iterdir()) == [".dashboard_run", ".lock", "metrics.jsonl"]
    run_script(script)(*flags(model_dir, data, out, max_steps=1)).ok()  # and it is in nobody's way


def stand_in(model, directory, refuses):
    """A package wandb of two functions, where Python finds it."""
    directory.mkdir(exist_ok=True)
    (directory / "wandb.py").write_text(f"""
import json

def init(**how):
    if {refuses}:
        raise RuntimeError("no API key\\nconfigured")
    assert how["resume"] == "allow" and how["id"] == how["name"]
    write("init", how["config"])
    write("run", [how["project"], how["name"]])

def log(metrics, step):
    write("log", [step, metrics["loss"]])

def write(name, value):
    with open({str(directory)!r} + "/" + name, "a") as file:
        file.write(json.dumps(value) + "\\n")
""")
    sys.path.insert(0, str(directory))
    os.environ["WANDB_PROJECT"] = "ours"


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_tracker(run_script, model_dir, data, tmp_path, script):
    out, wandb = tmp_path / "run", tmp_path / "wandb"
    argv = flags(model_dir, data, out, "--track", "wandb", max_steps=3)
    refused = run_script(script)(*argv, action=partial(stand_in, directory=wandb, refuses=True), world=2, on_rank=None)
    refused.refused("--track wandb: no API key configured")
    assert sorted(path.name for path in out.iterdir()) == [".dashboard_run", ".lock", "metrics.jsonl"]
    run_script(script)(*argv, action=partial(stand_in, directory=wandb, refuses=False), world=2, on_rank=None).ok()
    logged = [json.loads(line) for line in (wandb / "log").read_text().splitlines()]
    assert logged == [[line["step"], line["loss"]] for line in metrics_of(out)] and len(logged) == 3  # of one rank
    (config,) = map(json.loads, (wandb / "init").read_text().splitlines())
    assert config["lr"] == 1e-3 and config["max_steps"] == 3


def test_a_resumed_run_goes_on_in_the_same_dashboard_run(run_script, model_dir, data, tmp_path):
    """Of the project that WANDB_PROJECT names; another run of the same flags is another one."""
    wandb = tmp_path / "wandb"
    wandb.mkdir()
    for out in ("run", "run", "other"):
        argv = flags(model_dir, data, tmp_path / out, "--track", "wandb", max_steps=3)
        started = run_script("train_pref").start(*argv, action=partial(stand_in, directory=wandb, refuses=False))
        finish(started).ok()
        if out == "run" and (tmp_path / "run" / "final").exists():
            for path in [*(tmp_path / "run").glob("step_*"), tmp_path / "run" / "final"]:
                shutil.rmtree(path)  # so that it begins anew, in its directory
    runs = [json.loads(line) for line in (wandb / "run").read_text().splitlines()]
    assert len(runs) == 3 and runs[0] == runs[1] != runs[2] and {project for project, _ in runs} == {"ours"}


# ---------------------------------------------------------------------------------------- runs that would learn nothing
@pytest.mark.parametrize("script", SCRIPTS)
def test_warm_up_ends_within_a_short_run(run_script, model_dir, tmp_path, script):
    """50 pairs under the paper's recipe, whose warm-up is 100 steps: a tenth of the run instead, and it says so."""
    rng = np.random.default_rng(1)
    text = lambda: "".join(rng.choice(list("abcdefgh .,"), rng.integers(3, 14)))
    rows = [dict(prompt=text() + ":", chosen="A" + text(), rejected="B" + text()) for _ in range(50)]
    path = tmp_path / "fifty.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rates = lambda name: [line["learning_rate"] for line in metrics_of(tmp_path / name)]
    cli = run_script(script)
    argv = "--model", model_dir, "--data", path, "--save_every", 0
    said = cli(*argv, "--out", tmp_path / "as_it_is").ok().out
    peak = 5e-6 if script == "train_rm" else 1e-6
    assert "--warmup_steps 100 would not end within 1 steps: 0 instead" in said
    assert rates("as_it_is") == pytest.approx([peak])  # the rate that was asked for: it was 1% of it
    said = cli(*argv, "--out", tmp_path / "longer", "--batch_size", 5, "--epochs", 2).ok().out
    assert "--warmup_steps 100 would not end within 20 steps: 2 instead" in said
    assert rates("longer")[:2] == pytest.approx([0.5 * peak, peak]) and rates("longer")[-1] == pytest.approx(0.1 * peak)
    assert max(rates("longer")) == rates("longer")[1]
    said = cli(*argv, "--out", tmp_path / "ends", "--batch_size", 5, "--epochs", 2, "--warmup_steps", 19).ok().out
    assert "would not end" not in said and max(rates("ends")) == pytest.approx(peak)


def test_weights_that_vanish_are_warned_of_once(run_script, model_dir, data, tmp_path):
    """is_dpo at a high rate: the weighted loss goes to nothing, the unweighted one does not, and that is said once."""
    cli, warning = run_script("train_pref"), "warning: for 10 steps the mean weight was under 0.01 or the ESS under 2%"
    how = dict(epochs=8, save_every=0, warmup_steps=1)
    said = cli(*flags(model_dir, data, tmp_path / "wild", lr=0.1, **how)).ok().out
    lines = metrics_of(tmp_path / "wild")
    vanished = [line["weights/mean"] < 0.01 or line["weights/ess"] < 0.02 * 4 for line in lines]
    assert all(vanished[-15:])
    last = lines[-1]
    assert last["loss"] < 0.05 * last["loss/unweighted"] and f"unweighted {last['loss/unweighted']:.4f}" in said
    assert said.count("warning: ") == said.count(warning) == 1
    at = said.splitlines().index(next(line for line in said.splitlines() if warning in line))
    first = next(k for k in range(10, 41) if all(vanished[k - 10 : k]))  # ten in a row
    assert said.splitlines()[at - 1].startswith(f"step {first}/40 ")
    said = cli(*flags(model_dir, data, tmp_path / "calm", **how)).ok().out
    assert warning not in said
    assert metrics_of(tmp_path / "calm")[0]["loss/unweighted"] == pytest.approx(np.log(2), abs=1e-6)
