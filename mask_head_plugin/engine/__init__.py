"""Training and evaluation runs."""

from .checkpoint import MaskHeadCheckpointer, export_safetensors
from .trainer import Trainer

__all__ = ["MaskHeadCheckpointer", "Trainer", "export_safetensors"]
