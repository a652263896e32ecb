"""Gene vectors from texts about the genes, so that a model can read genes that no training study measures.

The text of a gene becomes the TF-IDF weights of its words, and these a vector by truncated SVD. The pooled vector of a
cell is the mean of the vectors of its genes, weighted by log-normalised counts, less what is typical of its gene panel,
divided by the spread of the training cells. GenePT is the same with a language model's vectors of longer texts.

A gene that a study does not measure, or that has no text, is missing, not zero:

- What is typical of a panel is the mean of the vectors of its genes, weighted by their mean expression over training
  cells. For genes that no training study measures, mean expression is predicted from their texts by ridge regression.
- Counts per 10,000 are those that the cell would have if all genes of the training studies were measured.
"""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors.numpy import save_file
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import Ridge
from sklearn.model_selection import KFold, cross_val_predict

from cell2text.contracts import GENE_TEXTS, GENES, UNSEEN
from cell2text.embedding.axes import find_profile, scale_to_all_genes
from cell2text.embedding.ranked_cells import SCALE, RankedCells, RankedSplit, scale_vectors
from cell2text.errors import InputError
from cell2text.files import read_json, write_json
from cell2text.progress import Progress
from cell2text.settings import EncoderSettings
from cell2text.weights import read_weights

log = logging.getLogger("cell2text.encoders")

DIMENSIONS = 128
WORDS = r"[A-Za-z0-9][A-Za-z0-9-]+"
MIN_COVERED = 0.5  # of the counts of each study, in genes with a text
FOLDS = 5  # of genes, for how well texts predict mean expression
FIX = "Add sources to encoder.texts, or use encoder.kind: coexpression"


