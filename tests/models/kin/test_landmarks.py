"""SCOUT and Attamba against their authors' code: as their papers describe them, and what the code does instead."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from kin_cases import Golden, relative, whole_file
from torch import Tensor
from torch.nn import functional as F

from megalodon import KinConfig, KinForCausalLM, ops
from megalodon.convert import mixer_from_reference
from megalodon.models.kin.mixers.attamba import Attamba, ChunkStateSpace
from megalodon.models.kin.mixers.mamba import mamba_options
from megalodon.models.kin.mixers.scout import Scout
from megalodon.models.kin.mixers.sliding_attention import SlidingAttention
from megalodon.ops import Layout


def scout_model(vectors: Golden, variant: str) -> KinForCausalLM:
    """The golden language model, whose layers are brought over one by one."""
    given, extra = vectors.config["config"], vectors.config["mamba_extra"]
    over, local = "sliding_attention", {"window": given["sliding_window"]}
    if variant == "mamba":
        over, local = "mamba", mamba_options({**given, **extra})[1]
    config = KinConfig(
        vocab_size=given["vocab_size"],
        num_layers=given["num_hidden_layers"],
        model_dim=given["hidden_size"],
        num_heads=given["num_attention_heads"],
        ffn_hidden_dim=given["intermediate_size"],
        rope_base=given["rope_theta"],
        norm_eps=given["rms_norm_eps"],
        mixers="scout",
        mixer_parameters={
            "scout": {"segment": given["selection_window_size"], "over": over, "local_parameters": local}
        },
    )
    model, state_dict = KinForCausalLM(config).eval(), vectors.named(f"{variant}.param.")
    for i, block in enumerate(model.model.layers):
        prefix = f"model.layers.{i}."
        layer = {name.removeprefix(prefix): x for name, x in state_dict.items() if name.startswith(prefix)}
        block.mixer = mixer_from_reference("scout", {**given, **extra}, layer)
        block.feed_forward.load_state_dict(
            {name.removeprefix("sec_mlp."): x for name, x in layer.items() if name.startswith("sec_mlp.")}
        )
        block.feed_forward_norm.weight = torch.nn.Parameter(layer["post_attention_layernorm.weight"])
    model.model.embed_tokens.weight = torch.nn.Parameter(state_dict["model.embed_tokens.weight"])
    model.model.final_norm.weight = torch.nn.Parameter(state_dict["model.norm.weight"])
    model.lm_head.weight = torch.nn.Parameter(state_dict["lm_head.weight"])
    return model


@pytest.mark.parametrize("reading", ["as_described", "as_written"])
def test_golden_scout_over_sliding_attention(shared: Path, reading: str) -> None:
    """As described: the mixer. As written: its local attention without window and mask, the future included."""
    vectors = whole_file(shared, "scout")
    model, tokens = scout_model(vectors, "swa"), vectors.tensors["tokens"]
    expected = vectors.tensors[f"swa.{reading}.logits"]
    if reading == "as_written":
        assert relative(model(tokens).logits, expected) > 1e-1
        for block in model.model.layers:
            block.mixer.local.forward = partial(attend_to_all, block.mixer.local)
    assert relative(model(tokens).logits, expected) < 1e-5


def attend_to_all(local: SlidingAttention, x: Tensor, memory: None, layout: Layout) -> tuple[Tensor, Tensor | None]:
    """What the published multi-token path computes in place of sliding attention."""
    q, k, v = local.queries_keys_values(x, layout, rotated=True)
    every = torch.ones(1, 1, x.shape[1], x.shape[1], dtype=torch.bool)
    y = ops.sparse_attention(q, k, v, every, scale=local.head_dim**-0.5)
    return local.o_proj(y.flatten(-2)), memory


def scout_name(ours: str) -> str:
    """A parameter of ours under the authors' name."""
    if not ours.startswith("model.layers."):
        return {"model.final_norm.weight": "model.norm.weight"}.get(ours, ours)
    _, _, layer, part, *rest = ours.split(".")
    if part == "mixer":
        theirs = {own: name for name, own in Scout.INNER_NAMES.items() if "swa" not in name}
        return ".".join(["model.layers", layer, theirs[rest[0]], *rest[1:]])
    names = {"feed_forward": "sec_mlp", "feed_forward_norm": "post_attention_layernorm"}
    return ".".join(["model.layers", layer, names[part], *rest])


