"""What a trained model gets wrong, and what more training of which branch can still win."""

from .analyze import run_analysis

__all__ = ["run_analysis"]
