"""The implicit attention of every mixer that is written as one: matrix times values equals the layer's output."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn

from megalodon import GeckoConfig, GeckoForCausalLM, KinConfig, KinForCausalLM, MegalodonConfig, MegalodonForCausalLM
from megalodon.models import CausalLM, MegabyteConfig, MegabyteForCausalLM
from megalodon.models.kin.mixers.mamba import Mamba
from megalodon.ops import layout_of

MIXERS = {
    "attention": {},
    "sliding_attention": {"window": 5},
    "based": {"feature_dim": 4},
    "hedgehog": {},
    "lolcats": {"window": 4},
    "gla": {"gate_rank": 4},
    "mamba": {"state_size": 4},
    "mamba2": {"state_size": 8, "head_dim": 16, "groups": 2},
    "megalodon": {"chunk_size": 8, "cema_ndim": 4},
    "gecko": {"chunk_size": 4, "cema_ndim": 4},
    "window_memory": {"chunk_size": 4},
}
SIZES = {
    **{"num_layers": 2, "model_dim": 16, "z_dim": 8, "value_dim": 32, "num_heads": 2, "ffn_hidden_dim": 16},
    **{"vocab_size": 32, "cema_ndim": 4, "chunk_size": 4, "norm_num_groups": 4},
}
NAMES = [*MIXERS, "Megalodon", "Gecko", "Gecko of segments"]


def model_of(name: str) -> CausalLM:
    torch.manual_seed(1)
    model: CausalLM
    if name in MIXERS:
        groups = (
            {"num_key_value_heads": 2} if name in ("attention", "sliding_attention", "gla", "window_memory") else {}
        )
        sizes = {"num_layers": 2, "model_dim": 16, "num_heads": 4, "vocab_size": 32, **groups}
        model = KinForCausalLM(KinConfig(mixers=name, mixer_parameters={name: MIXERS[name]}, **sizes))
    elif name == "Megalodon":
        model = MegalodonForCausalLM(MegalodonConfig(**SIZES))
    else:
        segments = {"multi_segments": True, "bos_token_id": 3} if name != "Gecko" else {}
        model = GeckoForCausalLM(GeckoConfig(**SIZES, **segments))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def blocks_branch(block: nn.Module, x: torch.Tensor, arguments: tuple, layout) -> torch.Tensor:
    """What the block's mixer adds to the residual stream, by the block's own forward pass with the rest silenced."""
    heard = []
    part = block.mixer if hasattr(block, "mixer") else block.attention
    handle = part.register_forward_hook(lambda module, inputs, output: heard.append(output[0]))
    block(x, None, *arguments, layout, False)
    handle.remove()
    return heard[0]


@pytest.mark.parametrize("name", NAMES)
@given(length=st.integers(1, 19), seed=st.integers(0, 99))
@settings(max_examples=2)
def test_matrix_times_values_is_the_output(name: str, length: int, seed: int) -> None:
    model = model_of(name).model
    ids = torch.randint(0, 32, (2, length), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        layers = model.implicit_attention(ids)
        hidden = model(ids, output_hidden_states=True, use_cache=False).hidden_states
        layout = layout_of(2, length, ids.device, chunk_size=model.chunk_size)
        arguments = model.layer_arguments(model.config, layout)
        for i, paths in enumerate(layers):
            for path in paths:
                scale = path.outputs.abs().max()
                assert (path.applied() - path.outputs).abs().max() <= 1e-5 * scale
                seen = path.matrix()
                assert seen.shape == (2, path.values.shape[2] * path.values.shape[3], length, length)
                assert not seen.triu(1).any()  # nothing of what comes later
                whole = torch.einsum("bcts,bsc->btc", seen, path.values.flatten(-2))
                constant = 0 if path.constant is None else path.constant.flatten(-2)
                assert (whole + constant - path.outputs.flatten(-2)).abs().max() <= 1e-5 * scale
            if name != "Gecko of segments":  # whose layout has segments, too
                branch = blocks_branch(model.layers[i], hidden[i], arguments, layout)
                total = sum(path.result() for path in paths)
                assert (total - branch).abs().max() <= 1e-5 * branch.abs().max()


def test_published_matrices(shared: Path) -> None:
    """Those of the paper's code leave out the skip, and the convolution's bias beside the matrix."""
    folder = shared / "golden" / "kin"
    with safe_open(folder / "implicit_attention.safetensors", "pt") as opened:
        golden = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    with safe_open(folder / "mamba.safetensors", "pt") as opened:
        names = [name for name in opened.keys() if name.startswith("param.")]  # noqa: SIM118
        given = json.loads(opened.metadata()["meta"])["config"]
        found = Mamba.reference(given, {name.removeprefix("param."): opened.get_tensor(name) for name in names})
    config = KinConfig(mixers="mamba", num_layers=1, mixer_parameters={"mamba": found.parameters}, **found.fields)
    u = golden["u"]
    layout = layout_of(*u.shape[:2], u.device)
    for kind in ("clean", "full"):
        mixer = Mamba(config, 0, Mamba.Parameters(**found.parameters))
        mixer.load_state_dict(found.state_dict)
        with torch.no_grad():
            if kind == "clean":
                mixer.conv1d.bias.zero_()
                mixer.D.zero_()
            (exact,) = mixer.paths(u, layout)
            assert torch.allclose(exact.outputs[..., 0].mT, golden[f"{kind}.before_out_proj"], atol=1e-6)
            assert torch.allclose(exact.values[..., 0].mT, golden[f"{kind}.x"], atol=1e-6)
            assert torch.allclose(
                mixer.scan_matrix(mixer.opened(u, None, layout)[0]), golden[f"{kind}.scan_matrix"], atol=1e-6
            )
            mixer.D.zero_()
            (published,) = mixer.paths(u, layout)
            assert torch.allclose(published.matrix(), golden[f"{kind}.matrix"], atol=1e-6)
            if kind == "full":  # what the published matrix lacks
                lacking = (published.matrix() @ exact.values[..., 0].mT[..., None])[..., 0]
                assert not torch.allclose(lacking, golden["full.before_out_proj"], rtol=0.1)
                assert torch.allclose(exact.applied(), exact.outputs, atol=1e-6)


def test_what_has_no_matrix_says_so() -> None:
    ids = torch.zeros(1, 8, dtype=torch.int64)
    model = KinForCausalLM(KinConfig(mixers="h3", num_layers=1, model_dim=16, num_heads=2, vocab_size=32))
    with pytest.raises(ValueError, match="H3 is not written as an implicit attention"):
        model.model.implicit_attention(ids)
    megabyte = MegabyteForCausalLM(MegabyteConfig(model_dim=16, num_heads=2, head_dim=8, depths=[1, 1]))
    with pytest.raises(ValueError, match="megabyte models are not written"):
        megabyte.model.implicit_attention(ids)