def test_golden_scout_over_mamba(shared: Path) -> None:
    vectors = whole_file(shared, "scout")
    model, tokens = scout_model(vectors, "mamba"), vectors.tensors["tokens"]
    out = model(tokens, labels=tokens)
    assert relative(out.logits, vectors.tensors["mamba.logits"]) < 1e-5
    assert relative(out.loss, vectors.tensors["mamba.loss"]) < 1e-5
    out.loss.backward()
    expected = vectors.named("mamba.grad.")
    found = {scout_name(name): parameter.grad for name, parameter in model.named_parameters()}
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        assert relative(found[name], gradient) < 1e-4, name


# --- Attamba --------------------------------------------------------------------------------------------------------


def attamba_model(vectors: Golden) -> KinForCausalLM:
    """The golden language model, whose layers are brought over one by one."""
    given, state_dict = vectors.config["config"], vectors.named("param.")
    config = KinConfig(
        vocab_size=given["vocab_size"],
        num_layers=given["n_layers"],
        model_dim=given["dim"],
        num_heads=given["n_heads"],
        ffn_hidden_dim=state_dict["layers.0.feed_forward.w1.weight"].shape[0],
        rope_base=given["rope_theta"],
        norm_eps=given["norm_eps"],
        mixers="attamba",
    )
    model = KinForCausalLM(config).eval()
    for i, block in enumerate(model.model.layers):
        prefix = f"layers.{i}."
        layer = {name.removeprefix(prefix): x for name, x in state_dict.items() if name.startswith(prefix)}
        block.mixer = mixer_from_reference("attamba", {**given, "layer": i}, layer)
        for ours, theirs in (("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3")):
            getattr(block.feed_forward, ours).weight = torch.nn.Parameter(layer[f"feed_forward.{theirs}.weight"])
        block.mixer_norm.weight = torch.nn.Parameter(layer["attention_norm.weight"])
        block.feed_forward_norm.weight = torch.nn.Parameter(layer["ffn_norm.weight"])
    model.model.embed_tokens.weight = torch.nn.Parameter(state_dict["tok_embeddings.weight"])
    model.model.final_norm.weight = torch.nn.Parameter(state_dict["norm.weight"])
    model.lm_head.weight = torch.nn.Parameter(state_dict["output.weight"])
    return model


def published_scan(ssm: ChunkStateSpace, u: Tensor, ids: Tensor, block: int) -> Tensor:
    """The chunk state-space model on a batch laid end to end, [1, T, D], by the documented rules of the kernels for ids
    [T]: inside a block of the kernel products are kept between equal ids; a block passes on what has the id of its last
    token, and tokens of that id in the next block receive it; the convolution sees equal ids only."""
    length = u.shape[1]
    z, mixed, raw = ssm.in_proj(u).split([ssm.inner, ssm.channels, ssm.heads], dim=-1)
    convolved = torch.zeros_like(mixed)
    for lag in range(ssm.taps):
        same = torch.zeros(length, dtype=torch.bool)
        same[lag:] = ids[lag:] == ids[: length - lag]
        shifted = F.pad(mixed, (0, 0, lag, 0))[:, :length]
        convolved = convolved + shifted * same[:, None] * ssm.conv_weight[:, -1 - lag]
    x, b, c = F.silu(convolved).split([ssm.inner, ssm.state_size, ssm.state_size], dim=-1)
    x = x.unflatten(-1, (ssm.heads, -1))
    dt = F.softplus(raw)
    logs = -dt * ssm.A_log.exp()
    state, outputs = torch.zeros(ssm.heads, x.shape[-1], ssm.state_size), []
    last_id = -1
    for first in range(0, length, block):
        span = slice(first, min(first + block, length))
        own, sums = ids[span], logs[0, span].cumsum(0)  # [l, H]
        weights = (sums[:, None] - sums[None]).permute(2, 0, 1)
        visible = (own[:, None] == own[None]) & torch.ones(len(own), len(own), dtype=torch.bool).tril()
        weights = weights.masked_fill(~visible, -torch.inf).exp() * (c[0, span] @ b[0, span].T)
        written = (dt[0, span, :, None] * x[0, span]).transpose(0, 1)  # [H, l, P]
        y = (weights @ written).transpose(0, 1)
        receives = (own == last_id)[:, None, None]
        y = y + receives * torch.einsum("ln,hpn,lh->lhp", c[0, span], state, sums.exp())
        leaving = (sums[-1] - sums).exp() * (own == own[-1])[:, None]
        state = torch.einsum("hlp,ln,lh->hpn", written, b[0, span], leaving) + sums[-1].exp()[:, None, None] * state * (
            own[-1] == last_id
        )
        last_id = int(own[-1])
        outputs.append(y + ssm.D[:, None] * x[0, span])
    y = torch.cat(outputs).flatten(1)[None]
    return ssm.out_proj(ssm.ssm_norm(y * F.silu(z)))


