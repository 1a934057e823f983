"""Losses of transfer against what the authors' code computed: values to 1e-5, gradients to 1e-4; through the recipes'
own objectives, so that what a layer is shown is theirs too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

from megalodon import KinConfig
from megalodon.convert import mixer_from_reference
from megalodon.linearize import Lesson, losses
from megalodon.linearize.recipes.hedgehog import row_error
from megalodon.linearize.recipes.lolcats import output_error
from megalodon.models.kin.mixers import Mixer
from megalodon.models.kin.model import new_mixer
from megalodon.ops import layout_of


class Case:
    """A case of a file of vectors."""

    def __init__(self, file: str, case: str) -> None:
        with safe_open(Path(__file__).parent / "golden" / f"{file}.safetensors", "pt") as opened:
            self.config: dict[str, Any] = json.loads(opened.metadata()["meta"])["cases"][case]["config"]
            self.tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        self.case = case

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[f"{self.case}.{name}"]

    def named(self, prefix: str) -> dict[str, Tensor]:
        whole = f"{self.case}.{prefix}"
        return {name.removeprefix(whole): x for name, x in self.tensors.items() if name.startswith(whole)}


def near(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    found, wanted = found.detach().double().reshape(wanted.shape), wanted.double()
    assert (found - wanted).abs().max() < tolerance * wanted.abs().max()


def softmax_teacher(student: Mixer) -> Mixer:
    """Attention with the projections of a mixer of LoLCATs' repository."""
    heads, groups, size = student.num_heads, student.num_groups, student.head_dim
    config = KinConfig(
        num_layers=1, model_dim=student.q_proj.in_features, num_heads=heads, num_key_value_heads=groups, head_dim=size
    )
    teacher = new_mixer(config, 0).to(student.q_proj.weight.dtype).requires_grad_(False)
    teacher.load_state_dict({f"{name}_proj.weight": getattr(student, f"{name}_proj").weight for name in "qkvo"})
    return teacher


def lessons(case: Case, kind: str, dtype: torch.dtype = torch.float32) -> list[Lesson]:
    """What each layer is shown: layer 1 reads the first layer's input plus what the teacher's attention adds to it."""
    x = case["in.x"].to(dtype)
    layout, found = layout_of(x.shape[0], x.shape[1], x.device), []
    for layer in range(case.config["layers"]):
        parameters = {name: value.to(dtype) for name, value in case.named(f"param.{layer}.").items()}
        student = mixer_from_reference(kind, case.config, parameters)
        teacher = softmax_teacher(student)
        heads, _ = teacher.head_outputs(x, None, layout)
        found.append(Lesson(layer, x, layout, teacher, student, heads))
        near(heads.transpose(1, 2), case[f"out.y_true.{layer}"], 1e-5)
        x = x + found[-1].output
    return found


def check_gradients(case: Case, shown: list[Lesson], prefix: str) -> None:
    names = {"feature_map_q.weight": "feature_map_q.mlp.layer", "feature_map_k.weight": "feature_map_k.mlp.layer"}
    names["window_logit"] = "window_factors"
    wanted = case.named(prefix)
    assert wanted
    for lesson in shown:
        for ours, theirs in names.items():
            key = f"{lesson.layer}.{theirs}"
            if key in wanted:
                near(lesson.student.get_parameter(ours).grad, wanted[key], 1e-4)


@pytest.mark.parametrize("tag", ["xent", "mse", "both"])
def test_hedgehog(tag: str) -> None:
    case = Case("hedgehog", "transfer")
    shown = lessons(case, "hedgehog")
    mse, xent = {"xent": (0, 1), "mse": (1, 0), "both": (1, 1)}[tag]  # of 1000 times the mean square, and of rows
    loss = torch.stack([mse * output_error(x) + xent * row_error(x) for x in shown]).mean()
    near(loss, case[f"out.loss_{tag}"], 1e-5)
    loss.backward()
    check_gradients(case, shown, f"grad.{tag}.")


def test_lolcats_with_sliding_windows() -> None:
    case = Case("lolcats", "transfer_sw")
    shown = lessons(case, "lolcats")
    loss = torch.stack([output_error(x) for x in shown]).mean()
    near(loss, case["out.loss"], 1e-5)
    loss.backward()
    check_gradients(case, shown, "grad.")


def test_lolcats_with_the_windows_of_its_configs() -> None:
    """Blocks, which no mixer here has: the loss is the same function of another operator's outputs."""
    case = Case("lolcats", "transfer_tk")
    shown = lessons(case, "lolcats", torch.float64)
    total = []
    for lesson in shown:
        heads = blocks_of_windows(lesson, case.config["window_size"])
        near(heads.transpose(1, 2), case[f"out.y_pred.{lesson.layer}"], 1e-5)
        total.append(losses.attention_transfer(heads, lesson.heads))
    loss = torch.stack(total).mean()
    near(loss, case["out.loss"], 1e-5)
    loss.backward()
    check_gradients(case, shown, "grad.")


