"""Adds README, CONTRIBUTING and CHANGELOG, which are not in docs/, to the site.

Links between these files and docs/ are paths in the repository. On the site, all pages are in one
folder, so these hooks rewrite the links. MkDocs then checks the links.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
LICENSE = "https://www.apache.org/licenses/LICENSE-2.0"


def on_files(files: Any, config: Any) -> Any:
    """Adds a page for each file in PAGES."""
    for name, page in PAGES.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Returns the page with links that work on the site."""
    prefix = "" if page.file.src_path in PAGES.values() else "../"
    for name, target in PAGES.items():
        markdown = markdown.replace(f"]({prefix}{name}", f"]({target}")
    if not prefix:
        markdown = re.sub(r"\]\(docs/", "](", markdown).replace("](LICENSE)", f"]({LICENSE})")
    return markdown
