"""What `--dry-run` says of memory, against what a step holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megalodon.cli import main
from megalodon.linearize import plan, read_config, recipe_of
from megalodon.linearize.memory import _Counting, predicted
from megalodon.linearize.recipe import Transfer
from megalodon.linearize.run import Linearization
from megalodon.linearize.transfer import pupils
from megalodon.ops.layout import layout_of

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
    for stage, said in zip(stages, predicted(job), strict=True):
        learning = pupils(job.recipe, stage, job.config, job.teacher, range(1), {}, job.replaced, 0, device, dtype)
        moving = sum(p.nbytes for p in learning.parameters() if p.requires_grad)
        x, layout = torch.randn(2, 64, job.config.model_dim), layout_of(2, 64, device)
        with _Counting() as counted:
            learning.teach(x + 0, layout, stage.objective, lambda loss: loss.backward())
        assert said.stage == stage.name and said.blocks == 1
        assert said.step == pytest.approx(counted.most, rel=0.05)
        assert 3 * moving <= said.weights <= 3 * moving + said.teacher


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
    for recipe, told in (("mohawk", ["# memory of matrix", "# memory of hidden"]), ("supra", [])):
        with pytest.raises(SystemExit) as caught:
            main(["linearize", str(teacher), str(tmp_path / "out"), "--recipe", recipe, *given, "--dry-run"])
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("# memory")]
        assert caught.value.code == 0 and len(lines) == len(told)
        assert all(
            line.startswith(start) and "3 blocks in memory" in line for line, start in zip(lines, told, strict=True)
        )
    assert not (tmp_path / "out").exists()
