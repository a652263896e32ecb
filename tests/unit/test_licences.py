"""docs/licences.md lists all that is shipped or fetched, and no package has a licence beyond those that it allows."""

import re
import subprocess
from importlib.metadata import distribution
from pathlib import Path

import pandas as pd
import yaml

from cell2text.models.fetch_resource import ORTHOLOGUES, TEXT_SOURCES
from cell2text.ontology import MOUSE, ONTOLOGIES

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs/licences.md").read_text()
REQUIRED = re.findall(r"^([\w.-]+)==", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
# What metadata calls the licences of the second table, besides their SPDX ids.
ALSO_CALLED = {
    "Apache", "Apache 2.0", "Apache 2.0 License", "Apache License, Version 2.0", "Apache Software License", "BSD",
    "BSD 3-Clause License", "BSD License", "ISC License (ISCL)", "MIT License", "Mozilla Public License 2.0 (MPL 2.0)",
    "PSFL", "Public Domain", "Python Software Foundation License",
}  # fmt: skip
ONLY_IN_ITS_SOURCES = {"docutils": "GNU General Public License (GPL)"}


def without_version(source):
    """Return a source without version, revision, path and hash: licences do not change with these."""
    if source.startswith("census://"):
        return "census://"
    return re.split(r"==|@|#", source)[0]


def named_sources():
    schema = yaml.safe_load((ROOT / "workflow/schemas/config.schema.yaml").read_text())["properties"]
    values = [schema["language_model"]["properties"]["source"]["default"], ORTHOLOGUES, *TEXT_SOURCES.values()]
    values += [schema["pathways"]["properties"][key]["default"] for key in ("gene_sets", "descriptions")]
    for path in (ROOT / "config").glob("*.yaml"):
        config = yaml.safe_load(path.read_text())
        for section, keys in {"language_model": ["source"], "encoder": ["source"], "pathways": ["gene_sets"]}.items():
            values += [config[section][key] for key in keys if key in config.get(section, {})]
    for path in (ROOT / "config").glob("*.tsv"):
        sheet = pd.read_csv(path, sep="\t")
        values += [*sheet["source"], *sheet.get("label_table", pd.Series(dtype=str)).dropna()]
    return {without_version(value) for value in values}


def shipped_files():
    listed = subprocess.run(["git", "ls-files", "resources", "config/labels"], capture_output=True, text=True, cwd=ROOT)
    return set(listed.stdout.split())


def ontologies():
    code = "".join(path.read_text() for path in (ROOT / "workflow/scripts").rglob("*.py"))
    return {*ONTOLOGIES.values(), *MOUSE.values(), *re.findall(r"(?:ontology|live_terms)\(\"(\w+)\"", code)}


def test_all_that_is_shipped_or_fetched_has_a_licence():
    rows = [line.split("|")[1:-1] for line in DOCUMENT.splitlines() if line.startswith("| `")]
    licences = {name.strip(" `"): licence.strip() for name, _, _, licence in rows}
    assert {"EFO", "census://", "hf://ctheodoris/Geneformer", "config/labels/pbmc68k.tsv"} <= set(licences)
    assert set(licences) == named_sources() | shipped_files() | ontologies()
    assert all(
        re.fullmatch(r"MIT|BSD-2-Clause|Apache-2\.0|CC-BY-[34]\.0|Llama 3\.2 Community License", x)
        for x in licences.values()
    )


def stated_licences(package):
    """Return the licences in a package's metadata: SPDX ids, or classifiers, or a field, or the title of its file."""
    found = distribution(package)
    expression = found.metadata["License-Expression"]
    field = (found.metadata["License"] or "").strip().split("\n")[0]
    classifiers = [
        line.rpartition(" :: ")[2] for line in found.metadata.get_all("Classifier", []) if line.startswith("License")
    ]
    classifiers = [name for name in classifiers if name != "OSI Approved"]
    if expression or re.fullmatch(r"[\w.-]+( AND [\w.-]+)+", field):
        return set(re.split(r" AND | OR | WITH |[()]", expression or field)) - {"LLVM-exception", ""}
    if classifiers or field:
        return set(classifiers or [field])
    files = [file for file in found.files or [] if file.name.startswith("LICEN")]
    return {file.read_text().strip().split("\n")[0] for file in files}


def test_every_package_has_an_allowed_licence():
    rows = [
        line.split("|")[1] for line in DOCUMENT.split("## Python packages")[1].splitlines() if line.startswith("| ")
    ]
    allowed = set(re.findall(r"[A-Z0-9][\w.-]+", " ".join(rows))) | ALSO_CALLED
    assert "BSD-3-Clause" in allowed and not [name for name in allowed if "GPL" in name]
    stated = {package: stated_licences(package) - {ONLY_IN_ITS_SOURCES.get(package)} for package in REQUIRED}
    assert {package: found for package, found in stated.items() if not found or not found <= allowed} == {}
