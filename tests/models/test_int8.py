"""Weights in int8: rounded as said, the kernel and the plain form alike, refused where not possible."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from engine_cases import make_model
from megalodon.inference.loading import load_model, torch_dtype
from megalodon.inference.slots import choose_buckets, slot_decoder
from megalodon.models.layers.few_rows import PRODUCT, FusedProduct, can_fuse
from megalodon.models.layers.int8 import Int8Linear, quantize
from megalodon.models.megalodon import token_step
from megalodon.ops import compiled

needed = pytest.mark.skipif(compiled.missing() is not None, reason=f"no kernels: {compiled.missing()}")
TOKENS = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_each_output_is_rounded_by_its_largest_weight() -> None:
    layer = nn.Linear(50, 7)
    layer.weight[3] *= 100
    layer.weight[5] = 0
    rounded = Int8Linear(layer)
    error = (rounded.weight * rounded.scale[:, None] - layer.weight).abs()
    assert (error <= layer.weight.abs().amax(1, keepdim=True) / 254 * 1.001).all()
    assert rounded.weight.abs().amax(1).tolist() == [127, 127, 127, 127, 127, 0, 127]
    x = torch.randn(3, 50)
    expected = nn.functional.linear(x, rounded.weight * rounded.scale[:, None], layer.bias)
    torch.testing.assert_close(rounded(x), expected, rtol=1e-5, atol=1e-4)


@needed
@pytest.mark.parametrize("rows", [1, 3, 16])
@torch.no_grad()
def test_kernel(rows: int) -> None:
    layer, x = Int8Linear(nn.Linear(133, 41)), torch.randn(rows, 133)
    assert can_fuse([layer], torch.float32, PRODUCT)
    torch.testing.assert_close(FusedProduct(layer)(x), layer(x), rtol=1e-5, atol=1e-5)


@needed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_single_tokens_give_what_the_whole_gives(dtype: torch.dtype) -> None:
    model = make_model(dtype)
    before = model(TOKENS).logits
    assert quantize(model) == 2 * 7 + 1
    whole = model(TOKENS).logits
    assert 0 < (whole - before).abs().max() < 0.05 * before.abs().max()
    state, rows = model(TOKENS[:, :5], use_cache=True).past_key_values, []
    for place in range(5, 40):
        output = model(TOKENS[:, place : place + 1], past_key_values=state, use_cache=True)
        state = output.past_key_values
        rows.append(output.logits)
    step = token_step._STEPS.of(model.model)
    assert step is not None and step.fused is not None
    bound = 1e-4 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(torch.cat(rows, 1), whole[:, 5:], rtol=bound, atol=bound)


@pytest.mark.parametrize("backend", ["numba", "blocked"])
@torch.inference_mode()
def test_slots_decode(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "numba" and compiled.missing() is not None:
        pytest.skip(f"no kernels: {compiled.missing()}")
    monkeypatch.setenv("MEGALODON_BACKEND", backend)
    model = make_model()
    quantize(model)
    decoder = slot_decoder(model, 16, choose_buckets(model, (16,)))
    state = model(TOKENS[:1, :7], use_cache=True).past_key_values
    for slot in (0, 4, 9):
        decoder.load(slot, state)
    found = decoder.step([int(TOKENS[0, 7])] * 3, [0, 4, 9])
    assert torch.equal(found, found[:1].expand_as(found))
    torch.testing.assert_close(found[0], model(TOKENS[:1, :8]).logits[0, 7], rtol=1e-4, atol=1e-4)


def test_a_folder_is_loaded_in_int8(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    model = load_model(tmp_path, "cpu", torch_dtype("int8"))
    assert type(model.lm_head) is Int8Linear and model.dtype == torch.float32
    with pytest.raises(ValueError, match="dtype is 'int4'; it must be float32, bfloat16, int8"):
        torch_dtype("int4")
    with pytest.raises(ValueError, match="int8 is for decoding on a CPU"):
        load_model(tmp_path, "meta", torch.int8)
