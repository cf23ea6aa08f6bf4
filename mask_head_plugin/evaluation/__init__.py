"""Evaluation of masks, in numbers and pictures."""

from .contact_sheet import write_contact_sheet

__all__ = ["write_contact_sheet"]
