"""What a run that is started again goes on with, and what it refuses: files damaged, edited or of something else."""

import hashlib
import json
import math
import os
import random
import shutil
import signal
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import train_pref
from runs import finish, full_disk, launch, spoil
from test_faults import SCRIPTS, assert_same_run, data, flags, metrics_of, model_dir, straight  # noqa: F401 (fixtures)

SHORT = dict(max_steps=4, save_every=2)


@pytest.fixture(scope="module")
def finished(straight, tmp_path_factory):
    """-> copy(script): a run of 9 steps that is complete, to be harmed."""
    return lambda script: Path(shutil.copytree(straight(script, "1"), tmp_path_factory.mktemp("copy") / "run"))


def again(model_dir, data, out, *more, **values):
    """The command line of the runs above."""
    return flags(model_dir, data, out, *more, **dict(max_steps=9, eval_data=data, eval_every=3) | values)


def flip(path):
    """One bit, in the last byte: of a tensor."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---------------------------------------------------------------------------------------------------------- bit for bit
@pytest.mark.parametrize("script", SCRIPTS)
def test_four_ranks(run_script, tiny_llama, data, tmp_path, script):
    """DDP orders its buckets anew after its first backward, and the sum of four ranks' gradients depends on where in a
    bucket they stand: what resumes must begin with that order too. Two ranks add the same either way."""
    cli, model = run_script(script), tiny_llama(tmp_path / "model", seed=7, num_hidden_layers=3, hidden_size=96,
                                                intermediate_size=256)  # 1.5 MB: more than DDP's first bucket
    argv = lambda out: flags(model, data, out, batch_size=10, micro_batch_size=2, epochs=5, max_steps=8, save_every=0)
    cli(*argv(tmp_path / "straight" / "run"), world=4).ok()
    assert cli(*argv(tmp_path / "run"), world=4, call=3, action=signal.SIGTERM, on_rank=2).code == 143
    shutil.copytree(tmp_path / "run" / "step_000003", tmp_path / "straight" / "run" / "step_000003")
    cli(*argv(tmp_path / "run"), world=4).ok()
    assert_same_run(tmp_path / "straight" / "run", tmp_path / "run")


@pytest.mark.parametrize("form", ["1", "2 --shard"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_saved_in_bf16_resumes_in_float32(run_script, model_dir, data, tmp_path, script, form):
    """--save_dtype bf16: final/ is bf16, rounded from what a float32 run saves, and transformers loads it; checkpoints
    are those of a float32 run, and what a resumed run goes on with is not rounded."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    cli, world, more = partial(run_script(script), world=int(form[0])), int(form[0]), form.split()[1:]
    cli(*flags(model_dir, data, tmp_path / "fp32", *more, **SHORT)).ok()
    argv = flags(model_dir, data, tmp_path / "bf16", *more, "--save_dtype", "bf16", **SHORT)
    assert cli(*argv, call=2, action=signal.SIGTERM, on_rank=world - 1).code == 143
    cli(*argv).ok()
    assert metrics_of(tmp_path / "fp32") == metrics_of(tmp_path / "bf16")
    whole = load_file(tmp_path / "fp32" / "final" / "model.safetensors")
    for name in ("step_000002", "step_000004"):
        contents = lambda out: {p.relative_to(out): p.read_bytes() for p in (out / name).rglob("*") if p.is_file()}
        assert contents(tmp_path / "bf16") == contents(tmp_path / "fp32")
    saved = load_file(tmp_path / "bf16" / "final" / "model.safetensors")
    assert saved.keys() == whole.keys() and {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    assert all(torch.equal(saved[key], whole[key].bfloat16()) for key in whole)
    auto = AutoModelForSequenceClassification if script == "train_rm" else AutoModelForCausalLM
    theirs = auto.from_pretrained(tmp_path / "bf16" / "final")
    assert theirs.dtype == torch.bfloat16 and all(torch.equal(p, saved[key]) for key, p in theirs.named_parameters())


def say_random_states(model, script):
    """From now on the run says, before its first step, after each and at its end, a hash of all global random states."""
    import numpy as np

    module = sys.modules[script]

    def say():
        states = torch.get_rng_state().numpy().tobytes(), random.getstate(), str(np.random.get_state())
        print("random state", hashlib.sha256(repr(states).encode()).hexdigest())

    def then_say(function):
        return lambda *args, **kwargs: (function(*args, **kwargs), say())[0]

    for name in ("catch_signals", "save_or_stop", "save_checkpoint"):
        setattr(module, name, then_say(getattr(module, name)))


@pytest.mark.parametrize("script", SCRIPTS)
def test_nothing_draws_once_training_has_begun(run_script, model_dir, data, tmp_path, script):
    """So a checkpoint needs no random state: that before the first step is that after each, evaluated or saved, and after
    final/, fresh and resumed."""
    argv = flags(model_dir, data, tmp_path / "run", max_steps=4, save_every=2, eval_data=data, eval_every=2)
    said = run_script(script)(*argv, action=partial(say_random_states, script=script)).ok().out
    states = [line for line in said.splitlines() if line.startswith("random state")]
    assert len(states) == 1 + 4 + 2 + 1 and len({*states}) == 1, states
    assert not list((tmp_path / "run").rglob("rng*"))


def test_keep_state(run_script, model_dir, data, tmp_path):
    """--keep_state 1: of older checkpoints the model stays, whole by its manifest, and nothing else."""
    cli, out = run_script("train_pref"), tmp_path / "run"
    argv = flags(model_dir, data, out, max_steps=4, keep_state=1)
    assert cli(*argv, call=3, action=signal.SIGTERM).code == 143
    assert [path.parent.name for path in sorted(out.glob("*/trainer"))] == ["step_000003"]
    assert [path.name for path in sorted(out.glob("step_*"))] == ["step_000001", "step_000002", "step_000003"]
    cli(*flags(out / "step_000001", data, tmp_path / "from", max_steps=1)).ok()  # loads, as it was written
    assert "edited" not in cli(*flags(out / "step_000001", data, tmp_path / "from", max_steps=1)).out
    newest = shutil.move(out / "step_000003", tmp_path / "step_000003")
    cli(*argv).refused(f"{out}/step_000002 keeps no optimizer state", "--keep_state")
    flip(out / "step_000001" / "model.safetensors")
    cli(*flags(out / "step_000001", data, tmp_path / "harmed")).refused(out / "step_000001" / "model.safetensors")
    shutil.move(newest, out / "step_000003")
    cli(*argv).ok()
    assert [path.parent.name for path in out.glob("*/trainer")] == ["step_000004"] and (out / "final").exists()


# -------------------------------------------------------------------------------------------------------------- damaged
@pytest.mark.parametrize("harm", ["flip", "delete", "manifest", "empty"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_complete_run_is_whole(run_script, finished, model_dir, data, script, harm):
    """A damaged final/ is refused by name: not "this run is complete"."""
    out = finished(script)
    run = lambda: run_script(script)(*again(model_dir, data, out))
    assert "this run is complete" in run().ok().out
    if harm == "flip":
        flip(out / "final" / "model.safetensors")
    elif harm == "delete":
        (out / "final" / "model.safetensors").unlink()
    elif harm == "manifest":
        (out / "final" / "manifest.json").unlink()
    else:
        shutil.rmtree(out / "final")
        (out / "final").mkdir()
    result = run().refused(out / "final" / ("model.safetensors" if harm in ("flip", "delete") else "manifest.json"))
    assert "complete" not in result.out


def test_edited_text_of_a_saved_model(run_script, finished, model_dir, data, tmp_path):
    """A chat template added to a model that a run saved is used, with a warning; edited weights or trainer/ are not."""
    saved, cli, chats = finished("train_pref") / "step_000009", run_script("train_pref"), tmp_path / "chats.jsonl"
    turn = lambda role, text: [dict(role=role, content=text)]
    rows = [dict(prompt=turn("user", f"q{k}"), chosen=turn("assistant", "yes"), rejected=turn("assistant", "no"))
            for k in range(4)]
    chats.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cli(*flags(saved, chats, tmp_path / "before", max_steps=1)).refused("no chat template")
    edit_json(saved / "tokenizer_config.json", chat_template="{% for m in messages %}{{ m.role }}:{{ m.content }}</s>"
              "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}")
    result = cli(*flags(saved, chats, tmp_path / "after", max_steps=1)).ok()
    assert result.out.count("warning: ") == 1 and f"warning: {saved / 'tokenizer_config.json'} was edited" in result.out
    assert "4 pairs of 4 rows" in result.out
    for name in ("trainer/state.json", "trainer/exp_avg/model.safetensors", "model.safetensors"):
        harmed = Path(shutil.copytree(saved, tmp_path / name.replace("/", "_")))
        flip(harmed / name)
        cli(*flags(harmed, data, tmp_path / "out", max_steps=1)).refused(harmed / name)


# ---------------------------------------------------------------------------------------------------- of something else
def set_theta(directory, theta):
    rope = json.loads((directory / "config.json").read_text())["rope_parameters"]
    edit_json(directory / "config.json", rope_theta=theta, rope_parameters=rope | dict(rope_theta=theta))


@pytest.mark.parametrize("script", SCRIPTS)
def test_another_model_under_the_same_name(run_script, model_dir, data, tmp_path, script):
    """--model changed between stop and resume: its config, its weights or its tokenizer."""
    model, out, cli = Path(shutil.copytree(model_dir, tmp_path / "model")), tmp_path / "run", run_script(script)
    argv = flags(model, data, out, **SHORT)
    assert cli(*argv, call=2, action=signal.SIGTERM).code == 143
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != ".lock"}
    set_theta(model, 99.0)
    cli(*argv).refused(out, "model fingerprint was")
    shutil.copy(model_dir / "config.json", model)
    flip(model / "model.safetensors")
    cli(*argv).refused(out, "model fingerprint was")
    shutil.copy(model_dir / "model.safetensors", model)
    edit_json(model / "tokenizer_config.json", chat_template="{{ messages }}")
    cli(*argv).refused(out, "model fingerprint was")
    shutil.copy(model_dir / "tokenizer_config.json", model)
    assert {path: path.read_bytes() for path in before} == before
    # What resumes goes on with the config that its checkpoint holds, and writes that into final/.
    set_theta(out / "step_000002", 123.0)
    result = cli(*argv).ok()
    assert f"warning: {out / 'step_000002' / 'config.json'} was edited" in result.out
    assert json.loads((out / "final" / "config.json").read_text())["rope_parameters"]["rope_theta"] == 123.0


@pytest.fixture
def begun(run_script, model_dir, data, tmp_path):
    """-> begin(name, **values) -> OUT and command line of a run that was killed after the reference's log-probs."""
    def begin(name, **values):
        argv = flags(model_dir, data, tmp_path / name, **dict(max_steps=2, save_every=0) | values)
        assert run_script("train_pref")(*argv, call=1, action=signal.SIGTERM).code == 143
        shutil.rmtree(tmp_path / name / "step_000001")
        return tmp_path / name, argv

    return begin


def test_reference_log_probs_of_other_rows(run_script, begun):
    """Two steps of another seed see other rows: its file is refused by name."""
    (mine, argv), (other, _) = begun("mine"), begun("other", seed=1)
    name = "ref_logps.safetensors"
    index = [load_file(out / name)["index"].tolist() for out in (mine, other)]
    assert index[0] != index[1] and len(index[0]) == len(index[1]) == 8
    shutil.copy(other / name, mine / name)
    run_script("train_pref")(*argv).refused(mine / name, "other data rows")


@pytest.mark.parametrize("harm", ["swapped", "nan", "one bit", "key"])
def test_reference_log_probs_with_other_values(run_script, begun, harm):
    out, argv = begun("run")
    path = out / "ref_logps.safetensors"
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    if harm == "swapped":
        tensors["chosen"], tensors["rejected"] = tensors["rejected"], tensors["chosen"]
    elif harm == "nan":
        tensors["chosen"][3] = math.nan
    elif harm == "key":
        metadata["key"] = "0" + metadata["key"]
    save_file(tensors, path, metadata)
    if harm == "one bit":
        flip(path)
    run_script("train_pref")(*argv).refused(path, "move it away")
    path.unlink()
    run_script("train_pref")(*argv).ok()


def test_a_reference_that_gives_nan(run_script, model_dir, data, tmp_path):
    """Its file would say NaN: refused by the row, before anything is trained."""
    broken = Path(shutil.copytree(model_dir, tmp_path / "broken"))
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][0] = math.nan
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    result = run_script("train_pref")(*flags(model_dir, data, tmp_path / "run", "--ref", broken))
    result.refused("reference", "data row 0", "nan")
    assert not (tmp_path / "run" / "ref_logps.safetensors").exists()


def test_the_spread_is_said(run_script, model_dir, data, tmp_path):
    """How far the policy before step 1 was from the reference that it is: rounding."""
    argv = flags(model_dir, data, tmp_path / "run", **SHORT)
    first = run_script("train_pref")(*argv, call=2, action=signal.SIGTERM).out
    (line,) = [line for line in first.splitlines() if line.startswith("before step 1 ")]
    assert float(line.split("at most ")[1].split()[0]) < 1e-3


# ------------------------------------------------------------------------------------------------------- of another run
@pytest.fixture(scope="module")
def other(context, model_dir, data, tmp_path_factory):
    """A run of the same model and data, with another learning rate."""
    tmp = tmp_path_factory.mktemp("other")
    finish(launch(context, "train_pref", tmp / "log", again(model_dir, data, tmp / "run", lr=2e-3))).ok()
    return tmp / "run"


def keep_until(out, step):
    """As if the run had been stopped after this step."""
    shutil.rmtree(out / "final")
    for later in range(step + 1, 10):
        shutil.rmtree(out / f"step_{later:06d}")


@pytest.mark.parametrize("harm", ["newest", "older", "final", "renamed", "swapped"])
def test_a_checkpoint_of_another_run_or_step(run_script, finished, other, model_dir, data, harm):
    """Whole by its own manifest, of the same shapes and under the right name: refused by name all the same."""
    out = finished("train_pref")
    argv = again(model_dir, data, out)
    step = lambda k: out / f"step_{k:06d}"
    if harm == "final":
        shutil.rmtree(out / "final")
        shutil.copytree(other / "final", out / "final")
        run_script("train_pref")(*argv).refused(out / "final", "written by another run", f"move it out of {out}")
        return
    keep_until(out, 4)
    if harm in ("newest", "older"):
        at = dict(newest=4, older=2)[harm]
        shutil.rmtree(step(at))
        shutil.copytree(other / step(at).name, step(at))
        words = step(at), "written by another run", f"move it out of {out}"
    elif harm == "renamed":
        step(4).rename(step(5))
        words = step(5), "written at step 4"
    else:
        step(4).rename(out / "aside")
        step(2).rename(step(4))
        (out / "aside").rename(step(2))
        words = step(2), "written at step 4"
    before = (out / "metrics.jsonl").read_bytes()
    run_script("train_pref")(*argv).refused(*words)
    assert (out / "metrics.jsonl").read_bytes() == before and not (out / "final").exists()


def test_names_of_paths_are_no_identity(run_script, model_dir, data, tmp_path):
    """The same model and data at another place go on; other data at the same place do not."""
    model, moved, out = tmp_path / "a", tmp_path / "b", tmp_path / "run"
    shutil.copytree(model_dir, model)
    shutil.copy(data, tmp_path / "data.jsonl")
    cli = run_script("train_pref")
    assert cli(*flags(model, tmp_path / "data.jsonl", out, **SHORT), call=2, action=signal.SIGTERM).code == 143
    model.rename(moved)
    (tmp_path / "data.jsonl").rename(tmp_path / "moved.jsonl")
    (tmp_path / "data.jsonl").write_text("".join(data.read_text().splitlines(keepends=True)[:19]))
    cli(*flags(moved, tmp_path / "data.jsonl", out, **SHORT)).refused(out, "data fingerprint was")
    assert f"resumed from {out}/step_000002" in cli(*flags(moved, tmp_path / "moved.jsonl", out, **SHORT)).ok().out


@pytest.mark.parametrize("harm, at", [("cut", 4), ("torn", 4), ("garbage", 2), ("other", 3), ("twice", 3), ("reversed", 0)])
def test_a_log_without_the_lines_of_a_checkpoint(run_script, finished, straight, model_dir, data, harm, at):
    """Line k is not of step k: the run names the checkpoints to delete, and when that is done it goes on from the one
    before, to the same end."""
    out = finished("train_pref")
    shutil.rmtree(out / "final")
    path = out / "metrics.jsonl"
    header, *lines = path.read_text().splitlines()
    if harm == "cut":
        lines = lines[:4]
    elif harm == "torn":
        lines = [*lines[:4], lines[4][:50]]
    elif harm == "garbage":
        lines[2] = "not json"
    elif harm == "other":
        lines[3] = json.dumps(dict(garbage=1))
    elif harm == "twice":
        lines.insert(3, lines[2])
    else:
        lines.reverse()
    path.write_text("\n".join([header, *lines]) + "\n")
    before = path.read_bytes()
    argv = again(model_dir, data, out)
    names = [f"step_{k:06d}" for k in range(at + 1, 10)]
    goal = f"go on from step_{at:06d}" if at else "begin anew"
    run_script("train_pref")(*argv).refused(f"holds steps 1 to {at} alone", f"delete {' '.join(names)} to {goal}")
    assert path.read_bytes() == before
    for name in names:
        shutil.rmtree(out / name)
    run_script("train_pref")(*argv).ok()
    assert_same_run(straight("train_pref", "1"), out)


def cut_power(model, out, name):
    """When the checkpoint has its name, on disk too, the machine loses what of the log was not fsynced by then."""
    fsync, durable = os.fsync, [b""]

    def watched(descriptor):
        fsync(descriptor)
        if os.readlink(f"/proc/self/fd/{descriptor}") == str(out / "metrics.jsonl"):
            durable[0] = (out / "metrics.jsonl").read_bytes()
        if (out / name).exists():
            (out / "metrics.jsonl").write_bytes(durable[0])
            os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = watched


def test_a_power_cut_after_a_checkpoint(run_script, straight, model_dir, data, tmp_path):
    out, cli = tmp_path / "run", run_script("train_pref")
    argv = again(model_dir, data, out)
    for name in ("step_000004", "final"):
        assert cli(*argv, call=1, action=partial(cut_power, out=out, name=name)).code == -signal.SIGKILL
        lines = 4 if name != "final" else 9
        assert len(metrics_of(out)) == lines
    assert "this run is complete" in cli(*argv).ok().out
    assert_same_run(straight("train_pref", "1"), out)


def rewrite_before_reading(model, data, rows):
    import plumbing.data

    read_rows = plumbing.data.read_rows

    def rewritten_and_read(*args):
        data.write_text(rows)
        yield from read_rows(*args)

    plumbing.data.read_rows = rewritten_and_read


@pytest.mark.parametrize("script", SCRIPTS)
def test_data_rewritten_before_they_are_read(run_script, model_dir, data, tmp_path, script):
    """Hashed, then rewritten, then read: rows of the new file would stand under the old one's fingerprint."""
    mine, out, cli = tmp_path / "mine.jsonl", tmp_path / "run", run_script(script)
    old, new = data.read_text(), data.read_text().replace('"A', '"C')
    mine.write_text(old)
    argv = flags(model_dir, mine, out, max_steps=1)
    cli(*argv, action=partial(rewrite_before_reading, data=mine, rows=new)).refused(mine, "rewritten while it was read")
    assert not (out / "data.safetensors").exists()
    cli(*argv).ok()  # no step was taken: the run is now one of the new file
    fresh = tmp_path / "fresh" / "run"
    cli(*flags(model_dir, mine, fresh, max_steps=1)).ok()
    assert_same_run(fresh, out)
    mine.write_text(old)
    shutil.rmtree(out / "final")
    cli(*argv).refused(out, "data fingerprint was")


# --------------------------------------------------------------------------------------------------- moved, and no git
@pytest.mark.parametrize("keep", [dict(keep=1), dict(keep_state=1)])
def test_a_checkpoint_moved_behind_a_symlink(run_script, model_dir, data, tmp_path, keep):
    """To another disk, say: --keep and --keep_state leave it as it is, and the run ends well."""
    out, moved, cli = tmp_path / "run", tmp_path / "disk" / "step_000002", run_script("train_pref")
    argv = flags(model_dir, data, out, max_steps=4)
    assert cli(*argv, call=2, action=signal.SIGTERM).code == 143
    moved.parent.mkdir()
    (out / "step_000002").rename(moved)
    (out / "step_000002").symlink_to(moved)
    before = {path: path.read_bytes() for path in moved.rglob("*") if path.is_file()}
    assert f"resumed from {out}/step_000002" in cli(*flags(model_dir, data, out, max_steps=4, **keep)).ok().out
    assert {path: path.read_bytes() for path in moved.rglob("*") if path.is_file()} == before
    assert len([path for path in out.glob("step_*/trainer") if not path.parent.is_symlink()]) == 1
    assert not list(out.glob(".step_*"))


def hide_git(model):
    os.environ["PATH"] = "/nonexistent"


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_git(run_script, model_dir, data, tmp_path, script):
    """An image without it: the commit is null, and all else goes on."""
    run_script(script)(*flags(model_dir, data, tmp_path / "run", max_steps=1), action=hide_git).ok()
    header = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert header["commit"] is None and len(metrics_of(tmp_path / "run")) == 1


# ------------------------------------------------------------------------------------------------- nothing was learned
def spoil_for_good(model):
    spoil(model)


@pytest.mark.parametrize("script, world", [("train_pref", 2), ("train_sft", 1), ("train_rm", 1)])
def test_a_run_that_applied_no_update_is_no_result(run_script, model_dir, data, tmp_path, script, world):
    """Fewer than ten steps, none finite: not "done", and no final/."""
    out = tmp_path / "run"
    argv = flags(model_dir, data, out, max_steps=5)
    for _ in range(2):  # nor is it when it is started again
        result = run_script(script)(*argv, world=world, call=1, action=spoil_for_good, on_rank=None)
        result.refused("none of 5 updates was applied")
        assert "done" not in result.out and not (out / "final").exists()


# ------------------------------------------------------------------------------------------------------------ lines
@pytest.mark.parametrize("depth", [100_000])
def test_a_header_that_is_too_deep(run_script, model_dir, data, tmp_path, depth):
    out = tmp_path / "run"
    out.mkdir()
    (out / "metrics.jsonl").write_text('{"args": ' + "[" * depth + "\n")
    run_script("train_pref")(*flags(model_dir, data, out)).refused(out, "holds no run")


def full_disk_for_ids(model):
    """The first file that does not fit is that of token ids, which has no name."""
    import plumbing.data

    tokenize_rows = plumbing.data.tokenize_rows

    def filled(*args, **kwargs):
        full_disk(None, 1000)  # what the run says has room
        return tokenize_rows(*args, **kwargs)

    plumbing.data.tokenize_rows = filled


def test_a_full_disk_while_tokenizing(run_script, model_dir, data, tmp_path):
    out = tmp_path / "run"
    run_script("train_pref")(*flags(model_dir, data, out), action=full_disk_for_ids).refused(
        f"cannot make {out}/data.safetensors of {data}", "File too large")
