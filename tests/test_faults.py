"""It never loses work: each fault is injected into real runs of the three trainers, and what is left is looked at."""

import json
import math
import os
import random
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

import train_pref
import train_rm
import train_sft
from plumbing.checkpoint import checkpoints, verify_checkpoint
from runs import finish, full_disk, kill_at_event, launch, obey_permissions, spoil

ROOT = Path(train_pref.__file__).resolve().parent
SCRIPTS = ["train_pref", "train_sft", "train_rm"]
MODULES = dict(train_pref=train_pref, train_sft=train_sft, train_rm=train_rm)


@pytest.fixture(scope="module")
def model_dir(tiny_llama, tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("model") / "tiny", seed=3)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """20 pairs, of which train_sft.py takes the chosen response: five steps of four an epoch."""
    rng = np.random.default_rng(0)
    text = lambda low, high: "".join(rng.choice(list("abcdefgh .,"), rng.integers(low, high)))
    rows = [dict(prompt=text(3, 24) + ":", chosen="A" + text(1, 14), rejected="B" + text(1, 14)) for _ in range(20)]
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def flags(model, data, out, *more, **values):
    values = dict(model=model, data=data, eval_data="", out=out, epochs=2, batch_size=4, micro_batch_size=2, lr=1e-3, warmup_steps=2,
                  max_length=48, max_prompt_length=28, save_every=1, eval_every=0, keep_state=0, precision="fp32") | values
    return [*(word for name, value in values.items() for word in (f"--{name}", value)), *more]


def metrics_of(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()[1:]]
    return [{k: v for k, v in line.items() if k not in ("tokens_per_s", "step_s", "mem_gb")} for line in lines]


def assert_same_run(a, b):
    """The same checkpoints, of the same files with the same bytes (weights, moments, random state, cursor), and the same log."""
    files = lambda out: {p.relative_to(out): p.read_bytes() for p in out.rglob("*")
                         if p.is_file() and p.name not in ("metrics.jsonl", ".lock")}
    of_a, of_b = files(a), files(b)
    assert of_a.keys() == of_b.keys() and [str(name) for name in of_a if of_a[name] != of_b[name]] == []
    assert metrics_of(a) == metrics_of(b)


def verified(checkpoint):
    verify_checkpoint(checkpoint)
    return checkpoint


@pytest.fixture(scope="module")
def straight(context, model_dir, data, tmp_path_factory):
    """-> make(script, form) -> a run of 9 steps without interruption, made once; the form is its ranks and flags: "2 --shard"."""
    made = {}

    def make(script, form):
        if (script, form) not in made:
            tmp = tmp_path_factory.mktemp("straight")
            argv = flags(model_dir, data, tmp / "run", *form.split()[1:], max_steps=9, eval_data=data, eval_every=3)
            finish(launch(context, script, tmp / "log", argv, world=int(form[0]))).ok()
            made[script, form] = tmp / "run"
        return made[script, form]

    return make


