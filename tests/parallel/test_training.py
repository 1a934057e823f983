"""`train` on a mesh: equal to one process, resumed on any other mesh, and clear when something is wrong."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from living import Living
from torch.distributed.checkpoint import FileSystemWriter
from transformers import AutoModelForCausalLM

from megalodon import MegalodonConfig, cli
from megalodon.data import Loader
from megalodon.inference import load_model
from megalodon.parallel import ParallelModel, sharded
from megalodon.training import launch, mesh_run, processes, start
from megalodon.training.checkpoint import list_checkpoints
from megalodon.training.config_file import check_config
from megalodon.training.metrics import read_lines

WORDS = ("the ", "model ", "reads ", "a ", "long ", "text ", "and ", "keeps ", "what ", "it ", "has ", "seen ")


@pytest.fixture
def values(tmp_path: Path) -> dict:
    """A config of 8 steps in `tmp_path/run`."""
    corpus = tmp_path / "texts"
    corpus.mkdir()
    generator = torch.Generator().manual_seed(3)
    for number in range(4):
        picks = torch.randint(len(WORDS), (300 + 100 * number,), generator=generator)
        (corpus / f"{number}.txt").write_text("".join(WORDS[i] for i in picks.tolist()))
    return {
        "model": {
            "num_layers": 2,
            "model_dim": 32,
            "z_dim": 16,
            "value_dim": 32,
            "num_heads": 2,
            "ffn_hidden_dim": 48,
            "norm_num_groups": 4,
            "cema_ndim": 4,
            "chunk_size": 16,
            "vocab_size": 320,
        },
        "data": {
            "corpus": {"source": str(corpus)},
            "held_out": {"documents": 1},
            "sequence_length": 24,
            "batch_size": 8,
            "cache_folder": str(tmp_path / "cache"),
        },
        "schedule": {"kind": "constant"},
        "run": {"steps": 8, "folder": str(tmp_path / "run"), "accumulation_steps": 2},
        "evaluation": {"every": 5, "max_tokens": 400},
        "checkpoint": {"every": 3},
        "mesh": {"timeout_seconds": 300},
    }


def with_changes(values: dict, steps: int | None = None, folder: str | None = None, **mesh) -> dict:
    run = {**values["run"], **({} if steps is None else {"steps": steps})}
    if folder is not None:
        run["folder"] = str(Path(run["folder"]).parent / folder)
    return {**values, "run": run, "mesh": {**values["mesh"], **mesh}}


def train(values: dict) -> str:
    """The run on this process; what stopped it, if anything did."""
    for module in (launch, mesh_run):
        module.measure_peak_flops = lambda device, dtype: 1e9
    try:
        stop = start.train(launch.resolve(check_config(values, "test"), "test"))
    except (Exception, SystemExit) as error:
        return f"{type(error).__name__}: {error}"
    return "done" if stop.signal is None else stop.signal.name


def train_with(sabotage, values: dict) -> str:
    """`train` after `sabotage(rank)`, which returns how to undo it."""
    undo = sabotage(int(os.environ["RANK"]))
    try:
        return train(values)
    finally:
        undo()


def records(folder: Path) -> list[dict]:
    kept = ("step", "loss", "grad_norm", "tokens", "heldout_loss")
    return [{key: record[key] for key in kept if key in record} for record in read_lines(folder / "metrics.jsonl")]


def assert_same_run(one: Path, other: Path) -> None:
    ours, theirs = records(one), records(other)
    assert [list(record) for record in ours] == [list(record) for record in theirs]
    for mine, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(list(mine.values()), list(their.values()), rtol=1e-5, atol=1e-5)
    models = [AutoModelForCausalLM.from_pretrained(folder / "model") for folder in (one, other)]
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert (p - q).abs().max() < 1e-5, name


def other_meshes() -> list:
    quick = [(2, {"tensor": 2}), (2, {"pipeline": 2}), (1, {})]
    slow = [(8, {"shard": 2, "chunk": 2, "tensor": 2}), (4, {"replicate": 2, "shard": 2}), (4, {"chunk": 4})]
    return [*quick, *(pytest.param(*case, marks=pytest.mark.slow) for case in slow)]


@pytest.mark.parametrize("mode", ["streamed"])
@pytest.mark.parametrize(("world_size", "mesh"), other_meshes())
def test_saved_on_four_resumed_elsewhere_equals_one_process(ranks, values, tmp_path, world_size, mesh, mode):
    values["data"]["mode"] = mode
    assert train(with_changes(values, folder="whole")) == "done"
    assert set(ranks.launch(4, train, with_changes(values, steps=5, shard=2, chunk=2))) == {"done"}
    assert set(ranks.launch(world_size, train, with_changes(values, **mesh))) == {"done"}
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_a_pipeline_with_tied_embeddings_is_saved_and_resumed_elsewhere(ranks, values, tmp_path):
    values["model"]["share_emb"] = True
    assert train(with_changes(values, folder="whole")) == "done"
    assert set(ranks.launch(4, train, with_changes(values, steps=5, pipeline=2, shard=2))) == {"done"}
    assert set(ranks.launch(4, train, with_changes(values, pipeline=2, tensor=2))) == {"done"}
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_fine_tuning_starts_from_the_same_weights(ranks, values, tmp_path):
    assert train(with_changes(values, steps=2, folder="first")) == "done"
    values["model"] = {"init_from": str(tmp_path / "first")}
    assert train(with_changes(values, steps=3, folder="whole")) == "done"
    assert set(ranks.launch(2, train, with_changes(values, steps=3, shard=2))) == {"done"}
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_a_checkpoint_is_made_whole_a_few_parameters_at_a_time(ranks, values, tmp_path, monkeypatch):
    assert set(ranks.launch(2, train, with_changes(values, steps=3, shard=2))) == {"done"}
    (checkpoint,) = list_checkpoints(tmp_path / "run" / "checkpoints")
    largest = max(shape.numel() * dtype.itemsize for shape, dtype in sharded.weight_shapes(checkpoint).values())
    monkeypatch.setattr(sharded, "BYTES_AT_ONCE", largest)
    (tmp_path / "model").mkdir()
    with Living() as living:
        sharded.write_whole_model(checkpoint, tmp_path / "model", MegalodonConfig.from_pretrained(checkpoint / "model"))
    models = [AutoModelForCausalLM.from_pretrained(folder / "model") for folder in (tmp_path, tmp_path / "run")]
    total = sum(p.nbytes for p in models[0].parameters())
    assert living.peak < 3 * largest < total  # what a file takes, what is read for it, and what is copied
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(p, q), name


def test_one_process_goes_on_without_a_launcher(ranks, values, tmp_path):
    assert train(with_changes(values, folder="whole")) == "done"
    assert set(ranks.launch(2, train, with_changes(values, steps=5, shard=2))) == {"done"}
    assert train(with_changes(values)) == "done"
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh": {"shard": 4}}, "makes 4 processes, and there are 2"),
        ({"mesh": {"tensor": 2}, "model": {"num_heads": 1}}, "mesh.tensor: 2 does not divide model.num_heads 1"),
        ({"mesh": {"shard": 2}, "data": {"batch_size": 2}}, "data.batch_size 2 must be a multiple of"),
        ({"mesh": {"chunk": 2}, "data": {"sequence_length": 1}}, "need at least as many tokens"),
        ({"mesh": {"pipeline": 2}, "model": {"num_layers": 1}}, "model.num_layers is 1"),
        ({"mesh": {"pipeline": 2}, "run": {"accumulation_steps": 1}}, "they must be a multiple of the 2 stages"),
        ({"mesh": {"pipeline": 2, "virtual_stages": 2}}, "2 x virtual_stages 2 stages need at least as many layers"),
        ({"mesh": {"shard": 2}, "sampling": {"every": 2}}, "does not sample"),
    ],
)
def test_a_mesh_that_cannot_work_is_one_error(ranks, values, changes, message):
    changed = {**values, **{key: {**values.get(key, {}), **section} for key, section in changes.items()}}
    first, second = ranks.launch(2, train, changed)
    assert message in first
    assert second == "QuietExit: 2"
    assert not Path(values["run"]["folder"]).exists()


def test_a_mesh_without_a_launcher_says_how_to_launch(values):
    with pytest.raises(ValueError, match="torchrun --nproc-per-node=4"):
        start.train(launch.resolve(check_config(with_changes(values, shard=2, tensor=2), "test"), "test"))


def test_another_process_leaves_bad_input_to_the_first(monkeypatch, capsys):
    waits: list[float] = []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(cli.time, "sleep", waits.append)
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", "missing.yaml"])
    assert ended.value.code == 2
    assert waits == [cli.SECONDS_FOR_THE_FIRST]
    assert "missing.yaml" in capsys.readouterr().err


def old_torch(rank: int):
    mesh_run.CAN_MEASURE = False

    def undo() -> None:
        mesh_run.CAN_MEASURE = True

    return undo


def test_a_pipeline_needs_a_newer_torch(ranks, values):
    first, second = ranks.launch(2, train_with, old_torch, with_changes(values, pipeline=2))
    assert "mesh.pipeline: 2 needs PyTorch 2.9 or later" in first
    assert second == "QuietExit: 2"


def other_version(rank: int):
    if rank == 0:
        return lambda: None
    before = processes.versions
    mesh_run.versions = lambda: "torch 1.0"

    def undo() -> None:
        mesh_run.versions = before

    return undo


def test_other_versions_are_refused(ranks, values):
    first, second = ranks.launch(2, train_with, other_version, with_changes(values, shard=2))
    assert first.startswith("ValueError: versions: rank 0 has 'megalodon")
    assert "rank 1 has 'torch 1.0'" in first
    assert second == "QuietExit: 2"


def test_a_checkpoint_of_another_model_is_refused(ranks, values, tmp_path):
    assert set(ranks.launch(2, train, with_changes(values, steps=3, shard=2))) == {"done"}
    folder = list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    assert json.loads((folder / "trainer.json").read_text())["step"] == 3
    values["model"]["ffn_hidden_dim"] = 40
    first, second = ranks.launch(2, train, with_changes(values, shard=2))
    assert "model.ffn_hidden_dim: 48 before, 40 now" in first
    assert second == "QuietExit: 2"


def own_copy(rank: int):
    """Each rank in a folder of its own, where its copy of the text lies."""
    before = Path.cwd()
    os.chdir(Path(os.environ["COPIES"]) / str(rank))
    return lambda: os.chdir(before)


def with_copies(values: dict, tmp_path: Path, monkeypatch) -> dict:
    """The values, with the text at a relative path and a copy of it, made at another time, for each of two ranks."""
    for rank in range(2):
        shutil.copytree(values["data"]["corpus"]["source"], tmp_path / "copies" / str(rank) / "texts")
        for path in (tmp_path / "copies" / str(rank) / "texts").iterdir():
            os.utime(path, (rank + 1, rank + 1))
    values["data"] |= {"corpus": {"source": "texts"}, "cache_folder": "cache"}
    return with_changes(values, shard=2)


def train_on_copies(copies: str, values: dict) -> str:
    os.environ["COPIES"] = copies
    return train_with(own_copy, values)


def test_each_rank_may_have_its_own_copy_and_resume_from_it(ranks, values, tmp_path, monkeypatch):
    assert train(with_changes(values, folder="whole")) == "done"
    copied = with_copies(values, tmp_path, monkeypatch)
    copies = str(tmp_path / "copies")
    assert ranks.launch(2, train_on_copies, copies, with_changes(copied, steps=5, shard=2)) == ["done", "done"]
    for path in (tmp_path / "copies" / "1" / "texts").iterdir():
        path.touch()
    assert ranks.launch(2, train_on_copies, copies, copied) == ["done", "done"]
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    steps = [record["documents"] for record in read_lines(tmp_path / "run" / "metrics.jsonl")[1:]]
    whole = [record["documents"] for record in read_lines(tmp_path / "whole" / "metrics.jsonl")[1:]]
    assert steps == whole


def test_a_copy_that_was_cut_short_is_refused_before_the_first_step(ranks, values, tmp_path, monkeypatch):
    copied = with_copies(values, tmp_path, monkeypatch)
    last = tmp_path / "copies" / "1" / "texts" / "3.txt"
    whole = last.read_text()
    last.write_text(whole[:-100])
    first, second = ranks.launch(2, train_on_copies, str(tmp_path / "copies"), copied)
    assert first.startswith("ValueError: rank 1: the ") and " on rank 0, " in first and " here" in first
    assert "Give all ranks the same files" in first and second == "QuietExit: 2"
    last.write_text(whole[:-2] + "x\n")
    first, _ = ranks.launch(2, train_on_copies, str(tmp_path / "copies"), copied)
    assert "than rank 0's: as many documents and tokens" in first
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_advice_of_a_mesh_checkpoint_works_as_printed(ranks, values, tmp_path):
    """Its weights start another run, on one process and on many, and are measured as they lie."""
    assert set(ranks.launch(2, train, with_changes(values, steps=3, shard=2))) == {"done"}
    (checkpoint,) = list_checkpoints(tmp_path / "run" / "checkpoints")
    changed = with_changes(values, steps=3, shard=2)
    changed["optimizer"] = {"learning_rate": 1e-4}
    message, _ = ranks.launch(2, train, changed)
    advised = re.search(r"with (model\.init_from=\S+) to keep", message)[1]
    values["model"] = {"init_from": advised.partition("=")[2]}
    assert train(with_changes(values, steps=4, folder="one")) == "done"
    assert set(ranks.launch(2, train, with_changes(values, steps=4, folder="two", shard=2))) == {"done"}
    assert_same_run(tmp_path / "one", tmp_path / "two")
    last = read_lines(tmp_path / "run" / "metrics.jsonl")[-1]["heldout_loss"]
    assert read_lines(tmp_path / "one" / "metrics.jsonl")[0]["heldout_loss"] == pytest.approx(last, rel=1e-5)
    models = [load_model(folder, "cpu") for folder in (checkpoint, tmp_path / "run")]
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(p, q), name


def test_a_mixture_on_a_mesh_is_that_of_one_process(ranks, values, tmp_path):
    data = values["data"]
    sources = {}
    for name, numbers in (("a", (0, 1)), ("b", (2, 3))):
        (tmp_path / name).mkdir()
        for number in numbers:
            shutil.copy(tmp_path / "texts" / f"{number}.txt", tmp_path / name)
        sources[name] = {"corpus": {"source": str(tmp_path / name)}, "held_out": {"documents": 1}, "weight": len(name)}
    values["data"] = {k: v for k, v in data.items() if k not in ("corpus", "held_out")} | {"mixture": sources}
    assert train(with_changes(values, folder="whole")) == "done"
    assert set(ranks.launch(2, train, with_changes(values, shard=2))) == {"done"}
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    one, other = (read_lines(tmp_path / name / "metrics.jsonl")[-1] for name in ("whole", "run"))
    for key in ("heldout_loss/a", "heldout_bits_per_byte/b", "heldout_bits_per_byte"):
        assert one[key] == pytest.approx(other[key], rel=1e-5)


def failing_data(rank: int):
    before = Loader.batch_at

    def batch_at(self, step):
        if rank == 1 and step == 2:
            raise OSError(errno.EIO, "the disk of rank 1 is gone")
        return before(self, step)

    Loader.batch_at = batch_at

    def undo() -> None:
        Loader.batch_at = before

    return undo


def test_a_rank_whose_data_fails_stops_all(ranks, values):
    first, second = ranks.launch(2, train_with, failing_data, with_changes(values, shard=2))
    assert "rank 1" in first
    assert "the disk of rank 1 is gone" in first
    assert second == "QuietExit: 2"


def slow_data(rank: int):
    before = Loader.batch_at

    def batch_at(self, step):
        if rank == 1 and step == 2:
            time.sleep(6)
        return before(self, step)

    Loader.batch_at = batch_at

    def undo() -> None:
        Loader.batch_at = before

    return undo


def test_a_rank_that_does_not_answer_is_named(ranks, values):
    changed = with_changes(values, shard=2, timeout_seconds=3)
    first, second = ranks.launch(2, train_with, slow_data, changed)
    assert "UnresponsiveError: rank 0: step 3" in first
    assert "ranks that have not come to it: 1" in first
    assert "UnresponsiveError" in second


def hanging(rank: int):
    """Rank 1 hangs in the middle of step 3, after it has said that it is there."""
    before, calls = ParallelModel.accumulate_gradients, 0

    def accumulate_gradients(self, *arguments):
        nonlocal calls
        calls += 1
        if rank == 1 and calls == 3:
            time.sleep(8)
        return before(self, *arguments)

    ParallelModel.accumulate_gradients = accumulate_gradients

    def undo() -> None:
        ParallelModel.accumulate_gradients = before

    return undo


@pytest.mark.parametrize("axes", [{"shard": 2}, {"replicate": 2, "chunk": 2}], ids=["whole", "part"])
def test_a_rank_that_hangs_in_a_step_is_named(ranks, values, axes):
    """Also where it is waited for in a group of some of the ranks, which has a timeout of its own."""
    size = math.prod(axes.values())
    ranks.run(size, dist.get_rank)  # processes that were still to start would be late for their meeting
    changed = with_changes(values, **axes, timeout_seconds=3)
    first, second, *others = ranks.launch(size, train_with, hanging, changed)
    assert "UnresponsiveError: rank 0: step 3" in first
    assert "ranks that no longer answer: 1" in first
    assert all("UnresponsiveError" in answer for answer in (second, *others))


def defective(rank: int):
    before = ParallelModel.clip_gradients

    def clip_gradients(self, *arguments):
        if rank == 1:
            raise RuntimeError("out of memory")
        return before(self, *arguments)

    ParallelModel.clip_gradients = clip_gradients

    def undo() -> None:
        ParallelModel.clip_gradients = before

    return undo


def test_a_defect_of_one_rank_is_not_taken_for_the_network(ranks, values):
    first, second = ranks.launch(2, train_with, defective, with_changes(values, shard=2, timeout_seconds=4))
    assert "UnresponsiveError: rank 0: step 1" in first
    assert "ranks that no longer answer: 1" in first
    assert second == "RuntimeError: out of memory"


def failing_disk(rank: int):
    before, calls = FileSystemWriter.write_data, 0

    def write_data(self, plan, planner):
        nonlocal calls
        calls += 1
        if rank == 1 and calls == 2:
            raise OSError(errno.ENOSPC, "no space left")
        return before(self, plan, planner)

    FileSystemWriter.write_data = write_data

    def undo() -> None:
        FileSystemWriter.write_data = before

    return undo


def test_a_failed_save_keeps_the_one_before(ranks, values, tmp_path):
    changed = with_changes(values, shard=2)
    first, second = ranks.launch(2, train_with, failing_disk, changed)
    assert "cannot save a checkpoint" in first
    assert "No space left" in first
    assert second == "QuietExit: 2"
    assert [folder.name for folder in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step-000003"]
    assert set(ranks.launch(2, train, changed)) == {"done"}
    assert train(with_changes(values, folder="whole")) == "done"
    assert_same_run(tmp_path / "whole", tmp_path / "run")
