"""Whether weights fit a model, and what becomes of those that do not.

Shape alphabet: K classes.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from detectron2.config import CfgNode
from detectron2.modeling import ROIHeads
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.modeling.roi_heads.mask_head import MaskRCNNConvUpsampleHead

from ..class_names import ClassMatch, check_trained
from ..config import ConfigError
from ..data import dataset_categories
from ..messages import NAMES_IN_ERROR, listed
from ..modeling.mask_head import ClassSelection
from ..modeling.mask_scoring import MaskIoUHead

logger = logging.getLogger(__name__)

LENIENT = "set MODEL.WEIGHTS_STRICT False to load what fits"
ADVICE = f"give weights of this config, or {LENIENT}"
MODULES_IN_ERROR = 12

_TRUNKS = ("backbone.bottom_up.", "backbone.net.", "backbone.")
"""Where models have what ImageNet trains; the first that a model has. What else stands in
``backbone.`` is new, such as the pyramid's convolutions."""
_RES5 = "roi_heads.res5."
_MADE_ANEW = ("pixel_mean", "pixel_std", "num_batches_tracked")
"""Ends of names whose values come from the config, or count for nothing."""


@dataclass(frozen=True)
class WeightsPolicy:
    """What weights must be for a model.

    Attributes:
        class_names: the K classes of the model, in its order, if known: rows of weights that name
            their classes are moved to the rows of those names.
        keeps_classes: whether weights of other classes keep theirs: of a model that only predicts,
            ``class_names`` is no more than the order that serves best.
        strict: whether weights that do not fit are an error.
        whole: whether the weights must fill the whole model, since nothing will train it.
        surplus: whether the weights of a detector may hold more than the model.
        advice: what to do about weights that do not fit.
    """

    class_names: Sequence[str] | None = None
    keeps_classes: bool = False
    strict: bool = True
    whole: bool = False
    surplus: bool = False
    advice: str = ADVICE

    @classmethod
    def from_config(cls, cfg: CfgNode, *, train: bool) -> WeightsPolicy:
        """Returns the policy of a run that trains, or one that only evaluates."""
        names = class_names(cfg, "TRAIN" if train else "TEST")
        return cls(names, strict=cfg.MODEL.WEIGHTS_STRICT, whole=not train)

    @classmethod
    def of_predictor(cls, datasets: CfgNode | None, num_classes: int | None) -> WeightsPolicy:
        """Returns the policy for a model that predicts: its classes are those of its weights.

        Args:
            datasets: the section DATASETS of its config. Weights of the classes of the first data
                set of TEST, or else TRAIN, take the order that these have there.
            num_classes: K, None for a model without classes.
        """
        named = (*datasets.TEST[:1], *datasets.TRAIN[:1]) if isinstance(datasets, CfgNode) else ()
        return cls(_known_names(datasets, named, num_classes), keeps_classes=True)


@dataclass(frozen=True)
class Fit:
    """How the names and shapes of weights compare with a model's.

    Attributes:
        fitting: names of the model that have a value of the right shape.
        missing: names of the model that have none.
        unexpected: names of values that have no place in the model.
        wrong_shape: by the model's name, the shape of the value and that of its place.
    """

    fitting: list[str]
    missing: list[str]
    unexpected: list[str]
    wrong_shape: dict[str, tuple[Sequence[int], Sequence[int]]]

    def __str__(self) -> str:
        shapes = [
            f"{name} {tuple(found)} for {tuple(own)}"
            for name, (found, own) in self.wrong_shape.items()
        ]
        parts = [
            (len(self.missing), "missing", grouped(self.missing)),
            (len(self.unexpected), "not in the model", grouped(self.unexpected)),
            (len(shapes), "of another shape", listed(shapes)),
        ]
        return "; ".join(f"{count} {fault}: {names}" for count, fault, names in parts if count)


