"""detectron2's DefaultTrainer with exact resuming, more evaluators and safety checks."""

from __future__ import annotations

import contextlib
import functools
import logging
import weakref
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, build_detection_test_loader
from detectron2.engine import DefaultTrainer, HookBase, TrainerBase, hooks
from detectron2.evaluation import DatasetEvaluator, print_csv_format, verify_results
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from detectron2.utils.logger import setup_logger
from fvcore.nn.precise_bn import get_bn_modules
from torch.utils.data import DataLoader

from ..checkpoint import MaskHeadCheckpointer, WeightsPolicy, class_names
from ..checkpoint.proposal_files import check_proposal_files
from ..checkpoint.run_folder import set_aside_earlier_run
from ..checkpoint.weight_fit import check_test_classes
from ..class_names import class_names_of, name_classes
from ..config import ConfigError
from ..data import ImageNamingMapper, TrainLoader, seed_generators
from ..durable_files import sole_writer
from ..evaluation import write_contact_sheet
from ..image_file_mapper import ImageFileMapper
from ..messages import listed
from ..modeling import to_channels_last
from .accumulation import build_inner_trainer
from .distributed import distribute, share_buffers, undistributed
from .early_stopping import EarlyStopping, StoppedEarly
from .evaluators import build_evaluator, check_chosen_objects, inference_folder
from .guards import StepGuard
from .hooks import (
    BestCheckpointer,
    JSONWriter,
    MetricPrinter,
    PeriodicCheckpointer,
    PreciseBN,
    Resume,
    StepSeed,
    TensorboardXWriter,
    scalar_state,
)
from .interruption import Interruption
from .optimizer import build_optimizer, group_names
from .resumable_evaluation import evaluate_dataset
from .resumed_schedule import (
    GROUPS,
    check_optimizer,
    load_keeping_config,
    schedule_of,
    warn_of_schedule,
)
from .validation_loss import add_losses, check_losses, validation_losses
from .weight_average import WeightAverage, resume_average

logger = logging.getLogger(__name__)

Results = OrderedDict[str, Any]


