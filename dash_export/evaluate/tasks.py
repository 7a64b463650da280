"""Scores on tasks: multiple choice, generated answers, and how long an answer agrees with dense.

Each `prepare` checks and encodes all items, and returns what scores them, by every candidate in turn; the first is
dense.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from dash_export.artifacts import Progress
from dash_export.decision import DENSE_POSITIONS
from dash_export.errors import RequestError
from dash_export.evaluate.candidates import Candidate, Result
from dash_export.evaluate.intervals import Interval, interval
from dash_export.evaluate.task_files import Answer, Prompt, Question
from dash_export.runtime import DashRuntime

SPARE_TOKENS = 3
"""Tokens decoded beyond the target's own: a word may be cut otherwise, and its end must be seen."""

Score = Callable[[Sequence[Candidate], Progress], Sequence[Result]]
_T = TypeVar("_T")


@dataclass(frozen=True)
class ChoiceResult(Result):
    """Multiple choice: `accuracy` by log-likelihood, `normalised` per character of the choice, `flips`: share of
    questions that are right with dense and wrong here, or the other way round (normalised; arXiv 2407.09141).
    """

    accuracy: Interval
    normalised: Interval
    flips: Interval


@dataclass(frozen=True)
class AnswerResult(Result):
    """Generated answers: `exact`: share that is the target; `flips`: right with dense and wrong here, or the other way
    round.
    """

    exact: Interval
    flips: Interval


@dataclass(frozen=True)
class PromptResult(Result):
    """Greedy answers against dense's: `agreement`: tokens before the first difference; `share`: of positions that are
    equal; `identical`: share of answers equal to the end. The first token, which the dense prefill makes, is not
    counted.
    """

    agreement: Interval
    share: Interval
    identical: Interval


def _figures(
    candidates: Sequence[Candidate],
    items: Sequence[_T],
    measure: Callable[[Candidate, _T], tuple[float, ...]],
    said: tuple[str, Progress],
) -> npt.NDArray[np.float64]:
    """[candidates, figures, items]: every item by every candidate in turn."""
    rows = []
    for number, item in enumerate(items):
        for index, candidate in enumerate(candidates):
            rows.append(measure(candidate, item))
            said[1](said[0], number * len(candidates) + index + 1, len(items) * len(candidates))
    figures = np.array(rows, np.float64).reshape(len(items), len(candidates), -1)
    return np.transpose(figures, (1, 2, 0))


def prepare_choices(runtime: DashRuntime, questions: Sequence[Question], name: str) -> Score:
    """Multiple choice: the likeliest continuation of the query. The query is dense, like a prompt, so the first token
    of a choice is predicted densely; the rest of the choice is under the setting, as in decode.

    Raises RequestError for a question that the model's context does not hold or a choice without a token of its own.
    """
    longest = runtime.engines.model.max_positions

    def encoded(question: Question, choice: str) -> tuple[list[int], int]:
        ids, context = encode_pair(runtime, question.query, f" {choice}")
        if len(ids) > longest:
            raise RequestError(
                f"{name}:{question.line} has {len(ids)} tokens with a choice; the model's context holds {longest}."
            )
        if not 0 < context < len(ids):
            raise RequestError(f"{name}:{question.line}: the choice {choice!r:.60} has no token of its own.")
        return ids, context

    items = [(question, [encoded(question, choice) for choice in question.choices]) for question in questions]

    def right(candidate: Candidate, item: tuple[Question, list[tuple[list[int], int]]]) -> tuple[float, float]:
        question, pairs = item
        likelihoods = np.array([likelihood(candidate, *pair) for pair in pairs])
        lengths = np.array([len(choice) for choice in question.choices])
        return float(likelihoods.argmax() == question.gold), float((likelihoods / lengths).argmax() == question.gold)

    def score(candidates: Sequence[Candidate], progress: Progress) -> list[ChoiceResult]:
        figures = _figures(candidates, items, right, ("multiple choice", progress))
        dense = figures[0, 1]
        return [
            ChoiceResult(*one.taken(), len(items), interval(raw), interval(normal), interval(normal != dense))
            for one, (raw, normal) in zip(candidates, figures, strict=True)
        ]

    return score


def encode_pair(runtime: DashRuntime, context: str, continuation: str) -> tuple[list[int], int]:
    """Token ids of both together, and how many of them are the context's.

    As lm-eval does: spaces at the end of the context belong to the continuation, and the whole is tokenised at once.
    """
    kept = context.rstrip()
    whole = runtime.text.encode(context + continuation)
    return whole, len(runtime.text.encode(kept)) if kept else 0


def likelihood(candidate: Candidate, ids: list[int], context: int) -> float:
    """log P(ids after `context` | the first `context` ones), nats."""
    score = candidate.session().score(ids, prefix=context)
    candidate.took(score.actions[max(context, DENSE_POSITIONS) : -1])
    return float(score.log_likelihoods[context - 1 :].sum(dtype=np.float64))


