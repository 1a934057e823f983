"""What `--dry-run` says of memory, against what a step holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megalodon.cli import main
from megalodon.linearize import plan, read_config, recipe_of
from megalodon.linearize.finetune import prepare
from megalodon.linearize.memory import _Counting, predicted
from megalodon.linearize.recipe import Batchwise, FineTune, Transfer
from megalodon.linearize.run import Linearization
from megalodon.linearize.transfer import pupils
from megalodon.models.kin import KinForCausalLM
from megalodon.ops.layout import layout_of
from megalodon.training.launch import checkpoint_activations

RECIPES = {"gecko": ["chunk_size=8"], "hedgehog": [], "lizard": ["window=8"], "lolcats": ["window=8"], "mohawk": []}


def job_of(recipe: str, teacher: Path, tmp_path: Path, keys: list[str]) -> Linearization:
    chosen = recipe_of(recipe)
    settings = read_config(chosen.config, None, ["data.sequence_length=64", "data.batch_size=2", *keys])
    return plan(teacher, tmp_path / "out", chosen, settings)


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_a_step_holds_what_was_predicted(
    recipe: str, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same count, of real tensors in a real step of one layer."""
    monkeypatch.setenv("MEGALODON_BACKEND", "blocked")
    job = job_of(recipe, teacher, tmp_path, [*RECIPES[recipe], "memory.layers_at_once=1"])
    device, dtype = torch.device("cpu"), torch.float32
    stages = [stage for stage in job.stages if isinstance(stage, Transfer)]
    for stage, said in zip(stages, predicted(job)[: len(stages)], strict=True):
        learning = pupils(job.recipe, stage, job.config, job.teacher, range(1), {}, job.replaced, 0, device, dtype)
        moving = sum(p.nbytes for p in learning.parameters() if p.requires_grad)
        x, layout = torch.randn(2, 64, job.config.model_dim), layout_of(2, 64, device)
        with _Counting() as counted:
            learning.teach(x + 0, layout, stage.objective, lambda loss: loss.backward())
        assert said.stage == stage.name and said.blocks == 1
        assert said.step == pytest.approx(counted.most, rel=0.05)
        assert 3 * moving <= said.weights <= 3 * moving + said.teacher


@pytest.mark.parametrize(
    ("recipe", "keys"),
    [
        ("gecko", ["chunk_size=8"]),
        ("supra", []),
        ("distill", ["keep_attention=[1]"]),
        ("lolcats", ["window=8", "run.gradient_checkpointing=true"]),
    ],
)
def test_a_step_of_the_whole_model_holds_what_was_predicted(
    recipe: str, keys: list[str], teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same count, of real tensors in a real step; one layer and what the others add foretell all three."""
    monkeypatch.setenv("MEGALODON_BACKEND", "blocked")
    job = job_of(recipe, teacher, tmp_path, keys)
    stage, said = job.stages[-1], predicted(job)[-1]
    assert isinstance(stage, FineTune) and (said.stage, said.blocks) == ("finetune", None)
    model, theirs = KinForCausalLM(job.config).train(), job.teacher.model()
    prepare(model, stage)
    if job.settings.run.gradient_checkpointing:
        checkpoint_activations(model)
    ids = torch.randint(0, 256, (2, 64))
    with _Counting() as counted:
        if stage.objective is None:
            loss = model(ids, shift_labels=ids, num_items_in_batch=128, return_logits=False, use_cache=False).loss
        else:
            with torch.no_grad():
                wanted = theirs(ids, use_cache=False, output_hidden_states=True)
            loss = stage.objective(Batchwise(model(ids, use_cache=False, output_hidden_states=True), wanted, ids))
        loss.backward()
    assert said.step == pytest.approx(counted.most, rel=0.1)
    moving = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert said.weights == sum(p.nbytes for p in model.parameters()) + 2 * moving
    assert said.teacher == (0 if stage.objective is None else sum(p.nbytes for p in theirs.parameters()))


@pytest.mark.slow
def test_more_at_once_takes_more(teacher: Path, tmp_path: Path) -> None:
    def total(*keys: str) -> int:
        said = predicted(job_of("lolcats", teacher, tmp_path, ["window=8", *keys]))[0]
        return said.weights + said.step

    one, two, whole = total("memory.layers_at_once=1"), total("memory.layers_at_once=2"), total()
    assert one < two < whole < 1.5 * one
    assert total("data.batch_size=4") > 1.5 * whole
    assert total("transfer.accumulation_steps=2") < whole


def test_the_command_says_it(
    teacher: Path, given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for recipe, told in (("mohawk", ["matrix", "hidden", "finetune"]), ("supra", ["finetune"])):
        with pytest.raises(SystemExit) as caught:
            main(["linearize", str(teacher), str(tmp_path / "out"), "--recipe", recipe, *given, "--dry-run"])
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("# memory")]
        assert caught.value.code == 0 and len(lines) == len(told)
        for line, stage in zip(lines, told, strict=True):
            what = "the whole model" if stage == "finetune" else "3 blocks"
            assert line.startswith(f"# memory of {stage}, {what} in memory")
    assert not (tmp_path / "out").exists()
