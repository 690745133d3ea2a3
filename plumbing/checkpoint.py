"""Model directories and checkpoints: find, fingerprint, verify, load, save, prune.

A checkpoint of ours is a model directory that transformers loads, with a manifest.json: {file: its sha256} and the
mark: `run`, the hash of what its run is (plumbing/run.py), and `step`. The mark makes it ours; what lacks it is
somebody else's, and is neither verified nor deleted. trainer/ holds what only a resumed run needs: AdamW's moments and
the counters.
"""

import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
from huggingface_hub import save_torch_state_dict, snapshot_download
from torch.distributed.tensor import DTensor, distribute_tensor

from plumbing.process import (UserError, file_sha256, on_rank_0, open_safetensors, print_rank0, read_json, to_json,
                              write_atomically)

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, a directory each in trainer/


# -------------------------------------------------------------------------------------------------------------- to read
def find_model(name, made_by=None):
    """A model directory (of a config.json its own), or a Hub id's snapshot: safetensors and JSON, never pickles. Raises
    UserError for an adapter too: alone it is no model, and beside its base it would go unread."""
    path = Path(name)
    if path.name == "config.json":
        path = path.parent
    if not path.is_dir():
        try:
            patterns = ["*.safetensors", "*.json", "tokenizer.model", "*.jinja"]
            path = Path(snapshot_download(name, allow_patterns=patterns))
        except (OSError, ValueError) as error:
            remedy = f"; `{made_by}` makes it" if made_by else ""
            raise UserError(f"{name}: no such model directory, and not on the Hub{remedy}: {error}") from None
    for adapter in ("adapter_config.json", "adapter_model.safetensors"):
        if (path / adapter).exists():
            raise UserError(f"{path} holds an adapter ({adapter}), which is not read: merge it into its base model"
                            " first (PEFT's merge_and_unload, then save_pretrained) and give that directory")
    return path


def file_sha256s(directory, *patterns):
    """{name in the directory: sha256} of the files that match, but for the manifest."""
    paths = {path for pattern in patterns for path in directory.glob(pattern) if path.is_file()}
    paths = sorted(paths - {directory / "manifest.json"})
    names = [str(path.relative_to(directory)) for path in paths]
    with ThreadPoolExecutor() as pool:  # hashing lets go of Python's lock
        return dict(zip(names, pool.map(file_sha256, paths)))


def model_fingerprint(directory):
    """Of a model directory: its weights, config and tokenizer."""
    digests = file_sha256s(directory, "*.safetensors", "*.json", "*.jinja", "*.model")
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:16]


def step_of(directory):
    """The step that the name of a checkpoint says, step_000500; None of final."""
    return None if directory.name == "final" else int(directory.name.removeprefix("step_"))


def check_mark(directory, run):
    """Raise UserError unless a checkpoint was written by this run, and at the step that its name says."""
    manifest = read_json(directory / "manifest.json")
    if manifest.get("run") != run:
        raise UserError(f"{directory} was written by another run (manifest.json: {manifest.get('run')}, this run is"
                        f" {run}): move it out of {directory.parent}")
    if manifest.get("step") != step_of(directory):
        raise UserError(f"{directory} was written at step {manifest.get('step')}, as its manifest.json says: give it"
                        " its name back")


def verify_checkpoint(directory):
    """Check a checkpoint of ours against its manifest. UserError names the first file of weights or trainer/ that is
    not what was written; an edited text (a chat template) is warned of. A directory with neither mark nor trainer/ is
    somebody else's and passes."""
    has_state = (directory / "trainer").exists()
    if not has_state and not (directory / "manifest.json").exists():
        return
    written = read_json(directory / "manifest.json")
    if "run" not in written:
        return
    for name in ("run", "step"):
        written.pop(name, None)
    found = file_sha256s(directory, "**/*")
    for name in sorted(written.keys() | found.keys()):
        if written.get(name) == found.get(name):
            continue
        in_trainer = name.startswith("trainer/")
        must_be_same = in_trainer or name.endswith(".safetensors")
        if in_trainer and not has_state:
            continue  # --keep_state has let go of all of it
        if name not in written and not must_be_same:
            continue  # a text that somebody put beside it
        if name not in found or must_be_same:
            raise UserError(f"{directory / name} is missing, new or not what was written: restore it (a run of which"
                            f" {directory} is moved away goes on from the checkpoint before)")
        print_rank0(f"warning: {directory / name} was edited; it is used as it is")


