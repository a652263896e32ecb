"""Gene vectors from coexpression: the principal axes of the training cells, with no download and no GPU.

A gene's vector is its row of the right singular vectors of the centred log-normalised counts; in a cell it
is scaled by the gene's expression. The sum over the cell's genes, less a constant, is then the cell's PCA
coordinates, so nothing that a linear model on principal components sees is lost.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse
from safetensors.numpy import load_file, save_file
from sklearn.decomposition import PCA

from cell2text.contracts import write_json
from cell2text.rank_lists import flatten, pad


class Coexpression:
    """Principal axes of training cells.

    Parameters
    ----------
    axes
        One row a gene, float32 (genes, dimensions).
    centre
        PCA coordinates of a cell without any counts, negated, float32 (dimensions,).
    """

    def __init__(self, axes: np.ndarray, centre: np.ndarray):
        self.axes, self.centre = axes, centre
        self.dimensions = axes.shape[1]

    @classmethod
    def fit(cls, cells: scipy.sparse.csr_matrix, settings: dict, seed: int) -> "Coexpression":
        """Find the principal axes of training cells (Lanczos iterations through scikit-learn, never dense).

        Parameters
        ----------
        cells
            log1p of counts per 10,000, float32 (cells, genes).
        settings
            ``dimensions``: how many axes; fewer are kept where there are too few cells or genes.
        seed
            Of the iterations' starting vector.
        """
        dimensions = min(settings["dimensions"], min(cells.shape) - 1)
        pca = PCA(dimensions, svd_solver="arpack", random_state=seed).fit(cells)
        axes = np.ascontiguousarray(pca.components_.T, dtype=np.float32)
        return cls(axes, (pca.mean_ @ pca.components_.T).astype(np.float32).ravel())

    def save(self, directory: Path) -> None:
        """Write the axes and the centre."""
        save_file({"axes": self.axes, "centre": self.centre}, directory / "coexpression.safetensors")
        write_json({"kind": "coexpression", "dimensions": self.dimensions}, directory / "encoder.json")

    @classmethod
    def load(cls, directory: Path) -> "Coexpression":
        """Read what :meth:`save` wrote."""
        tensors = load_file(directory / "coexpression.safetensors")
        return cls(tensors["axes"], tensors["centre"])

    def embed(self, ranked: pd.DataFrame, top_k: int) -> dict[str, np.ndarray]:
        """Return gene vectors of the ``top_k`` highest ranked genes and each cell's PCA coordinates.

        Parameters
        ----------
        ranked
            Rows of ``contracts.TOKENS``.
        top_k
            Gene vectors to keep a cell; shorter lists are padded with zeros behind.

        Returns
        -------
        dict
            ``gene_vectors`` float16 (cells, top_k, dimensions), ``lengths`` int32 (cells,),
            ``pooled`` float32 (cells, dimensions), which counts every expressed gene.
        """
        tokens, offsets = flatten(ranked["tokens"])
        expression, _ = flatten(ranked["expression"])
        cells = scipy.sparse.csr_matrix((expression, tokens, offsets), shape=(len(ranked), len(self.axes)))
        top_tokens, lengths = pad(tokens, offsets, top_k)
        top_expression, _ = pad(expression, offsets, top_k)
        return {
            "gene_vectors": (self.axes[top_tokens] * top_expression[:, :, None]).astype(np.float16),
            "lengths": lengths,
            "pooled": np.asarray(cells @ self.axes - self.centre, dtype=np.float32),
        }
