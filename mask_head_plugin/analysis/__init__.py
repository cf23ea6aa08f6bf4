"""Finds what a trained model gets wrong, and what a better branch could still win."""

from .analyze import run_analysis

__all__ = ["run_analysis"]
