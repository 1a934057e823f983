"""The reference's names and config: complete, exact both ways, and strict about what they do not know."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from megalodon import MegalodonConfig, MegalodonForCausalLM
from megalodon.convert import (
    config_from_reference,
    config_to_reference,
    state_dict_from_reference,
    state_dict_to_reference,
)

REFERENCE = {
    **{"num_layers": 2, "model_dim": 16, "z_dim": 8, "value_dim": 32, "num_heads": 2, "ffn_hidden_dim": 12},
    **{"cema_ndim": 4, "chunk_size": 8, "efficient_attn": None, "init_mode": "he", "vocab_size": 11, "output_size": -1},
    **{"norm_num_groups": 4, "norm_affine": True, "norm_eps": 1e-5, "rope_base": None, "dropout": 0.0},
    **{"hidden_dropout": 0.0, "attention_dropout": 0.0, "swiglu": True, "rescale_nffn": True, "scale_emb": False},
    **{"share_emb": False, "layerwise_ckpt": False},
}


def golden(path: Path, prefix: str) -> tuple[dict[str, object], dict[str, Tensor]]:
    with safe_open(path, "pt") as file:
        tensors = {name.removeprefix(prefix): file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118
        return json.loads(file.metadata()["meta"])["config"], tensors


def assert_identical(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(actual) == set(expected)
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype and torch.equal(actual[name], value), name


@pytest.mark.parametrize("name", ["full_base", "full_swiglu_tied", "stream_base", "stream_swiglu_tied", "train_cosine"])
def test_golden_parameters_round_trip_to_the_bit(shared: Path, name: str) -> None:
    inner, theirs = golden(shared / "golden" / f"{name}.safetensors", "param.")
    config = config_from_reference(inner)
    ours = state_dict_from_reference(theirs, config)
    MegalodonForCausalLM(config).load_state_dict(
        ours | ({"lm_head.weight": theirs["embed.weight"]} if config.share_emb else {}), strict=True
    )
    assert_identical(state_dict_to_reference(ours, config), theirs)
    assert config_to_reference(config) == inner


def test_golden_gradients_round_trip(shared: Path) -> None:
    inner, theirs = golden(shared / "golden" / "full_base.safetensors", "grad.")
    config = config_from_reference(inner)
    names = {name for name, _ in MegalodonForCausalLM(config).named_parameters()}
    ours = state_dict_from_reference(theirs, config)
    assert set(ours) == names
    back = state_dict_to_reference(ours, config)
    assert_identical({name: back[name] for name in theirs}, theirs)
    some = {name: ours[name] for name in list(ours)[:5]}
    assert len(state_dict_to_reference(some, config)) == 5


@settings(max_examples=12, deadline=None)
@given(
    swiglu=st.booleans(),
    rescale_nffn=st.booleans(),
    share_emb=st.booleans(),
    norm_affine=st.booleans(),
    norm_prior_count=st.sampled_from([0, 3]),
    num_heads=st.sampled_from([1, 2, 4]),
)
def test_table_names_every_parameter_of_the_model(num_heads: int, norm_prior_count: int, **switches: bool) -> None:
    config = MegalodonConfig(
        **{**config_from_reference(REFERENCE).to_dict(), **switches},
    )
    config.num_heads, config.norm_prior_count = num_heads, norm_prior_count
    model = MegalodonForCausalLM(config)
    ours = {name: value.detach() for name, value in model.named_parameters()}
    theirs = state_dict_to_reference(ours, config)
    assert "rope.freqs" in theirs, "a complete state dict receives the buffers"
    assert ("layers.0.mega.timenorm.prior_mean" in theirs) and int(
        theirs["output.final_norm.prior_count"]
    ) == norm_prior_count
    assert_identical(state_dict_from_reference(theirs, config), ours)


def test_bfloat16_and_wrapped_names() -> None:
    config = config_from_reference(REFERENCE)
    ours = {name: value.detach().bfloat16() for name, value in MegalodonForCausalLM(config).named_parameters()}
    theirs = state_dict_to_reference(ours, config)
    assert theirs["rope.freqs"].dtype == torch.bfloat16
    assert_identical(state_dict_from_reference({f"module.model.{name}": v for name, v in theirs.items()}, config), ours)


def test_whole_config_and_its_variants() -> None:
    assert config_from_reference({"model": REFERENCE, "tokenizer": {}}).model_dim == 16
    fused = config_from_reference({**REFERENCE, "efficient_attn": "fused", "output_size": 7, "rope_base": 1e5})
    assert (fused.attention_dropout_mode, fused.output_size, fused.rope_base) == ("dropkey", 7, 1e5)
    back = config_to_reference(fused)
    assert (back["efficient_attn"], back["output_size"], back["rope_base"]) == ("fused", 7, 1e5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_width": 3}, "model_width"),
        ({"efficient_attn": "flash"}, "efficient_attn"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"num_heads": 3}, "num_heads"),
    ],
)
def test_config_refuses(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_from_reference({**REFERENCE, **change})


def test_state_dict_refuses_what_it_does_not_know() -> None:
    config = config_from_reference(REFERENCE)
    with pytest.raises(ValueError, match="unheard"):
        state_dict_from_reference({"unheard.of": torch.zeros(1)}, config)
    with pytest.raises(ValueError, match=r"embed.weight has shape \[3, 16\].*\[11, 16\]"):
        state_dict_from_reference({"embed.weight": torch.zeros(3, 16)}, config)
    with pytest.raises(ValueError, match="rope_base"):
        state_dict_from_reference({"rope.freqs": torch.tensor([1.0, 0.5])}, config)
    with pytest.raises(ValueError, match="norm_prior_count"):
        state_dict_from_reference({"output.final_norm.prior_count": torch.tensor(2)}, config)
    with pytest.raises(ValueError, match="nothing"):
        state_dict_to_reference({"model.nothing": torch.zeros(1)}, config)


def test_tied_head_must_equal_the_embedding() -> None:
    config = config_from_reference({**REFERENCE, "share_emb": True})
    embedding = torch.randn(11, 16)
    tied = {"embed.weight": embedding, "output.output.weight": embedding.clone()}
    assert list(state_dict_from_reference(tied, config)) == ["model.embed_tokens.weight"]
    with pytest.raises(ValueError, match="share_emb"):
        state_dict_from_reference({**tied, "output.output.weight": embedding + 1}, config)
