"""Mask R-CNN's mask branch as a detectron2 plugin. Importing the package registers everything.

Without detectron2, nothing is registered, and you can import only modules that do not need it, such
as ``deploy.runtime``.
"""

import logging
import warnings

with warnings.catch_warnings():
    # detectron2 and fvcore script some functions on import, and PyTorch warns about each of them.
    # The filter covers only the import: your own calls of torch.jit.script still warn.
    warnings.filterwarnings("ignore", r"`torch\.jit\.script` is deprecated", FutureWarning)
    from .detectron2_import import IMPORT_ERROR, refuse

    if IMPORT_ERROR is None:
        from . import data, modeling
        from .config import ConfigError, add_mask_head_config, load_config

# detectron2's anchors call torch.meshgrid in a form that PyTorch will change. PyTorch says so once
# in each process, whoever calls it. Because of append, your own filters have priority.
warnings.filterwarnings(
    "ignore",
    r"torch\.meshgrid: in an upcoming release",
    UserWarning,
    r"torch\.functional$",
    append=True,
)

# The log messages of this package go to the same handlers as those of detectron2.
logging.getLogger(__name__).parent = logging.getLogger("detectron2")

__version__ = "0.2.0"

__all__ = ["ConfigError", "add_mask_head_config", "data", "load_config", "modeling"]

__getattr__ = refuse(__name__, __all__)
