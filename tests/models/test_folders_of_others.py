"""Folders, weights and passes that are not plain: what other libraries leave on a config, take away, or cannot take."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from megalodon import GeckoConfig, KinConfig, MegalodonConfig
from megalodon.models import CausalLM, build_model

SIZES = {"num_layers": 2, "model_dim": 32, "vocab_size": 61}
WIDTHS = {"z_dim": 16, "value_dim": 32, "ffn_hidden_dim": 32, "cema_ndim": 4, "norm_num_groups": 4, "chunk_size": 8}
CONFIGS = {
    "megalodon": MegalodonConfig(**SIZES, **WIDTHS),
    "gecko": GeckoConfig(**SIZES, **WIDTHS),
    "kin": KinConfig(**SIZES, mixers="gla", num_heads=4),
}


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> CausalLM:
    torch.manual_seed(0)
    return build_model(CONFIGS[request.param]).eval()


IDS = torch.randint(61, (2, 21), generator=torch.Generator().manual_seed(1))


def test_what_somebody_set_on_a_config_is_kept_with_a_warning(model: CausalLM, tmp_path: Path) -> None:
    model.config.trained_on = "novels"
    model.config.task_specific_params = None
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"trained_on='novels' in a saved config is no field"):
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.trained_on == "novels"
    assert torch.equal(again.eval()(IDS).logits, model(IDS).logits)
    del model.config.trained_on, model.config.task_specific_params


def test_a_misspelt_field_that_a_person_wrote_is_an_error(model: CausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    del fields["transformers_version"]
    path.write_text(json.dumps({**fields, "num_layer": 3}))
    with pytest.raises(ValueError, match=r"num_layer=3: .* did you mean num_layers"):
        AutoConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="num_layer=3"):
        type(model.config)(num_layer=3)


class NeverEmpty(nn.Module):
    """Another library's layer, that takes no empty input."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias, self.layer = layer.weight, layer.bias, [layer]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.numel(), "an empty pass"
        return self.layer[0](x)


def test_no_pass_over_nothing_reaches_the_layers(model: CausalLM) -> None:
    expected = model.generate(IDS, max_new_tokens=5, do_sample=False)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, NeverEmpty(child))
    assert torch.equal(model.generate(IDS, max_new_tokens=5, do_sample=False), expected)
    empty = model(IDS[:, :0], use_cache=True)
    assert empty.logits.shape == (2, 0, 61)
    whole = model(IDS, past_key_values=empty.past_key_values).logits
    torch.testing.assert_close(whole, model(IDS).logits)
    out = model(IDS[:, :0], use_cache=True, output_hidden_states=True)
    assert len(out.hidden_states) == 3


def test_an_empty_state_is_that_of_nothing_read(model: CausalLM) -> None:
    empty = model.model.empty_state(2)
    assert empty.position.tolist() == [0, 0] and len(empty) == 2
    torch.testing.assert_close(model(IDS, past_key_values=empty, use_cache=True).logits, model(IDS).logits)
    joined = type(empty).concatenate([empty[0], model(IDS[1:], use_cache=True).past_key_values])
    both = model(IDS[:, :5], past_key_values=joined, use_cache=True).logits
    torch.testing.assert_close(both[0], model(IDS[:1, :5]).logits[0], rtol=1e-4, atol=1e-5)


def test_a_state_says_what_crop_can_do(model: CausalLM) -> None:
    state = model(IDS, use_cache=True).past_key_values
    assert not state.is_croppable
    state.crop(21)
    assert state.get_seq_length() == 21
    with pytest.raises(ValueError, match=r"crop\(-2\): a state that has read 21 tokens cannot unread"):
        state.crop(-2)
    state.crop(0)
    assert state.get_seq_length() == 0
    torch.testing.assert_close(model(IDS, past_key_values=state).logits, model(IDS).logits)


def test_transformers_batches_and_caches_are_refused_at_once(model: CausalLM) -> None:
    with pytest.raises(NotImplementedError, match="megalodon serve"):
        model.generate_batch([[1, 2, 3]], generation_config=GenerationConfig(max_new_tokens=3))
    with pytest.raises(NotImplementedError, match="megalodon serve"):
        model.init_continuous_batching()
    for given in (
        {"cache_implementation": "paged"},
        {"generation_config": GenerationConfig(cache_implementation="static")},
    ):
        with pytest.raises(ValueError, match=r"cache_implementation='(paged|static)': the memory is the model's state"):
            model.generate(IDS, max_new_tokens=3, **given)
