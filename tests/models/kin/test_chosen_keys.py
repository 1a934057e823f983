"""HiP and HAX against their authors' code: the search and the masks as published, and what the mixers do instead."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from kin_cases import Golden, relative, tokens, whole_file
from torch import Tensor
from torch.nn import functional as F

from megalodon import KinConfig, KinForCausalLM, ops
from megalodon.convert import mixer_from_reference
from megalodon.models.kin.mixers.hax import SELECTIONS, Hax, highest, latest
from megalodon.models.kin.mixers.hip import tree_search
from megalodon.ops import layout_of

# --- HiP ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["a", "b"])
def test_golden_hip(shared: Path, case: str) -> None:
    """The published search, by the odd queries of every block, and the attention to what it finds."""
    vectors = whole_file(shared, "hip")
    config = vectors.config["config"][case]
    q, k, v = (vectors.tensors[f"{case}.{name}"] for name in "qkv")
    queries, keys, size, block = config["T"], config["S"], config["bk"], config["bq"]
    blocks, count = queries // block, config["mask_k"] // config["bk"]
    odd = q.unflatten(1, (blocks, block))[:, :, 1::2]
    ends = torch.arange(1, blocks + 1) * block + keys - queries
    visible = ((ends - config["win"]).clamp(min=0) // size).expand(len(q), -1)

    def score(nodes: Tensor) -> Tensor:
        place = (nodes[..., None] * size + torch.arange(size)).clamp(max=keys - 1)
        found = k[torch.arange(len(k))[:, None, None, None], place]  # [B, blocks, m, size, d]
        return torch.einsum("bnmsd,bnqd->bnmsq", found, odd).amax((-1, -2))

    chosen = tree_search(score, visible, count)
    counts = (chosen >= 0).sum(-1)
    assert torch.equal(counts, vectors.tensors[f"{case}.counts"].long())
    expected = vectors.tensors[f"{case}.indices"].long()
    assert torch.equal(chosen * size * (chosen >= 0), expected * (torch.arange(count) < counts[..., None]))

    listed = torch.zeros(len(q), blocks, keys + 1, dtype=torch.bool)
    place = torch.where(chosen[..., None] >= 0, chosen[..., None] * size + torch.arange(size), keys).flatten(2)
    mask = listed.scatter(2, place, True)[..., :keys]
    if config["win"]:
        sinks = -(-32 // size) * size
        number = torch.arange(keys)
        mask = mask | (number < sinks) | (number >= ends[:, None] - config["win"])
    causal = torch.arange(keys) <= torch.arange(queries)[:, None] + keys - queries
    mask = mask.repeat_interleave(block, dim=1) & causal
    assert torch.equal(mask, vectors.tensors[f"{case}.mask"])
    y = ops.sparse_attention(q[:, :, None], k[:, :, None], v[:, :, None], mask[:, None])
    assert relative(y[:, :, 0], vectors.tensors[f"{case}.y"]) < 1e-6


def hip_model(**parameters: int) -> KinForCausalLM:
    shape = {"num_layers": 2, "model_dim": 32, "num_heads": 4, "num_key_value_heads": 2, "vocab_size": 97}
    torch.manual_seed(3)
    return KinForCausalLM(KinConfig(mixers="hip", mixer_parameters={"hip": parameters}, **shape)).eval()


@torch.no_grad()
def test_hip_is_attention_where_everything_is_found() -> None:
    """Training-free: the parameters are attention's, and so are the outputs while a search finds all keys."""
    model = hip_model(mask_size=64, query_block=4, window=8)
    attention = KinForCausalLM(KinConfig(**{**model.config.to_dict(), "mixers": "attention", "mixer_parameters": None}))
    attention.load_state_dict(model.state_dict())
    x = tokens(2, 70)
    assert relative(model(x).logits, attention.eval()(x).logits) < 1e-5
    narrow = hip_model(mask_size=4, query_block=4, window=8, sinks=0)
    narrow.load_state_dict(model.state_dict())
    assert relative(narrow(x).logits[:, :12], attention(x).logits[:, :12]) < 1e-5
    assert relative(narrow(x).logits[:, 40:], attention(x).logits[:, 40:]) > 1e-4


