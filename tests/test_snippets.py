"""The README's two snippets, run as they stand there, against float64 written out."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import byte_tokenizer

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()


def snippet(name):
    return re.search(rf"<!-- {name} snippet -->\n```python\n(.*?)```", README, re.S)[1]


def float64_logps(model, ids, mask):
    """Summed log-probs of the tokens that mask (B, T) marks, by transformers' logits in float64 numpy (B,)."""
    with torch.no_grad():
        logits = model.double()(ids).logits.numpy()[:, :-1]
    model.float()
    logits = logits - logits.max(-1, keepdims=True)
    logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    picked = np.take_along_axis(logps, ids.numpy()[:, 1:, None], -1)[..., 0]
    return (picked * mask.numpy()[:, 1:]).sum(1)


def load(directory):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def test_kernel_snippet(tiny_llama, tmp_path):
    model = load(tiny_llama(tmp_path / "m"))
    ids = torch.randint(0, 256, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.zeros_like(ids)
    mask[0, 4:], mask[1, 2:7], mask[2, 8:] = 1, 1, 1
    scope = dict(torch=torch, model=model, input_ids=ids, attention_mask=torch.ones_like(ids),
                 labels=ids.masked_fill(mask == 0, -100))
    exec(snippet("kernel"), scope)
    np.testing.assert_allclose(scope["logps"].detach().numpy(), float64_logps(model, ids, mask), rtol=2e-5)
    scope["logps"].sum().backward()  # reaches the body and the head
    assert model.lm_head.weight.grad.abs().sum() > 0 and model.model.embed_tokens.weight.grad.abs().sum() > 0


@pytest.mark.filterwarnings("ignore")
def test_trl_snippet(tiny_llama, tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    directory = tiny_llama(tmp_path / "m")
    scope = {}
    exec(snippet("TRL"), scope)
    rows = [dict(prompt=f"p{k}", chosen=f" good{k}", rejected=f" bad{7 * k}") for k in range(4)]
    args = trl.DPOConfig(output_dir=tmp_path / "o", per_device_train_batch_size=4, max_steps=1, learning_rate=0.05,
                         lr_scheduler_type="constant", report_to=[], beta=0.3, use_cpu=True, bf16=False,
                         save_strategy="no", logging_steps=1, gradient_checkpointing=False, disable_tqdm=True)
    trainer = scope["ISDPOTrainer"](model=load(directory), args=args, processing_class=byte_tokenizer(tmp_path / "t"),
                                    train_dataset=datasets.Dataset.from_list(rows))
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.train()  # one step away from the reference: weights other than 1
    logged = trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(np.log(2), rel=1e-5)
    # At the reference, and each what TRL's name says.
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert logged[name] == pytest.approx(0, abs=1e-5)
    assert logged["weights/mean"] == pytest.approx(1, rel=1e-5) and logged["weights/ess"] == pytest.approx(4, rel=1e-5)
    policy, ref = (float64_logps(model, batch["input_ids"], batch["completion_mask"])
                   for model in (trainer.model, load(directory)))
    rho_w, rho_l = np.split(policy - ref, 2)
    weights = np.exp(np.minimum(rho_w + rho_l, 2.0))
    assert abs(weights - 1).max() > 0.05
    expected = (weights * np.log1p(np.exp(-0.3 * (rho_w - rho_l)))).mean()
    trainer._metrics["train"].clear()
    assert trainer.compute_loss(trainer.model.train(), batch).item() == pytest.approx(expected, rel=1e-4)
    logged = {name: values[0] for name, values in trainer._metrics["train"].items()}
    assert logged == pytest.approx({
        "rewards/chosen": 0.3 * rho_w.mean(), "rewards/rejected": 0.3 * rho_l.mean(), "rewards/margins": 0.3 * (rho_w - rho_l).mean(),
        "rewards/accuracies": (rho_w > rho_l).mean(), "weights/mean": weights.mean(),
        "weights/ess": weights.sum() ** 2 / (weights**2).sum()}, rel=1e-4, abs=1e-6)
