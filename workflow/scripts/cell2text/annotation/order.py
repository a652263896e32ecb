"""The order of clusters, in tables of both halves of the package."""

import re


def natural(name: str) -> tuple[list[str | int], str]:
    """Return a key that sorts names as people do: 2 before 10, T2 before T10.

    Examples
    --------
    >>> sorted(["10", "2", "T10", "T2"], key=natural)
    ['2', '10', 'T2', 'T10']
    """
    # text and numbers alternate, beginning with text, so parts in the same place have the same type
    return [int(part) if place % 2 else part for place, part in enumerate(re.split(r"(\d+)", name))], name