@torch.no_grad()
def test_hip_reads_ragged_rows_by_lists_of_their_own() -> None:
    model = hip_model(mask_size=4, query_block=4, window=3, sinks=2)
    for rows in (1, 2):
        x, ids = tokens(rows, 41), (torch.arange(41) >= 17).long().expand(rows, -1)
        packed = model(x, segment_ids=ids).logits
        assert relative(packed[:, :17], model(x[:, :17]).logits) < 1e-5
        assert relative(packed[:, 17:], model(x[:, 17:]).logits) < 1e-5


# --- HAX ------------------------------------------------------------------------------------------------------------

VARIANTS = ["hax", "key_selection", "lsh", "a_shape", "window_dilated"]


def hax_mixer(vectors: Golden, variant: str) -> Hax:
    given = {**vectors.config["config"], "sparse_arch": vectors.config["variants"][variant]}
    parameters = vectors.named(f"{variant}.param.")
    if f"{variant}.hash" in vectors.tensors:
        parameters["hash"] = vectors.tensors[f"{variant}.hash"]
    return mixer_from_reference("hax", given, parameters)


def published_parts(mixer: Hax, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """(k, q, scores of keys), with statistics over all time as in the authors' code."""
    k, q = mixer.xx_proj(x).chunk(2, dim=-1)
    k = k * mixer.state_size**-0.5
    score = mixer.score(k.detach(), F.normalize(q.detach().cumsum(1), dim=1)) if mixer.scores else None
    return k, q, score


def published_mask(mixer: Hax, k: Tensor, q: Tensor, score: Tensor | None) -> Tensor:
    """bool [B, L, L]: which keys the authors' code lets each query see."""
    length = q.shape[1]
    age = torch.arange(length)[:, None] - torch.arange(length)
    causal = (age >= 0).expand(len(q), -1, -1)
    stride = mixer.given.dilated_length // mixer.share
    seen = torch.zeros_like(causal)
    for name in mixer.given.selection:
        if name == "window":
            seen = seen | (age < mixer.share)
        elif name == "sink":
            seen = seen | (torch.arange(length) < mixer.share)
        elif name == "dilated":
            seen = seen | (torch.arange(length) % stride == stride - 1)
        elif name == "key_selection":
            seen = seen | highest(score, causal, mixer.share)
        else:
            centred = (F.normalize(value - value.mean(1, keepdim=True), dim=1) for value in (q, k))
            own, theirs = (mixer.bucket(value) for value in centred)
            seen = seen | latest(causal & (own[:, :, None] == theirs[:, None]), mixer.share)
    return seen & causal


@pytest.mark.parametrize("variant", VARIANTS)
def test_golden_hax(shared: Path, variant: str) -> None:
    """As published: the masks exactly, outputs and gradients with even averages where a query finds no key."""
    vectors = whole_file(shared, "hax")
    mixer = hax_mixer(vectors, variant)
    u = vectors.tensors["u"].clone().requires_grad_()
    layout = layout_of(*u.shape[:2], u.device)
    x, z, _ = mixer.opened(u, None, layout)
    scanned, _ = mixer.scanned(x, None, layout)
    k, q, score = published_parts(mixer, x)
    mask = published_mask(mixer, k, q, score)
    assert torch.equal(~mask.any(-1), vectors.tensors[f"{variant}.rows_without_key"])
    given = vectors.tensors[f"{variant}.mask"]
    with_key = mask.any(-1)
    assert torch.equal(mask[with_key], given[with_key])
    # added, not filled in: where all keys are masked, their scores still get gradients
    attended = (q @ k.mT + ~mask * torch.finfo(torch.float32).min).softmax(-1) @ x
    y = mixer.out_proj((scanned + mixer.E * attended) * F.silu(z))
    assert relative(y, vectors.tensors[f"{variant}.y"]) < 1e-5
    y.backward(vectors.tensors["dy"])
    assert relative(u.grad, vectors.tensors[f"{variant}.du"]) < 1e-4
    for name, expected in vectors.named(f"{variant}.grad.").items():
        assert relative(mixer.get_parameter(name).grad, expected) < 1e-4, name


def test_golden_hax_selection_loss(shared: Path) -> None:
    vectors = whole_file(shared, "hax")
    mixer = hax_mixer(vectors, "hax")
    layout = layout_of(2, 24, vectors.tensors["u"].device)
    x, _, _ = mixer.opened(vectors.tensors["u"], None, layout)
    k, q, score = published_parts(mixer, x)
    loss = mixer.selection_loss(score, k.detach(), q.detach(), layout, vectors.tensors["hax.train.noise"])
    assert relative(loss, vectors.tensors["hax.train.gate_loss"]) < 1e-5
    loss.backward()
    for name, expected in vectors.named("hax.train.gate_grad.").items():
        assert relative(mixer.get_parameter(name).grad, expected) < 1e-4, name


@pytest.mark.parametrize("variant", ["a_shape", "window_dilated"])
def test_hax_equals_the_published_code_where_that_is_causal(shared: Path, variant: str) -> None:
    vectors = whole_file(shared, "hax")
    mixer, u = hax_mixer(vectors, variant), vectors.tensors["u"]
    y, _ = mixer(u, None, layout_of(*u.shape[:2], u.device))
    assert relative(y, vectors.tensors[f"{variant}.y"]) < 1e-5


@pytest.mark.parametrize("variant", ["hax", "key_selection", "lsh"])
@torch.no_grad()
def test_what_the_published_statistics_change(shared: Path, variant: str) -> None:
    """The published masks of early queries move with later tokens; the mixer's do not."""
    vectors = whole_file(shared, "hax")
    mixer, u = hax_mixer(vectors, variant), vectors.tensors["u"]
    changed = u.clone()
    changed[:, 16:] += 1

    def published(u: Tensor) -> Tensor:
        x, _, _ = mixer.opened(u, None, layout_of(*u.shape[:2], u.device))
        return published_mask(mixer, *published_parts(mixer, x))

    assert not torch.equal(published(u)[:, :16, :16], published(changed)[:, :16, :16])
    before, after = (mixer(value, None, layout_of(*u.shape[:2], u.device))[0] for value in (u, changed))
    assert relative(after[:, :16], before[:, :16]) < 1e-6


def test_scores_learn_while_training_and_only_then() -> None:
    config = KinConfig(mixers="hax", num_layers=1, model_dim=16, num_heads=2, vocab_size=97)
    model, x = KinForCausalLM(config), tokens(2, 40)
    learned = {}
    for training in (True, False):
        model.train(training).zero_grad()
        model(x, labels=x).loss.backward()
        learned[training] = model.model.layers[0].mixer.dx_proj_1.weight.grad.abs().max()
    assert learned[True] > 0 and learned[False] == 0


def test_unknown_ways_to_choose_are_named() -> None:
    with pytest.raises(ValueError, match=r"selection=\['hash'\]: it must name some of lsh"):
        KinConfig(
            mixers="hax", num_layers=1, model_dim=8, num_heads=1, mixer_parameters={"hax": {"selection": ["hash"]}}
        )
    with pytest.raises(ValueError, match="'argmax_lsh', which is not reproduced"):
        mixer_from_reference("hax", {"hidden": 8, "sparse_arch": "argmax_lsh"}, {})
    assert set(SELECTIONS) == {"lsh", "key_selection", "window", "sink", "dilated"}