def published_attamba(model: KinForCausalLM, vectors: Golden, reading: str) -> Tensor:
    """Logits by a reading of the golden file, with the code's boundaries, the last one moved to the end."""
    given, tokens = vectors.config["config"], vectors.tensors["tokens"]
    batch, length = tokens.shape
    place = torch.arange(length)
    x = model.model.embed_tokens(tokens)
    for i, block in enumerate(model.model.layers):
        mixer: Attamba = block.mixer
        ends = [int(p) for p in np.nonzero(mixer.boundaries(np.arange(length)))[0]]
        ends[-1] = length - 1
        assert ends == vectors.tensors[f"{reading}.boundaries.{i}"].tolist()
        chunk = torch.bucketize(place, torch.tensor(ends))
        first = torch.tensor([0, *(end + 1 for end in ends)])[chunk]
        if reading == "as_written":
            ids = (place - first).repeat(batch)
        else:
            ids = torch.cat([chunk + row * length for row in range(batch)])
        n = block.mixer_norm(x)
        scans = (
            published_scan(ssm, n.reshape(1, -1, n.shape[-1]), ids, given["ssm_chunk_size"])
            for ssm in (mixer.k_ssm, mixer.v_ssm)
        )
        k, v = (n + scan.view_as(n) for scan in scans)
        q, k, v = (y.unflatten(-1, (mixer.num_heads, -1)) for y in (mixer.wq(n), k, v))
        turns = ops.rotations(place, mixer.head_dim, mixer.rope_base)
        q, k = ops.rotate(q, turns), ops.rotate(k, turns)
        boundary = torch.zeros(length, dtype=torch.bool)
        boundary[ends] = True
        age = place[:, None] - place
        mask = (age >= 0) & (boundary | (age <= mixer.leading))
        y = ops.sparse_attention(q, k, v, mask[None, None], scale=mixer.head_dim**-0.5)
        x = x + mixer.wo(y.flatten(-2))
        x = x + block.feed_forward(block.feed_forward_norm(x))
    return model.lm_head(model.model.final_norm(x, None, None)[0])


@pytest.mark.parametrize("reading", ["as_described", "as_written"])
def test_golden_attamba_readings(shared: Path, reading: str) -> None:
    vectors = whole_file(shared, "attamba")
    logits = published_attamba(attamba_model(vectors), vectors, reading)
    assert relative(logits, vectors.tensors[f"{reading}.logits"]) < 1e-5


def test_attamba_equals_the_described_reading_where_the_moved_boundary_plays_no_part(shared: Path) -> None:
    """The code moves the last boundary to the end of what it is given: earlier outputs do not depend on it."""
    vectors = whole_file(shared, "attamba")
    model, tokens = attamba_model(vectors), vectors.tensors["tokens"]
    expected = vectors.tensors["as_described.logits"]
    untouched = 22  # layer 1's last boundary is 21, moved to 23: tokens 22 and 23 join the chunk before
    logits = model(tokens).logits
    assert relative(logits[:, :untouched], expected[:, :untouched]) < 1e-5
    assert relative(logits[:, untouched:], expected[:, untouched:]) > 1e-3
    shorter = model(tokens[:, :untouched]).logits
    assert relative(shorter, logits[:, :untouched]) < 1e-6
    written = vectors.tensors["as_written.logits"]
    assert relative(logits[:, :untouched], written[:, :untouched]) > 1e-2


def test_attamba_gradients_as_described(shared: Path) -> None:
    """On the reading with the moved boundary, whose loss the golden holds, through the mixer's own modules."""
    vectors = whole_file(shared, "attamba")
    model = attamba_model(vectors)
    logits = published_attamba(model, vectors, "as_described")
    loss = F.cross_entropy(logits.flatten(0, 1), vectors.tensors["targets"].flatten())
    assert relative(loss, vectors.tensors["as_described.loss"]) < 1e-5
    loss.backward()
    for i, block in enumerate(model.model.layers):
        for name, parameter in block.mixer.named_parameters():
            theirs = f"attentive_ssm.{name}" if name.startswith("w") else name
            expected = vectors.tensors[f"as_described.grad.layers.{i}.{theirs}"]
            assert relative(parameter.grad, expected) < 1e-4, name
