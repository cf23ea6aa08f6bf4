"""Refuses configs that would fail or mislead, before the run starts."""

from .check import check_config

__all__ = ["check_config"]
