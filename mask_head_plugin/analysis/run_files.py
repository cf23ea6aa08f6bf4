"""Finds the files that an analysis needs: results, annotations and images."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from ..config import ConfigError, load_config
from ..data import register_coco_files
from ..evaluation.coco_ap import COCO_MAX_DETECTIONS
from ..messages import listed, one_line

logger = logging.getLogger(__name__)

RESULTS, METRICS, CONFIG = "coco_instances_results.json", "metrics.json", "config.yaml"
MASK_SIDE = 28
"""M of the paper's mask branch (Figure 4, right), assumed if no config is found."""
OTHER_FOLDERS = ("keypoints",)
"""Result folders to skip because they contain neither boxes nor masks."""


@dataclass(frozen=True)
class RunFiles:
    """The files of one run.

    Attributes:
        results: detections in COCO's result format.
        annotations: the COCO file of the same images.
        image_folders: folders that may contain the images, likeliest first.
        dataset: name of the data set or, if unknown, of the annotation file.
        max_detections: how many detections count per image and class; negative for no limit.
        mask_side: M, the side of the mask branch's output.
    """

    results: Path
    annotations: Path
    image_folders: tuple[Path, ...]
    dataset: str
    max_detections: int
    mask_side: int


def find_run_files(
    run: Path,
    annotations: Path | None = None,
    images: Path | None = None,
    dataset: str = "",
    if_unknown: Path | None = None,
) -> RunFiles:
    """Finds the files of a run.

    Args:
        run: a folder that train_net.py or detectron2 wrote, or a results file.
        annotations: a COCO file; None for the file that the run was evaluated with.
        images: the image folder; None to search the usual places.
        dataset: name of the evaluated data set, if the run has several.
        if_unknown: a COCO file for a run that does not record its file; None if there is none.

    Raises:
        ConfigError: if results or annotations are missing, or if the run has results of several
            data sets and ``dataset`` names none of them, or if metrics.json has a wrong entry.
    """
    results = _results(run, dataset)
    metrics = _evaluation(results.with_name(METRICS))
    cfg = _config(results)
    evaluated = metrics.get("dataset") or ""
    if dataset and evaluated and dataset not in (evaluated, results.parent.name):
        raise ConfigError(
            f"--dataset {dataset} does not match {results}, which has the results of {evaluated}"
        )
    name = dataset or evaluated or _only_dataset(cfg)
    known = MetadataCatalog.get(name) if name in MetadataCatalog.list() else None
    if annotations is None:
        recorded = metrics.get("annotations") or (known and known.get("json_file")) or if_unknown
        if not recorded:
            raise ConfigError(
                f"{results} does not record its annotation file: name the COCO file of these "
                "images with --annotations FILE"
            )
        annotations = Path(recorded)
    if not annotations.is_file():
        problem = "is a folder" if annotations.is_dir() else "does not exist"
        raise ConfigError(
            f"annotation file {annotations} {problem}; name the COCO file of these images "
            "with --annotations FILE"
        )
    if images is not None and not images.is_dir():
        raise ConfigError(f"--images {images} is not a folder")
    root = known.get("image_root") if known is not None else None
    return RunFiles(
        results=results,
        annotations=annotations,
        image_folders=(images,) if images else tuple(_places(annotations, root)),
        dataset=name or annotations.stem,
        max_detections=metrics.get("max_detections") or COCO_MAX_DETECTIONS,
        mask_side=_mask_side(cfg),
    )


def _results(run: Path, dataset: str) -> Path:
    if run.is_file():
        return run
    if not run.is_dir():
        raise ConfigError(f"{run} is neither a run's folder nor a results file")
    places = [run / RESULTS, run / "inference" / RESULTS, *run.glob(f"inference/*/{RESULTS}")]
    found = [x for x in places if x.is_file() and x.parent.name not in OTHER_FOLDERS]
    if dataset and len(found) > 1:
        found = [x for x in found if x.parent.name == dataset] or found
    if not found:
        raise ConfigError(
            f"{run} and its folder inference have no {RESULTS}: evaluate the run first with "
            "train_net.py --eval-only, or name a results file"
        )
    if len(found) > 1:
        names = listed(sorted(x.parent.name for x in found))
        raise ConfigError(
            f"{run} has results of several data sets: choose one with --dataset ({names})"
        )
    return found[0]


