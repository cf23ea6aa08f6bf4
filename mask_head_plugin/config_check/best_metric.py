"""Whether SOLVER.CHECKPOINT_BEST_METRIC names a metric that evaluations will give."""

from __future__ import annotations

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from ..config import ConfigError
from ..data.coco_files import coco_classes
from ..evaluation.coco_ap import FREQUENCIES, METRICS, TASKS
from ..evaluation.semantic import semantic_metrics
from ..messages import nearest_name

KEY = "SOLVER.CHECKPOINT_BEST_METRIC"


def check_best_metric(cfg: CfgNode) -> None:
    """Refuses a metric that would choose nothing, or be looked for in vain.

    Raises:
        ConfigError: naming what is missing, or the nearest metric.
    """
    metric, names = cfg.SOLVER.CHECKPOINT_BEST_METRIC, cfg.DATASETS.TEST
    if not metric:
        return
    if not names:
        raise ConfigError(
            f"{KEY} is {metric!r}, but DATASETS.TEST is empty: name a data set, or leave the "
            "metric out"
        )
    if not 0 < cfg.TEST.EVAL_PERIOD < cfg.SOLVER.MAX_ITER:
        raise ConfigError(
            f"{KEY} {metric!r} needs several evaluations to choose from, but TEST.EVAL_PERIOD "
            f"{cfg.TEST.EVAL_PERIOD} gives one, behind iteration {cfg.SOLVER.MAX_ITER}; set it to "
            f"e.g. {max(cfg.SOLVER.MAX_ITER // 10, 1)}, or leave the metric out"
        )
    name, own = names[0], metric
    if len(names) > 1:
        name = next((x for x in names if metric.startswith(f"{x}/")), "")
        own = metric.removeprefix(f"{name}/")
        if not name:
            raise ConfigError(
                f"{KEY} {metric!r}: with several data sets in DATASETS.TEST it starts with one of "
                f"them, e.g. {names[0]}/{metric}"
            )
    known = _metrics(cfg, name)
    if known and own not in known:
        nearest = nearest_name(own, known)
        common = ", ".join(x for x in known if "-" not in x)  # not those of each class
        hint = f"did you mean {nearest!r}?" if nearest else f"there are {common}"
        raise ConfigError(f"{KEY} {metric!r} is no metric of {name}; {hint}")


def _metrics(cfg: CfgNode, name: str) -> list[str]:
    """Returns what MaskEvaluator gives for a data set; nothing where another evaluator may."""
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
    return found
