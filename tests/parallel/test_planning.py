"""The planner against what is: counted parameters, counted bytes, measured peaks, and the 7B built over 256 ranks."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from megalodon import PRESETS, MegalodonConfig
from megalodon.cli import main
from megalodon.parallel import MeshSizes
from megalodon.parallel.hardware import HARDWARE
from megalodon.parallel.memory import block_activations, saved_bytes
from megalodon.parallel.mesh import mesh_problems, tensor_problems
from megalodon.parallel.planning import Job, candidates, default_rows, make_plan, model_flops, plans
from megalodon.parallel.report import report
from megalodon.parallel.traffic import (
    Step,
    block_parameters,
    end_parameters,
)
from megalodon.training import count_parameters


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_are_counted_as_they_are(name):
    config = MegalodonConfig.from_preset(name)
    assert config.num_layers * sum(block_parameters(config)) + sum(end_parameters(config)) == count_parameters(config)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("swiglu", [True, False])
def test_saved_activations_of_another_shape_are_predicted(precision, swiglu):
    config = MegalodonConfig(
        vocab_size=64,
        num_layers=1,
        model_dim=160,
        z_dim=48,
        value_dim=288,
        num_heads=2,
        ffn_hidden_dim=352,
        cema_ndim=8,
        chunk_size=256,
        norm_num_groups=16,
        swiglu=swiglu,
    )
    step = Step(rows=1, parts=1, length=2048, bytes_=2 if precision == "bfloat16" else 4, checkpointing=False)
    predicted = block_activations(config, MeshSizes(), step)
    counted = saved_bytes(config, 3072, precision) - saved_bytes(config, 1024, precision)
    assert predicted == pytest.approx(counted, rel=0.1)


def test_plans_fit_and_are_ordered():
    job = Job(MegalodonConfig.from_preset("paper-7b"), 64, 32768, 128)
    found = plans(job, HARDWARE["h100"])
    assert [plan.seconds for plan in found] == sorted(plan.seconds for plan in found)
    for plan in found:
        assert plan.sizes.world_size == 64
        assert plan.memory.total < HARDWARE["h100"].memory
        assert 0 < plan.utilisation < HARDWARE["h100"].efficiency
    assert f"shard: {found[0].sizes.shard}" in report(job, HARDWARE["h100"], found, 3)


def test_candidates_divide_the_model():
    config = MegalodonConfig.from_preset("200m")  # one head
    assert {sizes.tensor for sizes in candidates(Job(config, 8, 4096, 64), HARDWARE["h100"])} == {1}
    assert tensor_problems(2, config) == ["mesh.tensor: 2 does not divide model.num_heads 1"]


def test_sharding_saves_memory_and_recomputing_costs_time():
    job = Job(MegalodonConfig.from_preset("1.3b"), 8, 8192, 64)
    hardware = HARDWARE["h100"]
    copies, sharded = (make_plan(job, hardware, MeshSizes(**{axis: 8}), 8, False) for axis in ("replicate", "shard"))
    assert sharded.memory.optimizer == copies.memory.optimizer / 8
    again = make_plan(job, hardware, MeshSizes(shard=8), 8, True)
    assert again.memory.activations < sharded.memory.activations / 4
    assert again.compute == pytest.approx(sharded.compute * 4 / 3)
    assert model_flops(job.config, 8192) * 64 * 8192 == again.flops


def test_the_command(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--model", "1.3b", "--devices", "8", "--context", "8192"])
    assert ended.value.code == 0
    assert "mesh: {replicate: " in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--model", "paper-7b", "--devices", "1", "--context", "32768", "--batch-size", "1"])
    assert ended.value.code == 2
    assert re.search("no mesh of 1 devices .* the leanest needs .* GiB on each", capsys.readouterr().err)
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--model", "1.3b", "--devices", "6", "--context", "8192", "--batch-size", "8"])
    assert ended.value.code == 2
    assert "a batch size that 6 divides always can" in capsys.readouterr().err


@pytest.mark.parametrize("name", PRESETS)
def test_any_number_of_devices_has_a_plan(name):
    config = MegalodonConfig.from_preset(name)
    for devices in (3, 6, 7, 24, 100, 1000, 1009):
        if config.model_dim > 2048 and devices == 3:
            continue  # too little memory
        job = Job(config, devices, 8192, default_rows(devices, 8192))
        best = plans(job, HARDWARE["h100"])[0]
        assert best.sizes.world_size == devices
        assert (
            mesh_problems(
                best.sizes,
                config,
                world_size=devices,
                batch_size=job.batch_size,
                sequence_length=job.context,
                accumulation_steps=best.accumulation_steps,
            )
            == []
        )


BUILD = """
import sys, torch, torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from megalodon import MegalodonConfig, MegalodonForCausalLM
from megalodon.parallel import Mesh, MeshSizes, ParallelModel, Rows

config = MegalodonConfig.from_preset("paper-7b")
sizes = MeshSizes(replicate=2, shard=8, tensor=4, chunk=4)
dist.init_process_group("fake", store=FakeStore(), rank=int(sys.argv[1]), world_size=256)
with torch.device("meta"):
    whole = MegalodonForCausalLM(config)
model = ParallelModel(whole, Mesh(sizes, "cpu"), torch.device("meta"))
print(sum(p.to_local().numel() for p in model.parameters()), sum(p.numel() for p in model.parameters()))
if len(sys.argv) > 2:
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        model.device = torch.device("cpu")
        ids = torch.zeros(1, 32768, dtype=torch.int64)
        model.accumulate_gradients([Rows(ids, ids, None, None, False)], 1.0)
    print(sum(p.grad.to_local().numel() for p in model.parameters()))
"""


def built(*arguments: str) -> list[int]:
    command = [sys.executable, "-W", "ignore", "-c", BUILD, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [int(number) for number in done.stdout.split()]


def test_the_7b_on_256_ranks_is_built_as_planned():
    own, whole = built("0")
    assert whole == 7_385_817_088
    assert own == pytest.approx(whole / 128, rel=1e-3)  # two copies; rows that do not divide fall to the first ranks


@pytest.mark.slow
def test_the_7b_on_256_ranks_computes_gradients_of_fake_tensors():
    own, _, gradients = built("77", "step")
    assert gradients == own
