"""Clusters in words: a paragraph for a page, and a table for a TSV file."""

from collections.abc import Sequence

import pandas as pd

from cell2text.annotation.clusters import Cluster, TermShare


def paragraph(cluster: Cluster) -> str:
    """Return a cluster in plain English; the user's text in it is as it is in the file.

    Examples
    --------
    >>> paragraph(cluster)
    'Cluster 3 (412 cells): T cell (91% of the cells; the most frequent guess is naive T cell, 62%, then memory T cell,
    20%). Markers: IL7R, LTB. Programmes: ribosome and translation (80%). 3% of the cells are novel, that is, far from
    the training cells. The file's own label is "T cell" (97%).'
    """
    markers = f"Markers: {', '.join(cluster.markers)}." if cluster.markers else "No marker genes found."
    programmes = ", ".join(one.name + _in_brackets(cluster, one.share) for one in cluster.programmes)
    sentences = [
        _opening(cluster),
        markers,
        f"Programmes: {programmes}." if programmes else "",
        f"{_subject(cluster, cluster.novel)} novel, that is, far from the training cells." if cluster.novel else "",
        f"{_subject(cluster, cluster.flagged)} flagged by QC." if cluster.flagged else "",
        _own_label(cluster),
    ]
    return " ".join(filter(None, sentences))


def _opening(cluster: Cluster) -> str:
    name = cluster.name if cluster.name.isdecimal() else f'"{cluster.name}"'
    size = f"{cluster.cells:,} {'cell' if cluster.cells == 1 else 'cells'}"
    what, agreement = "cell type not determined", "too few cells agree"
    if cluster.reported:
        what, agreement = cluster.reported.name, f"{_percent(cluster.reported.share)} of the cells"
    evidence = "; ".join(filter(None, ["" if cluster.cells == 1 else agreement, _guesses(cluster)]))
    return f"Cluster {name} ({size}): {what}{f' ({evidence})' if evidence else ''}."


def _guesses(cluster: Cluster) -> str:
    """Return the most frequent guesses in words; empty if they add nothing."""
    guess, same = cluster.guess, bool(cluster.guess and cluster.reported and cluster.guess.id == cluster.reported.id)
    if not guess or (cluster.cells == 1 and same):
        return ""
    if cluster.cells == 1:
        return f"the guess is {guess.name}"
    first = "also the most frequent guess" if same else f"the most frequent guess is {guess.name}"
    second = f", then {cluster.runner_up.name}, {_percent(cluster.runner_up.share)}" if cluster.runner_up else ""
    return f"{first}, {_percent(guess.share)}{second}"


def _own_label(cluster: Cluster) -> str:
    own = cluster.own_label
    if not own:
        return ""
    label = f"{own.name} [{own.label}]" if own.name else f'"{own.label}"'
    first = "The file's own label" if own.share >= 0.5 else "The file's most frequent own label"
    conflict = ", which contradicts the reported cell type" if own.conflict else ""
    return f"{first} is {label}{_in_brackets(cluster, own.share)}{conflict}."


def _subject(cluster: Cluster, share: float) -> str:
    return "The cell is" if cluster.cells == 1 else f"{_percent(share)} of the cells are"


def _in_brackets(cluster: Cluster, share: float) -> str:
    return "" if cluster.cells == 1 else f" ({_percent(share)})"


def _percent(share: float) -> str:
    """Return a whole percentage; only all cells are 100%, and only none are 0%."""
    percent = round(100 * share)
    if percent == 0 and share > 0:
        return "<1%"
    return ">99%" if percent == 100 and share < 1 else f"{percent}%"


def clusters_table(clusters: Sequence[Cluster]) -> pd.DataFrame:
    """Return one row per cluster, for a TSV file; write it with ``spreadsheet.write_tsv``.

    Shares are from 0 to 1. ``markers`` are separated by ``, ``; ``programme_ids``, ``programmes`` and
    ``programme_shares`` by ``; ``, in the same order. ``conflict`` is missing where it cannot be judged.
    """
    return pd.DataFrame([_row(cluster) for cluster in clusters], columns=list(_COLUMNS)).astype(_COLUMNS)


_COLUMNS = {
    "cluster": object,
    "cells": "int64",
    "cell_type_id": object,
    "cell_type": object,
    "agreement": "float64",
    "guess_id": object,
    "guess": object,
    "guess_share": "float64",
    "runner_up_id": object,
    "runner_up": object,
    "runner_up_share": "float64",
    "markers": object,
    "programme_ids": object,
    "programmes": object,
    "programme_shares": object,
    "novel_share": "float64",
    "flagged_share": "float64",
    "own_label": object,
    "own_label_name": object,
    "own_label_share": "float64",
    "conflict": "boolean",
    "text": object,
}


def _row(cluster: Cluster) -> dict[str, object]:
    own = cluster.own_label
    return {
        "cluster": cluster.name,
        "cells": cluster.cells,
        **_term("cell_type", cluster.reported, "agreement"),
        **_term("guess", cluster.guess, "guess_share"),
        **_term("runner_up", cluster.runner_up, "runner_up_share"),
        "markers": ", ".join(cluster.markers),
        "programme_ids": "; ".join(one.id for one in cluster.programmes),
        "programmes": "; ".join(one.name for one in cluster.programmes),
        "programme_shares": "; ".join(f"{one.share:.3f}" for one in cluster.programmes),
        "novel_share": cluster.novel,
        "flagged_share": cluster.flagged,
        "own_label": own.label if own else None,
        "own_label_name": own.name if own else None,
        "own_label_share": own.share if own else None,
        "conflict": own.conflict if own else None,
        "text": paragraph(cluster),
    }


def _term(column: str, term: TermShare | None, share: str) -> dict[str, object]:
    return {
        f"{column}_id": term.id if term else None,
        column: term.name if term else None,
        share: term.share if term else None,
    }
