"""Compares stock detectron2 with the plugin, for models of the model zoo and other models."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from detectron2.config import CfgNode

from ..config import ConfigError
from ..data import check_registered_datasets, register_coco_files
from ..durable_files import make_output_folder
from ..machine import full_float32
from ..messages import one_line
from .measurement import Comparison, choose_images, compare_twins
from .report import write_markdown, write_pictures, write_table
from .twins import load_model_config, load_twins, twin_configs
from .zoo import ZOO_MODELS, find_config, find_weights

logger = logging.getLogger(__name__)

JSON_FILE, MARKDOWN_FILE = "comparison.json", "comparison.md"


def compare_config(
    config: str,
    weights: str,
    dataset: str | None,
    output: Path,
    num_images: int | None = None,
    opts: Sequence[str] = (),
    min_score: float = 0.5,
) -> Comparison:
    """Compares a config's stock model with the plugin's model and writes the results.

    On CUDA, TF32 is switched off, so that differences come from the models and not from the choice
    of convolution algorithms.

    Args:
        config: a config of the model zoo or a file; see ``zoo.find_config``.
        weights: a file, a folder or "zoo"; see ``zoo.find_weights``.
        dataset: a registered data set or one of DATASETS.COCO_FILES; None for the first of the
            config's DATASETS.TEST.
        output: output folder, created if missing, for comparison.md, comparison.json and pictures.
        num_images: how many images to use, spread evenly over the data set; None for all.
        opts: "KEY VALUE" pairs in one flat list.
        min_score: detections with a higher score count towards the verdict.

    Raises:
        ConfigError: if an argument cannot be used, or ``output`` already has a comparison.
        OSError: if a result cannot be written.
    """
    _check_numbers(num_images, min_score)
    found = find_config(config)
    cfg = load_model_config(found, opts)
    cfg.OUTPUT_DIR = str(output)
    check_output(output)
    prepare_dataset(cfg, dataset)
    if not found.is_lazy:
        twin_configs(cfg)  # reports errors before anything is downloaded
    path = find_weights(weights, found)
    twins = load_twins(cfg, path, found.file if found.is_lazy else "")
    name = choose_images(cfg.DATASETS.TEST[0], num_images, output)
    with full_float32():
        comparison = compare_twins(twins, found, path, name, output, min_score)
        pictures = write_pictures(twins, comparison, output)
    write_markdown(comparison, pictures, output / MARKDOWN_FILE)
    comparison.write(output / JSON_FILE)  # last: marks the comparison as complete
    return comparison


def compare_all(
    weights: str,
    dataset: str | None,
    output: Path,
    num_images: int | None = None,
    opts: Sequence[str] = (),
    min_score: float = 0.5,
) -> dict[str, Comparison | str]:
    """Compares both models of every config in ZOO_MODELS; continues after failures.

    Args:
        weights: "zoo", or a folder of weights; see ``zoo.find_weights``.
        dataset: data set for all configs; None for the first of each config's DATASETS.TEST.
        output: output folder for comparison.md, which has a table of all configs, and for a folder
            per config.
        num_images: see ``compare_config``.
        opts: "KEY VALUE" pairs for all configs.
        min_score: detections with a higher score count towards the verdict.

    Returns:
        For each config, its comparison or one line with the reason for its failure.

    Raises:
        ConfigError: if an argument cannot be used for any config.
        OSError: if the table cannot be written.
    """
    _check_numbers(num_images, min_score)
    if Path(weights).is_file():
        raise ConfigError(
            f"--all needs --weights zoo or a folder of weights, but {weights} is a file"
        )
    check_output(output)
    results: dict[str, Comparison | str] = {}
    for number, model in enumerate(ZOO_MODELS, start=1):
        logger.info("[%d/%d] %s", number, len(ZOO_MODELS), model.config)
        folder = output / model.config
        try:
            results[model.config] = compare_config(
                model.config, weights, dataset, folder, num_images, opts, min_score
            )
        except Exception as error:  # for example out of memory; other configs may still work
            kind = "" if isinstance(error, ConfigError) else f"{type(error).__name__}: "
            results[model.config] = kind + one_line(error)
            logger.warning("%s was not compared: %s", model.config, results[model.config])
        write_table(results, output / MARKDOWN_FILE)
    return results


def _check_numbers(num_images: int | None, min_score: float) -> None:
    if num_images is not None and num_images < 1:
        raise ConfigError(f"--num-images {num_images} must be at least 1")
    if not 0 <= min_score < 1:
        raise ConfigError(f"--score {min_score} must be at least 0 and below 1")


def check_output(output: Path) -> None:
    """Creates the output folder.

    Raises:
        ConfigError: if the folder cannot be written to or already has a comparison.
    """
    make_output_folder(output)
    for name in (JSON_FILE, MARKDOWN_FILE):
        if (output / name).exists():
            raise ConfigError(f"--output {output} already has {name}; choose another folder")


def prepare_dataset(cfg: CfgNode, dataset: str | None) -> None:
    """Registers a data set and makes it the only one in DATASETS.TEST.

    Args:
        cfg: config of the model; changed in place.
        dataset: name of the data set; None for the first of DATASETS.TEST.

    Raises:
        ConfigError: if the data set is missing or does not have the model's classes.
    """
    names = cfg.DATASETS.TEST if dataset is None else (dataset,)
    if not names:
        raise ConfigError("DATASETS.TEST is empty; choose a data set with --dataset")
    cfg.DATASETS.TEST = tuple(names[:1])
    register_coco_files(cfg)
    cfg.DATASETS.TRAIN = ()  # training data need not exist on this machine
    check_registered_datasets(cfg)
