"""For which cells the projector's names suffice, so that the language model need not read them.

The names of a cell follow from the scores of language model and projector together. The lead of a cell is how much
more than the projector's names the language model would have to favour others, in nats, to change one of them: the
difference between the best and second-best weighted score without the language model, over the language model's
weight, for the slot in which that is least. Cells with a great lead are described by the projector alone.

How great is chosen on the validation cells, for which both descriptions are known: the smallest lead from which few
enough of them differ that at most a share of 1 - agreement of all new cells get other names than if the language model
read every cell. This is conformal risk control as in :mod:`back_off`, with a loss that is monotone, so it is exact in
finite samples for cells that are exchangeable with the validation cells.
"""

import math
from collections.abc import Mapping

import numpy as np

from cell2text.confidence.calibration import SlotCalibration
from cell2text.grammar import PATHWAY


def find_leads(
    scores: Mapping[str, np.ndarray], slots: Mapping[str, SlotCalibration], ranking: SlotCalibration
) -> np.ndarray:
    """Return the lead of each cell in nats, float64 (cells,).

    Parameters
    ----------
    scores
        The projector's tensors of ``contracts.SCORES``, and any others.
    slots, ranking
        Weights of the scores of each slot and of gene programmes.
    """
    leads = [_leads_of(scores[f"projector_{slot}"], 1, weighed) for slot, weighed in slots.items()]
    if f"projector_{PATHWAY}" in scores:
        leads.append(_leads_of(scores[f"projector_{PATHWAY}"], 2, ranking))
    return np.min(leads, axis=0)


def _leads_of(projector: np.ndarray, named: int, weighed: SlotCalibration) -> np.ndarray:
    language_weight, weight = weighed.weights
    if projector.shape[1] < 2 or not language_weight:
        return np.full(len(projector), np.inf)
    if not weight:
        return np.zeros(len(projector))
    ranked = -np.sort(-weight * projector.astype(np.float64) - weighed.gains, axis=1)[:, : named + 1]
    gaps = np.nan_to_num(ranked[:, :-1] - ranked[:, 1:], nan=0.0)  # two impossible names differ by nothing
    return gaps.min(axis=1) / language_weight


def choose_least_lead(leads: np.ndarray, same: np.ndarray, agreement: float) -> float | None:
    """Return the smallest lead with which the descriptions agree; None if there are too few cells to tell.

    Parameters
    ----------
    leads
        Of the validation cells, (cells,).
    same
        Whether the projector alone describes a cell as both models do, bool (cells,).
    agreement
        The requested share of such cells, from 0 to below 1.
    """
    allowed = math.floor((1 - agreement) * (len(leads) + 1) - 1 + 1e-9)
    if allowed < 0:
        return None
    differing = np.sort(leads[~same])[::-1]
    least = np.nextafter(differing[allowed], np.inf) if len(differing) > allowed else 0.0
    return float(least) if np.isfinite(least) else None
