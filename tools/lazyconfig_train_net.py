#!/usr/bin/env python3
"""Trains or evaluates the model of a LazyConfig, with the flags of detectron2's tool."""

from __future__ import annotations

import argparse
import sys

import flags

EXAMPLES = """
Examples:
  Train one of detectron2's new baselines with the plugin's modules on 8 GPUs; use either command:
    python tools/lazyconfig_train_net.py --num-gpus 8 \\
        --config-file configs/lazy/new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ.py
    torchrun --nproc-per-node 8 tools/lazyconfig_train_net.py \\
        --config-file configs/lazy/new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ.py
  Continue after an interruption:
    python tools/lazyconfig_train_net.py --resume --config-file ... train.output_dir=output/run1
  Evaluate weights (.pth, .pkl or .safetensors):
    python tools/lazyconfig_train_net.py --eval-only --config-file ... train.init_checkpoint=FILE
The config file is Python code that will run, so use only a file that you trust. Weight files run no
code. docs/lazy_config.md has a command for machines without a GPU, and explains how to use the
plugin in your own config.
"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="a LazyConfig (.py)")
    flags.add_run(parser)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY=VALUE pairs of the config")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    # Imported after the flags are parsed: --help must not wait seconds for PyTorch.
    from mask_head_plugin import ConfigError
    from mask_head_plugin.engine import launch
    from mask_head_plugin.engine.lazy_run import set_up, train_or_evaluate

    try:
        with launch.first_on_machine():
            cfg = set_up(args)
        place = (args.num_gpus, args.num_machines, args.machine_rank, args.dist_url)
        launch.launch(train_or_evaluate, *place, (args,), device=cfg.train.device)
    except (ConfigError, launch.RankError, FloatingPointError) as error:
        print(f"lazyconfig_train_net.py: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        told = "interrupted; with --resume, it continues from its newest checkpoint"
        print(f"lazyconfig_train_net.py: {told}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
