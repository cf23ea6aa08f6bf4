"""Computes the training losses on the validation images (TEST.EVAL_LOSS) without training on them.

The losses of an image depend only on the weights, the image and its position in the data set. They
do not depend on the number of processes or workers, or on the iteration, so you can compare the
curves of two runs. A resumed run has the same curves as an uninterrupted one, bit for bit on the
CPU.
"""

from __future__ import annotations

import contextlib
import logging
import math
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import (
    MetadataCatalog,
    build_detection_test_loader,
    get_detection_dataset_dicts,
)
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn
from torch.utils.data import SequentialSampler

from ..class_names import class_names_of
from ..config import ConfigError
from ..config_check.chosen_metrics import TOTAL_LOSS, VALIDATION, chosen_metrics, of_dataset
from ..data import ImageNamingMapper, seed_generators
from ..data.train_loader import kept_generators
from ..image_file_mapper import ImageFileMapper
from ..messages import listed
from .distributed import undistributed
from .resumable_evaluation import worker_errors_in_one_line

logger = logging.getLogger(__name__)

Losses = dict[str, float]
Record = dict[str, Any]

SEED = 0
"""Seed for sampling anchors and RoIs. It is the same in all runs, regardless of the config's SEED.
"""

SECONDS_TO_REPORT = 10
"""Seconds between two progress messages."""

DIFFERENT_IN_TRAINING = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd)
"""Modules that behave differently in training, and are therefore set to evaluation mode. So is the
backbone, because it may have stochastic depth.
"""


def validation_losses(cfg: CfgNode, model: nn.Module) -> dict[str, Losses]:
    """Returns a model's losses, and the sum of the losses, on each data set in DATASETS.TEST.

    The losses are means over images, and each image is a separate batch. As in training, anchors
    and RoIs are sampled, and images without objects are left out (FILTER_EMPTY_ANNOTATIONS). As in
    inference, images are resized to INPUT.MIN_SIZE_TEST, there is no augmentation or dropout, and
    batch normalization uses its running statistics. Loss terms with a ramp have their full weight.

    Args:
        cfg: the run's config.
        model: may be wrapped in DistributedDataParallel; not changed.

    Returns:
        The losses by data set and by name. In all processes except the first, an empty dict.

    Raises:
        ConfigError: if a data set has no annotations, if an annotation lacks something that a loss
            needs, or if the data set's classes differ from the model's.
    """
    model, found = undistributed(model), {}
    of_datasets = {name: _records(cfg, model, name) for name in cfg.DATASETS.TEST}
    for name, records in of_datasets.items():
        own = range(comm.get_rank(), len(records), comm.get_world_size())
        parts = comm.gather(_losses_of_images(cfg, model, records, own))
        if comm.is_main_process():
            found[name] = _means([losses for part in parts for losses in part])
            told = ", ".join(f"{key} {value:.4f}" for key, value in found[name].items())
            logger.info("losses on %s: %s", name, told)
    return found


def add_losses(cfg: CfgNode, results: dict[str, Any], losses: dict[str, Losses]) -> None:
    """Adds the losses that validation_losses returned to the results of an evaluation."""
    for name, means in losses.items():
        of_name = results if len(cfg.DATASETS.TEST) == 1 else results[name]
        of_name[VALIDATION] = means


def check_losses(cfg: CfgNode, model: nn.Module) -> None:
    """Computes the losses of one image per data set to find problems before training starts.

    Raises:
        ConfigError: as in validation_losses, or if a metric in the config is a loss that the model
            does not have.
    """
    model = undistributed(model)
    for name in cfg.DATASETS.TEST:
        known = _means(_losses_of_images(cfg, model, _records(cfg, model, name), range(1)))
        for key, metric in chosen_metrics(cfg).items():
            dataset, own = of_dataset(cfg.DATASETS.TEST, metric)
            task, _, loss = own.partition("/")
            if task == VALIDATION and dataset == name and loss not in known:
                raise ConfigError(
                    f"{key} {metric!r}: this model has no such loss; its losses are "
                    f"{listed(list(known))}"
                )


def _means(images: Sequence[Losses]) -> Losses:
    """Returns the mean of each loss, and the sum of the means.

    The result does not depend on the order of the images, because fsum rounds only once.
    """
    means = {key: math.fsum(image[key] for image in images) / len(images) for key in images[0]}
    return {TOTAL_LOSS: math.fsum(means.values()), **means}


