"""Scores of texts: every candidate runs every item. The first is dense, and the others are compared with it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dash_export.core.divergence import DenseRows, nll
from dash_export.core.kinds import Setting
from dash_export.core.sampling import TokenIds
from dash_export.core.units import Actions
from dash_export.files.artifacts import Progress, no_progress
from dash_export.measure.candidates import Candidate, setting_record
from dash_export.measure.intervals import Interval, interval
from dash_export.text.chats import Continuation

Figures = dict[str, Interval]
_Dense = tuple[DenseRows, TokenIds]
"""Reference that the others are compared with: dense's logits, and the tokens that it finds likeliest."""


@dataclass(frozen=True)
class Result:
    """Measurement of one candidate over one text or task. `layers`: mean layers run; `time`: decode time as a fraction
    of the build's own dense time, predicted from its cost table; both over the `tokens` at which skipping was allowed.
    `items`: number of windows, prompts or questions; `figures`: results by name.
    """

    build: str
    setting: Setting
    tokens: int
    layers: float
    time: float
    items: int
    figures: Figures

    def record(self) -> dict[str, Any]:
        found = asdict(self)
        figures: dict[str, Any] = found.pop("figures")
        return found | {"setting": setting_record(self.setting)} | figures


def score(
    items: Sequence[Continuation],
    candidates: Sequence[Candidate],
    progress: Progress = no_progress,
    name: str = "text",
) -> list[Result]:
    """Return one result per candidate, teacher-forced. `kl`: KL(dense || candidate), nats per token; `perplexity`, and
    its ratio to dense's, item by item; `top1`: share of tokens after which candidate and dense predict the same token.

    Positions from the item's prefix on are counted: their layers may be skipped, and what they predict is scored.
    `name`: the text's, for the progress.
    """
    rows: list[list[tuple[float, float, float]]] = [[] for _ in candidates]
    actions: list[list[Actions]] = [[] for _ in candidates]
    for number, item in enumerate(items):
        dense = None
        for index, candidate in enumerate(candidates):
            numbers, taken, dense = _row(candidate, item, dense)
            rows[index].append(numbers)
            actions[index].append(taken)
            progress(name, number * len(candidates) + index + 1, len(items) * len(candidates))
    counts = [len(ids) - 1 - prefix for ids, prefix in items]
    table = np.array(rows).transpose(0, 2, 1)
    return [
        Result(
            one.build, one.setting, *one.taken(np.concatenate(taken)), len(items),
            {
                "kl": interval(kl, counts),
                "perplexity": interval(surprise, counts, np.exp),
                "perplexity_ratio": interval(surprise - table[0, 1], counts, np.exp),
                "top1": interval(same, counts),
            },
        )
        for one, taken, (kl, surprise, same) in zip(candidates, actions, table, strict=True)
    ]  # fmt: skip


def _row(
    candidate: Candidate, item: Continuation, dense: _Dense | None
) -> tuple[tuple[float, float, float], Actions, _Dense]:
    """Return an item's sums over its counted tokens (KL, surprise, agreement), their actions, and dense's data."""
    ids, prefix = item
    found = candidate.session().score(ids, prefix, keep_logits=True)
    counted = slice(prefix, len(ids) - 1)  # nothing follows the last one
    assert found.logits is not None
    logits = found.logits[counted]
    likely, kl = logits.argmax(axis=-1), 0.0
    if dense is None:
        dense = DenseRows(logits), likely
    else:  # rounding can make it negative where nothing was skipped
        kl = max(0.0, float(dense[0].kl(logits).sum()))
    surprise = float(nll(logits, ids[prefix + 1 :]).sum())
    return (kl, surprise, float((likely == dense[1]).sum())), found.actions[counted], dense
