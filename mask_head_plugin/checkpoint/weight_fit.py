"""Checks whether weights fit a model, and decides what to do if they do not."""

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

from ..class_names import check_trained
from ..config import ConfigError
from ..data import dataset_categories
from ..messages import NAMES_IN_ERROR, listed

logger = logging.getLogger(__name__)

LENIENT = "set MODEL.WEIGHTS_STRICT False to load what fits"
ADVICE = f"use weights trained with this config, or {LENIENT}"
MODULES_IN_ERROR = 12

_TRUNKS = ("backbone.bottom_up.", "backbone.net.", "backbone.")
"""Prefixes of the parameters that ImageNet weights provide; the first one that occurs in a model is
used. Other parameters in ``backbone.``, such as the pyramid's convolutions, are new.
"""
_RES5 = "roi_heads.res5."
_MADE_ANEW = ("pixel_mean", "pixel_std", "num_batches_tracked")
"""Endings of names whose values come from the config or do not matter."""


@dataclass(frozen=True)
class WeightsPolicy:
    """Which weights a model accepts.

    Attributes:
        class_names: the model's K classes in its order, if known. If weights name their classes,
            their rows are moved to this order.
        keeps_classes: whether the model takes its classes from the weights if they differ from
            ``class_names``, which is then only the preferred order. True for a model that only
            predicts.
        strict: whether weights that do not fit are an error.
        whole: whether the weights must fill the whole model, because it will not be trained.
        surplus: whether weights of a detector may contain parameters that the model lacks.
        advice: what to do about weights that do not fit.
        input_format: INPUT.FORMAT, if known; weights for another colour order are logged.
    """

    class_names: Sequence[str] | None = None
    keeps_classes: bool = False
    strict: bool = True
    whole: bool = False
    surplus: bool = False
    advice: str = ADVICE
    input_format: str = ""

    @classmethod
    def from_config(cls, cfg: CfgNode, *, train: bool) -> WeightsPolicy:
        """Returns the policy of a run that trains or, if not ``train``, only evaluates."""
        names = class_names(cfg, "TRAIN" if train else "TEST")
        return cls(
            names,
            strict=cfg.MODEL.WEIGHTS_STRICT,
            whole=not train,
            input_format=cfg.INPUT.FORMAT,
        )

    @classmethod
    def of_predictor(cls, datasets: CfgNode | None, num_classes: int | None) -> WeightsPolicy:
        """Returns the policy of a model that only predicts and takes its classes from the weights.

        Args:
            datasets: section DATASETS of the config. The model takes the class order of the first
                data set in TEST or, failing that, in TRAIN, if the weights have the classes of that
                data set.
            num_classes: K; None for a model without classes.
        """
        named = (*datasets.TEST[:1], *datasets.TRAIN[:1]) if isinstance(datasets, CfgNode) else ()
        return cls(_known_names(datasets, named, num_classes), keeps_classes=True)


@dataclass(frozen=True)
class Fit:
    """Comparison of the names and shapes of weights with those of a model.

    Attributes:
        fitting: names in the model for which the weights have a value of the right shape.
        missing: names in the model for which the weights have no value.
        unexpected: names in the weights that the model lacks.
        wrong_shape: for names in the model, the shape in the weights and the shape in the model.
    """

    fitting: list[str]
    missing: list[str]
    unexpected: list[str]
    wrong_shape: dict[str, tuple[Sequence[int], Sequence[int]]]

    def __str__(self) -> str:
        shapes = [
            f"{name} is {tuple(found)} in the file and {tuple(own)} in the model"
            for name, (found, own) in self.wrong_shape.items()
        ]
        parts = [
            (len(self.missing), "missing", grouped(self.missing)),
            (len(self.unexpected), "not in the model", grouped(self.unexpected)),
            (len(shapes), "of another shape", listed(shapes)),
        ]
        return "; ".join(f"{count} {fault}: {names}" for count, fault, names in parts if count)


def class_names(cfg: CfgNode, split: str = "TRAIN") -> list[str] | None:
    """Returns the names of the model's K classes in its order.

    Args:
        cfg: a config whose data sets are registered or listed in DATASETS.COCO_FILES.
        split: ``TRAIN`` or ``TEST``.

    Returns:
        The names of the first data set of the split, or None if it does not name K classes.
    """
    return _known_names(cfg.DATASETS, cfg.DATASETS[split][:1], cfg.MODEL.ROI_HEADS.NUM_CLASSES)


def check_test_classes(policy: WeightsPolicy, cfg: CfgNode) -> None:
    """Checks before training that the model can be evaluated on DATASETS.TEST.

    Raises:
        ConfigError: if a data set has classes that the model lacks.
    """
    for name in cfg.DATASETS.TEST if policy.class_names else ():
        categories = None
        with contextlib.suppress(ConfigError):  # missing files are reported when they are read
            categories = dataset_categories(cfg.DATASETS, name)
        if categories:
            check_trained(policy.class_names or (), [str(x) for x in categories.values()], name)


