"""Compares stock detectron2 with the plugin: same weights, same images."""

from .compare import compare_all, compare_config

__all__ = ["compare_all", "compare_config"]
