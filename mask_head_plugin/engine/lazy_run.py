"""Implements tools/lazyconfig_train_net.py: detectron2's training loop for a LazyConfig.

The loop, its hooks and its files are the same as in detectron2. The plugin adds some guarantees:
weights that do not fit are an error, files of weights never run code, checkpoints get their name
only when they are complete, and processes run on CPUs as well as GPUs. The other guarantees of
Trainer, such as exact resuming, apply only to YAML configs.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch
from detectron2.config import instantiate
from detectron2.data import DatasetMapper
from detectron2.data.transforms import FixedSizeCrop
from detectron2.engine import (
    AMPTrainer,
    SimpleTrainer,
    create_ddp_model,
    default_setup,
    default_writers,
    hooks,
)
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from omegaconf import DictConfig

from ..checkpoint import MaskHeadCheckpointer, WeightsPolicy
from ..checkpoint.run_folder import set_aside_earlier_run
from ..config import ConfigError, read_config
from ..data import check_registered_datasets
from ..lazy_config import SETTINGS, calls, load_lazy_config, settings_of, target_of
from ..modeling import to_channels_last

logger = logging.getLogger(__name__)

OWN_FILES = "Your own files go into DATASETS.COCO_FILES"
OWN_FILES_HERE = "Register your own in the config file with register_coco_instances(...)"
"""OWN_FILES is part of a message of check_registered_datasets. With a LazyConfig, OWN_FILES_HERE
replaces it.
"""


def set_up(args: argparse.Namespace) -> DictConfig:
    """Returns the run's config.

    Args:
        args: the flags of tools/lazyconfig_train_net.py.

    Raises:
        ConfigError: if a setting cannot be used; raised before anything is built.
    """
    cfg = load_lazy_config(args.config_file, args.opts)
    on_gpu = torch.device(cfg.train.device).type == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise ConfigError(
            f"train.device is {cfg.train.device}, but PyTorch finds no GPU; add train.device=cpu "
            "train.amp.enabled=False"
        )
    if cfg.train.amp.enabled and not on_gpu:
        raise ConfigError("train.amp.enabled needs a GPU; add train.amp.enabled=False")
    if args.eval_only and not (cfg.train.init_checkpoint or args.resume):
        raise ConfigError("--eval-only needs train.init_checkpoint=FILE, or --resume")
    _check_datasets(cfg, train=not args.eval_only)
    return cfg


def _check_datasets(cfg: DictConfig, *, train: bool) -> None:
    try:
        check_registered_datasets(read_config(opts=settings_of(cfg)), train=train)
    except ConfigError as error:
        told = str(error)
        for key, here in {**SETTINGS, OWN_FILES: OWN_FILES_HERE}.items():
            told = told.replace(key, here)
        raise ConfigError(told) from error


def train_or_evaluate(args: argparse.Namespace) -> None:
    """Trains in one of the run's processes, or evaluates if ``args.eval_only``.

    Raises:
        ConfigError: if a setting or the weights cannot be used.
    """
    cfg = set_up(args)  # in each process, because a config with functions cannot be pickled
    default_setup(cfg, args)
    model = instantiate(cfg.model).to(cfg.train.device)
    to_channels_last(model)
    if not args.eval_only:
        _train(cfg, model, resume=args.resume)
        return
    policy = _policy(cfg, train=False)
    checkpointer = MaskHeadCheckpointer(model, cfg.train.output_dir, policy=policy)
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=args.resume)
    _evaluate(cfg, model)


def _policy(cfg: DictConfig, *, train: bool) -> WeightsPolicy:
    policy = WeightsPolicy.from_config(read_config(opts=settings_of(cfg)), train=train)
    return dataclasses.replace(policy, advice="set train.init_checkpoint to weights of this config")


def _train(cfg: DictConfig, model: torch.nn.Module, *, resume: bool) -> None:
    train = cfg.train
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    if comm.is_main_process():
        _warn_of_stock_mapper(cfg)
    loader = instantiate(cfg.dataloader.train)
    places = {"device_ids": None} if torch.device(train.device).type == "cpu" else {}
    model = create_ddp_model(model, **train.ddp, **places)
    trainer = (AMPTrainer if train.amp.enabled else SimpleTrainer)(model, loader, optimizer)
    policy = _policy(cfg, train=True)
    checkpointer = MaskHeadCheckpointer(model, train.output_dir, policy=policy, trainer=trainer)
    # Created before the checkpoint is read, because the checkpoint includes the schedule's state.
    schedule = hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier))
    trainer.register_hooks([hooks.IterationTimer(), schedule])
    resume = comm.all_gather(resume and checkpointer.has_checkpoint())[0]
    checkpointer.resume_or_load(train.init_checkpoint, resume=resume)
    comm.synchronize()  # other processes may still be reading weights of an earlier run
    others: list[hooks.HookBase] = [
        hooks.EvalHook(train.eval_period, lambda: _evaluate(cfg, model))
    ]
    if comm.is_main_process():
        if not resume:
            set_aside_earlier_run(Path(train.output_dir))
            Path(train.output_dir, "metrics.json").unlink(missing_ok=True)  # a copy is set aside
        writers = default_writers(train.output_dir, train.max_iter)
        others = [
            hooks.PeriodicCheckpointer(checkpointer, **train.checkpointer),
            *others,
            hooks.PeriodicWriter(writers, period=train.log_period),
        ]
    trainer.register_hooks(others)
    trainer.train(trainer.iter + 1 if resume else 0, train.max_iter)


def _warn_of_stock_mapper(cfg: DictConfig) -> None:
    targets = set(map(target_of, calls(cfg.dataloader.train)))
    if {DatasetMapper, FixedSizeCrop} <= targets:
        logger.warning(
            "dataloader.train.mapper: detectron2's DatasetMapper needs the package shapely to crop "
            "polygons, and extends bit masks into padding; call "
            "mask_head_plugin.lazy_config.use_plugin_mapper(dataloader) in the config file"
        )


def _evaluate(cfg: DictConfig, model: torch.nn.Module) -> dict[str, Any]:
    loader, evaluator = (instantiate(cfg.dataloader[x]) for x in ("test", "evaluator"))
    results = inference_on_dataset(model, loader, evaluator)
    if comm.is_main_process():
        print_csv_format(results)
    return dict(results)
