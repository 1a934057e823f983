"""TRL's trainers on our classes: packed documents are isolated in training too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compatibility_cases import byte_tokenizer, tiny
from datasets import Dataset
from torch.nn import functional as F

from megalodon import MegalodonForCausalLM

trl = pytest.importorskip("trl", reason="TRL is not installed (extra dev)")

QUIET: dict[str, Any] = {"report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True, "logging_steps": 1}
ROWS = [{"text": f"{i}: " + "one two three "[: 2 + 5 * (i % 7)]} for i in range(32)]
TOKENIZER = byte_tokenizer()


def summed_loss(model: MegalodonForCausalLM, document: torch.Tensor, length: int | None) -> tuple[float, int]:
    """The loss of a document read alone, in pieces of `length`, and how many targets it has."""
    total, count = 0.0, 0
    for piece in [document] if length is None else document.split(length):
        logits = model(piece[None]).logits[0, :-1]
        total, count = total + float(F.cross_entropy(logits, piece[1:], reduction="sum")), count + len(piece) - 1
    return total, count


@pytest.mark.parametrize(
    "options",
    [
        {"packing": True, "packing_strategy": "bfd", "max_length": 48},
        {"packing": True, "packing_strategy": "bfd_split", "max_length": 24},
        {"padding_free": True, "max_length": None},
        {"padding_free": True, "max_length": None, "pad_to_multiple_of": 64},
        {"max_length": 48},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_packed_documents_train_as_each_alone(options: dict[str, Any], tmp_path: Path) -> None:
    model = tiny()
    arguments = trl.SFTConfig(
        str(tmp_path), per_device_train_batch_size=32, num_train_epochs=1, save_strategy="no", **QUIET, **options
    )
    trainer = trl.SFTTrainer(model, arguments, train_dataset=Dataset.from_list(ROWS), processing_class=TOKENIZER)
    trainer.train()
    first = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)

    untrained = tiny()
    documents = [torch.tensor([*TOKENIZER(row["text"]).input_ids, TOKENIZER.eos_token_id]) for row in ROWS]
    split = options["max_length"] if options.get("packing_strategy") == "bfd_split" else None
    with torch.no_grad():
        losses = [summed_loss(untrained, document, split) for document in documents]
    alone = sum(loss for loss, _ in losses) / sum(count for _, count in losses)
    assert first == pytest.approx(alone, rel=1e-4), "the loss of the first step, before the weights change"


# --- from a path ----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> str:
    tiny().save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def trained(trainer: Any) -> list[float]:
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    assert any(not torch.equal(p, old) for p, old in zip(trainer.model.parameters(), before, strict=True))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses and all(loss == loss for loss in losses)
    return losses


def steps(tmp_path: Path) -> dict[str, Any]:
    return {"output_dir": str(tmp_path / "out"), "max_steps": 2, "save_strategy": "no", "learning_rate": 1e-3, **QUIET}


PAIRS = Dataset.from_list([{"prompt": f"{i} and", "chosen": f" {i + 1}", "rejected": " no no"} for i in range(8)])
PROMPTS = Dataset.from_list([{"prompt": f"{i} and "} for i in range(8)])


def test_sft_from_a_path(folder: str, tmp_path: Path) -> None:
    arguments = trl.SFTConfig(**steps(tmp_path), per_device_train_batch_size=4)
    assert len(trained(trl.SFTTrainer(folder, arguments, train_dataset=Dataset.from_list(ROWS)))) == 2


def test_dpo_begins_at_log_two(folder: str, tmp_path: Path) -> None:
    arguments = trl.DPOConfig(**steps(tmp_path), per_device_train_batch_size=4)
    losses = trained(trl.DPOTrainer(folder, args=arguments, train_dataset=PAIRS))
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)  # model and reference are one


def test_reward_models_learn(folder: str, tmp_path: Path) -> None:
    arguments = trl.RewardConfig(**steps(tmp_path), per_device_train_batch_size=4)
    trained(trl.RewardTrainer(folder, args=arguments, train_dataset=PAIRS))


@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_policies_with_a_reference(kind: str, folder: str, tmp_path: Path) -> None:
    given = {**steps(tmp_path), "per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 6}
    arguments = getattr(trl, f"{kind}Config")(**given, beta=0.1)
    rewards = lambda completions, **_: [float(len(set(text))) for text in completions]  # noqa: E731
    trainer = getattr(trl, f"{kind}Trainer")(folder, rewards, args=arguments, train_dataset=PROMPTS)
    assert trainer.ref_model is not None
    trained(trainer)
