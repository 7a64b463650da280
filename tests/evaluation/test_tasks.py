"""Prompts, multiple choice and generated answers against what sessions give directly."""

from __future__ import annotations

import numpy as np
import pytest

from dash_export import DashRuntime
from dash_export.errors import RequestError
from dash_export.evaluation import answers, choices, prompts
from dash_export.evaluation.data import Answer, Prompt, Question
from dash_export.evaluation.settings import Entrant, entrants
from tests.evaluation.test_text import SETTINGS, TEXT, log_softmax

CONTEXT = "The layers of a decoder are not equally needed, and some"


@pytest.mark.parametrize(
    ("expected", "made", "found"),
    [
        ([1, 2, 3], [1, 2, 3], (3, 1.0, True)),
        ([1, 2, 3], [1, 9, 3], (1, 2 / 3, False)),
        ([1, 2], [1, 2, 3, 4], (2, 0.5, False)),
        ([5], [6], (0, 0.0, False)),
        ([], [], (0, 1.0, True)),
    ],
)
def test_agreement(expected: list[int], made: list[int], found: tuple[int, float, bool]) -> None:
    assert prompts.compare(np.array(expected, np.int64), np.array(made, np.int64)) == found


def test_prompts(runtime: DashRuntime) -> None:
    asked = [Prompt(1, "Hello there"), Prompt(2, "What is up?")]
    encoded = prompts.encode_prompts(runtime, asked, "p", 12)
    assert encoded[0] == runtime.text.chat([{"role": "user", "content": "Hello there"}])
    dense, static, _ = prompts.measure_prompts(entrants(runtime, SETTINGS), encoded, 11)
    assert (dense.identical.value, dense.share.value, dense.layers) == (1.0, 1.0, 6.0)
    lengths = []
    for ids in encoded:
        one, other = (runtime.session_with(s).generate(ids, 12).tokens[1:].tolist() for s in SETTINGS[:2])
        lengths.append(next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(one)))
    assert static.agreement.value == np.mean(lengths)
    assert static.layers == 3
    with pytest.raises(RequestError, match=r"p:1 .* must fit"):
        prompts.encode_prompts(runtime, asked, "p", 510)


def test_choices(runtime: DashRuntime) -> None:
    asked = [
        Question(1, "The layers of a decoder ", ("are not equally needed", "hardly", "at all, and some"), 0),
        Question(2, "Some of them", ("hardly at all", "are needed"), 1),
        Question(3, "And", ("equally, and hardly", "not a decoder of layers"), 0),
    ]
    results = choices.measure_choices(entrants(runtime, SETTINGS), choices.encode_questions(runtime, asked, "q"))
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
    assert results[0].layers == 6
    assert results[1].layers == 3


def test_the_likelihood_of_a_choice(runtime: DashRuntime) -> None:
    ids, context = choices.encode_pair(runtime, "The layers of a ", " decoder are needed")
    assert ids[:context] == runtime.text.encode("The layers of a")
    for setting in SETTINGS:
        entrant = Entrant(runtime, setting)
        found = choices._likelihood(entrant, ids, context)
        q = log_softmax(runtime.session_with(setting).logits(ids, prefix=context))
        assert found == pytest.approx(sum(q[i - 1, ids[i]] for i in range(context, len(ids))), rel=1e-4)
        assert entrant.tokens == len(ids) - 1 - context


def test_questions_that_do_not_fit(runtime: DashRuntime) -> None:
    with pytest.raises(RequestError, match=r"q:9 has \d+ tokens"):
        choices.encode_questions(runtime, [Question(9, TEXT, ("a", "b"), 0)], "q")


@pytest.mark.parametrize(
    ("made", "target", "found"),
    [
        (" signs of it", " signs", True),
        (" sign", "signs", False),
        ("signsX", "signs", False),
        ("signs.", " signs", True),
        (" Signs", "signs", False),
        ("42, because", "42", True),
        ("421", "42", False),
        ("yes!!", "yes!", True),
        ("", "x", False),
    ],
)
def test_matches(made: str, target: str, found: bool) -> None:
    assert answers.matches(made, target) == found


def test_answers(runtime: DashRuntime) -> None:
    ids = runtime.text.encode(CONTEXT)
    target = runtime.text.decode(runtime.session("dense").generate(ids, 3).tokens.tolist())
    assert target.strip()
    asked = [Answer(1, f"{CONTEXT} ", target), Answer(2, CONTEXT, "no such answer")]
    whole = answers.encode_answers(runtime, asked, "a", 1.0)
    half = answers.encode_answers(runtime, asked, "a", 0.5)
    assert (whole[0].dense, half[0].dense) == (len(ids), round(len(ids) / 2))
    results = answers.measure_answers(entrants(runtime, SETTINGS), half)
    assert results[0].exact.value == 0.5
    assert (results[0].layers, results[1].layers) == (6, 3)
    # Half of the context goes through decode: its tokens are counted, and so are those decoded after it.
    assert results[1].tokens >= 2 * (len(ids) - half[0].dense)
    with pytest.raises(RequestError, match=r"a:5 needs \d+ \+ \d+ tokens"):
        answers.encode_answers(runtime, [Answer(5, TEXT, "y")], "a", 0.5)
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(RequestError, match="from 0 to 1"):
            answers.encode_answers(runtime, asked, "a", share)


def test_answers_are_decoded_under_the_policy(runtime: DashRuntime) -> None:
    """What follows a forced half is what a teacher-forced pass over the same text would choose."""
    item = answers.encode_answers(runtime, [Answer(1, CONTEXT, "x")], "a", 0.5)[0]
    for setting in SETTINGS:
        logits = runtime.session_with(setting).logits(item.ids, prefix=item.dense)
        expected = runtime.text.decode([int(logits[-1].argmax())])
        assert answers._decode(Entrant(runtime, setting), item).startswith(expected)
