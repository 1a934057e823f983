"""Which layers keep their attention: what each costs, in one pass, equals what a model with that layer changed says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from megalodon.convert.teachers import Teacher
from megalodon.data import Batch, Mixture
from megalodon.inference import load_model
from megalodon.linearize import linearize, plan, read_config, recipe_of, selection
from megalodon.models.kin import KinConfig, KinForCausalLM

STEPS = ["transfer.tokens=128", "finetune.tokens=64", "window=8"]


def rows(segments: bool) -> Batch:
    ids = torch.randint(0, 256, (2, 40))
    documents = (torch.arange(40) >= 25).long().expand(2, -1) if segments else None
    return Batch(ids, ids, documents, None, 80, None, (), Mixture.weighted({}, {}))


@pytest.mark.parametrize("segments", [False, True])
@torch.no_grad()
def test_costs_are_those_of_whole_models(segments: bool, teacher: Path) -> None:
    source, batch = Teacher(teacher), rows(segments)
    found = selection.replacement_costs(source, batch, 6, torch.device("cpu"), torch.float32)
    model = source.model()
    wanted = model(batch.input_ids, segment_ids=batch.segment_ids).logits.log_softmax(-1)
    fields = {**{name: getattr(source.config, name) for name in KinConfig.architecture_fields()}}
    for layer in range(3):
        mixers: list[str | dict] = ["attention"] * 3
        mixers[layer] = {"name": "sliding_attention", "window": 6}
        changed = KinForCausalLM(KinConfig(**{**fields, "mixers": mixers, "mixer_parameters": None})).eval()
        changed.load_state_dict(model.state_dict())
        other = changed(batch.input_ids, segment_ids=batch.segment_ids).logits.log_softmax(-1)
        apart = F.kl_div(other, wanted, log_target=True, reduction="sum") / 80
        assert found[layer] == pytest.approx(float(apart), rel=1e-3) and found[layer] > 0
    everything = selection.replacement_costs(source, batch, 40, torch.device("cpu"), torch.float32)
    assert max(map(abs, everything)) < 1e-6


def test_the_costliest_stay(teacher: Path, given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [*given, *STEPS, "keep_attention=auto", "keep.window=4", "keep.tokens=64"]
    recipe = recipe_of("lolcats")

    def run(out: Path, *more: str) -> KinConfig:
        job = plan(teacher, out, recipe, read_config(recipe.config, None, [*keys, *more]))
        assert not linearize(job)
        return load_model(out, "cpu").config  # type: ignore[return-value]

    config = run(tmp_path / "one")
    told = json.loads((tmp_path / "one" / "linearize" / "keep_attention.json").read_text())
    costs = told["nats_a_token"]
    assert told["kept"] == [max(range(3), key=costs.__getitem__)] and told["tokens"] == 64
    kept = [layer for layer in range(3) if config.mixer_of(layer)[0] == "attention"]
    assert kept == told["kept"] and config.state_kind == "growing"
    (tmp_path / "one" / "config.json").unlink()
    monkeypatch.setattr(selection, "replacement_costs", None)
    assert run(tmp_path / "one").mixers == config.mixers, "what was measured is not measured again"
    monkeypatch.undo()
    config = run(tmp_path / "two", "keep.count=2")
    assert [config.mixer_of(layer)[0] for layer in range(3)].count("attention") == 2


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        (["keep_attention=auto", "keep.count=3"], "keep.count: 3 of 3 layers would stay"),
        (["keep_attention=[1]", "keep.count=1"], "keep: it is for keep_attention=auto"),
        (["keep_attention=automatic"], "keep_attention"),
    ],
)
def test_bad_input_is_named(keys: list[str], told: str, teacher: Path, given: list[str], tmp_path: Path) -> None:
    recipe = recipe_of("lolcats")
    with pytest.raises(ValueError, match=told):
        plan(teacher, tmp_path / "out", recipe, read_config(recipe.config, None, [*given, *STEPS, *keys]))
