"""Runs training and evaluation."""

from ..checkpoint import MaskHeadCheckpointer, WeightsPolicy, class_names, export_safetensors
from ..config_check import check_config
from .guards import TrainingError
from .predictor import load_predictor
from .trainer import Trainer

__all__ = [
    "MaskHeadCheckpointer",
    "Trainer",
    "TrainingError",
    "WeightsPolicy",
    "check_config",
    "class_names",
    "export_safetensors",
    "load_predictor",
]
