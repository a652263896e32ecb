"""An encoder fitted again without some datasets, and the training cells as it sees them.

An encoder that was fitted on a dataset has directions of its own for what is special about it, so its cells are told
apart more easily than those of a new study: of the cells of a brain study, 46% got the right broad type if only the
projector had not seen them, 10% if the encoder had not either, and 6% in a new study (docs/confidence.md).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from cell2text.contracts import CELLS, EMBEDDINGS, datasets_of
from cell2text.embedding.embed_genes import embed_parts
from cell2text.embedding.fit_encoder import EncoderInputs, fit_on_cells
from cell2text.embedding.ranked_cells import RankedSplit, read_measured, read_medians
from cell2text.embedding.vectors import Embeddings
from cell2text.files import whole_folder

# Those that take minutes to fit. Of the others, one is not fitted to the cells, and one takes hours.
QUICK = ("coexpression", "gene_text")


@contextmanager
def refit_without(
    inputs: EncoderInputs, datasets: Sequence[str], cells: Sequence[str], gene_vectors: bool
) -> Iterator[Embeddings]:
    """Yield the embeddings of training cells, with their views, by an encoder that has not seen some datasets.

    Parameters
    ----------
    inputs
        What the encoder of the run was fitted on.
    datasets
        Datasets that this one has not seen.
    cells
        Ids of the training cells: those of other datasets are fitted, and all are embedded.
    gene_vectors
        Whether vectors of genes are wanted, not only pooled ones.
    """
    with TemporaryDirectory(prefix="refit-") as scratch:
        folder, paths = Path(scratch), list(inputs.tokens)
        corpus = CELLS.read(inputs.corpus)
        corpus = corpus[(corpus["split"] != "train") | corpus["cell_id"].isin(set(cells))]
        CELLS.write(corpus, folder / "all.parquet")
        seen = ~datasets_of(corpus["cell_id"]).isin(datasets).to_numpy()
        CELLS.write(corpus[seen], folder / "known.parquet")
        measured, median = read_measured(inputs.genes, paths), read_medians(inputs.genes)

        def cells_of(number: int, corpus: str) -> RankedSplit:
            return RankedSplit([paths[number]], folder / corpus, "train", measured[[number]])

        # a file may have cells of many datasets (Census), and a dataset without cells would still have its genes
        fitted = [path for number, path in enumerate(paths) if any(map(len, cells_of(number, "known.parquet")))]
        known = replace(inputs, corpus=str(folder / "known.parquet"), tokens=fitted)
        encoder = fit_on_cells(known, folder / "checkpoints")
        files = []
        for number in range(len(paths)):
            parts = cells_of(number, "all.parquet")
            embedded = list(embed_parts(encoder, parts, median, 0, inputs.settings.views, inputs.seed))
            if embedded:
                names = list(embedded[0][1])
                tensors = {name: np.concatenate([found[name] for _, found in embedded]) for name in names}
                files.append(str(folder / f"{number}.safetensors"))
                EMBEDDINGS.write(tensors, [one for part, _ in embedded for one in part.cell_ids.tolist()], files[-1])
        if not gene_vectors:
            yield Embeddings(files)
            return
        with whole_folder(folder / "encoder", "encoder.json") as saved:
            encoder.save(saved)
        on_the_fly = (str(folder / "encoder"), paths, inputs.genes, inputs.settings.top_k)
        with Embeddings(files, *on_the_fly).with_store() as embeddings:
            yield embeddings
