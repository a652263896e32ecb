"""Checks of the configuration and of the sheet of datasets before any rule runs."""

import json
import math
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator, ValidationError

from cell2text.errors import InputError
from cell2text.models.fetch_resource import TEXT_SOURCES
from cell2text.tables import read_table

CENSUS = "census://"  # prefix of sources in CELLxGENE Census
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
# Keys whose values are files of the user; null or a word such as `donors` if there is none.
FILES = ("genes.table", "genes.orthologues", "split", "pathways.gene_sets", "pathways.descriptions")
SOURCES = ("source", "label_table", "cell_table")  # columns of the sheet with files
CENSUS_COLUMNS = {"dataset", "source", "notes", "min_genes", "min_counts", "max_mitochondrial_percent"}
# A user name, password or token in a URL: before the host, or in a query. No source has either.
SECRET = re.compile(r"://[^/]*@|://.*\?")


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
        If a key is unknown, a value is invalid, holds a secret or has no effect, or the shares of the splits do not sum
        to 1.
    """
    schema = yaml.safe_load(schema_file.read_text())
    _refuse_secrets(config, where)
    filled = _fill_defaults(config, schema)
    _check(filled, schema, where, "config/README.md lists the keys and their values")
    for key, value in _flatten(filled):
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{where}: {key}", f"{value} is not a finite number", "Write a number")
    check_name(filled["run"], f"{where}: run")
    check_name(filled["language_model"]["name"], f"{where}: language_model.name")
    if filled["encoder"]["kind"] == "geneformer":  # the last part of its source names the folder of the fetched model
        check_name(filled["encoder"]["source"].rstrip("/").rpartition("/")[2], f"{where}: encoder.source")
    for source in filled["encoder"]["texts"]:
        if source not in TEXT_SOURCES and not source.endswith((".tsv", ".gmt")):
            raise InputError(
                f"{where}: encoder.texts",
                f"unknown source {source}",
                f"Write {', '.join(TEXT_SOURCES)}, or the path of a table (.tsv) or of gene sets (.gmt)",
            )
    if abs(sum(filled["split_shares"].values()) - 1) > 1e-9:
        raise InputError(f"{where}: split_shares", "the three shares do not sum to 1", "Make them sum to 1")
    _refuse_unused(filled, schema, where)
    return filled


def _refuse_secrets(values: dict[str, Any], where: str | Path) -> None:
    """Raise an error that does not repeat the value if one is a URL with a user name, password or token."""
    for key, value in _flatten(values):
        if isinstance(value, str) and SECRET.search(value):
            raise InputError(
                f"{where}: {key}",
                "a user name, password or token in a source would be written to logs and results",
                "Remove it; for a gated model set HF_TOKEN in the environment",
            )


def _refuse_unused(config: dict[str, Any], schema: dict[str, Any], where: str | Path) -> None:
    """Raise an error if a key that other settings make ineffective (``only_with`` in the schema) was changed."""
    for section, entry in schema["properties"].items():
        for key, rule in entry.get("properties", {}).items():
            for other, values in rule.get("only_with", {}).items():
                found, value = config[section][key], config[section][other]
                if found != rule["default"] and value not in values:
                    raise InputError(
                        f"{where}: {section}.{key}",
                        f"{json.dumps(found)} has no effect with {section}.{other}: {json.dumps(value)}",
                        f"Remove it, or set {section}.{other} to {' or '.join(map(json.dumps, values))}",
                    )


def check_name(name: str, where: str) -> None:
    """Check a name that becomes a part of a path: no name may lead out of its folder, as ``..`` would.

    Raises
    ------
    InputError
        If the name has other characters than letters, digits, ``.``, ``_`` and ``-``, or begins with one of the last
        three, or is longer than 100 characters.
    """
    if not NAME.fullmatch(name):
        raise InputError(
            where,
            f"{name!r} cannot be the name of a file or folder",
            "Use at most 100 letters, digits and . _ -, with a letter or digit at the start",
        )


def check_files(config: dict[str, Any], where: str | Path) -> None:
    """Check with :func:`check_file` the files that a configuration names.

    Parameters
    ----------
    config
        As :func:`check_config` returns it.
    where
        The file of the configuration, for messages.

    Raises
    ------
    InputError
        If one does not exist.
    """
    values = dict(_flatten(config))
    for source in config["encoder"]["texts"]:
        if source not in TEXT_SOURCES:
            check_file(source, f"{where}: encoder.texts")
    for key in FILES:
        value = values.get(key)
        if value and "://" not in value and (key != "split" or value.endswith(".tsv")):
            check_file(value, f"{where}: {key}")


def check_file(path: str, where: str) -> None:
    """Check that a file or folder exists and that Snakemake does not read its name as a pattern.

    Raises
    ------
    InputError
        If it does not.
    """
    if re.search(r"[{}]", path):
        raise InputError(where, f"Snakemake reads the braces in {path} as a wildcard", "Rename the file")
    if not Path(path).exists():
        raise InputError(where, f"no such file: {path}", "Correct the path")


def _flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted name and the value of each key; those of a list have a number."""
    for key, value in values.items():
        if isinstance(value, list):
            value = dict(enumerate(value))
        yield f"{prefix}{key}", value
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")


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
        _refuse_secrets({column: row[column] for column in SOURCES if column in row}, where)
        _check(row, schema, where, "config/README.md lists the columns")
        check_name(row["dataset"], f"{where}: dataset")
        if row["dataset"].lower() in map(str.lower, rows):  # some file systems ignore case
            raise InputError(f"{where}: dataset", f"{row['dataset']} repeats", "Give each dataset a unique id")
        for column in SOURCES:
            if column in row and "://" not in row[column]:
                check_file(row[column], f"{where}: {column}")
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
    errors = sorted(Draft202012Validator(schema).iter_errors(values), key=lambda error: list(map(str, error.path)))
    if errors:
        raise InputError(where, "; ".join(map(_describe, errors)), fix)


def _describe(error: ValidationError) -> str:
    """Return the key and what is wrong with its value, and for values that YAML reads differently what to write."""
    key, value, wanted = ".".join(map(str, error.path)) or "keys", error.instance, error.validator_value
    if error.validator != "type":
        return f"{key}: {error.message}"
    if wanted == "object" and value is None:
        return f"{key}: the section is empty: write its keys below it, or delete the line"
    if isinstance(value, str) and {"number", "integer"} & {*([wanted] if isinstance(wanted, str) else wanted)}:
        with suppress(ValueError):
            number = float(value)
            if isinstance(yaml.safe_load(value), int | float):
                # Snakemake passes the numbers within a value of --config as text
                return (
                    f"{key}: {value} is quoted, or nested in a value of --config: write the number into a config file"
                )
            return f"{key}: YAML reads {value} as text: write {number:f}".rstrip("0")
    if wanted == "string" and isinstance(value, int | float):
        return f"{key}: YAML reads this as the number {value}: put the value in quotes"
    return f"{key}: {error.message}"


def _fill_defaults(values: Any, schema: dict[str, Any]) -> Any:
    """Return the values with defaults, keys in the schema's order: Snakemake takes another order for a change."""
    if not isinstance(values, dict):
        return values
    known, others = schema.get("properties", {}), schema.get("additionalProperties", {}) or {}
    defaults = {key: entry["default"] for key, entry in known.items() if "default" in entry}
    given = defaults | values
    order = [key for key in known if key in given] + sorted(given.keys() - known.keys(), key=str)
    return {key: _fill_defaults(given[key], known.get(key, others)) for key in order}
