"""Writes a config fitted to a data set; see docs/new_config.md."""

from .new_config import DataFiles as DataFiles
from .new_config import NewConfig as NewConfig
from .new_config import Request as Request
from .new_config import write_new_config as write_new_config
from .summary import summary as summary
