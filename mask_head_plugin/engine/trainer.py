"""detectron2's DefaultTrainer with evaluators, test-time augmentation and a contact sheet."""

from __future__ import annotations

import functools
import logging
import weakref
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import (
    AMPTrainer,
    DefaultTrainer,
    SimpleTrainer,
    TrainerBase,
    create_ddp_model,
    hooks,
)
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
    print_csv_format,
)
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.utils import comm

from ..evaluation import COCO_MAX_DETECTIONS, MaskEvaluator, write_contact_sheet
from .checkpoint import MaskHeadCheckpointer
from .evaluation import evaluate_dataset

Results = OrderedDict[str, Any]


class Trainer(DefaultTrainer):
    """DefaultTrainer for every data set that detectron2 registers or DATASETS.COCO_FILES names."""

    def __init__(self, cfg: CfgNode) -> None:
        TrainerBase.__init__(self)
        cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        on_gpu = torch.device(cfg.MODEL.DEVICE).type == "cuda"
        device_ids = [comm.get_local_rank()] if on_gpu else None
        model = create_ddp_model(
            model, broadcast_buffers=False, device_ids=device_ids, find_unused_parameters=True
        )
        trainer = AMPTrainer if cfg.SOLVER.AMP.ENABLED else SimpleTrainer
        self._trainer = trainer(model, data_loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.start_iter, self.max_iter = 0, cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    def build_hooks(self) -> list[hooks.HookBase]:
        # DefaultTrainer has just made its checkpointer and its hooks are about to keep it.
        self.checkpointer = MaskHeadCheckpointer(
            self.model, self.cfg.OUTPUT_DIR, trainer=weakref.proxy(self)
        )
        result = super().build_hooks()
        if self.cfg.TEST.AUG.ENABLED:
            # Right behind the evaluation on every rank: before the writers, which one rank has.
            position = [type(hook) for hook in result].index(hooks.EvalHook) + 1
            evaluate = functools.partial(self.test_with_tta, self.cfg, self.model)
            result.insert(position, hooks.EvalHook(0, evaluate))
        if comm.is_main_process():
            # Behind the writers: what goes wrong here loses no metrics.
            result.append(hooks.CallbackHook(after_train=_draw_contact_sheets))
        return result

    @classmethod
    def build_model(cls, cfg: CfgNode) -> torch.nn.Module:
        """Builds the model; on the CPU with channels-last weights.

        Convolutions then hand on channels-last maps: on x86 they are faster so, and RoI pooling
        reads such maps in place.
        """
        model: torch.nn.Module = super().build_model(cfg)
        if torch.device(cfg.MODEL.DEVICE).type == "cpu":
            model.to(memory_format=torch.channels_last)
        return model

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None
    ) -> DatasetEvaluator:
        """Returns the evaluator that the data set's ``evaluator_type`` asks for.

        Args:
            cfg: gives the output folder and the detections per image.
            dataset_name: a registered data set.
            output_folder: where results go; if None ``OUTPUT_DIR/inference``, or a folder of the
                data set's name in it if there are several in DATASETS.TEST.

        Raises:
            ValueError: if the type is unknown.
        """
        folder = output_folder or _inference_folder(cfg, "inference", dataset_name)
        match MetadataCatalog.get(dataset_name).get("evaluator_type"):
            case "coco" if cfg.MODEL.META_ARCHITECTURE == "ProposalNetwork":
                return COCOEvaluator(dataset_name, output_dir=folder)  # recall of the proposals
            case "coco" if cfg.MODEL.KEYPOINT_ON:
                own_folder = str(Path(folder) / "keypoints")  # its files have the same names
                keypoints = COCOEvaluator(dataset_name, ("keypoints",), output_dir=own_folder)
                return DatasetEvaluators([_mask_evaluator(cfg, dataset_name, folder), keypoints])
            case "coco" | "lvis":
                return _mask_evaluator(cfg, dataset_name, folder)
            case "coco_panoptic_seg":
                coco = _mask_evaluator(cfg, dataset_name, folder)
                sem_seg = SemSegEvaluator(dataset_name, output_dir=folder)
                return DatasetEvaluators(
                    [coco, sem_seg, COCOPanopticEvaluator(dataset_name, folder)]
                )
            case "sem_seg":
                return SemSegEvaluator(dataset_name, output_dir=folder)
            case "cityscapes_instance":
                return CityscapesInstanceEvaluator(dataset_name)
            case "cityscapes_sem_seg":
                return CityscapesSemSegEvaluator(dataset_name)
            case "pascal_voc":
                return PascalVOCDetectionEvaluator(dataset_name)
            case kind:
                raise ValueError(
                    f"data set {dataset_name!r} has evaluator_type {kind!r}, for which there is no "
                    "evaluator; set it in its metadata, e.g. to 'coco'"
                )

    @classmethod
    def test(
        cls,
        cfg: CfgNode,
        model: torch.nn.Module,
        evaluators: list[DatasetEvaluator] | DatasetEvaluator | None = None,
    ) -> Results:
        """Evaluates a model on DATASETS.TEST; see DefaultTrainer.test.

        Other than there, an evaluation that was interrupted goes on with the images that it had
        left, if nothing that predictions depend on has changed.
        """
        if isinstance(evaluators, DatasetEvaluator):
            evaluators = [evaluators]
        results: Results = OrderedDict()
        for index, name in enumerate(cfg.DATASETS.TEST):
            loader = cls.build_test_loader(cfg, name)
            evaluator = evaluators[index] if evaluators else cls.build_evaluator(cfg, name)
            results[name] = evaluate_dataset(cfg, model, name, loader, evaluator)
            if comm.is_main_process():
                logging.getLogger(__name__).info("%s in csv format:", name)
                print_csv_format(results[name])
        return next(iter(results.values())) if len(results) == 1 else results

    @classmethod
    def evaluate(cls, cfg: CfgNode, model: torch.nn.Module) -> Results:
        """Evaluates a model on DATASETS.TEST, with augmentation too if TEST.AUG.ENABLED."""
        results = cls.test(cfg, model)
        if cfg.TEST.AUG.ENABLED:
            results.update(cls.test_with_tta(cfg, model))
        if comm.is_main_process():
            cls.draw_contact_sheets(cfg, model)
        return results

    @classmethod
    def test_with_tta(cls, cfg: CfgNode, model: torch.nn.Module) -> Results:
        """Evaluates with test-time augmentation (TEST.AUG); keys end in ``_TTA``."""
        logging.getLogger(__name__).info("evaluating with test-time augmentation")
        if cfg.MODEL.ROI_MASK_HEAD.SCORING.ENABLED:
            logging.getLogger(__name__).warning(
                "test-time augmentation knows no mask scores: here class scores rank the masks"
            )
        evaluators = [
            cls.build_evaluator(cfg, name, _inference_folder(cfg, "inference_TTA", name))
            for name in cfg.DATASETS.TEST
        ]
        results = cls.test(cfg, GeneralizedRCNNWithTTA(cfg, model), evaluators)
        return OrderedDict((f"{name}_TTA", value) for name, value in results.items())

    @classmethod
    def draw_contact_sheets(cls, cfg: CfgNode, model: torch.nn.Module) -> None:
        """Writes ``OUTPUT_DIR/contact_sheet_<data set>.png`` for each instance data set of TEST.

        A model without masks gets none.
        """
        for name in cfg.DATASETS.TEST if cfg.MODEL.MASK_ON else ():
            if MetadataCatalog.get(name).get("evaluator_type") in ("coco", "lvis"):
                path = Path(cfg.OUTPUT_DIR) / f"contact_sheet_{name}.png"
                write_contact_sheet(cfg, model, name, path)
                logging.getLogger(__name__).info("ground truth and predictions: %s", path)