class GeneText:
    """Vectors of the texts about genes, of the training studies and others.

    Parameters
    ----------
    vectors
        Vector of each gene's text, zero without text, float32 (genes, dimensions).
    mean
        Mean expression of each gene over the training cells whose study measures it, or a prediction, float32 (genes,).
    profile
        Share of each gene in the counts of an average training cell, or its prediction, float32 (genes,).
    shift, scale
        Mean and standard deviation over the training cells of their mean vectors less those of their panels, float32
        (dimensions,).
    unseen
        Rows of ``contracts.GENES`` of the genes that no training study measures; their tokens are the last.
    facts
        Coverage and control of the fit, for ``encoder.json``.
    """

    def __init__(
        self,
        vectors: np.ndarray,
        mean: np.ndarray,
        profile: np.ndarray,
        shift: np.ndarray,
        scale: np.ndarray,
        unseen: pd.DataFrame | None = None,
        facts: dict[str, Any] | None = None,
    ):
        self.vectors, self.mean, self.profile, self.shift, self.scale = vectors, mean, profile, shift, scale
        self.described = vectors.any(axis=1)
        self.unseen = pd.DataFrame(columns=list(GENES.columns)) if unseen is None else unseen
        self.facts = facts or {}
        self.dimensions = self.pooled_dimensions = vectors.shape[1]

    @classmethod
    def fit(
        cls,
        train: RankedSplit,
        validation: RankedSplit,
        settings: EncoderSettings,
        seed: int,
        checkpoints: Path,
        fetched: Path | None = None,
        programmes: np.ndarray | None = None,
    ) -> "GeneText":
        """Turn texts into vectors, and find the mean and spread of training cells, in three passes over them.

        Parameters
        ----------
        train
            Cells that say what is typical.
        validation, settings, checkpoints, programmes
            Not used.
        seed
            Seed of the truncated SVD, and of the control with permuted texts.
        fetched
            File of ``contracts.GENE_TEXTS``: the genes of ``train`` by token, and any others after them.

        Raises
        ------
        InputError
            If less than ``MIN_COVERED`` of a study's counts are in genes with a text, or texts have no words in common.
        """
        genes = GENE_TEXTS.read(fetched)
        texts, own = genes["text"].to_numpy(dtype=object), train.genes
        profile = find_profile(train)
        coverage = measure_coverage(train, texts[:own] != "")
        vectors = embed_texts(texts, own, seed, fetched)
        mean = _mean_expression(train, profile)
        known = np.flatnonzero(vectors[:own].any(axis=1) & train.measured.any(axis=0))
        facts = _check_prediction(vectors[known], mean[known], seed) | {"coverage": coverage}
        facts |= {"genes": own, "without_text": int((texts[:own] == "").sum()), "other_genes": len(texts) - own}
        log.info("%(without_text)d of %(genes)d genes have no text; %(other_genes)d others have one", facts)
        mean, profile = (np.concatenate([values, np.zeros(len(texts) - own)]) for values in (mean, profile))
        if own < len(texts):
            mean[own:] = np.maximum(Ridge().fit(vectors[known], mean[known]).predict(vectors[own:]), 0)
            profile[own:] = np.expm1(mean[own:]) / SCALE
        parts = [values.astype(np.float32) for values in (vectors, mean, profile)]
        dimensions = vectors.shape[1]
        raw = cls(*parts, np.zeros(dimensions, np.float32), np.ones(dimensions, np.float32))
        count, total, squares = 0, np.zeros(dimensions), np.zeros(dimensions)
        for part in train:
            values = raw.embed(part, 0)["pooled"].astype(float)
            count, total, squares = count + len(part), total + values.sum(axis=0), squares + (values**2).sum(axis=0)
        shift = total / count
        spread = np.sqrt(np.maximum(squares / count - shift**2, 0))
        if not spread.any():
            raise InputError(train.corpus, "all training cells have the same expression", "Add cells")
        scale = np.where(spread > 0, spread, 1)  # a dimension without spread is 0 in all cells
        return cls(*parts, shift.astype(np.float32), scale.astype(np.float32), genes[list(GENES.columns)][own:], facts)

    def save(self, directory: Path) -> None:
        """Write the vectors, the genes beyond those of the training studies, and the facts."""
        names = ("vectors", "mean", "profile", "shift", "scale")
        save_file({name: getattr(self, name) for name in names}, directory / "gene_text.safetensors")
        GENES.write(self.unseen, directory / UNSEEN)
        write_json({"kind": "gene_text", "dimensions": self.dimensions, **self.facts}, directory / "encoder.json")

    @classmethod
    def load(cls, directory: Path) -> "GeneText":
        """Load an encoder written by :meth:`save`.

        Raises
        ------
        InputError
            If a file is damaged, or its tensors do not fit together.
        """
        file, fix = directory / "gene_text.safetensors", f"Delete {directory} and run the workflow again"
        tensors = read_weights(file, fix, "numpy")
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        genes, dimensions = (*shapes.get("vectors", ()), None, None)[:2]
        expected = {"vectors": (genes, dimensions), "mean": (genes,), "profile": (genes,)}
        if shapes != expected | dict.fromkeys(("shift", "scale"), (dimensions,)):
            raise InputError(file, f"not vectors with mean, profile, shift and scale: found {shapes}", fix)
        return cls(**tensors, unseen=GENES.read(directory / UNSEEN), facts=read_json(directory / "encoder.json", fix))

    def embed(self, cells: RankedCells, top_k: int, progress: Progress | None = None) -> dict[str, np.ndarray]:
        """Return gene vectors of the ``top_k`` highest ranked genes, scaled by expression, and each cell's mean vector.

        Parameters
        ----------
        cells
            Ranked genes of the cells.
        top_k
            Gene vectors per cell; cells with fewer genes are padded with zeros.
        progress
            Advanced once, by all cells.

        Returns
        -------
        dict
            ``gene_vectors`` float16 (cells, top_k, dimensions), ``lengths`` int32 (cells,),
            ``pooled`` float32 (cells, dimensions), 0 for a cell without counts in genes with a text.
        """
        expression = self._expression(cells)
        weights = self._weights(cells, expression)
        pooled = weights @ self._vectors(cells) - np.asarray(weights.sum(axis=1)) * self._centres(cells)
        if progress:
            progress.advance(len(cells))
        pooled = np.asarray(pooled / self.scale, dtype=np.float32)
        return scale_vectors(cells, expression, self.vectors, top_k) | {"pooled": pooled}

    def share_out(self, cells: RankedCells, gradients: np.ndarray) -> np.ndarray:
        """Return what each ranked gene adds to the pooled vector, multiplied by a gradient with respect to that vector.

        A gene adds its weight times the difference between its vector and what is typical of the panel. The values of a
        cell sum to the product of the gradient with the pooled vector.

        Parameters
        ----------
        cells
            Ranked genes of the cells.
        gradients
            One gradient per cell, float (cells, dimensions).

        Returns
        -------
        numpy.ndarray
            float64 (total genes,), in the order of ``cells.tokens``. All genes are in memory for each cell meanwhile.
        """
        gradients = gradients / self.scale.astype(float)
        by_gene = gradients @ self._vectors(cells).T - (gradients * self._centres(cells)).sum(axis=1, keepdims=True)
        return self._weights(cells, self._expression(cells)).data * by_gene[cells.cell, cells.tokens]

    def _vectors(self, cells: RankedCells) -> np.ndarray:
        """Return the vectors of the genes of the cells' vocabulary, float64 (genes, dimensions)."""
        return self.vectors[: cells.panels.shape[1]].astype(float)

    def _expression(self, cells: RankedCells) -> np.ndarray:
        return scale_to_all_genes(cells, self.profile[: cells.panels.shape[1]])

    def _weights(self, cells: RankedCells, expression: np.ndarray) -> Any:
        """Return weights of the genes that sum to 1 in each cell, or to 0 in one without described genes; sparse."""
        weights = np.where(self.described[cells.tokens], expression, 0).astype(float)
        total = np.bincount(cells.cell, weights, minlength=len(cells))
        return cells.matrix(weights / np.where(total > 0, total, 1)[cells.cell])

    def _centres(self, cells: RankedCells) -> np.ndarray:
        """Return what is typical of each cell's panel, float64 (cells, dimensions)."""
        genes = cells.panels.shape[1]
        usual = cells.panels * np.where(self.described, self.mean, 0)[:genes].astype(float)
        total = usual.sum(axis=1, keepdims=True)
        return (usual @ self._vectors(cells) / np.where(total > 0, total, 1) + self.shift)[cells.panel]


