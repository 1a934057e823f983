"""One run of a recall study: train a new model on the task, measure it, and be able to go on where it was stopped."""

from __future__ import annotations

import json
import math
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

from megalodon.evaluation.recall.config import Cell, RecallConfig
from megalodon.evaluation.recall.questions import NOT_ASKED, Questions, Segment
from megalodon.files import load_tensors, save_tensors, write_file
from megalodon.models import CausalLM, build_model
from megalodon.training.optimizer import build_optimizer, clip_gradients, set_learning_rate
from megalodon.training.schedule import ScheduleConfig, learning_rate_ratio
from megalodon.training.snapshot import optimizer_tensors, restore_optimizer, seed_everything

PIECE = 4096
TOKENS_AT_ONCE = 1 << 15
COSINE = ScheduleConfig(kind="cosine", end_ratio=0.0)


@lru_cache(maxsize=16)
def _drawn(kind: type[Segment], fields: str, seed: int) -> Questions:
    return kind.model_validate_json(fields).draw(seed)


def drawn(segment: Segment, seed: int) -> Questions:
    """The segment's rows; the last few segments are kept."""
    return _drawn(type(segment), segment.model_dump_json(), seed)


def run_cell(config: RecallConfig, cell: Cell, folder: Path) -> dict[str, Any]:
    """Train and measure one model; what it came to, ready for JSON.

    After every epoch everything is kept in `folder`, so that a run that was ended goes on with its next epoch, with
    the results of one that never stopped.
    """
    fingerprint = config.fingerprint(cell)
    train_seeds, test_seeds = config.seeds_of_segments()
    seed_everything(cell.seed)
    model = build_model(config.model_config_of(cell.model, cell.width))
    optimizer = build_optimizer(model, config.training.optimizer(cell.learning_rate))
    kept = folder / f"{fingerprint}.safetensors"
    done = _restore(kept, model, optimizer)
    while not _finished(config, done):
        begun = time.perf_counter()
        seed_everything(
            cell.seed * config.training.epochs + done["epochs"]
        )  # of dropout, so that it can be gone on with
        ratio = learning_rate_ratio(done["epochs"], config.training.epochs, COSINE)
        set_learning_rate(optimizer, cell.learning_rate * ratio)
        loss = 0.0
        model.train()
        for segment, seed in zip(config.train_segments, train_seeds, strict=True):
            for batch in drawn(segment, seed).batches(config.training.batch_size):
                loss = _step(model, optimizer, batch, config.training.max_grad_norm)
                done["steps"] += 1
                done["diverged"] = not math.isfinite(loss)
                if done["diverged"]:
                    break
            if done["diverged"]:
                break
        done["epochs"] += 1
        done["loss"] = loss if math.isfinite(loss) else None
        if not done["diverged"]:
            done["accuracy"] = {
                segment.label(): accuracy(model, drawn(segment, seed))
                for segment, seed in zip(config.test_segments, test_seeds, strict=True)
            }
            done["by_epoch"].append(_mean(done["accuracy"]))
        done["seconds"] += time.perf_counter() - begun
        _keep(kept, model, optimizer, done)
    lengths = sorted({segment.row_length for segment in config.test_segments})
    result = {
        "fingerprint": fingerprint,
        "task": config.task,
        "model": cell.model,
        "architecture": model.config.model_type,
        "width": cell.width,
        "learning_rate": cell.learning_rate,
        "seed": cell.seed,
        "parameters": model.num_parameters(),
        "state_bytes": {str(length): state_bytes(model, length) for length in lengths},
        "mean_accuracy": _mean(done["accuracy"]),
        **done,
    }
    kept.unlink(missing_ok=True)
    return result


def _mean(accuracies: dict[str, float]) -> float:
    return sum(accuracies.values()) / len(accuracies) if accuracies else 0.0


def _finished(config: RecallConfig, done: dict[str, Any]) -> bool:
    training = config.training
    solved = bool(done["accuracy"]) and _mean(done["accuracy"]) > training.stop_above
    late = training.seconds is not None and done["seconds"] >= training.seconds
    return done["diverged"] or solved or late or done["epochs"] >= training.epochs


