"""What others feel of a long prompt, and what a changed prompt costs: measured from outside the server, by HTTP."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from _report import markdown_table
from _servers import builds, save_model, server, streamed
from _workloads import CHUNK, DEPTH, VOCABULARY, WIDTH

SIZES = {
    "vocab_size": VOCABULARY,
    "num_layers": DEPTH,
    "model_dim": WIDTH,
    "z_dim": WIDTH // 4,
    "value_dim": 2 * WIDTH,
    "ffn_hidden_dim": 2 * WIDTH,
    "num_heads": 1,
    "swiglu": True,
    "cema_ndim": 16,
    "chunk_size": CHUNK,
    "norm_num_groups": 32,
}
SMALL = SIZES | {
    "num_layers": 2,
    "model_dim": 64,
    "z_dim": 32,
    "value_dim": 128,
    "ffn_hidden_dim": 64,
    "cema_ndim": 4,
    "norm_num_groups": 8,
}
"""For what is counted in tokens, which is the same with every model of this chunk."""
SHORT = 2_000
SECONDS, WARM = 5.0, 20
MESSAGE = 500
"""Characters, which are tokens, of a message of a conversation."""


def text_of(length: int, seed: int) -> str:
    """Letters, each of them one token."""
    return np.random.default_rng(seed).integers(97, 123, length).astype(np.uint8).tobytes().decode()


# --- gaps -----------------------------------------------------------------------------------------------------------


INTERRUPT = """
import http.client, json, socket, sys
import numpy
host, port, length, seconds, seed = sys.argv[1], *map(int, sys.argv[2:])
text = numpy.random.default_rng(seed).integers(97, 123, length).astype(numpy.uint8).tobytes().decode()
body = json.dumps({"model": "model", "prompt": text, "max_tokens": 1})
print("ready", flush=True)
sys.stdin.readline()
connection = http.client.HTTPConnection(host, port, timeout=seconds)
try:  # it hangs up after a while: a text of millions of tokens takes longer
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    connection.getresponse().read()
except TimeoutError:
    pass
