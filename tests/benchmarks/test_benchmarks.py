"""The benchmarks' own arithmetic: order, extrapolation, budgets, ratios, tables, and the exact moments of a stream."""

from __future__ import annotations

import importlib
import itertools
import json
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).resolve().parent.parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts import one another by name, as they do when run with `python benchmarks/NAME.py`."""
    monkeypatch.syspath_prepend(str(FOLDER))


def load(name: str) -> ModuleType:
    module = importlib.import_module(name)
    assert Path(str(module.__file__)).parent == FOLDER
    return module


# Rounds --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_every_name_runs_first_and_last_equally_often(count: int) -> None:
    names = [f"model {i}" for i in range(count)]
    orders = [load("_measure").alternating_order(names, index) for index in range(2 * count)]
    assert all(sorted(order) == names for order in orders)
    assert set(Counter(order[0] for order in orders).values()) == {2}
    assert set(Counter(order[-1] for order in orders).values()) == {2}


def sample(round_index: int, **seconds: float) -> Any:
    return load("_measure").Sample(round_index, 1, seconds)


def test_ratios_pair_samples_of_the_same_round() -> None:
    slow = [sample(0, step=4.0, other=9.0), sample(1, step=6.0, other=9.0), sample(2, step=100.0, other=9.0)]
    fast = [sample(1, step=3.0, other=1.0), sample(0, step=1.0, other=1.0)]
    assert load("_measure").paired_ratios(slow, fast, ["step"]) == [4.0, 2.0]


def test_ratio_without_a_common_round_is_refused() -> None:
    with pytest.raises(ValueError, match="share no round"):
        load("_measure").paired_ratios([sample(0, step=1.0)], [sample(1, step=1.0)], ["step"])


# Prediction and budget -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("points", "length", "expected"),
    [
        ([(64, 1.0)], 256, 4.0),  # one point: linear
        ([(64, 1.0), (128, 2.0)], 512, 8.0),
        ([(64, 1.0), (128, 4.0)], 256, 16.0),  # quadratic
        ([(64, 1.0), (128, 1.1)], 256, 2.2),  # overhead does not promise a growth below linear
        ([(64, 1.0), (128, 64.0)], 256, 256.0),  # noise does not promise one above quadratic
        ([(64, 9.0), (128, 2.0), (256, 4.0)], 512, 8.0),  # the last two points decide
    ],
)
def test_extrapolation(points: list[tuple[int, float]], length: int, expected: float) -> None:
    assert load("_measure").extrapolate(points, length) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("budget", "prepare", "call", "expected"), [(100, 0, 1, 5), (6, 0, 1.5, 3), (6, 3, 1.5, 1), (2, 0, 1.5, 0)]
)
def test_rounds_that_a_budget_pays_for(budget: float, prepare: float, call: float, expected: int) -> None:
    assert load("_measure").affordable_rounds(5, budget, prepare, call) == expected


def pretend(contestant: str, seconds_per_token: float, length: int, calls: list[tuple[str, int]]) -> Any:
    """A workload that only says how long it took."""

    def prepare(at: int) -> Any:
        def call() -> dict[str, float]:
            calls.append((contestant, at))
            return {"step": seconds_per_token * at}

        return call

    return load("_measure").Workload(contestant, "train", length, prepare)


def test_meter_measures_in_alternating_rounds() -> None:
    calls: list[tuple[str, int]] = []
    meter = load("_measure").Meter(rounds=3, budget_seconds=100, min_seconds=0, say=lambda line: None)
    cells = meter.measure({name: pretend(name, 1e-3, 512, calls) for name in ("a", "b")})
    assert [name for name, length in calls[-6:]] == ["a", "b", "b", "a", "b", "a"]
    assert all(cell.status == "measured" for cell in cells.values())
    assert [s.seconds["step"] for s in cells["a"].samples] == pytest.approx([0.512] * 3)


def test_meter_repeats_short_calls_within_a_round() -> None:
    meter = load("_measure").Meter(rounds=1, budget_seconds=100, min_seconds=1.0, say=lambda line: None)
    assert meter.measure({"a": pretend("a", 1e-3, 100, [])})["a"].samples[0].repeats == 10


def test_meter_skips_what_the_budget_forbids_and_says_why_without_calling_it() -> None:
    calls: list[tuple[str, int]] = []
    meter = load("_measure").Meter(rounds=3, budget_seconds=10, min_seconds=0, say=lambda line: None)
    workloads = {"fast": pretend("fast", 1e-5, 8192, calls), "slow": pretend("slow", 1e-2, 8192, calls)}
    cells = meter.measure(workloads)
    assert len(cells["fast"].samples) == 3
    assert cells["slow"].status == "skipped" and not cells["slow"].samples
    assert "would take 81.9 s a call" in cells["slow"].reason and "the budget is 10 s" in cells["slow"].reason
    assert ("slow", 8192) not in calls


def test_meter_gives_a_slow_workload_the_rounds_it_can_afford() -> None:
    meter = load("_measure").Meter(rounds=5, budget_seconds=4.5, min_seconds=0, say=lambda line: None)
    assert len(meter.measure({"slow": pretend("slow", 1e-3, 1000, [])})["slow"].samples) == 3


def test_meter_records_a_failure_and_goes_on() -> None:
    measure = load("_measure")

    def broken(length: int) -> Any:
        raise RuntimeError("no such kernel")

    meter = measure.Meter(rounds=1, budget_seconds=10, min_seconds=0, say=lambda line: None)
    cells = meter.measure(
        {"broken": measure.Workload("broken", "train", 64, broken), "ok": pretend("ok", 1e-3, 64, [])}
    )
    assert cells["broken"].status == "failed" and "RuntimeError: no such kernel" in cells["broken"].reason
    assert len(cells["ok"].samples) == 1


def test_meter_skips_what_would_not_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    measure = load("_measure")
    monkeypatch.setattr(measure, "free_memory", lambda: 1_000_000)
    meter = measure.Meter(rounds=1, budget_seconds=10, min_seconds=0, say=lambda line: None)
    workload = pretend("a", 1e-6, 4096, [])
    meter.history[workload.history_key] = {1024: measure.Cost(1024, 0.0, 1e-3, 300_000)}
    cell = meter.measure({"a": workload})["a"]
    assert cell.status == "skipped" and "would need" in cell.reason


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux resets its high-water mark of memory")
def test_peak_memory_sees_what_was_freed_again() -> None:
    with load("_measure").peak_memory() as peak:
        torch.ones(20_000_000).sum()
    if not peak:
        pytest.skip("this system does not let a process reset its high-water mark")
    assert 70e6 < peak[0] < 200e6


@pytest.mark.parametrize(("seconds", "text"), [(1.234, "1.23 s"), (600, "10 min"), (36000, "10 h")])
def test_duration(seconds: float, text: str) -> None:
    assert load("_measure").duration(seconds) == text


# Reports -------------------------------------------------------------------------------------------------------------


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = load("_report")
    path = tmp_path / "result.json"
    report.write_atomically(path, "old")

    def full(self: Path, target: Path) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", full)
        with pytest.raises(OSError, match="disk full"):
            report.write_atomically(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_table_aligns_and_escapes() -> None:
    table = load("_report").markdown_table(["n", "name "], [["1", "a|b"]])
    assert table.splitlines() == ["| n | name |", "| --: | --- |", "| 1 | a\\|b |"]
    with pytest.raises(ValueError, match="1 cells where the header has 2"):
        load("_report").markdown_table(["n", "name "], [["1"]])


def test_machine_slug() -> None:
    assert load("_machine").machine_slug({"cpu": "AMD EPYC (7763)", "threads": 2}) == "amd-epyc-7763-2-threads"


# The comparison ------------------------------------------------------------------------------------------------------


def comparison_group(section: str, seconds: dict[str, list[float]], length: int = 512) -> Any:
    measure, tables = load("_measure"), load("_tables")
    phases = {"train": "forward_backward", "prefill": "prefill", "decode": "decode"}
    extra = {"optimizer": 0.5} if section == "train" else {}
    cells = [
        measure.Cell(name, length, samples=[sample(i, **{phases[section]: s}, **extra) for i, s in enumerate(values)])
        for name, values in seconds.items()
    ]
    return tables.Group(section, "float32", "", cells)


def test_rates_and_ratios_of_a_training_group() -> None:
    tables = load("_tables")
    group = comparison_group("train", {"megalodon": [0.5, 0.5, 1.5], "llama": [1.5, 2.5, 1.5]})
    ours, llama = tables.derive(group, "megalodon", {"megalodon": 10**7, "llama": 10**7}, gemm_gflops=60.0)
    assert ours.tokens_per_second.median == 512 and ours.without_optimizer.median == 1024
    assert ours.ours_over_this is None
    assert (llama.ours_over_this.minimum, llama.ours_over_this.median, llama.ours_over_this.maximum) == (1.0, 2.0, 3.0)
    assert ours.share_of_gemm == pytest.approx(6 * 1e7 * 512 / 60e9)
    assert json.dumps(tables.as_json(group, [ours, llama]))


def test_a_skipped_peer_shows_its_reason_and_no_ratio() -> None:
    measure, tables = load("_measure"), load("_tables")
    group = comparison_group("prefill", {"megalodon": [1.0]})
    group.cells.append(measure.Cell("mamba", 512, "skipped", "skipped: would take 3 h a call"))
    rows = tables.derive(group, "megalodon", {}, 60.0)
    assert rows[1].ours_over_this is None
    assert "skipped: would take 3 h a call" in tables.group_table(group, rows)


def test_targets_are_judged_by_this_runs_ratios() -> None:
    tables = load("_tables")
    groups = []
    for group in (
        comparison_group("train", {"megalodon": [1.0], "llama": [1.5]}, length=512),
        comparison_group("train", {"megalodon": [1.0], "llama": [1.5]}, length=8192),
        comparison_group("decode", {"megalodon": [16 * 0.004]}, length=16384),
    ):
        groups.append((group, tables.derive(group, "megalodon", {"megalodon": 1, "llama": 1}, 60.0)))
    assert groups[-1][1][0].milliseconds_per_token.median == pytest.approx(4.0)
    judged = [(t["wanted"], t["reached"]) for t in tables.targets(groups, "megalodon")]
    assert judged == [
        ("1 times llama's speed at 512", True),
        ("2 times llama's speed at 8192", False),
        ("under 8 ms at 16384", True),
    ]


def test_flatness_compares_costs_per_token() -> None:
    measure, tables = load("_measure"), load("_tables")
    cells = [
        measure.Cell("megalodon", length, samples=[sample(0, forward_backward=seconds, optimizer=9.0)])
        for length, seconds in ((1000, 1.0), (2000, 2.2), (4000, 4.0))
    ]
    rows = tables.derive(tables.Group("flatness", "float32", "", cells), "megalodon", {"megalodon": 1}, 60.0)
    ratio, shortest, longest = tables.flatness(rows)
    assert ratio == pytest.approx(1.1) and (shortest, longest) == (1000, 4000)


def test_plan_puts_contestants_of_one_length_into_one_group() -> None:
    peers = load("cpu_peers")
    lengths = {
        peers.Section.decode: peers.Lengths((128, 256), (4096,)),
        peers.Section.flatness: peers.Lengths((), (64, 128)),
    }
    plans = peers.plan_groups(list(lengths), ["megalodon", "llama"], lengths, bf16=False)
    assert [plan.members for plan in plans] == [
        (("megalodon", 128), ("llama", 128)),
        (("megalodon", 256), ("llama", 256)),
        (("megalodon", 4096),),
        (("megalodon", 64), ("megalodon", 128)),
    ]
    both = peers.plan_groups(list(lengths), ["megalodon"], lengths, bf16=True)
    assert {(plan.section, plan.precision) for plan in both} == {
        ("decode", "float32"),
        ("decode", "bf16-weights"),
        ("flatness", "float32"),
        ("flatness", "bf16-autocast"),
    }


@pytest.mark.parametrize(("target", "expected"), [(1005, 10), (1050, 10), (1060, 11), (1, 1)])
def test_nearest_size(target: int, expected: int) -> None:
    assert load("_workloads").nearest_size(target, lambda size: 100 * size + 5) == expected


def test_peers_have_nearly_our_size() -> None:
    workloads = load("_workloads")
    ours = workloads.build_megalodon().parameters
    assert ours == pytest.approx(16e6, rel=0.01)
    assert workloads.build_llama(ours).parameters == pytest.approx(ours, rel=0.01)
    assert workloads.build_mamba(ours).parameters == pytest.approx(ours, rel=0.05)


def test_another_implementation_comes_from_a_file(tmp_path: Path) -> None:
    workloads = load("_workloads")
    path = tmp_path / "other.py"
    path.write_text(
        "import torch\nNAME = 'other'\ndef build(**sizes):\n    return torch.nn.Linear(sizes['width'], 2)\n"
    )
    other = workloads.build_also(str(path), 16_000_000)
    assert (other.name, other.parameters) == ("other", 2 * 384 + 2)
    path.write_text("")
    with pytest.raises(ValueError, match="must define build"):
        workloads.build_also(str(path), 1)
    for missing in (str(tmp_path / "none.py"), "no_such_module_of_anyone"):
        with pytest.raises(ValueError, match="--also"):
            workloads.build_also(missing, 1)


# Packing and the norm's stream ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [16, 256, 2048, 8192])
def test_documents_fill_the_row(length: int) -> None:
    packing = load("packing")
    for distribution in packing.DISTRIBUTIONS:
        lengths = packing.document_lengths(distribution, length)
        assert sum(lengths) == length and min(lengths) >= 1
        ids = packing.segment_ids(lengths)
        assert ids.shape == (1, length)
        assert [len(list(run)) for _, run in itertools.groupby(ids[0].tolist())] == lengths


def test_unknown_distribution_is_refused() -> None:
    with pytest.raises(ValueError, match="'weekly' is unknown"):
        load("packing").document_lengths("weekly", 100)


def test_exact_moments_equal_those_of_the_whole_stream() -> None:
    script = load("timestep_norm_stream")
    pieces = list(script.stream(total=3000, piece=700, single=50))
    assert [len(piece) for piece in pieces] == [700, 700, 700, 700, 150, *[1] * 50]
    exact = script.Moments()
    for piece in pieces:
        exact.add(piece)
    whole = torch.cat(pieces).double().view(3000, script.GROUPS, -1)
    torch.testing.assert_close(exact.mean, whole.mean((0, 2)), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(exact.var, whole.var((0, 2), correction=0), rtol=1e-11, atol=0)


def test_relative_error_of_a_mean_near_zero_is_taken_from_the_deviation() -> None:
    values = [torch.tensor([v], dtype=torch.float64) for v in (0.1, 5.0, 0.0, 4.0)]
    mean_error, var_error = load("timestep_norm_stream").relative_errors(*values)
    assert mean_error.item() == pytest.approx(0.05) and var_error.item() == pytest.approx(0.25)


def test_the_stream_script_notices_a_wrong_state() -> None:
    script = load("timestep_norm_stream")
    exact, state = script.Moments(), script.Carried(torch.float64)
    for piece in script.stream(total=600, piece=200, single=10):
        exact.add(piece)
        state.add(piece)
    assert max(state.compare(exact)) < 1e-5
    state.mean = state.mean + 0.01
    assert state.compare(exact)[0] > 1e-5
    state.count = state.count + 1
    with pytest.raises(ValueError, match="counts 601 tokens where 600 were fed"):
        state.compare(exact)


# Servers side by side ------------------------------------------------------------------------------------------------


def test_changed_prompts_part_where_they_say() -> None:
    module = load("_divergence")
    asked = module.requests(5000)
    document = asked["a document"][1]["prompt"]
    for name, at in (("changed at 60 %", 3000), ("changed at 60 % again", 3000), ("changed at 99 %", 4950)):
        path, body, distance = asked[name]
        prompt = body["prompt"]
        same = next(i for i, (a, b) in enumerate(zip(prompt, document, strict=True)) if a != b)
        assert path == "/v1/completions" and same == at and distance == 5000 - at
    assert asked["changed at 60 %"][1] != asked["changed at 60 % again"][1]
    whole, edited = asked["a conversation"][1]["messages"], asked["its last message edited"][1]["messages"]
    assert whole[:-1] == edited[:-1] and whole[-1] != edited[-1] and whole[-1]["role"] == "user"
    branched = asked["branched at 60 % of it"][1]["messages"]
    assert branched[:-1] == whole[: len(branched) - 1] and branched[-1] != whole[len(branched) - 1]


def test_tables_of_servers_judge_by_their_aims() -> None:
    module = load("_divergence")
    samples = {"short": [{"worst": 0.1, "median": 0.02}] * 2, "long": [{"worst": 0.15, "median": 0.03}] * 2}
    result = {"samples": {"now": samples}, "commits": {"now": "abc"}, "bytes": 12_000_000}
    assert "Measured: 1.50x" in "\n".join(module.gap_parts(result))
    answer = {"text": "a", "tokens": 1000, "read": 1000, "seconds": 1.0}
    answers = {
        "now": {"one": answer, "two": {**answer, "read": 700}},
        "cold": {"one": answer, "two": answer | {"text": "b"}},
    }
    counted = {"answers": answers, "commits": {"now": "abc"}, "changed": {"one": 1000, "two": 100}, "chunk": 512}
    text = "\n".join(module.divergent_parts(counted))
    assert "1 of 2 requests; 1 of 2 answers equal" in text and "| 1,637 |" in text and "| 624 |" in text


def test_a_build_before_must_be_one(tmp_path: Path) -> None:
    module = load("_servers")
    assert [build.name for build in module.builds(None)] == ["now"]
    with pytest.raises(FileNotFoundError, match="no src/megalodon"):
        module.builds(tmp_path)
