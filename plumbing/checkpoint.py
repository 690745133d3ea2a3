"""Model directories and checkpoints: find, fingerprint, verify, load, save, prune."""

import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
from huggingface_hub import save_torch_state_dict, snapshot_download
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor, distribute_tensor

from plumbing.process import (UserError, file_sha256, on_rank_0, open_safetensors, print_rank0, read_json,
                              write_atomically)


# -------------------------------------------------------------------------------------------------------------- to read
def find_model(name):
    """A model directory (of a config.json its own), or a Hub id's snapshot: safetensors and JSON, never pickles."""
    path = Path(name).parent if Path(name).name == "config.json" else Path(name)
    if path.is_dir():
        return path
    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json", "tokenizer.model", "*.jinja"]))
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: no such model directory, and not on the Hub: {error}") from None


def file_sha256s(directory, *patterns):
    """{name in the directory: sha256} but for the manifest; in threads, as hashing lets go of Python's lock."""
    paths = sorted({path for pattern in patterns for path in directory.glob(pattern) if path.is_file()})
    with ThreadPoolExecutor() as pool:
        digests = zip(paths, pool.map(file_sha256, paths))
        return {str(path.relative_to(directory)): digest for path, digest in digests if path.name != "manifest.json"}


def model_fingerprint(directory):
    """Of a model directory: its weights, config and tokenizer."""
    digests = file_sha256s(directory, "*.safetensors", "*.json", "*.jinja", "*.model")
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:16]


def verify_checkpoint(directory, ours=False):
    """Check a checkpoint of ours against its manifest; with neither that nor trainer/ it may be somebody else's.
    UserError names the first of weights and trainer/ that is not what was written; an edited text is warned of."""
    state = (directory / "trainer").exists()  # older checkpoints may have let go of it, see --keep_state
    if not ours and not state and not (directory / "manifest.json").exists():
        return
    written, found = read_json(directory / "manifest.json"), file_sha256s(directory, "**/*")
    for name in sorted(written.keys() | found.keys()):
        expected = name in written and (state or not name.startswith("trainer/"))
        strict = name.endswith(".safetensors") or name.startswith("trainer/")
        if written.get(name) != found.get(name) and (expected or strict and name in found):
            if strict or name not in found:
                raise UserError(f"{directory / name} is missing, new or not what was written: restore it, or delete"
                                f" {directory} and go on from the checkpoint before")
            print_rank0(f"warning: {directory / name} was edited; it is used as it is")


def shard_like(param, tensor):
    """A whole tensor -> this rank's share of it, laid out like `param`."""
    tensor = tensor.to(param.device, param.dtype)
    if isinstance(param, DTensor):
        return distribute_tensor(tensor, param.device_mesh, param.placements, src_data_rank=None)
    return tensor


def open_weights(directory):
    """-> {tensor name: the open file that holds it}, of model.safetensors or of the files that its index names."""
    index = directory / "model.safetensors.index.json"
    weight_map = read_json(index).get("weight_map") if index.exists() else {"": "model.safetensors"}
    names = {*map(str, weight_map.values())} if isinstance(weight_map, dict) else set()
    if not names or any(Path(name).name != name or not name.endswith(".safetensors") for name in names):
        raise UserError(f"{index}: no weight_map to safetensors files beside it")
    files = [open_safetensors(directory / name) for name in sorted(names)]
    return {tensor: file for file in files for tensor in file.keys()}


@torch.no_grad()
def load_weights(model, directory, new=(), drop=()):
    """Fill every parameter from the directory's safetensors, one or sharded; all ranks call it. Strict: UserError names
    a missing, extra or misshapen tensor. For a change of head: parameters `new` are left as they are, tensors `drop`
    unread. Returns the model."""
    on_rank_0(lambda: verify_checkpoint(directory))
    master = directory / "trainer" / "weights"  # float32, where the model itself was saved in bf16
    files = open_weights(master if master.exists() else directory)
    params = {name: param for name, param in model.named_parameters() if name not in new}
    # Left out: rotary tables, which old exports hold and the config determines; the second copy of a tied head.
    extra = {name for name in files.keys() - params.keys() - {*drop} if not name.endswith("rotary_emb.inv_freq")}
    if extra == {"lm_head.weight"} and "model.embed_tokens.weight" in files:
        head, embedding = (files[name].get_tensor(name) for name in ("lm_head.weight", "model.embed_tokens.weight"))
        extra = set() if torch.equal(head, embedding) else extra
    missing = params.keys() - files.keys()
    if missing or extra:
        raise UserError(f"{directory}: the weights do not fit config.json: missing {sorted(missing)[:4]}, extra"
                        f" {sorted(extra)[:4]} ({len(missing)} and {len(extra)} in all)")
    for name, param in params.items():
        tensor = files[name].get_tensor(name)
        if tensor.shape != param.shape or tensor.dtype.itemsize < 2 or not tensor.dtype.is_floating_point:
            raise UserError(f"{directory}: {name} is {tensor.dtype} {list(tensor.shape)}; config.json says"
                            f" {list(param.shape)}, and quantized weights are not read")
        param.copy_(shard_like(param, tensor))
    return model


