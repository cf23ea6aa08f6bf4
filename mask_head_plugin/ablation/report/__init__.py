"""What an ablation found, as Markdown, HTML and pictures."""

from .pages import write_report

__all__ = ["write_report"]
