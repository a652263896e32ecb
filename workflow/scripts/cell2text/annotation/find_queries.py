"""The files to annotate and the model that annotates them, as the config names them."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cell2text.annotation.fetch_model import fetch_model
from cell2text.annotation.pack_model import REFINEMENT, RETRIEVER, read_facts, read_model
from cell2text.config import check_file, read_datasets
from cell2text.errors import InputError

SHEETS = (".tsv", ".csv")


def find_queries(
    config: dict[str, Any], schema: Path, models: str | Path
) -> tuple[dict[str, dict[str, str]], str | list]:
    """Return the rows of the files to annotate by name, and the folder of the model; both empty without a query.

    Parameters
    ----------
    config
        The configuration: ``query`` is a study or a sheet of studies, ``model`` a folder or a source, ``species`` that
        of studies whose row of the sheet has none. For a search, ``input`` is the study or sheet instead.
    schema
        Schema of the sheet of datasets.
    models
        Folder to which a model from Hugging Face Hub is downloaded, unless it is there.

    Raises
    ------
    InputError
        If one of the two keys is missing, a file does not exist, or the folder is no packed model.
    """
    key = "input" if "input" in config else "query"
    query, model = config[key], config["model"]
    species = _species_of(config)
    if query is None and species:
        raise InputError("config: species", "is that of a query", "For training, use the column species of the sheet")
    if query is None and model is None:
        return {}, []
    if query is None or model is None:
        absent, example = (key, "my.h5ad") if query is None else ("model", "results/pbmc68k/model")
        raise InputError(f"config: {absent}", "is missing", f"Add {absent}={example} to --config")
    rows = {name: species | row for name, row in read_queries(query, schema).items()}
    folder = fetch_model(model, models)
    read_model(folder)
    # The path is absolute so that no rule of a run makes the folder: it is used as it is.
    return rows, str(folder.resolve())


def find_examples(config: dict[str, Any], queries: Mapping[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    """Return the row of the study of labelled cells by its name; empty if the config names none.

    Raises
    ------
    InputError
        If there is no query, the file does not exist, or a query has the same name.
    """
    if "examples" not in config:
        return {}
    source = config["examples"]
    if not queries:
        raise InputError("config: examples", "are for a query", "Add query=my.h5ad model=... to --config")
    if "://" not in source:
        check_file(source, "config: examples")
    name = name_examples(source)
    if name in queries:
        raise InputError("config: examples", f"a query is called {name} as well", "Rename one of the two files")
    return {name: _species_of(config) | {"dataset": name, "source": source}}


def _species_of(config: dict[str, Any]) -> dict[str, str]:
    """Return the config's ``species`` as a field of a row, or no field."""
    return {"species": config["species"]} if "species" in config else {}


def name_examples(source: str) -> str:
    """Return a name for the study of labelled cells, which may be the query itself."""
    return f"{name_query(source)}_examples"


def read_searched(config: dict[str, Any], model: str | Path) -> list[str]:
    """Return what to search for in the files of ``input``: the parts of ``query`` between semicolons.

    Raises
    ------
    InputError
        If one is empty, or the model has no retriever.
    """
    return split_searched(config["query"] or "", model) if "input" in config else []


def split_searched(query: str, model: str | Path) -> list[str]:
    """Return what to search for, see :func:`read_searched`."""
    parts = [part.strip() for part in query.split(";")]
    if not all(parts):
        raise InputError("query", "is empty", 'Write what to search for, such as query="T cells in lung"')
    if RETRIEVER not in read_facts(model)["sha256"]:
        raise InputError(model, "this model cannot search", "Train it with `retrieval: {train: true}` in its config")
    return parts


def check_refinement(model: str | Path) -> None:
    """Check that a model can refine cell types among the similar cells of a file.

    Raises
    ------
    InputError
        If it cannot.
    """
    facts = read_facts(model)
    if "cell_type" not in facts["labels"]:
        raise InputError(model, "this model names no cell types", "Do not set annotate.graph or --graph")
    if REFINEMENT not in facts["sha256"]:
        raise InputError(
            model, "this model cannot refine cell types", "Train it with `graph: {refine: true}` in its config"
        )


def read_queries(query: str, schema: Path) -> dict[str, dict[str, str]]:
    """Return the rows of a sheet of studies by name, or one row for a study, named after its file."""
    if Path(query).suffix in SHEETS and Path(query).is_file():
        return read_datasets(query, schema)
    if "://" not in query:
        check_file(query, "config: query")
    name = name_query(query)
    return {name: {"dataset": name, "source": query}}


def name_query(query: str) -> str:
    """Return a name for a file or folder: its own without ending, in the characters of a dataset id.

    Examples
    --------
    >>> name_query("studies/my cells (new).h5ad")
    'my_cells_new'
    """
    stem = re.sub(r"\.(h5ad|h5|zarr)$", "", Path(query).name)
    return re.sub(r"[^A-Za-z0-9._-]+", "_", stem).strip("_.-")[:100] or "query"