def _draw_contact_sheets(trainer: Trainer) -> None:
    if trainer.iter + 1 >= trainer.max_iter:  # not after a failure
        trainer.draw_contact_sheets(trainer.cfg, trainer.model)


def _inference_folder(cfg: CfgNode, name: str, dataset_name: str) -> str:
    folder = Path(cfg.OUTPUT_DIR) / name
    return str(folder / dataset_name if len(cfg.DATASETS.TEST) > 1 else folder)


def _mask_evaluator(cfg: CfgNode, dataset_name: str, folder: str) -> MaskEvaluator:
    """MaskEvaluator that looks at all detections a model may return.

    The COCO metric's limit of 100 would cap recall where images hold more objects.
    """
    if MetadataCatalog.get(dataset_name).get("made_on_first_use", False):
        DatasetCatalog.get(dataset_name)  # MaskEvaluator reads the annotation file at once
    per_image = cfg.TEST.DETECTIONS_PER_IMAGE
    limit = per_image if per_image > COCO_MAX_DETECTIONS else None
    if limit is not None:
        logging.getLogger(__name__).info(
            "AP of %s looks at TEST.DETECTIONS_PER_IMAGE = %d detections an image, not COCO's %d",
            *(dataset_name, limit, COCO_MAX_DETECTIONS),
        )
    return MaskEvaluator(
        dataset_name,
        output_dir=folder,
        max_dets_per_image=limit,
        semantic_threshold=cfg.TEST.SEMANTIC_THRESHOLD,
    )
