"""Refuses configs that would fail or mislead, before anything is built."""

from .check import check_config

__all__ = ["check_config"]
