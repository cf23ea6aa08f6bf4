"""Writes an analysis: analysis.md, analysis.json and analysis.html."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from pathlib import Path

from ..durable_files import write_durably
from ..evaluation.coco_evaluator import without_nan
from ..pages.figures import Figure
from ..pages.render import check_packages, render
from ..pages.tables import as_csv, escape_markdown, latex, markdown
from .analysis import Analysis, as_json
from .compare import Comparison, comparison_json
from .comparison_sections import comparison_sections
from .curves import threshold_flag
from .pictures import LEGEND, changed_most, gallery
from .sections import Section, facts, sections

MARKDOWN_FILE, JSON_FILE, HTML_FILE = "analysis.md", "analysis.json", "analysis.html"
TABLE_FOLDER, FIGURE_FOLDER = "analysis_tables", "analysis_figures"
TEMPLATE = Path(__file__).with_name("analysis.html.j2")


def write_pages(analysis: Analysis, folder: Path, comparison: Comparison | None = None) -> None:
    """Writes the three files, plus tables and figures for papers. Replaces earlier files.

    Args:
        analysis: the analysis of a run.
        folder: output folder; created if missing.
        comparison: a comparison with another run; None for no comparison.

    Raises:
        ConfigError: if a package that analysis.html needs is missing. analysis.md, analysis.json
            and the tables have then been written.
        OSError: if a file cannot be written.
    """
    content = as_json(analysis)
    if comparison is not None:
        content["comparison"] = comparison_json(comparison)
    write_durably(folder / JSON_FILE, json.dumps(without_nan(content), indent=1) + "\n")
    write_durably(folder / MARKDOWN_FILE, render_markdown(analysis, comparison))
    for section in _sections(analysis, comparison):
        path = folder / TABLE_FOLDER / section.key
        write_durably(path.with_suffix(".csv"), as_csv(section.table))
        write_durably(path.with_suffix(".tex"), latex(section.table))
    check_packages(HTML_FILE, folder / MARKDOWN_FILE)
    # Each import takes a second or more, and plotly is an optional dependency.
    from ..pages.paper_plots import save_figures
    from .comparison_figures import comparison_figures
    from .figures import figures

    shown = {**(comparison_figures(comparison) if comparison else {}), **figures(analysis)}
    write_durably(folder / HTML_FILE, render_html(analysis, shown, comparison))
    (folder / FIGURE_FOLDER).mkdir(exist_ok=True)
    save_figures(list(itertools.chain(*shown.values())), folder / FIGURE_FOLDER)


def render_markdown(analysis: Analysis, comparison: Comparison | None = None) -> str:
    """Returns the text of analysis.md."""
    parts = [f"# {escape_markdown(_title(analysis))}"]
    parts.append(_list(f"{name}: {escape_markdown(text)}" for name, text in facts(analysis)))
    parts += ["## Findings", _list(map(escape_markdown, _findings(analysis, comparison)))]
    for section in _sections(analysis, comparison):
        parts += [f"## {section.title}", section.text, markdown(section.table)]
        if section.key == "classes" and (flag := threshold_flag(analysis.thresholds)):
            parts += ["For tools/demo.py and tools/predict.py:", f"```text\n{flag}\n```"]
    return "\n\n".join(part for part in parts if part) + "\n"


def render_html(
    analysis: Analysis, shown: dict[str, list[Figure]], comparison: Comparison | None = None
) -> str:
    """Returns the text of analysis.html with each section's figures. Needs jinja2 and plotly."""
    return render(
        TEMPLATE,
        title=_title(analysis),
        facts=facts(analysis),
        findings=_findings(analysis, comparison),
        sections=_sections(analysis, comparison),
        flag=threshold_flag(analysis.thresholds),
        figures=shown,
        gallery=gallery(analysis),
        changed=None if comparison is None else changed_most(analysis, comparison.other),
        legend=LEGEND,
    )


def _findings(analysis: Analysis, comparison: Comparison | None) -> list[str]:
    return [*(comparison.sentences() if comparison else []), *analysis.diagnosis]


def _sections(analysis: Analysis, comparison: Comparison | None) -> list[Section]:
    return [*(comparison_sections(comparison) if comparison else []), *sections(analysis)]


def _title(analysis: Analysis) -> str:
    return f"What the model gets wrong on {analysis.files.dataset}"


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