def class_names(cfg: CfgNode, split: str = "TRAIN") -> list[str] | None:
    """Returns the names of the model's K classes, in its order.

    Args:
        cfg: its data sets are registered, or in DATASETS.COCO_FILES.
        split: ``TRAIN`` or ``TEST``.

    Returns:
        Those of the first data set of the split, or None if it does not name K classes.
    """
    return _known_names(cfg.DATASETS, cfg.DATASETS[split][:1], cfg.MODEL.ROI_HEADS.NUM_CLASSES)


def check_test_classes(policy: WeightsPolicy, cfg: CfgNode) -> None:
    """Checks, before a model is trained, that it can be evaluated on DATASETS.TEST.

    Raises:
        ConfigError: if a data set has classes that the model has not.
    """
    for name in cfg.DATASETS.TEST if policy.class_names else ():
        categories = None
        with contextlib.suppress(ConfigError):  # missing files are told by those who read them
            categories = dataset_categories(cfg.DATASETS, name)
        if categories:
            check_trained(policy.class_names or (), list(categories.values()), name)


def _known_names(
    datasets: CfgNode, names: Iterable[str], num_classes: int | None
) -> list[str] | None:
    """Returns the class names of the first data set that is known to have so many, or None."""
    for name in names:
        with contextlib.suppress(ConfigError):  # such as a file that is not on this machine
            categories = dataset_categories(datasets, name)
            if categories is not None and len(categories) == num_classes:
                return [str(category) for category in categories.values()]
    return None


def compare(
    weights: Mapping[str, torch.Size],
    model: Mapping[str, torch.Size],
    missing: Iterable[str],
    *,
    by_ends: bool = False,
) -> Fit:
    """Compares the shapes of weights with a model's.

    Args:
        weights: shapes by name.
        model: shapes of the model's ``state_dict()``.
        missing: names of the model for which loading found no value. That is up to the modules:
            detectron2's and torch's normalization fill in what old files lack.
        by_ends: whether names that found no place, be it for their shape, are ends of the model's.
    """
    lacking = [name for name in missing if name in model and not name.endswith(_MADE_ANEW)]
    wrong_shape: dict[str, tuple[Sequence[int], Sequence[int]]] = {}
    unexpected = []
    for name, shape in weights.items():
        places = [x for x in lacking if x == name or (by_ends and x.endswith(f".{name}"))]
        if len(places) == 1:
            wrong_shape[places[0]] = (shape, model[places[0]])
        elif name not in model and not (name.endswith(_MADE_ANEW) or "cell_anchors" in name):
            unexpected.append(name)
    return Fit(
        fitting=[name for name in weights if name in model and name not in wrong_shape],
        missing=[name for name in lacking if name not in wrong_shape],
        unexpected=unexpected,
        wrong_shape=wrong_shape,
    )


