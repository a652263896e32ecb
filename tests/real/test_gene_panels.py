"""Real cells of which only some genes are measured are placed almost as well as with all genes."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression

from cell2text.cells.h5ad import write_cells
from cell2text.embedding.axes import find_axes
from cell2text.embedding.measure_genes import measure_genes
from cell2text.embedding.rank_genes import rank_genes
from cell2text.embedding.ranked_cells import RankedSplit, read_measured, read_medians
from cell2text.embedding.views import draw_view
from ranked_files import write_corpus


@pytest.fixture(scope="module")
def placed(request, tmp_path_factory):
    """Coordinates of test cells of pbmc3k with all genes, on panels of 2,000 and 500, and with zeros for all others.

    And two classifiers: fitted on the training cells alone, and on them and their views.
    """
    source = request.config.rootpath.parent / "shared/data/studies/pbmc3k.h5ad"
    if not source.exists():
        pytest.skip(f"{source} does not exist")
    folder, rng, whole = tmp_path_factory.mktemp("pbmc3k"), np.random.default_rng(0), ad.read_h5ad(source)
    counts = sparse.csr_matrix(whole.X, dtype=np.float32)
    train = rng.random(len(whole)) < 0.7
    genes = {f"panel{size}": rng.choice(whole.n_vars, size, replace=False) for size in (2000, 500)}
    genes = {"train": slice(None), "full": slice(None)} | genes
    ids, types, splits = [], [], []
    for name, columns in genes.items():
        rows = train if name == "train" else ~train
        own, names = counts[rows][:, columns], whole.var_names[columns]
        cells = [f"{name}|{barcode}" for barcode in whole.obs_names[rows]]
        var = pd.DataFrame({"symbol": names.to_numpy()}, index=pd.Index(names, name="gene_id"))
        write_cells(folder / f"{name}.h5ad", [own], [cells], pd.DataFrame(index=cells), var, {})
        ids, types = ids + cells, types + whole.obs["cell_type"][rows].astype(str).to_list()
        splits += ["train" if name == "train" else "test"] * len(cells)
    corpus = write_corpus(folder / "corpus.parquet", ids, splits, types)
    measure_genes(corpus, [folder / f"{name}.h5ad" for name in genes], folder / "genes.parquet")
    tokens = [folder / f"tokens/{name}.parquet" for name in genes]
    for path in tokens:
        rank_genes(corpus, folder / f"{path.stem}.h5ad", folder / "genes.parquet", path)
    measured = read_measured(folder / "genes.parquet", tokens)
    training, test = (RankedSplit(tokens, corpus, split, measured) for split in ("train", "test"))
    axes = find_axes(training, 30, 0)
    types = pd.Series(types, index=ids)

    def place(parts):
        parts = list(parts)
        return np.concatenate([axes.place(part) for part in parts]), types[[i for part in parts for i in part.cell_ids]]

    median = read_medians(folder / "genes.parquet")
    views = [draw_view(part, median, [view, number]) for number, part in enumerate(training) for view in range(4)]
    models = {
        "once": LogisticRegression(max_iter=5000).fit(*place(training)),
        "views": LogisticRegression(max_iter=5000).fit(*place([*training, *views])),
    }
    found = {name: place(test.of_file(number)) for number, name in enumerate(genes) if name != "train"}
    zeros = RankedSplit(tokens, corpus, "test", np.ones_like(measured))
    labels = whole.obs["cell_type"].astype(str).to_numpy()
    refitted = {name: refit(counts[:, columns].toarray(), labels, train) for name, columns in genes.items()}
    return found | {"zeros": place(zeros.of_file(2))}, models, refitted


def refit(counts, types, train):
    """Return the accuracy of a logistic regression on principal components of the genes of a panel alone."""
    logs = np.log1p(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1) * 1e4)
    fitted = PCA(30, random_state=0).fit(logs[train])
    model = LogisticRegression(max_iter=5000).fit(fitted.transform(logs[train]), types[train])
    return model.score(fitted.transform(logs[~train]), types[~train])


def test_a_panel_of_2000_genes_is_almost_as_good_as_all(placed):
    found, models, refitted = placed
    once, views = ({name: model.score(*cells) for name, cells in found.items()} for model in models.values())
    assert once["full"] > 0.92 and views["full"] > 0.92
    for accuracy in (once, views):
        assert accuracy["full"] > accuracy["panel2000"] > accuracy["zeros"] + 0.3
    # training cells seen through random panels: one model is as good as one refitted for 2,000 genes
    assert views["panel2000"] > refitted["panel2000"] - 0.01 and views["panel2000"] > views["full"] - 0.1
    assert views["panel500"] > once["panel500"] + 0.1


def test_coordinates_on_a_panel_are_closer_to_those_of_all_genes_than_with_zeros(placed):
    full = placed[0]["full"][0]
    spread = np.linalg.norm(full - full.mean(axis=0), axis=1).mean()
    away = {name: np.linalg.norm(cells - full, axis=1).mean() / spread for name, (cells, _) in placed[0].items()}
    assert away["panel2000"] < 0.75 and away["panel2000"] < away["panel500"] < 1 and away["zeros"] > 1.5