def blocks_of_windows(lesson: Lesson, size: int) -> Tensor:
    """[B, L, H, d] of whole blocks: softmax over the own block and the one before, features over those before."""
    student, length = lesson.student, lesson.x.shape[1]
    q, k, v = student.queries_keys_values(lesson.x, lesson.layout, rotated=True)
    groups = q.shape[2] // k.shape[2]
    lower, block = torch.ones(length, length, dtype=torch.bool).tril(), torch.arange(length) // size
    inside = lower & (block[:, None] - block <= 1)
    scores = torch.einsum("blhd,bshd->bhls", q, k.repeat_interleave(groups, 2)) * student.head_dim**-0.5
    scores = scores.masked_fill(~inside, -torch.inf)
    soft = torch.sigmoid(student.window_logit)[:, None, None] * (scores - scores.amax(-1, keepdim=True)).exp()
    linear = torch.einsum("blhf,bshf->bhls", student.feature_map_q(q), student.feature_map_k(k))
    rows = soft + linear * (lower & ~inside)
    return torch.einsum("bhls,bshd->blhd", rows / rows.sum(-1, keepdim=True), v.repeat_interleave(groups, 2))


def test_mohawk() -> None:
    case = Case("mohawk", "stages")
    student = case.named("param.student.")
    norm = torch.nn.LayerNorm(12, eps=case.config["layer_norm_eps"])
    norm.load_state_dict({kind: student[f"input_layernorm.{kind}"] for kind in ("weight", "bias")})
    x = norm(case["in.u"])
    mixer = mixer_from_reference(
        "phi_mamba",
        case.config,
        {name.removeprefix("mixer."): value for name, value in student.items() if name.startswith("mixer.")},
    )
    layout = layout_of(2, 10, x.device)
    found = {
        "stage1": losses.matrix_distance(mixer.mixing_matrix(x), case["out.attention"]),
        "stage2": losses.hidden_distance(mixer(x, None, layout)[0], case["out.teacher_output"]),
    }
    parameters = {f"mixer.{name}": value for name, value in mixer.named_parameters()}
    parameters |= {f"input_layernorm.{name}": value for name, value in norm.named_parameters()}
    for stage, loss in found.items():
        near(loss, case[f"out.loss_{stage}"], 1e-5)
        wanted = case.named(f"grad.{stage}.")
        for parameter in parameters.values():
            parameter.grad = None
        loss.backward(retain_graph=True)
        for name, gradient in wanted.items():
            near(parameters[name].grad, gradient, 1e-4)


def test_supra() -> None:
    """Its layer; the loss is the next token's, and the code's README adds the square of softmax's denominator."""
    case = Case("supra", "gqa")
    mixer = mixer_from_reference("retention", case.config, case.named("param."))
    x = case["in.x"].clone().requires_grad_()
    y, _ = mixer(x, None, layout_of(x.shape[0], x.shape[1], x.device))
    near(y, case["out.y"], 1e-5)
    y.backward(case["upstream.y"])
    near(x.grad, case["grad.x"], 1e-4)
    near(mixer.feature_q.weight.grad, case["grad._totrain_embed.weight"], 1e-4)
    near(mixer.feature_k.bias.grad, case["grad._totrain_embed_kv.bias"], 1e-4)
    logits = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[1, 2, -100], [-100, 0, 6]])
    (gradient,) = torch.autograd.grad(losses.z_loss(logits, labels), logits)
    denominator = logits.logsumexp(-1, keepdim=True)
    wanted = 2 / 4 * denominator * logits.softmax(-1) * (labels != -100)[..., None]
    near(gradient, wanted, 1e-12)


def test_lizard() -> None:
    heads, wanted = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True), torch.randn(2, 3, 4, 5).double()
    loss = losses.squared_distance(heads, wanted)
    by_row = [torch.linalg.vector_norm(a - b) ** 2 for a, b in zip(heads.detach(), wanted, strict=True)]
    near(loss, torch.stack(by_row).mean(), 1e-12)
    near(torch.autograd.grad(loss, heads)[0], (heads - wanted) * 2 / 2, 1e-12)


def test_distributions() -> None:
    """Only labelled tokens count; cross-entropy and divergence differ by the teacher's entropy."""
    logits = torch.randn(2, 4, 9, dtype=torch.float64, requires_grad=True)
    wanted, labels = torch.randn(2, 4, 9, dtype=torch.float64), torch.randint(0, 9, (2, 4))
    labels[0, 1] = labels[1, 3] = -100
    p = wanted[labels != -100].softmax(-1)
    entropy = -(p * p.log()).sum(-1).mean()
    soft, apart = losses.soft_cross_entropy(logits, wanted, labels), losses.divergence(logits, wanted, labels)
    near(soft, entropy + apart, 1e-12)
    (gradient,) = torch.autograd.grad(apart, logits)
    assert not gradient[labels == -100].any()
    near(gradient[labels != -100], (logits[labels != -100].softmax(-1) - p) / 6, 1e-12)
    assert losses.divergence(wanted, wanted, labels, 3.0).abs() < 1e-12
    near(losses.divergence(logits, wanted, labels, 2.0), 4 * losses.divergence(logits / 2, wanted / 2, labels), 1e-12)
    near(losses.next_token(logits, labels), F.nll_loss(logits.log_softmax(-1).mT, labels), 1e-12)
    states = (torch.randn(2, 4, 3, dtype=torch.float64), torch.randn(2, 4, 3, dtype=torch.float64))
    assert losses.alignment(states, states, labels) == 0
    near(losses.alignment(tuple(x * 3 for x in states), states, labels), torch.tensor(4.0), 1e-12)