def settle(
    fit: Fit,
    policy: WeightsPolicy,
    source: str,
    *,
    resuming: bool = False,
    class_layers: Iterable[str] = (),
    named: bool = False,
) -> None:
    """Decides on weights that were compared with their model; tells the log what starts anew.

    Weights of a whole detector, and those of which nothing will be trained, must fit in full.
    Those of a backbone must fill what they are of.

    Args:
        fit: see compare.
        policy: what the run asks for.
        source: the file.
        resuming: whether a run goes on, which takes nothing but its own weights.
        class_layers: names of the model's tensors with rows per class.
        named: whether the file names its classes.

    Raises:
        ConfigError: if they do not fit, unless the policy is not strict and no run is resumed.
            Missing, unexpected and wrong-shape names are listed by module.
    """
    if not fit.fitting:
        raise ConfigError(
            f"{source}: nothing in it fits the model; {fit}; give weights of this config. A "
            "backbone whose names are ends of the model's, such as res2.0.conv1.weight, needs "
            "?matching_heuristics=True behind the name of the file"
        )
    whole = resuming or policy.whole or _is_detector(fit)
    if whole:
        wrong = bool(
            fit.missing or fit.wrong_shape or (fit.unexpected and (resuming or not policy.surplus))
        )
    else:
        half_filled = _half_filled(fit)
        wrong = bool(half_filled or fit.wrong_shape)
    if not wrong:
        if fit.missing or fit.unexpected:
            logger.info(
                "%s fills %s; starts anew: %s; not used: %s",
                *(source, grouped(fit.fitting), grouped(fit.missing), grouped(fit.unexpected)),
            )
        return
    told = str(fit)
    if not whole and half_filled:
        told = (
            f"of its backbone {len(half_filled)} are missing: {grouped(half_filled)}; in all {fit}"
        )
    if resuming:
        advice = "resume with the config of that run, or start anew with it as MODEL.WEIGHTS"
    elif not policy.strict:
        logger.warning(
            "%s does not fit the model and is loaded as far as it does: %s", source, told
        )
        return
    elif fit.wrong_shape and set(fit.wrong_shape) <= set(class_layers):
        nameless = "the file does not name its classes (tools/export_weights.py --classes-of does)"
        if named:
            nameless = (
                "the first data set does not name its classes, or not as many as the model has"
            )
        advice = f"these rows are of other classes, and {nameless}; {policy.advice}"
    else:
        advice = policy.advice
    raise ConfigError(f"{source} does not fit the model: {told}; {advice}")


def _is_detector(fit: Fit) -> bool:
    """Whether weights are of more than a backbone; of C4's, res5 is in the ROI heads."""
    heads = ("proposal_generator.", "roi_heads.")
    placed = [*fit.fitting, *fit.wrong_shape]
    return any(not name.startswith(("backbone.", _RES5)) for name in placed) or any(
        name.startswith(heads) and not name.startswith(_RES5) for name in fit.unexpected
    )


def _half_filled(fit: Fit) -> list[str]:
    """Returns what is missing of the modules of a backbone that are not missing as a whole."""
    names = [*fit.fitting, *fit.missing, *fit.wrong_shape]
    trunk = next((x for x in _TRUNKS if any(name.startswith(x) for name in names)), _TRUNKS[-1])
    return [
        name
        for prefix in (trunk, _RES5)
        if any(name.startswith(prefix) for name in fit.fitting)
        for name in fit.missing
        if name.startswith(prefix)
    ]


