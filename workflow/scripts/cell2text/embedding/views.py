"""Cells as other experiments would have seen them: through a random gene panel and at reduced depth.

A model that is trained on such views as well can read studies with other gene panels and other depths.
"""

from dataclasses import replace

import numpy as np

from cell2text.embedding.ranked_cells import SCALE, RankedCells

SMALLEST_PANEL = 0.02  # share of the measured genes; panels are drawn evenly on a logarithmic scale up to all genes
LEAST_DEPTH = 0.1  # share of a cell's counts; drawn evenly up to all counts
PANEL_CELLS = 64  # neighbouring cells share a panel, so that panels take little memory
LEAST_GENES = 20  # a cell with fewer genes in a view is seen as it is


def draw_view(cells: RankedCells, median: np.ndarray, seed: list[int]) -> RankedCells:
    """Return the cells seen through random gene panels at random depth, with their genes ranked again.

    Counts are thinned binomially, which is exact for molecules that are sampled independently.

    Parameters
    ----------
    cells
        Cells with all measured genes.
    median
        Median of the non-zero counts per 10,000 of each token, (genes,); genes are ranked by their share of the
        counts divided by it.
    seed
        Numbers that seed the draw. The same cells and seed give the same view.
    """
    random = np.random.default_rng(seed)
    blocks = np.arange(len(cells)) // PANEL_CELLS
    shares = np.exp(random.uniform(np.log(SMALLEST_PANEL), 0, blocks.max(initial=-1) + 1))
    panels = random.random((len(shares), len(median)), dtype=np.float32) < shares[:, None]
    depth = random.uniform(LEAST_DEPTH, 1, len(cells))
    cell = np.repeat(np.arange(len(cells)), cells.lengths)
    counts = np.rint(np.expm1(cells.expression.astype(float)) / SCALE * cells.n_counts[cell]).astype(np.int64)
    seen = random.binomial(counts, depth[cell]) * panels[blocks[cell], cells.tokens]
    whole = np.bincount(cell[seen > 0], minlength=len(cells)) < LEAST_GENES
    seen[whole[cell]] = counts[whole[cell]]
    kept = seen > 0
    cell, tokens, seen = cell[kept], cells.tokens[kept], seen[kept]
    total = np.bincount(cell, seen, minlength=len(cells))
    total[whole] = cells.n_counts[whole]
    order = np.lexsort((tokens, -(seen / median[tokens]), cell))
    expression = np.log1p(seen / total[cell] * SCALE).astype(np.float32)
    pairs, panel = np.unique(np.column_stack([cells.panel, np.where(whole, -1, blocks)]), axis=0, return_inverse=True)
    return replace(
        cells,
        tokens=tokens[order],
        expression=expression[order],
        offsets=np.concatenate([[0], np.cumsum(np.bincount(cell, minlength=len(cells)))]),
        n_counts=total,
        panels=cells.panels[pairs[:, 0]] & (panels[pairs[:, 1]] | (pairs[:, 1:] < 0)),
        panel=panel.ravel(),
    )
