"""Mask R-CNN's mask branch as a detectron2 plugin. Importing it registers everything."""

from . import data, modeling
from .config import ConfigError, add_mask_head_config, load_config

__version__ = "0.1.0"

__all__ = ["ConfigError", "add_mask_head_config", "data", "load_config", "modeling"]
