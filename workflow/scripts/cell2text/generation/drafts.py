"""Drafts of whole texts from the projector's names, which the language model then checks in a few passes."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import combinations

import numpy as np
from transformers import PreTrainedTokenizerBase

from cell2text.generation.candidates import Candidates, find_candidates
from cell2text.grammar import PATHWAY, Slots, Terms, render

AT_ONCE = 32  # tokens: those after a wrong one are read for nothing
# When a text is not the beginning of a description, its last tokens are looked up among those of all descriptions
KNOWN, LOOKED_UP = 3, 16  # tokens


class Drafts:
    """The tokens that probably follow in the texts of some cells.

    Parameters
    ----------
    labels, programmes_per_cell, terms, tokenizer
        As for ``find_candidates``.
    scores
        The projector's scores of the cells, as in ``contracts.SCORES``.
    """

    def __init__(
        self,
        labels: Mapping[str, Sequence[str]],
        programmes_per_cell: int,
        terms: Terms,
        tokenizer: PreTrainedTokenizerBase,
        scores: Mapping[str, np.ndarray],
    ):
        self.labels, self.programmes_per_cell = labels, programmes_per_cell
        self.terms, self.tokenizer = terms, tokenizer
        self.ranked = {slot: np.argsort(-scores[f"projector_{slot}"], axis=1, kind="stable") for slot in labels}
        self.texts: dict[Slots, list[int]] = {}

    @cached_property
    def patterns(self) -> list[list[Candidates]]:
        """The steps of a description in which all slots are known, and of those that omit some of the sample's."""
        sample = [slot for slot in self.labels if slot not in ("cell_type", PATHWAY)]
        omitted = [some for number in range(len(sample) + 1) for some in combinations(sample, number)]
        known = [{slot: self.labels[slot] for slot in self.labels if slot not in some} for some in omitted]
        return [find_candidates(one, self.programmes_per_cell, self.terms, self.tokenizer) for one in known]

    def of_cells_from(self, first: int) -> Callable[[int, list[int]], list[int]]:
        """Return :meth:`draft` for cells that are counted from a first one."""
        return lambda cell, written: self.draft(first + cell, written)

    def draft(self, cell: int, written: list[int]) -> list[int]:
        """Return the next tokens: of the names first, and once these are written, of their explanations.

        Parameters
        ----------
        cell
            Number of the cell among those of ``scores``.
        written
            Tokens of its text so far.

        Returns
        -------
        list of int
            If what is written is not the beginning of a description, a few tokens that follow its last ones in some
            description; empty if there is none.
        """
        for steps in self.patterns:
            names = self._choose(cell, written, steps)
            if names is not None:
                text = [token for step, number in names for token in step.tokens[number]]
                text = text if len(written) < len(text) else self._tokenise(names)
                if text[: len(written)] == written:
                    return text[len(written) :][:AT_ONCE]
        place = self.following.get(tuple(written[-KNOWN:]))
        return self.examples[place : place + LOOKED_UP] if place else []

    @cached_property
    def examples(self) -> list[int]:
        """The tokens of one description for each label, one after the other."""
        tokens: list[int] = []
        # the second programme is another one than the first, if there are several
        names = [(step, min(number, len(step.ids) - 1)) for number, step in enumerate(self.patterns[0])]
        for number, (step, _) in enumerate(names):
            for label in range(len(step.ids)):
                tokens += self._tokenise([*names[:number], (step, label), *names[number + 1 :]])
        return tokens

    @cached_property
    def following(self) -> dict[tuple[int, ...], int]:
        """Where in the examples each sequence of ``KNOWN`` tokens is followed by others."""
        runs = zip(*(self.examples[start:] for start in range(KNOWN)), strict=False)
        return {run: place + KNOWN for place, run in enumerate(runs)}

    def _choose(
        self, cell: int, written: list[int], steps: Sequence[Candidates]
    ) -> list[tuple[Candidates, int]] | None:
        """Return the best candidate of each step that agrees with what is written; None if a step has none."""
        names: list[tuple[Candidates, int]] = []
        start = 0
        for step in steps:
            rest = tuple(written[start:])
            named = {number for other, number in names if other.slot == step.slot}
            for number in self.ranked[step.slot][cell].tolist():
                tokens = step.tokens[number]
                if tokens[: len(rest)] == rest[: len(tokens)] and number not in named:
                    break
            else:
                return None
            names.append((step, number))
            start += len(tokens)
        return names

    def _tokenise(self, names: Sequence[tuple[Candidates, int]]) -> list[int]:
        """Return the tokens of the description with some names, its end included."""
        ids = {step.slot: step.ids[number] for step, number in names if step.slot != PATHWAY}
        slots = Slots(**ids, pathways=tuple(step.ids[number] for step, number in names if step.slot == PATHWAY))
        if slots not in self.texts:
            tokens = self.tokenizer(render(slots, self.terms), add_special_tokens=False)["input_ids"]
            self.texts[slots] = [*tokens, self.tokenizer.eos_token_id]
        return self.texts[slots]
