"""The table and the picture of a recall study."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from matplotlib.figure import Figure

from megalodon.evaluation.recall.config import RecallConfig
from megalodon.files import write_file, write_text


def best_rows(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a model and width: the learning rate whose mean accuracy over seeds is best, and its spread.

    A row has `model`, `width`, `learning_rate`, `parameters`, `state_bytes`, `accuracy` (by test segment), `mean`,
    `spread` (standard deviation over seeds), `seeds`, `seconds`, `edge` (whether the rate is the least or the greatest
    that was tried, of more than one).
    """
    groups: dict[tuple[str, int], dict[float, list[dict[str, Any]]]] = {}
    for result in results:
        rates = groups.setdefault((result["model"], result["width"]), {})
        rates.setdefault(result["learning_rate"], []).append(result)
    rows = []
    for (model, width), rates in groups.items():
        rate, runs = max(rates.items(), key=lambda item: fmean(run["mean_accuracy"] for run in item[1]))
        means = [run["mean_accuracy"] for run in runs]
        labels = dict.fromkeys(label for run in runs for label in run["accuracy"])
        rows.append(
            {
                "model": model,
                "width": width,
                "learning_rate": rate,
                "parameters": runs[0]["parameters"],
                "state_bytes": runs[0]["state_bytes"],
                "accuracy": {label: fmean(run["accuracy"].get(label, 0.0) for run in runs) for label in labels},
                "mean": fmean(means),
                "spread": pstdev(means),
                "seeds": len(runs),
                "seconds": fmean(run["seconds"] for run in runs),
                "edge": len(rates) > 1 and rate in (min(rates), max(rates)),
            }
        )
    return rows


def table(config: RecallConfig, results: Sequence[dict[str, Any]]) -> str:
    """The study in Markdown."""
    rows = sorted(best_rows(results), key=lambda row: (row["width"], -row["mean"]))
    labels = [segment.label() for segment in config.test_segments]
    head = ["model", "width", "parameters", "state (bytes)", *labels, "mean", "rate", "seconds"]
    lines = [f"# {config.task}", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        sizes = [size for size in row["state_bytes"].values() if size is not None]
        size = "-" if not sizes else f"{sizes[0]:,}" + (f" to {sizes[-1]:,}" if sizes[-1] != sizes[0] else "")
        spread = f" ± {row['spread']:.1%}" if row["seeds"] > 1 else ""
        cells = [row["model"], str(row["width"]), f"{row['parameters']:,}", size]
        cells += [f"{row['accuracy'][label]:.1%}" if label in row["accuracy"] else "-" for label in labels]
        cells += [f"{row['mean']:.1%}{spread}", f"{row['learning_rate']:g}{'*' * row['edge']}", f"{row['seconds']:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    done, wanted = len(results), len(config.cells())
    lines += ["", f"{done} of {wanted} runs. Accuracy: the share of right answers of each row, averaged over rows."]
    if any(row["edge"] for row in rows):
        lines.append("\\* the best rate is the least or the greatest that was tried.")
    return "\n".join(lines) + "\n"


def write_report(config: RecallConfig, results: Sequence[dict[str, Any]], folder: Path) -> None:
    """`recall.md` and `recall.png` in the folder, of the results that there are."""
    write_text(folder / "recall.md", table(config, results))
    rows = [row for row in best_rows(results) if any(row["state_bytes"].values())]
    if rows:
        write_file(folder / "recall.png", lambda path: draw(config.task, rows, path))


def draw(title: str, rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Accuracy against the size of the state, a line a model through its widths, into a PNG file."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    models = list(dict.fromkeys(row["model"] for row in rows))
    for number, model in enumerate(models):
        own = sorted((row for row in rows if row["model"] == model), key=lambda row: row["width"])
        sizes = [max(size for size in row["state_bytes"].values() if size is not None) for row in own]
        style: dict[str, Any] = {"color": f"C{number % 10}", "marker": "osD^v"[number // 10 % 5]}
        axes.plot(sizes, [row["mean"] for row in own], label=model, **style)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda size, _: f"{size / 1024:g}K" if math.isfinite(size) else "")
    axes.set_xlabel("state of one row after the longest test (bytes)")
    axes.set_ylabel("mean accuracy over the test segments")
    axes.set_ylim(-0.03, 1.03)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small", ncols=2)
    figure.savefig(path, dpi=150, format="png")
