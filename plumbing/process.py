"""What every process needs: the group it joins, its end, locks, and files that are whole or absent.

Text files are UTF-8 whatever the locale: read_text and write_text are the only two places that read and write them
whole. JSON is strict: to_json is the only place that makes it.
"""

import ctypes
import fcntl
import hashlib
import json
import math
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
    if int(os.environ.get("RANK", 0)) > 0:
        return
    try:
        tqdm.write(line)
        sys.stdout.flush()
    except OSError:
        # Later lines, and Python's own flush at exit, must not meet the broken pipe again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run_main(main):
    """Run main, exit with the code that it returns, and turn a user's mistake into one line."""
    sys.stdout.reconfigure(errors="backslashreplace")  # a letter that the screen's locale lacks stops nothing
    code = None
    try:
        # It returns its code and does not raise it: what a traceback keeps alive hangs at exit, now and then.
        code = main()
    except (UserError, OSError, SafetensorError) as error:
        if int(os.environ.get("RANK", 0)) > 0:
            # Mostly rank 0 says the same, once: torchrun ends this rank as soon as rank 0 has exited.
            time.sleep(5)
        end_with_error(error)
    except RuntimeError as error:
        if "allocate memory" in str(error) or "Resource temporarily unavailable" in str(error):
            end_with_error(UserError(f"this machine has not the memory or the threads for it: {error}"))
        # What a collective raises when another rank has died or hangs; gloo has no class of its own.
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        # Where a machine's own name is 127.0.0.1 in its /etc/hosts, gloo tells the others to connect there.
        end_with_error(UserError("another rank has died, or was silent for --timeout seconds (on several machines also:"
                                 f" GLOO_SOCKET_IFNAME must name the interface they share): {error}"))
    except KeyboardInterrupt:
        os._exit(130)  # before training there is nothing to save
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)


def end_with_error(error):
    """Say it in one line and exit at once: a clean-up would wait for other ranks."""
    print("error:", " ".join(str(error).split()), file=sys.stderr, flush=True)
    get_error_handler().record_exception(error)  # torchrun's last lines repeat it
    os._exit(getattr(error, "code", 1))