def shard_like(param, tensor):
    """A whole tensor -> this rank's share of it, laid out like `param`."""
    tensor = tensor.to(param.device, param.dtype)
    if isinstance(param, DTensor):
        return distribute_tensor(tensor, param.device_mesh, param.placements, src_data_rank=None)
    return tensor


def open_weights(directory):
    """-> {tensor name: the open file that holds it}, of model.safetensors or of the files that its index names. Where
    both are there the single file counts, as for transformers: the index is mostly left over."""
    names = {"model.safetensors"}
    index = directory / "model.safetensors.index.json"
    if index.exists() and not (directory / "model.safetensors").exists():
        weight_map = read_json(index).get("weight_map")
        names = {str(name) for name in weight_map.values()} if isinstance(weight_map, dict) else set()
        beside_it = all(Path(name).name == name and name.endswith(".safetensors") for name in names)
        if not names or not beside_it:
            raise UserError(f"{index}: no weight_map to safetensors files beside it")
    holders = {}
    for name in sorted(names):
        file = open_safetensors(directory / name)
        for tensor in file.keys():
            holders[tensor] = file
    return holders


@torch.no_grad()
def load_weights(model, directory, new=(), drop=()):
    """Fill every parameter from the directory's safetensors, one or sharded; all ranks call it. Strict: UserError names
    a missing, extra or misshapen tensor. For a change of head: parameters `new` are left as they are, tensors `drop`
    unread. Returns the model."""
    # Hashed by one rank, before any reads it. Each rank then maps the files and takes its own share.
    on_rank_0(lambda: verify_checkpoint(directory))
    files = open_weights(directory)
    params = {name: param for name, param in model.named_parameters() if name not in new}
    missing = params.keys() - files.keys()
    extra = files.keys() - params.keys() - {*drop}
    # Rotary tables, which old exports hold, follow from the config.
    extra = {name for name in extra if not name.endswith("rotary_emb.inv_freq")}
    if "lm_head.weight" in extra and "model.embed_tokens.weight" in files:
        # Some exports hold a tied head twice. A head that differs is no copy: config.json must be wrong about it.
        head = files["lm_head.weight"].get_tensor("lm_head.weight")
        embedding = files["model.embed_tokens.weight"].get_tensor("model.embed_tokens.weight")
        if torch.equal(head, embedding):
            extra.remove("lm_head.weight")
    if missing or extra:
        head = ""
        if "score.weight" in missing:
            head = "; the head of a reward model is score.weight (...ForSequenceClassification), no other value head"
        raise UserError(f"{directory}: the weights do not fit config.json: missing {sorted(missing)[:4]}, extra"
                        f" {sorted(extra)[:4]} ({len(missing)} and {len(extra)} in all){head}")
    for name, param in params.items():
        tensor = files[name].get_tensor(name)
        if name == "score.weight" and len(tensor) != 1:
            raise UserError(f"{directory}: score.weight is {list(tensor.shape)}, a classifier of {len(tensor)} labels;"
                            " a reward model has one (num_labels 1)")
        if tensor.shape != param.shape or tensor.dtype.itemsize < 2 or not tensor.dtype.is_floating_point:
            raise UserError(f"{directory}: {name} is {tensor.dtype} {list(tensor.shape)}; config.json says"
                            f" {list(param.shape)}, and quantized weights are not read")
        param.copy_(shard_like(param, tensor))
    return model


# ---------------------------------------------------------------------------------------------- to write and go on from
def model_files(directory, tokenizer, stop, **changes):
    """What is saved beside the weights, {name: content}: config.json and generation_config.json, after the model's that
    training begins with. `stop`, what the template ends a turn with, and EOS must stop generation. Raises UserError."""
    from transformers import AutoConfig  # takes a second, which --help need not wait for

    config = read_json(directory / "config.json") | changes
    config.pop("torch_dtype", None)  # an older name of `dtype`, which save_checkpoint sets
    # transformers 5 writes rope_parameters; 4 reads rope_theta and rope_scaling, and would take a theta of 10,000.
    rope = dict(AutoConfig.from_pretrained(directory, local_files_only=True).rope_parameters)
    config["rope_parameters"] = dict(rope)
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    path = directory / "generation_config.json"
    generation = read_json(path) if path.exists() else dict(bos_token_id=tokenizer.bos_token_id)
    stops = [*tokenizer.generation_stops, tokenizer.eos_token_id, stop]
    generation["eos_token_id"] = [*dict.fromkeys(stops)]  # each once, in this order
    return {"config.json": config, "generation_config.json": generation}


