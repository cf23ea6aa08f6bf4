"""Compares stock detectron2 with the plugin, with the same weights and on the same images."""

from .compare import compare_all, compare_config

__all__ = ["compare_all", "compare_config"]