class Trainer(DefaultTrainer):
    """A DefaultTrainer for data sets registered in detectron2 or listed in DATASETS.COCO_FILES.

    A run that is interrupted at any moment and resumed with the same config and number of processes
    ends with the same weights as an uninterrupted one, bit for bit on the CPU.

    Attributes:
        seed: seed of all random numbers: SEED, or a random one if SEED is negative. A resumed run
            without SEED uses its checkpoint's seed.
        average: the moving average of the weights; None if SOLVER.EMA_DECAY is 0.
        is_stopped: whether SOLVER.EARLY_STOPPING has ended the run. If so, max_iter is the number
            of iterations that were run.
        restored_scalars: logged scalars from the checkpoint; see hooks.scalar_state.
    """

    def __init__(self, cfg: CfgNode) -> None:
        """
        Args:
            cfg: the run's config. If SOLVER.REFERENCE_WORLD_SIZE is set, the schedule is scaled to
                the number of processes.
        """
        TrainerBase.__init__(self)  # DefaultTrainer.__init__ does not support several CPU processes
        if not logging.getLogger("detectron2").isEnabledFor(logging.INFO):  # not set up yet
            setup_logger()
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        self.seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
        self.restored_scalars: dict[str, dict[str, Any]] = {}
        self.is_stopped = False
        seed_generators(self.seed)
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        loader = self.build_train_loader(cfg)
        decay = cfg.SOLVER.EMA_DECAY
        self.average = WeightAverage(model, decay) if decay else None
        num_parts = cfg.SOLVER.ACCUMULATE_STEPS
        model = distribute(model, in_parts=num_parts > 1)
        how = {"amp": cfg.SOLVER.AMP.ENABLED, "num_parts": num_parts}
        self._trainer = build_inner_trainer(model, loader, optimizer, **how)
        self._guard = StepGuard(model, cfg)
        self._trainer.register_hooks([self._guard])
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        policy = WeightsPolicy.from_config(cfg, train=True)
        check_test_classes(policy, cfg)
        self.checkpointer = MaskHeadCheckpointer(
            self.evaluated_model, cfg.OUTPUT_DIR, policy=policy, trainer=weakref.proxy(self)
        )
        if self.average:
            self.average.start(model)  # also copies the class names
        self.start_iter, self.max_iter = 0, cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())
        self._interruption = Interruption(self.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD)
        self.register_hooks([Resume(self._hooks), self._interruption])
        if comm.is_main_process():
            # After the writers, so that no metrics are lost if drawing fails.
            self.register_hooks([hooks.CallbackHook(after_train=_draw_contact_sheets)])

    @property
    def evaluated_model(self) -> torch.nn.Module:
        """The model to evaluate, draw with and save; the averaged one if there is an average."""
        return self.average.module if self.average else self.model

    def build_hooks(self) -> list[HookBase]:
        """Returns DefaultTrainer's hooks and the hooks that make a run reproducible.

        As in DefaultTrainer, the evaluation follows the checkpoint, and the writers come last.
        """
        cfg = self.cfg
        before: list[HookBase] = [StepSeed(), hooks.IterationTimer(), hooks.LRScheduler()]
        if self.average:
            before.append(hooks.CallbackHook(after_step=_average_weights))
        if cfg.TEST.PRECISE_BN.ENABLED and get_bn_modules(self.model):
            alone = cfg.clone()
            alone.defrost()
            alone.DATALOADER.NUM_WORKERS = 0
            loader = self.build_train_loader(alone)  # separate from the loader for training
            num_iter = cfg.TEST.PRECISE_BN.NUM_ITER
            period, model = cfg.TEST.EVAL_PERIOD, self.evaluated_model
            before.append(PreciseBN(period, model, loader, num_iter))
        evaluate = functools.partial(self._evaluate, self.test_with_losses)
        evaluation = hooks.EvalHook(cfg.TEST.EVAL_PERIOD, evaluate)
        after: list[HookBase] = [evaluation]
        if cfg.TEST.AUG.ENABLED:
            evaluate_tta = functools.partial(self._evaluate, self.test_with_tta)
            after.append(hooks.EvalHook(0, evaluate_tta))
        solver = cfg.SOLVER
        if comm.is_main_process():
            before.append(
                PeriodicCheckpointer(
                    self.checkpointer, solver.CHECKPOINT_PERIOD, solver.CHECKPOINT_KEEP_LAST
                )
            )
            if solver.CHECKPOINT_BEST_METRIC:
                after.append(BestCheckpointer(self.checkpointer, solver.CHECKPOINT_BEST_METRIC))
        if solver.EARLY_STOPPING.METRIC:
            end = (solver.EARLY_STOPPING.METRIC, solver.EARLY_STOPPING.PATIENCE)
            after.append(EarlyStopping(self.checkpointer, evaluation, *end))
        if comm.is_main_process():
            after.append(hooks.PeriodicWriter(self.build_writers(), period=20))
        return [*before, *after]

    def _evaluate(self, evaluate: Callable[[CfgNode, torch.nn.Module], Results]) -> Results:
        share_buffers(self.evaluated_model)
        with self._interruption.at_once():
            results = evaluate(self.cfg, self.evaluated_model)
        # Keeps results without augmentation when those with augmentation are added.
        self._last_eval_results = {**getattr(self, "_last_eval_results", {}), **results}
        return results

    def build_writers(self) -> list[EventWriter]:
        """Returns writers for the terminal, ``metrics.json`` and TensorBoard."""
        folder = Path(self.cfg.OUTPUT_DIR)
        return [
            MetricPrinter(self.max_iter),
            JSONWriter(folder / "metrics.json"),
            TensorboardXWriter(str(folder)),
        ]

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: torch.nn.Module) -> torch.optim.Optimizer:
        """Returns the optimizer configured by SOLVER; see optimizer.build_optimizer."""
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> TrainLoader:
        """Returns the loader of training batches; override it to use another mapper."""
        check_proposal_files(cfg, "TRAIN")
        return TrainLoader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> DataLoader[Any]:
        """Returns detectron2's loader of test images, with errors that name the image."""
        check_proposal_files(cfg, "TEST")
        mapper = ImageNamingMapper(ImageFileMapper(cfg, False))
        return build_detection_test_loader(cfg, dataset_name, mapper=mapper)

    def resume_or_load(self, resume: bool = True) -> None:
        """Loads the newest intact checkpoint in OUTPUT_DIR, or else MODEL.WEIGHTS.

        Args:
            resume: whether to continue from a checkpoint. If False, files of an earlier run in
                OUTPUT_DIR are moved to a subfolder, so that they are not mistaken for this run's.

        Raises:
            ConfigError: if there are checkpoints but none is intact, or if the newest is from an
                iteration after SOLVER.MAX_ITER.
        """
        goes_on = resume and comm.all_gather(self.checkpointer.has_checkpoint())[0]
        if goes_on:  # as seen by the main process; others may not see the file
            checkpoint = self.checkpointer.get_checkpoint_file()
            self.checkpointer.load(checkpoint)
            self.start_iter = self.iter + 1  # the checkpoint's iteration was completed
            if self.cfg.MODEL.WEIGHTS:
                logger.info("resumed from %s, so MODEL.WEIGHTS is ignored", checkpoint)
        else:
            self.checkpointer.load(self.cfg.MODEL.WEIGHTS, checkpointables=[])
            _forget_unmatched_classes(self.cfg, self.checkpointer.model)
            if self.average:
                self.average.start(self.model)
        if resume and not goes_on:
            where = self.cfg.OUTPUT_DIR
            logger.warning(
                "--resume: no checkpoint in OUTPUT_DIR %s, so this run starts from the beginning. "
                "To continue an earlier run, stop now (Ctrl-C) and set OUTPUT_DIR to its folder",
                where,
            )
        elif not resume:
            comm.synchronize()  # other processes may still be reading that run's MODEL.WEIGHTS
            if comm.is_main_process():
                set_aside_earlier_run(Path(self.cfg.OUTPUT_DIR))
        if self.start_iter > self.max_iter:
            raise ConfigError(
                f"the checkpoint in {self.cfg.OUTPUT_DIR} is from iteration {self.iter}, but "
                f"SOLVER.MAX_ITER is {self.max_iter}; raise it, or evaluate with --eval-only"
            )

    def train(self) -> Results | None:
        """Runs the remaining training; see DefaultTrainer.train.

        Raises:
            ConfigError: if another run is writing to OUTPUT_DIR.
            Interrupted: after Ctrl-C, with a checkpoint; see interruption.Interruption.
        """
        self._guard.seed = self._trainer.seed = self.seed
        if isinstance(self.data_loader, TrainLoader):
            self.data_loader.go_to(self.seed, self.start_iter)
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._interruption.watched())
            if comm.is_main_process():
                stack.enter_context(sole_writer(Path(self.cfg.OUTPUT_DIR)))
            check_chosen_objects(self.cfg)
            if self.cfg.TEST.EVAL_LOSS:
                check_losses(self.cfg, self.evaluated_model)
            try:
                return super().train()
            except StoppedEarly:
                expected = self.cfg.TEST.EXPECTED_RESULTS and comm.is_main_process()
                if not expected:
                    return None
                verify_results(self.cfg, self._last_eval_results)
                return OrderedDict(self._last_eval_results)

    def before_train(self) -> None:
        super().before_train()
        self._end_if_stopped()  # if repeating the last evaluation has ended the run again

    def after_step(self) -> None:
        super().after_step()
        self._end_if_stopped()

    def _end_if_stopped(self) -> None:
        if self.is_stopped:
            self.iter = self.max_iter  # as after the last iteration
            raise StoppedEarly

    def run_step(self) -> None:
        try:
            super().run_step()
        except (RuntimeError, MemoryError, FloatingPointError) as error:
            told = self._guard.explain(error)
            if told is None:
                raise
            raise told from error

    def state_dict(self) -> dict[str, Any]:
        scalars = scalar_state(self.storage)
        own = {"seed": self.seed, "world_size": comm.get_world_size(), "scalars": scalars}
        own["schedule"] = schedule_of(self.cfg)
        if self.average:
            own |= self.average.trained(self.model)
        if self.cfg.SOLVER.LR_FACTORS or self.cfg.SOLVER.LAYER_DECAY != 1:
            own[GROUPS] = group_names(self.optimizer, undistributed(self.model))
        return {**super().state_dict(), **own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_optimizer(self.optimizer, undistributed(self.model), state_dict)
        resume_average(self.average, self.model, state_dict)
        load = functools.partial(super().load_state_dict, state_dict)
        load_keeping_config(self.optimizer, self.scheduler, load)
        warn_of_schedule(self.cfg, state_dict.get("schedule", {}))
        if state_dict.get("world_size") != comm.get_world_size():
            logger.warning(
                "the checkpoint comes from a run with %s processes, but this run has %d: the order "
                "of images changes from here on",
                state_dict.get("world_size", "unknown"),
                comm.get_world_size(),
            )
        seed = state_dict.get("seed", self.seed)
        if self.cfg.SEED < 0:
            self.seed = seed
        elif seed != self.cfg.SEED:
            logger.warning("using SEED %d instead of the checkpoint's %d", self.cfg.SEED, seed)
        self.restored_scalars = state_dict.get("scalars", {})

    @classmethod
    def build_model(cls, cfg: CfgNode) -> torch.nn.Module:
        """Builds the model, channels-last where that is faster (see modeling.to_channels_last)."""
        model: torch.nn.Module = super().build_model(cfg)
        to_channels_last(model)
        return model

    @classmethod
    def load_model(cls, cfg: CfgNode, *, resume: bool = False) -> torch.nn.Module:
        """Builds a model for evaluation and loads its weights.

        Args:
            cfg: the model's config; its MODEL.WEIGHTS are loaded.
            resume: whether to load the newest checkpoint in OUTPUT_DIR instead, if there is one.

        Raises:
            ConfigError: if the weights cannot be read or do not fit, or there is no checkpoint for
                ``resume``.
        """
        model = cls.build_model(cfg)
        policy = WeightsPolicy.from_config(cfg, train=False)
        checkpointer = MaskHeadCheckpointer(model, cfg.OUTPUT_DIR, policy=policy)
        if resume and not (cfg.MODEL.WEIGHTS or checkpointer.has_checkpoint()):
            raise ConfigError(
                f"no checkpoint in OUTPUT_DIR {cfg.OUTPUT_DIR}; set another OUTPUT_DIR, "
                "or set MODEL.WEIGHTS"
            )
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
        return model

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None
    ) -> DatasetEvaluator:
        """Returns the evaluator for a data set; see evaluators.build_evaluator."""
        return build_evaluator(cfg, dataset_name, output_folder)

    @classmethod
    def test(
        cls,
        cfg: CfgNode,
        model: torch.nn.Module,
        evaluators: list[DatasetEvaluator] | DatasetEvaluator | None = None,
    ) -> Results:
        """Evaluates a model on DATASETS.TEST; see DefaultTrainer.test.

        Differs from DefaultTrainer: an interrupted evaluation continues with the remaining images,
        unless something that affects predictions has changed.
        """
        if isinstance(evaluators, DatasetEvaluator):
            evaluators = [evaluators]
        results: Results = OrderedDict()
        for index, name in enumerate(cfg.DATASETS.TEST):
            loader = cls.build_test_loader(cfg, name)
            evaluator = evaluators[index] if evaluators else cls.build_evaluator(cfg, name)
            results[name] = evaluate_dataset(cfg, model, name, loader, evaluator)
            if comm.is_main_process():
                logger.info("%s in csv format:", name)
                print_csv_format(results[name])
        return next(iter(results.values())) if len(results) == 1 else results

    @classmethod
    def test_with_losses(cls, cfg: CfgNode, model: torch.nn.Module) -> Results:
        """Calls ``test`` and, with TEST.EVAL_LOSS, adds the losses to the results."""
        # Losses come first: after an interruption, predictions can be resumed, but losses cannot.
        losses = validation_losses(cfg, model) if cfg.TEST.EVAL_LOSS else {}
        results = cls.test(cfg, model)
        add_losses(cfg, results, losses)
        return results

    @classmethod
    def evaluate(cls, cfg: CfgNode, model: torch.nn.Module) -> Results:
        """Evaluates a model on DATASETS.TEST and, if TEST.AUG.ENABLED, again with augmentation."""
        results = cls.test_with_losses(cfg, model)
        if cfg.TEST.AUG.ENABLED:
            results.update(cls.test_with_tta(cfg, model))
        if comm.is_main_process():
            cls.draw_contact_sheets(cfg, model)
        return results

    @classmethod
    def test_with_tta(cls, cfg: CfgNode, model: torch.nn.Module) -> Results:
        """Evaluates with test-time augmentation (TEST.AUG). Names of results end in ``_TTA``."""
        logger.info("evaluating with test-time augmentation")
        if cfg.MODEL.ROI_MASK_HEAD.SCORING.ENABLED:
            logger.warning(
                "test-time augmentation computes no mask scores: masks are ranked by class score"
            )
        evaluators = [
            cls.build_evaluator(cfg, name, inference_folder(cfg, "inference_TTA", name))
            for name in cfg.DATASETS.TEST
        ]
        results = cls.test(cfg, GeneralizedRCNNWithTTA(cfg, model), evaluators)
        return OrderedDict((f"{name}_TTA", value) for name, value in results.items())

    @classmethod
    def draw_contact_sheets(cls, cfg: CfgNode, model: torch.nn.Module) -> None:
        """Writes ``OUTPUT_DIR/contact_sheet_<data set>.png`` for each instance data set in TEST.

        Does nothing for a model without masks.
        """
        for name in cfg.DATASETS.TEST if cfg.MODEL.MASK_ON else ():
            if MetadataCatalog.get(name).get("evaluator_type") in ("coco", "lvis"):
                path = Path(cfg.OUTPUT_DIR) / f"contact_sheet_{name}.png"
                write_contact_sheet(cfg, model, name, path)
                logger.info("ground truth and predictions: %s", path)


def _forget_unmatched_classes(cfg: CfgNode, model: torch.nn.Module) -> None:
    """Removes the weights' class names from a model that trains on data without class names.

    Raises:
        ConfigError: if MODEL.WEIGHTS_STRICT is True and there are names to remove.
    """
    names = class_names_of(model)
    if names is None or class_names(cfg) is not None:
        return
    told = (
        f"{cfg.MODEL.WEIGHTS} has class names ({listed(names)}), but DATASETS.TRAIN does not, so "
        f"rows cannot be matched by name; set thing_classes in the data set's metadata"
    )
    if cfg.MODEL.WEIGHTS_STRICT:
        raise ConfigError(f"{told}, or MODEL.WEIGHTS_STRICT False to keep the rows in order")
    logger.warning("%s; for now, the rows keep their order", told)
    name_classes(model, None)


def _average_weights(trainer: Trainer) -> None:
    if trainer.average:
        trainer.average.update_parameters(trainer.model)


def _draw_contact_sheets(trainer: Trainer) -> None:
    if trainer.iter >= trainer.max_iter:  # not after a failure
        trainer.draw_contact_sheets(trainer.cfg, trainer.evaluated_model)
