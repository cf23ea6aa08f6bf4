"""Implements train_net.py, except for its flags: sets up a run, then trains or evaluates."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Collection
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from ..config import ConfigError, find_config_file
from ..config_check import check_config
from ..config_check.unread_keys import own_keys, report_unread_keys
from ..config_imports import import_options
from ..data import check_and_leave_out, check_registered_datasets, register_coco_files
from ..user_code import import_modules, load_config_and_code
from . import launch
from .guards import TrainingError
from .interruption import Interrupted
from .trainer import Trainer

logger = logging.getLogger(__name__)


def run(args: argparse.Namespace) -> int:
    """Trains or evaluates in all processes of a run, and prints errors.

    Args:
        args: the flags of train_net.py.

    Returns:
        The exit code: 2 if a setting or file cannot be used, 1 if the run failed, otherwise 0.

    Raises:
        KeyboardInterrupt: after Ctrl-C. The message says how to continue, if there is a way.
    """
    try:
        with launch.first_on_machine():
            cfg = set_up(args)
        place = (args.num_gpus, args.num_machines, args.machine_rank, args.dist_url)
        launch.launch(train_or_evaluate, *place, (cfg, args), device=cfg.MODEL.DEVICE)
    except (ConfigError, TrainingError, launch.RankError) as error:
        print(f"train_net.py: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt as stop:
        told = str(stop)
        if args.eval_only:
            told = "interrupted; the same command continues with the remaining images"
        elif isinstance(stop, Interrupted):
            told = f"{stop}; {stop.advice()}"
        raise KeyboardInterrupt(told) from None
    return 0


def set_up(args: argparse.Namespace) -> CfgNode:
    """Returns the run's config, frozen, with its data sets registered and checked.

    Args:
        args: the flags of train_net.py. Its ``config_file`` is replaced by the path of the file.

    Raises:
        ConfigError: if a setting or data set cannot be used; raised before anything is built.
    """
    args.config_file = find_config_file(args.config_file)  # default_setup also opens it
    cfg = load_config_and_code(args.config_file, [*import_options(args.imports), *args.opts])
    num_processes = launch.process_count(args.num_gpus, args.num_machines, cfg.MODEL.DEVICE)
    if args.eval_only and not (cfg.MODEL.WEIGHTS or args.resume):
        raise ConfigError(
            "--eval-only needs MODEL.WEIGHTS FILE or, for the last checkpoint, --resume"
        )
    rank = launch.process_rank()
    check_and_register(
        cfg,
        train=not args.eval_only,
        num_processes=num_processes,
        log_rank=rank,
        own=own_keys(args.config_file, args.opts[::2]),
    )
    check_and_leave_out(cfg, train=not args.eval_only)
    cfg.freeze()
    return cfg


def check_and_register(
    cfg: CfgNode,
    *,
    train: bool,
    num_processes: int = 1,
    log_rank: int | None = None,
    own: Collection[str] | None = None,
) -> None:
    """Checks a config and its data sets, and registers COCO_FILES.

    Args:
        cfg: the config; register_coco_files adapts it in place.
        train: whether the run trains.
        num_processes: number of processes in the run.
        log_rank: rank of this process, for its log in OUTPUT_DIR; None writes no log there.
        own: the keys to report if they have no effect; None means all keys.

    Raises:
        ConfigError: if a setting or data set cannot be used.
    """
    check_config(cfg, train=train, num_processes=num_processes, trainer=Trainer)
    if log_rank is not None:
        setup_logger(cfg.OUTPUT_DIR, log_rank, name="mask_head_plugin")
    report_unread_keys(cfg, train=train, own=own)
    register_coco_files(cfg)
    check_registered_datasets(cfg, train=train)


def join_run(cfg: CfgNode) -> None:
    """Sets up logging, imports the user's code and registers the data sets in a new process."""
    setup_logger(cfg.OUTPUT_DIR, comm.get_rank(), name="mask_head_plugin")
    import_modules(cfg.IMPORTS)
    register_coco_files(cfg)


def train_or_evaluate(cfg: CfgNode, args: argparse.Namespace) -> dict[str, Any] | None:
    """Trains in one of the run's processes, or evaluates if ``args.eval_only``.

    Args:
        cfg: the config from ``set_up``.
        args: the flags of train_net.py.

    Returns:
        In the main process, the metrics by task.

    Raises:
        ConfigError: if weights do not fit.
        TrainingError: if the training cannot continue.
    """
    if comm.get_world_size() > 1:  # a process started for --num-gpus
        join_run(cfg)
    default_setup(cfg, args)
    what = (cfg.MODEL.DEVICE, comm.get_world_size())
    logger.info("running on %s, processes: %d", *what)
    if cfg.IMPORTS:
        logger.info("imported your code (IMPORTS): %s", ", ".join(cfg.IMPORTS))
    results: dict[str, Any] | None
    if args.eval_only:
        model = Trainer.load_model(cfg, resume=args.resume)
        results = Trainer.evaluate(cfg, model)
        if comm.is_main_process():
            verify_results(cfg, results)
    else:
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=launch.restarted(cfg.OUTPUT_DIR) or args.resume)
        trainer.train()
        results = getattr(trainer, "_last_eval_results", None)  # none without DATASETS.TEST
    if comm.is_main_process() and results and "bbox" in results:
        logger.info("to see the model's errors: python tools/analyze.py %s", cfg.OUTPUT_DIR)
    return results
