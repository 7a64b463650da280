"""Multiple choice: which choice is the likeliest continuation of the query."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dash_export.artifacts import Progress, no_progress
from dash_export.decision import DENSE_POSITIONS
from dash_export.errors import RequestError
from dash_export.evaluation.bootstrap import interval
from dash_export.evaluation.data import Question
from dash_export.evaluation.results import ChoiceResult
from dash_export.evaluation.settings import Entrant
from dash_export.runtime import DashRuntime


@dataclass(frozen=True)
class EncodedQuestion:
    """Token ids of query + choice for every choice, and how many of them are the query's."""

    question: Question
    sequences: tuple[tuple[list[int], int], ...]


def encode_pair(runtime: DashRuntime, context: str, continuation: str) -> tuple[list[int], int]:
    """Token ids of both together, and how many of them are the context's.

    As lm-eval does: spaces at the end of the context belong to the continuation, and the whole is tokenised at once.
    """
    kept = context.rstrip()
    whole = runtime.text.encode(context + continuation)
    return whole, len(runtime.text.encode(kept)) if kept else 0


def encode_questions(runtime: DashRuntime, questions: Sequence[Question], name: str) -> list[EncodedQuestion]:
    """Raises RequestError for a question that the model's context does not hold or a choice without a token of its
    own.
    """
    encoded = []
    longest = runtime.engines.model.max_positions
    for question in questions:
        sequences = []
        for choice in question.choices:
            ids, context = encode_pair(runtime, question.query, f" {choice}")
            if len(ids) > longest:
                raise RequestError(
                    f"{name}:{question.line} has {len(ids)} tokens with a choice; the model's context holds {longest}."
                )
            if not 0 < context < len(ids):
                raise RequestError(f"{name}:{question.line}: the choice {choice!r:.60} has no token of its own.")
            sequences.append((ids, context))
        encoded.append(EncodedQuestion(question, tuple(sequences)))
    return encoded


def measure_choices(
    entrants: Sequence[Entrant], questions: Sequence[EncodedQuestion], progress: Progress = no_progress
) -> list[ChoiceResult]:
    """Every question by every entrant; the first is dense, and flips are counted against it.

    The query is dense, like a prompt, so the first token of a choice is predicted densely; the rest of the choice is
    under the setting, as in decode.
    """
    right = np.zeros((len(entrants), len(questions), 2), np.bool_)
    for number, item in enumerate(questions):
        lengths = np.array([len(choice) for choice in item.question.choices])
        for index, entrant in enumerate(entrants):
            likelihoods = np.array([_likelihood(entrant, *pair) for pair in item.sequences])
            gold = item.question.gold
            right[index, number] = likelihoods.argmax() == gold, (likelihoods / lengths).argmax() == gold
            progress("multiple choice", number * len(entrants) + index + 1, len(questions) * len(entrants))
    return [
        ChoiceResult(
            *entrant.figures(),
            len(questions),
            interval(correct[:, 0]),
            interval(correct[:, 1]),
            interval(correct[:, 1] != right[0, :, 1]),
        )
        for entrant, correct in zip(entrants, right, strict=True)
    ]


def _likelihood(entrant: Entrant, ids: list[int], context: int) -> float:
    score = entrant.session().score(ids, prefix=context)
    entrant.took(score.actions[max(context, DENSE_POSITIONS) : -1])
    return float(score.log_likelihoods[context - 1 :].sum(dtype=np.float64))
