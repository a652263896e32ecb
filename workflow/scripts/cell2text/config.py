"""Checks of the configuration and of the sheet of datasets before any rule runs."""

from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator

from cell2text.errors import InputError
from cell2text.tables import read_table

CENSUS = "census://"  # prefix of sources in CELLxGENE Census
CENSUS_COLUMNS = {"dataset", "source", "notes", "min_genes", "min_counts", "max_mitochondrial_percent"}


def check_config(config: dict[str, Any], schema_file: Path, where: str | Path) -> dict[str, Any]:
    """Return a configuration with the schema's defaults filled in.

    Parameters
    ----------
    config
        The merged configuration.
    schema_file
        JSON schema, as YAML.
    where
        The file of the configuration, for messages.

    Raises
    ------
    InputError
        If a key is unknown, a value is invalid, or the shares of the splits do not sum to 1.
    """
    schema = yaml.safe_load(schema_file.read_text())
    filled = _fill_defaults(config, schema)
    _check(filled, schema, where, "config/README.md lists the keys and their values")
    if abs(sum(filled["split_shares"].values()) - 1) > 1e-9:
        raise InputError(f"{where}: split_shares", "the three shares do not sum to 1", "Make them sum to 1")
    return filled


def read_datasets(sheet: str | Path, schema_file: Path) -> dict[str, dict[str, str]]:
    """Return the rows of the sheet of datasets by dataset id, without empty fields.

    Raises
    ------
    InputError
        If the sheet or a file it names is missing, a column is unknown, or a dataset repeats.
    """
    if not Path(sheet).is_file():
        raise InputError(sheet, "no such file", "Set `datasets` in the config to a sheet of datasets")
    schema = yaml.safe_load(schema_file.read_text())
    table = read_table(sheet, set(schema["properties"]), row_names="never", without_hash={"dataset"})
    rows: dict[str, dict[str, str]] = {}
    for number, record in table.to_dict("index").items():
        row = {column: value for column, value in record.items() if value}
        where = f"{sheet} line {number}"
        _check(row, schema, where, "config/README.md lists the columns")
        if row["dataset"] in rows:
            raise InputError(f"{where}: dataset", f"{row['dataset']} repeats", "Give each dataset a unique id")
        for column in ("source", "label_table", "cell_table"):
            if column in row and "://" not in row[column] and not Path(row[column]).exists():
                raise InputError(f"{where}: {column}", f"no such file: {row[column]}", "Correct the path")
        rows[row["dataset"]] = row
    if not rows:
        raise InputError(sheet, "no datasets", "Add a row for each study")
    return rows


def cut_census(rows: dict[str, dict[str, str]], shards: int) -> dict[str, list[str]]:
    """Return the names of the shards of each row whose source is the Census.

    Each shard, ``{dataset}-{shard}``, is a dataset of its own in all later stages.

    Parameters
    ----------
    rows
        Output of ``read_datasets``.
    shards
        Number of shards of each Census source.

    Raises
    ------
    InputError
        If a Census row has a column that does not apply to it, or a name is taken.
    """
    pieces = {}
    for name, row in rows.items():
        if not row["source"].startswith(CENSUS):
            continue
        surplus = sorted(set(row) - CENSUS_COLUMNS)
        if surplus:
            where = f"datasets sheet: {', '.join(surplus)} of {name}"
            raise InputError(where, "the Census brings its own labels", "Leave this field empty")
        pieces[name] = [f"{name}-{shard}" for shard in range(shards)]
        taken = sorted(set(pieces[name]) & set(rows))
        if taken:
            raise InputError(
                f"datasets sheet: dataset {taken[0]}", f"a shard of {name} has this name", "Rename one of them"
            )
    return pieces


def _check(values: dict[str, Any], schema: dict[str, Any], where: str | Path, fix: str) -> None:
    errors = sorted(Draft202012Validator(schema).iter_errors(values), key=lambda error: list(error.path))
    if errors:
        problems = "; ".join(f"{'.'.join(map(str, error.path)) or 'keys'}: {error.message}" for error in errors)
        raise InputError(where, problems, fix)


def _fill_defaults(values: Any, schema: dict[str, Any]) -> Any:
    if not isinstance(values, dict) or "properties" not in schema:
        return values
    filled = dict(values)
    for key, entry in schema["properties"].items():
        if "default" in entry:
            filled.setdefault(key, entry["default"])
        if key in filled:
            filled[key] = _fill_defaults(filled[key], entry)
    return filled
