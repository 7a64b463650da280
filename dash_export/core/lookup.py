"""The drafter of kind `lookup`: the text's own repetitions, without weights. The last tokens are looked up among those
before them, and what followed there is the guess.
"""

from __future__ import annotations

from collections.abc import Sequence

LONGEST = 4
"""Tokens by which a match is found; one that goes on is longer."""
SURE = (0.08, 0.2, 0.4, 0.55, 0.65, 0.7, 0.75, 0.8, 0.85)
"""Chance that the guess after a match of 1, 2, ... tokens is right, before the text has shown its own."""
WEIGHT, KEPT = 6.0, 0.97
"""Tokens that SURE counts as, and what an older token counts of a newer one."""


class Lookup:
    """Index of one text, a token at a time: a few dictionary entries each. All of it follows from the text alone."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._places: dict[tuple[int, ...], int] = {}
        """Tokens in a row -> the place after their last occurrence."""
        self._right, self._judged = [WEIGHT * sure for sure in SURE], [WEIGHT] * len(SURE)
        self._source, self._length = 0, 0

    def read(self, tokens: Sequence[int]) -> None:
        """Add tokens of a prompt."""
        for token in tokens:
            self._add(token)

    def add(self, token: int) -> None:
        """Add a token that was chosen, and note whether it was the guess."""
        if self._length:
            place = min(self._length, len(SURE)) - 1
            self._right[place] = KEPT * self._right[place] + (self.tokens[self._source] == token)
            self._judged[place] = KEPT * self._judged[place] + 1
        self._add(token)

    def _add(self, token: int) -> None:
        goes_on = self._length and self.tokens[self._source] == token
        self._source, self._length = (self._source + 1, self._length + 1) if goes_on else (0, 0)
        self.tokens.append(token)
        found, known = len(self.tokens), self._places
        for length in range(1, min(LONGEST, found) + 1):
            key = tuple(self.tokens[found - length :])
            if min(key) < 0:  # an embedding has no token
                break
            place = known.get(key)
            if place is not None and self._length <= length:
                self._source, self._length = place, length
            known[key] = found

    def guess(self, place: int) -> tuple[int, float] | None:
        """Return the token `place` places after the next one, if all before it are as guessed, and the chance that it
        is right then; None without a match.
        """
        if not self._length:
            return None
        own = min(self._length + place, len(SURE)) - 1
        period = len(self.tokens) - self._source  # the match may reach to the end, and goes on with the guess itself
        token = self.tokens[self._source + place % period]
        return None if token < 0 else (token, self._right[own] / self._judged[own])
