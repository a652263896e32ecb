"""Training and validation cells in the form that the model takes, and their order in each epoch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from cell2text.contracts import DESCRIPTIONS, TERM_SLOTS
from cell2text.embedding.vectors import Embeddings, Vectors
from cell2text.errors import InputError
from cell2text.generation.decode import check_limit
from cell2text.grammar import find_cell_type, find_opening
from cell2text.model.alignment import number_labels
from cell2text.model.cell2text import Cell2Text
from cell2text.model.prompt import SOURCE

TOKENISED_AT_ONCE = 4096  # texts, because an encoding takes over a hundred bytes per token
# Standard deviation of the noise added to a cell's vectors, as a multiple of their spread over the training cells:
OWN_NOISE = 0.1  # of a cell that is seen as it is
OTHER_NOISE = 2.0  # at most, of a cell that is seen as in another study, where all vectors lie elsewhere


@dataclass(frozen=True)
class Texts:
    """The texts of cells as token ids; the same text of several cells is in memory once.

    Parameters
    ----------
    tokens
        Token ids of the distinct texts, concatenated, int32.
    starts, lengths
        Where the text of each cell starts among them, and its number of tokens, int64 (cells,).
    """

    tokens: Tensor
    starts: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of(cls, distinct: Sequence[Sequence[int]], which: np.ndarray) -> "Texts":
        """Return the texts of cells from distinct texts and the index of each cell's text among them."""
        parts = [np.array(text, dtype=np.int32) for text in distinct]
        lengths = np.array([len(text) for text in parts], dtype=np.int64)
        tokens = torch.from_numpy(np.concatenate([np.empty(0, dtype=np.int32), *parts]))
        return cls(tokens, (np.cumsum(lengths) - lengths)[which], lengths[which])

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, cell: int) -> Tensor:
        """Return the token ids of a cell's text, int64."""
        start = self.starts[cell]
        return self.tokens[start : start + self.lengths[cell]].long()


