"""A training run: its flags, its header, whether it begins or goes on, its log, when it saves and stops."""

import argparse
import hashlib
import importlib
import json
import math
import os
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from plumbing.checkpoint import (check_mark, checkpoints, model_fingerprint, prune_checkpoints, step_of,
                                 verify_checkpoint)
from plumbing.data import TODAY, source_sha256
from plumbing.process import (UserError, fsync_and_chmod, lock_for_writing, make_directory, on_rank_0,
                              parse_json, peak_memory_gb, print_rank0, read_text, to_json, write_text)


# ---------------------------------------------------------------------------------------------------------------- flags
class Parser(argparse.ArgumentParser):
    """argparse, but a wrong flag is said by one rank, once."""

    def __init__(self, **kwargs):
        ours = dict(usage="python %(prog)s [flags]", allow_abbrev=False,
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        super().__init__(**ours | kwargs)

    def error(self, message):
        wrong = UserError(f"{message} (--help lists the flags)")
        wrong.code = 2
        raise wrong


def json_object(text):
    """A flag's value that is a JSON object. Raises ValueError, which argparse makes an error of."""
    return parse_json(text, "a flag")


def check_ranges(parser, args, positive, signed=()):
    """Numbers must be finite and at least 0; those of the flags `positive` above 0; `signed` ones are not looked at.
    Names must be UTF-8, as safetensors and JSON lines are."""
    for flag, value in vars(args).items():
        if isinstance(value, str) and value != value.encode(errors="replace").decode():
            parser.error(f"--{flag} {value!r}: a name that is no UTF-8: rename it")
        if type(value) not in (int, float) or flag in signed:  # a bool is an int to isinstance
            continue
        fits_int64 = type(value) is float or value < 2**63
        if not (0 <= value < math.inf and fits_int64) or (flag in positive and value == 0):
            least = "above" if flag in positive else "at least"
            parser.error(f"--{flag} {value}: must be {least} 0 and finite")


def common_flags(parser):
    """The flags every trainer has. An example is a pair or a demonstration."""
    add = parser.add_argument_group("what to train on").add_argument
    add("--preset", help="a set of defaults; a flag given wins (toy, or paper if --model or --data is given)")
    add("--model", help="start: model directory, Hub id or, in train_sft.py, a config.json: random weights")
    add("--data", help="training data: .jsonl, .json, .csv, .parquet, recipe name or Hub id; a+b pools two")
    add("--eval_data", help="held-out data, likewise; '' for none")
    add("--max_length", type=int, help="tokens of prompt + response at most")
    add("--max_prompt_length", type=int, help="tokens of the prompt, which keeps its end, at most")
    add("--chat_template_kwargs", type=json_object, metavar="JSON", help="given to the chat template, as"
        ' {"enable_thinking": false} or {"date_string": "1 Jan 2026"}')
    add = parser.add_argument_group("the run").add_argument
    add("--out", help="run directory; run again with it to resume (named after the flags, in out/)")
    add("--seed", type=int, default=0, help="seed of the data order and of random weights")
    add("--epochs", type=int, help="passes over the data")
    add("--max_steps", type=int, default=0, help="stop after this many optimizer steps; 0: no limit")
    add("--batch_size", type=int, help="examples per optimizer step, over all ranks")
    add("--lr", type=float, help="peak learning rate; cosine to a tenth of it")
    add("--warmup_steps", type=int, help="optimizer steps of linear warm-up; 0: none")
    add("--grad_clip", type=float, default=1.0, help="largest global gradient norm; 0: no clipping")
    add("--save_every", type=int, help="optimizer steps between checkpoints; 0: only on a signal; None: 200, in a short"
        " run a tenth of it")
    add("--keep", type=int, default=0, help="newest checkpoints kept; 0: all")
    add("--keep_state", type=int, default=0, help="newest checkpoints that keep optimizer state; 0: all")
    add("--save_dtype", choices=["fp32", "bf16"], default="fp32", help="of final/; checkpoints are fp32 always")
    add("--eval_every", type=int, help="optimizer steps between evaluations on --eval_data; 0: never; None: 200, in a"
        " short run a tenth of it")
    add("--log_every", type=int, default=1, help="steps between lines on screen; metrics.jsonl has all")
    add("--track", choices=["none", "wandb", "trackio"], default="none", help="a dashboard besides metrics.jsonl")
    add = parser.add_argument_group("the hardware").add_argument
    add("--micro_batch_size", type=int, help="rows per rank per forward; lower it when memory runs out")
    add("--precision", choices=["bf16", "fp32"], default="bf16" if torch.cuda.is_available() else "fp32",
        help="of the products (bf16 on a GPU); weights, optimizer state, log-probs and rewards are float32 always")
    add("--compile", action="store_true", help="torch.compile the layers: the first steps take minutes")
    add("--shard", action=argparse.BooleanOptionalAction, help="FSDP2: weights, gradients and optimizer state divided"
        " by the ranks; --no-shard: DDP")
    add("--checkpoint_activations", action=argparse.BooleanOptionalAction, help="recompute layers in backward: less"
        " memory")
    add("--threads", type=int, default=0, help="CPU threads a rank; 0: torch's own choice")
    add("--timeout", type=int, default=1800, help="seconds after which a rank that hangs ends the run")


# Flags that fit a run to its machine or say what it keeps; every other flag must be the same when a run resumes.
FREE_FLAGS = {"keep", "keep_state", "save_dtype", "log_every", "track", "timeout", "threads", "micro_batch_size",
              "shard", "checkpoint_activations", "compile", "out"}


def parse_with_preset(parser, presets, argv, positive=(), signed=()):
    """Parse twice: the first pass finds the preset, whose values are the defaults of the second. A model or data of
    one's own begins from the paper's recipe: the toy's learning rate and lengths would spoil it unnoticed."""
    for name, values in presets.items():
        shown = ", ".join(f"{flag} {value}" for flag, value in values.items())
        parser.add_argument_group(f"--preset {name}", shown)
    argv = sys.argv[1:] if argv is None else argv
    given = parser.parse_known_args([word for word in argv if word not in ("-h", "--help")])[0]  # help in the second
    preset = given.preset
    if preset is None:
        preset = "paper" if given.model or given.data else "toy"
    if preset not in presets:
        parser.error(f"--preset {preset}: one of {', '.join(presets)}")
    parser.set_defaults(**presets[preset] | dict(preset=preset))
    args = parser.parse_args(argv)
    if not args.model or not args.data:
        parser.error("--model and --data must be given: a directory, file, recipe or Hub id, or another --preset")
    counts = {"epochs", "batch_size", "micro_batch_size", "max_length", "max_prompt_length", "log_every", "timeout"}
    check_ranges(parser, args, counts | {*positive}, signed)
    if args.max_prompt_length >= args.max_length:
        parser.error(f"--max_prompt_length {args.max_prompt_length} leaves no room in --max_length {args.max_length}")
    return args


def interval(given, total):
    """Steps between checkpoints or evaluations: the flag's value or, where none was given, 200, which in a run of fewer
    than 2,000 steps is a tenth of it: a short run has a curve too."""
    if given is not None:
        return given
    return min(200, max(1, total // 10))


def announce_schedule(args, noun, n_examples, total):
    """Say before training what a short run makes of its flags."""
    if n_examples < args.batch_size:
        print_rank0(f"{n_examples} {noun} are fewer than --batch_size {args.batch_size}: each step takes them all")
    if args.warmup_steps >= total:
        print_rank0(f"--warmup_steps {args.warmup_steps} would not end within {total} steps: {total // 10} instead")
    if args.save_every is None:
        print_rank0(f"a checkpoint every {interval(None, total)} steps (--save_every)")
    if args.eval_every is None and args.eval_data:
        print_rank0(f"an evaluation every {interval(None, total)} steps (--eval_every)")


# -------------------------------------------------------------------------------------- a new run, or one to go on with
def run_header(script, args, world, device, models):
    """What a run must say of itself, the first line of metrics.jsonl, with fingerprints of its models {role: directory}
    and of its data, as cut (a Hub dataset is known by its name). `run` is the mark that its checkpoints bear."""
    models_sha256 = {directory: model_fingerprint(directory) for directory in {*models.values()}}  # mostly ref is model
    sources = {source: source_sha256(source) for source in (args.data, args.eval_data) if source}
    data = [sources[args.data], sources.get(args.eval_data), args.max_length, args.max_prompt_length, str(TODAY),
            args.chat_template_kwargs]
    header = dict(script=script, args=vars(args))
    header |= dict(commit=git_commit(), versions=dict(torch=torch.__version__, python=sys.version.split()[0]))
    header |= dict(device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu", world=world)
    header |= dict(chat_date=str(TODAY))
    header |= {role: models_sha256[directory] for role, directory in models.items()}
    header |= dict(data=json_sha256(data), sources=sources)
    header |= dict(run=json_sha256(identity(header)))
    return header


def json_sha256(content):
    """Of what has a JSON form, whatever the order of its names."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def model_card(header, model_class):
    """README.md of a final model, for the Hub and for whoever finds the directory: what made it, and how to load it."""
    args = header["args"]
    of_hub = not Path(args["model"]).exists()
    lines = ["---", "library_name: transformers", f"tags: [is-daa, {args.get('loss', header['script'])}]"]
    lines += [f"base_model: {args['model']}"] if of_hub else []
    lines += ["---", "", f"# {Path(args['out']).name}", ""]
    lines += [f"Made by IS-DAA's `{header['script']}.py` (commit {header['commit']}) from `{args['model']}`"
              f" (fingerprint {header['model']}) and the data `{args['data']}` (fingerprint {header['data']}).", ""]
    lines += ["| flag | value |", "|---|---|"]
    for name, value in args.items():
        if name not in FREE_FLAGS and value not in (None, ""):
            lines.append(f"| `--{name}` | `{value}` |")
    lines += ["", "```python", f"from transformers import {model_class}, AutoTokenizer", "",
              f'model = {model_class}.from_pretrained("THIS_DIRECTORY")',
              'tokenizer = AutoTokenizer.from_pretrained("THIS_DIRECTORY")', "```", "",
              "License: that of the base model and of the data hold; name yours here.", ""]
    return "\n".join(lines)


def git_commit():
    """Of this code; None where it is in no repository, or git is not installed."""
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


def identity(header):
    """What must be the same when a run resumes, {name: value}: flags, and for those that name models and data the
    fingerprints of what is there. A path may be spelled in another way."""
    same = {flag: value for flag, value in header["args"].items() if flag not in FREE_FLAGS}
    for flag in ("model", "ref", "data", "eval_data"):
        same.pop(flag, None)
    same["script"] = header["script"]
    for role in ("model", "ref", "data"):
        same[f"{role} fingerprint"] = header.get(role)
    return same


def checkpoint_to_resume(out, header):
    """-> out/final if the run is complete, its newest checkpoint, or None to begin. `header` is the line that this run
    would begin metrics.jsonl with. Raises UserError where `out` holds something else or another run."""
    make_directory(out)
    metrics = out / "metrics.jsonl"
    empty = all(path.name.startswith(".") for path in out.iterdir())  # a kill may have left half of the first file
    if not empty and not metrics.exists():
        raise UserError(f"{out} is not empty and holds no run (no metrics.jsonl): choose another --out")
    lock_for_writing(out)  # before anything is read that another process may be about to write
    if not metrics.exists():
        write_text(metrics, to_json(header) + "\n")
    check_same_run(out, header, read_text(metrics).split("\n"))
    # What a kill has left: half a checkpoint written or deleted.
    for leftover in [*out.glob(".step_*.tmp"), *out.glob(".step_*.old"), out / ".final.tmp"]:
        shutil.rmtree(leftover, ignore_errors=True)
    steps = checkpoints(out)
    # All of them, not only the newest: each is measured and pruned as one of this run.
    for directory in steps:
        check_mark(directory, header["run"])
    if (out / "final").exists():
        # Read whole once more: "complete" must not be said of a damaged model.
        check_mark(out / "final", header["run"])
        verify_checkpoint(out / "final")
        return out / "final"
    if not steps:
        return None
    if not (steps[-1] / "trainer").exists():
        raise UserError(f"{steps[-1]} keeps no optimizer state (--keep_state): there is nothing to resume from")
    check_steps(out, steps)
    return steps[-1]


def check_steps(out, steps):
    """Raise UserError unless metrics.jsonl holds every step up to the newest of the checkpoints `steps`."""
    _, rows, problem = read_metrics(out / "metrics.jsonl")
    beyond = [directory for directory in steps if step_of(directory) > len(rows)]
    if beyond:
        names = " ".join(directory.name for directory in beyond)
        remedy = "begin anew" if beyond == steps else f"go on from {steps[-len(beyond) - 1].name}"
        raise UserError(f"{out / 'metrics.jsonl'} holds steps 1 to {len(rows)} alone ({problem}): restore it, or delete"
                        f" {names} to {remedy}")


def check_same_run(out, header, lines):
    """Raise UserError unless `lines`, those of out/metrics.jsonl, begin with a header of the same run."""
    try:
        was = identity(parse_json(lines[0], "line 1"))
    except (UserError, KeyError, AttributeError):
        raise UserError(f"{out} is not empty and holds no run (metrics.jsonl begins with no header): choose another"
                        " --out") from None
    now = identity(header)
    differ = []  # both ways: a flag may be new, or gone
    for name in sorted(was.keys() | now.keys()):
        if was.get(name) != now.get(name):
            path = header["args"].get(name.removesuffix(" fingerprint")) if name.endswith(" fingerprint") else None
            differ.append(f"{name} was {was.get(name)!r}, is {now.get(name)!r}{f' ({path})' if path else ''}")
    begun = len(lines) > 2  # before a first step nothing is lost: a wrong model or data may be mended
    if differ and begun:
        raise UserError(f"{out} holds another run: {'; '.join(differ)}. Choose another --out (to train on: --model"
                        f" {out}/final)")


# -------------------------------------------------------------------------------------------------------------- its log
def open_tracker(kind, out, args):
    """Begin a run on the dashboard asked for, or go on with that of `out`, before any work is done; wandb and trackio
    have one interface. WANDB_PROJECT names the project."""
    if kind == "none":  # neither is imported unless it is asked for
        return
    name_file = out / ".dashboard_run"  # a run of the same flags elsewhere is another one
    if not name_file.exists():
        write_text(name_file, f"{out.name}-{uuid.uuid4().hex[:8]}")
    name = read_text(name_file)
    known_by = dict(id=name) if kind == "wandb" else {}  # trackio knows a run by its name
    try:
        project = os.environ.get("WANDB_PROJECT", "is-daa")
        importlib.import_module(kind).init(project=project, name=name, config=args, resume="allow", **known_by)
    except Exception as error:  # not installed, no key, no network: classes of their own
        raise UserError(f"--track {kind}: {error}; it needs `pip install {kind}` and its key") from None


def read_metrics(path):
    """metrics.jsonl -> its header, the rows of steps 1, 2, .. as far as they follow each other, and what is wrong with
    the line after them. Line 1 is the header, line k + 1 is of step k. Raises UserError where there is no header."""
    lines = read_text(path).split("\n")
    header = parse_json(lines[0], f"{path}:1")
    rows = []
    for number, line in enumerate(lines[1:], 2):
        if not line:
            return header, rows, f"line {number} is empty"  # the end of the file, if nothing is wrong with it
        try:
            row = parse_json(line, f"line {number}")
        except UserError as error:
            return header, rows, str(error)
        if row.get("step") != len(rows) + 1:
            return header, rows, f"line {number} is of step {row.get('step')!r}"
        rows.append(row)
    return header, rows, "its last line has no end"


def open_metrics(path, header, resumed):
    """metrics.jsonl, ready for the lines after those of the checkpoint `resumed`: later ones will be written again, the
    same."""
    lines = [to_json(header)]
    if resumed:
        lines = read_text(path).split("\n")[: step_of(resumed) + 1]  # which check_steps has looked at
    write_text(path, "\n".join(lines) + "\n")
    return path.open("a", buffering=1, encoding="utf-8")  # a line at a time


def write_metrics(file, step, metrics):
    """One JSON line. A step that is skipped has figures that are not finite; JSON has no NaN: they are null."""
    line = dict(step=step)  # first: line k is found by it
    for name, value in metrics.items():
        finite = not isinstance(value, float) or math.isfinite(value)
        line[name] = value if finite else None
    try:
        file.write(to_json(line) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {file.name}: {error}") from None


class StepLog:
    """What a run says of its steps, on rank 0: a line of metrics.jsonl each, the tracker, the screen and its bar."""

    def __init__(self, path, header, resumed, *, steps_done, total, log_every, track):
        self.path = path
        self.total = total
        self.log_every = log_every
        self.track = track
        self.rank = dist.get_rank()
        if self.rank == 0:
            self.file = open_metrics(path, header, resumed)
            self.bar = tqdm(total=total, initial=steps_done, disable=not sys.stderr.isatty(), unit="step")

    def write(self, step, metrics, line, applied):
        """`line` is for the screen; `applied`: whether the update was, which it is not where it is not finite."""
        if self.rank > 0:
            return
        write_metrics(self.file, step, metrics)
        if self.track != "none":
            sys.modules[self.track].log(metrics, step=step)
        if not applied:
            line += " | NOT FINITE: skipped"
        if step % self.log_every == 0 or step == self.total or not applied:
            print_rank0(line)
        self.bar.update()

    def close(self, state):
        """The end of the steps. Raises UserError where no update was applied: the model is the one it began with."""
        if self.rank == 0:
            self.bar.close()
            sync_metrics(self.path.parent)
        if not state["updates"]:
            raise UserError(f"none of {state['step']} updates was applied: each loss or gradient was not finite, and"
                            " the model is what it began as; look at it and at the data")


def sync_metrics(out):
    """A power cut must not leave a checkpoint whose lines are missing: they are on disk before it is."""
    fsync_and_chmod(out / "metrics.jsonl")


def count_step(state, *, applied, n_tokens):
    """The counters that a checkpoint keeps, one step on."""
    state["step"] += 1
    state["num_tokens"] += n_tokens
    if applied:
        state["updates"] += 1
        state["skipped_in_a_row"] = 0
    else:
        state["skipped"] += 1
        state["skipped_in_a_row"] += 1


def step_metrics(state, *, grad_norm, lr, epoch, n_tokens, step_s):
    """What every trainer logs of a step besides its losses."""
    return {"grad_norm": grad_norm, "learning_rate": lr, "epoch": epoch, "num_tokens": state["num_tokens"],
            "skipped": state["skipped"], "tokens_per_s": n_tokens / step_s, "step_s": step_s,
            "mem_gb": peak_memory_gb()}


def is_due(step, every, total):
    """Is it time for what happens every so many steps (0: never) and at the end?"""
    return every > 0 and (step % every == 0 or step == total)


# ----------------------------------------------------------------------------------------------------- to save and stop
def save_or_stop(out, state, signals, save, *, save_every, keep, keep_state):
    """After each step, on all ranks: where a checkpoint is due, a signal came or 10 steps in a row were not finite,
    save(directory) writes one. -> the exit code to stop with; 0: go on. Raises UserError where it has diverged."""
    step = state["step"]
    # A signal reaches ranks at different steps, or one of them alone.
    signum = torch.tensor(signals[0] if signals else 0)
    dist.all_reduce(signum, op=dist.ReduceOp.MAX)
    diverged = state["skipped_in_a_row"] == 10
    if signum or diverged or (save_every and step % save_every == 0):
        state["skipped_in_a_row"] %= 10  # whoever goes on after a divergence has ten more
        # In this order: the log's lines, the checkpoint, and only when that is on disk may older ones go.
        on_rank_0(lambda: sync_metrics(out))
        save(out / f"step_{step:06d}")
        on_rank_0(lambda: prune_checkpoints(out, keep, keep_state))
    if diverged:
        raise UserError(f"10 steps in a row had a loss or gradient that is not finite, up to step {step}: lower"
                        f" --lr, or look at the data; {out}/step_{step:06d} holds the last good step's weights")
    if signum:
        print_rank0(f"stopped by signal {signum.item()} after step {step}; the same command goes on from there")
        return 128 + signum.item()
    return 0