# ---------------------------------------------------------------------------------------------- to write and go on from
def model_files(directory, tokenizer, stop, **changes):
    """What is saved beside the weights, {name: content}: config.json and generation_config.json, after the model's that
    training begins with. `stop`, what the template ends a turn with, and EOS must stop generation."""
    config = read_json(directory / "config.json") | changes
    config.pop("torch_dtype", None)
    path = directory / "generation_config.json"
    generation = read_json(path) if path.exists() else dict(bos_token_id=tokenizer.bos_token_id)
    stops = generation.get("eos_token_id") or []
    stops = [*(stops if isinstance(stops, list) else [stops]), tokenizer.eos_token_id, stop]
    return {"config.json": config, "generation_config.json": generation | dict(eos_token_id=[*dict.fromkeys(stops)])}


def save_checkpoint(directory, model, tokenizer, files, save_dtype, optimizer=None, state=None):
    """Write a model directory that transformers loads, with trainer/ if there is an optimizer; all ranks call it. It is
    made aside with a manifest, synced and renamed: `directory` is whole or absent. Raises UserError (a full disk)."""
    aside, params = directory.with_name(f".{directory.name}.tmp"), dict(model.named_parameters())
    trainer, dtype = aside / "trainer", torch.bfloat16 if save_dtype == "bf16" else torch.float32

    def save(folder, tensors, dtype=torch.float32):
        whole = {}
        for name, tensor in tensors.items():  # all ranks gather it, rank 0 keeps it
            tensor = tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()
            if dist.get_rank() == 0:  # a copy: uneven shares come as a view
                whole[name] = tensor.to("cpu", dtype, copy=True).contiguous()
        on_rank_0(lambda: (folder.mkdir(), save_torch_state_dict(whole, folder, max_shard_size="2GB"))[1])

    def finish(aside):
        if optimizer is not None:
            rng = dict(cpu=torch.get_rng_state())
            rng |= dict(cuda=torch.cuda.get_rng_state()) if torch.cuda.is_available() else {}
            save_file(rng, trainer / "rng.safetensors")
            (trainer / "state.json").write_text(json.dumps(state))
        files["config.json"]["dtype"] = str(dtype).removeprefix("torch.")
        for name, content in files.items():
            (aside / name).write_text(json.dumps(content, indent=2))
        try:
            tokenizer.save_pretrained(aside)
        except Exception as error:  # of no narrower class: what `tokenizers` raises when the disk is full
            raise OSError(str(error)) from None
        (aside / "manifest.json").write_text(json.dumps(file_sha256s(aside, "**/*"), indent=2))

    try:
        on_rank_0(lambda: shutil.rmtree(aside, ignore_errors=True))  # of a run that was killed
        save(aside, params, dtype)
        if optimizer is not None:
            on_rank_0(trainer.mkdir)
            if dtype != torch.float32:
                save(trainer / "weights", params)
            for key in ("exp_avg", "exp_avg_sq") if optimizer.state else ():
                save(trainer / key, {name: optimizer.state[param][key] for name, param in params.items()})
        on_rank_0(lambda: write_atomically(directory, finish))
    except UserError as error:
        on_rank_0(lambda: shutil.rmtree(aside, ignore_errors=True))
        raise UserError(f"cannot write {directory}: {error}; earlier checkpoints are intact") from None


@torch.no_grad()
def load_trainer(directory, model, optimizer):
    """Put back the optimizer and random state that save_checkpoint wrote; -> the state dict. Any number of ranks."""
    trainer = directory / "trainer"
    state = read_json(trainer / "state.json")
    for key in ("exp_avg", "exp_avg_sq") if state["updates"] else ():
        files = open_weights(trainer / key)
        for name, param in model.named_parameters():
            moment = torch.zeros_like(param).copy_(shard_like(param, files[name].get_tensor(name)))
            updates = torch.tensor(float(state["updates"]), device=param.device)
            optimizer.state[param] |= {key: moment, "step": updates}
    rng = open_safetensors(trainer / "rng.safetensors")
    torch.set_rng_state(rng.get_tensor("cpu"))
    if torch.cuda.is_available() and "cuda" in rng.keys():
        torch.cuda.set_rng_state(rng.get_tensor("cuda"))
    return state


def checkpoints(out):
    """The checkpoints of a run, oldest first. Other names (step_000500.bak) are not ours."""
    paths = (path for path in out.glob("step_*") if path.name[5:].isdecimal())
    return sorted(paths, key=lambda path: int(path.name[5:]))


def prune_checkpoints(out, keep, keep_state):
    """Delete all but the newest `keep` checkpoints, and trainer/ of all but the newest `keep_state` (0: none), each
    renamed first so that none is half there."""
    steps = checkpoints(out)
    doomed = steps[:-keep] if keep else []
    doomed += [step / "trainer" for step in steps[:-keep_state]] if keep_state else []
    for directory in filter(Path.exists, doomed):
        aside = out / f".step_{'-'.join(directory.relative_to(out).parts)}.old"
        os.rename(directory, aside)
        shutil.rmtree(aside)
