"""The plots of a report, as SVG that stands in a page by itself."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megalodon.comparison.summary import Architecture, Points, Runs, Spread, Summary

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c564b", "#7f7f7f")
"""Told apart by those who do not see all colours; used again from the start where there are more."""


def all_figures(summary: Summary) -> list[tuple[str, str]]:
    """(title, SVG) of the plots that have something to show."""
    wanted: list[tuple[str, Callable[[Axes, Summary], bool]]] = [
        ("Held-out loss by tokens", lambda axes, s: _curves(axes, s, lambda runs: runs.by_tokens, "tokens")),
        ("Held-out loss by seconds of training", lambda axes, s: _curves(axes, s, lambda r: r.by_seconds, "seconds")),
        (
            "Loss by tokens since everything was forgotten",
            lambda axes, s: _by_range(axes, s, lambda runs: runs.by_distance, "read since then", "log"),
        ),
        (
            "Loss by position in the text",
            lambda axes, s: _by_range(axes, s, lambda runs: runs.by_position, "position", "log"),
        ),
        (
            "Loss by place in the chunk",
            lambda axes, s: _by_range(axes, s, lambda runs: runs.by_place, "place", "linear"),
        ),
        ("State after a text", lambda axes, s: _by_length(axes, s, "state_bytes", "bytes")),
        ("Memory while a text is read", lambda axes, s: _by_length(axes, s, "peak_bytes", "bytes")),
        ("Reading speed by length", lambda axes, s: _by_length(axes, s, "tokens_a_second", "tokens a second")),
        ("Decoding speed by length", lambda axes, s: _by_length(axes, s, "decoded_a_second", "tokens a second")),
    ]
    found = []
    for title, draw in wanted:
        figure = Figure(figsize=(7.2, 4.2), layout="constrained")
        axes = figure.subplots()
        if draw(axes, summary):
            axes.grid(alpha=0.3)
            axes.legend(fontsize="small")
            found.append((title, _svg(figure, title)))
    return found


def _svg(figure: Figure, title: str) -> str:
    out = io.StringIO()
    # The salt keeps the ids of one figure apart from those of another in the same page, and equal from run to run.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _curves(axes: Axes, summary: Summary, points: Callable[[Runs], Points], what: str) -> bool:
    drawn = False
    for number, each in enumerate(summary.architectures):
        found = points(each.tokens)
        if found:
            drawn = True
            _band(axes, [x for x, _ in found], [s for _, s in found], each, number)
    axes.set(xlabel=what, ylabel=summary.unit, xscale="log")
    return drawn


def _band(axes: Axes, x: Sequence[float], spreads: Sequence[Spread], each: Architecture, number: int) -> None:
    mean = [spread.mean for spread in spreads]
    axes.plot(x, mean, color=_colour(number), label=each.name, marker=".", linewidth=1.4)
    if spreads[0].deviation is not None:
        low, high = ([s.mean + sign * (s.deviation or 0.0) for s in spreads] for sign in (-1, 1))
        axes.fill_between(x, low, high, color=_colour(number), alpha=0.15, linewidth=0)


def _by_range(
    axes: Axes, summary: Summary, ranges: Callable[[Runs], list[tuple[int, int, Spread]]], what: str, scale: str
) -> bool:
    drawn = False
    for number, each in enumerate(summary.architectures):
        found = ranges(each.tokens)
        if found:
            drawn = True
            _band(axes, [(first + end) / 2 for first, end, _ in found], [s for *_, s in found], each, number)
    axes.set(xlabel=f"{what} (tokens)", ylabel=summary.unit)
    if scale == "log":
        axes.set_xscale("log", base=2)
    return drawn


def _by_length(axes: Axes, summary: Summary, key: str, what: str) -> bool:
    drawn = False
    for number, each in enumerate(summary.architectures):
        found = [] if each.speed is None else [one for one in each.speed["reading"] if one[key] > 0]
        if found:
            drawn = True
            x, y = [one["length"] for one in found], [one[key] for one in found]
            axes.plot(x, y, color=_colour(number), label=each.name, marker=".", linewidth=1.4)
    axes.set(xlabel="length of the text (tokens)", ylabel=what, yscale="log")
    axes.set_xscale("log", base=2)
    return drawn
