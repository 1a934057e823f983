"""Mixers of the linear family against what their authors' code computed: outputs to 1e-5, gradients to 1e-4."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from kin_cases import Golden, golden, relative
from torch import Tensor
from torch.nn import functional as F

from megalodon.convert import mixer_from_reference
from megalodon.models.kin.mixers import Mixer
from megalodon.models.kin.mixers.feature_maps import HeadwiseMap
from megalodon.models.kin.mixers.retention import slopes
from megalodon.ops import LinearState, linear_attention
from megalodon.ops.layout import Layout, layout_of
from megalodon.ops.linear_attention import FEATURE_MAPS

LAYERS = [
    ("based", "layer", "based"),
    ("based", "slide", "sliding_attention"),
    ("zoology_mixers", "sliding", "sliding_attention"),
    ("zoology_mixers", "attention", "attention"),
    ("gla", "layer", "gla"),
    ("gla", "layer_gqa", "gla"),
    ("gla", "layer_nogate", "gla"),
    ("gla", "layer_unfused", "gla"),
    ("hedgehog", "layer", "hedgehog"),
    ("lolcats", "sw", "lolcats"),
    ("lolcats", "sw_affine", "lolcats"),
    ("supra", "mha", "retention"),
    ("supra", "gqa", "retention"),
    ("supra", "gqa_retnet", "retention"),
    ("supra", "nodecay_qknorm", "retention"),
    ("supra", "decay_start", "retention"),
]
"""(file, case, mixer)"""


def mixer_of(case: Golden, name: str, dtype: torch.dtype = torch.float64) -> Mixer:
    parameters = {key: value.to(dtype) for key, value in case.named("param.").items()}
    return mixer_from_reference(name, case.config, parameters)


def run(mixer: Mixer, x: Tensor, pieces: list[int] | None = None) -> tuple[Tensor, Any]:
    """The mixer over x [B, L, D], whole or in pieces."""
    memory, outs, position = None, [], 0
    for piece in x.split(pieces or [x.shape[1]], 1):
        layout = layout_of(len(x), piece.shape[1], x.device, positions=[position] * len(x))
        out, memory = mixer(piece, memory, layout)
        outs.append(out)
        position += piece.shape[1]
    return torch.cat(outs, 1), memory


def expected_of(case: Golden) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Input, output, the gradient sent in and the gradient of the input, under either naming."""
    if "u" in case.tensors:
        return tuple(case.tensors[name] for name in ("u", "y", "dy", "du"))  # type: ignore[return-value]
    return tuple(case.tensors[name] for name in ("in.x", "out.y", "upstream.y", "grad.x"))  # type: ignore[return-value]


