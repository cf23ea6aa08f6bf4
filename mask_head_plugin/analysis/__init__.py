"""Shows what a trained model gets wrong and how much AP a better branch could gain."""

from .analyze import run_analysis

__all__ = ["run_analysis"]
