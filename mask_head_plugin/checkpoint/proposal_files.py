"""Reads precomputed proposals safely, without running code or exhausting memory."""

from __future__ import annotations

import pickle
import reprlib
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from ..weight_files import check_head, file_errors, read_plain_pickle


def read_proposals(path: Path) -> dict[str, Any]:
    """Reads precomputed proposals in the form that ``load_proposals_into_dataset`` expects.

    Args:
        path: a pickle.

    Returns:
        A dict with the ``ids`` of N images; ``boxes``, N arrays of shape (R, 4) in the units of
        ``bbox_mode``; and ``objectness_logits``, N arrays of shape (R,).

    Raises:
        ConfigError: if the file is missing or corrupt, refers to code that could run, or contains
            anything other than proposals.
    """
    with file_errors(path):
        check_head(path)
        with path.open("rb") as file:
            content = read_plain_pickle(file)
        if not isinstance(content, dict):
            raise pickle.UnpicklingError(f"it contains a {type(content).__name__}, not proposals")
        for old, new in (("indexes", "ids"), ("scores", "objectness_logits")):  # Detectron's names
            if old in content:
                content[new] = content.pop(old)
        missing = {"ids", "boxes", "objectness_logits"} - set(content)
        if missing:
            raise pickle.UnpicklingError(
                f"it is not a file of proposals: it has no {', '.join(sorted(missing))}"
            )
        _check_proposals(content)
        return content


def check_proposal_files(cfg: CfgNode, split: str) -> None:
    """Checks the proposal files of a config, if its model uses any.

    detectron2 unpickles these files later, which is safe for files that pass this check.

    Args:
        cfg: the config.
        split: ``TRAIN`` or ``TEST``.

    Raises:
        ConfigError: if a file contains anything other than proposals; names the file.
    """
    for name in cfg.DATASETS[f"PROPOSAL_FILES_{split}"] if cfg.MODEL.LOAD_PROPOSALS else ():
        read_proposals(Path(PathManager.get_local_path(name)))


def _check_proposals(content: dict[str, Any]) -> None:
    ids, boxes, scores = (content[key] for key in ("ids", "boxes", "objectness_logits"))
    lengths = [len(x) if isinstance(x, list | np.ndarray) else None for x in (ids, boxes, scores)]
    if len(set(lengths)) > 1 or None in lengths:
        raise pickle.UnpicklingError(
            f"ids, boxes and objectness_logits have lengths {lengths}, which must be equal"
        )
    for image_id, box, score in zip(ids, boxes, scores, strict=True):
        shapes = [getattr(x, "shape", None) for x in (box, score)]
        num_boxes = np.size(score)
        if shapes != [(num_boxes, 4), (num_boxes,)]:
            raise pickle.UnpicklingError(
                f"image {reprlib.repr(image_id)}: boxes and objectness_logits have shapes "
                f"{shapes[0]} and {shapes[1]}, but must have (R, 4) and (R,)"
            )
    mode = content.get("bbox_mode", BoxMode.XYXY_ABS)
    if mode not in list(BoxMode):
        raise pickle.UnpicklingError(
            f"bbox_mode {reprlib.repr(mode)} is not one of {[int(x) for x in BoxMode]}"
        )
