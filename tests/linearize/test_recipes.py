"""mohawk, lizard, distill and gecko, from teacher to model: what begins how, what moves when, and that losses fall."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megalodon.convert.teachers import Teacher
from megalodon.inference import load_model
from megalodon.linearize import linearize, plan, read_config, recipe_of
from megalodon.linearize.transfer import started
from megalodon.models.kin.mixers.phi_mamba import PhiMamba
from megalodon.ops import layout_of

STAGES = {
    "mohawk": ["matrix", "hidden", "finetune"],
    "lizard": ["transfer", "finetune"],
    "distill": ["matrix", "finetune"],
    "gecko": ["transfer", "finetune"],
}


def run(teacher: Path, out: Path, recipe: str, keys: list[str]) -> Path:
    chosen = recipe_of(recipe)
    assert not linearize(plan(teacher, out, chosen, read_config(chosen.config, None, keys)))
    return out


def begun(teacher: Path, recipe: str, keys: list[str]) -> tuple[Any, Any]:
    """The first layer's mixer as a recipe begins it, and the teacher's."""
    chosen, source = recipe_of(recipe), Teacher(teacher)
    config = chosen.student_config(read_config(chosen.config, None, keys), source.config, [])
    block = source.block(0, torch.device("cpu"), torch.float32)
    return started(chosen, config, 0, block, 0), block.mixer


@pytest.mark.parametrize(
    ("recipe", "own"),
    [
        ("mohawk", ["state_size=8"]),
        ("lizard", ["window=8", "sinks=2"]),
        ("distill", ["mix=true"]),
        ("distill", ["student=gated_delta", "mix=true", "copy_projections=false"]),
        ("gecko", ["chunk_size=4"]),
        ("gecko", ["chunk_size=4", "lora=null", "logits=0", "next_token=1"]),
    ],
)
def test_from_teacher_to_model(recipe: str, own: list[str], teacher: Path, given: list[str], tmp_path: Path) -> None:
    tokens = [f"{stage}.tokens=2048" for stage in STAGES[recipe]]
    faster = [f"{stage}.optimizer.learning_rate=3e-3" for stage in STAGES[recipe]]
    out = run(teacher, tmp_path / "out", recipe, [*given, *own, *tokens, *faster, "checkpoint.every=1000"])
    for number, stage in enumerate(STAGES[recipe], 1):
        lines = (out / "linearize" / f"{number}-{stage}" / "metrics.jsonl").read_text().splitlines()
        found = [record["loss"] for record in map(json.loads, lines) if "loss" in record]
        assert sum(found[-4:]) < sum(found[:4]), stage
    model = load_model(out, "cpu", torch.float32)
    assert model.config.state_kind == "constant"
    x = torch.randint(0, 256, (2, 50))
    with torch.no_grad():
        whole = model(x).logits
        state = model(x[:, :21], use_cache=True).past_key_values
        rest = model(x[:, 21:], past_key_values=state).logits
    assert (rest - whole[:, 21:]).abs().max() < 1e-4 * whole.abs().max()


def test_mohawk_begins_open(teacher: Path, given: list[str]) -> None:
    """Before anything is learned the mixer is its matrix, projected: no gate, no convolution."""
    mixer, _ = begun(teacher, "mohawk", [*given, "state_size=8"])
    assert isinstance(mixer, PhiMamba)
    x = torch.randn(2, 12, 32)
    layout = layout_of(2, 12, x.device)
    values = mixer.in_proj(x)[..., : mixer.inner].unflatten(-1, (4, -1)).transpose(1, 2)
    wanted = mixer.out_proj((mixer.mixing_matrix(x) @ values).transpose(1, 2).flatten(2))
    found, _ = mixer(x, None, layout)
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("recipe", ["mohawk", "distill"])
def test_matrices_keep_documents_apart(recipe: str, teacher: Path, given: list[str]) -> None:
    mixer, _ = begun(teacher, recipe, given)
    x, segments = torch.randn(1, 12, 32), torch.tensor([[0] * 5 + [1] * 7])
    whole = mixer.mixing_matrix(x, layout_of(1, 12, x.device, segment_ids=segments))
    assert not whole[..., 5:, :5].any() and not whole.triu(1).any()
    second = mixer.mixing_matrix(x[:, 5:], layout_of(1, 7, x.device))
    assert (whole[..., 5:, 5:] - second).abs().max() < 1e-5 * second.abs().max()


@pytest.mark.parametrize("student", ["gla", "gated_delta"])
def test_distill_copies_projections(student: str, teacher: Path, given: list[str]) -> None:
    mixer, theirs = begun(teacher, "distill", [*given, f"student={student}"])
    assert torch.equal(mixer.o_proj.weight, theirs.o_proj.weight)
    if student == "gla":
        assert all(torch.equal(getattr(mixer, f"{x}_proj").weight, getattr(theirs, f"{x}_proj").weight) for x in "qkv")
        return
    _, k, _ = mixer.qkv_proj.weight.chunk(3)
    assert torch.equal(k[8:16], theirs.k_proj.weight[:8]) and torch.equal(k[16:24], theirs.k_proj.weight[8:])
    fresh, _ = begun(teacher, "distill", [*given, f"student={student}", "copy_projections=false"])
    assert not torch.equal(fresh.qkv_proj.weight, mixer.qkv_proj.weight)


def test_lizards_open_questions_are_keys(teacher: Path, given: list[str]) -> None:
    mixer, _ = begun(teacher, "lizard", [*given, "gate_bias=2", "alpha=0.5", "rotary=true"])
    assert (mixer.gate_proj.bias == 2).all() and (mixer.alpha == 0.5).all()
    plain, _ = begun(teacher, "lizard", [*given, "gate_bias=2", "alpha=0.5"])
    x = torch.randn(1, 20, 32)
    layout = layout_of(1, 20, x.device)
    turned, straight = (one.head_outputs(x, None, layout)[0] for one in (mixer, plain))
    assert torch.allclose(turned[:, 0], straight[:, 0]) and not torch.allclose(turned[:, 5:], straight[:, 5:])


def test_gecko_begins_as_the_teacher_with_a_window(teacher: Path, given: list[str], tmp_path: Path) -> None:
    """Its first two chunks are the teacher's, exactly, until weights of the teacher move; what it learns is new."""
    keys = [*given, "chunk_size=8", "transfer.tokens=1024", "finetune.tokens=256", "lora.rank=2"]
    out = run(teacher, tmp_path / "out", "gecko", keys)
    student, whole = load_model(out / "linearize" / "student", "cpu"), Teacher(teacher).model()
    theirs, own = whole.state_dict(), student.state_dict()
    new = {name for name in own if "memory_maps" in name or ("gate_proj" in name and ".mixer." in name)}
    assert all(torch.equal(own[name], theirs[name]) for name in own if name not in new)
    assert all(own[name].any() for name in new), "maps and gate have moved"
    x = torch.randint(0, 256, (2, 40))
    with torch.no_grad():
        found, wanted = student(x).logits, whole(x).logits
    assert (found - wanted)[:, :16].abs().max() < 1e-5 * wanted.abs().max()
    assert (found - wanted)[:, 16:].abs().max() > 1e-3 * wanted.abs().max()
    final = load_model(out, "cpu").state_dict()
    assert all(not torch.equal(final[name], own[name]) for name in new), "they move beside the adapters"
    changed = {name for name in own if not torch.equal(final[name], own[name])} - new
    assert changed and all(name.rpartition(".mixer.")[2][1:] == "_proj.weight" for name in changed)


def test_geckos_memory_rests_if_asked(teacher: Path, given: list[str], tmp_path: Path) -> None:
    keys = [*given, "chunk_size=8", "transfer.tokens=256", "finetune.tokens=256", "train_memory=false"]
    out = run(teacher, tmp_path / "out", "gecko", keys)
    before, after = (load_model(folder, "cpu").state_dict() for folder in (out / "linearize" / "student", out))
    assert all(torch.equal(before[name], after[name]) for name in before if "memory_maps" in name)


def test_bad_input_is_named(teacher: Path, given: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one of the weights must be more than 0"):
        run(teacher, tmp_path / "out", "distill", [*given, "next_token=0", "logits=0", "hidden=0"])
    with pytest.raises(ValueError, match=r"student: input should be .gla. or .gated_delta."):
        run(teacher, tmp_path / "out", "distill", [*given, "student=mamba"])
    with pytest.raises(ValueError, match=r"chunk_size: .*greater than or equal to 1"):
        run(teacher, tmp_path / "out", "gecko", [*given, "chunk_size=0"])
