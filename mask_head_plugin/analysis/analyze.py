"""Analyses a run: finds its files and writes the pages."""

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
        run: a folder that train_net.py or detectron2 wrote, or a results file.
        output: output folder, created if missing; None for the folder of the results.
        annotations: a COCO file; None for the file that the run was evaluated with.
        images: the image folder; None to search the usual places.
        dataset: name of the evaluated data set, if the run has several.
        other: another run on the same images, to compare with.
        num_draws: how many bootstrap draws of the images the intervals use; at least 2.

    Returns:
        The output folder.

    Raises:
        ConfigError: if files are missing or do not belong together, or if a package is missing.
        OSError: if a file cannot be written.
    """
    files = find_run_files(run, annotations, images, dataset)
    folder = output or files.results.parent
    if num_draws < 2:
        raise ConfigError(
            f"--draws {num_draws} is too few for an interval; use at least 2, better 300"
        )
    # The analysis takes a minute, so report wrong paths and names first.
    make_output_folder(folder)
    files_of_other = other and find_run_files(
        other, annotations, images, dataset, files.annotations
    )
    analysis = analyze(files)
    comparison = None
    if files_of_other:
        comparison = compare(analysis, analyze(files_of_other), num_draws)
    write_pages(analysis, folder, comparison)
    return folder