@dataclass
class Cells:
    """Cells of one split, in the form that the model takes.

    Parameters
    ----------
    vectors
        Input of the projector.
    texts
        Token ids of each description with the end token.
    labels
        Class numbers, see ``alignment.number_labels``; int64 (cells, slots).
    ids
        Cell ids.
    openings
        Number of tokens in the opening of each text, which has all its names; int64 (cells,).
    first_sentences
        Number of tokens in the sentence that names the cell type, the first; 0 if the text names none. int64 (cells,).
    aligned_to
        Input of the alignment loss: labels and gene programmes, see ``alignment.LabelTargets``; or the index of each
        text among the distinct texts, int64 (cells,).
    """

    vectors: Vectors
    texts: Texts
    labels: Tensor
    ids: list[str]
    openings: Tensor
    first_sentences: Tensor
    aligned_to: Tensor

    def batch(
        self, rows: np.ndarray, device: torch.device, views: np.ndarray | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return vectors, lengths, texts padded on the right, their mask, and the input of the alignment loss.

        The vectors are those of the cells themselves, or of ``views`` as in :meth:`draw_views`.
        """
        texts = [self.texts[row] for row in rows]
        padded = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
        mask = torch.arange(padded.shape[1]) < torch.tensor([len(text) for text in texts])[:, None]
        vectors = self.vectors[rows] if views is None else self.vectors.seen(rows, views)
        parts = (*vectors, padded, mask, self.aligned_to[rows])
        return tuple(part.to(device) for part in parts)

    def draw_views(self, cells: int, share: float, random: torch.Generator) -> tuple[np.ndarray, Tensor]:
        """Return how each of so many cells is seen: as it is, or as in another study.

        As in another study means through one of its views, if there are any, and displaced by noise of random size.

        Parameters
        ----------
        cells
            Number of cells.
        share
            Share of the cells that are seen as in another study.
        random
            Generator on the CPU.

        Returns
        -------
        views
            Number of a random view, or -1 for the cell itself, int64 (cells,).
        noise
            Standard deviation of the noise, see ``align.add_noise``, float32 (cells,).
        """
        drawn = torch.randint(max(self.vectors.views, 1), (cells,), generator=random)
        own = torch.rand(cells, generator=random) >= share
        noise = (OTHER_NOISE * torch.rand(cells, generator=random)).masked_fill(own, OWN_NOISE)
        return drawn.masked_fill(own | (self.vectors.views == 0), -1).numpy(), noise

    @property
    def text_lengths(self) -> np.ndarray:
        """Number of tokens of each text, int64 (cells,)."""
        return self.texts.lengths

    def openings_alone(self) -> "Cells":
        """Return the cells with only the opening of each text, or the whole text if it names nothing."""
        ends = self.openings.numpy()
        return replace(self, texts=replace(self.texts, lengths=np.where(ends, ends, self.text_lengths)))


@dataclass(frozen=True)
class BatchSize:
    """Size of a micro-batch.

    Parameters
    ----------
    cells
        Number of cells, if ``tokens`` is None.
    tokens
        Maximum number of tokens, including prompts; a micro-batch has at least one cell.
    prompt
        Number of prompt tokens per cell, including soft tokens.
    """

    cells: int
    tokens: int | None = None
    prompt: int = 0

    def cut(self, rows: np.ndarray, text_lengths: np.ndarray) -> list[np.ndarray]:
        """Split rows, in the given order, into micro-batches."""
        if self.tokens is None:
            return [rows[start : start + self.cells] for start in range(0, len(rows), self.cells)]
        found, start = [], 0
        ends = np.concatenate([[0], np.cumsum(self.prompt + text_lengths[rows])])
        while start < len(rows):
            end = max(start + 1, np.searchsorted(ends, ends[start] + self.tokens, side="right") - 1)
            found.append(rows[start:end])
            start = end
        return found


def plan_epoch(
    text_lengths: np.ndarray,
    size: BatchSize,
    step_batches: int,
    seed: int,
    epoch: int,
    weights: np.ndarray | None = None,
    depths: np.ndarray | None = None,
) -> list[list[np.ndarray]]:
    """Return the steps of an epoch, each a list with the rows of each micro-batch.

    Cells are shuffled regardless of the length of their texts: texts of similar length mostly describe similar cells,
    and the fast path computes no padding anyway.

    Parameters
    ----------
    text_lengths
        Number of tokens of each text, (cells,).
    size
        Size of a micro-batch.
    step_batches
        Micro-batches per step; the last step of an epoch may have fewer.
    seed, epoch
        The same pair gives the same steps.
    weights
        Sampling weight of each cell, (cells,), to draw as many cells with replacement; None to take each cell once.
    depths
        Depth of each cell's type in the Cell Ontology, (cells,), if the first epoch goes from general to specific
        types (curriculum learning, Bengio et al. 2009, doi 10.1145/1553374.1553380); else None.
    """
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(text_lengths))
    if weights is not None:
        order = random.choice(len(text_lengths), len(text_lengths), p=weights / weights.sum())
    if depths is not None and epoch == 0:
        order = order[np.argsort(depths[order], kind="stable")]
    found = size.cut(order, text_lengths)
    return [found[start : start + step_batches] for start in range(0, len(found), step_batches)]


def balance(labels: np.ndarray) -> np.ndarray:
    """Return sampling weights that draw all labels equally often; -1, no label, counts as a label.

    Examples
    --------
    >>> balance(np.array([0, 0, 1])).tolist()
    [0.5, 0.5, 1.0]
    """
    _, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return 1 / counts[inverse]


def read_cells(
    descriptions: pd.DataFrame,
    split: str,
    embeddings: Embeddings,
    classes: dict[str, list[str]],
    programmes: Tensor,
    model: Cell2Text,
) -> Cells:
    """Return the cells of one split with tokenised texts.

    Parameters
    ----------
    descriptions
        Rows of ``contracts.DESCRIPTIONS``; text may be categorical.
    split
        Name of the split.
    embeddings
        Embeddings of the cells.
    classes
        As :func:`find_classes` returns them.
    programmes
        Gene programmes of each description, as :func:`find_programmes` returns them.
    model
        Its projector determines which vectors to read; its tokenizer tokenises the texts.
    """
    chosen = (descriptions["split"] == split).to_numpy()
    rows = descriptions[chosen]
    views = embeddings.count_views() if split == "train" else 0
    which, distinct = pd.factorize(rows["text"])
    tokens, openings, first_sentences = _tokenise(list(distinct), model.tokenizer)
    labels = number_labels({slot: rows[f"{slot}_id"] for slot in classes}, classes)
    return Cells(
        embeddings.vectors(rows["cell_id"].to_list(), model.projector.reads, views),
        Texts.of(tokens, which),
        labels,
        rows["cell_id"].to_list(),
        torch.from_numpy(openings[which]),
        torch.from_numpy(first_sentences[which]),
        torch.cat([labels, programmes[chosen]], dim=1),
    )


def _tokenise(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Return the token ids of each text with the end token, and the number of tokens in its opening and first sentence.

    The numbers are int64 (texts,).
    """
    tokens, numbers = [], []
    for start in range(0, len(texts), TOKENISED_AT_ONCE):
        part = texts[start : start + TOKENISED_AT_ONCE]
        encoded = tokenizer(part, add_special_tokens=False)
        tokens += [np.array([*text, tokenizer.eos_token_id], dtype=np.int32) for text in encoded["input_ids"]]
        for i, text in enumerate(part):
            # up to the token with the last character, the full stop
            ends = (len(find_opening(text)), len(find_cell_type(text)))
            numbers.append([encoded.char_to_token(i, end - 1) + 1 if end else 0 for end in ends])
    openings, first_sentences = np.array(numbers, dtype=np.int64).reshape(-1, 2).T
    return tokens, openings, first_sentences


def check_lengths(model: Cell2Text, train: Cells, validation: Cells, max_new_tokens: int | None) -> int:
    """Return the number of tokens of the longest text with its end token, if the model can read and write it.

    Parameters
    ----------
    model
        Its language model may have positions for few tokens.
    train, validation
        Cells of the two splits.
    max_new_tokens
        The config's ``generate.max_new_tokens``.

    Raises
    ------
    InputError
        If prompt and text need more positions than there are, or generation would truncate the text.
    """
    longest = int(max(cells.text_lengths.max(initial=0) for cells in (train, validation)))
    prompt, soft_tokens = model.count_prompt(*train.vectors[np.array([0])])
    if model.positions is not None and prompt + longest > model.positions:
        raise InputError(
            SOURCE,
            f"it has {model.positions} positions, and the longest text needs {longest} after a prompt of {prompt}, "
            f"{soft_tokens} of them soft tokens",
            "Choose another model, fewer soft tokens, or gene sets with shorter explanations",
        )
    check_limit(max_new_tokens, longest)
    return longest


def find_classes(training: pd.DataFrame) -> dict[str, list[str]]:
    """Return the sorted ids of each slot in the training cells, without the slots that have none.

    Parameters
    ----------
    training
        Rows of ``contracts.DESCRIPTIONS``.
    """
    ids = {slot: sorted(training[f"{slot}_id"].dropna().unique()) for slot in TERM_SLOTS}
    return {slot: found for slot, found in ids.items() if found}


def find_programmes(descriptions: str | Path) -> tuple[list[str], Tensor]:
    """Return the gene programmes of the training texts, and which of them each text names.

    Parameters
    ----------
    descriptions
        File of ``contracts.DESCRIPTIONS``.

    Returns
    -------
    ids
        Sorted ids of the programmes.
    numbers
        Their indices in each text, the most active first, -1 where there are fewer or for a programme that no training
        text names; int64 (cells, most programmes in a training text), in the order of the file.
    """
    ids: set[str] = set()
    most = cells = 0
    for part in DESCRIPTIONS.read_parts(descriptions, ["split", "pathway_ids"]):
        lists = part.loc[part["split"] == "train", "pathway_ids"]
        ids.update(*lists)
        most, cells = max(most, *map(len, lists), 0), cells + len(part)
    names, start = pd.Index(sorted(ids)), 0
    numbers = np.full((cells, most), -1, dtype=np.int64)
    for part in DESCRIPTIONS.read_parts(descriptions, ["pathway_ids"]):
        named = part["pathway_ids"].reset_index(drop=True).explode().dropna()
        place = named.groupby(level=0).cumcount().to_numpy()
        kept = place < most
        numbers[start + named.index[kept], place[kept]] = names.get_indexer(named[kept])
        start += len(part)
    return names.to_list(), torch.from_numpy(numbers)


def find_depths(cell_types: pd.Series, terms: pd.DataFrame) -> np.ndarray:
    """Return the number of is_a steps from each cell type to the root of the Cell Ontology, float64 (cells,).

    Parameters
    ----------
    cell_types
        Ontology id of each cell's type; None or an unknown id counts as the root, ``cell``.
    terms
        A table of ``contracts.TERMS``.
    """
    depths = terms[terms["slot"] == "cell_type"].set_index("id")["depth"]
    return cell_types.astype(object).map(depths).fillna(0).to_numpy(dtype=float)
