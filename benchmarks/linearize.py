"""What recipes recover of a small Llama, of how many tokens: loss in its length and beyond, recall, speed, memory.

Trains the teacher of configs/linearize/teacher.yaml (or goes on with it), writes it as a Transformers model, and
applies each recipe with a share of the teacher's tokens, the same to each of its stages. Everything is kept in the
folder: the same command goes on where it was stopped.

    python benchmarks/linearize.py --folder runs/linearize --recipes lolcats hedgehog supra --shares 0.01 0.05 0.2
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _machine import describe_machine
from _report import RESULTS, document, markdown_table, new_run, save, write_atomically
from torch.nn import functional as F

from megalodon.convert import kin_to_transformers
from megalodon.convert.teachers import Teacher
from megalodon.data import ByteTokenizer, prepare_documents
from megalodon.files import write_folder
from megalodon.inference import load_model
from megalodon.linearize import Transfer, linearize, plan, read_config, recipe_of
from megalodon.linearize.assembly import assemble
from megalodon.training import load_config, resolve, train

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "linearize"
BEYOND = (2, 8, 32)
PASSAGE = 48


def make_teacher(folder: Path, overrides: list[str]) -> tuple[Path, Any]:
    """The teacher's folder as Transformers has it, and its training config."""
    run = folder / "teacher"
    config = load_config(CONFIGS / "teacher.yaml", [*overrides, f"run.folder={run}"])
    llama = folder / "llama"
    if not llama.is_dir():
        if train(resolve(config, "teacher")).signal is not None:
            raise SystemExit("interrupted and saved: the same command goes on")
        theirs = kin_to_transformers(load_model(run / "model", "cpu"), "llama")
        theirs.config.max_position_embeddings = config.data.sequence_length

        def fill(empty: Path) -> None:
            theirs.save_pretrained(empty)
            ByteTokenizer().save(empty)

        write_folder(llama, fill)
    return llama, config


def held_out_text(config: Any) -> torch.Tensor:
    """The longest held-out document, as tokens."""
    data = config.data
    held = prepare_documents(
        data.corpus, data.held_out, ByteTokenizer(), data.sequence_length, config.run.seed, data.cache_folder
    )[1]
    longest = max(range(len(held)), key=lambda number: held.lengths[number])
    return torch.from_numpy(held.tokens(longest).astype("int64"))


@torch.inference_mode()
def nats(model: Any, rows: torch.Tensor, first: int) -> float:
    """The mean loss of the tokens of rows [B, L] from place `first` on, read in pieces with a state."""
    state, total, count = None, 0.0, 0
    for start in range(0, rows.shape[1] - 1, 2048):
        piece = rows[:, start : start + 2048]
        output = model(piece, past_key_values=state, use_cache=True)
        state = output.past_key_values
        targets = rows[:, start + 1 : start + 2049]
        losses = F.cross_entropy(output.logits[:, : targets.shape[1]].transpose(1, 2), targets, reduction="none")
        kept = losses[:, max(first - start - 1, 0) :]
        total, count = total + float(kept.double().sum()), count + kept.numel()
    return total / count


