"""Checks whether detectron2, and therefore PyTorch, can be imported.

Training, evaluation and export need detectron2. Machines without detectron2 can still read and draw
images, and run an exported model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NoReturn

from .messages import one_line

IMPORT_ERROR: ImportError | None = None
try:
    import detectron2  # noqa: F401  # only tests whether it can be imported
except ImportError as error:
    IMPORT_ERROR = error


def refuse(package: str, names: Collection[str]) -> Callable[[str], NoReturn]:
    """Returns a ``__getattr__`` for a package, which explains why names are missing.

    Args:
        package: name of the package.
        names: the package's public names that exist only if detectron2 can be imported.
    """

    def get(name: str) -> NoReturn:
        if IMPORT_ERROR is None or name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        raise ImportError(
            f"{package}.{name} needs detectron2, which cannot be imported: "
            f"{one_line(IMPORT_ERROR)}; tools/install_detectron2.py installs it"
        ) from IMPORT_ERROR

    return get
