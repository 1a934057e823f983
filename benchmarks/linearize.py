"""What recipes recover of a small Llama, of how many tokens: loss in its length and beyond, recall.

Trains the teacher of configs/linearize/teacher.yaml (or goes on with it), writes it as a Transformers model, and
applies each recipe with a share of the teacher's tokens, divided among its stages. Everything is kept in the folder,
and the table is written after each row: the same command goes on where it was stopped, and knows rows of other calls.

    python benchmarks/linearize.py --folder runs/linearize --shares 0.05 0.2 0.01

A recipe may be given with keys: `--recipes gecko "gecko of the next token=gecko,logits=0"`.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

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
PIECE = 2048
LONG = 100_000
LAST = 8192
RECIPES = ["lolcats", "gecko", "supra", "lizard", "hedgehog", "distill", "mohawk"]
BITS = 1 / math.log(2)


class Attempt(NamedTuple):
    """A recipe as it is applied.

    Attributes:
        label: of its rows. name: of the recipe. keys: over its defaults.
    """

    label: str
    name: str
    keys: list[str]

    @staticmethod
    def of(given: str) -> Attempt:
        """From NAME, or LABEL=NAME,KEY=VALUE,..."""
        label, equals, rest = given.partition("=")
        name, *keys = (rest if equals else given).split(",")
        return Attempt(label, name, keys)

    def folder(self, base: Path, what: Any) -> Path:
        """Where something of it is kept."""
        return base / f"{self.label.replace(' ', '-')}-{what}"


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
    """The longest held-out document, as tokens, without its first 16,384: title and contents."""
    data = config.data
    held = prepare_documents(
        data.corpus, data.held_out, ByteTokenizer(), data.sequence_length, config.run.seed, data.cache_folder
    )[1]
    longest = max(range(len(held)), key=lambda number: held.lengths[number])
    return torch.from_numpy(held.tokens(longest).astype("int64"))[16_384:]


@torch.inference_mode()
def losses(model: Any, rows: torch.Tensor) -> torch.Tensor:
    """The loss of each token of rows [B, L] but the first, in bits, read in pieces with a state: [B, L - 1]."""
    state, found = None, []
    for start in range(0, rows.shape[1] - 1, PIECE):
        output = model(rows[:, start : start + PIECE], past_key_values=state, use_cache=True)
        state = output.past_key_values
        targets = rows[:, start + 1 : start + PIECE + 1]
        logits = output.logits[:, : targets.shape[1]].transpose(1, 2)
        found.append(F.cross_entropy(logits, targets, reduction="none") * BITS)
    return torch.cat(found, 1)


def quality(model: Any, text: torch.Tensor, length: int, budget: int) -> dict[str, float]:
    """Bits per byte inside the length, far beyond it, and of a passage that was read half a length before.

    Beyond the length the tokens are the same ones whatever the multiple: those of the second half of the longest row,
    as second halves of rows of each length.
    """
    rows = text[: budget // length * length].view(-1, length)
    found = {"inside": float(losses(model, rows).double().mean())}
    longest = max(BEYOND) * length
    for times in BEYOND:
        size = times * length
        starts = range(longest // 2 - size // 2, longest - size + 1, size // 2)
        rows = torch.stack([text[start : start + size] for start in starts])
        found[f"at {times}x"] = float(losses(model, rows)[:, size // 2 - 1 :].double().mean())
    rows, gap = text[: budget // length * length].view(-1, length), length // 2
    again = torch.cat([rows[:, :gap], rows[:, :PASSAGE]], 1)  # the beginning once more
    found["recall"] = float(losses(model, again)[:, gap + 7 :].double().mean())
    return found


def flatness(model: Any, text: torch.Tensor, length: int) -> dict[str, float]:
    """Bits per byte of the last tokens of a long text, and of the same tokens with a length of text before them."""
    whole = losses(model, text[None, : LONG + 1])[:, -LAST:]
    short = losses(model, text[None, LONG + 1 - LAST - length : LONG + 1])[:, -LAST:]
    return {"after all": float(whole.double().mean()), "after a length": float(short.double().mean())}


@torch.inference_mode()
def read(model: Any, text: torch.Tensor, length: int) -> Any:
    """The state after `length` tokens."""
    source, state = text.repeat(-(-length // len(text)))[None, :length], None
    for piece in source.split(PIECE, dim=1):
        state = model(piece, past_key_values=state, use_cache=True, logits_to_keep=1).past_key_values
    return state


def once(file: Path, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was measured, now or before."""
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(measure(), indent=1) + "\n")
    return json.loads(file.read_text(encoding="utf-8"))


def job_of(attempt: Attempt, share: float, llama: Path, config: Any, options: Any) -> Any:
    """The linearisation of a recipe with a share of the teacher's tokens."""
    recipe, data = recipe_of(attempt.name), config.data
    tokens = int(share * config.run.steps * data.batch_size * data.sequence_length)
    keys = [
        f"data.sequence_length={data.sequence_length}",
        f"data.batch_size={data.batch_size}",
        f"data.corpus.source={data.corpus.source}",
        *options.set,
    ]
    keys = [key for key in keys if key.partition("=")[0].partition(".")[0] in recipe.config.model_fields]
    stages = recipe.stages(read_config(recipe.config, CONFIGS / "demo.yaml", [*keys, *attempt.keys]))
    keys += [f"{stage.name}.tokens={tokens // len(stages)}" for stage in stages]
    settings = read_config(recipe.config, CONFIGS / "demo.yaml", [*keys, *attempt.keys])
    return plan(llama, attempt.folder(options.folder, share), recipe, settings)


