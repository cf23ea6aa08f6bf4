"""Checkpoints of runs, and weights from other sources."""

from .checkpointer import MaskHeadCheckpointer, export_safetensors
from .weight_fit import WeightsPolicy, class_names

__all__ = ["MaskHeadCheckpointer", "WeightsPolicy", "class_names", "export_safetensors"]
