#!/usr/bin/env python3
"""Runs an ablation: trains every variant with every seed and writes a report."""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from datetime import timedelta
from typing import TYPE_CHECKING

import flags

if TYPE_CHECKING:
    from mask_head_plugin.ablation import Cluster, Trial

EXAMPLES = """
Examples:
  List what would run and about how long it would take:
    python tools/ablate.py --config-file configs/ablations/mask_loss.yaml \\
        --output output/mask_loss --dry-run
  Two trials at a time on this machine, on the embedded data set, with a shorter schedule for all
  (a variant of this file raises the weight of a loss over the first 1000 iterations):
    python tools/ablate.py --config-file configs/ablations/mask_loss.yaml \\
        --output output/mask_loss --jobs 2 SOLVER.MAX_ITER 1500
  The same on COCO, on a Slurm cluster, 8 GPUs per trial, 4 trials at a time:
    python tools/ablate.py --config-file configs/ablations/mask_loss.yaml --size coco \\
        --output output/mask_loss_coco --cluster slurm --num-gpus 8 --partition gpu --time 2880 \\
        --jobs 4

After Ctrl-C, a crash or a preemption, run the same command again. It runs the missing and failed
trials, each from its last checkpoint, so only the work since that checkpoint is lost. On a CPU,
several trials with one thread each are faster than one trial with several threads. At the end,
--output contains report.md, report.html, and a folder for each trial with its log, metrics, events
and checkpoints.
"""


def parse_args() -> argparse.Namespace:
    parser = flags.FlagsFirst(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config-file",
        required=True,
        metavar="FILE",
        help="an ablation file: your own, or one of configs/ablations/",
    )
    flags.add_output(parser, "DIR")
    parser.add_argument("--size", default="shapes", help="one of the file's SIZES (default shapes)")
    parser.add_argument(
        "--variant",
        action="append",
        default=[],
        metavar="NAME",
        help="run only this variant; repeatable",
    )
    parser.add_argument(
        "--seed",
        action="append",
        type=int,
        default=[],
        help="seed to use instead of the file's SEEDS; repeatable",
    )
    parser.add_argument(
        "--cluster",
        choices=["local", "slurm", "debug"],
        default="local",
        help="run trials in processes on this machine (local, the default), as Slurm jobs, or one "
        "after the other in this process (debug)",
    )
    parser.add_argument("--jobs", type=int, default=1, help="trials at a time (default 1)")
    parser.add_argument("--num-gpus", type=int, default=0, help="GPUs per trial (default 0: CPU)")
    parser.add_argument("--partition", default="", help="Slurm partition")
    parser.add_argument("--account", default="", help="Slurm account to charge")
    parser.add_argument("--qos", default="", help="Slurm quality of service")
    parser.add_argument(
        "--time", type=int, default=24 * 60, metavar="MINUTES", help="time limit for a Slurm job"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the plan, its time, and the seeds needed to detect --difference, then stop",
    )
    parser.add_argument(
        "--difference",
        type=float,
        metavar="AP",
        help="the difference in METRIC that --dry-run plans for (default 1)",
    )
    parser.add_argument("--draws", type=int, default=1000, help="bootstrap draws (default 1000)")
    flags.add_code(parser)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs, for all variants")
    args = parser.parse_args()
    if args.difference is not None and not args.dry_run:
        parser.error("--difference has no effect without --dry-run: add it, or remove --difference")
    return args


def main() -> int:
    args = parse_args()
    print(f"ablate.py: checking {args.config_file}", file=sys.stderr, flush=True)  # takes a minute
    try:
        # Imported after the flags are parsed: --help must not wait seconds for PyTorch.
        from mask_head_plugin import ConfigError

        try:
            return ablate(args)
        except ConfigError as error:
            print(f"ablate.py: {error}", file=sys.stderr)
            return 2
    except KeyboardInterrupt:
        print("ablate.py: stopped; the same command continues from here", file=sys.stderr)
        return 130


