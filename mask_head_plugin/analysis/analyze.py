"""From a run's files to its pages."""

from __future__ import annotations

from pathlib import Path

from .analysis import analyze
from .pages import write_pages
from .run_files import find_run_files


def run_analysis(
    run: Path,
    output: Path | None = None,
    annotations: Path | None = None,
    images: Path | None = None,
    dataset: str = "",
) -> Path:
    """Analyses a run and writes analysis.md, analysis.json and analysis.html.

    Args:
        run: a folder that train_net.py or detectron2 wrote, or a file of results.
        output: a folder, made if missing; None for that of the results.
        annotations: a COCO file; None for the one that the run was evaluated with.
        images: a folder; None to look for it.
        dataset: name of the evaluated data set, where a run has several.

    Returns:
        The folder.

    Raises:
        ConfigError: if files are missing or do not fit each other, or packages are missing.
        OSError: if a file cannot be written.
    """
    files = find_run_files(run, annotations, images, dataset)
    folder = output or files.results.parent
    write_pages(analyze(files), folder)
    return folder