@pytest.mark.parametrize(("file", "name", "kind"), LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_layers(shared: Path, file: str, name: str, kind: str, dtype: torch.dtype) -> None:
    case = golden(shared, file, name)
    x, y, dy, dx = expected_of(case)
    mixer, x = mixer_of(case, kind, dtype), x.to(dtype).requires_grad_()
    out, _ = run(mixer, x)
    assert relative(out, y) < 1e-5
    out.backward(dy.to(dtype))
    assert relative(x.grad, dx) < 1e-4
    theirs = case.named("grad.")
    theirs = {key: value for key, value in theirs.items() if key not in ("x", *("in.",))}
    found = mixer_gradients(kind, case, mixer)
    checked = 0
    for key, gradient in found.items():
        assert relative(gradient, theirs[key]) < 1e-4, key
        checked += 1
    assert checked >= len(case.named("param.")) - 1


def mixer_gradients(kind: str, case: Golden, mixer: Mixer) -> dict[str, Tensor]:
    """Our gradients under the authors' names: found by sending numbered parameters through the conversion."""
    theirs, first = {}, 1
    for key, value in case.named("param.").items():
        theirs[key] = torch.arange(first, first + value.numel(), dtype=torch.float64).view(value.shape)
        first += value.numel()
    numbered = mixer_from_reference(kind, case.config, theirs).state_dict()
    gradients = torch.zeros(first, dtype=torch.float64)
    for key, parameter in mixer.named_parameters():
        assert parameter.grad is not None, key
        gradients[numbered[key].long().flatten()] += parameter.grad.double().flatten()
    return {key: gradients[value.long()] for key, value in theirs.items()}


@pytest.mark.parametrize(
    ("file", "name", "kind", "decoded"),
    [
        ("based", "decode", "based", "out.y"),
        ("hedgehog", "layer", "hedgehog", "out.y_decode"),
        ("lolcats", "sw", "lolcats", "out.y_decode"),
        ("lolcats", "tk", "lolcats", "out.y_decode"),
        ("supra", "mha", "retention", "out.y_recurrent"),
        ("supra", "gqa", "retention", "out.y_recurrent"),
    ],
)
@torch.no_grad()
def test_decoding_equals_one_pass(shared: Path, file: str, name: str, kind: str, decoded: str) -> None:
    case = golden(shared, file, name)
    mixer, x = mixer_of(case, kind), case.tensors["in.x"].double()
    whole, _ = run(mixer, x)
    steps, _ = run(mixer, x, [x.shape[1] - 4, 1, 1, 1, 1])
    assert relative(steps, whole) < 1e-12
    y = case.tensors[decoded]
    if name == "tk":  # prefilled with other windows than it decodes with: only what was decoded is this operator
        steps, y = steps[:, -4:], y[:, -4:]
    assert relative(steps, y) < 1e-5


@torch.no_grad()
def test_states_are_the_authors(shared: Path) -> None:
    case = golden(shared, "based", "decode")
    x = case.tensors["in.x"].double()
    for length, end in ((case.config["prefill"], "_prefill"), (x.shape[1], "")):
        _, memory = run(mixer_of(case, "based"), x[:, :length])
        assert memory.sums.shape[2] == 1 + 4 + 16
        assert relative(memory.sums.mT, case.tensors[f"out.kv_state{end}"]) < 1e-5
        assert relative(memory.weights, case.tensors[f"out.k_state{end}"]) < 1e-5
    case = golden(shared, "hedgehog", "layer")
    _, memory = run(mixer_of(case, "hedgehog"), case.tensors["in.x"].double())
    assert relative(memory.sums, case.tensors["out.state.kv"]) < 1e-5
    assert relative(memory.weights, case.tensors["out.state.k"]) < 1e-5
    case = golden(shared, "lolcats", "sw")
    _, memory = run(mixer_of(case, "lolcats"), case.tensors["in.x"].double())
    assert relative(memory.sums, case.tensors["out.state.decode_kv"]) < 1e-5
    assert relative(memory.weights, case.tensors["out.state.decode_k"]) < 1e-5
    for ours, theirs in ((memory.keys, "k_cache"), (memory.values, "v_cache")):  # ours: once for each key head
        assert relative(ours.repeat_interleave(2, 2).transpose(1, 2), case.tensors[f"out.state.{theirs}"]) < 1e-5
    case = golden(shared, "supra", "mha")  # theirs is already decayed for the next token
    _, memory = run(mixer_of(case, "retention"), case.tensors["in.x"].double())
    decayed = memory.sums * torch.exp(-case.tensors["buffer.slopes"].double())[:, None, None]
    assert relative(decayed, case.tensors["out.state"]) < 1e-5


@pytest.mark.parametrize("kind", ["vector", "scalar"])
@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_gla_operators(shared: Path, kind: str, backend: str) -> None:
    case = golden(shared, "gla", f"op_{kind}")
    given = {name: case.tensors[f"in.{name}"].clone().requires_grad_() for name in ("q", "k", "v", "g", "state")}
    out, state = linear_attention(
        given["q"] * given["q"].shape[-1] ** -0.5,
        given["k"],
        given["v"],
        log_decay=given["g"],
        initial_state=LinearState(given["state"]),
        backend=backend,
    )
    assert relative(out, case.tensors["out.o"]) < 1e-5
    assert relative(state.sums, case.tensors["out.state"]) < 1e-5
    torch.autograd.backward((out, state.sums), (case.tensors["upstream.o"], case.tensors["upstream.state"]))
    for name, value in given.items():
        assert relative(value.grad, case.tensors[f"grad.{name}"]) < 1e-4, name


@pytest.mark.parametrize(
    ("file", "theirs", "ours"),
    [
        ("based", "taylor_full", "taylor"),
        ("based", "taylor_packed", "taylor_packed"),
        ("based", "pos_elu", "elu"),
        ("based", "relu", "relu"),
        ("based", "square", "square"),
        ("based", "softmax_both", "softmax_both"),
        ("hedgehog", "softmax_dim", "softmax_both"),
        ("hedgehog", "exp_dim", "exp_both"),
        ("hedgehog", "pos_elu", "elu"),
        ("hedgehog", "softmax_dim_half", "softmax"),
        ("hedgehog", "exp_dim_half", "exp"),
        ("hedgehog", "relu_bias", "relu"),
        ("hedgehog", "softmax_skip", "softmax_both"),
    ],
)
def test_feature_maps(shared: Path, file: str, theirs: str, ours: str) -> None:
    case = golden(shared, file, "fmap")
    x = case.tensors["in.x"].double().requires_grad_()
    if file == "hedgehog":
        weight = case.tensors[f"param.{theirs}.mlp.layer"].double()
        feature_map = HeadwiseMap(*weight.shape, ours, skip=theirs == "softmax_skip").double()
        parameters = {"weight": weight}
        if ours == "relu":
            parameters["bias"] = case.tensors[f"param.{theirs}.mlp.bias"].double().flatten()
        feature_map.load_state_dict(parameters)
        out = feature_map(x.transpose(1, 2)).transpose(1, 2)
    else:
        out = FEATURE_MAPS[ours](x)
    expected = case.tensors[f"out.{theirs}"]
    if theirs == "taylor_packed":  # in another order
        assert relative(out.sort(-1).values, expected.sort(-1).values) < 1e-5
        return
    assert relative(out, expected) < 1e-5
    out.backward(case.tensors[f"upstream.{theirs}"].double())
    name = f"grad.{theirs}.x"
    assert relative(x.grad, case.tensors[name]) < 1e-4


def test_slopes(shared: Path) -> None:
    case = golden(shared, "supra", "slopes")
    for heads in (1, 2, 4, 8, 16, 32):
        for decay, name in (("alibi", "default"), ("retnet", "retnet")):
            assert relative(torch.tensor(slopes(heads, decay)), case.tensors[f"out.{name}.{heads}"]) < 1e-6
    assert len(slopes(6, "alibi")) == 6  # theirs raises for heads that are no power of two


@torch.no_grad()
def test_lolcats_weights_are_the_authors(shared: Path) -> None:
    """Row by row: reading the identity as values gives the matrix of attention."""
    case = golden(shared, "lolcats", "sw")
    mixer, x = mixer_of(case, "lolcats"), case.tensors["in.x"].double()
    length = x.shape[1]
    layout = layout_of(1, length, x.device)
    q, k, _ = mixer.queries_keys_values(x, layout, rotated=True)
    values = torch.eye(length, dtype=torch.float64)[None, :, None].expand(1, length, k.shape[2], length)
    rows, _ = mixer.mix(q, k, values, None, layout)
    assert relative(rows.transpose(1, 2), case.tensors["out.attn"]) < 1e-5


@torch.no_grad()
def test_lolcats_published_windows(shared: Path) -> None:
    """What the code computes under "tk", where it is not this operator: blocks, counted from the end."""
    for name in ("tk", "tk_ragged", "tk_short", "pieces"):
        case = golden(shared, "lolcats", name)
        mixer, x = mixer_of(case, "lolcats"), case.tensors["in.x"].double()
        size, length = case.config["window_size"], x.shape[1]
        layout = layout_of(1, length, x.device)
        q, k, v = mixer.queries_keys_values(x, layout, rotated=True)
        key, value = (y.repeat_interleave(2, 2)[0].transpose(0, 1) for y in (k, v))
        scores = torch.einsum("hid,hjd->hij", q[0].transpose(0, 1), key) * mixer.head_dim**-0.5
        lower = torch.ones(length, length, dtype=torch.bool).tril()
        block = (torch.arange(length) - length % size) // size  # blocks stand against the end
        near = lower & (block[:, None] - block <= 1)
        far = lower & ~near
        if name == "tk_short":
            far = lower
        if name == "pieces":
            piece = (torch.arange(length) >= case.config["pieces"][0]).long()
            inside = piece[:, None] == piece
            lag = torch.arange(length)[:, None] - torch.arange(length)
            near = lower & (lag < size) & inside
            far = lower & ~near
        weight = torch.sigmoid(mixer.window_logit)[:, None, None]
        masked = scores.masked_fill(~near, -torch.inf)
        soft = weight * (masked - masked.amax(-1, keepdim=True)).exp()
        phi = [f(y)[0].transpose(0, 1) for f, y in ((mixer.feature_map_q, q), (mixer.feature_map_k, k))]
        both = soft + torch.einsum("hif,hjf->hij", *phi) * far
        published = (both / both.sum(-1, keepdim=True)) @ value
        published = mixer.o_proj(published.transpose(0, 1).flatten(1))[None]
        assert relative(published, case.tensors["out.y"]) < 1e-5, name
        ours, _ = run(mixer, x)
        assert relative(ours, published) > 0.01, name


def test_hedgehog_rows_are_the_authors(shared: Path) -> None:
    """The attention matrices that the distillation compares, of teacher and student."""
    case = golden(shared, "hedgehog", "transfer")
    x = case.tensors["in.x"].double()
    for layer in ("0", "1"):
        parameters = {key: value.double() for key, value in case.named(f"param.{layer}.").items()}
        out_weight = parameters["o_proj.weight"]
        mixer = mixer_from_reference("hedgehog", {**case.config, "eps": 1e-12}, parameters)
        layout = Layout(len(x), x.shape[1])
        q, k, v = mixer.queries_keys_values(x, layout, rotated=True)
        rows = torch.eye(x.shape[1], dtype=torch.float64)[None, :, None].expand(len(x), -1, k.shape[2], -1)
        student, _ = linear_attention(
            q, k, rows, feature_map=(mixer.feature_map_q, mixer.feature_map_k), normalise=True, eps=mixer.eps
        )
        assert relative(student.transpose(1, 2), case.tensors[f"out.a_pred.{layer}"]) < 1e-5
        keys, values = (y.repeat_interleave(2, 2).transpose(1, 2) for y in (k, v))
        teacher = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, is_causal=True)
        assert relative(teacher, case.tensors[f"out.y_true.{layer}"]) < 1e-5
        x = x + teacher.transpose(1, 2).flatten(-2) @ out_weight.T
