"""Mamba, Mamba-2 and Phi-Mamba against what their authors' code computed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from kin_cases import check_mixer, golden, relative, whole_file

from megalodon.convert import mixer_from_reference
from megalodon.ops import layout_of


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_golden(shared: Path, name: str) -> None:
    vectors = whole_file(shared, name)
    mixer = mixer_from_reference(name, vectors.config["config"], vectors.named("param."))
    check_mixer(mixer, vectors)
    u = vectors.tensors["u"]
    wide = mixer.double()
    y, memory = wide(u.double(), None, layout_of(u.shape[0], u.shape[1], u.device))
    assert relative(y, vectors.tensors["y64"]) < 1e-12
    assert relative(memory.state, vectors.tensors["state.ssm"]) < 1e-6
    assert relative(memory.recent.mT, vectors.tensors["state.conv"][..., 1:]) < 1e-6  # theirs keeps one input more


@pytest.mark.parametrize("case", ["mixer", "mixer_groups"])
def test_golden_phi_mamba(shared: Path, case: str) -> None:
    vectors = golden(shared, "mohawk", case)
    mixer = mixer_from_reference("phi_mamba", vectors.config, vectors.named("param.")).double()
    x = vectors.tensors["in.x"].double().requires_grad_()
    y, _ = mixer(x, None, layout_of(2, 10, x.device))
    assert relative(y, vectors.tensors["out.y"]) < 1e-12
    total = (y * vectors.tensors["upstream.y"]).sum()
    if "out.T" in vectors.tensors:
        matrix = mixer.mixing_matrix(x)
        assert relative(matrix, vectors.tensors["out.T"]) < 1e-12
        total = total + (matrix * vectors.tensors["upstream.T"]).sum()
    total.backward()
    assert relative(x.grad, vectors.tensors["grad.x"]) < 1e-11
    for name, parameter in mixer.named_parameters():
        assert relative(parameter.grad, vectors.tensors[f"grad.{name}"]) < 1e-11, name

    narrow = mixer.float()
    prefill, steps = vectors.tensors["in.x"][:, :7], vectors.tensors["in.x"][:, 7:]
    decoded = [narrow(prefill, None, layout_of(2, 7, x.device))]
    for t in range(3):
        layout = layout_of(2, 1, x.device, positions=[7 + t, 7 + t])
        decoded.append(narrow(steps[:, t : t + 1], decoded[-1][1], layout))
    assert relative(torch.cat([y for y, _ in decoded], 1), vectors.tensors["out.y_decode"]) < 1e-5
    assert relative(decoded[-1][1].state, vectors.tensors["out.state.ssm"]) < 1e-5
    assert relative(decoded[-1][1].recent.mT, vectors.tensors["out.state.conv"][..., 1:]) < 1e-5


def test_golden_mohawk_stages(shared: Path) -> None:
    vectors = golden(shared, "mohawk", "stages")
    student = vectors.named("param.student.")
    norm = torch.nn.LayerNorm(12, eps=vectors.config["layer_norm_eps"])
    norm.load_state_dict({kind: student[f"input_layernorm.{kind}"] for kind in ("weight", "bias")})
    parameters = {name.removeprefix("mixer."): x for name, x in student.items() if name.startswith("mixer.")}
    mixer = mixer_from_reference("phi_mamba", vectors.config, parameters)
    u = norm(vectors.tensors["in.u"])
    matrix = mixer.mixing_matrix(u)
    assert relative(matrix, vectors.tensors["out.T"]) < 1e-5
    y, _ = mixer(u, None, layout_of(2, 10, u.device))
    assert relative(y, vectors.tensors["out.student_output"]) < 1e-5
    losses = {
        "stage1": torch.linalg.matrix_norm(matrix - vectors.tensors["out.attention"]).mean(),
        "stage2": torch.linalg.vector_norm(y - vectors.tensors["out.teacher_output"], dim=-1).mean(),
    }
    for stage, loss in losses.items():
        assert relative(loss, vectors.tensors[f"out.loss_{stage}"]) < 1e-5
        mixer.zero_grad()
        loss.backward(retain_graph=True)
        for name, expected in vectors.named(f"grad.{stage}.mixer.").items():
            assert relative(mixer.get_parameter(name).grad, expected) < 1e-4, name


def test_options_that_are_not_reproduced_are_refused() -> None:
    with pytest.raises(ValueError, match="dt_softplus"):
        mixer_from_reference("mamba", {"d_model": 8, "dt_softplus": False}, {})
    with pytest.raises(ValueError, match="hidden_act='gelu'"):
        mixer_from_reference("mamba2", {"d_model": 8, "hidden_act": "gelu"}, {})
    with pytest.raises(ValueError, match="lack 'd_model'"):
        mixer_from_reference("mamba", {}, {})