def quality(model: Any, text: torch.Tensor, length: int, budget: int) -> dict[str, float]:
    """Bits per byte inside the length, far beyond it, and of a passage that was read half a length before."""
    bits = 1 / math.log(2)
    found = {"inside": bits * nats(model, rows_of(text, length, budget), 1)}
    for times in BEYOND:
        rows = rows_of(text, times * length, budget)
        found[f"at {times}x"] = bits * nats(model, rows, times * length // 2)
    rows = rows_of(text, length, budget)
    gap = length // 2
    again = torch.cat([rows[:, :gap], rows[:, :PASSAGE]], 1)  # the beginning once more
    found["recall"] = bits * nats(model, again, gap + 8)
    return found


def rows_of(text: torch.Tensor, length: int, budget: int) -> torch.Tensor:
    """At most `budget` tokens of a text in rows of this length, one at least."""
    count = max(1, min(budget, len(text)) // length)
    if len(text) < length:
        raise SystemExit(f"the longest held-out document has {len(text)} bytes: {length} are read at once")
    return text[: count * length].view(count, length)


@torch.inference_mode()
def speed(model: Any, text: torch.Tensor, length: int) -> dict[str, float]:
    """Tokens a second of decoding after `length` tokens, and the bytes of what is remembered there."""
    source = text.repeat(-(-length // len(text)))[None, :length]
    state = None
    for piece in source.split(2048, dim=1):
        state = model(piece, past_key_values=state, use_cache=True, logits_to_keep=1).past_key_values
    seconds = []
    for step in range(24):
        begin = time.perf_counter()
        state = model(source[:, step : step + 1], past_key_values=state, use_cache=True).past_key_values
        seconds.append(time.perf_counter() - begin)
    return {"tokens/s": 1 / sorted(seconds[4:])[10], "bytes": state.nbytes}


def once(file: Path, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was measured, now or before."""
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(measure()))
    return json.loads(file.read_text(encoding="utf-8"))


def apply(name: str, share: float, llama: Path, config: Any, options: Any, text: torch.Tensor) -> list[dict[str, Any]]:
    """A recipe with a share of the teacher's tokens: its rows of the table."""
    recipe, length = recipe_of(name), config.data.sequence_length
    tokens = int(share * config.run.steps * config.data.batch_size * length)
    data = config.data
    keys = [
        f"data.sequence_length={length}",
        f"data.batch_size={data.batch_size}",
        f"data.corpus.source={data.corpus.source}",
        *options.set,
    ]
    stages = read_config(recipe.config, CONFIGS / "demo.yaml", keys).stage_sections()
    keys += [f"{stage}.tokens={tokens // len(stages)}" for stage in stages]
    out = options.folder / f"{name}-{share}"
    keys = [key for key in keys if key.partition("=")[0].partition(".")[0] in recipe.config.model_fields]
    job = plan(llama, out, recipe, read_config(recipe.config, CONFIGS / "demo.yaml", keys))
    if linearize(job):
        raise SystemExit("interrupted and saved: the same command goes on")
    models = {"all stages": out}
    if any(isinstance(stage, Transfer) for stage in job.stages) and len(job.stages) > 1:
        models = {"transfer": out / "linearize" / "student", **models}
    if share == options.shares[0]:
        bare = options.folder / f"{name}-bare"
        if not bare.is_dir():
            arguments = (recipe, job.config, job.teacher, job.tokenizer, {}, job.replaced, 0)
            write_folder(bare, lambda empty: assemble(empty, *arguments))
        models = {"nothing learned": bare, **models}
    rows = []
    for stage, folder in models.items():
        file = options.folder / "measured" / f"{name}-{share}-{stage.replace(' ', '-')}.json"
        found = once(file, lambda folder=folder: measure(folder, text, length, options, options.lengths))
        rows.append({"model": name, "share": 0 if stage == "nothing learned" else share, "after": stage, **found})
    return rows


def measure(folder: Path, text: torch.Tensor, length: int, options: Any, lengths: list[int]) -> dict[str, Any]:
    """All numbers of a model."""
    model = load_model(folder, "cpu", torch.float32)
    found: dict[str, Any] = quality(model, text, length, options.budget)
    return found | {"decoding": {str(places): speed(model, text, places) for places in lengths}}


def teachers(llama: Path, text: torch.Tensor, length: int, options: Any) -> dict[str, Any]:
    """All numbers of the teacher, whose cache grows: it decodes after the first of the lengths alone."""
    model = Teacher(llama).model()
    found: dict[str, Any] = quality(model, text, length, options.budget)
    return found | {"decoding": {str(places): speed(model, text, places) for places in options.lengths[:1]}}


def table(rows: list[dict[str, Any]], lengths: list[int]) -> str:
    """One line a model."""
    names = ["inside", *(f"at {times}x" for times in BEYOND), "recall"]
    header = ["model", "tokens, of the teacher's", "after", *names]
    header += [f"{what} at {places:,}" for places in lengths for what in ("tokens/s", "state, MB")]
    lines = []
    for row in rows:
        cells = [row["model"], f"{row['share']:.0%}", row["after"], *(f"{row[name]:.3f}" for name in names)]
        for places in lengths:
            found = row["decoding"].get(str(places))
            cells += ["-", "-"] if found is None else [f"{found['tokens/s']:.0f}", f"{found['bytes'] / 1e6:.2f}"]
        lines.append(cells)
    return markdown_table(header, lines)


def main() -> None:
    """Do what is missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/linearize"))
    parser.add_argument("--recipes", nargs="+", default=["hedgehog", "lolcats", "supra"])
    parser.add_argument("--shares", nargs="+", type=float, default=[0.01, 0.05, 0.2])
    parser.add_argument("--lengths", nargs="+", type=int, default=[16384, 100_000], help="decode after so many tokens")
    parser.add_argument("--budget", type=int, default=65536, help="tokens that a loss is measured on")
    parser.add_argument("--teacher", nargs="*", default=[], help="keys over configs/linearize/teacher.yaml")
    parser.add_argument(
        "--set", nargs="*", default=[], help="keys over configs/linearize/demo.yaml, where recipes have them"
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    llama, config = make_teacher(options.folder, options.teacher)
    text, length = held_out_text(config), config.data.sequence_length
    file = options.folder / "measured" / "teacher.json"
    rows = [{"model": "teacher", "share": 1, "after": "", **once(file, lambda: teachers(llama, text, length, options))}]
    result = new_run("linearize", describe_machine(), {k: str(v) for k, v in vars(options).items()})
    for name in options.recipes:
        for share in options.shares:
            rows += apply(name, share, llama, config, options, text)
            told = (
                f"Bits per byte of held-out text: inside the teacher's length ({length} tokens), over the second half "
                f"of rows of {', '.join(str(times) for times in BEYOND)} times it, and of the beginning of a row read "
                f"again after {length // 2} tokens, but for its first 8 (recall). Decoding is of one row."
            )
            result["rows"] = rows
            page = document(
                "Recipes of linearisation on a small Llama", result, [told, table(rows, options.lengths)], False
            )
            save(result, page, options.results, "linearize")
    print(table(rows, options.lengths))


if __name__ == "__main__":
    main()
