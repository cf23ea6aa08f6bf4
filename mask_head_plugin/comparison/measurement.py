"""Compares both models on the same images: detections, AP, time and memory.

Both models run in turn on every image. Their detections are compared one by one, and both are
evaluated with the same evaluator.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import (
    DatasetCatalog,
    MetadataCatalog,
    build_detection_test_loader,
)
from detectron2.utils.file_io import PathManager

from ..durable_files import write_durably
from ..evaluation import MaskEvaluator, bootstrap, counted_detections
from ..evaluation.coco_ap import TASKS
from ..evaluation.coco_evaluator import without_nan
from ..evaluation.matching import Matches
from ..image_file_mapper import ImageFileMapper
from ..machine import cpu_name
from ..progress import progress
from .image_differences import Cut, ImageDifferences, compare_images
from .timed_model import TimedModel
from .twins import Twins
from .zoo import ModelConfig, ZooModel

EQUAL, DIFFERENT, TOO_FEW = "equal", "different", "not enough detections"
MIN_CONFIDENT = 100
MEASURED_IMAGES = 3  # memory is measured on this many images, those with the most detections
SIDES = ("stock", "plugin")


@dataclass(frozen=True)
class Agreement:
    """The differences over all images; see image_differences.ImageDifferences.

    Attributes:
        images: number of images.
        detections: sum of num_detections.
        confident: sum of num_confident.
        images_with_other_set: number of images whose same_set is False.
        unmatched: sum of num_unmatched.
        box, score, mask_prob: largest value over all images.
        mask_pixels, far_mask_pixels: sum over all images.
        all_equal: whether is_equal is True for every image.
    """

    images: int
    detections: int
    confident: int
    images_with_other_set: int
    unmatched: int
    box: float
    score: float
    mask_prob: float
    mask_pixels: int
    far_mask_pixels: int
    all_equal: bool

    @staticmethod
    def of(found: Sequence[ImageDifferences]) -> Agreement:
        return Agreement(
            images=len(found),
            detections=sum(x.num_detections for x in found),
            confident=sum(x.num_confident for x in found),
            images_with_other_set=sum(not x.same_set for x in found),
            unmatched=sum(x.num_unmatched for x in found),
            # NumPy's maximum keeps nan, unlike Python's.
            box=float(np.max([x.box for x in found])),
            score=float(np.max([x.score for x in found])),
            mask_prob=float(np.max([x.mask_prob for x in found])),
            mask_pixels=sum(x.mask_pixels for x in found),
            far_mask_pixels=sum(x.far_mask_pixels for x in found),
            all_equal=all(x.is_equal for x in found),
        )

    @property
    def verdict(self) -> str:
        """EQUAL, DIFFERENT or TOO_FEW. EQUAL requires at least MIN_CONFIDENT detections."""
        if not self.all_equal:
            return DIFFERENT
        return EQUAL if self.confident >= MIN_CONFIDENT else TOO_FEW


@dataclass(frozen=True)
class APComparison:
    """AP of both models in percent, and the 95% interval over images of plugin - stock."""

    stock: float
    plugin: float
    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class Cost:
    """Cost of one image for a model: median seconds and peak memory."""

    network_seconds: float
    seconds: float
    peak_megabytes: float


@dataclass(frozen=True)
class Comparison:
    """All results of a comparison, as in comparison.json."""

    config: str
    weights: str
    weights_sha256: str
    dataset: str
    min_score: float
    num_tensors: int
    num_values: int
    agreement: Agreement
    ap: dict[str, APComparison]
    published: ZooModel | None
    costs: dict[str, Cost]
    device: str
    differing: list[ImageDifferences]

    @property
    def verdict(self) -> str:
        return self.agreement.verdict

    def write(self, path: Path) -> None:
        content = without_nan({"verdict": self.verdict, **asdict(self)})
        write_durably(path, json.dumps(content, indent=1) + "\n")


def choose_images(dataset: str, num_images: int | None, folder: Path) -> str:
    """Registers some images of a data set as a separate data set.

    Args:
        dataset: name of a registered data set.
        num_images: how many images to choose, spread evenly over the data set; None for all.
        folder: folder for the annotation file of the chosen images.

    Returns:
        Name of the new data set, or ``dataset`` if all images are chosen.
    """
    records = DatasetCatalog.get(dataset)
    if num_images is None or num_images >= len(records):
        return dataset
    records = [records[k] for k in np.linspace(0, len(records) - 1, num_images, dtype=int)]
    metadata = dict(MetadataCatalog.get(dataset).as_dict())
    if metadata.get("json_file"):
        path = folder / "annotations.json"
        _write_annotations(metadata["json_file"], {x["image_id"] for x in records}, path)
        metadata["json_file"] = str(path)
    metadata["name"] = name = f"{dataset}_{num_images}_images"
    if name in DatasetCatalog.list():
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).set(**metadata)
    return name


def _write_annotations(json_file: str, image_ids: set[Any], path: Path) -> None:
    content = json.loads(Path(PathManager.get_local_path(json_file)).read_text())
    content["images"] = [x for x in content["images"] if x["id"] in image_ids]
    kept = [x for x in content.get("annotations", []) if x["image_id"] in image_ids]
    path.write_text(json.dumps({**content, "annotations": kept}))


def compare_twins(
    twins: Twins,
    config: ModelConfig,
    weights: Path,
    dataset: str,
    output: Path,
    min_score: float,
) -> Comparison:
    """Runs and evaluates both models on every image of a data set.

    Args:
        twins: the two models.
        config: config of both models, for the report.
        weights: weights of both models, for the report.
        dataset: name of a registered data set.
        output: output folder, in which each model gets a folder with the evaluator's files.
        min_score: detections with a higher score count towards the verdict.
    """
    cfg = twins.cfg
    watched = {"stock": TimedModel(twins.stock), "plugin": TimedModel(twins.plugin)}
    evaluators = {side: _evaluator(cfg, dataset, output / side) for side in SIDES}
    cut = Cut(cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST, cfg.TEST.DETECTIONS_PER_IMAGE)
    loader = build_detection_test_loader(
        dataset=DatasetCatalog.get(dataset),
        mapper=ImageFileMapper(cfg, is_train=False),
        num_workers=0 if cfg.MODEL.DEVICE == "cpu" else cfg.DATALOADER.NUM_WORKERS,
    )
    found: list[ImageDifferences] = []
    crowded: list[tuple[int, int]] = []
    for index, (x,) in enumerate(progress(loader, "running both models", "image")):
        sides = {}
        for side in SIDES if index % 2 == 0 else SIDES[::-1]:
            instances, sides[side] = watched[side].detect(x)
            evaluators[side].process([x], [{"instances": instances}])
        found.append(compare_images(x["image_id"], sides["stock"], sides["plugin"], cut, min_score))
        crowded = sorted([*crowded, (-len(sides["stock"]), index)])[:MEASURED_IMAGES]
    return Comparison(
        config=config.zoo_name or config.file,
        weights=str(weights),
        weights_sha256=hashlib.sha256(weights.read_bytes()).hexdigest(),
        dataset=dataset,
        min_score=min_score,
        num_tensors=twins.num_tensors,
        num_values=twins.num_values,
        agreement=Agreement.of(found),
        ap=compare_ap(evaluators, output),
        published=config.published,
        costs=_costs(watched, [loader.dataset[k] for _, k in crowded]),
        device=_device(cfg),
        differing=sorted((x for x in found if x.differs), key=_worst_first),
    )


def _evaluator(cfg: CfgNode, dataset: str, folder: Path) -> MaskEvaluator:
    folder.mkdir(exist_ok=True)
    limit = counted_detections(cfg.TEST.DETECTIONS_PER_IMAGE)
    evaluator = MaskEvaluator(
        dataset, TASKS, distributed=False, output_dir=str(folder), max_dets_per_image=limit
    )
    evaluator.reset()
    return evaluator


def compare_ap(evaluators: dict[str, MaskEvaluator], output: Path) -> dict[str, APComparison]:
    """Compares the AP of each task; the result is empty if the data set has no annotations.

    Args:
        evaluators: evaluators of "stock" and "plugin", which must have processed all images.
        output: folder that contains the evaluators' folders.
    """
    results = {side: evaluators[side].evaluate() for side in progress(SIDES, "evaluating", "model")}
    compared = {}
    for task in progress(list(results["stock"]), "intervals of AP", "task"):
        stock, plugin = (Matches.load(output / side / f"matches_{task}.npz") for side in SIDES)
        interval = bootstrap.compare([plugin], [stock])["AP"]
        compared[task] = APComparison(
            results["stock"][task]["AP"],
            results["plugin"][task]["AP"],
            interval.difference,
            interval.low,
            interval.high,
        )
    return compared


def _costs(watched: dict[str, TimedModel], crowded: Sequence[dict[str, Any]]) -> dict[str, Cost]:
    costs = {}
    for side, model in watched.items():
        memory = [model.peak_megabytes(x) for x in crowded]
        network, whole = (_median_warm(x) for x in (model.network_seconds, model.seconds))
        costs[side] = Cost(network, whole, max(memory))
    return costs


def _median_warm(seconds: list[float]) -> float:
    """Returns the median of all values but the first, unless there is only one.

    The first value is left out because the first call includes initialisation.
    """
    return statistics.median(seconds[1:] or seconds)


def _worst_first(x: ImageDifferences) -> tuple[float, ...]:
    """Sort key that puts the image with the largest differences first."""
    largest = -math.inf if math.isnan(x.score + x.box) else -max(x.score, x.box)
    return (x.is_equal, -x.num_unmatched, -x.far_mask_pixels, largest, -x.mask_pixels)


def _device(cfg: CfgNode) -> str:
    if torch.device(cfg.MODEL.DEVICE).type == "cuda":
        return torch.cuda.get_device_name()
    return f"{cpu_name()}, {torch.get_num_threads()} threads"
