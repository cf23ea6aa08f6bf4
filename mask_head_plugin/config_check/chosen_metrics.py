"""Checks that evaluations will compute the metrics on which a run bases decisions.

SOLVER.CHECKPOINT_BEST_METRIC selects the best weights, and SOLVER.EARLY_STOPPING.METRIC decides
when the run ends.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from ..config import ConfigError
from ..data.coco_files import coco_classes
from ..evaluation.coco_ap import FREQUENCIES, METRICS, TASKS
from ..evaluation.semantic import semantic_metrics
from ..messages import nearest_name

BEST, STOPPING = "SOLVER.CHECKPOINT_BEST_METRIC", "SOLVER.EARLY_STOPPING.METRIC"

VALIDATION, TOTAL_LOSS = "validation", "total_loss"
"""Section of the results that contains the losses of TEST.EVAL_LOSS, and the name of their sum."""


def check_chosen_metrics(cfg: CfgNode) -> None:
    """Refuses a metric that no evaluation computes or that cannot affect the run.

    Raises:
        ConfigError: if there is such a metric; names the missing setting or the most similar
            metric.
    """
    for key, metric in chosen_metrics(cfg).items():
        _check_metric(cfg, key, metric)
    stopping = cfg.SOLVER.EARLY_STOPPING
    earliest = (1 + stopping.PATIENCE) * cfg.TEST.EVAL_PERIOD
    if stopping.METRIC and earliest >= cfg.SOLVER.MAX_ITER:
        raise ConfigError(
            f"{STOPPING} {stopping.METRIC!r} can never end this run: with PATIENCE "
            f"{stopping.PATIENCE} and TEST.EVAL_PERIOD {cfg.TEST.EVAL_PERIOD}, it could "
            f"act only after iteration {earliest}, which is not before SOLVER.MAX_ITER "
            f"{cfg.SOLVER.MAX_ITER}; lower PATIENCE or EVAL_PERIOD, or remove the metric"
        )


def chosen_metrics(cfg: CfgNode) -> dict[str, str]:
    """Returns the metrics that the config names, by config key."""
    solver = cfg.SOLVER
    named = {BEST: solver.CHECKPOINT_BEST_METRIC, STOPPING: solver.EARLY_STOPPING.METRIC}
    return {key: metric for key, metric in named.items() if metric}


def improves(metric: str, value: float, best: float | None) -> bool:
    """Returns whether a value of a metric is better than the best earlier value, if there is one.

    Losses are better if lower; all other metrics are better if higher.
    """
    if best is None:
        return not math.isnan(value)
    return value < best if is_validation_loss(metric) else value > best


def is_validation_loss(metric: str) -> bool:
    """Returns whether a metric is a loss of TEST.EVAL_LOSS, with or without a data set's name."""
    return metric.split("/")[-2:-1] == [VALIDATION]


def of_dataset(names: Sequence[str], metric: str) -> tuple[str, str]:
    """Splits a metric into its data set ("" if unknown) and its name without the data set.

    Args:
        names: DATASETS.TEST. With several data sets, metrics start with the name of one of them.
        metric: name of the metric as in ``metrics.json``.
    """
    if len(names) == 1:
        return names[0], metric
    name = max((x for x in names if metric.startswith(f"{x}/")), key=len, default="")
    return name, metric.removeprefix(f"{name}/")


def _check_metric(cfg: CfgNode, key: str, metric: str) -> None:
    names = cfg.DATASETS.TEST
    if not names:
        raise ConfigError(
            f"{key} is {metric!r}, but DATASETS.TEST is empty: name a data set, or remove the "
            "metric"
        )
    if not 0 < cfg.TEST.EVAL_PERIOD < cfg.SOLVER.MAX_ITER:
        raise ConfigError(
            f"{key} {metric!r} needs several evaluations, but TEST.EVAL_PERIOD "
            f"{cfg.TEST.EVAL_PERIOD} leads to only one, after iteration {cfg.SOLVER.MAX_ITER}; set "
            f"it to e.g. {max(cfg.SOLVER.MAX_ITER // 10, 1)}, or remove the metric"
        )
    name, own = of_dataset(names, metric)
    if not name:
        known = [f"{x}/{y}" for x in names for y in evaluated_metrics(cfg, x)]
        example = nearest_name(metric, known) or f"{names[0]}/{metric}"
        raise ConfigError(
            f"{key} {metric!r}: with several data sets in DATASETS.TEST, it must start with the "
            f"name of one of them, e.g. {example}"
        )
    task, _, loss = own.partition("/")
    if task == VALIDATION and not cfg.TEST.EVAL_LOSS:
        raise ConfigError(
            f"{key} {metric!r} is a loss, which is computed only with TEST.EVAL_LOSS True"
        )
    if own == TOTAL_LOSS or own.startswith("loss_"):
        full = metric.removesuffix(own) + f"{VALIDATION}/{own}"
        needed = "" if cfg.TEST.EVAL_LOSS else " (with TEST.EVAL_LOSS True)"
        raise ConfigError(f"{key} {metric!r} is a training loss; did you mean {full!r}{needed}?")
    if task == "semantic" and not cfg.TEST.SEMANTIC_THRESHOLD:
        raise ConfigError(f"{key} {metric!r} needs TEST.SEMANTIC_THRESHOLD above 0, e.g. 0.5")
    if task == VALIDATION and loss.startswith("loss_"):
        return  # the model decides which losses exist, see engine/validation_loss.py
    known = evaluated_metrics(cfg, name)
    if task == VALIDATION:
        known = [f"{VALIDATION}/{TOTAL_LOSS}", f"{VALIDATION}/loss_mask"]
    if known and own not in known:
        nearest = nearest_name(own, known)
        common = ", ".join(x for x in known if "-" not in x)  # leaves out per-class metrics
        hint = f"did you mean {nearest!r}?" if nearest else f"choose from {common}"
        raise ConfigError(f"{key} {metric!r} is not a metric of {name}; {hint}")


def evaluated_metrics(cfg: CfgNode, name: str) -> list[str]:
    """Returns MaskEvaluator's metrics for a data set; [] if another evaluator may be used."""
    own, metadata = coco_classes(cfg), MetadataCatalog.get(name)
    kind = "coco" if name in own else metadata.get("evaluator_type")
    if kind not in ("coco", "lvis") or cfg.MODEL.KEYPOINT_ON:
        return []
    classes = own.get(name) or metadata.get("thing_classes", [])
    by_class = [f"AP{x}" for x in FREQUENCIES] if kind == "lvis" else [f"AP-{x}" for x in classes]
    tasks = TASKS if cfg.MODEL.MASK_ON else ("bbox",)
    found = [f"{task}/{metric}" for task in tasks for metric in (*METRICS, *by_class)]
    if cfg.MODEL.MASK_ON and cfg.TEST.SEMANTIC_THRESHOLD > 0:
        nothing = np.zeros((len(classes) + 1,) * 2, np.int64)
        found += [f"semantic/{metric}" for metric in semantic_metrics(nothing, classes)]
    if cfg.TEST.EVAL_LOSS:
        found.append(f"{VALIDATION}/{TOTAL_LOSS}")
    return found
