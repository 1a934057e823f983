"""States in fewer bytes: what is lost is bounded, what is not compressed keeps every bit, and exact stays exact."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megalodon import GeckoConfig, GeckoForCausalLM, MegalodonConfig, MegalodonForCausalLM
from megalodon.models import CausalLM
from megalodon.models.storage import SCALE, compressed, restored

SIZES = {
    "vocab_size": 97,
    "num_layers": 2,
    "model_dim": 64,
    "z_dim": 256,
    "value_dim": 256,
    "num_heads": 2,
    "ffn_hidden_dim": 64,
    "cema_ndim": 4,
    "norm_num_groups": 8,
    "chunk_size": 16,
}
STEP = {"int8": 1 / 254, "fp8": 1 / 16}
"""The largest error, as a share of the largest number of a block."""


def read(architecture: str, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    kinds = {"megalodon": (MegalodonConfig, MegalodonForCausalLM), "gecko": (GeckoConfig, GeckoForCausalLM)}
    config, model = kinds[architecture]
    made: CausalLM = model(config(**SIZES)).eval().to(dtype)
    with torch.inference_mode():
        ids = torch.randint(97, (2, 61), generator=torch.Generator().manual_seed(1))
        return made, made(ids, use_cache=True).past_key_values


@pytest.mark.parametrize("storage", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["megalodon", "gecko"])
def test_a_small_state_is_near_and_the_rest_exact(architecture, dtype, storage, tmp_path: Path) -> None:
    model, state = read(architecture, dtype)
    state.save(tmp_path / "small", storage=storage)
    state.save(tmp_path / "exact")
    small = type(state).load(tmp_path / "small", model.config).state_dict()
    for name, tensor in state.state_dict().items():
        assert small[name].dtype == tensor.dtype and small[name].shape == tensor.shape, name
        if name.rsplit(".", 1)[-1] in state.compressible:
            rounding = 2**-8 if dtype == torch.bfloat16 else 2**-20
            bound = (STEP[storage] * (1 + 2**-6) + rounding) * tensor.abs().max() + 1e-30
            assert (small[name] - tensor).abs().max() <= bound, name
            assert not torch.equal(small[name], tensor), name
        else:
            assert torch.equal(small[name], tensor), name
    exact = type(state).load(tmp_path / "exact", model.config).state_dict()
    assert all(torch.equal(exact[name], tensor) for name, tensor in state.state_dict().items())


def test_a_quarter_of_the_bytes() -> None:
    keys = torch.randn(1, 1000, 2, 128)
    small = compressed({"layers.0.keys": keys}, "int8", {"keys"})
    assert keys.nbytes / sum(tensor.nbytes for tensor in small.values()) > 3.8


def test_zeros_and_odd_widths_come_back() -> None:
    tensors = {
        "keys": torch.zeros(1, 3, 2, 70),
        "values": torch.linspace(-2, 2, 70).expand(1, 1, 1, 70),
        "mean": torch.ones(1),
    }
    back = restored(compressed(tensors, "int8", {"keys", "values"}), torch.float32)
    assert back.keys() == tensors.keys()
    assert torch.equal(back["keys"], tensors["keys"]) and torch.equal(back["mean"], tensors["mean"])
    torch.testing.assert_close(back["values"], tensors["values"], rtol=0, atol=0.02)


def test_wrong_scales_and_unknown_ways_are_refused(tmp_path: Path) -> None:
    small = compressed({"keys": torch.randn(1, 2, 2, 64)}, "int8", {"keys"})
    with pytest.raises(ValueError, match=r"keys\.scale has shape"):
        restored({**small, "keys" + SCALE: small["keys" + SCALE][..., :0]}, torch.float32)
    with pytest.raises(ValueError, match="storage='int4': it must be one of exact, int8, fp8"):
        read("megalodon")[1].save(tmp_path / "state", storage="int4")
