"""This build beside an earlier one on one CPU: decoding, the engine's slots, reading a prompt, a training step.

Each build lives in a process of its own and waits while the other is measured. A round measures a case in every build,
in alternating order; what is reported are medians over rounds of the ratio within a round. The model is that of
`cpu_peers.py` (16 M parameters), or one of about 100 M.

    git worktree add ../before 8d8b253
    python benchmarks/cpu_builds.py --before ../before/src
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from _machine import describe_machine
from _report import RESULTS, document, new_run, save

MODELS: dict[str, dict[str, Any]] = {
    "16m": {"num_layers": 8, "model_dim": 384, "z_dim": 96, "value_dim": 768, "ffn_hidden_dim": 768, "chunk_size": 512},
    "100m": {
        "num_layers": 12,
        "model_dim": 896,
        "z_dim": 224,
        "value_dim": 1792,
        "ffn_hidden_dim": 1792,
        "chunk_size": 1024,
    },
}
COMMON: dict[str, Any] = {"vocab_size": 256, "num_heads": 1, "swiglu": True, "cema_ndim": 16, "norm_num_groups": 32}
CASES = (
    "weights",
    "memory",
    "decode-1-512",
    "decode-1-16384",
    "decode-1-1048576",
    "decode-4-512",
    "slots-1",
    "slots-8",
    "slots-32",
    "slots-64",
    "prefill-512",
    "prefill-2048",
    "train-1-512",
    "train-1-2048",
    "train-1-8192",
    "train-32-128",
    "trainbf16-1-512",
    "trainbf16-1-2048",
)
DECODED = 16
CPU_TIME = "MEGALODON_BENCHMARK_CPU_TIME"
"""Set for the processes of builds where one thread's time on a processor is what counts."""
CLOCK = time.thread_time if os.environ.get(CPU_TIME) else time.perf_counter


# --- in the process of a build ---


def make_model(name: str, dtype: str) -> Any:
    from megalodon import MegalodonConfig, MegalodonForCausalLM

    torch.manual_seed(0)
    return MegalodonForCausalLM(MegalodonConfig(**COMMON, **MODELS[name])).to(getattr(torch, dtype))


def state_at(model: Any, rows: int, context: int) -> Any:
    """The state after `context` - `DECODED` tokens. Whole chunks but the last two are only counted: their number
    changes a state's numbers, not its shape."""
    chunk = model.config.chunk_size
    length = context - DECODED
    read = min(length, length % chunk + chunk)
    tokens = torch.randint(256, (rows, read), generator=torch.Generator().manual_seed(0))
    state = model(tokens, use_cache=True, logits_to_keep=1).past_key_values
    state.position = state.position + (length - read)
    return state


def decoding(model: Any, rows: int, context: int) -> Callable[[], float]:
    """Seconds a token, through the model's own forward pass."""
    model.eval()
    with torch.inference_mode():
        start = state_at(model, rows, context)

    @torch.inference_mode()
    def run() -> float:
        state = start.clone()
        token = torch.zeros(rows, 1, dtype=torch.int64)
        began = CLOCK()
        for _ in range(DECODED):
            output = model(token, past_key_values=state, use_cache=True, logits_to_keep=1)
            state, token = output.past_key_values, output.logits[:, -1:].argmax(-1)
        return (CLOCK() - began) / DECODED

    return run