def match_classes(
    weights: dict[str, torch.Tensor],
    model: torch.nn.Module,
    found: Sequence[str] | None,
    policy: WeightsPolicy,
    source: str,
    *,
    resuming: bool = False,
) -> Sequence[str] | None:
    """Moves rows of classes to where the model has the class of that name, if both name theirs.

    Rows of classes that the weights do not have are as the model starts; the log tells them.

    Args:
        weights: tensors by the model's names; those with rows per class are exchanged.
        model: with K classes.
        found: the classes of the weights, in the order of their rows.
        policy: what the run asks for.
        source: the file.
        resuming: whether a run goes on; its classes never change.

    Returns:
        The classes that the model has with these weights, in the order of its rows; None if nobody
        names them.

    Raises:
        ConfigError: if classes would change in a resumed run, be untrained in an evaluation, or
            cannot be told apart.
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
            "of that run, or start anew with it as MODEL.WEIGHTS"
        )
    if policy.keeps_classes and (match.new or match.dropped):
        return found
    if match.new and policy.whole and policy.strict:
        raise ConfigError(
            f"{source} was not trained on classes of the data set ({match}); evaluate on its own "
            f"classes, or {LENIENT}"
        )
    if not _has_known_rows(model):
        if policy.keeps_classes or (policy.whole and len(found) == len(own)):
            return found
        raise ConfigError(
            f"{source} has other classes than the data set ({match}), and which rows of a "
            f"{type(model).__name__} belong to which class is not known here; train on data with "
            "the classes of the file in their order, or give weights without classes"
        )
    state = model.state_dict()
    moved_from, moved_to = map(list, zip(*match.pairs, strict=True)) if match.pairs else ([], [])
    for name, num_background in class_tensors(model).items():
        if name in weights:
            sizes = (len(found), len(own), num_background)
            weights[name] = _moved(weights[name], state[name], moved_from, moved_to, sizes)
    logger.info(
        "%s: classes are matched by name; %s, whose rows are %s; %s",
        *(source, f"found: {listed([own[row] for row in moved_to])}"),
        *("in place" if moved_from == moved_to else "moved", match),
    )
    return own


def _check_rows(
    weights: Mapping[str, torch.Tensor], model: torch.nn.Module, found: Sequence[str], source: str
) -> None:
    """Checks that a file names as many classes as it has rows."""
    for name, num_background in class_tensors(model).items():
        expected = len(found) + num_background
        if num_background and name in weights and len(weights[name]) != expected:
            raise ConfigError(
                f"{source} names {len(found)} classes, but {name} has {len(weights[name])} rows, "
                f"not {expected}; name its classes anew"
            )


def num_classes_of(model: torch.nn.Module) -> int | None:
    """Returns the number of classes of a detector, None for a model without classes."""
    for module in model.modules():
        if isinstance(module, ROIHeads):
            return int(module.num_classes)
    return getattr(model, "num_classes", None)  # of detectors without ROI heads, as RetinaNet


def _has_known_rows(model: torch.nn.Module) -> bool:
    """Whether class_tensors finds all layers with rows per class, as far as can be told."""
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
    """Returns a class layer's tensor as it starts, with the file's rows of classes that both have.

    One of another layout is returned as it is, and found not to fit later on.

    Args:
        weight: of the file.
        start: of the model.
        moved_from: classes of the file.
        moved_to: classes of the model, as many.
        sizes: numbers of the file's classes, of the model's, and of background's rows.
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
    """Returns the names of tensors with rows per class, with the number of rows of background.

    Rows of a class lie together, in the order of the classes, and background's behind them. Layers
    of box predictors, mask heads and mask scoring count, unless they are the same for all classes.
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
    """Returns the class names that a checkpoint has, in the order of its rows, or None.

    Raises:
        ConfigError: if they are not a list of names.
    """
    names = checkpoint.get("class_names")
    if names is None:
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or not names:
        raise ConfigError(f"{source}: its class_names are not a list of names; write them anew")
    return names


def matched_by_ends(
    weights: dict[str, torch.Tensor], model: torch.nn.Module, author: str, source: str
) -> dict[str, torch.Tensor]:
    """Returns weights by the model's names, of which their own are ends.

    Args:
        weights: tensors by name.
        model: the model.
        author: who wrote the file; ``Caffe2`` has names of its own.
        source: the file.

    Raises:
        ConfigError: if a name is the end of several of the model's.
    """
    try:
        matched: dict[str, torch.Tensor] = align_and_update_state_dicts(
            model.state_dict(), weights, c2_conversion=author == "Caffe2"
        )
    except (ValueError, AssertionError, IndexError) as error:
        raise ConfigError(
            f"{source}: its names cannot be matched with the model's ({error}); give weights of "
            "this config, or of its backbone alone"
        ) from error
    return matched


def without_prefix(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Returns weights without the ``module.`` that a data-parallel model has before its names."""
    prefix = "module."
    if not all(name.startswith(prefix) for name in weights):
        return dict(weights)
    return {name[len(prefix) :]: weight for name, weight in weights.items()}


def grouped(names: Iterable[str]) -> str:
    """Returns names in one line: all if they are few, or else modules with their numbers."""
    names = list(names)
    if len(names) <= NAMES_IN_ERROR:
        return ", ".join(names) or "nothing"
    for depth in range(max(1, *(name.count(".") for name in names)), 0, -1):
        modules = Counter(".".join(name.split(".")[:depth]) for name in names)
        if len(modules) <= MODULES_IN_ERROR:
            break
    return listed([f"{x} ({count})" for x, count in modules.items()], MODULES_IN_ERROR)
