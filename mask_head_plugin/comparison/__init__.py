"""Stock detectron2 and the plugin with the same weights on the same images."""

from .compare import compare_all, compare_config

__all__ = ["compare_all", "compare_config"]
