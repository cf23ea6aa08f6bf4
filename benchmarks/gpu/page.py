"""Writes the page of gpu_campaign.py: verdicts first, then the results of each part."""

from __future__ import annotations

from typing import Any

from gpu.parts import PARTS
from gpu.promises import MET, PROMISES
from tabulate import tabulate

SKIPPED_COLUMNS = ("busy", "threads")


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as a Markdown table with empty cells for missing values."""
    shown = [{k: _cell(v) for k, v in row.items() if k not in SKIPPED_COLUMNS} for row in rows]
    return tabulate(shown, headers="keys", tablefmt="github", disable_numparse=True)


def _cell(value: Any) -> str:
    return str(value).replace("|", "/").replace("\n", ", ")


def verdicts(outcomes: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
    """Returns the verdict on each promise as a table row."""
    results = {name: x["results"] for name, x in outcomes.items() if x["results"] is not None}
    return [promise.verdict(results) for promise in PROMISES]


def write_page(campaign: dict[str, Any]) -> str:
    """Returns the page as Markdown.

    Args:
        campaign: the content of campaign.json.
    """
    outcomes, promises = campaign["parts"], campaign["verdicts"]
    count = sum(x["verdict"] == MET for x in promises)
    lines = [
        "# mask_head_plugin on a GPU",
        "",
        f"{campaign['date']}, `{campaign['command']}`, {campaign['device']}. "
        f"{count} of {len(promises)} promises are met. Ratios are detectron2 / plugin; times are "
        "medians of several alternating runs. Convolutions use TF32, PyTorch's default, except in "
        "parity.",
        "",
        "## Promises",
        "",
        table(promises),
        "",
        "## Parts",
        "",
        table(
            [
                {"part": name, "status": x["status"], "seconds": x["seconds"], "told": x["told"]}
                for name, x in outcomes.items()
            ]
        ),
    ]
    for part in PARTS:
        outcome = outcomes.get(part.name)
        if outcome is None or outcome["results"] is None:
            continue
        results = outcome["results"]
        lines += ["", f"## {part.name}: {part.what}", ""]
        for key in ("counts", "verdict", "costs", "steps"):
            if key in results:
                found = results[key]
                lines += [table(found) if isinstance(found, list) else f"{key}: {found}", ""]
        lines.append(table(results["rows"]) if results.get("rows") else "Nothing to list.")
    return "\n".join(lines) + "\n"