def prepare_answers(runtime: DashRuntime, answers: Sequence[Answer], name: str, dense_share: float) -> Score:
    """Greedy answers that are compared with a target.

    The first part of a context, `dense_share` of it, 0 to 1, is dense like a prompt; the rest goes through decode one
    token at a time under the setting, as if the model had written it. Were the whole context dense, skipping could not
    touch the first token of an answer, and most of LAMBADA's last words are one token.

    Raises RequestError for another share, and for a context that does not fit the model's.
    """
    if not 0 <= dense_share <= 1:
        raise RequestError(f"The share of a context that is dense is a number from 0 to 1, not {dense_share}.")
    longest = runtime.engines.model.max_positions
    items = []
    for answer in answers:
        ids = runtime.text.encode(answer.context.rstrip())
        new_tokens = len(runtime.text.encode(f" {answer.target.strip()}", special=False)) + SPARE_TOKENS
        if len(ids) + new_tokens > longest:
            raise RequestError(
                f"{name}:{answer.line} needs {len(ids)} + {new_tokens} tokens; the model's context holds {longest}."
            )
        dense = min(len(ids), max(DENSE_POSITIONS, round(dense_share * len(ids))))
        items.append((answer.target, ids[:dense], ids[dense:], new_tokens))

    def right(candidate: Candidate, item: tuple[str, list[int], list[int], int]) -> tuple[float]:
        return (float(matches(answered(candidate, *item[1:]), item[0])),)

    def score(candidates: Sequence[Candidate], progress: Progress) -> list[AnswerResult]:
        figures = _figures(candidates, items, right, ("answers", progress))[:, 0]
        return [
            AnswerResult(*one.taken(), len(items), interval(exact), interval(exact != figures[0]))
            for one, exact in zip(candidates, figures, strict=True)
        ]

    return score


def answered(candidate: Candidate, prompt: list[int], known: list[int], new_tokens: int) -> str:
    """At most so many new tokens after a prompt, which is dense, and `known` tokens, which are decoded."""
    session = candidate.session()
    logits = session.prefill(prompt)
    for token in known:
        logits, actions = session.decode_one(token)
        candidate.took(actions[None])
    made = [int(logits.argmax())]
    while len(made) < new_tokens and made[-1] not in session.text.eos_ids:
        logits, actions = session.decode_one(made[-1])
        candidate.took(actions[None])
        made.append(int(logits.argmax()))
    return session.text.decode(made)


def matches(made: str, target: str) -> bool:
    """Whether a generated text begins with the target, as whole words."""
    made, target = made.lstrip(), target.strip()
    following = made[len(target) : len(target) + 1]
    return made.startswith(target) and not (target[-1].isalnum() and following.isalnum())


def prepare_prompts(runtime: DashRuntime, prompts: Sequence[Prompt], name: str, new_tokens: int) -> Score:
    """How long a greedy answer stays the dense one, the difference that a user sees first: answers of up to
    `new_tokens` + 1 tokens, in the model's chat template when it has one. Raises RequestError for a prompt that leaves
    no room.
    """
    longest = runtime.engines.model.max_positions
    items = []
    for prompt in prompts:
        message = [{"role": "user", "content": prompt.text}]
        ids = runtime.text.chat(message) if runtime.text.template is not None else runtime.text.encode(prompt.text)
        if not 0 < len(ids) < longest - new_tokens:
            raise RequestError(
                f"{name}:{prompt.line} is a prompt of {len(ids)} tokens: with {new_tokens + 1} new ones it must fit "
                f"the model's context of {longest}."
            )
        items.append(ids)

    def score(candidates: Sequence[Candidate], progress: Progress) -> list[PromptResult]:
        dense: dict[int, npt.NDArray[np.int64]] = {}

        def compared(candidate: Candidate, item: tuple[int, list[int]]) -> tuple[float, ...]:
            number, ids = item
            made = candidate.session().generate(ids, new_tokens + 1)
            candidate.took(made.actions[1:])
            return agreement(dense.setdefault(number, made.tokens[1:]), made.tokens[1:])

        figures = _figures(candidates, list(enumerate(items)), compared, ("prompts", progress))
        return [
            PromptResult(*one.taken(), len(items), *(interval(column) for column in own))
            for one, own in zip(candidates, figures, strict=True)
        ]

    return score


def agreement(expected: npt.NDArray[np.int64], made: npt.NDArray[np.int64]) -> tuple[int, float, bool]:
    """Tokens before the first difference; share of positions of the longer answer that are equal; whether all are."""
    shorter, longer = sorted((len(expected), len(made)))
    same = expected[:shorter] == made[:shorter]
    differs = np.flatnonzero(~same)
    first = int(differs[0]) if differs.size else shorter
    return first, float(same.sum() / longer) if longer else 1.0, shorter == longer and not differs.size
