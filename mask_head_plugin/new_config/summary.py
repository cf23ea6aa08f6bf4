"""Summarizes a new config for the console: model, data, cost, and the command to train it."""

from __future__ import annotations

from ..dataset_check.findings import by_kind
from .new_config import NewConfig
from .settings import describe
from .trial import TIMED


def summary(new: NewConfig) -> str:
    """Returns a summary of several lines; the last line is the command that starts training."""
    config, *parts = new.files
    lines = [f"{config}: {new.backbone.name} on {new.device}", f"  training: {describe(new.train)}"]
    if new.val is not None:
        lines.append(f"  validation: {describe(new.val)}")
    if parts:
        lines.append(f"  split into {' and '.join(map(str, parts))}")
    lines.append(f"  {_estimate(new)}")
    lines += [f"  {line}" for line in _warnings(new)]
    if new.backbone.advice:
        lines.append(f"  {new.backbone.advice}")
    return "\n".join([*lines, "Train with", f"  python train_net.py --config-file {config}"])


def _warnings(new: NewConfig) -> list[str]:
    """Returns the first warning of each kind, and how many more of that kind there are."""
    lines = []
    for kind, group in by_kind(new.warnings).items():
        more = f" (and {len(group) - 1} more of {kind})" if len(group) > 1 else ""
        lines.append(f"warning: {group[0]}{more}")
    return lines


def _estimate(new: NewConfig) -> str:
    estimate, iterations = new.estimate, new.schedule.iterations
    if estimate is None:
        return f"{iterations:,} iterations; no time estimate, because this machine has no GPU"
    training = _minutes(iterations * estimate.seconds_per_iteration)
    words = f"{training} for {iterations:,} iterations of {estimate.seconds_per_iteration:.2f} s"
    if new.val is not None:
        seconds = len(new.val.image_hw) * estimate.seconds_per_image
        evaluations = -(-iterations // new.schedule.period)
        words += f", {_minutes(seconds)} for each of {evaluations} evaluations"
    memory = f"{estimate.memory / 1e9:.1f} GB of memory"
    load = f"if the machine stays as busy as in the last {TIMED} iterations of the trial"
    return f"estimate: {words}, {memory}; {load}"


def _minutes(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
