"""Matches of a text with itself."""

import numpy as np

from dash_export.core.lookup import Lookup


def guessed(lookup: Lookup, count: int) -> list[int]:
    return [found[0] for place in range(count) if (found := lookup.guess(place)) is not None]


def test_the_longest_match_and_of_these_the_last() -> None:
    lookup = Lookup()
    assert lookup.guess(0) is None
    lookup.read([1, 2, 3, 4, 9, 8, 3, 4, 7, 6, 5, 2, 3, 4])
    assert guessed(lookup, 3) == [9, 8, 3], "2 3 4, not the later 3 4"
    lookup.add(9)
    assert guessed(lookup, 2) == [8, 3]
    lookup.add(0)
    assert lookup.guess(0) is None
    lookup.add(4)
    assert guessed(lookup, 2) == [9, 0], "the last 4"


def test_a_repetition_goes_on() -> None:
    lookup = Lookup()
    lookup.read([5, 6, 7, 5, 6])
    assert guessed(lookup, 7) == [7, 5, 6, 7, 5, 6, 7]


def test_chances_follow_the_text() -> None:
    """Matches that hold make the next one likelier, those that do not less likely; a prompt's do not count."""
    rng = np.random.default_rng(0)
    holds, fails, read = Lookup(), Lookup(), Lookup()
    for _ in range(60):
        for token in (1, 2, 3, 4):
            holds.add(token)
        for token in rng.integers(3, size=20).tolist():
            fails.add(token)
        read.read([1, 2, 3, 4])
    sure = [lookup.guess(0)[1] for lookup in (holds, read, fails)]  # type: ignore[index]
    assert sure[0] > 0.97
    assert sure[0] > sure[1] > sure[2]
    assert sure[2] < 0.5
    assert 0.3 > Lookup.guess(_one(), 0)[1] > 0.05  # type: ignore[index]


def _one() -> Lookup:
    lookup = Lookup()
    lookup.read([1, 2, 1])
    return lookup


def test_embeddings_match_nothing() -> None:
    lookup = Lookup()
    lookup.read([-1, -1, -1])
    assert lookup.guess(0) is None
    lookup.read([3, -1, 3])
    assert lookup.guess(0) is None, "an embedding is no draft"
