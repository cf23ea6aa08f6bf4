#!/usr/bin/env python3
"""Repeats a training step that was stopped because a loss or gradient was not finite.

Shows the first layer whose output is not finite, and the images of the batch.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import flags

if TYPE_CHECKING:
    from mask_head_plugin.engine.replay import Replay

EXAMPLES = """
Example:
  python tools/replay_step.py output/run1/failed_steps/iteration_1234_rank_0.pth
The step is repeated on the CPU with the config.yaml of the run, or with --config-file. You can add
any config key: MODEL.ROI_MASK_HEAD.LOSSES '[["dice", 1.0]]'
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", type=Path, help="a file in OUTPUT_DIR/failed_steps")
    parser.add_argument("--config-file", metavar="FILE", help="default: config.yaml in OUTPUT_DIR")
    flags.add_code(parser)
    parser.add_argument("opts", nargs="*", help="KEY VALUE pairs of the config")
    args = parser.parse_intermixed_args()  # flags may follow the step
    # Imported after the flags are parsed: --help must not wait seconds for PyTorch.
    from mask_head_plugin import ConfigError
    from mask_head_plugin.config_imports import import_options
    from mask_head_plugin.engine import Trainer
    from mask_head_plugin.engine.replay import replay_step
    from mask_head_plugin.user_code import load_config_and_code

    try:
        config_file = args.config_file or str(args.step.parent.parent / "config.yaml")
        opts = [*import_options(args.imports), *args.opts, "MODEL.DEVICE", "cpu"]
        cfg = load_config_and_code(config_file, opts, is_named=args.config_file is not None)
        if not args.step.is_file():
            raise ConfigError(f"{args.step} does not exist")
        print(report(replay_step(Trainer.build_model(cfg), args.step)))
    except ConfigError as error:
        parser.exit(2, f"replay_step.py: {error}\n")


def report(replay: Replay) -> str:
    from tabulate import tabulate

    from mask_head_plugin.engine.guards import describe_batch
    from mask_head_plugin.messages import listed

    losses = [(name, replay.saved_losses.get(name), x) for name, x in replay.losses.items()]
    table = tabulate(losses, ("loss", "in the run", "repeated"), tablefmt="github", floatfmt=".6g")
    return "\n".join(
        (
            f"Images: {describe_batch(replay.batch)}",
            table,
            f"Weights that were not finite before the step: {listed(replay.bad_weights)}",
            f"Modules with an output that is not finite, in order: {listed(replay.bad_outputs)}",
            f"Gradients that are not finite, starting from the losses: "
            f"{listed(replay.bad_gradients)}",
        )
    )


if __name__ == "__main__":
    main()
