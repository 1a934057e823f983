"""The report of a comparison: one HTML page that needs nothing else, the same in Markdown, and a summary in JSON."""

from __future__ import annotations

import dataclasses
import html
import json
import re
from pathlib import Path
from typing import Any

import yaml

from megalodon.comparison.figures import all_figures
from megalodon.comparison.plan import Plan, Records
from megalodon.comparison.summary import Summary, summarize
from megalodon.comparison.tables import Table, all_tables
from megalodon.files import write_text

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }
table { border-collapse: collapse; margin: 0.5rem 0 1.5rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.7rem; border-bottom: 1px solid #ddd; text-align: right; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
.wide { overflow-x: auto; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(30rem, 1fr)); gap: 1rem; }
.plots svg { width: 100%; height: auto; }
pre { overflow-x: auto; background: #f6f6f6; padding: 0.7rem; font-size: 13px; }
figure { margin: 0; } figcaption { font-weight: 600; }
"""


def write_report(plan: Plan, records: Records, folder: Path) -> Summary:
    """Write `report.html`, `report.md` and `summary.json` of what is finished; each is whole at any instant.

    Returns:
        The numbers that they show.
    """
    summary = summarize(plan, records)
    tables = all_tables(summary)
    write_text(folder / "report.html", page(plan, records, summary, tables))
    write_text(folder / "report.md", markdown(plan, records, summary, tables))
    write_text(folder / "summary.json", json.dumps(_plain(summary), indent=1) + "\n")
    return summary


def markdown(plan: Plan, records: Records, summary: Summary, tables: list[Table]) -> str:
    """The report without its plots."""
    parts = [f"# {title(plan)}\n", _state(plan, summary), "", *(table.markdown() for table in tables)]
    parts += ["## Made with\n", *(f"- {line}" for line in machines(records)), ""]
    parts += ["## Config\n", f"```yaml\n{config_text(plan)}```\n"]
    return "\n".join(parts)


def page(plan: Plan, records: Records, summary: Summary, tables: list[Table]) -> str:
    """The report as a page of its own: plots inside, nothing fetched."""
    figures = "".join(
        f"<figure><figcaption>{html.escape(name)}</figcaption>{svg}</figure>" for name, svg in all_figures(summary)
    )
    body = [f"<h1>{html.escape(title(plan))}</h1>", f"<p>{html.escape(_state(plan, summary))}</p>"]
    body += [_html(tables[0]), f'<div class="plots">{figures}</div>', *(_html(table) for table in tables[1:])]
    made = "".join(f"<li>{html.escape(line)}</li>" for line in machines(records))
    body += [f"<h2>Made with</h2><ul>{made}</ul>"]
    body += [f"<h2>Config</h2><details open><pre>{html.escape(config_text(plan))}</pre></details>", "<h2>Runs</h2>"]
    for name in plan.names:
        for purpose, jobs in plan.runs(name, records).items():
            for job in jobs:
                settings = records[job.key]["settings"] if job.key in records else job.detail["config"]
                text = yaml.safe_dump(settings, sort_keys=False)
                about = f"{name}, seed {job.about['seed']}, at equal {purpose}: {job.key}"
                body.append(f"<details><summary>{html.escape(about)}</summary><pre>{html.escape(text)}</pre></details>")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title(plan))}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def title(plan: Plan) -> str:
    """What was compared, in a line."""
    parameters = max(each.parameters for each in plan.matched.values())
    return f"{', '.join(plan.names)} at {parameters / 1e6:.2f} M parameters"


def _state(plan: Plan, summary: Summary) -> str:
    tokens = plan.steps * plan.step_tokens
    done = summary.finished == summary.wanted and all(each.rate is not None for each in summary.architectures)
    state = "Finished." if done else f"Not finished: {summary.finished} of {summary.wanted} jobs known so far are done."
    seeds = len(plan.config.seeds)
    return f"{state} Each run reads {tokens:,} tokens; {seeds} seed{'s' * (seeds != 1)} each."


def machines(records: Records) -> list[str]:
    """Versions and machines of all records, each once."""
    found: dict[str, int] = {}
    for record in records.values():
        made = record["made_with"]
        text = (
            f"megalodon {made['megalodon']}, torch {made['torch']}, Transformers {made['transformers']}, Python "
            f"{made['python']}, {made['system']}, {made['processor']}, {made['processors']} processors, "
            f"{made['threads']} thread{'s' * (made['threads'] != 1)} a run"
            + (f", {made['gpu']}" if made["gpu"] else "")
        )
        found[text] = found.get(text, 0) + 1
    return [f"{text} ({count} records)" for text, count in found.items()]


def config_text(plan: Plan) -> str:
    """The comparison's config, every key spelled out."""
    text: str = yaml.safe_dump(plan.config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    return text


def _html(table: Table) -> str:
    head = "".join(f"<th>{_inline(cell)}</th>" for cell in table.headings)
    rows = "".join("<tr>" + "".join(f"<td>{_inline(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    return (
        f"<h2>{html.escape(table.title)}</h2><p>{html.escape(table.note)}</p>"
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _inline(text: str) -> str:
    return re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", html.escape(text))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value
