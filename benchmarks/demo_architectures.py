"""Megalodon and Gecko on the demo's corpus at equal tokens: held-out loss overall, by position, by place in the chunk.

Both are trained by their demo config (configs/demo.yaml, configs/demo-gecko.yaml) on the same bytes in the same order,
one run a seed, and read the same held-out files whole. A run that was interrupted goes on.

    python benchmarks/demo_architectures.py --seeds 0 1 --folder runs/architectures
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from _machine import describe_machine
from _report import RESULTS, document, markdown_table, new_run, save

from megalodon.data import ByteTokenizer, Document, prepare_documents
from megalodon.evaluation import evaluate_perplexity
from megalodon.inference import load_model
from megalodon.training import count_parameters, load_config, resolve, train

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = {"megalodon": ROOT / "configs" / "demo.yaml", "gecko": ROOT / "configs" / "demo-gecko.yaml"}
MOST_BYTES = 400_000


def measure(architecture: str, seed: int, folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Train (or go on with, or load) one run and score its model on held-out files, the longest first."""
    run = folder / f"{architecture}-{seed}"
    scores = run / "scores.json"
    if scores.exists():
        return json.loads(scores.read_text(encoding="utf-8"))
    given = [*overrides, f"run.seed={seed}", f"run.folder={run}", "sampling.every=null"]
    config = load_config(CONFIGS[architecture], given)
    resolved = resolve(config, run.name)
    if train(resolved).signal is not None:
        raise SystemExit("interrupted and saved: the same command goes on")
    data, tokenizer = config.data, ByteTokenizer()
    _, held_out = prepare_documents(
        data.corpus, data.held_out, tokenizer, data.sequence_length, config.run.seed, data.cache_folder
    )
    chosen, total = [], 0
    for index in sorted(range(len(held_out)), key=lambda i: -held_out.lengths[i]):
        if total + held_out.lengths[index] <= MOST_BYTES:
            total += int(held_out.lengths[index])
            chosen.append(Document(held_out.name(index), [tokenizer.decode(held_out.tokens(index))]))
    found = evaluate_perplexity(load_model(run / "model"), tokenizer, chosen)
    report = {
        "architecture": architecture,
        "seed": seed,
        "parameters": count_parameters(resolved.model_config),
        "tokens": config.run.steps * data.batch_size * data.sequence_length,
        "bytes": total,
        "chunk_size": resolved.model_config.chunk_size,
        **{name: found[name] for name in ("overall", "by_position", "by_chunk_place")},
    }
    scores.write_text(json.dumps(report), encoding="utf-8")
    return report


def names(reports: list[dict[str, Any]]) -> list[str]:
    """Of the runs."""
    return [f"{one['architecture']}, seed {one['seed']}" for one in reports]


def table(reports: list[dict[str, Any]], key: str) -> str:
    """Nats a byte of each range of `key`, a column a run."""
    rows = [
        [str(ranges[0]["from"]), str(ranges[0]["to"]), *(f"{one['loss']:.3f}" for one in ranges)]
        for ranges in zip(*(report[key] for report in reports), strict=False)
        if all(one["loss"] is not None for one in ranges)
    ]
    return markdown_table(["from", "up to", *names(reports)], rows)


def main() -> None:
    """Run what is missing, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/architectures"))
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="of both configs")
    arguments = parser.parse_args()
    result = new_run("demo_architectures", describe_machine(), {"seeds": arguments.seeds, "set": arguments.set})
    reports = [measure(kind, seed, arguments.folder, arguments.set) for seed in arguments.seeds for kind in CONFIGS]
    result["runs"] = reports
    rows = [
        [name, f"{one['parameters']:,}", f"{one['tokens']:,}", f"{one['overall']['bits_per_byte']:.3f}"]
        for name, one in zip(names(reports), reports, strict=True)
    ]
    parts = [
        markdown_table(["run ", "parameters", "bytes trained on", "held-out bits a byte"], rows),
        "",
        f"## Loss by position in the file, nats a byte\n\n{table(reports, 'by_position')}\n",
        f"## By place in the chunk of {reports[0]['chunk_size']}\n\n{table(reports, 'by_chunk_place')}",
    ]
    title = "Megalodon and Gecko on the demo's corpus, at equal tokens"
    paths = save(result, document(title, result, parts, bool(arguments.set)), RESULTS, "demo_architectures")
    print("\n".join(map(str, paths)))


if __name__ == "__main__":
    main()
