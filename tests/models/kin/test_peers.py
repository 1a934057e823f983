"""Other libraries' models as kin and back: the same logits to 1e-5."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from kin_cases import relative, whole_file
from transformers import AutoConfig, AutoModelForCausalLM

from megalodon import KinConfig, KinForCausalLM
from megalodon.convert import kin_from_transformers, kin_to_transformers, mixer_from_reference
from megalodon.convert.peers import _renamed, kin_from_peer, peer_of
from megalodon.ops import Layout

LLAMA = {
    "vocab_size": 97,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
}

MAMBA = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}


def moved(model):
    """Every parameter away from its initial value."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("llama", LLAMA),
        ("llama", {**LLAMA, "attention_bias": True, "tie_word_embeddings": True, "head_dim": 8}),
        ("llama", {**LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
        ("mamba", MAMBA),
        (
            "mamba",
            {**MAMBA, "use_bias": True, "use_conv_bias": False, "time_step_rank": 3, "tie_word_embeddings": True},
        ),
        ("mamba2", {**MAMBA, "head_dim": 8, "num_heads": 8}),
        ("mamba2", {**MAMBA, "head_dim": 8, "num_heads": 8, "n_groups": 2, "time_step_limit": (0.01, 0.5)}),
    ],
)
@torch.no_grad()
def test_both_ways(model_type: str, options: dict) -> None:
    theirs = moved(AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **options)))
    ours, x = kin_from_transformers(theirs), torch.randint(0, 97, (2, 40))
    assert relative(ours(x).logits, theirs(x).logits) < 1e-5
    back = kin_to_transformers(ours, model_type)
    assert type(back) is type(theirs)
    assert relative(back(x).logits, theirs(x).logits) < 1e-6


def test_parameters_of_flash_linear_attention_fit() -> None:
    """Where it is not installed: the names and shapes of one of its models are made here and brought over."""
    ours = moved(KinForCausalLM(KinConfig(mixers="gla", num_layers=1, model_dim=64, num_heads=4, vocab_size=97)))
    names = {
        "embed_tokens": "embeddings",
        "mixer_norm": "attn_norm",
        "feed_forward_norm": "mlp_norm",
        "feed_forward": "mlp",
        "mixer.decay_down": "attn.gk_proj.0",
        "mixer.decay_up": "attn.gk_proj.1",
        "mixer.head_norm": "attn.g_norm_swish_gate",
        "mixer": "attn",
        "final_norm": "norm",
    }
    theirs = {}
    for key, value in ours.state_dict().items():
        old = next((name for name in names if f".{name}." in key), None)
        theirs[key if old is None else key.replace(f".{old}.", f".{names[old]}.")] = value
    config = {
        "model_type": "gla",
        "vocab_size": 97,
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_heads": 4,
        "intermediate_size": ours.config.ffn_hidden_dim,
        "norm_eps": 1e-6,
    }
    again = kin_from_peer(config, theirs)
    assert set(theirs) >= {"model.layers.0.attn.gk_proj.1.bias", "model.embeddings.weight", "model.norm.weight"}
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in ours.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_kv_heads": 2, "expand_k": 1.0, "clamp_min": -0.05, "feature_map": "relu"},
        {"expand_v": 2.0, "use_output_gate": False, "tie_word_embeddings": True},
    ],
)
@torch.no_grad()
def test_flash_linear_attention_itself_both_ways(options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own kernels, on a CPU in Triton's interpreter: that has no clock for choosing among their sizes, and does not
    run the one that is taken for more than 64 tokens."""
    models = pytest.importorskip("fla.models", reason="needs flash-linear-attention, fla-core and einops")
    monkeypatch.setattr("triton.runtime.autotuner.Autotuner._bench", lambda *_, **__: [0.0, 0.0, 0.0])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_heads": 4, "vocab_size": 97, "intermediate_size": 80}
    theirs = moved(models.GLAForCausalLM(models.GLAConfig(**sizes, **options))).to(device)
    ours, x = kin_from_transformers(theirs).to(device), torch.randint(0, 97, (2, 50), device=device)
    expected = theirs(x, use_cache=False).logits
    assert relative(ours(x).logits, expected) < 1e-5
    back = kin_to_transformers(ours, "gla").to(device)
    assert type(back) is type(theirs)
    assert relative(back(x, use_cache=False).logits, expected) < 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not reproduced"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_type='linear'"),
    ],
)
def test_options_of_peers_that_are_not_reproduced_are_named(options: dict, message: str) -> None:
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **{**LLAMA, **options}))
    with pytest.raises(ValueError, match=message):
        kin_from_transformers(theirs)


def test_models_that_are_no_peer_are_named() -> None:
    config = KinConfig(mixers="based", num_layers=1, model_dim=64, num_heads=4, vocab_size=97)
    with pytest.raises(ValueError, match="every layer must be 'attention'"):
        kin_to_transformers(KinForCausalLM(config), "llama")
    with pytest.raises(ValueError, match="model_type='bert'"):
        kin_to_transformers(KinForCausalLM(config), "bert")


@pytest.mark.parametrize(("key_heads", "value_heads"), [(2, 4), (3, 3)])
def test_gated_delta_is_qwen3_nexts(key_heads: int, value_heads: int) -> None:
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextConfig, Qwen3NextGatedDeltaNet

    options = {
        "hidden_size": 24,
        "linear_num_value_heads": value_heads,
        "linear_num_key_heads": key_heads,
        "linear_key_head_dim": 5,
        "linear_value_head_dim": 6,
        "linear_conv_kernel_dim": 4,
        "rms_norm_eps": 1e-6,
    }
    theirs = moved(Qwen3NextGatedDeltaNet(Qwen3NextConfig(**options), 0))
    ours = mixer_from_reference("gated_delta", options, theirs.state_dict())
    x = torch.randn(2, 150, 24, requires_grad=True)
    expected, upstream = theirs(x), torch.randn(2, 150, 24)
    actual, _ = ours(x, None, Layout(2, 150))
    assert relative(actual, expected) < 1e-5
    gradients = [torch.autograd.grad(out, x, upstream)[0] for out in (actual, expected)]
    assert relative(*gradients) < 1e-4


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_golden_language_models(shared: Path, name: str) -> None:
    vectors = whole_file(shared, name)
    config = {**vectors.config["lm_config"], "model_type": name}
    model, tokens = kin_from_peer(config, vectors.named("lm.param.")), vectors.tensors["lm.tokens"]
    out = model(tokens, labels=tokens)
    assert relative(out.logits, vectors.tensors["lm.logits"]) < 1e-5
    assert relative(out.loss, vectors.tensors["lm.loss"]) < 1e-5
    out.loss.backward()
    theirs = {_renamed(key, peer_of(name), 1): parameter.grad for key, parameter in model.named_parameters()}
    expected = vectors.named("lm.grad.")
    assert set(theirs) == set(expected)
    for key, gradient in expected.items():
        assert relative(theirs[key], gradient) < 1e-4, key


def test_what_a_mamba_of_transformers_does_not_have_is_named() -> None:
    with pytest.raises(ValueError, match="ffn_hidden_dim=176"):
        config = KinConfig(mixers="mamba", num_layers=1, model_dim=64, num_heads=4, vocab_size=97)
        kin_to_transformers(KinForCausalLM(config), "mamba")
    with pytest.raises(ValueError, match="num_heads=24 is not reproduced"):
        kin_from_peer({**MAMBA, "model_type": "mamba2", "num_heads": 24, "head_dim": 8, "expand": 2}, {})
