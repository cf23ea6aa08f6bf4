"""Matches rows of weights with a model's classes by name.

Shape alphabet: K classes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.modeling import ROIHeads
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.modeling.roi_heads.mask_head import MaskRCNNConvUpsampleHead

from ..class_names import ClassMatch
from ..config import ConfigError
from ..messages import listed
from ..modeling.mask_head import ClassSelection
from ..modeling.mask_scoring import MaskIoUHead
from .weight_fit import LENIENT, WeightsPolicy

logger = logging.getLogger(__name__)


def match_classes(
    weights: dict[str, torch.Tensor],
    model: torch.nn.Module,
    found: Sequence[str] | None,
    policy: WeightsPolicy,
    source: str,
    *,
    resuming: bool = False,
) -> Sequence[str] | None:
    """Moves the rows of each class to where the model has the class of the same name.

    Does this only if the class names of the weights and of the model are known.

    Classes that the weights lack keep their initial rows; the log lists these classes.

    Args:
        weights: tensors by the model's names; those with rows per class are replaced.
        model: a model with K classes.
        found: classes of the weights in the order of their rows.
        policy: which weights the run accepts.
        source: path of the weights.
        resuming: whether a run is resumed, which must not change its classes.

    Returns:
        Classes of the model after loading these weights, in the order of its rows; None if they are
        unknown.

    Raises:
        ConfigError: if classes would change in a resumed run, if an evaluation would use untrained
            classes, or if it is unknown which rows belong to which class.
    """
    own = policy.class_names
    if found is None:
        return None if policy.keeps_classes else own
    _check_rows(weights, model, found, source)
    if own is None:
        return found if len(found) == num_classes_of(model) else None
    if list(found) == list(own):
        return own
    match = ClassMatch.of(found, own, source=source, owner="the data set")
    if resuming:
        raise ConfigError(
            f"{source} cannot be resumed with other classes ({match}); resume with the data sets "
            "of that run, or start a new run with this file as MODEL.WEIGHTS"
        )
    if policy.keeps_classes and (match.new or match.dropped):
        return found
    if match.new and policy.whole and policy.strict:
        raise ConfigError(
            f"{source} was not trained on all classes of the data set ({match}); use the config of "
            f"the data set it was trained on, or {LENIENT}"
        )
    if not _has_known_rows(model):
        if policy.keeps_classes or (policy.whole and len(found) == len(own)):
            return found
        raise ConfigError(
            f"the classes of {source} differ from the data set's ({match}), and it is unknown "
            f"which rows of a {type(model).__name__} belong to which class; train on data with the "
            "file's classes in the same order, or use weights without class names"
        )
    state = model.state_dict()
    moved_from, moved_to = map(list, zip(*match.pairs, strict=True)) if match.pairs else ([], [])
    for name, num_background in class_tensors(model).items():
        if name in weights:
            sizes = (len(found), len(own), num_background)
            weights[name] = _moved(weights[name], state[name], moved_from, moved_to, sizes)
    logger.info(
        "%s: classes are matched by name; %s (rows %s); %s",
        source,
        f"found: {listed([own[row] for row in moved_to])}",
        "kept" if moved_from == moved_to else "moved",
        match,
    )
    return own


def _check_rows(
    weights: Mapping[str, torch.Tensor], model: torch.nn.Module, found: Sequence[str], source: str
) -> None:
    """Checks that a file has a class name for each row that belongs to a class."""
    for name, num_background in class_tensors(model).items():
        expected = len(found) + num_background
        if num_background and name in weights and len(weights[name]) != expected:
            raise ConfigError(
                f"{source} names {len(found)} classes, but {name} has {len(weights[name])} rows, "
                f"not {expected}; export it again with the right class names"
            )


def num_classes_of(model: torch.nn.Module) -> int | None:
    """Returns the number of classes of a detector; None for a model without classes."""
    for module in model.modules():
        if isinstance(module, ROIHeads):
            return int(module.num_classes)
    return getattr(model, "num_classes", None)  # detectors without ROI heads, such as RetinaNet


def _has_known_rows(model: torch.nn.Module) -> bool:
    """Returns whether class_tensors can find all layers with rows per class."""
    heads = [
        x.mask_head
        for x in model.modules()
        if isinstance(getattr(x, "mask_head", None), torch.nn.Module)
    ]
    known = ClassSelection | MaskRCNNConvUpsampleHead
    return bool(class_tensors(model)) and all(isinstance(head, known) for head in heads)


def _moved(
    weight: torch.Tensor,
    start: torch.Tensor,
    moved_from: list[int],
    moved_to: list[int],
    sizes: tuple[int, int, int],
) -> torch.Tensor:
    """Copies the rows of shared classes from the file into the model's initial tensor.

    A tensor with another layout is returned unchanged; later checks report that it does not fit.

    Args:
        weight: tensor in the file.
        start: initial tensor of the model.
        moved_from: rows of the shared classes in the file.
        moved_to: rows of the same classes in the model.
        sizes: number of classes in the file, number of classes in the model, and number of
            background rows.
    """
    found, own, num_background = sizes
    rows, own_rows = len(weight) - num_background, len(start) - num_background
    if weight.shape[1:] != start.shape[1:] or rows % found or rows // found != own_rows // own:
        return weight
    result = start.detach().to("cpu", weight.dtype, copy=True)
    by_class = result[:own_rows].unflatten(0, (own, -1))
    by_class[moved_to] = weight[:rows].unflatten(0, (found, -1))[moved_from]
    result[own_rows:] = weight[rows:]
    return result


def class_tensors(model: torch.nn.Module) -> dict[str, int]:
    """Returns the names of tensors with rows per class and their numbers of background rows.

    Rows are grouped by class, in the order of the classes; background rows come last. The layers of
    box predictors, mask heads and mask scoring are included unless they are class-agnostic.
    """
    modules = list(model.named_modules())
    boxes = [(name, x) for name, x in modules if isinstance(x, FastRCNNOutputLayers)]
    if not boxes:
        return {}
    num_classes = boxes[0][1].num_classes
    layers: dict[str, int] = {}
    for name, module in boxes:
        layers[f"{name}.cls_score"] = 1
        per_class = len(module.bbox_pred.weight) > len(module.box2box_transform.weights)
        if per_class or num_classes == 1:
            layers[f"{name}.bbox_pred"] = 0
    for name, module in modules:
        if isinstance(module, ClassSelection):
            rows = module.num_classes
        elif isinstance(module, MaskRCNNConvUpsampleHead | MaskIoUHead):
            rows = len(module.predictor.weight)
        else:
            continue
        if rows == num_classes:
            layers[f"{name}.predictor"] = 0
    state = model.state_dict()
    names = {f"{name}.{part}": n for name, n in layers.items() for part in ("weight", "bias")}
    return {name: n for name, n in names.items() if name in state}


def file_classes(checkpoint: Mapping[str, Any], source: str) -> list[str] | None:
    """Returns a checkpoint's class names in the order of its rows; None if it has none.

    Raises:
        ConfigError: if class_names in the checkpoint is not a list of names.
    """
    names = checkpoint.get("class_names")
    if names is None:
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or not names:
        raise ConfigError(f"{source}: class_names is not a list of names; export the file again")
    return names
