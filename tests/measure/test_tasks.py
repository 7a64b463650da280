"""Multiple choice and generated answers against what sessions give directly."""

import numpy as np
import pytest

from dash_export import DashRuntime
from dash_export.errors import RequestError
from dash_export.measure.candidates import Candidate, candidates
from dash_export.measure.score import score
from dash_export.measure.tasks import (
    Answer,
    AnswerScore,
    ChoiceScore,
    Question,
    answered,
    encode_pair,
    likelihood,
    matches,
)
from tests.measure.test_score import SETTINGS
from tests.tiny import TEXT, log_softmax

CONTEXT = "The layers of a decoder are not equally needed, and some"


def test_choices(runtime: DashRuntime) -> None:
    """One choice is a single token, of which nothing is under the setting."""
    asked = [
        Question(1, "The layers of a decoder ", ("are not equally needed", "hardly", "at all, and some"), 0),
        Question(2, "Some of them", ("hardly at all", "are needed"), 1),
        Question(3, "And", ("equally, and hardly", ","), 0),
    ]
    results = score(ChoiceScore(runtime, asked, "q"), candidates(runtime, SETTINGS))
    right = {}
    for setting, result in zip(SETTINGS, results, strict=True):
        raw, normalised = [], []
        for question in asked:
            likelihoods = []
            for choice in question.choices:
                context = len(runtime.text.encode(question.query.rstrip()))
                whole = runtime.text.encode(f"{question.query} {choice}")
                assert encode_pair(runtime, question.query, f" {choice}") == (whole, context)
                q = log_softmax(runtime.session_with(setting).logits(whole, prefix=context))
                likelihoods.append(sum(q[i - 1, whole[i]] for i in range(context, len(whole))))
                found, actions = likelihood(Candidate(runtime, setting), whole, context)
                assert found == pytest.approx(likelihoods[-1], rel=1e-4)
                assert len(actions) == len(whole) - 1 - context
                assert len(likelihood(Candidate(runtime, setting), whole, len(whole) - 1)[1]) == 0, (
                    "a single one is dense"
                )
            raw.append(np.argmax(likelihoods) == question.gold)
            lengths = [len(choice) for choice in question.choices]
            normalised.append(np.argmax(np.array(likelihoods) / lengths) == question.gold)
        right[setting.kind] = normalised
        assert result.figures["accuracy"].value == np.mean(raw)
        assert result.figures["normalised"].value == np.mean(normalised)
        assert result.figures["flips"].value == np.mean(np.array(normalised) != right["dense"])
    assert (results[0].layers, results[1].layers) == (6, 3)
    with pytest.raises(RequestError, match=r"q:9 has \d+ tokens"):
        ChoiceScore(runtime, [Question(9, TEXT, ("a", "b"), 0)], "q")


@pytest.mark.parametrize(
    ("made", "target", "found"),
    [
        (" signs of it", " signs", True),
        ("signsX", "signs", False),
        ("signs.", " signs", True),
        (" Signs", "signs", False),
        ("421", "42", False),
        ("yes!!", "yes!", True),
        ("", "x", False),
    ],
)
def test_matches(made: str, target: str, found: bool) -> None:
    assert matches(made, target) == found


def test_answers(runtime: DashRuntime) -> None:
    """Half of the context goes through decode."""
    ids = runtime.text.encode(CONTEXT)
    dense = len(ids) // 2
    session = runtime.session("dense")
    target = runtime.text.decode(session.generate(ids, 3).tokens.tolist())
    assert target.strip()
    asked = [Answer(1, f"{CONTEXT} ", target), Answer(2, CONTEXT, "no such answer")]
    results = score(AnswerScore(runtime, asked, "a"), candidates(runtime, SETTINGS))
    assert results[0].figures["exact"].value == 0.5
    assert (results[0].layers, results[1].layers) == (6, 3)
    assert results[0].tokens >= 2 * (len(ids) - dense)
    with pytest.raises(RequestError, match=r"a:5 needs \d+ \+ \d+ tokens"):
        AnswerScore(runtime, [Answer(5, TEXT, "y")], "a")


def test_answers_are_decoded_under_the_policy(runtime: DashRuntime) -> None:
    """What follows a forced half is what a teacher-forced pass over the same text would choose."""
    ids = runtime.text.encode(CONTEXT)
    dense = len(ids) // 2
    for setting in SETTINGS:
        logits = runtime.session_with(setting).logits(ids, prefix=dense)
        expected = runtime.text.decode([int(logits[-1].argmax())])
        made, actions = answered(Candidate(runtime, setting), ids[:dense], ids[dense:], 4)
        assert made.startswith(expected)
        assert len(actions) >= len(ids) - dense
