"""Small models and batches, trained on one process and on a mesh."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from megalodon.models import CausalLM, architecture
from megalodon.parallel import Mesh, MeshSizes, ParallelModel, Rows
from megalodon.parallel.sharding import whole

SMALL: dict[str, Any] = {
    "vocab_size": 48,
    "num_layers": 2,
    "model_dim": 32,
    "z_dim": 16,
    "value_dim": 32,
    "num_heads": 2,
    "ffn_hidden_dim": 40,
    "cema_ndim": 4,
    "chunk_size": 8,
    "norm_num_groups": 8,
    "swiglu": True,
    "rescale_nffn": True,
}


@dataclass(frozen=True)
class Case:
    """How a few steps are trained.

    `kind`: plain rows; packed: documents of all lengths in a row; streamed: rows that read on, packed too.
    `epsilon`: AdamW's. Where a gradient is smaller than its own rounding error (1e-9 here), so small an epsilon as 1e-8
    lets that error decide the direction of a step, on one process as well.
    """

    kind: str = "plain"
    steps: int = 10
    batch: int = 4
    length: int = 40
    parts: int = 1
    changes: tuple[tuple[str, Any], ...] = ()
    precision: str = "float32"
    epsilon: float = 1e-8
    virtual_stages: int = 1
    checkpointing: bool = False
    architecture: str = "megalodon"

    def model(self) -> CausalLM:
        torch.manual_seed(1)
        kind = architecture(self.architecture)
        model = kind.causal_lm(kind.config(**{**SMALL, **dict(self.changes)}))
        with torch.no_grad():  # initial zeros would hide mistakes
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        model.train()
        if self.checkpointing:
            model.gradient_checkpointing_enable()
        return model

    def batches(self):
        """(input_ids, labels, segment_ids, continues) of each step, whole."""
        generator = torch.Generator().manual_seed(2)
        for step in range(self.steps):
            ids = torch.randint(48, (self.batch, self.length), generator=generator)
            labels = torch.randint(48, (self.batch, self.length), generator=generator)
            labels[torch.rand(labels.shape, generator=generator) < 0.2] = -100
            segments = None
            if self.kind != "plain":
                chances = torch.tensor([0.0, 0.05, 0.1, 0.3]).repeat(-(-self.batch // 4))[: self.batch]
                starts = torch.rand(ids.shape, generator=generator) < chances[:, None]
                segments = starts.cumsum(1)
            continues = None
            if self.kind == "streamed":
                continues = torch.rand(self.batch, generator=generator) < 0.7
                if step == 0:
                    continues[:] = False
            yield ids, labels, segments, continues


def train_whole(case: Case) -> dict[str, Any]:
    """On one process, by the plain model's own forward."""
    model = case.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, eps=case.epsilon, fused=True)
    state, losses, norms = None, [], []
    for step, (ids, labels, segments, continues) in enumerate(case.batches()):
        optimizer.zero_grad()
        memory = None if state is None else state.reset(~continues)
        enabled = case.precision == "bfloat16"
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = model(
                ids,
                shift_labels=labels,
                segment_ids=segments,
                past_key_values=memory,
                use_cache=continues is not None,
                return_logits=False,
            )
        out.loss.backward()
        state = None if continues is None else out.past_key_values.detach()
        if step == 0:
            gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        losses.append(out.loss.item())
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
        optimizer.step()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return {"losses": losses, "norms": norms, "gradients": gradients, "weights": weights, "state": state}


def own_parts(mesh: Mesh, case: Case, batch, states) -> list[Rows]:
    """This rank's rows of a batch, in parts."""
    ids, labels, segments, continues = batch
    share = case.batch // mesh.sizes.data
    rows = []
    for part in range(case.parts):
        size = share // case.parts
        first = mesh.data_rank * share + part * size
        own = slice(first, first + size)
        state = states[part]
        if state is not None:
            state = state.reset(~continues[own])
        segment = None if segments is None else segments[own]
        rows.append(Rows(ids[own], labels[own], segment, state, continues is not None))
    return rows


def build(sizes: MeshSizes, case: Case) -> tuple[Mesh, ParallelModel]:
    mesh = Mesh(sizes, "cpu", timeout=600)
    return mesh, ParallelModel(case.model(), mesh, torch.device("cpu"), case.precision, case.virtual_stages)


def train_on_mesh(sizes: MeshSizes, case: Case) -> dict[str, Any]:
    """On this rank of a mesh."""
    mesh, model = build(sizes, case)
    model.train()
    weights = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(weights.values(), lr=5e-4, eps=case.epsilon, fused=True)
    states, losses, norms = [None] * case.parts, [], []
    for step, batch in enumerate(case.batches()):
        optimizer.zero_grad()
        targets = int((batch[1] != -100).sum())
        loss, states = model.accumulate_gradients(own_parts(mesh, case, batch, states), targets)
        if step == 0:
            gradients = {name: whole(p.grad).clone() for name, p in weights.items()}
        losses.append(loss.item())
        norms.append(model.clip_gradients(0.5).item())
        optimizer.step()
    return {
        "losses": losses,
        "norms": norms,
        "gradients": gradients,
        "weights": {name: whole(p.detach()).clone() for name, p in weights.items()},
        "rank": dist.get_rank(),
    }


def assert_equal_training(
    case: Case, expected: dict[str, Any], answers: list[dict[str, Any]], tolerance: float
) -> None:
    """Losses, norms, gradients and the weights after all steps agree, and the ranks hold every parameter."""
    seen = set()
    for answer in answers:
        wrong = {}
        for kind in ("gradients", "weights"):
            for name, value in answer[kind].items():
                seen.add(name)
                difference = (value - expected[kind][name]).abs().max().item()
                if not difference < tolerance:
                    wrong[f"{kind} of {name}"] = difference
        assert wrong == {}, wrong
        torch.testing.assert_close(answer["losses"], expected["losses"], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(answer["norms"], expected["norms"], rtol=10 * tolerance, atol=tolerance)
    assert seen == expected["weights"].keys()


__all__ = ["SMALL", "Case", "assert_equal_training", "build", "own_parts", "replace", "train_on_mesh", "train_whole"]