def init_distributed(seed, timeout, threads):
    """Join the process group -> rank, world, device. Without torchrun it is a group of one. `timeout`: seconds that a
    rank waits for another; `threads`: CPU threads of this rank, 0: torch's own choice."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # PR_SET_PDEATHSIG: a worker whose torchrun was killed must not train on.
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        check_torchrun()
    torch.set_num_threads(threads or torch.get_num_threads())
    torch.manual_seed(seed)
    # cuDNN's attention can give NaN gradients under a mask (pytorch issue 196678) and plans anew for every shape.
    torch.backends.cuda.enable_cudnn_sdp(False)
    device = torch.device("cpu")
    backend = "gloo"
    if torch.cuda.is_available():
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"local rank {local_rank}, but {torch.cuda.device_count()} GPUs: lower --nproc_per_node")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    group = dict(backend=backend, timeout=timedelta(seconds=timeout))
    if "RANK" not in os.environ:
        # Alone: no port is opened that another run on this machine may have.
        group |= dict(store=dist.HashStore(), rank=0, world_size=1)
    dist.init_process_group(**group)
    return dist.get_rank(), dist.get_world_size(), device


def check_torchrun():
    """Raise UserError where torchrun was killed before it could be watched, while this worker was still importing: its
    store is gone, and joining the group would wait for that until the timeout. (The parent's number says nothing: it is
    1 of an orphan, and of a worker whose torchrun is a container's first process.)"""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return  # then the store is rank 0's own
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        socket.create_connection(address, timeout=60).close()
    except OSError as error:
        raise UserError(f"torchrun is gone, its store at {address[0]}:{address[1]} does not answer (on several machines"
                        f" also: its --local_addr must name an address that the others reach): {error}") from None


def on_rank_0(function):
    """Run it on rank 0 and give its result to every rank. What it says is wrong every rank raises, as a UserError:
    ranks that go on alone would wait for rank 0 until the timeout."""
    result = None
    if dist.get_rank() == 0:
        try:
            result = function()
        except (UserError, OSError, SafetensorError) as error:
            result = UserError(str(error))
    sent = [result]  # broadcast_object_list fills a list in place
    dist.broadcast_object_list(sent)
    if isinstance(sent[0], UserError):
        raise sent[0]
    return sent[0]


HELD_LOCKS = {}  # {path: its open lock file}: a lock lasts as long as the process, however that ends


def lock_for_writing(path):
    """Keep other processes from writing `path`, a file or a directory. Raises UserError saying who does already."""
    if path in HELD_LOCKS:
        return
    lock = path / ".lock" if path.is_dir() else path.with_name(f".{path.name}.lock")
    file = open(lock, "a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise UserError(f"{path} is being written by {file.read()}: wait for it, or choose another --out") from None
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
    except OSError as error:
        raise UserError(f"cannot write {lock}: {error}") from None
    HELD_LOCKS[path] = file


def catch_signals():
    """-> a list into which the numbers of SIGTERM, SIGINT, SIGUSR1 and SIGHUP will be put as they come: the step ends
    and all ranks save. A second one exits at once, unless it comes within a second of the first: torchrun passes a
    Ctrl-C on to workers that had it already."""
    caught = []
    first_at = None

    def handle(signum, frame):
        nonlocal first_at
        caught.append(signum)
        if first_at is None:
            first_at = time.monotonic()
        elif time.monotonic() - first_at > 1:
            os._exit(128 + signum)

    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        ignored = signum == signal.SIGHUP and signal.getsignal(signum) == signal.SIG_IGN  # nohup means: go on
        if not ignored:
            signal.signal(signum, handle)
    return caught


def peak_memory_gb():
    """Of the GPU's allocator, or resident on CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9  # ru_maxrss is in KiB on Linux


# --------------------------------------------------------------------------------------- files that are whole or absent
def fsync_and_chmod(path):
    """Give a file the permissions of the umask, which safetensors does not, and fsync it; a directory: fsync alone."""
    if path.is_file():
        umask = os.umask(0)  # it can be read only by setting it
        os.umask(umask)
        path.chmod(0o666 & ~umask)
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def make_directory(path):
    """Unless it is there. Raises UserError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise UserError(f"{path} is a file, or a link to what is not there: choose another --out") from None


def write_atomically(path, write):
    """write(temporary path), fsync, rename: `path`, a file or directory, is whole or as it was. Raises UserError, which
    names it, where that fails (a full disk)."""
    aside = path.with_name(f".{path.name}.tmp")
    try:
        write(aside)
        for inner in aside.rglob("*"):
            fsync_and_chmod(inner)
        fsync_and_chmod(aside)
        os.replace(aside, path)  # as one: nobody ever sees half of it
        fsync_and_chmod(path.parent)  # the new name itself
    except (OSError, SafetensorError) as error:
        if aside.is_dir():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error}; what was there before is intact") from None


def write_text(path, text):
    """A UTF-8 file, whole or as it was."""
    write_atomically(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def read_text(path):
    """The text of a UTF-8 file. Raises UserError."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: no text that can be read: {error}") from None


def to_json(content, indent=None):
    """JSON text of `content`. JSON has no NaN and no infinity: UserError says where one is, "bins[3].accuracy"."""
    try:
        return json.dumps(content, indent=indent, allow_nan=False)
    except ValueError:
        raise UserError(f"not written, as it is no JSON: {find_not_finite(content, '')}") from None


def find_not_finite(content, place):
    """-> "bins[3].accuracy is nan" of the first number in `content` that is not finite; None: there is none."""
    if isinstance(content, float) and not math.isfinite(content):
        return f"{place.removeprefix('.')} is {content}"
    inner = {}
    if isinstance(content, dict):
        inner = {f"{place}.{name}": value for name, value in content.items()}
    elif isinstance(content, (list, tuple)):
        inner = {f"{place}[{k}]": value for k, value in enumerate(content)}
    for name, value in inner.items():
        found = find_not_finite(value, name)
        if found:
            return found
    return None


def parse_json(text, where):
    """The object that a JSON text is. Raises UserError, which says `where` it stands ("file", "file:line"), if it is
    none."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: no JSON that can be read: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{where}: no JSON object: {text[:40]}")
    return content


def read_json(path):
    """The object in a JSON file. Raises UserError where there is none."""
    return parse_json(read_text(path), path)


def file_sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_safetensors(path):
    """-> safetensors' open file: .keys(), .get_tensor(name), .metadata(). Raises UserError."""
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: no whole safetensors file (pickled weights are never read): {error}") from None


def tensors_sha256(tensors):
    """Of the values of {name: tensor}."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].numpy())
    return digest.hexdigest()


def write_tensors(path, tensors, key, report=""):
    """A file of tensors that a run makes once, with what it was made of (`key`), a report for the screen and a
    checksum."""
    metadata = dict(key=key, report=report, sha256=tensors_sha256(tensors))
    write_atomically(path, lambda aside: save_file(tensors, aside, metadata))


def read_tensors(path, key):
    """-> the tensors and the report of write_tensors. Raises UserError: damaged, or made of something else."""
    file = open_safetensors(path)
    metadata = file.metadata() or {}
    tensors = {name: file.get_tensor(name) for name in file.keys()}
    if metadata.get("key") != key or metadata.get("sha256") != tensors_sha256(tensors):
        raise UserError(f"{path} is damaged, or of another model, tokenizer, data or precision (it says"
                        f" {metadata.get('key')}, now {key}): move it away, or give another --out")
    return tensors, metadata["report"]
