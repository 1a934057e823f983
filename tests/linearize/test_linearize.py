"""A linearisation from teacher to model: what comes out, in whatever order and however often it was killed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import torch

from megalodon.cli import main
from megalodon.convert.teachers import Teacher
from megalodon.files import load_tensors
from megalodon.inference import load_model
from megalodon.linearize import linearize, plan, read_config, recipe_of
from megalodon.linearize.finetune import FineTuner
from megalodon.linearize.transfer import TransferTrainer

STEPS = ["transfer.tokens=256", "finetune.tokens=128"]  # four and two steps


def run(teacher: Path, out: Path, recipe: str, keys: list[str]) -> Path:
    """A run that must come to its end."""
    chosen = recipe_of(recipe)
    assert not linearize(plan(teacher, out, chosen, read_config(chosen.config, None, keys)))
    return out


def digest(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("recipe", ["lolcats", "hedgehog", "supra"])
def test_the_model_keeps_what_a_state_promises(recipe: str, teacher: Path, given: list[str], tmp_path: Path) -> None:
    before = digest(teacher)
    keys = STEPS[1:] if recipe == "supra" else STEPS
    window = ["window=8"] if recipe == "lolcats" else []
    out = run(teacher, tmp_path / "out", recipe, [*given, *keys, *window])
    assert digest(teacher) == before, "the teacher's folder is only read"
    model = load_model(out, "cpu", torch.float32)
    x = torch.randint(0, 256, (2, 90))
    whole = model(x, use_cache=True)
    state, pieces = None, []
    for piece in x.split([1, 7, 30, 1, 51], dim=1):
        output = model(piece, past_key_values=state, use_cache=True)
        state = output.past_key_values
        pieces.append(output.logits)
    assert (torch.cat(pieces, 1) - whole.logits).abs().max() < 1e-4 * whole.logits.abs().max()
    assert state is not None and model.config.state_kind == "constant"
    assert state.nbytes == model(x[:, :3], use_cache=True).past_key_values.nbytes
    padded = model(torch.cat([torch.zeros(2, 5, dtype=torch.int64), x], 1), torch.arange(95).expand(2, -1) >= 5)
    assert (padded.logits[:, 5:] - whole.logits).abs().max() < 1e-4 * whole.logits.abs().max()


@pytest.mark.parametrize("memory", [["1", "recompute"], ["2", "disk"]])
def test_blocks_in_turn_learn_what_they_learn_together(
    memory: list[str], teacher: Path, given: list[str], tmp_path: Path
) -> None:
    keys = [*given, *STEPS, "window=8", "keep_attention=[1]"]
    together = run(teacher, tmp_path / "together", "lolcats", keys)
    apart = [f"memory.layers_at_once={memory[0]}", f"memory.activations={memory[1]}"]
    in_turn = run(teacher, tmp_path / "apart", "lolcats", [*keys, *apart])
    wanted, found = (load_tensors(out / "model.safetensors") for out in (together, in_turn))
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert not (in_turn / "linearize" / "1-transfer" / "activations").exists()


def test_what_moves_in_which_stage(teacher: Path, given: list[str], tmp_path: Path) -> None:
    """Maps and windows move in the transfer and nothing else; then projections, by no more than the adapters' rank."""
    out = run(teacher, tmp_path / "out", "lolcats", [*given, *STEPS, "lora.rank=2", "window=8"])
    theirs = Teacher(teacher).model().state_dict()
    student = load_model(out / "linearize" / "student", "cpu").state_dict()
    final = load_tensors(out / "model.safetensors")
    new = {name for name in student if "feature_map" in name or "window_logit" in name}
    assert new and all(torch.equal(student[name], theirs[name]) for name in student if name not in new)
    for name, value in final.items():
        if name.endswith(tuple(f"mixer.{letter}_proj.weight" for letter in "qkvo")):
            difference = (value - theirs[name]).double()
            assert difference.abs().max() > 0
            assert torch.linalg.matrix_rank(difference, rtol=1e-3) <= 2
        else:
            assert torch.equal(value, student[name])
    untrained = recipe_of("lolcats")
    settings = read_config(untrained.config, None, [*given, *STEPS, "lora.rank=2", "window=8"])
    config = plan(teacher, tmp_path / "other", untrained, settings).config
    assert config.mixer_of(0)[1].window == 8  # type: ignore[attr-defined]
    eye = torch.eye(8).expand(4, -1, -1)
    assert not torch.equal(student["model.layers.0.mixer.feature_map_q.weight"], eye)


