"""What somebody with a few pairs of their own is told, and finds at the end."""

import json
import re

import pytest

import train_pref
from plumbing.run import interval


@pytest.fixture
def own_pairs(tmp_path):
    for name, n in (("pairs", 12), ("held_out", 4)):
        rows = [dict(prompt=f"{name} {k}:", chosen=f" good {k}", rejected=" bad") for k in range(n)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def own_run(run_script, tiny_llama, folder, *more):
    model = tiny_llama(folder / "model", max_position_embeddings=640)
    return run_script("train_pref")("--model", model, "--data", folder / "pairs.jsonl", "--eval_data", folder / "held_out.jsonl",
                                    "--lr", 1e-5, "--threads", 1, "--out", folder / "run", *more).ok().out


def test_fewer_pairs_than_a_step(run_script, tiny_llama, own_pairs):
    """One step: it takes the rate that was asked for, and what the flags come to is said before it."""
    said = own_run(run_script, tiny_llama, own_pairs)
    before = said[: said.index("step 1/1")]
    assert "12 pairs are fewer than --batch_size 64: each step takes them all" in before
    assert "--warmup_steps 100 would not end within 1 steps: 0 instead" in before
    assert "a checkpoint every 1 steps" in before and "an evaluation every 1 steps" in before
    (line,) = [json.loads(line) for line in (own_pairs / "run" / "metrics.jsonl").read_text().splitlines()[1:]]
    assert line["learning_rate"] == 1e-5 and line["pairs"] == 12 and "eval_loss" in line


def test_a_short_run_has_a_curve(run_script, tiny_llama, own_pairs):
    """24 steps of the paper's preset: a checkpoint and an evaluation every second one; a flag that is given wins."""
    said = own_run(run_script, tiny_llama, own_pairs, "--batch_size", 4, "--epochs", 8, "--keep_state", 0, "--save_every", 12)
    lines = [json.loads(line) for line in (own_pairs / "run" / "metrics.jsonl").read_text().splitlines()[1:]]
    assert [line["step"] for line in lines if "eval_loss" in line] == list(range(2, 25, 2))
    assert sorted(path.name for path in (own_pairs / "run").glob("step_*")) == ["step_000012", "step_000024"]
    assert "an evaluation every 2 steps" in said and "a checkpoint every" not in said


@pytest.mark.parametrize("total, expected", [(1, 1), (9, 1), (79, 7), (2000, 200), (50_000, 200)])
def test_interval(total, expected):
    assert interval(None, total) == expected and interval(0, total) == 0 and interval(33, total) == 33


def test_the_model_card(run_script, tiny_llama, own_pairs):
    """The Hub's own reader takes it, and it says what the run was."""
    from huggingface_hub import ModelCard

    own_run(run_script, tiny_llama, own_pairs, "--loss", "ipo", "--beta", 0.3)
    card = ModelCard.load(own_pairs / "run" / "final" / "README.md")
    header = json.loads((own_pairs / "run" / "metrics.jsonl").read_text().split("\n")[0])
    assert card.data.library_name == "transformers" and "ipo" in card.data.tags
    for told in ("`--loss` | `ipo`", "`--beta` | `0.3`", header["data"], header["model"], str(header["commit"])):
        assert told in card.text
    code = re.search(r"```python\n(.*?)```", card.text, re.S)[1].replace("THIS_DIRECTORY", str(own_pairs / "run" / "final"))
    scope = {}
    exec(code, scope)
    assert type(scope["model"]).__name__ == "LlamaForCausalLM" and scope["tokenizer"].eos_token_id == 257


def test_a_reference_with_another_tokenizer(run_script, tiny_llama, own_pairs):
    """Of the same size: by its shapes it would do, and every log-prob would be of other words."""
    other = tiny_llama(own_pairs / "other", max_position_embeddings=640)
    vocabulary = json.loads((other / "tokenizer.json").read_text())
    table = vocabulary["model"]["vocab"]
    table["a"], table["b"] = table["b"], table["a"]
    (other / "tokenizer.json").write_text(json.dumps(vocabulary))
    model = tiny_llama(own_pairs / "model", max_position_embeddings=640)
    argv = ["--model", model, "--data", own_pairs / "pairs.jsonl", "--out", own_pairs / "run", "--ref", other]
    run_script("train_pref")(*argv).refused(str(other), "its tokenizer is another one")
    assert not (own_pairs / "run" / "ref_logps.safetensors").exists()


def test_a_presets_model_that_is_not_there_yet(run_script, tmp_path):
    """The command that makes it is said."""
    result = run_script("train_pref")("--preset", "tldr", "--out", tmp_path / "run")
    result.refused("out/sft-tldr+hh/final", "`torchrun --nproc_per_node=4 train_sft.py --preset tldr+hh` makes it")
    run_script("train_rm")("--preset", "tldr+hh", "--no-shard", "--out", tmp_path / "rm").refused("--out out/sft-8b` makes it")


def test_help_shows_the_values_in_force(capsys):
    for argv, expected in ((["--help"], "0.0002"), (["--preset", "tldr", "--help"], "1e-06")):
        with pytest.raises(SystemExit):
            train_pref.parse_args(argv)
        text = " ".join(capsys.readouterr().out.split())
        assert f"peak learning rate; cosine to a tenth of it (default: {expected})" in text