def ablate(args: argparse.Namespace) -> int:
    from mask_head_plugin import ConfigError, ablation
    from mask_head_plugin.ablation.report import write_report
    from mask_head_plugin.config_imports import import_options
    from mask_head_plugin.durable_files import sole_writer
    from mask_head_plugin.messages import counted
    from mask_head_plugin.progress import tell

    difference = 1.0 if args.difference is None else args.difference
    if not 0 < difference < math.inf:
        raise ConfigError(f"--difference {difference}: must be a number above 0")
    if args.draws < 2:
        raise ConfigError(f"--draws {args.draws}: an interval needs at least two draws")
    slurm = {"partition": args.partition, "account": args.account, "qos": args.qos}
    cluster = ablation.Cluster(args.cluster, args.jobs, args.num_gpus, minutes=args.time, **slurm)
    cluster.check()
    opts = [*import_options(args.imports), *args.opts]
    study = ablation.load_ablation(args.config_file, args.size, opts, args.variant, args.seed)
    trials = ablation.plan(study, args.output, args.num_gpus)
    metric = study.metric
    if args.dry_run:
        print(_plan(trials, metric))
        count = counted(len(trials), "trial")
        print(f"{count}, {_time_left(trials, cluster)} with {args.jobs} at a time")
        num_compared = max(len(study.configs) - 1, 1)
        plan = (args.output, metric, difference, len(study.seeds), num_compared, args.draws)
        print("\n".join(ablation.power_lines(*plan)))
        return 0
    cluster.check_commands()
    command = shlex.join(["python", *sys.argv])
    description = ablation.describe(study, file=args.config_file, size=args.size, command=command)
    with sole_writer(args.output):
        ablation.write_description(args.output, description)
        ablation.run(trials, cluster, lambda t: tell(f"{t.name}: {_ended(t, metric)}"))
    failed = [trial for trial in trials if not trial.is_finished]
    for trial in failed:
        print(f"ablate.py: {trial.name} failed: {trial.error}", file=sys.stderr)
    if len(failed) < len(trials):
        write_report(args.output, args.draws)
        print(f"report: {args.output / 'report.md'} and {args.output / 'report.html'}")
    return 1 if failed else 0


def _plan(trials: list[Trial], metric: str) -> str:
    """Returns a table of the trials' states with a row for each variant."""
    from tabulate import tabulate

    seeds = list(dict.fromkeys(trial.seed for trial in trials))
    rows: dict[str, list[str]] = {}
    for trial in trials:
        rows.setdefault(trial.variant, [trial.variant]).append(_state(trial, metric))
    table = tabulate(rows.values(), ["variant", *(f"seed {seed}" for seed in seeds)])
    failed = [f"{x.name} failed: {x.error}" for x in trials if x.error and not x.is_finished]
    folders = f"Each trial has a folder, such as {trials[0].folder}"
    return "\n".join([table, "", *failed, folders])


def _time_left(trials: list[Trial], cluster: Cluster) -> str:
    from mask_head_plugin.ablation import estimate_seconds

    seconds = estimate_seconds(trials, cluster)
    if seconds is None:
        return "of unknown length until one has run on these GPUs,"
    left = timedelta(seconds=round(seconds))
    return f"about {left} of training left, without start-up and evaluation, as busy as now,"


def _ended(trial: Trial, metric: str) -> str:
    """Returns how a trial ended; its error is printed once all trials have ended."""
    return _state(trial, metric) + (f"; see {trial.folder / 'log.txt'}" if trial.has_failed else "")


def _state(trial: Trial, metric: str) -> str:
    """Returns the state of a trial in a few words."""
    if trial.is_finished:
        value = trial.result(metric)
        return trial.state if math.isnan(value) else f"{metric} {value:.2f}"
    if trial.record():
        return trial.state
    done = trial.iteration()
    return f"{done} of {trial.cfg.SOLVER.MAX_ITER}" if done else "to do"


if __name__ == "__main__":
    sys.exit(main())
