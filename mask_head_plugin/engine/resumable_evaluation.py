"""Evaluates a model on a data set, and resumes interrupted evaluations."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_test_loader
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from detectron2.utils.file_io import PathManager
from torch.utils.data import DataLoader, Subset

from ..class_names import class_names_of
from ..config import ConfigError
from ..dataset_check.config_datasets import files_of
from ..evaluation import MaskEvaluator

logger = logging.getLogger(__name__)

NOT_PREDICTION = (
    *("MODEL.WEIGHTS", "MODEL.DEVICE", "TEST.EXPECTED_RESULTS", "TEST.EVAL_PERIOD"),
    *("TEST.SEMANTIC_THRESHOLD", "TEST.EVAL_LOSS"),
)
"""Keys in the sections MODEL, INPUT and TEST that do not affect predictions."""

PROPOSALS = ("PROPOSAL_FILES_TEST", "PRECOMPUTED_PROPOSAL_TOPK_TEST")
"""Keys in DATASETS that affect predictions."""


def evaluate_dataset(
    cfg: CfgNode,
    model: torch.nn.Module,
    dataset_name: str,
    loader: DataLoader[Any],
    evaluator: DatasetEvaluator,
) -> dict[str, Any]:
    """Evaluates a model on a data set, or continues an interrupted evaluation.

    Uses detectron2's inference_on_dataset, but skips images that already have predictions.

    Args:
        cfg: the config of the model and the evaluation.
        model: its training mode is restored afterwards.
        dataset_name: a data set in DATASETS.TEST.
        loader: yields all images of the data set in order.
        evaluator: only a MaskEvaluator can resume an interrupted evaluation.

    Returns:
        The evaluator's results; empty in all processes except the first.

    Raises:
        ConfigError: if the data set has other classes than the model, or the same classes in a
            different order, and the evaluator is not a MaskEvaluator.
    """
    found = class_names_of(model)
    wanted = MetadataCatalog.get(dataset_name).get("thing_classes")
    if isinstance(evaluator, MaskEvaluator):
        evaluator.predicted_classes = found
    elif found and wanted and found != [str(name) for name in wanted]:
        raise ConfigError(
            f"{type(evaluator).__name__} needs the classes of {dataset_name} in the model's order, "
            f"but they differ; evaluate {dataset_name} separately, with weights trained on its "
            "classes"
        )
    if isinstance(evaluator, MaskEvaluator):
        evaluator.resume(prediction_fingerprint(cfg, model, dataset_name))
        finished = evaluator.finished_image_ids
        if finished:
            logger.info(
                "%d images of %s already have predictions from an interrupted evaluation",
                len(finished),
                dataset_name,
            )
            records = DatasetCatalog.get(dataset_name)
            if len(records) != len(loader.dataset):  # type: ignore[arg-type]  # it has a length
                raise ValueError(
                    f"the loader of {dataset_name} must yield all images of the data set in order"
                )
            left = [k for k, record in enumerate(records) if record["image_id"] not in finished]
            if not left:
                evaluator.reset()
                return evaluator.evaluate() or {}
            loader = build_detection_test_loader(
                dataset=Subset(loader.dataset, left),
                mapper=None,
                num_workers=loader.num_workers,
                collate_fn=loader.collate_fn,
            )
    with worker_errors_in_one_line():
        results: dict[str, Any] = inference_on_dataset(model, loader, evaluator)
    return results


@contextlib.contextmanager
def worker_errors_in_one_line() -> Iterator[None]:
    """Removes the traceback from the message of a ConfigError raised in a loader worker."""
    try:
        yield
    except ConfigError as error:
        message = str(error).rpartition(f"{ConfigError.__name__}: ")[2]
        raise ConfigError(message.strip()) from error


def prediction_fingerprint(cfg: CfgNode, model: torch.nn.Module, dataset_name: str) -> str:
    """Returns a hash of everything that predictions depend on. It is the same in all processes.

    It covers the weights and the iteration; MODEL, INPUT, TEST and the proposal files in the
    config; class names; and the size and modification time of the annotation file, or the records
    of a data set without one.
    """
    digest = hashlib.blake2b(digest_size=12)
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, torch.Tensor):  # a module's extra state
            digest.update(f"{name} {tensor!r} ".encode())
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    settings = CfgNode({key: cfg[key] for key in ("MODEL", "INPUT", "TEST")}).clone()
    settings.defrost()
    for key in NOT_PREDICTION:
        section, _, leaf = key.partition(".")
        settings[section].pop(leaf, None)
    digest.update(settings.dump().encode())
    digest.update(repr([cfg.DATASETS[key] for key in PROPOSALS]).encode())
    with contextlib.suppress(AssertionError):  # raised outside of training
        digest.update(f"iteration {get_event_storage().iter} ".encode())
    metadata = MetadataCatalog.get(dataset_name)
    digest.update(f"{type(model).__name__} {dataset_name} ".encode())
    digest.update(repr((class_names_of(model), metadata.get("thing_classes"))).encode())
    json_file, _ = files_of(dataset_name)
    if json_file:
        stat = Path(PathManager.get_local_path(json_file)).stat()
        digest.update(f"{stat.st_size} {stat.st_mtime_ns}".encode())
    else:
        keys = ("image_id", "file_name", "height", "width")
        records = [[x.get(key) for key in keys] for x in DatasetCatalog.get(dataset_name)]
        digest.update(repr(records).encode())
    fingerprint: str = comm.all_gather(digest.hexdigest())[0]
    return fingerprint
