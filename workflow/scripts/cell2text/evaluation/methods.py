"""Registry of the compared methods: the fine-tuned model and its baselines, by their names in files and tables.

To add a baseline, add a module to ``evaluation/baselines/``, a rule ``baseline_{name}`` and a line here.
"""

from dataclasses import dataclass

FINE_TUNED = "cell2text"


@dataclass(frozen=True)
class Method:
    """How report, model card and plot present a method.

    Parameters
    ----------
    title
        A few words.
    summary
        What the method does, in one line.
    """

    title: str
    summary: str


METHODS = {
    FINE_TUNED: Method("Cell2Text", "the fine-tuned language model describes the cell from its gene vectors"),
    "majority": Method("Most frequent label", "predicts each slot's most frequent training label for every cell"),
    "pca_logistic": Method(
        "PCA + logistic regression", "logistic regression on principal components of log-normalised counts"
    ),
    "knn": Method("k nearest neighbours", "vote of the training cells with the nearest embeddings"),
    "nearest_text": Method(
        "Nearest cell's text", "copies the description of the training cell with the nearest embedding"
    ),
    "aligned": Method(
        "Projector alone", "picks the label nearest to the cell's soft tokens, without running the language model"
    ),
    "greedy": Method("Unconstrained text", "the fine-tuned model writes freely, word by word"),
    "shuffled": Method(
        "Shuffled embeddings", "control: the fine-tuned model reads another cell's embedding; should score at chance"
    ),
}
GREEDY = "greedy"  # only if asked for: it takes as long as training
NO_RIVALS = (GREEDY, "shuffled")  # the fine-tuned model itself, used in another way
BASELINES = [name for name in METHODS if name != FINE_TUNED]


def title_of(method: str) -> str:
    """Return a method's title, or its name if the registry does not list it."""
    return METHODS[method].title if method in METHODS else method