def bare(attempt: Attempt, job: Any, options: Any) -> Path:
    """The model before anything is learned."""
    folder = attempt.folder(options.folder, "bare")
    if not folder.is_dir():
        arguments = (job.recipe, job.config, job.teacher, job.tokenizer, {}, job.replaced, 0)
        write_folder(folder, lambda empty: assemble(empty, *arguments))
    return folder


def apply(attempt: Attempt, share: float, llama: Path, config: Any, options: Any, text: torch.Tensor) -> None:
    """A recipe with a share of the teacher's tokens: its rows of the table, as files."""
    job = job_of(attempt, share, llama, config, options)
    models = {"nothing learned": (0.0, bare(attempt, job, options))}
    begin = time.process_time()
    if linearize(job):
        raise SystemExit("interrupted and saved: the same command goes on")
    seconds = time.process_time() - begin
    if isinstance(job.stages[0], Transfer) and len(job.stages) > 1:
        models["transfer"] = share, job.out / "linearize" / "student"
    models["all stages"] = share, job.out
    for after, (part, folder) in models.items():

        def measure(folder: Path = folder, after: str = after, part: float = part) -> dict[str, Any]:
            model, length = load_model(folder, "cpu", torch.float32), config.data.sequence_length
            found: dict[str, Any] = {"model": attempt.label, "share": part, "after": after}
            found |= quality(model, text, length, options.budget)
            if after == "all stages":
                found["seconds"] = seconds
                if share == max(options.shares):
                    found |= flatness(model, text, length)
            return found

        kept = attempt.folder(options.folder / "measured", f"{part}-{after.replace(' ', '-')}.json")
        once(kept, measure)
        report(config, options)


def report(config: Any, options: Any) -> None:
    """Write the tables of all that was measured in the folder, by this call or others."""
    rows = [json.loads(file.read_text(encoding="utf-8")) for file in (options.folder / "measured").glob("*.json")]
    places = {"nothing learned": 0, "transfer": 1, "all stages": 2}
    rows.sort(key=lambda row: (row["model"] != "teacher", row["model"], row["share"], places.get(row["after"], 0)))
    result = new_run("linearize", describe_machine(512), {key: str(value) for key, value in vars(options).items()})
    result |= {"rows": rows}
    length, data, model = config.data.sequence_length, config.data, config.model
    told = [
        f"The teacher: a Llama of {model.num_layers} layers and width {model.model_dim} on bytes, trained on "
        f"{config.run.steps * data.batch_size * length:,} tokens in rows of {length}.",
        "",
        f"Bits per byte of held-out text: inside the teacher's length; over the second half of rows of "
        f"{', '.join(str(times) for times in BEYOND)} times it, the same {max(BEYOND) * length // 2:,} tokens each "
        f"time; of {PASSAGE - 8} bytes of a passage read again after {length // 2} (recall); of the last {LAST:,} of "
        f"{LONG:,} tokens, and of these with {length} before them. In brackets: over the teacher's inside its length.",
        "",
        quality_table(rows),
    ]
    save(
        result, document("Recipes of linearisation on a small Llama", result, told, False), options.results, "linearize"
    )


def quality_table(rows: list[dict[str, Any]]) -> str:
    """One line a model."""
    names = ["inside", *(f"at {times}x" for times in BEYOND), "recall", "after all", "after a length"]
    header = ["model ", "tokens, of the teacher's", "after ", *names[:-2], f"last of {LONG:,}", "these after a length"]
    base = next((row["inside"] for row in rows if row["model"] == "teacher"), None)
    lines = []
    for row in rows:
        cells = [f"{row[name]:.3f}" if name in row else "" for name in names]
        if base is not None and row["model"] != "teacher":
            cells[0] += f" ({row['inside'] / base - 1:+.1%})"
        share = "" if row["model"] == "teacher" else f"{row['share']:.0%}"
        lines.append([row["model"], share, row["after"], *cells])
    return markdown_table(header, lines)


def main() -> None:
    """Do what is missing, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/linearize"))
    parser.add_argument("--recipes", nargs="+", type=Attempt.of, default=[Attempt.of(name) for name in RECIPES])
    parser.add_argument("--shares", nargs="+", type=float, default=[0.05, 0.2, 0.01], help="in this order")
    parser.add_argument("--budget", type=int, default=16384, help="tokens that losses inside the length are of")
    parser.add_argument("--teacher", nargs="*", default=[], help="keys over configs/linearize/teacher.yaml")
    parser.add_argument(
        "--set", nargs="*", default=[], help="keys over configs/linearize/demo.yaml, where recipes have them"
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    llama, config = make_teacher(options.folder, options.teacher)
    text, length = held_out_text(config), config.data.sequence_length
    if len(text) <= max(LONG, max(BEYOND) * length):
        raise SystemExit(f"the longest held-out document has {len(text):,} bytes: {LONG:,} are read at once")
    told = {"model": "teacher", "share": 1.0, "after": ""}
    once(
        options.folder / "measured" / "teacher.json",
        lambda: told | quality(Teacher(llama).model(), text, length, options.budget),
    )
    report(config, options)
    for share in options.shares:
        for attempt in options.recipes:
            apply(attempt, share, llama, config, options, text)


if __name__ == "__main__":
    main()