def save_tensors(folder, tensors, dtype):
    """Make the folder, with {name: tensor} whole and in `dtype` as transformers writes weights; all ranks call it."""
    whole = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()  # every rank gathers it: this is a collective
        if dist.get_rank() == 0:
            # A copy: uneven shares come as a view into a larger storage, which safetensors refuses.
            whole[name] = tensor.to("cpu", dtype, copy=True).contiguous()

    def write():
        folder.mkdir()
        save_torch_state_dict(whole, folder, max_shard_size="2GB")

    on_rank_0(write)


def save_checkpoint(directory, *, model, tokenizer, files, run, save_dtype="fp32", optimizer=None, state=None):
    """Write a model directory that transformers loads; all ranks call it. `files` as model_files gives them, `run` the
    mark. With an optimizer it has trainer/, and is float32, as what resumes must not be rounded; `save_dtype` is for
    the final model. It is made aside, synced and renamed: `directory` is whole or absent. Raises UserError (a full
    disk)."""
    assert optimizer is None or save_dtype == "fp32"
    aside = directory.with_name(f".{directory.name}.tmp")  # where write_atomically will look for it
    trainer = aside / "trainer"
    dtype = torch.bfloat16 if save_dtype == "bf16" else torch.float32
    params = dict(model.named_parameters())

    def write_texts(aside):
        contents = dict(files)
        contents["config.json"] = files["config.json"] | dict(dtype=str(dtype).removeprefix("torch."))
        if optimizer is not None:
            contents["trainer/state.json"] = state
        for name, content in contents.items():
            text = content if isinstance(content, str) else to_json(content, indent=2)
            (aside / name).write_text(text, encoding="utf-8")
        try:
            tokenizer.save_pretrained(aside)
        except Exception as error:  # of no narrower class: what `tokenizers` raises when the disk is full
            raise OSError(str(error)) from None
        mark = dict(run=run, step=None if state is None else state["step"])
        manifest = mark | file_sha256s(aside, "**/*")
        (aside / "manifest.json").write_text(to_json(manifest, indent=2), encoding="utf-8")

    try:
        on_rank_0(lambda: shutil.rmtree(aside, ignore_errors=True))  # of a run that was killed
        save_tensors(aside, params, dtype)
        if optimizer is not None:
            on_rank_0(trainer.mkdir)
            if optimizer.state:  # it has none before the first update that was applied
                for key in MOMENTS:
                    moments = {name: optimizer.state[param][key] for name, param in params.items()}
                    save_tensors(trainer / key, moments, torch.float32)
        on_rank_0(lambda: write_atomically(directory, write_texts))
    except UserError as error:
        on_rank_0(lambda: shutil.rmtree(aside, ignore_errors=True))
        raise UserError(f"cannot write {directory}: {error}; earlier checkpoints are intact") from None


@torch.no_grad()
def load_trainer(directory, model, optimizer):
    """Put back the moments that save_checkpoint wrote, on any number of ranks; -> the state dict. There is no random
    state: nothing draws once training has begun (the data order is a function of seed and step)."""
    trainer = directory / "trainer"
    state = read_json(trainer / "state.json")
    if state["updates"]:
        for key in MOMENTS:
            files = open_weights(trainer / key)
            for name, param in model.named_parameters():
                moment = torch.zeros_like(param)
                moment.copy_(shard_like(param, files[name].get_tensor(name)))
                optimizer.state[param][key] = moment
        for param in model.parameters():
            optimizer.state[param]["step"] = torch.tensor(float(state["updates"]), device=param.device)
    return state


def checkpoints(out):
    """The checkpoints of a run, oldest first. Other names (step_000500.bak) are not ours."""
    paths = [path for path in out.glob("step_*") if path.name[5:].isdecimal()]
    return sorted(paths, key=lambda path: int(path.name[5:]))


def prune_checkpoints(out, keep, keep_state):
    """Delete all but the newest `keep` checkpoints, and trainer/ of all but the newest `keep_state` (0: none), each
    renamed first so that none is half there. One that was moved to another disk, a symlink here, stays as it is."""
    steps = checkpoints(out)
    doomed = []
    if keep:
        doomed += steps[:-keep]
    if keep_state:
        doomed += [step / "trainer" for step in steps[:-keep_state]]
    for directory in doomed:
        name = directory.relative_to(out)
        moved = directory.resolve() != out.resolve() / name
        if directory.exists() and not moved:
            aside = out / f".step_{'-'.join(name.parts)}.old"
            os.rename(directory, aside)
            shutil.rmtree(aside)
