"""The README's summary of promises is that of docs/promises.md, which a benchmark writes."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
PIECES = ("token by token", "prompt, then tokens", "pieces of 2, 3, 5, 7, 7")
COLUMNS = {
    "for a text in pieces, whatever they are": [PIECES],
    "in rows that are padded on the left; on the right": [("left padding",), ("right padding",)],
    "in a second document of a row (`position_ids`)": [("documents by position_ids",)],
    "from one cache, used twice": [("cache used twice",)],
    "for beams, against generating without a cache": [("beams",)],
    "gradients through the cache": [("gradients through it",)],
}


def table(text: str) -> list[dict[str, str]]:
    """The rows of a text's first Markdown table, by column."""
    lines = [line.strip().strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    head, _, *rows = ([cell.strip() for cell in line] for line in lines)
    return [dict(zip(head, row, strict=True)) for row in rows]


def test_the_summary_counts_what_the_table_says() -> None:
    page = (ROOT / "docs/promises.md").read_text(encoding="utf-8")
    ours, theirs = (table(page.split(title)[1].split("\n## ")[0]) for title in ("## Ours", "## The "))
    summary = table(
        (ROOT / "README.md").read_text(encoding="utf-8").split("**What a state promises**")[1].split("\n\n")[1]
    )
    first, *counted = summary[0]
    assert counted == [f"of Transformers' {len(theirs)}", f"of our {len(ours)}"]
    assert [row[first] for row in summary] == list(COLUMNS)
    for row in summary:
        for column, rows in zip(counted, (theirs, ours), strict=True):
            right = [sum(all(one[name] == "yes" for name in names) for one in rows) for names in COLUMNS[row[first]]]
            assert row[column] == "; ".join(map(str, right)), f"{row[first]}, {column}"