"""
"""Another user, in a process of its own: what it prepares must not hold up whoever measures."""


def worst_gap(client: httpx.Client, length: int) -> dict[str, float]:
    """Gaps between the tokens of one stream in the seconds after somebody else has sent a prompt of `length` bytes."""
    body = {"model": "model", "prompt": "begin", "max_tokens": 8000, "temperature": 0, "ignore_end": True}
    address = [str(client.base_url.host), str(client.base_url.port), str(length), str(round(SECONDS))]
    command = [sys.executable, "-c", INTERRUPT, *address, str(time.monotonic_ns())]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdin is not None and other.stdout is not None
    other.stdout.readline()
    times: list[float] = []
    began = float("inf")
    for moment in streamed(client, body):
        times.append(moment)
        if len(times) == WARM:
            began = moment
            other.stdin.write("go\n")
            other.stdin.flush()
        if moment > began + SECONDS:
            break
    other.wait()
    since = times[WARM - 1 :]
    gaps = [b - a for a, b in pairwise(since)]
    return {"worst": max(gaps), "median": statistics.median(gaps)}


def measure_gaps(before: Path | None, length: int, rounds: int) -> dict[str, Any]:
    samples: dict[str, dict[str, list[dict[str, float]]]] = {}
    with tempfile.TemporaryDirectory(prefix="gaps-") as folder:
        model = Path(folder) / "model"
        found = builds(before)
        save_model(found[0], model, SIZES)
        for index in range(rounds):
            for build in found[:: -1 if index % 2 else 1]:
                with server(build, model, "--slots", "16", "--max-tokens", "10000") as client:
                    worst_gap(client, SHORT)
                    for name, size in (("short", SHORT), ("long", length)):
                        sample = worst_gap(client, size)
                        samples.setdefault(build.name, {}).setdefault(name, []).append(sample)
                        print(build.name, name, {key: round(value * 1e3) for key, value in sample.items()}, flush=True)
    return {"samples": samples, "commits": {build.name: build.commit for build in found}, "bytes": length}


def gap_parts(result: dict[str, Any]) -> list[str]:
    rows, ratios = [], {}
    for name, by in result["samples"].items():
        worst = {kind: statistics.median(sample["worst"] for sample in by[kind]) for kind in ("short", "long")}
        usual = {kind: statistics.median(sample["median"] for sample in by[kind]) for kind in ("short", "long")}
        ratios[name] = worst["long"] / worst["short"]
        cells = [f"{usual['short'] * 1e3:.0f}", f"{worst['short'] * 1e3:.0f}"]
        cells += [f"{usual['long'] * 1e3:.0f}", f"{worst['long'] * 1e3:.0f}", f"{ratios[name]:.2f}"]
        rows.append([f"{name} ({result['commits'][name]})", *cells])
    header = ["build ", "usual gap, short", "worst gap, short", "usual gap, long", "worst gap, long", "long / short"]
    rounds = len(result["samples"]["now"]["long"])
    return [
        f"One user's tokens are streamed; another sends a prompt of {SHORT:,} bytes (short) or {result['bytes']:,} "
        f"(long). Gaps between the first user's tokens in the {SECONDS:g} seconds since, ms; medians of {rounds} "
        "rounds in turn, measured by the client, over HTTP. One character is one token.",
        "",
        markdown_table(header, rows),
        "",
        f"Aim: the worst gap beside the long prompt is at most 2x that beside the short one. "
        f"Measured: {ratios['now']:.2f}x.",
    ]


# --- divergent prompts ----------------------------------------------------------------------------------------------


def ask(client: httpx.Client, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """An answer: its text, the tokens that were read for it, and how long it took."""
    started = time.perf_counter()
    answer = client.post(path, json={"model": "model", "max_tokens": 16, "temperature": 0, "ignore_end": True, **body})
    answer.raise_for_status()
    usage, choice = answer.json()["usage"], answer.json()["choices"][0]
    return {
        "text": choice["text"] if "text" in choice else choice["message"]["content"],
        "tokens": usage["prompt_tokens"],
        "read": usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"],
        "seconds": time.perf_counter() - started,
    }


def conversation(length: int) -> list[dict[str, str]]:
    """Messages of `MESSAGE` characters."""
    roles = ("user", "assistant")
    count = length // MESSAGE // 2 * 2 + 1
    return [{"role": roles[i % 2], "content": text_of(MESSAGE, i)} for i in range(count)]


def requests(length: int) -> dict[str, tuple[str, dict[str, Any], int]]:
    """(endpoint, body, tokens from the first change to the end) of each request; the first of a kind reads all."""
    document, places = text_of(length, 0), {"60 %": length * 3 // 5, "99 %": length * 99 // 100}

    def changed(at: int, seed: int) -> dict[str, Any]:
        return {"prompt": document[:at] + "#" + text_of(length - at - 1, seed)}

    messages = conversation(length)
    edited = [*messages[:-1], {"role": "user", "content": "#" + messages[-1]["content"]}]
    middle = len(messages) * 3 // 5
    branched = [*messages[:middle], {**messages[middle], "content": "# " + text_of(MESSAGE, -middle % 97)}]
    chat = "/v1/chat/completions"
    return {
        "a document": ("/v1/completions", {"prompt": document}, length),
        **{f"changed at {name}": ("/v1/completions", changed(at, 1), length - at) for name, at in places.items()},
        "changed at 60 % again": ("/v1/completions", changed(places["60 %"], 2), length - places["60 %"]),
        "a conversation": (chat, {"messages": messages}, length),
        "its last message edited": (chat, {"messages": edited}, MESSAGE + 20),
        "branched at 60 % of it": (chat, {"messages": branched}, MESSAGE + 20),
    }


def measure_divergent(before: Path | None, length: int, cold: bool) -> dict[str, Any]:
    answers: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="divergent-") as folder:
        model = Path(folder) / "model"
        found = builds(before)
        save_model(found[0], model, SMALL)
        for build in found:
            with server(build, model, "--slots", "16") as client:
                answers[build.name] = run(client, length, build.name)
        if cold:
            with server(found[-1], model, "--slots", "16", "--prefix-memory", "0") as client:
                answers["cold"] = run(client, length, "cold")
    return {
        "answers": answers,
        "commits": {build.name: build.commit for build in found},
        "length": length,
        "changed": {name: distance for name, (_, _, distance) in requests(length).items()},
        "chunk": CHUNK,
    }


def run(client: httpx.Client, length: int, label: str) -> dict[str, Any]:
    answers = {}
    for name, (path, body, _) in requests(length).items():
        answers[name] = ask(client, path, body)
        print(label, name, answers[name]["read"], f"{answers[name]['seconds']:.2f} s", flush=True)
    return answers


def divergent_parts(result: dict[str, Any]) -> list[str]:
    answers, names = result["answers"], list(result["commits"])
    rows, kept, equal = [], 0, 0
    for request, distance in result["changed"].items():
        now = answers["now"][request]
        # what follows the change must be read whatever is kept; the allowance is for what lies before it
        most = distance + distance // 8 + result["chunk"]
        kept += now["read"] <= most
        cells = [f"{answers[name][request]['read']:,} ({answers[name][request]['seconds']:.1f} s)" for name in names]
        if "cold" in answers:
            same = answers["cold"][request]["text"] == now["text"]
            equal += same
            cells.append("yes" if same else "no")
        rows.append([request, f"{now['tokens']:,}", f"{distance:,}", f"{most:,}", *cells])
    header = ["request ", "tokens", "from the change on", "at most to read"]
    header += [f"read {name} ({result['commits'][name]})" for name in names]
    header += ["equals a cold one"] if "cold" in answers else []
    cold = f"; {equal} of {len(rows)} answers equal those of a server that keeps nothing" if "cold" in answers else ""
    return [
        "Requests to one server, one after another, in this order; 16 tokens are generated for each. Read: tokens of "
        f"the prompt whose state was not known. A small model, in chunks of {CHUNK} tokens as larger ones are.",
        "",
        markdown_table(header, rows),
        "",
        "Aim: no more is read than the tokens from the change on, an eighth of them, and a chunk. "
        f"Measured: {kept} of {len(rows)} requests{cold}.",
    ]
