"""A trained model on images and videos."""

from .demo import run_demo

__all__ = ["run_demo"]