def _evaluation(path: Path) -> dict[str, Any]:
    """Returns what MaskEvaluator saved next to the results; empty for another evaluator.

    Raises:
        ConfigError: if an entry that the analysis uses has the wrong type.
    """
    try:
        text = path.read_text()
    except OSError:
        return {}
    except ValueError as error:
        return _ignored(path, error)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        # detectron2's metrics.json has one record per line.
        return {} if _is_object(text.partition("\n")[0]) else _ignored(path, error)
    if not isinstance(content, dict):
        return _ignored(path, TypeError("it is not a JSON object"))
    for key, expected in {"annotations": "a path", "dataset": "a name"}.items():
        if not isinstance(content.get(key, ""), str | None):
            raise _wrong_entry(path, key, content[key], expected)
    limit = content.get("max_detections")
    if limit is not None and (type(limit) is not int or limit == 0):
        raise _wrong_entry(path, "max_detections", limit, "a number of detections (-1 for all)")
    return content


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _ignored(path: Path, error: Exception) -> dict[str, Any]:
    told = "%s is ignored, so %d detections count per image and class: %s"
    logger.warning(told, path, COCO_MAX_DETECTIONS, one_line(error))
    return {}


def _wrong_entry(path: Path, key: str, value: Any, expected: str) -> ConfigError:
    return ConfigError(
        f"{path}: {key} is {value!r}, not {expected}; correct it, or evaluate the run again"
    )


def _config(results: Path) -> CfgNode | None:
    """Reads the run's config and registers its data sets; None if it is missing or unusable.

    Raises:
        ConfigError: if its mask branch has no size.
    """
    for folder in results.absolute().parents[:3]:
        if (folder / CONFIG).is_file():
            try:
                cfg = load_config(str(folder / CONFIG))
                register_coco_files(cfg)
            except (ConfigError, OSError, KeyError, AssertionError) as error:
                told = "%s is ignored, so masks of %d x %d are assumed: %s"
                logger.warning(told, folder / CONFIG, MASK_SIDE, MASK_SIDE, one_line(error))
                return None
            if cfg.MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION < 1:
                raise ConfigError(
                    f"{folder / CONFIG}: MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION is "
                    f"{cfg.MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION}; it must be at least 1"
                )
            return cfg
    return None


def _only_dataset(cfg: CfgNode | None) -> str:
    names = list(cfg.DATASETS.TEST) if cfg is not None else []
    return names[0] if len(names) == 1 else ""


def _mask_side(cfg: CfgNode | None) -> int:
    """Returns M, which is twice the pooled side because FCNMaskHead doubles it."""
    return 2 * int(cfg.MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION) if cfg is not None else MASK_SIDE


def _places(annotations: Path, root: str | None) -> Iterator[Path]:
    if root:
        yield Path(root)
    folder = annotations.parent
    split = annotations.stem.removeprefix("instances_")
    for base in (folder, folder.parent):
        yield from (base, base / "images", base / split)


def image_folder(files: RunFiles, file_name: str) -> Path | None:
    """Returns the image folder that contains this file; None if no folder contains it."""
    try:
        return next((x for x in files.image_folders if (x / file_name).is_file()), None)
    except OSError:  # for example, a name that is too long
        return None


def read_results(path: Path) -> list[dict[str, Any]]:
    """Returns a file's detections in COCO's result format.

    Raises:
        ConfigError: if the file cannot be read or does not have COCO's result format.
    """
    try:
        results = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as results: {one_line(error)}") from error
    if isinstance(results, dict) and "annotations" in results:
        results = results["annotations"]  # predictions.json of tools/demo.py
    if not isinstance(results, list) or not all(isinstance(x, dict) for x in results):
        raise ConfigError(
            f"{path} is not a results file: COCO's format is a list of detections with image_id, "
            "category_id, score, bbox and segmentation"
        )
    return results
