"""Methods that are compared: the fine-tuned model and its baselines, by the names that files and tables use.

A baseline is one module in ``evaluation/baselines/``, one rule ``baseline_{name}`` and one line here.
"""

from dataclasses import dataclass

FINE_TUNED = "cell2text"


@dataclass(frozen=True)
class Method:
    """How the report and the plots call a method.

    Parameters
    ----------
    title
        A few words.
    summary
        What it does, one line.
    """

    title: str
    summary: str


METHODS = {
    FINE_TUNED: Method("Cell2Text", "the fine-tuned model reads a cell and writes its description"),
    "majority": Method("Most frequent label", "each slot's most frequent term among the training cells"),
    "pca_logistic": Method(
        "PCA + logistic regression", "a linear classifier on the principal components of the log counts"
    ),
    "knn": Method("Nearest neighbours' vote", "vote of the training cells with the nearest embeddings"),
    "nearest_text": Method("Nearest cell's text", "the description of the nearest training cell, copied"),
    "aligned": Method(
        "Projector's nearest label", "the label whose name the projector places the cell nearest to, no language model"
    ),
    "shuffled": Method(
        "Shuffled embeddings", "the fine-tuned model, each cell given another cell's embedding: must fall to chance"
    ),
}
BASELINES = [name for name in METHODS if name != FINE_TUNED]


def title_of(method: str) -> str:
    """Return a method's title; its name where it has none."""
    return METHODS[method].title if method in METHODS else method
