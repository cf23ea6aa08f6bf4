"""Reports the results of an ablation as Markdown, HTML and pictures."""

from .pages import write_report

__all__ = ["write_report"]