def slots(model: Any, rows: int) -> Callable[[], float]:
    """Seconds a step of the engine's decoder with so many sequences, half a chunk open on average."""
    model.eval()
    try:
        from megalodon.inference.slots import choose_buckets, slot_decoder
    except ImportError:
        from megalodon.inference.slots import SlotDecoder as slot_decoder
        from megalodon.inference.slots import choose_buckets
    sizes = [size for size in (16, 32, 64) if size <= max(rows, 16)]
    decoder = slot_decoder(model, rows, choose_buckets(model, sizes))
    with torch.inference_mode():
        one = state_at(model, 1, model.config.chunk_size // 2 + DECODED)

    def run() -> float:
        for slot in range(rows):
            decoder.load(slot, one)
        began = CLOCK()
        for i in range(DECODED):
            decoder.step([i] * rows, range(rows))
        return (CLOCK() - began) / DECODED

    return run


def reading(model: Any, length: int) -> Callable[[], float]:
    """Seconds to read a prompt."""
    model.eval()
    tokens = torch.randint(256, (1, length), generator=torch.Generator().manual_seed(0))

    @torch.inference_mode()
    def run() -> float:
        began = CLOCK()
        model(tokens, use_cache=True, logits_to_keep=1)
        return CLOCK() - began

    return run


def training(
    model: Any, rows: int, length: int, bf16: bool, optimizer: torch.optim.Optimizer | None = None
) -> Callable[[], float]:
    """Seconds of forward, backward and AdamW, one of its own unless an optimiser is given."""
    model.train()
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    tokens = torch.randint(256, (rows, length), generator=torch.Generator().manual_seed(0))

    def run() -> float:
        began = CLOCK()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(tokens, labels=tokens, return_logits=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return CLOCK() - began

    return run


def reading_weights(model: Any) -> Callable[[], float]:
    """Seconds of a plain product of every matrix with one row: what reading the weights takes."""
    matrices = [module.weight.detach() for module in model.model.layers.modules() if type(module) is torch.nn.Linear]
    rows = {matrix.shape[1]: torch.ones(matrix.shape[1], dtype=matrix.dtype) for matrix in matrices}

    def run() -> float:
        began = CLOCK()
        for matrix in matrices:
            torch.mv(matrix, rows[matrix.shape[1]])
        return CLOCK() - began

    return run


def reading_memory() -> Callable[[], float]:
    """Seconds of a sum over 256 MiB, which no cache holds: what reading keys and values of many sequences takes."""
    numbers = torch.ones(1 << 26)

    def run() -> float:
        began = CLOCK()
        numbers.sum()
        return CLOCK() - began

    return run


def prepare(case: str, model_name: str, dtype: str) -> Callable[[], float]:
    """The timed call of a case; it returns its own seconds."""
    model, (kind, *numbers) = make_model(model_name, dtype), case.split("-")
    sizes = list(map(int, numbers))
    if kind == "weights":
        return reading_weights(model)
    if kind == "memory":
        return reading_memory()
    if kind == "decode":
        return decoding(model, *sizes)
    if kind == "slots":
        return slots(model, *sizes)
    if kind == "prefill":
        return reading(model, *sizes)
    rows, length = sizes
    return training(model, rows, length, kind == "trainbf16")


def work() -> None:
    """Answer lines of JSON: {"prepare": [case, model, dtype]} or {"seconds": s}."""
    run: Callable[[], float] | None = None
    for line in sys.stdin:
        order = json.loads(line)
        try:
            if "prepare" in order:
                run = prepare(*order["prepare"])
                run()
                answer: Any = []
            else:
                assert run is not None
                answer, end = [], CLOCK() + order["seconds"]
                while not answer or time.perf_counter() < end:
                    answer.append(run())
            print(json.dumps(answer), flush=True)
        except Exception as error:
            print(json.dumps(str(error)), flush=True)


# --- in the process that compares ---


class Build:
    """A process with a build in it."""

    def __init__(self, name: str, source: Path, environment: dict[str, str]) -> None:
        self.name = name
        path = os.pathsep.join([str(source.resolve()), str(Path(__file__).parent)])
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--work"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment, "PYTHONPATH": path},
        )

    def ask(self, **order: Any) -> Any:
        """The answer to an order; RuntimeError where the build failed."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline() or '"the process ended"')
        if isinstance(answer, str):
            raise RuntimeError(f"{self.name}: {answer}")
        return answer

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def compare(
    builds: list[Build], case: str, model: str, dtype: str, rounds: int, seconds: float, limit: float
) -> dict[str, Any]:
    """Samples of each build, round by round, at least two and no more than `limit` seconds have room for."""
    until = time.monotonic() + limit
    samples: dict[str, list[list[float]]] = {build.name: [] for build in builds}
    for build in builds:
        build.ask(prepare=[case, model, dtype])
    for number in range(rounds):
        if number >= 2 and time.monotonic() > until:
            break
        for build in builds if number % 2 else builds[::-1]:
            samples[build.name].append(build.ask(seconds=seconds))
    return {"case": case, "model": model, "dtype": dtype, "samples": samples}


def table(results: list[dict[str, Any]], before: str) -> str:
    """Markdown: the least and the median of each build, and the median ratio within rounds."""
    lines = [
        "| case | model | build | least ms | median ms | times as fast as before, by round | by least |",
        "| --- | --- | --- | --: | --: | --: | --: |",
    ]
    for result in results:
        old = result["samples"][before]
        for name, rounds in result["samples"].items():
            every = [second for one in rounds for second in one]
            ratio = least = ""
            if name != before:
                ratio = f"{statistics.median(min(a) / min(b) for a, b in zip(old, rounds, strict=True)):.2f}"
                least = f"{min(map(min, old)) / min(every):.2f}"
            lines.append(
                f"| {result['case']} | {result['model']} {result['dtype']} | {name} | {1e3 * min(every):.2f} | "
                f"{1e3 * statistics.median(every):.2f} | {ratio} | {least} |"
            )
    return "\n".join(lines)


def main(
    before: Annotated[Path | None, typer.Option(help="the `src` folder of the build to compare with")] = None,
    case: Annotated[list[str], typer.Option(help="which; all by default")] = list(CASES),  # noqa: B006
    model: str = "16m",
    dtype: str = "float32",
    rounds: int = 10,
    seconds: Annotated[float, typer.Option(help="of a case in one build in a round, at least")] = 0.3,
    cpu_time: Annotated[
        bool, typer.Option(help="the time of one thread on a processor: for a machine that others use too")
    ] = False,
    minutes: Annotated[float, typer.Option(help="for all cases: each gets its share, and two rounds in any case")] = 30,
    output: Annotated[str, typer.Option(help="name of the files in results/; empty for none")] = "",
) -> None:
    """Compare, and write after every case."""
    here = Path(__file__).parents[1] / "src"
    shared = {CPU_TIME: "1", "OMP_NUM_THREADS": "1"} if cpu_time else {}
    if before is not None:
        builds = [Build("before", before, shared), Build("now", here, shared)]
    else:
        builds = [Build("blocked", here, {**shared, "MEGALODON_BACKEND": "blocked"}), Build("now", here, shared)]
    results: list[dict[str, Any]] = []
    machine = describe_machine()
    clock = "CPU time of one thread" if cpu_time else f"wall time, {machine['threads']} threads"
    result = new_run("cpu_builds", machine, {"clock": clock, "rounds": rounds}) | {"results": results}
    until = time.monotonic() + minutes * 60
    for number, one in enumerate(case):
        share = (until - time.monotonic()) / (len(case) - number)
        try:
            results.append(compare(builds, one, model, dtype, rounds, seconds, share))
        except RuntimeError as error:
            print(f"{one}: {error}", file=sys.stderr)
            continue
        print(table(results[-1:], builds[0].name).splitlines()[-1], flush=True)
        if output:
            parts = [f"Clock: {clock}.", "", table(results, builds[0].name)]
            save(result, document("This build beside an earlier one", result, parts, False), RESULTS, output)
    print(table(results, builds[0].name))
    for build in builds:
        build.close()


if __name__ == "__main__":
    work() if "--work" in sys.argv else typer.run(main)
