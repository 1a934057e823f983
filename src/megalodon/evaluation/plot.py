"""Pictures of evaluations, drawn without a display."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

MOST_DOCUMENTS_DRAWN = 12


def plot_by_position(report: dict[str, Any], path: Path) -> None:
    """Draw loss against position in the document, from what `evaluate_perplexity` returned, into a PNG file.

    Bits per byte where the tokenizer maps tokens to bytes, else nats per token. Each bucket is a step as wide as its
    positions; the documents are drawn thin when they are few.
    """
    in_bytes = report["overall"]["bits_per_byte"] is not None
    key, label = ("bits_per_byte", "bits per byte") if in_bytes else ("loss", "nats per token")
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    if 1 < len(report["documents"]) <= MOST_DOCUMENTS_DRAWN:
        for document in report["documents"]:
            _draw(axes, document["by_position"], key, linewidth=1, alpha=0.6, label=Path(document["name"]).name)
    _draw(axes, report["by_position"], key, linewidth=2.5, color="black", label="all documents")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda position, _: f"{position / 1024:g}K" if position >= 1024 else "0")
    axes.set_xlabel("position in the document (tokens)")
    axes.set_ylabel(label)
    axes.set_title(f"{report['overall'][key]:.4f} {label} over {report['overall']['tokens']:,} tokens")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150, format="png")


def _draw(axes: Axes, buckets: list[dict[str, Any]], key: str, **style: Any) -> None:
    drawn = [bucket for bucket in buckets if bucket[key] is not None]
    if not drawn:
        return
    edges = [max(bucket["from"], bucket["to"] // 2) for bucket in drawn] + [drawn[-1]["to"]]
    axes.stairs([bucket[key] for bucket in drawn], edges, baseline=None, **style)