def embed_texts(texts: np.ndarray, own: int, seed: int, where: object = "encoder.texts") -> np.ndarray:
    """Return a vector for each text by TF-IDF and truncated SVD, float64 (texts, dimensions); zeros for an empty text.

    Words and dimensions come from the first ``own`` texts, in an order that does not depend on that of the genes.

    Parameters
    ----------
    texts
        One text per gene, str (genes,).
    own
        Number of genes of the training studies, which come first.
    seed
        Seed of the truncated SVD.
    where
        File of the texts, for messages.

    Raises
    ------
    InputError
        If there are fewer than three texts, or no word is in two of them.
    """
    fitted = np.sort(texts[:own][texts[:own] != ""])
    words = TfidfVectorizer(token_pattern=WORDS, stop_words="english", sublinear_tf=True, min_df=2)
    try:
        weights = words.fit_transform(fitted)
    except ValueError:  # no word is left
        weights = np.empty((0, 0))
    dimensions = min(DIMENSIONS, *(size - 1 for size in weights.shape))
    if dimensions < 1:
        raise InputError(where, "the texts of the genes have hardly a word in common", FIX)
    axes = TruncatedSVD(dimensions, random_state=seed).fit(weights)
    return axes.transform(words.transform(texts))


def measure_coverage(cells: RankedSplit, described: np.ndarray) -> dict[str, float]:
    """Return and log the share of the counts of each study that are in genes with a text.

    Parameters
    ----------
    cells
        Cells of the studies.
    described
        Which genes have a text, by token, bool (genes,).

    Raises
    ------
    InputError
        If it is less than ``MIN_COVERED`` in a study.
    """
    found = {}
    for number, file in enumerate(cells.files):
        total = covered = 0.0
        for part in cells.of_file(number):
            counts = np.expm1(part.expression.astype(float)) * part.n_counts[part.cell]
            total, covered = total + counts.sum(), covered + counts[described[part.tokens]].sum()
        if total:
            study = Path(file).stem
            found[study] = covered / total
            log.info("%s: %.1f%% of the counts are in genes with a text", study, 100 * found[study])
            if found[study] < MIN_COVERED:
                problem = f"only {found[study]:.1%} of the counts of {study} are in genes with a text"
                raise InputError("config: encoder.texts", problem, FIX)
    return found


def _mean_expression(cells: RankedSplit, profile: np.ndarray) -> np.ndarray:
    """Return the mean expression of each gene over the cells whose study measures it, float64 (genes,)."""
    sums, measuring = np.zeros(cells.genes), np.zeros(cells.genes)
    for part in cells:
        sums += np.bincount(part.tokens, scale_to_all_genes(part, profile), minlength=cells.genes)
        measuring += np.bincount(part.panel, minlength=len(part.panels)) @ part.panels
    return sums / np.maximum(measuring, 1)


def _check_prediction(vectors: np.ndarray, mean: np.ndarray, seed: int) -> dict[str, float]:
    """Return and log how well texts predict the mean expression of other genes, and texts permuted over the genes."""
    if len(vectors) < 2 * FOLDS:
        return {}
    folds = KFold(FOLDS, shuffle=True, random_state=seed)
    permuted = np.random.default_rng(seed).permutation(vectors)
    own, control = (
        float(np.corrcoef(cross_val_predict(Ridge(), values, mean, cv=folds), mean)[0, 1])
        for values in (vectors, permuted)
    )
    log.info("texts predict mean expression of other genes: correlation %.2f, permuted texts %.2f", own, control)
    return {"correlation": own, "correlation_permuted": control}