def test_the_loss_of_a_transfer_falls(teacher: Path, given: list[str], tmp_path: Path) -> None:
    for recipe, own in (("lolcats", ["window=8"]), ("hedgehog", [])):
        keys = [*given, *own, "transfer.tokens=1024", "finetune.tokens=64"]
        out = run(teacher, tmp_path / recipe, recipe, keys)
        lines = (out / "linearize" / "1-transfer" / "metrics.jsonl").read_text().splitlines()
        held_out = [record["heldout_loss"] for record in map(json.loads, lines) if "heldout_loss" in record]
        assert held_out[-1] < held_out[0]


@pytest.mark.parametrize(("stage", "trainer"), [("transfer", TransferTrainer), ("finetune", FineTuner)])
def test_a_stage_goes_on_from_its_checkpoint(
    stage: str, trainer: type, teacher: Path, given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [*given, "transfer.tokens=256", "finetune.tokens=256", "window=8", "checkpoint.every=2"]
    wanted = run(teacher, tmp_path / "whole", "lolcats", keys)
    made = trainer._update

    def until_the_third(self, batch):
        if self.state.step == 3:
            raise OSError("the machine is gone")
        return made(self, batch)

    with monkeypatch.context() as patched:
        patched.setattr(trainer, "_update", until_the_third)
        with pytest.raises(OSError, match="the machine is gone"):
            run(teacher, tmp_path / "killed", "lolcats", keys)
    assert list((tmp_path / "killed" / "linearize").glob(f"*-{stage}/checkpoints/step-000002"))
    found = run(teacher, tmp_path / "killed", "lolcats", keys)
    one, other = (load_tensors(folder / "model.safetensors") for folder in (wanted, found))
    assert all(torch.equal(one[name], other[name]) for name in one)


# Forks children, each of which kills itself at one of its operations on the disk, ever later, until one
# comes to the end.
DRIVER = """
import os, signal, sys
from pathlib import Path
import matplotlib.pyplot, torch.utils.tensorboard, peft  # once, before forking
from megalodon.linearize import linearize, plan, read_config, recipe_of, run

teacher, out, *keys = sys.argv[1:]
recipe = recipe_of("lolcats")
run.measure_peak_flops = lambda device, dtype: 1e9

def work_and_die_at(left):
    def deadly(function):
        def call(*args, **kwargs):
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return call
    Path.rename = deadly(Path.rename)
    Path.replace = deadly(Path.replace)
    linearize(plan(Path(teacher), Path(out), recipe, read_config(recipe.config, None, keys)))

kills = 0
for number in [3, 8, 14, 10**9]:
    child = os.fork()
    if child == 0:
        try:
            work_and_die_at(number)
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        kills += 1
        continue
    print(kills, status)
    break
"""


@pytest.mark.slow
def test_killed_at_any_instant(teacher: Path, given: list[str], tmp_path: Path) -> None:
    keys = [*given, *STEPS, "window=8", "memory.layers_at_once=1", "memory.activations=disk", "checkpoint.every=2"]
    wanted = run(teacher, tmp_path / "alone", "lolcats", keys)
    out = tmp_path / "killed"
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(teacher), str(out), *keys],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    kills, status = map(int, done.stdout.splitlines()[-1].split())
    assert status == 0 and kills == 3, done.stderr[-3000:]
    one, other = (load_tensors(folder / "model.safetensors") for folder in (wanted, out))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("recipe", "keys", "told"),
    [
        ("lolcat", [], "no recipe 'lolcat'; did you mean lolcats"),
        ("lolcats", ["window=0"], "window: .*greater than or equal to 1"),
        ("lolcats", ["windw=3"], "windw: unknown key; did you mean window"),
        ("supra", ["transfer.tokens=3"], "transfer: unknown key"),
        ("lolcats", ["data.sequence_length=65"], "more than the teacher was trained to read .64."),
        ("lolcats", ["data.mode=streamed"], "data.mode: a teacher reads rows"),
        ("lolcats", ["keep_attention=[3]"], "there is no layer 3: the teacher has 3"),
        ("lolcats", ["keep_attention=[0,1,2]"], "all layers would stay"),
        ("lolcats", ["memory.activations=disk"], "give memory.layers_at_once"),
        ("lolcats", ["finetune.accumulation_steps=3"], "finetune.accumulation_steps: 3 must divide"),
        ("lolcats", ["window=32"], "rows of 32 hold nothing beyond the 32 tokens .* less window"),
        ("gecko", ["chunk_size=16"], "rows of 32 hold nothing beyond the 32 tokens .* less chunk_size"),
        ("hedgehog", ["lora.targets=[q_proj, qproj]"], "lora.targets: no linear layer is called qproj: a block has"),
    ],
)
def test_bad_input_is_named(
    recipe: str, keys: list[str], told: str, teacher: Path, given: list[str], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=told):
        run(teacher, tmp_path / "out", recipe, [*given, *keys])
    assert not (tmp_path / "out").exists(), "before any work"