def _known_names(
    datasets: CfgNode, names: Iterable[str], num_classes: int | None
) -> list[str] | None:
    """Returns the class names of the first data set known to have K classes, or None."""
    for name in names:
        with contextlib.suppress(ConfigError):  # for example, the file is not on this machine
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
    """Compares the names and shapes of weights with those of a model.

    Args:
        weights: shapes of the weights by name.
        model: shapes of the model's ``state_dict()``.
        missing: names in the model that loading left without a value. Modules decide this, because
            normalisation layers of detectron2 and torch fill in values that old files lack.
        by_ends: whether names in the weights may be endings of the model's names.
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


def refuse_or_tell(
    fit: Fit,
    policy: WeightsPolicy,
    source: str,
    *,
    resuming: bool = False,
    class_layers: Iterable[str] = (),
    named: Sequence[str] | None = None,
) -> None:
    """Raises an error if weights do not fit their model; otherwise logs what stays untrained.

    Weights of a complete detector, and weights of a model that will not be trained, must fit
    completely. Weights of a backbone must fill the backbone.

    Args:
        fit: result of ``compare``.
        policy: which weights the run accepts.
        source: path of the weights.
        resuming: whether a run is resumed, which requires the weights of that run.
        class_layers: names of the model's tensors that have a row for each class.
        named: the classes of the file, if it names them.

    Raises:
        ConfigError: if nothing fits, or if the weights do not fit and either the policy is strict
            or a run is resumed. Lists missing, unexpected and wrong-shape names by module.
    """
    if not fit.fitting:
        raise ConfigError(
            f"{source}: nothing in it fits the model; {fit}; use weights trained with this config. "
            "If the names are endings of the model's, such as res2.0.conv1.weight of a backbone, "
            "append ?matching_heuristics=True to the file name"
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
                "%s fills %s; missing, so untrained: %s; not used: %s",
                source,
                grouped(fit.fitting),
                grouped(fit.missing),
                grouped(fit.unexpected),
            )
        return
    told = str(fit)
    if not whole and half_filled:
        told = (
            f"{len(half_filled)} parameters of its backbone are missing: {grouped(half_filled)}; "
            f"in total, {fit}"
        )
    if resuming:
        advice = (
            "resume with the config of that run, or start a new run with this file as MODEL.WEIGHTS"
        )
    elif not policy.strict:
        logger.warning("%s does not fit the model; only what fits is loaded: %s", source, told)
        return
    elif fit.wrong_shape and set(fit.wrong_shape) <= set(class_layers):
        advice = _advice_on_classes(policy, named)
    else:
        advice = policy.advice
    raise ConfigError(f"{source} does not fit the model: {told}; {advice}")


def _advice_on_classes(policy: WeightsPolicy, named: Sequence[str] | None) -> str:
    """Says what to do about weights of which only the rows that belong to classes do not fit.

    Args:
        policy: which weights the run accepts.
        named: the classes of the file, if it names them.
    """
    if policy.keeps_classes:
        which, number = "", "to the number of its classes"
        if named:
            which, number = f", with the classes {listed(named)}", str(len(named))
        return (
            f"the file was trained on another data set{which}; use the config of that data set, or "
            f"set MODEL.ROI_HEADS.NUM_CLASSES {number}"
        )
    nameless = (
        "the file does not name its classes (add the names with export_weights.py --classes-of)"
    )
    if named:
        nameless = "the first data set does not name its classes, or names the wrong number of them"
    return f"these rows belong to other classes, and {nameless}; {policy.advice}"


def _is_detector(fit: Fit) -> bool:
    """Returns whether weights contain more than a backbone; C4's res5 counts as backbone."""
    heads = ("proposal_generator.", "roi_heads.")
    placed = [*fit.fitting, *fit.wrong_shape]
    return any(not name.startswith(("backbone.", _RES5)) for name in placed) or any(
        name.startswith(heads) and not name.startswith(_RES5) for name in fit.unexpected
    )


def _half_filled(fit: Fit) -> list[str]:
    """Returns the missing names if the weights fill a backbone, or its res5, only partly."""
    names = [*fit.fitting, *fit.missing, *fit.wrong_shape]
    trunk = next((x for x in _TRUNKS if any(name.startswith(x) for name in names)), _TRUNKS[-1])
    return [
        name
        for prefix in (trunk, _RES5)
        if any(name.startswith(prefix) for name in fit.fitting)
        for name in fit.missing
        if name.startswith(prefix)
    ]


def matched_by_ends(
    weights: dict[str, torch.Tensor], model: torch.nn.Module, author: str, source: str
) -> dict[str, torch.Tensor]:
    """Renames weights whose names are endings of the model's names.

    Args:
        weights: tensors by name.
        model: the model.
        author: author recorded in the file; ``Caffe2`` files use their own names.
        source: path of the weights.

    Raises:
        ConfigError: if a name is an ending of several names in the model.
    """
    try:
        matched: dict[str, torch.Tensor] = align_and_update_state_dicts(
            model.state_dict(), weights, c2_conversion=author == "Caffe2"
        )
    except (ValueError, AssertionError, IndexError) as error:
        raise ConfigError(
            f"{source}: its names cannot be matched with the model's ({error}); use weights "
            "trained with this config, or weights of its backbone"
        ) from error
    return matched


def without_prefix(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Removes the prefix ``module.`` that data-parallel models add to all names."""
    prefix = "module."
    if not all(name.startswith(prefix) for name in weights):
        return dict(weights)
    return {name[len(prefix) :]: weight for name, weight in weights.items()}


def grouped(names: Iterable[str]) -> str:
    """Returns names on one line: all of them if there are few, otherwise modules with counts."""
    names = list(names)
    if len(names) <= NAMES_IN_ERROR:
        return ", ".join(names) or "nothing"
    for depth in range(max(1, *(name.count(".") for name in names)), 0, -1):
        modules = Counter(".".join(name.split(".")[:depth]) for name in names)
        if len(modules) <= MODULES_IN_ERROR:
            break
    return listed([f"{x} ({count})" for x, count in modules.items()], MODULES_IN_ERROR)
