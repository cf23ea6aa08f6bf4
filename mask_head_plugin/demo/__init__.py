"""Runs a trained model on images and videos."""

from ..detectron2_import import IMPORT_ERROR, refuse

if IMPORT_ERROR is None:
    from .demo import run_demo

__all__ = ["run_demo"]

__getattr__ = refuse(__name__, __all__)
