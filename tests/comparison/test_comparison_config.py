"""What is compared must be alike: sizes match, batches are the same, and what is not fair is refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megalodon.comparison import Plan, load_comparison, match_parameters
from megalodon.comparison.config import train_config_of
from megalodon.data import ByteTokenizer
from megalodon.models import build_model
from megalodon.training.corpora import build_loader, prepare
from megalodon.training.model_section import resolve_model
from megalodon.training.progress import LineDisplay

Write = Callable[[dict[str, Any]], Path]
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("wanted", [12_000, 30_000, 200_000])
def test_parameters_match_and_are_those_of_the_model(tiny: dict[str, Any], write_config: Write, wanted: int) -> None:
    kin = tiny["architectures"]["llama"]["model"]
    for mixer in ("mamba2", "gla", ["gla", "attention"]):
        layers = 2 if isinstance(mixer, list) else 1
        model = {**kin, "mixers": mixer, "num_layers": layers}
        own = {"model": model, "train": {"data": {"mode": "reset"}}}
        tiny["architectures"][f"kin-{len(tiny['architectures'])}"] = own
    config = load_comparison(write_config(tiny | {"parameters": wanted, "tolerance": 0.03}))
    for name, matched in match_parameters(config).items():
        section = train_config_of(config, name, model=matched.model).model
        built = build_model(resolve_model(section, ByteTokenizer()))
        assert sum(parameter.numel() for parameter in built.parameters()) == matched.parameters
        assert abs(matched.parameters / wanted - 1) <= 0.03, name
        assert matched.sizes["model_dim"] == matched.model["model_dim"]


def test_sizes_that_cannot_match_are_told(tiny: dict[str, Any], write_config: Write) -> None:
    tiny["architectures"]["llama"] |= {"adjust": None}
    config = load_comparison(write_config(tiny | {"parameters": 20_000, "tolerance": 0.0001}))
    with pytest.raises(ValueError, match=r"architectures\.\w+: no sizes within 0\.0% of 20,000 parameters; the near"):
        match_parameters(config)
    tiny["architectures"]["llama"]["scale"] = ["z_dim"]
    with pytest.raises(ValueError, match="'z_dim': a megalodon-kin config has no such size"):
        match_parameters(load_comparison(write_config(tiny)))


def test_without_a_number_the_first_is_the_measure(tiny: dict[str, Any], write_config: Write) -> None:
    del tiny["parameters"]
    config = load_comparison(write_config(tiny))
    first, second = match_parameters(config).values()
    section = train_config_of(config, "megalodon").model
    own = build_model(resolve_model(section, ByteTokenizer())).num_parameters()
    assert first.parameters == own and abs(second.parameters / own - 1) <= 0.02


def test_all_read_the_same_batches(tiny: dict[str, Any], write_config: Write) -> None:
    config = load_comparison(write_config(tiny))
    loaders = []
    for name in config.architectures:
        own = train_config_of(config, name, seed=1)
        loaders.append(build_loader(own, prepare(own, ByteTokenizer(), LineDisplay(0)).training, 0, 1))
    for _ in range(12):
        one, other = (next(loader) for loader in loaders)
        assert torch.equal(one.input_ids, other.input_ids) and torch.equal(one.labels, other.labels)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("architectures.llama.train.data.mode", "packed", "data.mode packed reads other batches"),
        ("architectures.llama.train.data.sequence_length", 48, r"llama: data.sequence_length is 48, 24 with megalodon"),
        ("architectures.llama.train.data.held_out.corpus.source", "x", "llama: data.held_out.corpus.source is 'x'"),
        ("architectures.llama.train.run.steps", 9, "llama: run.steps is 9, 8 with megalodon"),
        ("architectures.llama.train.optimizer.learning_rate", 0.1, "the sweep chooses it"),
        ("train.run.seed", 3, "seeds names them"),
        ("train.evaluation.every", None, "evaluation.every is null"),
        ("architectures.llama.model.mixers", "llama", "architectures.llama: model.*llama"),
        ("architectures.llama.model.layers", 3, "architectures.llama: model.layers: unknown key"),
        ("sweep.learning_rates", [1e-3, 1e-2], "sweep.learning_rates"),
        ("sweep.learning_rates", [1e-2, 1e-3, 3e-3], "ascend"),
        ("sweep.steps", 99, r"99 is more than train.run.steps \(8\)"),
        ("seeds", [1, 1], "each is given once"),
        ("sedes", [1], "did you mean seeds"),
    ],
)
def test_what_is_not_fair_or_not_known_is_refused(
    tiny: dict[str, Any], write_config: Write, path: str, value: Any, message: str
) -> None:
    *owners, last = path.split(".")
    inside = tiny
    for owner in owners:
        inside = inside.setdefault(owner, {})
    inside[last] = value
    with pytest.raises(ValueError, match=message):
        load_comparison(write_config(tiny))


def test_a_run_of_other_length_is_the_same_one_stretched(tiny: dict[str, Any], write_config: Write) -> None:
    tiny["train"] |= {"run": {"steps": 1000}, "schedule": {"warmup_steps": 100}, "evaluation": {"every": 50}}
    config = load_comparison(write_config(tiny | {"sweep": {"steps": 100}}))
    short = train_config_of(config, "megalodon", steps=100)
    assert (short.schedule.warmup_steps, short.evaluation.every, short.run.steps) == (10, 5, 100)


def test_keys_follow_what_a_result_depends_on(tiny: dict[str, Any], write_config: Write) -> None:
    def keys(values: dict[str, Any]) -> set[str]:
        return {job.key for job in Plan(load_comparison(write_config(values))).wanted({})}

    before = keys(tiny)
    assert keys(tiny | {"seeds": [0, 1, 2], "processes": 1}) == before  # more of the same
    other = copy.deepcopy(tiny)
    other["train"]["optimizer"] = {"weight_decay": 0.0}
    # all but what compressors make of the texts
    assert len(keys(other) & before) == 1 and len(before) == 9


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "compare").glob("*.yaml")), ids=lambda p: p.stem)
def test_configs_that_are_here_match(path: Path) -> None:
    config = load_comparison(path)
    found = match_parameters(config)
    for name, matched in found.items():
        assert abs(matched.parameters / (config.parameters or matched.parameters) - 1) <= 0.01, name
    numbers = [matched.parameters for matched in found.values()]
    assert max(numbers) / min(numbers) <= 1.0 + 2 * config.tolerance
