"""Files of the project as pages of the site, and links of all pages to them.

Links in Markdown are relative to the file that they stand in, so they also work where the project is browsed.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {
    "overview.md": "README.md",
    "config.md": "config/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "security.md": "SECURITY.md",
}
LINK = re.compile(r"(?<=\]\()(?![a-z]+:)([^)#\s]+)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are elsewhere in the project."""
    for page, source in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Return a page's text with its links to files of the project as links to pages."""
    name = page.file.src_uri
    here = posixpath.dirname(PAGES.get(name, f"docs/{name}"))
    pages = {source: page for page, source in PAGES.items()}

    def to_page(link: re.Match) -> str:
        target = posixpath.normpath(posixpath.join(here, link[1]))
        target = pages.get(target) or target.removeprefix("docs/")
        return posixpath.relpath(target, posixpath.dirname(name) or ".")

    return LINK.sub(to_page, markdown)
