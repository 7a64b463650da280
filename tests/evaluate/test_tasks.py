"""Prompts, multiple choice and generated answers against what sessions give directly."""

from __future__ import annotations

import numpy as np
import pytest

from dash_export import DashRuntime
from dash_export.artifacts import no_progress
from dash_export.errors import RequestError
from dash_export.evaluate.candidates import Candidate, candidates
from dash_export.evaluate.task_files import Answer, Prompt, Question
from dash_export.evaluate.tasks import (
    agreement,
    answered,
    encode_pair,
    likelihood,
    matches,
    prepare_answers,
    prepare_choices,
    prepare_prompts,
)
from tests.evaluate.test_texts import SETTINGS, TEXT, log_softmax

CONTEXT = "The layers of a decoder are not equally needed, and some"


@pytest.mark.parametrize(
    ("expected", "made", "found"),
    [
        ([1, 2, 3], [1, 2, 3], (3, 1.0, True)),
        ([1, 2, 3], [1, 9, 3], (1, 2 / 3, False)),
        ([1, 2], [1, 2, 3, 4], (2, 0.5, False)),
        ([], [], (0, 1.0, True)),
    ],
)
def test_agreement(expected: list[int], made: list[int], found: tuple[int, float, bool]) -> None:
    assert agreement(np.array(expected, np.int64), np.array(made, np.int64)) == found


def test_prompts(runtime: DashRuntime) -> None:
    asked = [Prompt(1, "Hello there"), Prompt(2, "What is up?")]
    dense, static, _ = prepare_prompts(runtime, asked, "p", 11)(candidates(runtime, SETTINGS), no_progress)
    assert (dense.identical.value, dense.share.value, dense.layers) == (1.0, 1.0, 6.0)
    lengths = []
    for prompt in asked:
        ids = runtime.text.chat([{"role": "user", "content": prompt.text}])
        one, other = (runtime.session_with(s).generate(ids, 12).tokens[1:].tolist() for s in SETTINGS[:2])
        lengths.append(next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(one)))
    assert static.agreement.value == np.mean(lengths)
    assert static.layers == 3
    with pytest.raises(RequestError, match=r"p:1 .* must fit"):
        prepare_prompts(runtime, asked, "p", 510)


def test_choices(runtime: DashRuntime) -> None:
    """One choice is a single token, of which nothing is under the setting."""
    asked = [
        Question(1, "The layers of a decoder ", ("are not equally needed", "hardly", "at all, and some"), 0),
        Question(2, "Some of them", ("hardly at all", "are needed"), 1),
        Question(3, "And", ("equally, and hardly", ","), 0),
    ]
    results = prepare_choices(runtime, asked, "q")(candidates(runtime, SETTINGS), no_progress)
    right = {}
    for setting, result in zip(SETTINGS, results, strict=True):
        raw, normalised = [], []
        for question in asked:
            likelihoods = []
            for choice in question.choices:
                context = runtime.text.encode(question.query.rstrip())
                whole = runtime.text.encode(f"{question.query} {choice}")
                q = log_softmax(runtime.session_with(setting).logits(whole, prefix=len(context)))
                likelihoods.append(sum(q[i - 1, whole[i]] for i in range(len(context), len(whole))))
            raw.append(np.argmax(likelihoods) == question.gold)
            lengths = [len(choice) for choice in question.choices]
            normalised.append(np.argmax(np.array(likelihoods) / lengths) == question.gold)
        right[setting.kind] = normalised
        assert result.accuracy.value == np.mean(raw)
        assert result.normalised.value == np.mean(normalised)
        assert result.flips.value == np.mean(np.array(normalised) != right["dense"])
    assert (results[0].layers, results[1].layers) == (6, 3)
    with pytest.raises(RequestError, match=r"q:9 has \d+ tokens"):
        prepare_choices(runtime, [Question(9, TEXT, ("a", "b"), 0)], "q")


def test_the_likelihood_of_a_choice(runtime: DashRuntime) -> None:
    ids, context = encode_pair(runtime, "The layers of a ", " decoder are needed")
    assert ids[:context] == runtime.text.encode("The layers of a")
    for setting in SETTINGS:
        candidate = Candidate(runtime, setting)
        found = likelihood(candidate, ids, context)
        q = log_softmax(runtime.session_with(setting).logits(ids, prefix=context))
        assert found == pytest.approx(sum(q[i - 1, ids[i]] for i in range(context, len(ids))), rel=1e-4)
        assert candidate.tokens == len(ids) - 1 - context
        likelihood(candidate, ids, len(ids) - 1)
        assert candidate.tokens == len(ids) - 1 - context, "a single token is predicted densely"


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
    ids = runtime.text.encode(CONTEXT)
    target = runtime.text.decode(runtime.session("dense").generate(ids, 3).tokens.tolist())
    assert target.strip()
    asked = [Answer(1, f"{CONTEXT} ", target), Answer(2, CONTEXT, "no such answer")]
    whole, half = (
        prepare_answers(runtime, asked, "a", share)(candidates(runtime, SETTINGS), no_progress) for share in (1.0, 0.5)
    )
    assert half[0].exact.value == 0.5
    assert (half[0].layers, half[1].layers) == (6, 3)
    # Half of the context goes through decode: its tokens are counted, and so are those decoded after it.
    assert half[0].tokens == whole[0].tokens + 2 * (len(ids) - round(len(ids) / 2))
    with pytest.raises(RequestError, match=r"a:5 needs \d+ \+ \d+ tokens"):
        prepare_answers(runtime, [Answer(5, TEXT, "y")], "a", 0.5)
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(RequestError, match="from 0 to 1"):
            prepare_answers(runtime, asked, "a", share)


def test_answers_are_decoded_under_the_policy(runtime: DashRuntime) -> None:
    """What follows a forced half is what a teacher-forced pass over the same text would choose."""
    ids = runtime.text.encode(CONTEXT)
    dense = len(ids) // 2
    for setting in SETTINGS:
        logits = runtime.session_with(setting).logits(ids, prefix=dense)
        expected = runtime.text.decode([int(logits[-1].argmax())])
        assert answered(Candidate(runtime, setting), ids[:dense], ids[dense:], 4).startswith(expected)
