"""Geneformer's dictionaries: the token, the median expression and the other names of each gene.

They are distributed as pickles. Loading a pickle can execute any code, so only the globals that dictionaries of strings
and numbers need are allowed, and these are replaced by functions of this module instead of numpy's.
"""

import logging
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cell2text.contracts import GENES
from cell2text.errors import InputError

log = logging.getLogger("cell2text.encoders")

SPECIAL = ("pad", "mask", "cls", "eos")
# Where an official repository keeps its dictionaries, relative to the checkpoint's folder.
PLACES = (".", "..", "../geneformer", "../geneformer/gene_dictionaries_30m")
TOKENS, MEDIANS, MAPPING, NAMES = (
    "token_dictionary",
    "gene_median_dictionary",
    "ensembl_mapping_dict",
    "gene_name_id_dict",
)
SAME_SERIES = "Use the dictionaries of the checkpoint's own series: 30M for V1, 104M for V2"


class _NumberType:
    """Replaces a numpy dtype while a pickle is read; accepts only plain little-endian numbers."""

    def __init__(self, name: str, *_: Any):
        if not isinstance(name, str) or name not in {"i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f4", "f8"}:
            raise pickle.UnpicklingError(f"numbers of type {name!r}")
        self.name = name

    def __setstate__(self, state: tuple) -> None:
        if state[1] not in ("<", "|"):
            raise pickle.UnpicklingError(f"numbers of byte order {state[1]!r}")


def _number(dtype: _NumberType, data: bytes) -> int | float:
    if not isinstance(dtype, _NumberType) or not isinstance(data, bytes):
        raise pickle.UnpicklingError("numbers in an unknown format")
    return np.frombuffer(data, dtype=f"<{dtype.name}", count=1)[0].item()


class _Unpickler(pickle.Unpickler):
    """Reads dictionaries of strings and numbers, including numpy numbers, and refuses to call anything else."""

    allowed = {
        ("numpy", "dtype"): _NumberType,
        ("numpy.core.multiarray", "scalar"): _number,
        ("numpy._core.multiarray", "scalar"): _number,
    }

    def find_class(self, module: str, name: str) -> Any:
        """Return the replacement for a global that a pickle names."""
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return self.allowed[module, name]


def read_dictionary(path: str | Path) -> dict[str, str | int | float]:
    """Return the dictionary in a pickle.

    Raises
    ------
    InputError
        If the pickle is not a dictionary with strings as keys and strings or numbers as values.
    """
    try:
        with Path(path).open("rb") as file:
            read = _Unpickler(file).load()
    # a damaged or hostile pickle can raise any exception
    except Exception as error:
        raise InputError(
            path, f"not a dictionary of strings and numbers ({error})", "Fetch it again from its source"
        ) from error
    if not isinstance(read, dict) or not all(
        isinstance(key, str) and isinstance(value, str | int | float) for key, value in read.items()
    ):
        raise InputError(path, "not a dictionary of strings and numbers", "Fetch it again from its source")
    return read


@dataclass(frozen=True)
class GeneDictionaries:
    """The dictionaries of one series.

    Parameters
    ----------
    tokens
        Token of each Ensembl id and of the special tokens (``<pad>``, ``<mask>``, ...).
    medians
        Median of the non-zero counts per 10,000 of each Ensembl id, over the pretraining cells of the series.
    others
        Ensembl id by other ids and by symbols.
    """

    tokens: dict[str, int]
    medians: dict[str, float]
    others: dict[str, str]

    @property
    def special(self) -> dict[str, int | None]:
        """The special tokens by name; None if the series does not have one."""
        return {name: self.tokens.get(f"<{name}>") for name in SPECIAL}

    def table(self) -> pd.DataFrame:
        """Return ``contracts.GENES``: one row for each name that a file may use for a gene."""
        special = {f"<{name}>" for name in SPECIAL}
        genes = {gene: gene for gene in self.tokens if gene not in special}
        known = {name: gene for name, gene in sorted(self.others.items()) if gene in genes and name not in genes}
        symbol = {gene: name for name, gene in reversed(known.items()) if not name.startswith("ENS")}
        rows = [
            (self.tokens[gene], name, symbol.get(gene, gene), self.medians[gene], [])
            for name, gene in sorted((genes | known).items())
        ]
        return pd.DataFrame(rows, columns=list(GENES.columns))


def find_dictionaries(checkpoint: Path, vocabulary: int) -> GeneDictionaries:
    """Find the dictionaries of a checkpoint's series: those with the same number of tokens.

    Parameters
    ----------
    checkpoint
        Folder of an official repository, or one that holds the dictionaries itself.
    vocabulary
        Number of tokens of the checkpoint.

    Raises
    ------
    InputError
        If there are none, or they are inconsistent with the checkpoint or with each other.
    """
    found = {}
    for path in _token_files(checkpoint):
        tokens = read_dictionary(path)
        found[path.name] = len(tokens)
        if len(tokens) == vocabulary:
            return _read_series(path, tokens)
    listed = ", ".join(f"{name} has {number}" for name, number in found.items()) or "no token_dictionary*.pkl found"
    raise InputError(checkpoint, f"the checkpoint has {vocabulary} tokens, {listed}", SAME_SERIES)


def _token_files(checkpoint: Path) -> Iterator[Path]:
    for place in PLACES:
        yield from sorted((checkpoint / place).glob(f"{TOKENS}*.pkl"))


def _read_series(path: Path, tokens: dict[str, Any]) -> GeneDictionaries:
    series = path.name.removeprefix(TOKENS)
    parts = {part: path.with_name(f"{part}{series}") for part in (MEDIANS, MAPPING, NAMES)}
    if not parts[MEDIANS].is_file():
        raise InputError(parts[MEDIANS], "no such file", SAME_SERIES)
    read = {part: read_dictionary(file) if file.is_file() else {} for part, file in parts.items()}
    medians = read[MEDIANS]
    if sorted(tokens.values()) != list(range(len(tokens))) or not {"<pad>", "<mask>"} <= set(tokens):
        problem = "tokens are not numbered consecutively from 0, or <pad> or <mask> is missing"
        raise InputError(path, problem, SAME_SERIES)
    invalid = [gene for gene in tokens if gene.strip("<>") not in SPECIAL and not medians.get(gene, 0) > 0]
    if invalid:
        raise InputError(
            parts[MEDIANS], f"no positive median for {len(invalid)} genes, such as {invalid[0]}", SAME_SERIES
        )
    log.info("%s: %d tokens, %d other names", path.name, len(tokens), len(read[MAPPING] | read[NAMES]))
    return GeneDictionaries(tokens, medians, read[NAMES] | read[MAPPING])
