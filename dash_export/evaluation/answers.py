"""Answers that are generated under the policy and compared with a target: LAMBADA's last word, exact matches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dash_export.artifacts import Progress, no_progress
from dash_export.decision import DENSE_POSITIONS
from dash_export.errors import RequestError
from dash_export.evaluation.bootstrap import interval
from dash_export.evaluation.data import Answer
from dash_export.evaluation.results import AnswerResult
from dash_export.evaluation.settings import Entrant
from dash_export.runtime import DashRuntime

DENSE_SHARE = 0.5
SPARE_TOKENS = 3
"""Tokens decoded beyond the target's own: a word may be cut otherwise, and its end must be seen."""


@dataclass(frozen=True)
class EncodedAnswer:
    """`ids` of the context, how many of them are dense, and how many tokens to decode."""

    answer: Answer
    ids: list[int]
    dense: int
    new_tokens: int


def encode_answers(runtime: DashRuntime, answers: Sequence[Answer], name: str, share: float) -> list[EncodedAnswer]:
    """`share` of each context, 0 to 1, is dense. Raises RequestError for another share, and for a context that does not
    fit the model's.
    """
    if not 0 <= share <= 1:
        raise RequestError(f"The share of a context that is dense is a number from 0 to 1, not {share}.")
    encoded = []
    longest = runtime.engines.model.max_positions
    for answer in answers:
        context = answer.context.rstrip()
        ids = runtime.text.encode(context)
        new_tokens = len(runtime.text.encode(f" {answer.target.strip()}", special=False)) + SPARE_TOKENS
        if len(ids) + new_tokens > longest:
            raise RequestError(
                f"{name}:{answer.line} needs {len(ids)} + {new_tokens} tokens; the model's context holds {longest}."
            )
        dense = min(len(ids), max(DENSE_POSITIONS, round(share * len(ids))))
        encoded.append(EncodedAnswer(answer, ids, dense, new_tokens))
    return encoded


def measure_answers(
    entrants: Sequence[Entrant], answers: Sequence[EncodedAnswer], progress: Progress = no_progress
) -> list[AnswerResult]:
    """Greedy decode by every entrant; the first is dense, and flips are counted against it.

    The first part of a context is dense like a prompt; the rest goes through decode one token at a time under the
    setting, as if the model had written it. Were the whole context dense, skipping could not touch the first token
    of an answer, and most of LAMBADA's last words are one token.
    """
    right = np.zeros((len(entrants), len(answers)), np.bool_)
    for number, item in enumerate(answers):
        for index, entrant in enumerate(entrants):
            right[index, number] = matches(_decode(entrant, item), item.answer.target)
            progress("answers", number * len(entrants) + index + 1, len(answers) * len(entrants))
    return [
        AnswerResult(*entrant.figures(), len(answers), interval(correct), interval(correct != right[0]))
        for entrant, correct in zip(entrants, right, strict=True)
    ]


def _decode(entrant: Entrant, item: EncodedAnswer) -> str:
    session = entrant.session()
    logits = session.prefill(item.ids[: item.dense])
    for token in item.ids[item.dense :]:
        logits, actions = session.decode_one(token)
        entrant.took(actions[None])
    made = [int(logits.argmax())]
    while len(made) < item.new_tokens and made[-1] not in session.text.eos_ids:
        logits, actions = session.decode_one(made[-1])
        entrant.took(actions[None])
        made.append(int(logits.argmax()))
    return session.text.decode(made)


def matches(made: str, target: str) -> bool:
    """Whether a generated text begins with the target, as whole words."""
    made, target = made.lstrip(), target.strip()
    following = made[len(target) : len(target) + 1]
    return made.startswith(target) and not (target[-1].isalnum() and following.isalnum())
