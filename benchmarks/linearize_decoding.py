"""Decoding of a Transformer with its cache, and of what recipes make of it: tokens a second and bytes after long texts.

Speed needs no trained weights: a Llama of each size is drawn, and so is what it remembers. The teacher is Transformers'
own model with its `DynamicCache`, and the same read as a kin model; the others are its linearisations, which have read
a few hundred tokens and stand where a long text would have brought them. Steps of one token take turns; by processor
time with --cpu-time, which other processes of the machine do not stretch.

    python benchmarks/linearize_decoding.py --sizes 5m --lengths 16384 100000 --cpu-time
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _machine import describe_machine
from _report import RESULTS, document, markdown_table, new_run, save
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from megalodon.linearize import read_config, recipe_of
from megalodon.models.kin import KinConfig, KinForCausalLM
from megalodon.models.kin.mixers.keys_and_values import KeysAndValues

SIZES = {
    "1m": {"num_layers": 6, "model_dim": 128, "num_heads": 4, "num_key_value_heads": 2},
    "5m": {"num_layers": 6, "model_dim": 256, "num_heads": 4, "num_key_value_heads": 2},
    "29m": {"num_layers": 8, "model_dim": 512, "num_heads": 8, "num_key_value_heads": 4},
    "113m": {"num_layers": 12, "model_dim": 768, "num_heads": 12, "num_key_value_heads": 12},
}
"""The second is that of configs/linearize/teacher.yaml."""

VOCABULARY = 259
READ = 320
"""Tokens that a linearised model reads first: past every window, and not at the end of a chunk."""

Step = Callable[[int], int]
"""Decode token number i; how many bytes are remembered after it."""


def theirs(config: KinConfig, length: int) -> Step:
    """Transformers' Llama after `length` tokens."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.model_dim,
            intermediate_size=config.ffn_hidden_dim,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_key_value_heads,
            max_position_embeddings=length + 4096,
        )
    ).eval()
    cache = DynamicCache(config=model.config)
    shape = (1, config.key_value_heads, length, config.head_size)
    for layer in range(config.num_layers):
        cache.update(torch.randn(shape), torch.randn(shape), layer)

    def step(number: int) -> int:
        model(torch.tensor([[number % VOCABULARY]]), past_key_values=cache, use_cache=True)
        return sum(part.keys.nbytes + part.values.nbytes for part in cache.layers)

    return step


def ours(config: KinConfig, length: int) -> Step:
    """A kin model after `length` tokens."""
    model = KinForCausalLM(config).eval()
    ids = torch.arange(READ)[None] % VOCABULARY
    state: Any = model(ids, use_cache=True, logits_to_keep=1).past_key_values
    if config.state_kind == "growing":
        shape = (1, length, config.key_value_heads, config.head_size)
        state.layers = tuple(KeysAndValues(torch.randn(shape), torch.randn(shape)) for _ in state.layers)
    state.position += length - READ

    def step(number: int) -> int:
        nonlocal state
        state = model(torch.tensor([[number % VOCABULARY]]), past_key_values=state, use_cache=True).past_key_values
        return state.nbytes if number == 0 else 0  # counting is no part of decoding

    return step


@torch.inference_mode()
def measured(steps: dict[str, Step], count: int, clock: Callable[[], float]) -> dict[str, dict[str, float]]:
    """Tokens a second and bytes by name: the median of `count` steps each, in turn."""
    sizes = {name: step(0) for name, step in steps.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(1, count + 3):
        for name, step in steps.items():
            begin = clock()
            step(number)
            seconds[name].append(clock() - begin)
    return {name: {"tokens/s": 1 / statistics.median(each[2:]), "bytes": sizes[name]} for name, each in seconds.items()}


def table(rows: dict[str, dict[str, float]]) -> str:
    """One line a model."""
    base, lines = rows["teacher, in Transformers"]["tokens/s"], []
    for name, found in rows.items():
        times = found["tokens/s"] / base
        lines.append([name, f"{found['tokens/s']:.3g}", f"{times:.1f}", f"{found['bytes'] / 1e6:.2f}"])
    return markdown_table(["model ", "tokens/s", "times the teacher's", "remembered, MB"], lines)


def main() -> None:
    """Measure and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["5m", "29m"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[16_384, 100_000])
    parser.add_argument("--recipes", nargs="+", default=["gecko", "lolcats", "hedgehog", "supra", "distill"])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--cpu-time", action="store_true", help="processor time; with one thread")
    parser.add_argument("--keep", type=Path, help="a JSON file of rows: those that are there are not measured again")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    clock, kept = time.process_time if options.cpu_time else time.perf_counter, options.keep
    if options.cpu_time:
        torch.set_num_threads(1)
    result = new_run("linearize_decoding", describe_machine(512), {k: str(v) for k, v in vars(options).items()})
    found: dict[str, Any] = json.loads(kept.read_text()) if kept is not None and kept.is_file() else {}
    parts = []
    for size in options.sizes:
        config = KinConfig(vocab_size=VOCABULARY, **SIZES[size])
        for length in options.lengths:
            name = f"{size}-{length}"
            if name not in found:
                torch.manual_seed(0)
                steps = {
                    "teacher, in Transformers": theirs(config, length),
                    "teacher, read as a kin model": ours(config, length),
                }
                for recipe in map(recipe_of, options.recipes):
                    settings = read_config(recipe.config, None, [])
                    steps[f"`{recipe.name}`"] = ours(recipe.student_config(settings, config, []), length)
                found[name] = measured(steps, options.steps, clock)
                if kept is not None:
                    kept.write_text(json.dumps(found, indent=1))
                print(name, found[name], flush=True)
            sizes = ", ".join(f"{key} {value}" for key, value in SIZES[size].items())
            parts += [f"## {size} ({sizes}) after {length:,} tokens", "", table(found[name]), ""]
    result["rows"] = found
    told = "One row, float32; median of a step's " + ("processor time" if options.cpu_time else "seconds") + "."
    page = document("Decoding of linearised models", result, [told, "", *parts], False)
    save(result, page, options.results, "linearize-decoding")


if __name__ == "__main__":
    main()
