"""Ranks that never hold the whole model start from the values that one process starts from."""

from __future__ import annotations

import pytest
import torch
from living import Living
from parallel_cases import SMALL

from megalodon import MegalodonConfig, MegalodonForCausalLM
from megalodon.parallel import Mesh, MeshSizes, ParallelModel
from megalodon.parallel.initial import empty_model, initial_parameters, stored_parameters
from megalodon.parallel.sharding import whole


def whole_model(config: MegalodonConfig) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    return {name: p.detach() for name, p in MegalodonForCausalLM(config).named_parameters()}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"share_emb": True, "swiglu": False, "rescale_nffn": False},
        {"norm_prior_count": 3, "norm_affine": False, "output_size": 40},
        *({"init_mode": mode} for mode in ("bert", "xavier", "gaussian", "none")),
    ],
    ids=str,
)
def test_the_same_values_to_the_bit(changes):
    config = MegalodonConfig(**{**SMALL, **changes})
    expected = whole_model(config)
    torch.manual_seed(5)
    drawn = {name: value.clone() for name, value in initial_parameters(config)}
    assert drawn.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(drawn[name], value), name


SIZES = {**SMALL, "num_layers": 6, "model_dim": 64, "value_dim": 128, "ffn_hidden_dim": 96}


def build_in_parts(sizes: MeshSizes) -> tuple[dict[str, torch.Tensor], int, int]:
    """The parameters under their names, the bytes of this rank's, and the most bytes alive while they were made."""
    torch.manual_seed(5)
    with Living() as living:
        config = MegalodonConfig(**SIZES)
        model = ParallelModel(empty_model(config), Mesh(sizes, "cpu"), torch.device("cpu"))
        model.fill(initial_parameters(config))
    own = sum(p.to_local().nbytes if hasattr(p, "to_local") else p.nbytes for p in model.parameters())
    return {name: whole(p.detach()).clone() for name, p in model.named_parameters()}, own, living.peak


@pytest.mark.parametrize(
    "sizes",
    [MeshSizes(shard=2), MeshSizes(tensor=2), MeshSizes(pipeline=2), MeshSizes(tensor=2, shard=2)],
    ids=str,
)
def test_no_rank_holds_the_whole_model(ranks, sizes):
    expected = whole_model(MegalodonConfig(**SIZES))
    largest = max(value.nbytes for value in expected.values())
    total = sum(value.nbytes for value in expected.values())
    for parameters, own, peak in ranks.run(sizes.world_size, build_in_parts, sizes):
        for name, value in parameters.items():
            assert torch.equal(value, expected[name]), name
        assert peak < own + 3 * largest < total


def test_weights_of_a_folder_come_one_by_one(tmp_path):
    config = MegalodonConfig(**SMALL)
    expected = whole_model(config)
    torch.manual_seed(5)
    MegalodonForCausalLM(config).save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    stored = dict(stored_parameters(tmp_path))
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[name], value) for name, value in expected.items())
    file = sorted(tmp_path.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="damaged"):
        dict(stored_parameters(tmp_path))
    file.unlink()
    with pytest.raises(FileNotFoundError, match="holds no"):
        dict(stored_parameters(tmp_path))
