"""Writes an ablation's results: report.md for a paper or README, report.html to explore.

Both need only the ablation's folder (ablation.json and the trials' folders) and can be written at
any time. They report the finished trials and list the trials that are missing or have failed.
report.html includes its scripts and pictures, so it opens without a network.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...durable_files import write_durably
from ...pages.figures import Figure
from ...pages.render import check_packages, render
from ...pages.tables import (
    Table,
    as_csv,
    code_markdown,
    escape_markdown,
    latex,
    markdown,
    number,
)
from ..trial_folder import Trial
from .pictures import side_by_side
from .study import Study, machine, read_study
from .tables import (
    build_table,
    changed_keys,
    findings,
    paper_table,
    table_for_programs,
    unfinished_table,
)

MARKDOWN_FILE, HTML_FILE, PLOT_FILE = "report.md", "report.html", "intervals.png"
CSV_FILE, LATEX_FILE = "report.csv", "report.tex"
TEMPLATE = "report.html.j2"
EMBEDDED = ("shapes_train", "shapes_val")
ANALYSES_NOTE = "Error analysis of each variant; run the command if there is no link yet."
PAPER_NOTE = (
    "The paper's numbers are for the paper's models and data; compare differences, not values."
)


def write_report(directory: Path, num_draws: int = 1000) -> None:
    """Writes report.md with intervals.png, report.html, and files for a paper.

    The files for a paper are the table as report.csv and report.tex, and plots as SVG and PDF.
    Earlier reports are replaced.

    Args:
        directory: folder with ablation.json and the trials, some of which may be missing.
        num_draws: number of bootstrap draws for the intervals; at least 2.

    Raises:
        ConfigError: if the folder is not an ablation's or has no finished trial, or if a package
            that report.html needs is missing. In the last case, report.md is still written.
        OSError: if a report cannot be written.
    """
    from ...pages.paper_plots import save_figures  # importing matplotlib takes a second
    from .interval_plot import plot_intervals

    study = read_study(directory, num_draws)
    picture = PLOT_FILE if plot_intervals(study, directory / PLOT_FILE) else ""
    write_durably(directory / MARKDOWN_FILE, render_markdown(study, picture))
    table = build_table(study)
    write_durably(directory / CSV_FILE, as_csv(table_for_programs(study)))
    write_durably(directory / LATEX_FILE, latex(_without(table, "differs")))
    check_packages(HTML_FILE, directory / MARKDOWN_FILE)
    from .figures import figures  # needs plotly

    shown = figures(study)
    write_durably(directory / HTML_FILE, render_html(study, shown))
    # intervals.svg already shows the differences, with individual seeds.
    save_figures([x for x in shown if x.name != "differences"], directory)


def render_markdown(study: Study, picture: str = "") -> str:
    """Returns the text of report.md, which shows the named picture, if any."""
    parts = [f"# {escape_markdown(_title(study))}"]
    parts.append(_list(f"{name}: {escape_markdown(text)}" for name, text in facts(study)))
    parts += ["## Findings", _list(map(escape_markdown, findings(study)))]
    if picture:
        parts.append(f"![Differences from the baseline with their intervals]({picture})")
    table = build_table(study)
    parts += ["## Variants", markdown(_without(table, "differs"))]
    parts.append(_list(f"{c.label}: {escape_markdown(c.meaning)}" for c in _explained(table)))
    parts += ["### What differs", _list(_changed_keys(study))]
    paper = paper_table(study)
    if paper.rows:
        parts += ["## The paper's results next to ours", markdown(paper), PAPER_NOTE]
    parts += ["## What each variant gets wrong", ANALYSES_NOTE, _list(_analyses_markdown(study))]
    unfinished = unfinished_table(study)
    if unfinished.rows:
        parts += ["## Trials that have not finished", markdown(unfinished)]
    command = repeat_command(study)
    if command:
        parts += ["## How to repeat it", f"```bash\n{command}\n```"]
    return "\n\n".join(parts) + "\n"


def render_html(study: Study, shown: Sequence[Figure]) -> str:
    """Returns the text of report.html with the given figures. Needs jinja2 and plotly."""
    return render(
        Path(__file__).with_name(TEMPLATE),
        title=_title(study),
        facts=facts(study),
        findings=findings(study),
        table=build_table(study),
        baseline=study.variants.index(study.baseline),
        paper=paper_table(study),
        paper_note=PAPER_NOTE,
        figures=shown,
        gallery=side_by_side(study),
        analyses=analyses(study),
        analyses_note=ANALYSES_NOTE,
        unfinished=unfinished_table(study),
        command=repeat_command(study),
    )


def facts(study: Study) -> list[tuple[str, str]]:
    """Returns facts about the ablation, such as its data set, as pairs of a name and a text."""
    finished = study.finished
    records = [trial.record() for trial in finished]
    dates = sorted(str(r["finished_at"])[:10] for r in records if r.get("finished_at"))
    period = list(dict.fromkeys([dates[0], dates[-1]])) if dates else []
    found = {
        "data set": study.dataset,
        "images": _num_images(study),
        "metric": study.metric,
        "baseline": study.baseline.name,
        "seeds": ", ".join(map(str, study.seeds)),
        "finished trials": f"{len(finished)} of {len(study.trials)}",
        "iterations": _iterations(finished),
        "intervals": f"95%, over seeds and images (paired bootstrap, {study.num_draws} draws)",
        "date": " to ".join(period),
        "machine": _distinct(machine(trial) for trial in finished),
        "versions": _distinct(_versions(r) for r in records),
        "commit": _distinct(_short_commit(str(r["commit"])) for r in records if r.get("commit")),
    }
    return [(name, text) for name, text in found.items() if text]


def repeat_command(study: Study) -> str:
    """Returns the command that ran the ablation; empty if unknown."""
    command = study.description.get("command") or ""
    return shlex.join(command) if isinstance(command, list) else str(command)


def analyses(study: Study) -> list[tuple[str, str, str]]:
    """Returns each variant's name, with the command and the page of its analysis.

    An analysis covers the variant's first finished seed and compares it with the baseline's first
    finished seed. The page's path is empty if the page has not been written.
    """
    baseline = study.baseline.finished[:1]
    found = []
    for variant in study.variants:
        for trial in variant.finished[:1]:
            command = ["python", "tools/analyze.py", str(trial.inference)]
            if baseline and trial is not baseline[0]:
                command += ["--compare", str(baseline[0].inference)]
            page = trial.inference / "analysis.html"
            relative = page.relative_to(trial.folder.parent.parent).as_posix()
            found.append((variant.name, shlex.join(command), relative if page.is_file() else ""))
    return found


def _analyses_markdown(study: Study) -> list[str]:
    return [
        f"[{escape_markdown(name)}]({page})"
        if page
        else f"{escape_markdown(name)}: {code_markdown(command)}"
        for name, command, page in analyses(study)
    ]


def _title(study: Study) -> str:
    """Returns the title and the data set."""
    dataset = "the embedded data set" if study.dataset in EMBEDDED else study.dataset
    return f"{study.description['title']}, on {dataset}"


def _num_images(study: Study) -> str:
    """Returns the number of images that the metric was measured on; empty if unknown."""
    for of_seeds in study.matches(study.task).values():
        return number(len(of_seeds[0].image_ids), ",.0f")
    return ""


def _iterations(trials: Sequence[Trial]) -> str:
    """Returns how many iterations the trials trained; empty if unknown."""
    trained = [x for trial in trials if (x := trial.cost("iterations")) > 0]
    extremes = dict.fromkeys(f"{x:.0f}" for x in (min(trained), max(trained))) if trained else ()
    return " to ".join(extremes)


def _versions(record: dict[str, Any]) -> str:
    versions = record.get("versions")
    found = versions.items() if isinstance(versions, dict) else ()
    return ", ".join(f"{name} {version}" for name, version in found)


def _short_commit(commit: str) -> str:
    """Shortens a commit; keeps the + at its end that marks uncommitted changes."""
    return commit[:12].rstrip("+") + "+" * commit.endswith("+")


def _distinct(texts: Any) -> str:
    return " / ".join(dict.fromkeys(text for text in texts if text))


def _changed_keys(study: Study) -> list[str]:
    """Describes in Markdown how each variant's config differs from the baseline's."""
    return [
        f"{escape_markdown(variant.name)}: "
        + ("; ".join(map(code_markdown, changed_keys(variant))) or "the baseline")
        for variant in study.variants
        if variant.differs or variant is study.baseline
    ]


def _without(table: Table, key: str) -> Table:
    kept = [k for k, column in enumerate(table.columns) if column.key != key]
    return Table([table.columns[k] for k in kept], [[row[k] for k in kept] for row in table.rows])


def _explained(table: Table) -> list[Any]:
    """Returns the columns that need an explanation below the table."""
    unexplained = {"variant", "differs", "AP50", "AP75", "APs", "APm", "APl"}
    return [c for c in table.columns if c.meaning and c.key not in unexplained]


def _list(lines: Any) -> str:
    return "\n".join(f"- {line}" for line in lines)
