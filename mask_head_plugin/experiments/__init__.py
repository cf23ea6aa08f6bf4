"""Ablations: files that name variants of a config."""

from .ablation import Ablation, load_ablation

__all__ = ["Ablation", "load_ablation"]
