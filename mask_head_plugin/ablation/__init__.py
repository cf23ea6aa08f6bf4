"""Ablations: the files that define them, their trials, and the runner."""

from .ablation_file import Ablation, load_ablation
from .cluster import Cluster
from .power import power_lines
from .runner import describe, estimate_seconds, plan, run, write_description
from .trial_folder import Trial

__all__ = [
    "Ablation",
    "Cluster",
    "Trial",
    "describe",
    "estimate_seconds",
    "load_ablation",
    "plan",
    "power_lines",
    "run",
    "write_description",
]
