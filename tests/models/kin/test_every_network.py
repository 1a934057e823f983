"""What holds of every network, whichever architecture or mixer: states keep little alive, and passes are exported."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from kin_cases import CAUSAL, relative, tokens
from kin_cases import tiny_model as kin

from megalodon import GeckoConfig, GeckoForCausalLM, KinForCausalLM, MegabyteConfig, MegabyteForCausalLM
from megalodon.models import CausalLM
from megalodon.models.state import State

SIZES: dict[str, Any] = {"num_layers": 2, "model_dim": 32, "z_dim": 16, "value_dim": 32, "num_heads": 2}
GECKO = {**SIZES, "vocab_size": 97, "ffn_hidden_dim": 48, "cema_ndim": 4, "chunk_size": 8, "norm_num_groups": 4}


def gecko(**fields: Any) -> GeckoForCausalLM:
    torch.manual_seed(7)
    return GeckoForCausalLM(GeckoConfig(**GECKO, **fields)).eval()


def megabyte() -> MegabyteForCausalLM:
    torch.manual_seed(7)
    return MegabyteForCausalLM(MegabyteConfig(vocab_size=97, model_dim=16, num_heads=2, head_dim=8)).eval()


def network(name: str) -> CausalLM:
    special = {"Gecko": gecko, "MEGABYTE": megabyte, "segments": lambda: gecko(multi_segments=True, bos_token_id=1)}
    return special[name]() if name in special else kin(name)


def alive(state: State) -> int:
    tensors = state.state_dict().values()
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


@torch.no_grad()
@pytest.mark.parametrize("name", ["Gecko", "MEGABYTE", "segments", *CAUSAL])
def test_a_state_keeps_little_more_alive_than_it_remembers(name: str) -> None:
    model = network(name)
    state = model(tokens(2, 700), use_cache=True).past_key_values
    after = model(tokens(2, 1), past_key_values=state, use_cache=True).past_key_values
    mask = torch.ones(2, 90, dtype=torch.long)
    mask[0, :30] = 0
    packed = (torch.arange(90) >= torch.tensor([[33], [61]])).long()
    ragged = model(tokens(2, 90), attention_mask=mask, segment_ids=packed, use_cache=True).past_key_values
    for some in (state, after, ragged, state.detach(), after[1], state.reset(torch.tensor([True, False]))):
        assert alive(some) <= 1.2 * some.nbytes
        for kept in (copy.deepcopy(some), some.clone()):
            assert alive(kept) <= 1.2 * some.nbytes
        file = io.BytesIO()
        torch.save(some, file)
        assert file.tell() <= 1.2 * some.nbytes + 12_000  # what a file says of each tensor


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["Gecko", "MEGABYTE", "segments", *CAUSAL])
def test_gradient_checkpointing_changes_no_gradient(name: str, use_reentrant: bool) -> None:
    model = copy.deepcopy(network(name)).train()
    x, places = tokens(1, 44), torch.cat([torch.arange(size) for size in (13, 1, 8, 22)])[None]

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        torch.manual_seed(5)  # some mixers draw in training
        model(x, labels=x, position_ids=places).loss.backward()
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]

    expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    found = gradients()
    largest = max(float(gradient.abs().max()) for gradient in expected)
    assert all(float((a - b).abs().max()) <= 1e-5 * largest for a, b in zip(found, expected, strict=True))


# --- torch.export ---------------------------------------------------------------------------------------------------


class Logits(torch.nn.Module):
    def __init__(self, model: CausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids, use_cache=False).logits


def exported(model: torch.nn.Module, strict: bool = False) -> torch.export.ExportedProgram:
    anywhere = ({1: torch.export.Dim("length", min=2, max=1 << 20)},)
    return torch.export.export(model, (tokens(2, 21),), dynamic_shapes=anywhere, strict=strict)


STRICT = {"Gecko", "mamba2"}
"""What is traced strictly in quick tests too: an architecture, and one mixer for all, which are one operation each."""
EXPORTS = [
    *(pytest.param(name, False, id=name) for name in ("Gecko", *CAUSAL)),
    *(
        pytest.param(name, True, id=f"{name}-strict", marks=() if name in STRICT else pytest.mark.slow)
        for name in ("Gecko", *CAUSAL)
    ),
]


@torch.no_grad()
@pytest.mark.parametrize(("name", "strict"), EXPORTS)
def test_an_exported_forward_pass_is_exact_at_any_length(name: str, strict: bool) -> None:
    model = network(name)
    program = exported(Logits(model), strict).module()
    for length in (2, 40, 300):
        x = tokens(2, length)
        assert relative(program(x), model(x, use_cache=False).logits) < 1e-5


@pytest.mark.slow
@torch.no_grad()
def test_an_exported_program_is_run_where_no_model_is(tmp_path: Path) -> None:
    model, x = kin("gla"), tokens(2, 50)
    torch.export.save(exported(Logits(model)), tmp_path / "program.pt2")
    torch.save((x, model(x, use_cache=False).logits), tmp_path / "expected.pt")
    code = f"""
import torch, megalodon
x, expected = torch.load({str(tmp_path / "expected.pt")!r})
torch.testing.assert_close(torch.export.load({str(tmp_path / "program.pt2")!r}).module()(x), expected)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]


@pytest.mark.parametrize("strict", [False, True])
def test_what_cannot_be_exported_says_why(strict: bool) -> None:
    trained: KinForCausalLM = copy.deepcopy(kin("gla")).train()
    for model, reason in (
        (megabyte(), "how MEGABYTE cuts a text into patches depends on its length"),
        (network("segments"), r"takes whole texts: .* segments"),
        (trained, "layer 0's mixer is not as it was made, or is in training"),
    ):
        # traced strictly, the reason stands in what PyTorch says of an exception that it came upon
        with pytest.raises(torch._dynamo.exc.Unsupported if strict else NotImplementedError, match=reason):
            exported(Logits(model), strict)
