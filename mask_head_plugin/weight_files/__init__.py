"""Reads weights and pickles from untrusted sources without running code or exhausting memory."""

from .plain_pickle import read_plain_pickle
from .reader import check_head, file_errors, read_checkpoint

__all__ = ["check_head", "file_errors", "read_checkpoint", "read_plain_pickle"]
