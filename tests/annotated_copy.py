"""Whether every cell of a file comes back in its place in an annotated copy, and the rest of the file unchanged."""

import anndata as ad
import h5py
import numpy as np
import pandas as pd

from cell2text.annotation.annotate_query import add_columns
from cell2text.annotation.fetch_query import fetch_query

ADDED = "cell2text_number"


def annotate_copy(source, folder, **row):
    """Number the cells of a study as annotation does, and return its counts and the obs of the annotated copy."""
    fetch_query({"dataset": "q", "source": str(source)} | row, folder / "counts.h5ad", None, 0.0)
    counts = ad.read_h5ad(folder / "counts.h5ad")
    numbers = counts.obs_names.str.removeprefix("q|").astype(int)
    names = add_columns(str(source), pd.DataFrame({ADDED: numbers.to_numpy()}), {"a": 1}, folder / "annotated.h5ad")
    with h5py.File(
        folder / "annotated.h5ad"
    ) as file:  # not read as a whole, because X may be of a type without support
        obs, uns = ad.io.read_elem(file["obs"]), ad.io.read_elem(file["uns"])
    assert [name.decode() if isinstance(name, bytes) else name for name in obs.index] == list(names)
    assert obs[ADDED].to_list() == list(range(counts.n_obs))
    assert uns["cell2text"] == {"a": 1}
    return counts, obs


def stored(path):
    """Return the bytes, type and attributes of everything in an HDF5 file that annotation must not change."""
    found = {}

    def visit(name, item):
        if "cell2text" not in name and name != "uns":
            content = item[()] if isinstance(item, h5py.Dataset) and item.shape is not None else None
            array = np.asarray(content)
            content = array.tolist() if array.dtype.hasobject else array.tobytes()
            kept = {key: str(value) for key, value in item.attrs.items() if (name, key) != ("obs", "column-order")}
            found[name] = (getattr(item, "dtype", None), content, kept)

    with h5py.File(path) as file:
        file.visititems(visit)
    return found
