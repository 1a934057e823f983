"""The kin's config: what is wrong is named, with the nearest that would be right; what is saved comes back."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from kin_cases import CAUSAL, relative, tiny_model, tokens
from transformers import AutoModelForCausalLM

from megalodon import KinConfig, KinForCausalLM, KinModel
from megalodon.models.kin.mixers import MIXERS, mixer_class

SIZES = {"num_layers": 2, "model_dim": 64, "num_heads": 4, "vocab_size": 97}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mixers": "hedgehock"}, "there is no mixer 'hedgehock'; did you mean hedgehog"),
        ({"mixers": ["gla", "glaa"]}, "there is no mixer 'glaa'; did you mean gla"),
        ({"mixers": ["gla"]}, "mixers names 1 layers: it must name all 2"),
        ({"mixers": ["gla", {"window": 3}]}, "has no 'name'"),
        ({"mixers": "gla", "mixer_parameters": {"based": {}}}, "mixer_parameters has 'based', but no layer has"),
        (
            {"mixers": "gla", "mixer_parameters": {"gla": {"expandk": 1.0}}},
            "gla has no parameter 'expandk'; did you mean",
        ),
        (
            {"mixers": "gla", "mixer_parameters": {"gla": {"window": 3}}},
            "gla has no parameter 'window'; it is a parameter of",
        ),
        ({"mixers": "gla", "mixer_parameters": {"gla": {"expand_k": "wide"}}}, "gla: expand_k='wide'"),
        ({"mixers": "gla", "mixer_parameters": {"gla": {"expand_k": 0.03}}}, "gla: expand_k=0.03"),
        ({"mixers": "gla", "window": 3}, "window=3: a megalodon-kin config has no such field; it is a parameter of"),
        ({"mixers": "sliding_attention", "mixer_parameters": {"sliding_attention": {"window": 0}}}, "window=0"),
        ({"mixers": "attention", "model_dim": 66}, "model_dim=66 is not divisible by num_heads=4"),
        ({"mixers": "attention", "num_key_value_heads": 3}, "num_heads=4 is not divisible by num_key_value_heads=3"),
        ({"mixers": "gated_delta", "mixer_parameters": {"gated_delta": {"key_heads": 3}}}, "key_heads=3"),
        ({"mixers": "retention", "mixer_parameters": {"retention": {"first_slope": 2.0}}}, "first_slope=2.0"),
        ({"mixers": "hydra"}, "hydra sees both sides"),
        ({"ffn_hidden_dim": -1}, "ffn_hidden_dim=-1"),
    ],
)
def test_what_is_wrong_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KinConfig(**{**SIZES, **fields})


@pytest.mark.parametrize("name", sorted(MIXERS))
@torch.no_grad()
def test_every_number_is_refused_by_name_or_works(name: str) -> None:
    kind = mixer_class(name)
    two_way = not kind.causal_mode
    for field in kind.Parameters.model_fields:
        for value in (-1, 0, -1.0, 0.0, math.nan, math.inf):
            parameters = {name: {field: value}}
            try:
                config = KinConfig(**SIZES, mixers=name, mixer_parameters=parameters, two_way=two_way)
            except ValueError as error:
                assert f"{name}: {field}={value}" in str(error), error
                continue
            out = KinModel(config).eval()(tokens(1, 5)).last_hidden_state
            assert torch.isfinite(out).all(), (field, value)


def test_a_hybrid_has_parameters_of_all_and_of_one_layer() -> None:
    config = KinConfig(
        **{**SIZES, "num_layers": 3},
        mixers=["gla", {"name": "sliding_attention", "window": 9}, {"name": "gla", "expand_v": 2.0}],
        mixer_parameters={"gla": {"expand_k": 1.0}},
    )
    assert [config.mixer_of(layer)[0] for layer in range(3)] == ["gla", "sliding_attention", "gla"]
    assert config.mixer_of(0)[1].expand_k == config.mixer_of(2)[1].expand_k == 1.0
    assert (config.mixer_of(0)[1].expand_v, config.mixer_of(2)[1].expand_v) == (1.0, 2.0)
    assert config.mixer_of(1)[1].window == 9
    assert config.state_kind == "constant"
    assert KinConfig(**SIZES, mixers=["gla", "attention"]).state_kind == "growing"


@torch.no_grad()
def test_a_hybrid_is_saved_and_read(tmp_path: Path) -> None:
    config = KinConfig(**SIZES, mixers=["megalodon", {"name": "lizard", "window": 9}])
    model, x = KinForCausalLM(config).eval(), tokens(2, 30)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again, KinForCausalLM)
    assert torch.equal(again(x).logits, model(x).logits)


def test_a_state_of_another_model_is_refused() -> None:
    state = tiny_model("lizard")(tokens(1, 4), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="state of another model"):
        tiny_model("lolcats")(tokens(1, 4), past_key_values=state)


@pytest.mark.parametrize("name", sorted(CAUSAL))
def test_bfloat16_keeps_sums_in_float32(name: str) -> None:
    parameters = {name: CAUSAL[name]} if CAUSAL[name] else None
    model = KinForCausalLM(KinConfig(mixers=name, **SIZES, mixer_parameters=parameters)).to(torch.bfloat16)
    x = tokens(2, 40)
    model(x, labels=x).loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters() if parameter.grad is not None)
    with torch.no_grad():
        whole = model.eval()(x, use_cache=True)
        first = model(x[:, :23], use_cache=True)
        second = model(x[:, 23:], past_key_values=first.past_key_values, use_cache=True)
    assert relative(second.logits, whole.logits[:, 23:]) < 0.1
    sums = {key: tensor.dtype for key, tensor in whole.past_key_values.state_dict().items() if key.endswith("sums")}
    assert set(sums.values()) <= {torch.float32}


@pytest.mark.parametrize("name", sorted(CAUSAL))
def test_work_beside_the_parameters_is_counted(name: str) -> None:
    config = KinConfig(mixers=name, **SIZES)
    short, long = (config.sequence_multiply_adds(length) for length in (4096, 8192))
    assert 0 <= short <= long
    if name in ("attention", "megalodon"):
        assert short > 0
    assert KinConfig(mixers="attention", **SIZES).sequence_multiply_adds(4096) == 2 * 64 * 4096


def test_every_kind_is_said() -> None:
    assert {mixer_class(name).kind for name in CAUSAL} == {"constant", "growing"}