def _step(model: CausalLM, optimizer: torch.optim.Optimizer, batch: Questions, max_norm: float | None) -> float:
    """One update on the mean loss of the batch's questions, which is returned; none where that is not finite."""
    logits, answers = answered(model, batch)
    loss = F.cross_entropy(logits, answers)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = clip_gradients(model.parameters(), max_norm)
    if bool(torch.isfinite(loss + norm)):
        optimizer.step()
        return loss.item()
    return math.nan


def answered(model: CausalLM, batch: Questions) -> tuple[Tensor, Tensor]:
    """Logits [q, vocabulary] at the places of a batch where something is asked, and the answers [q]."""
    places = batch.labels != NOT_ASKED
    hidden = model.model(batch.inputs, use_cache=False).last_hidden_state
    return model.lm_head(hidden[places]).float(), batch.labels[places]


@torch.inference_mode()
def accuracy(model: CausalLM, rows: Questions) -> float:
    """The share of right answers of each row, averaged over rows; an answer is the likeliest of all ids.

    Long rows are read in pieces that carry the state, wherever the model can.
    """
    model.eval()
    length = rows.inputs.shape[1]
    total = 0.0
    for batch in rows.batches(max(TOKENS_AT_ONCE // length, 1)):
        right = torch.zeros(batch.labels.shape, dtype=torch.bool)
        state = None
        piece = PIECE if model.model.reads_in_pieces else length
        for start in range(0, length, piece):
            part = slice(start, start + piece)
            output = model.model(batch.inputs[:, part], past_key_values=state, use_cache=length > piece)
            state = output.past_key_values
            labels = batch.labels[:, part]
            asked = labels != NOT_ASKED
            if bool(asked.any()):
                right[:, part][asked] = model.lm_head(output.last_hidden_state[asked]).argmax(-1) == labels[asked]
        asked = batch.labels != NOT_ASKED
        total += float((right.sum(1) / asked.sum(1)).sum())
    return total / len(rows)


@torch.inference_mode()
def state_bytes(model: CausalLM, length: int) -> int | None:
    """Bytes that one row's state takes after so many tokens; None where a model has none and must read all at once."""
    model.eval()
    state = None
    piece = PIECE if model.model.reads_in_pieces else length
    for start in range(0, length, piece):
        ids = torch.zeros(1, min(piece, length - start), dtype=torch.int64)
        state = model.model(ids, past_key_values=state, use_cache=True).past_key_values
    if state is None:
        return None
    aside = state.position.nbytes
    return state.nbytes - aside


def _keep(path: Path, model: CausalLM, optimizer: torch.optim.Optimizer, done: dict[str, Any]) -> None:
    weights = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    tensors = {**_untied(weights), **{f"optimizer/{k}": v for k, v in optimizer_tensors(model, optimizer).items()}}
    write_file(path, lambda temporary: save_tensors(temporary, tensors, {"done": json.dumps(done)}))


def _untied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each storage once: safetensors refuses tied weights."""
    first = {tensor.data_ptr(): name for name, tensor in reversed(tensors.items()) if tensor.numel()}
    return {name: tensor for name, tensor in tensors.items() if first.get(tensor.data_ptr(), name) == name}


def _restore(path: Path, model: CausalLM, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    if not path.is_file():
        empty: dict[str, Any] = {"epochs": 0, "steps": 0, "seconds": 0.0, "loss": None, "accuracy": {}}
        return {**empty, "by_epoch": [], "diverged": False}
    tensors = load_tensors(path)
    model.load_state_dict(
        {name.removeprefix("model/"): x for name, x in tensors.items() if name.startswith("model/")}, strict=False
    )
    restore_optimizer(
        model,
        optimizer,
        {name.removeprefix("optimizer/"): x for name, x in tensors.items() if name.startswith("optimizer/")},
    )
    with safe_open(path, "pt") as opened:
        done: dict[str, Any] = json.loads(opened.metadata()["done"])
    return done