def _records(cfg: CfgNode, model: nn.Module, dataset_name: str) -> list[Record]:
    """Returns those records of a data set that training on it would use."""
    found, wanted = class_names_of(model), MetadataCatalog.get(dataset_name).get("thing_classes")
    if found and wanted and found != [str(name) for name in wanted]:
        raise ConfigError(
            f"TEST.EVAL_LOSS: {dataset_name} has the classes {listed(wanted)}, but the model has "
            f"{listed(found)}; use a data set with the model's classes in the model's order, or "
            "set TEST.EVAL_LOSS to False"
        )
    files = cfg.DATASETS.PROPOSAL_FILES_TEST
    proposals = (
        dict(zip(cfg.DATASETS.TEST, files, strict=False)) if cfg.MODEL.LOAD_PROPOSALS else {}
    )
    try:
        records: list[Record] = get_detection_dataset_dicts(
            dataset_name,
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            proposal_files=[proposals[dataset_name]] if proposals else None,
            check_consistency=False,  # True would print a table of the classes
        )
    except AssertionError:  # raised if no image is left
        records = [{}]
    if not any(key in records[0] for key in ("annotations", "sem_seg_file_name")):
        raise ConfigError(
            f"TEST.EVAL_LOSS: {dataset_name} has no annotations to compute losses from (crowd "
            "annotations do not count); set TEST.EVAL_LOSS to False, or use another data set in "
            "DATASETS.TEST"
        )
    needed = {"segmentation": cfg.MODEL.MASK_ON, "keypoints": cfg.MODEL.KEYPOINT_ON}
    for record in records:
        for number, annotation in enumerate(record.get("annotations", ())):
            lacking = [x for x, is_on in needed.items() if is_on and annotation.get(x) is None]
            if lacking and not annotation.get("iscrowd"):
                raise ConfigError(
                    f"TEST.EVAL_LOSS: annotation {number} of {record['file_name']} in "
                    f"{dataset_name} has no {lacking[0]}, which the model's losses need; add it to "
                    "the annotation, or set TEST.EVAL_LOSS to False"
                )
    return records


def _losses_of_images(
    cfg: CfgNode, model: nn.Module, records: Sequence[Record], indices: Sequence[int]
) -> list[Losses]:
    """Returns the losses of each image with one of the given indices, as plain numbers."""
    arguments = {**ImageFileMapper.from_config(cfg, is_train=False), "is_train": True}
    chosen = [records[index] for index in indices]
    if not chosen:  # there are fewer images than processes
        return []
    loader = build_detection_test_loader(
        chosen,
        mapper=ImageNamingMapper(ImageFileMapper(**arguments)),
        sampler=SequentialSampler(chosen),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )
    found = []
    start = reported = time.monotonic()
    with contextlib.ExitStack() as stack:
        for context in (worker_errors_in_one_line(), kept_generators(), torch.no_grad()):
            stack.enter_context(context)
        inner = stack.enter_context(_losses_as_in_inference(model))
        # A separate storage keeps these losses out of the run's log. Its iteration is beyond the
        # end of every ramp, so that all terms have their full weight.
        stack.enter_context(EventStorage(sys.maxsize))
        for index, batch in zip(indices, loader, strict=True):
            seed_generators(SEED, index)
            losses = inner(batch)
            found.append(
                dict(zip(losses, torch.stack(list(losses.values())).tolist(), strict=True))
            )
            now = time.monotonic()
            if now - reported > SECONDS_TO_REPORT:
                reported, left = now, (now - start) * (len(chosen) / len(found) - 1)
                told = "validation losses: %d of %d images done, %.0f s left"
                logger.info(told, len(found), len(chosen), left)
    return found


@contextlib.contextmanager
def _losses_as_in_inference(model: nn.Module) -> Iterator[nn.Module]:
    """Makes a model return losses while its norms, dropout and backbone behave as in inference."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.train()
        for module in model.modules():
            if isinstance(module, DIFFERENT_IN_TRAINING):
                module.eval()
        backbone = getattr(model, "backbone", None)
        if isinstance(backbone, nn.Module):
            backbone.eval()
        yield model
    finally:
        for module, mode in modes:
            module.training = mode