# ------------------------------------------------------------------------------------------------------------- resuming
@pytest.mark.parametrize("form", ["1", "2", "2 --shard"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_resume_is_exact(run_script, straight, model_dir, data, tmp_path, script, form):
    """Split at step 1, in the middle and at the end of epoch 1, in epoch 2, and twice in a row; the signals go to either rank."""
    out, world = tmp_path / "run", int(form[0])
    argv = flags(model_dir, data, out, *form.split()[1:], max_steps=9, eval_data=data, eval_every=3)
    done = 0
    for at, signum in ((1, signal.SIGTERM), (3, signal.SIGUSR1), (5, signal.SIGINT), (7, signal.SIGTERM), (8, signal.SIGTERM)):
        result = run_script(script)(*argv, world=world, call=at - done, action=signum, on_rank=at % world)
        assert result.code == 128 + signum and f"stopped by signal {signum:d} after step {at}" in result.out, result.err
        assert not done or f"resumed from {out}/step_{done:06d}" in result.out
        done = at
    run_script(script)(*argv, world=world).ok()
    assert_same_run(straight(script, form), out)


@pytest.mark.parametrize("first, then", [("1", "2"), ("2", "1"), ("2 --shard", "1")])
@pytest.mark.parametrize("script", SCRIPTS)
def test_resume_on_another_number_of_ranks(run_script, straight, model_dir, data, tmp_path, script, first, then):
    out = tmp_path / "run"
    for form, code, action in ((first, 143, signal.SIGTERM), (then, 0, None)):
        argv = flags(model_dir, data, out, *form.split()[1:], max_steps=9, eval_data=data, eval_every=3)
        assert run_script(script)(*argv, world=int(form[0]), call=3, action=action).code == code
    a, b = (load_file(run / "final" / "model.safetensors") for run in (straight(script, "1"), out))
    assert max(((a[name] - b[name]).norm() / a[name].norm()).item() for name in a) < 1e-6


# ---------------------------------------------------------------------------------------------------------------- kill -9
def test_killed_at_20_moments(run_script, model_dir, data, tmp_path):
    """A run that saves every step and keeps two is killed 20 times, each time while it opens, makes, renames or removes a file:
    all checkpoints are whole, the newest is never lost, and in the end it is the run that nobody killed."""
    cli, rng, out = run_script("train_pref"), random.Random(0), tmp_path / "run"
    argv = lambda out: flags(model_dir, data, out, epochs=12, keep=2)
    newest, left_behind = 0, set()
    for _ in range(20):
        (process, _), = cli.start(*argv(out), action=partial(kill_at_event, n=rng.randint(20, 160), directory=out))
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        steps = [int(path.name[5:]) for path in map(verified, checkpoints(out))]
        assert len(steps) == len(list(out.glob("step_*"))) and max(steps, default=0) >= newest
        newest = max(steps, default=0)
        left_behind |= {path.name.split(".")[-1] for path in out.glob(".step_*")}
    assert newest >= 10 and left_behind == {"tmp", "old"}  # both were caught half-way
    assert f"resumed from {out}/step_{newest:06d}" in cli(*argv(out)).ok().out
    cli(*argv(tmp_path / "straight" / "run")).ok()
    assert_same_run(tmp_path / "straight" / "run", out)


# ----------------------------------------------------------------------------------------------------------- disk, output
def intact_and_resumes(cli, argv, out, step, expected):
    """The checkpoint of `step` is the newest and whole, nothing is half there, and the run goes on to the same end."""
    assert verified(checkpoints(out)[-1]).name == f"step_{step:06d}"
    assert not (out / f".step_{step + 1:06d}.tmp").exists()
    cli(*argv).ok()
    assert_same_run(expected, out)


@pytest.mark.parametrize("script, world", [("train_pref", 2), ("train_sft", 1), ("train_rm", 1)])
def test_disk_full(run_script, straight, model_dir, data, tmp_path, script, world):
    """The weights of step 4 do not fit."""
    out = tmp_path / "run"
    argv = flags(model_dir, data, out, max_steps=9, eval_data=data, eval_every=3)
    result = run_script(script)(*argv, world=world, call=4, action=partial(full_disk, size=30_000))
    result.refused(f"cannot write {out}/step_000004", "File too large", "earlier checkpoints are intact")
    intact_and_resumes(partial(run_script(script), world=world), argv, out, 3, straight(script, str(world)))


def test_disk_full_for_other_files(run_script, tiny_llama, data, tmp_path):
    """What is not weights: the log's header, the tokenizer, a line of the log."""
    model = tiny_llama(tmp_path / "model", hidden_size=2, num_attention_heads=1, num_key_value_heads=1, intermediate_size=2,
                       num_hidden_layers=1, tie_word_embeddings=True)
    out, cli = tmp_path / "run", run_script("train_pref")
    argv = flags(model, data, out, epochs=4, max_steps=15)
    cli(*argv, action=partial(full_disk, size=800)).refused(f"cannot write {out}/metrics.jsonl")
    assert [path.name for path in out.iterdir()] == [".lock"]  # not a half of it either
    cli(*argv, call=1, action=partial(full_disk, size=5000)).refused(f"cannot write {out}/step_000001")
    assert not list(out.glob("*step*"))
    assert (model / "model.safetensors").stat().st_size < 5000 < (model / "tokenizer.json").stat().st_size
    cli(*argv, call=5, action=partial(full_disk, size=6000)).refused(f"cannot write {out}/metrics.jsonl", "File too large")
    cli(*argv).ok()
    assert [line["step"] for line in metrics_of(out)] == list(range(1, 16))


def lock(model, directory):
    obey_permissions(model)
    os.chmod(directory, 0o555)


def test_read_only_output(run_script, straight, model_dir, data, tmp_path):
    locked, out, cli = tmp_path / "locked", tmp_path / "run", run_script("train_pref")
    locked.mkdir()
    locked.chmod(0o555)
    cli(*flags(model_dir, data, locked / "run"), action=obey_permissions).refused("Permission denied", locked / "run")
    (tmp_path / "file").write_text("words")
    cli(*flags(model_dir, data, tmp_path / "file")).refused(tmp_path / "file")
    cli(*flags(model_dir, data, tmp_path / "file" / "run")).refused(tmp_path / "file")
    argv = flags(model_dir, data, out, max_steps=9, eval_data=data, eval_every=3)
    cli(*argv, call=4, action=partial(lock, directory=out)).refused(f"cannot write {out}/step_000004", "Permission denied")
    out.chmod(0o755)
    intact_and_resumes(cli, argv, out, 3, straight("train_pref", "1"))


def test_output_of_another_script(run_script, straight, model_dir, data, tmp_path):
    out = Path(shutil.copytree(straight("train_pref", "1"), tmp_path / "run"))
    for script in ("train_sft", "train_rm"):
        run_script(script)(*flags(model_dir, data, out)).refused(out, "script was 'train_pref'")
    assert_same_run(straight("train_pref", "1"), out)


# ------------------------------------------------------------------------------------------------------------- corruption
@pytest.mark.parametrize("name", ["step_000009", "final"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_flipped_bits_and_cut_files(straight, tmp_path, script, name, capsys):
    """200 bits, each alone, in files drawn by lot: the manifest names the file. So it does where one is cut off or gone.
    Weights and trainer/ are refused, an edited text is warned of, a missing one is refused."""
    directory, rng = Path(shutil.copytree(straight(script, "1") / name, tmp_path / name)), random.Random(0)
    module = MODULES[script]
    paths = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != "manifest.json")
    contents = {path: path.read_bytes() for path in paths}
    verify_checkpoint(directory)
    assert not capsys.readouterr().out
    seen = set()
    for k in range(200 + 4 * len(paths)):
        path = rng.choice(paths) if k < 200 else paths[(k - 200) // 4]
        content = bytearray(contents[path])
        if k < 200:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        else:
            content = content[: (0, len(content) // 2, len(content) - 1)[k % 4 % 3]]
        path.write_bytes(content)
        gone = k >= 200 and k % 4 == 3
        if gone:
            path.unlink()
        strict = path.suffix == ".safetensors" or path.parent != directory
        seen.add(strict)
        if strict or gone:
            with pytest.raises(module.UserError) as caught:
                verify_checkpoint(directory)
            assert str(path) in str(caught.value)
        else:
            verify_checkpoint(directory)
            assert capsys.readouterr().out == f"warning: {path} was edited; it is used as it is\n"
        path.write_bytes(contents[path])
    verify_checkpoint(directory)
    assert seen == {True, False} and not capsys.readouterr().out
    (directory / "other.safetensors").write_bytes(contents[directory / "model.safetensors"])  # weights from elsewhere
    with pytest.raises(module.UserError, match="other.safetensors"):
        verify_checkpoint(directory)
    (directory / "other.safetensors").unlink()
    (directory / "manifest.json").write_text("{")
    with pytest.raises(module.UserError, match="manifest.json"):
        verify_checkpoint(directory)


# ------------------------------------------------------------------------------------------------------------------- NaN
@pytest.mark.parametrize("factor, gradient", [(math.nan, False), (math.inf, True), (math.nan, True)])
@pytest.mark.parametrize("form", ["ddp", "shard"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_all_ranks_skip_together(run_script, model_dir, data, tmp_path, script, form, factor, gradient):
    """Not finite on rank 1 alone, in step 2 alone, in what the model returns or in the gradient."""
    out = tmp_path / "run"
    argv = flags(model_dir, data, out, *(["--shard"] if form == "shard" else []), max_steps=3)
    run_script(script)(*argv, world=2, call=2, action=partial(spoil, factor=factor, gradient=gradient), on_rank=1).ok()
    assert [line["skipped"] for line in metrics_of(out)] == [0, 1, 1] and metrics_of(out)[1]["grad_norm"] is None
    weights = [load_file(out / f"step_00000{k}" / "model.safetensors") for k in (1, 2, 3)]
    assert all(tensor.isfinite().all() for tensors in weights for tensor in tensors.values())
    same = [all((a[name] == b[name]).all() for name in a) for a, b in zip(weights, weights[1:])]
    assert same == [True, False]
    if form == "ddp" and not gradient:  # resumed after it, AdamW counts the updates that were applied, not the steps
        (out / "step_000003").rename(tmp_path / "straight")
        shutil.rmtree(out / "final")
        run_script(script)(*argv, world=2).ok()
        assert (out / "step_000003" / "model.safetensors").read_bytes() == (tmp_path / "straight" / "model.safetensors").read_bytes()


def spoil_for_good(model):
    spoil(model)


@pytest.mark.parametrize("script, world", [("train_pref", 1), ("train_sft", 2), ("train_rm", 1)])
def test_ten_in_a_row_leave_a_checkpoint(run_script, model_dir, data, tmp_path, script, world):
    """From step 3 on nothing is finite: after step 12 it stops, with the weights and moments of step 2, and can go on: for ten
    steps more where nothing is finite still, and to its end where all is well again."""
    out = tmp_path / "run"
    argv = flags(model_dir, data, out, epochs=5, save_every=2)
    run_script(script)(*argv, world=world, call=3, action=spoil_for_good).refused("10 steps in a row", f"{out}/step_000012 holds")
    read = lambda step, name: (out / f"step_{step:06d}" / name).read_bytes()
    for name in ("model.safetensors", "trainer/exp_avg/model.safetensors", "trainer/exp_avg_sq/model.safetensors"):
        assert read(2, name) == read(12, name)
    run_script(script)(*argv, world=world, call=1, action=spoil_for_good).refused("10 steps in a row", f"{out}/step_000022 holds")
    assert f"resumed from {out}/step_000022" in run_script(script)(*argv, world=world).ok().out
    assert [line["skipped"] for line in metrics_of(out)] == [0, 0, *range(1, 21), 20, 20, 20]
    assert read(22, "model.safetensors") == read(2, "model.safetensors") != read(24, "model.safetensors")


# --------------------------------------------------------------------------------------------- signals, ranks that die or hang
def sleep(model):
    print("asleep", flush=True)
    time.sleep(60)


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_the_second_signal_exits_at_once(run_script, model_dir, data, tmp_path, signum):
    """A second after the first one; sooner it is torchrun's copy of the same Ctrl-C."""
    (process, log), = run_script("train_pref").start(*flags(model_dir, data, tmp_path / "run"), call=2, action=sleep)
    wait_for(lambda: os.path.exists(f"{log}.out") and "asleep" in Path(f"{log}.out").read_text())
    for pause in (0.2, 1.2):
        os.kill(process.pid, signum)
        time.sleep(pause)
        assert process.is_alive()
    os.kill(process.pid, signum)
    process.join(5)
    assert process.exitcode == 128 + signum
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step_000001"]


class Torchrun:
    """torchrun with two ranks of train_pref.py, which take a step at least."""

    def __init__(self, argv, out, *how):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *how, ROOT / "train_pref.py", *argv]
        env = os.environ | dict(CUDA_VISIBLE_DEVICES="")
        self.process = subprocess.Popen([*map(str, command)], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        wait_for(lambda: self.process.poll() is not None or (out / "step_000002").exists())
        assert self.process.poll() is None, self.process.stderr.read()
        self.workers = [int(pid) for pid in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()]
        assert len(self.workers) == 2

    def wait(self, seconds):
        """-> the exit code; no worker survives."""
        _, self.err = self.process.communicate(timeout=seconds)
        assert not [pid for pid in self.workers if os.path.exists(f"/proc/{pid}")]
        return self.process.returncode


@pytest.fixture
def torchrun(model_dir, data, tmp_path):
    started = []

    def start(*how, **values):
        argv = flags(model_dir, data, tmp_path / "run", epochs=10000, keep=3, **values)
        started.append(Torchrun(argv, tmp_path / "run", *how))
        return started[-1]

    yield start
    for run in started:
        for pid in (run.process.pid, *run.workers):
            if os.path.exists(f"/proc/{pid}") and run.process.poll() is None:
                os.kill(pid, signal.SIGKILL)


SIGNALS = "--signals_to_handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"


@pytest.mark.parametrize("signum, to, how", [(signal.SIGTERM, "torchrun", []), (signal.SIGINT, "torchrun", []),
                                             (signal.SIGUSR1, "torchrun", [SIGNALS]), (signal.SIGUSR1, "worker", [])])
def test_signals_under_torchrun(torchrun, tmp_path, signum, to, how):
    """The newest checkpoint is of the step that the log ends with. torchrun passes SIGUSR1 on if it is told to (README)."""
    run = torchrun(*how)
    os.kill(run.process.pid if to == "torchrun" else run.workers[1], signum)
    assert run.wait(25) != 0
    last = checkpoints(tmp_path / "run")[-1]
    assert int(verified(last).name[5:]) == metrics_of(tmp_path / "run")[-1]["step"]


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_dies_or_hangs(torchrun, tmp_path, fault):
    """No survivor after --timeout and the 30 s after which torchrun kills what did not end."""
    run = torchrun(timeout=4)
    os.kill(run.workers[1], fault)
    assert run.wait(4 + 30 + 8) != 0  # the rest is torchrun's own end
    said = [line for line in run.err.splitlines() if line.startswith("error: ")]
    assert said and all("another rank has died, or was silent for --timeout seconds" in line for line in said), run.err
    verify_checkpoint(checkpoints(tmp_path / "run")[-1])
    assert int(checkpoints(tmp_path / "run")[-1].name[5:]) >= metrics_of(tmp_path / "run")[-1]["step"] - 1


# ------------------------------------------------------------------------------------------------------------ wrong flags
HUGE = "99999999999999999999"
WHOLE = {flag: ["-1", "1.5", "x", "", "nan", HUGE] for flag in ("max_steps", "warmup_steps", "save_every", "eval_every",
                                                               "keep", "keep_state", "seed", "threads")}
POSITIVE = {flag: [*WHOLE["keep"], "0"] for flag in ("epochs", "batch_size", "micro_batch_size", "max_length",
                                                     "max_prompt_length", "timeout", "log_every")}
REAL = {flag: ["-1", "nan", "inf", "-inf", "x", "1e999"] for flag in ("lr", "grad_clip")}
CHOICES = {flag: ["nothing", ""] for flag in ("preset", "precision", "track", "save_dtype")}
COMMON = WHOLE | POSITIVE | REAL | CHOICES | {"model": [""], "data": [""], "chat_template_kwargs": ["x", "[1]", "3", "{"]}
WRONG = {
    "train_sft": COMMON | {"kernel": ["cuda"]},
    "train_rm": COMMON | {"center": ["-1", "nan", "inf", "x"]},
    "train_pref": COMMON | {"kernel": ["cuda"], "loss": ["simpo", ""], "beta": ["0", "-1", "nan", "inf", "x"],
                            "log_eps": ["nan", "-inf", "x"], "eta": ["-1", "nan", "inf"],
                            "alpha": ["nan", "inf", "-inf"], "r_max": ["0", "-1", "nan", "inf"],
                            "label_smoothing": ["-0.1", "0.5", "0.6", "nan"]},
}
ANY_TEXT = {"eval_data", "out", "ref"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_refuses_what_is_wrong(script, monkeypatch):
    module, made = MODULES[script], []
    init = module.Parser.__init__
    monkeypatch.setattr(module.Parser, "__init__", lambda self, *a, **k: (made.append(self), init(self, *a, **k))[1])
    module.parse_args([])
    valued = {action.dest for action in made[0]._actions if action.nargs != 0}
    assert valued == set(WRONG[script]) | (ANY_TEXT if script == "train_pref" else ANY_TEXT - {"ref"})
    for flag, values in WRONG[script].items():
        for value in values:
            with pytest.raises(module.UserError) as caught:
                module.parse_args(["--data", "mine.jsonl", f"--{flag}={value}"])
            said = str(caught.value)
            value = "inf" if value == "1e999" else value  # as Python reads it
            assert caught.value.code == 2 and "--help" in said and "\n" not in said
            assert f"--{flag}" in said and value in said, (flag, value, said)


@pytest.mark.parametrize("script", SCRIPTS)
def test_wrong_flags_exit_with_2(run_script, tmp_path, script):
    """Before any model is looked for: there is none."""
    cli = partial(run_script(script), "--model", tmp_path / "nowhere", "--data", tmp_path / "nothing.jsonl")
    cli("--lr", "nan").refused("--lr", "nan", "at least 0 and finite", code=2)
    cli("--max_length", 64, "--max_prompt_length", 64).refused("--max_prompt_length 64", code=2)
    cli("--out", "out\udcff").refused("--out 'out\\udcff'", "no UTF-8: rename it", code=2)
    cli("--learning_rate", 1, world=1).refused("--learning_rate", code=2)
    cli().refused("nowhere", code=1)
