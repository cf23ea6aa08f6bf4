"""Leaves out records that training cannot use, for DATASETS.CHECK ``warn``."""

from __future__ import annotations

import json
import logging
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils import comm

from ..dataset_check.config_datasets import check_dataset_files
from ..dataset_check.findings import Finding
from ..durable_files import write_durably
from ..messages import listed
from .coco_files import find_in_datasets, register_coco_files

logger = logging.getLogger(__name__)


def check_and_leave_out(cfg: CfgNode, *, train: bool = True) -> None:
    """Checks the data sets of a config; if CHECK is ``warn``, also leaves out unusable records.

    For each file in DATASETS.COCO_FILES that has such records, a copy without them is written to
    OUTPUT_DIR/coco_files, and the config and the catalog then name the copy. A warning lists the
    records. Evaluation and analyses therefore use the same records as training.

    Args:
        cfg: a config that is not frozen, with registered data sets.
        train: whether the model will be trained.

    Raises:
        ConfigError: as in check_dataset_files.
    """
    by_file: dict[str, list[Finding]] = defaultdict(list)
    for finding in check_dataset_files(cfg, train=train, leave_out=True):
        by_file[finding.file].append(finding)
    if not by_file:
        return
    entries = []
    for name, json_file, image_root in cfg.DATASETS.COCO_FILES:
        path = find_in_datasets(json_file)
        if path in by_file:
            copy = Path(cfg.OUTPUT_DIR) / "coco_files" / f"{name}.usable.json"
            _write_copy(Path(path), copy, by_file[path])
            json_file = str(copy)
        entries.append([name, json_file, image_root])
    cfg.DATASETS.COCO_FILES = entries
    register_coco_files(cfg)


def _write_copy(source: Path, copy: Path, unusable: Sequence[Finding]) -> None:
    content = json.loads(source.read_text(encoding="utf-8"))
    before = {section: len(content[section]) for section in ("images", "annotations")}
    _remove(content, unusable)
    if comm.is_main_process():
        write_durably(copy, json.dumps(content))
    kinds = Counter(finding.kind for finding in unusable)
    logger.warning(
        "DATASETS.CHECK warn: %s: left out %d of %d images and %d of %d annotations, which the run "
        "cannot use (%s): %s; the run uses %s, a copy without them",
        source,
        *(
            number
            for section, count in before.items()
            for number in (count - len(content[section]), count)
        ),
        ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()),
        listed(list(dict.fromkeys(x.place.replace(",", "") for x in unusable))),
        copy,
    )


def _remove(content: dict[str, Any], unusable: Sequence[Finding]) -> None:
    """Removes the records, and the annotations of images that are no longer listed."""
    for section in ("images", "annotations"):
        gone = {finding.index for finding in unusable if finding.section == section}
        content[section] = [x for k, x in enumerate(content[section]) if k not in gone]
    ids = {image["id"] for image in content["images"]}
    content["annotations"] = [x for x in content["annotations"] if x["image_id"] in ids]
