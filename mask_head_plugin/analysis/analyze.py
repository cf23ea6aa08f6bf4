"""From a run's files to its pages."""

from __future__ import annotations

from pathlib import Path

from ..config import ConfigError
from ..durable_files import make_output_folder
from .analysis import analyze
from .compare import compare
from .pages import write_pages
from .run_files import find_run_files


def run_analysis(
    run: Path,
    output: Path | None = None,
    annotations: Path | None = None,
    images: Path | None = None,
    dataset: str = "",
    other: Path | None = None,
    num_draws: int = 300,
) -> Path:
    """Analyses a run and writes analysis.md, analysis.json and analysis.html.

    Args:
        run: a folder that train_net.py or detectron2 wrote, or a file of results.
        output: a folder, made if missing; None for that of the results.
        annotations: a COCO file; None for the one that the run was evaluated with.
        images: a folder; None to look for it.
        dataset: name of the evaluated data set, where a run has several.
        other: another run on the same images, to compare with.
        num_draws: of the images, for the intervals of differences; at least 2.

    Returns:
        The folder.

    Raises:
        ConfigError: if files are missing or do not fit each other, or packages are missing.
        OSError: if a file cannot be written.
    """
    files = find_run_files(run, annotations, images, dataset)
    folder = output or files.results.parent
    if num_draws < 2:
        raise ConfigError(f"--draws {num_draws} makes no interval; take 2 at least, better 300")
    # Before the work, which takes a minute: what is wrong with names.
    make_output_folder(folder)
    files_of_other = other and find_run_files(other, files.annotations, images, dataset)
    analysis = analyze(files)
    comparison = None
    if files_of_other:
        comparison = compare(analysis, analyze(files_of_other), num_draws)
    write_pages(analysis, folder, comparison)
    return folder
