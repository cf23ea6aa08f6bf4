#!/usr/bin/env python3
"""Trains or evaluates the model of a config file, with the flags of detectron2's train_net.py."""

from __future__ import annotations

import argparse
import logging
import sys
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from mask_head_plugin import ConfigError, load_config
from mask_head_plugin.data import check_dataset_files, check_datasets, register_coco_files
from mask_head_plugin.engine import Trainer, TrainingError, check_config, launch

EXAMPLES = """
Examples:
  Train on the embedded data set, on whatever device there is:
    python train_net.py --config-file configs/shapes/mask_rcnn_shapes.yaml
  Train on COCO with 8 GPUs, either way:
    python train_net.py --num-gpus 8 --config-file configs/coco/mask_rcnn_R_50_FPN_1x.yaml
    torchrun --nproc-per-node 8 train_net.py --config-file configs/coco/mask_rcnn_R_50_FPN_1x.yaml
  Go on after an interruption; evaluate weights (.pth, .pkl or .safetensors):
    python train_net.py --resume --config-file ... OUTPUT_DIR output/run1
    python train_net.py --eval-only --config-file ... MODEL.WEIGHTS output/run1/model_final.pth
Any config key may follow the flags: SOLVER.BASE_LR 0.005 SOLVER.MAX_ITER 20000
Results are in OUTPUT_DIR: log.txt, metrics.json, TensorBoard events, model_final.pth, inference/
and contact_sheet_*.png (validation images, ground truth beside predictions).
"""


def setup(args: argparse.Namespace) -> CfgNode:
    cfg = load_config(args.config_file, args.opts)
    num_processes = launch.process_count(args.num_gpus, args.num_machines, cfg.MODEL.DEVICE)
    check_config(cfg, train=not args.eval_only, num_processes=num_processes)
    if args.eval_only and not (cfg.MODEL.WEIGHTS or args.resume):
        raise ConfigError("--eval-only needs MODEL.WEIGHTS FILE, or --resume: the last checkpoint")
    setup_logger(cfg.OUTPUT_DIR, launch.process_rank(), name="mask_head_plugin")
    register_coco_files(cfg)
    check_datasets(cfg)
    check_dataset_files(cfg)
    cfg.freeze()
    return cfg


def main(cfg: CfgNode, args: argparse.Namespace) -> dict[str, Any] | None:
    if comm.get_world_size() > 1:  # --num-gpus: it has no logger and knows of no files
        setup_logger(cfg.OUTPUT_DIR, comm.get_rank(), name="mask_head_plugin")
        register_coco_files(cfg)
    default_setup(cfg, args)
    what = (cfg.MODEL.DEVICE, comm.get_world_size())
    logging.getLogger("mask_head_plugin").info("running on %s, processes: %d", *what)
    if args.eval_only:
        model = Trainer.load_model(cfg, resume=args.resume)
        results = Trainer.evaluate(cfg, model)
        if comm.is_main_process():
            verify_results(cfg, results)
        return results
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=launch.restarted(cfg.OUTPUT_DIR) or args.resume)
    return trainer.train()


if __name__ == "__main__":
    args = default_argument_parser(EXAMPLES).parse_args()
    try:
        with launch.first_on_machine():
            cfg = setup(args)
        place = (args.num_gpus, args.num_machines, args.machine_rank, args.dist_url)
        launch.launch(main, *place, (cfg, args), device=cfg.MODEL.DEVICE)
    except (ConfigError, TrainingError, launch.RankError) as error:
        print(f"train_net.py: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
