"""Renders pages from templates that extend ``page.html.j2``."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .. import __version__
from ..messages import ConfigError
from .figures import DARK_COLOURS

PACKAGES = ("jinja2", "plotly")


def check_packages(page: str, written: Path) -> None:
    """Raises a ConfigError if packages for rendering a page are missing.

    Args:
        page: file name of the page.
        written: a file that has already been written, named in the error.
    """
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"{written} has been written, but {page} needs {' and '.join(missing)}: "
            "pip install -e '.[report]' in the folder of mask_head_plugin"
        )


def render(template: Path, **values: Any) -> str:
    """Returns a self-contained page, including its scripts. Needs jinja2 and plotly.

    Args:
        template: a file that extends ``page.html.j2``.
        **values: values for the template; all templates need ``title`` and ``figures``.
    """
    # Imported here, so that the package works without the optional dependencies.
    import jinja2
    from plotly.offline import get_plotlyjs

    loader = jinja2.FileSystemLoader([template.parent, Path(__file__).parent])
    settings: dict[str, Any] = {"autoescape": True, "undefined": jinja2.StrictUndefined}
    environment = jinja2.Environment(
        loader=loader, trim_blocks=True, lstrip_blocks=True, **settings
    )
    page = environment.get_template(template.name)
    shared = {"version": __version__, "plotly_js": get_plotlyjs(), "dark_colours": DARK_COLOURS}
    return page.render(**shared, **values)