def test_folders_that_do_not_fit(teacher: Path, given: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lies in the teacher's folder"):
        run(teacher, teacher / "out", "lolcats", given)
    inside = shutil.copytree(teacher, tmp_path / "whole" / "linearize")
    with pytest.raises(ValueError, match="lies in the teacher's folder"):
        run(inside, tmp_path / "whole", "lolcats", given)
    with pytest.raises(ValueError, match="holds something else"):
        run(teacher, tmp_path / "whole", "hedgehog", given)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="holds something else"):
        run(teacher, tmp_path / "other", "lolcats", given)
    out = run(teacher, tmp_path / "out", "supra", [*given, "finetune.tokens=64"])
    assert run(teacher, out, "supra", [*given, "finetune.tokens=64"]) == out, "done is done"
    with pytest.raises(ValueError, match="begun with other settings: decay was 'alibi' and is 'none'"):
        run(teacher, out, "supra", [*given, "finetune.tokens=64", "decay=none"])


def test_settings_may_change_until_something_is_learned(teacher: Path, given: list[str], tmp_path: Path) -> None:
    """A wrong path does not lock a folder; what weights do not depend on changes whenever."""
    keys = [*given, "finetune.tokens=64"]
    with pytest.raises((ValueError, FileNotFoundError), match="nowhere"):
        run(teacher, tmp_path / "out", "supra", [*keys, f"data.corpus.source={tmp_path / 'nowhere'}"])
    out = run(teacher, tmp_path / "out", "supra", keys)
    assert run(teacher, out, "supra", [*keys, "run.log_every=2", "checkpoint.every=3"]) == out
    with pytest.raises(ValueError, match=r"data\.batch_size was 2 and is 4"):
        run(teacher, out, "supra", [*keys, "data.batch_size=4"])
    with pytest.raises(ValueError, match="recipe was 'supra' and is 'hedgehog'"):
        run(teacher, out, "hedgehog", given)


def test_another_tokenizer_is_refused(teacher: Path, given: list[str], tmp_path: Path) -> None:
    """One whose ids fit, and mean something else to the teacher."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"one": 0, "two": 1, "[UNK]": 2}, "[UNK]"))
    words.save(str(tmp_path / "words.json"))
    with pytest.raises(ValueError, match=r"tokenizer: .*words\.json is another than the teacher's: id 0 is"):
        run(teacher, tmp_path / "out", "supra", [*given, f"tokenizer={tmp_path / 'words.json'}"])


def test_the_command(teacher: Path, given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    for arguments in (
        ["linearize", str(teacher), out, "--recipe", "hedgehog", *given, *STEPS, "--dry-run"],
        ["linearize", str(teacher), out, "--recipe", "hedgehog", *given, *STEPS],
        ["evaluate", "perplexity", out, str(tmp_path / "text.txt"), "--max-tokens", "500"],
        ["generate", out, "3 times 3 is", "--max-tokens", "3"],
    ):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert "tokens: 256" in printed and "done: the model is in" in printed and "bits/byte" in printed
