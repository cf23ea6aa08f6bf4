"""Training and evaluation runs."""

from ..config_check import check_config
from .checkpoint import MaskHeadCheckpointer, export_safetensors
from .guards import TrainingError
from .predictor import load_predictor
from .trainer import Trainer
from .weights import WeightsPolicy, class_names

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
