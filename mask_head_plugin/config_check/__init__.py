"""Configs that would fail or mislead, refused before anything is built."""

from .check import check_config

__all__ = ["check_config"]
