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
    "cell2text_graph": Method("Cell2Text, graph", "its cell types refined on a graph of similar cells of each study"),
    "cell2text_random_graph": Method(
        "Cell2Text, random graph", "control: the same, with the cells of the graph shuffled"
    ),
    "majority": Method("Most frequent label", "predicts each slot's most frequent training label for every cell"),
    "pca_logistic": Method(
        "PCA + logistic regression", "logistic regression on principal components of log-normalised counts"
    ),
    "pca_logistic_graph": Method(
        "PCA + logistic regression, graph", "its cell types refined on a graph of similar cells of each study"
    ),
    "pca_logistic_random_graph": Method(
        "PCA + logistic regression, random graph", "control: the same, with the cells of the graph shuffled"
    ),
    "bilevel": Method("Genes and graph in turn", "a classifier of genes and one on a graph of cells teach each other"),
    "bilevel_random_graph": Method(
        "Genes and random graph in turn", "control: the same, with the cells of the graph shuffled"
    ),
    "knn": Method("k nearest neighbours", "vote of the training cells with the nearest embeddings"),
    "lda": Method("Shrinkage LDA", "linear discriminant analysis of pooled embeddings, with a shrunk covariance"),
    "contrast": Method(
        "Contrastive head", "nearest centroid after supervised contrast of cell types; other slots by shrinkage LDA"
    ),
    "contrast_permuted": Method("Contrastive head, permuted", "control: the same with permuted training labels"),
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
REFINABLE = (FINE_TUNED, "pca_logistic")
# only if asked for
ON_GRAPH = [f"{name}_{graph}" for name in REFINABLE for graph in ("graph", "random_graph")]
ON_GRAPH += ["bilevel", "bilevel_random_graph"]
FEW_LABELS = ["lda", "contrast", "contrast_permuted"]  # only if asked for
# the fine-tuned model itself, used in another way, and controls
NO_RIVALS = (
    *(GREEDY, "shuffled", "cell2text_graph", "cell2text_random_graph", "pca_logistic_random_graph"),
    *("bilevel_random_graph", "contrast_permuted"),
)
BASELINES = [name for name in METHODS if name not in (FINE_TUNED, *ON_GRAPH, *FEW_LABELS)]


def title_of(method: str) -> str:
    """Return a method's title, or its name if the registry does not list it."""
    return METHODS[method].title if method in METHODS else method
