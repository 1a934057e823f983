"""Llama's attention over two chunks with a working memory: against its definition, and as attention at the start."""

from __future__ import annotations

import math

import pytest
import torch
from kin_cases import relative
from torch import Tensor

from megalodon import KinConfig
from megalodon.models.kin.mixers.attention import Attention
from megalodon.models.kin.mixers.window_memory import WindowMemory
from megalodon.ops import layout_of

TURNS = 1e-6
"""How far off heads may be: the library turns them in float32."""

C, F, D, HEADS, GROUPS, SIZE = 4, 6, 24, 4, 2, 8


def mixer_of(kind: str = "window_memory", moved: bool = True) -> WindowMemory:
    """In float64, every parameter away from where it begins."""
    parameters = {"window_memory": {"chunk_size": C, "feature_dim": F}} if kind == "window_memory" else None
    sizes = {"model_dim": D, "num_heads": HEADS, "num_key_value_heads": GROUPS, "head_dim": SIZE, "vocab_size": 9}
    config = KinConfig(mixers=kind, mixer_parameters=parameters, num_layers=1, **sizes)
    torch.manual_seed(3)
    mixer = {"window_memory": WindowMemory, "attention": Attention}[kind](config, 0, config.mixer_of(0)[1]).double()
    with torch.no_grad():
        if kind == "window_memory":
            mixer.initialise(0.02)
        for parameter in mixer.parameters() if moved else ():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return mixer


def turned(x: Tensor, place: int) -> Tensor:
    """A head x [d] turned by its place, on halves."""
    half = len(x) // 2
    angles = place * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    first, second = x[:half], x[half:]
    return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()])


def defined(mixer: WindowMemory, x: Tensor) -> Tensor:
    """The heads' outputs of a row x [L, D], token by token and head by head: [L, H, d]."""
    q = mixer.q_proj(x).view(-1, HEADS, SIZE)
    k, v = (project(x).view(-1, GROUPS, SIZE) for project in (mixer.k_proj, mixer.v_proj))
    out = torch.zeros(len(x), HEADS, SIZE, dtype=x.dtype)
    for h in range(HEADS):
        g = h // (HEADS // GROUPS)
        memory, mass = torch.zeros(F, SIZE, dtype=x.dtype), torch.full((F,), -math.inf, dtype=x.dtype)
        for t in range(len(x)):
            chunk = t // C
            if chunk >= 2 and t % C == 0:  # the chunk two before has left
                left = slice((chunk - 2) * C, (chunk - 1) * C)
                offered = k[left, g] @ mixer.memory_maps[HEADS + g]
                own = offered.logsumexp(0)
                after = torch.logaddexp(mass, own)
                change = offered.softmax(0).T @ (v[left, g] - offered.softmax(1) @ memory) - memory
                memory, mass = memory + (own - after).exp()[:, None] * change, after
            seen = range(max(chunk - 1, 0) * C, t + 1)
            query = turned(q[t, h], t)
            scores = torch.stack([query @ turned(k[j, g], j) for j in seen]) / math.sqrt(SIZE)
            attention = scores.softmax(0) @ v[seen.start : seen.stop, g]
            if chunk < 2:
                out[t, h] = attention
                continue
            given = (q[t, h] @ mixer.memory_maps[h]).softmax(0) @ memory
            gate = torch.tanh(mixer.gate_proj(x[t])[h])
            out[t, h] = (1 - gate) * attention + gate * given
    return out


@torch.no_grad()
def test_it_is_what_its_definition_says() -> None:
    mixer, x = mixer_of(), torch.randn(2, 23, D, dtype=torch.float64)
    layout = layout_of(2, 23, x.device)
    found, memory = mixer.head_outputs(x, None, layout)
    wanted = torch.stack([defined(mixer, row) for row in x])
    assert relative(found, wanted) < TURNS
    more = torch.randn(2, 9, D, dtype=torch.float64)  # from a state in the middle of a chunk
    later, _ = mixer.head_outputs(more, memory, layout_of(2, 9, x.device, positions=[23, 23]))
    wanted = torch.stack([defined(mixer, row) for row in torch.cat([x, more], 1)])
    assert relative(later, wanted[:, 23:]) < TURNS


@torch.no_grad()
def test_documents_of_a_row_are_what_they_are_alone() -> None:
    mixer, x = mixer_of(), torch.randn(1, 30, D, dtype=torch.float64)
    segments = torch.tensor([[0] * 13 + [1] * 17])
    found, _ = mixer.head_outputs(x, None, layout_of(1, 30, x.device, segment_ids=segments))
    wanted = torch.cat([defined(mixer, x[0, :13]), defined(mixer, x[0, 13:])])
    assert relative(found[0], wanted) < TURNS


@torch.no_grad()
def test_it_begins_as_attention_over_a_window() -> None:
    """With attention's weights it is attention exactly in a document's first two chunks, and at no time after them."""
    teacher, mixer = mixer_of("attention"), mixer_of(moved=False)
    mixer.load_state_dict(teacher.state_dict(), strict=False)
    x = torch.randn(1, 20, D, dtype=torch.float64)
    layout = layout_of(1, 20, x.device)
    found, wanted = mixer.head_outputs(x, None, layout)[0], teacher.head_outputs(x, None, layout)[0]
    assert relative(found[:, : 2 * C], wanted[:, : 2 * C]) < 1e-12
    windowed = torch.stack([defined(mixer, row) for row in x])  # whose gate is zero
    assert relative(found, windowed) < TURNS and relative(found[:, 2 * C :], wanted[:, 2 * C :]) > 1e-2
    opened = mixer_of()
    opened.load_state_dict(teacher.state_dict(), strict=False)
    found = opened.head_outputs(x, None, layout)[0]
    assert relative(found[:, : 2 * C], wanted[:, : 2 * C]) < 1e-12  # whatever the gate has learned


def test_gradients_reach_maps_and_gate() -> None:
    mixer, x = mixer_of(), torch.randn(1, 13, D, dtype=torch.float64)
    layout = layout_of(1, 13, x.device)

    def output(maps: Tensor, weight: Tensor) -> Tensor:
        given = {"memory_maps": maps, "gate_proj.weight": weight}
        return torch.func.functional_call(mixer, given, (x, None, layout))[0]

    maps, weight = mixer.memory_maps.detach().requires_grad_(), mixer.gate_proj.weight.detach().requires_grad_()
    assert torch.autograd.gradcheck(output, (maps, weight), atol=1e-7, fast_mode=True)


def test_bad_parameters_are_named() -> None:
    for name in ("chunk_size", "feature_dim"):
        with pytest.raises(ValueError, match=f"window_memory: {name}=0: it must be at least 1"):
            KinConfig(mixers="window_memory", mixer_parameters={"window_memory": {name: 0}})
