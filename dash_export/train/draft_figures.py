"""What a drafter does on held-out answers: its drafts are run over them as decode would make them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dash_export.train.draft_layer import DraftLayer
from dash_export.train.drafter import batches, padded_batch, short_logits
from dash_export.train.model import Head
from dash_export.train.own_text import Written

_STEPS = 20


@dataclass(frozen=True)
class DraftFigures:
    """`accepted[d]`: share of places where the first d + 1 drafts are all right. `covered`: share of tokens that are in
    the short vocabulary. `slope`, `offset`: of the first draft's chance (`Drafter`).
    """

    tokens: int
    accepted: tuple[float, ...]
    covered: float
    slope: float
    offset: float


@torch.no_grad()
def judged(
    layer: DraftLayer, head: Head, tokens: torch.Tensor, texts: Sequence[Written], depth: int, size: int
) -> DraftFigures:
    """Judge on the answers of `texts`, in batches of `size` tokens. `tokens`: the short vocabulary of `head`."""
    hits, counts = np.zeros(depth), np.zeros(depth)
    covered, chances, right = 0, list[torch.Tensor](), list[torch.Tensor]()
    tokens = tokens.to(head.weight.device)
    for places in batches(texts, size, (0,)):
        batch = padded_batch([texts[place] for place in places], head.weight.device)
        chain = layer.chain(batch.ids, batch.states, batch.keys, batch.values, depth)
        starts = torch.tensor([texts[place].start for place in places], device=batch.ids.device)
        kept = torch.ones_like(batch.ids[:, 1:], dtype=torch.bool)
        for d, states in enumerate(chain[: batch.ids.shape[1] - 2]):
            # Place j drafts the token after the next d: of answer tokens j on, of which the model chose the first.
            best, draft = short_logits(head, states[:, :-1]).softmax(-1).max(-1)
            true, at = batch.ids[:, 2 + d :], torch.arange(1, best.shape[1] + 1, device=batch.ids.device)
            counted = (at >= starts[:, None]) & (batch.weight[:, 2 + d :] > 0)
            kept = kept[:, : best.shape[1]] & (tokens[draft] == true)
            hits[d] += int((kept & counted).sum())
            counts[d] += int(counted.sum())
            if not d:
                covered += int(torch.isin(true[counted], tokens).sum())
                chances.append(best[counted].double().cpu())
                right.append(kept[counted].double().cpu())
    slope, offset = calibrated(torch.cat(chances), torch.cat(right)) if counts[0] else (1.0, 0.0)
    accepted = tuple(float(share) for share in (hits / np.maximum(counts, 1)).round(4))
    return DraftFigures(int(counts[0]), accepted, round(covered / max(counts[0], 1), 4), slope, offset)


def calibrated(chances: torch.Tensor, right: torch.Tensor) -> tuple[float, float]:
    """Return slope and offset of the logistic regression of `right` (0 or 1) on the logit of `chances` [n] float64."""
    x = torch.stack([torch.logit(chances, 1e-6), torch.ones_like(chances)], 1)
    found = torch.tensor([1.0, 0.0], dtype=torch.float64)
    for _ in range(_STEPS):  # Newton's, with a little of a prior that the chance is right as it is
        p = torch.sigmoid(x @ found)
        gradient = x.T @ (right - p) - (found - torch.tensor([1.0, 0.0]))
        found = found + torch.linalg.solve((x * (p * (1 - p))[:, None]).T @ x + torch.eye(2), gradient)
    return round(float(found[0]), 4), round(float(found[1]), 4)
