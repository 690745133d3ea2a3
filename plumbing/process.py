"""What every process needs: the group it joins, its end, locks, and files that are whole or absent."""

import ctypes
import fcntl
import hashlib
import json
import os
import resource
import shutil
import signal
import socket
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from tqdm import tqdm


# ------------------------------------------------------------------------------------------------------------ a process
class UserError(ValueError):
    """A mistake its user can mend: said once, in one line, without a traceback. Exit code 1, a wrong flag's 2."""

    code = 1


def print_rank0(line):
    """Print on rank 0, above the progress bar. A screen that is gone (| head, a closed terminal) stops nothing."""
    try:
        if int(os.environ.get("RANK", 0)) == 0:
            tqdm.write(line)
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run_main(main):
    """Run main and turn a user's mistake into one line. Ranks above 0 let rank 0 speak first: torchrun ends them when
    it exits; if rank 0 saw nothing wrong, they speak for themselves."""
    code = None
    try:
        code = main()  # returns, and does not raise, its code: what a traceback keeps alive hangs at exit, now and then
    except (UserError, OSError, SafetensorError) as error:
        time.sleep(5 if int(os.environ.get("RANK", 0)) else 0)
        print("error:", " ".join(str(error).split()), file=sys.stderr, flush=True)
        get_error_handler().record_exception(error)  # torchrun's last lines repeat it
        os._exit(getattr(error, "code", 1))  # no clean-up that would wait for other ranks
    except KeyboardInterrupt:  # before training there is nothing to save
        os._exit(130)
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)


def init_distributed(seed, timeout, threads):
    """Join the process group -> rank, world, device. Without torchrun it is a group of one."""
    if "TORCHELASTIC_RUN_ID" in os.environ:  # PR_SET_PDEATHSIG: a worker whose torchrun was killed must not train on
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    torch.set_num_threads(threads or torch.get_num_threads())
    torch.manual_seed(seed)
    # cuDNN's attention can give NaN gradients under a mask (pytorch issue 196678) and plans anew for every shape.
    torch.backends.cuda.enable_cudnn_sdp(False)
    local_rank, cuda = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.is_available()
    if cuda and local_rank >= torch.cuda.device_count():
        raise UserError(f"local rank {local_rank}, but {torch.cuda.device_count()} GPUs: lower --nproc_per_node")
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(seconds=timeout), **alone)
    return dist.get_rank(), dist.get_world_size(), device


def on_rank_0(function):
    """Run it on rank 0 and give its result, or what it says is wrong, to every rank."""
    box = [None]
    if dist.get_rank() == 0:
        try:
            box = [function()]
        except (UserError, OSError, SafetensorError) as error:
            box = [UserError(str(error))]
    dist.broadcast_object_list(box)
    if isinstance(box[0], UserError):
        raise box[0]
    return box[0]


HELD_LOCKS = {}  # files whose locks last as long as the process, however it ends


def lock_for_writing(path):
    """Keep other processes from writing `path`, a file or a directory. Raises UserError saying who does already."""
    if path in HELD_LOCKS:
        return
    file = open(path / ".lock" if path.is_dir() else path.with_name(f".{path.name}.lock"), "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise UserError(f"{path} is being written by {file.read()}: wait for it, or choose another --out") from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    HELD_LOCKS[path] = file


def catch_signals():
    """-> a list into which SIGTERM, SIGINT, SIGUSR1 and SIGHUP will be put with their time: the step ends and all ranks
    save. A second one exits at once, unless within a second: torchrun passes a Ctrl-C on to workers that had it."""
    caught = []

    def handle(signum, frame):
        caught.append((signum, time.monotonic()))
        if caught[-1][1] - caught[0][1] > 1:
            os._exit(128 + signum)

    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:  # nohup means: go on
            signal.signal(signum, handle)
    return caught


def peak_memory_gb():
    """Of the GPU's allocator, or resident on CPU (ru_maxrss is in KiB on Linux)."""
    on_cpu = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else on_cpu) / 1e9


# --------------------------------------------------------------------------------------- files that are whole or absent
def fsync_and_chmod(path):
    """Permissions from the umask (safetensors writes 0600), and fsync."""
    if path.is_file():
        umask = os.umask(0)
        os.umask(umask)
        path.chmod(0o666 & ~umask)
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def write_atomically(path, write):
    """write(temporary path), fsync, rename: `path`, a file or directory, is whole or as it was. Raises UserError."""
    aside = path.with_name(f".{path.name}.tmp")
    try:
        write(aside)
        for written in (*aside.rglob("*"), aside):
            fsync_and_chmod(written)
        os.replace(aside, path)
        fsync_and_chmod(path.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True) if aside.is_dir() else aside.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error}; what was there before is intact") from None


def read_json(path):
    """The object in a JSON file. Raises UserError where there is none."""
    try:
        return {**json.loads(path.read_text())}
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: no JSON object that can be read: {error}") from None


def file_sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_safetensors(path):
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: no whole safetensors file (pickled weights are never read): {error}") from None


def tensors_sha256(tensors):
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].numpy())
    return digest.hexdigest()


def write_tensors(path, tensors, key, report=""):
    """A file of tensors that a run makes once, with what it was made of (`key`) and a checksum."""
    metadata = dict(key=key, report=report, sha256=tensors_sha256(tensors))
    write_atomically(path, lambda aside: save_file(tensors, aside, metadata))


def read_tensors(path, key):
    """-> the tensors and the report of write_tensors. Raises UserError: damaged, or made of something else."""
    file = open_safetensors(path)
    metadata, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
    if metadata.get("key") != key or metadata.get("sha256") != tensors_sha256(tensors):
        raise UserError(f"{path} is damaged, or of another model, tokenizer, data or precision (it says"
                        f" {metadata.get('key')}, now {key}): delete it, or give another --out")
    return tensors, metadata["report"]
