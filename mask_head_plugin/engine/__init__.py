"""Training and evaluation runs."""

from .checkpoint import MaskHeadCheckpointer, export_safetensors
from .config_check import check_config
from .guards import TrainingError
from .trainer import Trainer

__all__ = [
    "MaskHeadCheckpointer",
    "Trainer",
    "TrainingError",
    "check_config",
    "export_safetensors",
]
