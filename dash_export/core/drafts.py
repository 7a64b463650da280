"""Drafts of one sequence: which drafter guesses, how far, and whether it pays (`runtime/steps.py` checks them).

A pass runs the newest token and the drafts. One more draft is worth its row where its chance, times that of all before
it, over what the row takes, is above the tokens per time that the pass has without it. Chances come from the drafter
and from how it did in this text; times are measured at build (`core/passes.py`). Nothing here reads a clock, so a run
repeated gives the same passes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dash_export.core.lookup import Lookup
from dash_export.core.passes import PassCosts

MOST, MOST_LOOKED_UP = 7, 15
"""Drafts of a pass; more only of a match that holds."""
TRUSTED = 0.7
"""Chance of a match from which the trained drafter is not asked."""
USUAL = 0.5
"""Chance of a trained draft that is expected before there are some."""
PROBE = 16
"""Passes after which a drafter that did not pay is tried again."""
KEPT = 0.95
"""What an older draft counts of a newer one."""
Ask = Callable[[int], tuple[int, float]]
"""Run the trained drafter after a token; each call goes on from the one before. Returns a draft and its chance."""


class Drafts:
    """Drafts of one sequence, and what it knows of its text. `looks`: whether matches are drafts."""

    def __init__(self, costs: PassCosts, looks: bool = True, trained: bool = False) -> None:
        self._costs, self._looks = costs, looks
        self.trained = trained
        self.clear()

    def clear(self) -> None:
        """Forget the text."""
        self._lookup = Lookup()
        self._usual = [USUAL, USUAL]
        self._right = self._expected = 4.0
        self._idle = 0
        self._asked: list[tuple[int, float]] = []

    @property
    def known(self) -> int:
        """Tokens of the text that are known."""
        return len(self._lookup.tokens)

    def read(self, tokens: Sequence[int]) -> None:
        """Take the tokens of the text, all of them: those that are new are a prompt's."""
        self._lookup.read(tokens[self.known :])

    def add(self, token: int) -> None:
        """Take a token that was chosen."""
        self._lookup.add(token)

    def several(self, context: int) -> bool:
        """Return whether the newest token is run in a pass of several rows, where one row would be rounded otherwise.
        This follows from the text alone, so accepted and refused drafts give the same text: with a trained drafter it
        is always so, else where a match is worth a row.
        """
        if self.trained:
            return True
        found = self._lookup.guess(0)
        return found is not None and found[1] > self._costs.of_rows(context)[2] - 1

    def guesses(self, ask: Ask | None, context: int, most: int) -> list[int]:
        """Return one draft or more (at most `most`, 1 or more) of what follows the newest token, at so many cached
        tokens. `ask`: the trained drafter, if there is one.
        """
        newest, found = self._lookup.tokens[-1], list[int]()
        chance_of_all, tokens, time, asks = 1.0, 1.0, 1.0, ask is not None and self._pays()
        follows = self._looks
        times = self._costs.of_rows(context)
        self._asked = []
        while len(found) < min(most, MOST_LOOKED_UP if follows else MOST):
            row = times[len(found) + 2] - times[len(found) + 1]
            draft, chance = (self._lookup.guess(len(found)) if follows else None) or (-1, 0.0)
            if chance >= TRUSTED or len(found) >= MOST:
                asks = False
            if asks and found:
                asks = chance_of_all * self._usual[1] * time > tokens * (row + self._costs.draft)
            if asks and ask is not None:
                own, sure = ask(found[-1] if found else newest)
                time += self._costs.draft
                self._note(min(len(found), 1), sure)
                sure *= self._right / self._expected
                if sure > chance:
                    self._asked.append((len(found), sure))
                    follows = follows and own == draft
                    draft, chance = own, min(sure, 1.0)
            if draft < 0 or (found and chance_of_all * chance * time <= tokens * row):
                break
            found.append(draft)
            chance_of_all *= chance
            tokens, time = tokens + chance_of_all, time + row
        return found or [newest]

    def judge(self, accepted: int, drafts: int) -> None:
        """Note how many of a pass's drafts were accepted."""
        for place, sure in self._asked:
            if place <= accepted and place < drafts:  # it was compared with a choice
                self._right = KEPT * self._right + (place < accepted)
                self._expected = KEPT * self._expected + sure

    def _note(self, place: int, sure: float) -> None:
        self._usual[place] = KEPT * self._usual[place] + (1 - KEPT) * sure

    def _pays(self) -> bool:
        """Return whether the trained drafter is asked: where its first drafts are worth a run, or as a probe."""
        other = self._lookup.guess(0) if self._looks else None
        gain = self._usual[0] * self._right / self._expected - (other[1] if other else 0.0)
        self._idle = 0 if gain > self._costs.draft else self._idle + 1
        return self._idle % PROBE == 0


def no_drafts() -> Drafts | None:
    """Return no drafts: every token is decoded by itself."""
    return None
