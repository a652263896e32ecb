"""Cell2Text: from the gene counts of a cell to a description in words.

Two halves never import each other and meet only in files: the cells half (anndata, scanpy) and the language half
(torch, transformers, peft). ``cell2text.annotate``, which describes the cells of an object in memory, joins them.
"""

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    """Import ``annotate``, which needs the packages of both halves, only when it is used."""
    if name == "annotate":
        # by name, because a rule depends on whatever the package imports by a statement
        return import_module("cell2text.annotation.annotate").annotate
    raise AttributeError(f"module 'cell2text' has no attribute {name!r}")
