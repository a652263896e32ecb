"""Pages: one HTML file that opens offline, made of a template, style sheets and scripts of this folder."""

import base64
import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from cell2text.files import whole_file

log = logging.getLogger("cell2text.report")

FOLDER = Path(__file__).parent


def write_page(
    path: str | Path,
    template: str,
    styles: Sequence[str],
    scripts: Sequence[str],
    variables: Mapping[str, Any],
    filters: Mapping[str, Callable] | None = None,
) -> None:
    """Write a page; its security policy allows no request, and no scripts but these.

    Parameters
    ----------
    path
        The HTML file to write.
    template, styles, scripts
        Names of files in this folder. The template also gets ``style``, ``script`` and ``script_hash``.
    variables
        Variables of the template, all of which are escaped.
    filters
        Filters of the template, besides ``count`` and ``percent``.
    """
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "count": lambda value: f"{value:,.0f}", **(filters or {})}
    style, code = ("".join((FOLDER / name).read_text() for name in names) for names in (styles, scripts))
    page = environment.get_template(template).render(
        **variables,
        style=Markup(style),  # noqa: S704 - files of this package
        script=Markup(code),  # noqa: S704 - files of this package
        script_hash=base64.b64encode(hashlib.sha256(code.encode()).digest()).decode(),
    )
    with whole_file(path) as unfinished:
        unfinished.write_text(page, encoding="utf-8")
    log.info("%s: %.1f MB", path, len(page.encode()) / 1e6)


def percent(value: float, digits: int = 1) -> str:
    """Return a share as a percentage, without the percent sign.

    Examples
    --------
    >>> percent(0.7536), percent(float("nan"))
    ('75.4', '–')
    """
    return f"{100 * value:.{digits}f}" if value == value else "–"
