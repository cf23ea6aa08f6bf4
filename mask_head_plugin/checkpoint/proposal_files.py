"""Reads precomputed proposals; nothing in a file can run or fill the memory."""

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
    """Reads precomputed proposals as detectron2's ``load_proposals_into_dataset`` expects them.

    Args:
        path: a pickle.

    Returns:
        ``ids`` of N images, ``boxes``: N arrays (R, 4) in the units of ``bbox_mode``,
        ``objectness_logits``: N arrays (R,).

    Raises:
        ConfigError: if the file is missing or corrupt, names anything that could run, or holds
            something else.
    """
    with file_errors(path):
        check_head(path)
        with path.open("rb") as file:
            content = read_plain_pickle(file)
        if not isinstance(content, dict):
            raise pickle.UnpicklingError(f"it holds a {type(content).__name__}, not proposals")
        for old, new in (("indexes", "ids"), ("scores", "objectness_logits")):  # Detectron's
            if old in content:
                content[new] = content.pop(old)
        missing = {"ids", "boxes", "objectness_logits"} - set(content)
        if missing:
            raise pickle.UnpicklingError(f"it has no {', '.join(sorted(missing))}: no proposals")
        _check_proposals(content)
        return content


def check_proposal_files(cfg: CfgNode, split: str) -> None:
    """Checks the proposal files of a config whose model asks for proposals.

    detectron2 unpickles them afterwards; files that pass here are safe for it to read.

    Args:
        cfg: a config.
        split: ``TRAIN`` or ``TEST``.

    Raises:
        ConfigError: naming the first file that is not one of proposals and nothing else.
    """
    for name in cfg.DATASETS[f"PROPOSAL_FILES_{split}"] if cfg.MODEL.LOAD_PROPOSALS else ():
        read_proposals(Path(PathManager.get_local_path(name)))


def _check_proposals(content: dict[str, Any]) -> None:
    ids, boxes, scores = (content[key] for key in ("ids", "boxes", "objectness_logits"))
    lengths = [len(x) if isinstance(x, list | np.ndarray) else None for x in (ids, boxes, scores)]
    if len(set(lengths)) > 1 or None in lengths:
        raise pickle.UnpicklingError(
            f"ids, boxes and objectness_logits have lengths {lengths}; make them equal"
        )
    for image_id, box, score in zip(ids, boxes, scores, strict=True):
        shapes = [getattr(x, "shape", None) for x in (box, score)]
        num_boxes = np.size(score)
        if shapes != [(num_boxes, 4), (num_boxes,)]:
            raise pickle.UnpicklingError(
                f"image {reprlib.repr(image_id)}: boxes and objectness_logits have shapes "
                f"{shapes[0]} and {shapes[1]}; make them (R, 4) and (R,)"
            )
    mode = content.get("bbox_mode", BoxMode.XYXY_ABS)
    if mode not in list(BoxMode):
        raise pickle.UnpicklingError(
            f"bbox_mode {reprlib.repr(mode)} is not one of {[int(x) for x in BoxMode]}"
        )
