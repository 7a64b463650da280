"""Scores: every candidate runs every item of a file. The measure of texts is here, those of tasks are in `tasks.py`.

The first candidate is dense, and the others are compared with it, item by item. A measure checks and encodes all its
items when it is created, so a bad item raises before anything is measured.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np

from dash_export.core.divergence import DenseRows, nll
from dash_export.core.kinds import Setting
from dash_export.core.sampling import TokenIds
from dash_export.core.units import Actions
from dash_export.files.artifacts import Progress, no_progress
from dash_export.measure.candidates import Candidate, setting_record
from dash_export.measure.intervals import Floats, Interval, interval
from dash_export.text.chats import Continuation

Figures = dict[str, Interval]
Row = tuple[tuple[float, ...], Actions, Any]
"""Result of one item by one candidate: its numbers, the skip map of the tokens that might skip, and the dense
candidate's data that the other candidates are compared with.
"""


@dataclass(frozen=True)
class Result:
    """Measurement of one candidate over one file. `layers`: mean layers run; `time`: decode time as a fraction of the
    build's own dense time, predicted from its cost table; both over the `tokens` at which skipping was allowed.
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
        """Return the result as it is written to JSON."""
        found = asdict(self)
        figures: dict[str, Any] = found.pop("figures")
        return found | {"setting": setting_record(self.setting)} | figures


class Measure(ABC):
    """Measure of one file. `items`: its encoded items; `row` makes numbers of an item, `figures` sums up all rows."""

    form: ClassVar[str]
    items: Sequence[Any]

    @abstractmethod
    def row(self, candidate: Candidate, item: Any, dense: Any) -> Row:
        """Run an item. `dense`: the data that the first candidate returned for this item; None for that candidate."""

    @abstractmethod
    def figures(self, own: Floats, dense: Floats) -> Figures:
        """Return a candidate's figures, from its numbers and those of dense, [numbers, items] each."""


def score(measure: Measure, candidates: Sequence[Candidate], progress: Progress = no_progress) -> list[Result]:
    """Return one result per candidate, the first of which is dense."""
    rows: list[list[tuple[float, ...]]] = [[] for _ in candidates]
    actions: list[list[Actions]] = [[] for _ in candidates]
    for number, item in enumerate(measure.items):
        dense = None
        for index, candidate in enumerate(candidates):
            numbers, taken, dense = measure.row(candidate, item, dense)
            rows[index].append(numbers)
            actions[index].append(taken)
            progress(measure.form, number * len(candidates) + index + 1, len(measure.items) * len(candidates))
    table = np.array(rows, np.float64).transpose(0, 2, 1)
    return [
        Result(one.build, one.setting, *one.taken(np.concatenate(taken)), len(measure.items),
               measure.figures(own, table[0]))
        for one, taken, own in zip(candidates, actions, table, strict=True)
    ]  # fmt: skip


class TextScore(Measure):
    """Teacher-forced items of a text. `kl`: KL(dense || candidate), nats per token; `perplexity`, and its ratio to
    dense's, item by item; `top1`: share of tokens after which candidate and dense predict the same next token.

    Positions from the item's prefix on are counted: their layers may be skipped, and what they predict is scored.
    """

    form = "text"

    def __init__(self, items: Sequence[Continuation]) -> None:
        self.items = items

    def row(self, candidate: Candidate, item: Continuation, dense: tuple[DenseRows, TokenIds] | None) -> Row:
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

    def figures(self, own: Floats, dense: Floats) -> Figures:
        counts = [len(ids) - 1 - prefix for ids, prefix in self.items]
        return {
            "kl": interval(own[0], counts),
            "perplexity": interval(own[1], counts, np.exp),
            "perplexity_ratio": interval(own[1] - dense[1], counts, np.exp),
            "top1": interval(own[2], counts),
        }
